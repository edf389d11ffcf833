"""Decoding: the bytes of an image file, or an array, to uint8 pixels (H, W, C) of the channels a run was asked for.

Same bytes with simplejpeg and without: both paths run libjpeg-turbo's accurate integer DCT and smooth chroma
upsampling. Whether a file is readable is the same question on both paths too, for Pillow has the last word.
"""

import contextlib
import functools
import io
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

try:
    import simplejpeg
except ImportError:  # optional: Pillow reads the same pixels, slower
    simplejpeg = None

# What Pillow may try. Not all it can: EPS, for one, would start Ghostscript on whatever the file says.
# HEIF and JXL come with packages of the extra `formats`.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "JXL")
# Above it an image is taken for a decompression bomb (the limit where Pillow refuses, too). `allow_pixels` changes it.
DEFAULT_MAX_PIXELS = 178_956_970
MAX_PIXELS = DEFAULT_MAX_PIXELS

_NPY = b"\x93NUMPY"
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112  # EXIF 2.32, table 4
SHRINKS = (
    1,
    2,
    4,
    8,
)  # times that libjpeg makes an image smaller without decoding all of it, at the speed it has for them
# What EXIF's orientations do to a stored image to show it: transpose it, then mirror its rows, then its columns
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
# libjpeg's smooth upsampling of a row looks at the chroma row below it, which covers two luma rows
_CONTEXT_ROWS = 2


class BadImage(Exception):
    """An image that cannot be read. `reason` says why, in a few words that go behind the file's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def allow_pixels(most: int | None) -> None:
    """Set the number of pixels above which an image is refused, for this process and those forked from it (None: leave
    it)."""
    global MAX_PIXELS  # noqa: PLW0603 -- a setting of the process, as Pillow's own is
    if most is not None:
        MAX_PIXELS = most
        Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit; `_pillow` looks at the size itself


def _too_large(width: int, height: int) -> BadImage:
    why = f"more than {MAX_PIXELS:,} (a decompression bomb?)"
    return BadImage(f"{width} x {height} pixels, {why}: --max-pixels {width * height} allows it")


def decode(item: bytes | np.ndarray, channels: int) -> np.ndarray:
    """The pixels of `item`, uint8 (H, W, channels), upright. The rules are `Picture`'s. Raises BadImage."""
    picture = Picture(item, channels)
    return picture.crop(0, 0, picture.height, picture.width)


class Picture:
    """An image of known `height` and `width` (pixels, upright), whose pixels are decoded when a crop of it is asked
    for.

    `item` is an image file's bytes, the bytes of a .npy file, or an array. An image file becomes 1 channel (luma) or
    3 (RGB), whatever its mode: palettes are looked up, CMYK is converted, alpha is dropped as `Image.convert` drops
    it, the EXIF orientation is applied, and of several frames the first is taken. Depth becomes 8 bits by the full
    range of the type, never by what this image happens to hold: 16 bits lose the lower 8, in Pillow's mode I too
    (which must then hold 0..65535), floats (mode F) must lie in [0, 1] and are multiplied by 255. Arrays and .npy
    hold uint8 or uint16, (H, W) or (H, W, channels), and are the only way to other channel counts; they are not
    converted from one count to another.

    Raises BadImage for what cannot be read: truncated, empty, no image, no pixels, over MAX_PIXELS, another channel
    count. A JPEG that is damaged in the middle, without being cut off, decodes as far as libjpeg goes, as everywhere
    else.
    """

    def __init__(self, item: bytes | np.ndarray, channels: int) -> None:
        self.channels = channels
        self._jpeg: _Jpeg | None = None
        self._pixels: np.ndarray | None = None
        if isinstance(item, np.ndarray):
            self._pixels = _checked(item, channels)
        elif item.startswith(_NPY):
            self._pixels = _checked(_npy(item), channels)
        elif channels not in (1, 3):
            raise BadImage(f"an image file gives 1 or 3 channels; {channels} are read from .npy files only")
        else:
            self._jpeg = _plain_jpeg(item)
            if self._jpeg is None:
                self._pixels = _pillow(item, channels)
        if self._pixels is not None:
            self.height, self.width = self._pixels.shape[:2]
        elif self._jpeg is not None:
            size = self._jpeg.height, self._jpeg.width
            self.height, self.width = size[::-1] if _TURNS[self._jpeg.orientation][0] else size

    @property
    def shrinks(self) -> bool:
        """Whether `crop` can make it smaller while it decodes."""
        return self._jpeg is not None and simplejpeg is not None

    def crop(
        self,
        top: int,
        left: int,
        height: int,
        width: int,
        scratch: "Scratch | None" = None,
        *,
        fast: bool = False,
        by: int = 1,
    ) -> np.ndarray:
        """The pixels of that box (inside the image), uint8 (height, width, channels), perhaps read-only. Raises
        BadImage.

        Exactly the box of the whole decoded image; of a plain JPEG only the rows down to the box's last are decoded.
        With `scratch` the pixels may lie there, until the next crop that is given the same one. `fast`, of a plain JPEG
        with simplejpeg: libjpeg-turbo's fast DCT and plain upsampling of chroma, whose pixels differ by a few levels. `by`,
        one of SHRINKS, where it `shrinks`: the image is that many times smaller (`shrink`), and so is the box.
        """
        if self._pixels is not None:
            return self._pixels[top : top + height, left : left + width]
        assert self._jpeg is not None
        transposed, rows, columns = _TURNS[self._jpeg.orientation]
        # the box in the image as it is stored
        y = -(-self.height // by) - top - height if rows else top
        x = -(-self.width // by) - left - width if columns else left
        box = (x, y, width, height) if transposed else (y, x, height, width)
        stored = self._jpeg_crop(self._jpeg, *box, scratch, fast=fast, by=by)
        if self._jpeg.orientation == 1:
            return stored
        upright = stored.transpose(1, 0, 2) if transposed else stored
        upright = upright[:: -1 if rows else 1, :: -1 if columns else 1]
        pixels = np.empty(upright.shape, np.uint8)
        for channel in range(self.channels):  # five times as fast as all at once, whose innermost loop is three bytes
            pixels[..., channel] = upright[..., channel]
        return pixels

    def _jpeg_crop(
        self,
        jpeg: "_Jpeg",
        top: int,
        left: int,
        height: int,
        width: int,
        scratch: "Scratch | None",
        *,
        fast: bool,
        by: int,
    ) -> np.ndarray:
        """A box of the image as it is stored."""
        data = jpeg.until((top + height) * by)
        if simplejpeg is not None:
            try:
                # not strict: rows left out look like extraneous bytes, and Pillow does not mind damage in the middle
                # either
                pixels = simplejpeg.decode_jpeg(
                    data,
                    "GRAY" if self.channels == 1 else "RGB",
                    fastdct=fast,
                    fastupsample=fast,
                    min_height=-(-min(jpeg.height, (top + height) * by + _CONTEXT_ROWS) // by) if by > 1 else 0,
                    min_width=-(-jpeg.width // by) if by > 1 else 0,
                    buffer=None if scratch is None else scratch.hold(jpeg.height * jpeg.width * self.channels),
                    strict=False,
                )
                return pixels[top : top + height, left : left + width]
            except ValueError:
                pass  # Pillow may know better, and says why where it does not
        box = left, top, left + width, top + height
        if by > 1:
            whole = _pillow(jpeg.data, self.channels, (0, 0, jpeg.width, jpeg.height))
            return whole[::by, ::by][top : top + height, left : left + width]
        try:
            # Pillow's JPEG decoder without its reading of the header, which is known already: a tenth of the time
            mode = "L" if self.channels == 1 else "RGB"
            size = jpeg.width, min(jpeg.height, top + height + _CONTEXT_ROWS)
            return eight_bits(Image.frombytes(mode, size, data, "jpeg", mode, "").crop(box), self.channels)
        except ValueError:
            return _pillow(data, self.channels, box)


def shrink(box: tuple[int, int, int, int], by: int) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) in an image that is `by` times smaller, its edges on the nearest pixels."""
    top, left, bottom, right = ((edge + by // 2) // by for edge in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    return top, left, max(1, bottom - top), max(1, right - left)


class Scratch:
    """Memory for decoded pixels, used again from image to image: fresh memory costs a page fault every 4 KiB, 4 % of a
    decode."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, dtype=np.uint8)

    def hold(self, size: int) -> np.ndarray:
        """At least `size` bytes, uint8 (n,)."""
        if self._bytes.size < size:
            self._bytes = np.empty(size, dtype=np.uint8)
        return self._bytes


@dataclass(frozen=True)
class _Jpeg:
    """A JPEG of one sequential scan, whole to its end marker: what can be decoded from the top down to any row."""

    data: bytes
    height: int
    width: int
    orientation: int  # EXIF's, one of _TURNS; height and width are the stored image's
    height_at: int  # offset of the two bytes of the frame header that hold the height (ITU-T T.81, B.2.2)

    def until(self, bottom: int) -> bytes | bytearray:
        """The file made to say that it ends below row `bottom` (exclusive), so that a decoder stops there. The rows
        above come out as they would from the whole file."""
        rows = bottom + _CONTEXT_ROWS
        if rows >= self.height:
            return self.data
        shortened = bytearray(self.data)
        shortened[self.height_at : self.height_at + 2] = rows.to_bytes(2, "big")
        return shortened


def _plain_jpeg(data: bytes) -> _Jpeg | None:
    """`data` as a _Jpeg, or None where it is anything else, or damaged: Pillow's business, all of it."""
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return None
    orientation: int | None = None
    frame = None  # (height, width, components, offset of the height)
    at = 2
    try:
        while data[at] == 0xFF:
            marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
            if marker in (0xC0, 0xC1):  # SOF0, SOF1: sequential Huffman
                height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
                components = data[at + 9]
                vertical = max(data[at + 11 + 3 * i] & 15 for i in range(components))
                if data[at + 4] != 8 or components not in (1, 3) or vertical > 2:
                    return None
                if not 0 < height * width <= MAX_PIXELS:
                    return None
                frame = height, width, components, at + 5
            elif marker == 0xE1 and data[at + 4 : at + 10] == _EXIF:
                if orientation is not None:  # EXIF in several parts
                    return None
                orientation = _orientation(data[at + 4 : at + 2 + length])
            elif marker == 0xE1 and b"tiff:Orientation" in data[at + 4 : at + 2 + length]:
                return None
            elif marker == 0xDA:  # SOS; one scan holds all components, or there are several scans
                if frame is None or data[at + 4] != frame[2]:
                    return None
                return _Jpeg(data, frame[0], frame[1], orientation or 1, frame[3])
            elif marker not in (0xC4, 0xDB, 0xDD, 0xFE) and not 0xE0 <= marker <= 0xEF:  # DHT DQT DRI COM APPn
                return None
            at += 2 + length
    except (IndexError, ValueError):
        pass
    return None


def _orientation(app1: bytes) -> int:
    """The orientation in an EXIF segment; 1 where there is none, or one that means nothing. Raises ValueError."""
    exif = Image.Exif()
    try:
        exif.load(app1)
        found = exif.get(_ORIENTATION, 1)
    except Exception as error:  # damaged EXIF raises all sorts of things; Pillow's reading of the whole file decides
        raise ValueError("damaged EXIF") from error
    return found if found in _TURNS else 1


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow reads, with the packages of the extra `formats` that are installed."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401 -- importing it registers the format
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _pillow(data: bytes | bytearray, channels: int, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Decode with Pillow. `box` (left, top, right, bottom) is of an upright image only."""
    if not data:
        raise BadImage("the file is empty")
    # Pillow warns of large images, odd EXIF and odd palettes: nothing a user could act on, once per image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG",) if box else _formats()) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise _too_large(file.width, file.height)
                flip = _deep(file, data)
                if channels == 1 and file.format in ("JPEG", "MPO"):
                    file.draft("L", file.size)  # the stored luma itself, as simplejpeg gives it
                image = file.crop(box) if box else ImageOps.exif_transpose(file)
                pixels = eight_bits(image, channels)
                if flip:
                    pixels = 255 - pixels
        except Image.UnidentifiedImageError:
            raise BadImage(_unknown(data)) from None
        except Image.DecompressionBombError as error:
            size = re.search(r"\d+", str(error))
            raise BadImage(
                f"{size[0] if size else 'too many'} pixels, more than {MAX_PIXELS:,} (a decompression bomb?): "
                f"--max-pixels {size[0] if size else 'N'} allows it"
            ) from None
        except BadImage:
            raise
        except Exception as error:  # hostile bytes make codecs raise nearly anything; all of it means unreadable
            said = " ".join(f"{type(error).__name__}: {error}".removeprefix("OSError: ").split())
            raise BadImage(said) from error
    if pixels.size == 0:
        raise BadImage("the image has no pixels")
    return pixels


_BITS, _PHOTOMETRIC, _BANDS, _PLANAR, _SAMPLE_FORMAT = 258, 262, 277, 284, 339  # tags of TIFF 6.0
_CONVERT = "convert it to a PNG of 8 or 16 bits, or to .npy"


def _deep(file: Image.Image, data: bytes | bytearray) -> bool:
    """Whether a picture of more than 8 bits is stored as a negative that Pillow leaves one. Raises BadImage for those
    that Pillow decodes wrongly."""
    if file.format == "TIFF":
        tags: Any = file.tag_v2  # type: ignore[attr-defined]
        bits = max(tags.get(_BITS, (1,)))
        if bits == 8 and tags.get(_SAMPLE_FORMAT, (1,))[0] == 2:
            raise BadImage(f"a TIFF of signed 8 bits, which has no known full scale: {_CONVERT}")
        tiles: Any = getattr(file, "tile", [])
        if bits > 8 and tags.get(_PLANAR) == 2 and tiles and tiles[0][0] == "raw":
            raise BadImage(f"a TIFF of {bits} bits with each colour in a plane of its own, uncompressed: {_CONVERT}")
        if 8 < bits < 16:
            raise BadImage(f"a TIFF of {bits} bits: {_CONVERT}")
        if bits > 8 and tags.get(_PHOTOMETRIC) == 0:
            if file.mode != "I;16":
                raise BadImage(f"a TIFF of {bits} bits stored as a negative (MinIsWhite): {_CONVERT}")
            return True
    elif file.format == "JPEG2000":
        depths = _jpeg2000_bits(data)
        if len(depths) > 1 and max(depths) > 8:
            raise BadImage(f"a JPEG 2000 of {max(depths)} bits in {len(depths)} channels: {_CONVERT}")
    return False


def _jpeg2000_bits(data: bytes | bytearray) -> list[int]:
    """The bits of each component by the marker SIZ (ISO/IEC 15444-1, A.5.1); [] where there is none."""
    at = data.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(data) < at + 42:
        return []
    count = data[at + 40] << 8 | data[at + 41]
    return [(data[i] & 127) + 1 for i in range(at + 42, min(at + 42 + 3 * count, len(data)), 3)]


def _unknown(data: bytes | bytearray) -> str:
    """Why Pillow does not know the file."""
    head = bytes(data[:16])
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        try:
            tags: Any = TiffImagePlugin.ImageFileDirectory_v2(
                head[:8] if head[2:3] != b"+" and head[3:4] != b"+" else head
            )
            stream = io.BytesIO(data)
            stream.seek(tags.next)
            tags.load(stream)
            bands, bits = tags.get(_BANDS, 1), max(tags.get(_BITS, (1,)))
            number = "float" if tags.get(_SAMPLE_FORMAT, (1,))[0] == 3 else "whole-number"
        except Exception:  # a damaged directory makes Pillow raise nearly anything
            return f"a TIFF that is damaged, or of a kind that is not read: {_CONVERT}"
        return (
            f"a TIFF of {bands} band{'s' if bands > 1 else ''} of {bits} bits ({number}), which is not read: "
            f"save it as .npy, uint8 or uint16 (height, width, bands)"
        )
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"heim", b"heis"):
        return _of_plugin("HEIC", "pillow-heif", "HEIF")
    if head[:2] == b"\xff\x0a" or head[4:8] == b"JXL ":
        return _of_plugin("JPEG XL", "pillow-jxl-plugin", "JXL")
    return "not an image, or of a format that is not read"


def _of_plugin(what: str, package: str, name: str) -> str:
    if name in _formats():
        return f"a damaged {what} file"
    return f"{what}, which needs {package}: pip install 'ssl-pretrain[formats]'"


def stored_bits(item: bytes | np.ndarray) -> int:
    """The bits that a value of an image is stored in, by its header; 8 where it does not say."""
    if isinstance(item, np.ndarray):
        return 8 * item.dtype.itemsize
    if item.startswith(b"\x89PNG") and len(item) > 24:
        return max(8, item[24])
    if item.startswith((b"II*\0", b"MM\0*")):
        try:
            with Image.open(io.BytesIO(item), formats=("TIFF",)) as file:
                return max(8, *file.tag_v2.get(_BITS, (8,)))  # type: ignore[attr-defined]
        except Exception:  # see `_pillow`
            return 8
    if item.startswith((b"P5", b"P6")):
        words = item[:64].split()
        return 16 if len(words) > 3 and words[3].isdigit() and int(words[3]) > 255 else 8
    if item[:4] == b"\xff\x4f\xff\x51" or item[4:8] == b"jP  ":
        return max([8, *_jpeg2000_bits(item)])
    return 8


def eight_bits(image: Image.Image, channels: int) -> np.ndarray:
    """A Pillow image as uint8 (H, W, channels), by the rules of `Picture`."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F":
            if not (values.min() >= 0 and values.max() <= 1):  # false for NaN, too
                raise BadImage(
                    f"float pixels in [{values.min():g}, {values.max():g}]; only [0, 1] has a known full scale"
                )
            grey = np.rint(values * 255).astype(np.uint8)
        else:
            if values.min() < 0 or values.max() > 65535:
                raise BadImage(
                    f"integer pixels in [{values.min()}, {values.max()}]; only 0..65535 has a known full scale"
                )
            grey = (values >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], channels, axis=2)
    if image.mode == "P":
        image = image.convert("RGBA")  # by way of alpha, for a palette may hold transparency
    mode = "L" if channels == 1 else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], channels)


def _npy(data: bytes) -> np.ndarray:
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:
        raise BadImage(f"damaged .npy: {' '.join(str(error).split())}") from error


def _checked(array: np.ndarray, channels: int) -> np.ndarray:
    """A given array as uint8 (H, W, channels)."""
    if array.dtype not in (np.uint8, np.uint16):
        raise BadImage(f"array of {array.dtype}: save images as uint8 or uint16, scaled to the full range of the type")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise BadImage(f"array of shape {array.shape}; (H, W) or (H, W, C) is read")
    if array.shape[2] != channels:
        raise BadImage(
            f"array of {array.shape[2]} channels where {channels} are wanted: --in-chans {array.shape[2]} (ssl-data: "
            f"--channels) reads them, if the shape is (height, width, channels)"
        )
    if array.size == 0:
        raise BadImage("the image has no pixels")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise _too_large(array.shape[1], array.shape[0])
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    return array
