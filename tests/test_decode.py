"""Decoding: every mode and depth to the channels asked for, the same with simplejpeg and without, and clear
refusals."""

import io
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ssl_pretrain.data import decode as module
from ssl_pretrain.data.decode import BadImage, Picture, Scratch, decode, shrink

NATURAL = Path(__file__).parents[1].parent / "shared" / "data" / "natural" / "imagenet_sample_natural128.tar"


def pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    """A picture with gradients, edges and some noise."""
    y, x = np.mgrid[:height, :width]
    planes = [(3 * x + 5 * y * (c + 1)) % 256 for c in range(channels)]
    noise = np.random.default_rng(0).integers(0, 40, (height, width, channels))
    return np.clip(np.stack(planes, -1) * 0.8 + noise, 0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RGB = Image.fromarray(pixels(45, 61))


@pytest.fixture(params=["pillow", "simplejpeg"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to read a JPEG."""
    if request.param == "pillow":
        monkeypatch.setattr(module, "simplejpeg", None)
    elif module.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    return request.param


# ---- modes


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_modes(mode: str):
    item = encoded(RGB.convert(mode))
    reference = Image.open(io.BytesIO(item)).convert("RGBA")
    assert np.array_equal(decode(item, 3), np.asarray(reference)[..., :3])
    assert decode(item, 1).shape == (45, 61, 1)
    assert np.array_equal(decode(item, 1)[..., 0], np.asarray(reference.convert("RGB").convert("L")))


def test_palette_with_transparency_reads_without_a_warning():
    image = RGB.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    item = encoded(image, transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = decode(item, 3)
    assert np.array_equal(got, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "L"])
def test_jpeg_modes(mode: str, path: str):
    item = encoded(RGB.convert(mode), "JPEG", quality=95, subsampling="4:4:4")
    assert np.array_equal(decode(item, 3), np.asarray(Image.open(io.BytesIO(item)).convert("RGB")))
    close = np.abs(decode(item, 3).astype(int) - np.asarray(RGB.convert(mode).convert("RGB")).astype(int))
    assert np.median(close) <= 4


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_other_formats(kind: str):
    item = encoded(RGB, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(decode(item, 3), np.asarray(Image.open(io.BytesIO(item)).convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str):
    values = np.linspace(0, 65535, 45 * 61).reshape(45, 61).astype(np.uint16)
    item = encoded(Image.fromarray(values), kind)
    for channels in (1, 3):
        got = decode(item, channels)
        assert got.shape == (45, 61, channels)
        assert np.array_equal(got, np.repeat((values // 256).astype(np.uint8)[..., None], channels, 2))


def test_integer_and_float_modes_have_one_full_scale():
    values = np.arange(0, 65536, 64, dtype=np.int32).reshape(32, 32)
    assert np.array_equal(decode(encoded(Image.fromarray(values), "TIFF"), 1)[..., 0], values // 256)
    with pytest.raises(BadImage, match=r"65535 has a known full scale"):
        decode(encoded(Image.fromarray(values * 2), "TIFF"), 1)
    floats = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    assert np.array_equal(decode(encoded(Image.fromarray(floats), "TIFF"), 1)[..., 0], np.round(floats * 255))
    for bad in (floats * 2, np.full((4, 4), np.nan, dtype=np.float32)):
        with pytest.raises(BadImage, match=r"float pixels in .*; only \[0, 1\]"):
            decode(encoded(Image.fromarray(bad), "TIFF"), 1)


# ---- orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
def test_exif_orientation_is_applied(kind: str, orientation: int, path: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    item = encoded(RGB, kind, exif=exif, **options)
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF 2.32, table 4, as Image.Transpose
    stored = Image.open(io.BytesIO(encoded(RGB, kind, **options))).convert("RGB")
    upright = stored.transpose(Image.Transpose(turn[orientation])) if orientation in turn else stored
    picture = Picture(item, 3)
    assert (picture.width, picture.height) == upright.size
    assert np.array_equal(decode(item, 3), np.asarray(upright))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_crops_of_a_turned_jpeg(orientation: int, path: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    item = encoded(Image.fromarray(pixels(203, 171)), "JPEG", quality=88, subsampling="4:2:0", exif=exif)
    whole = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(item))))
    rng = np.random.default_rng(orientation)
    scratch = Scratch()
    for i in range(25):
        (top, bottom), (left, right) = (
            sorted(rng.choice(side + 1, 2, replace=False).tolist()) for side in whole.shape[:2]
        )
        crop = Picture(item, 3).crop(top, left, bottom - top, right - left, scratch if i % 2 else None)
        assert np.array_equal(crop, whole[top:bottom, left:right])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("by", [2, 4, 8])
def test_crops_of_a_turned_jpeg_that_is_decoded_smaller(orientation: int, by: int):
    pytest.importorskip("simplejpeg")
    exif = Image.Exif()
    exif[0x0112] = orientation
    item = encoded(Image.fromarray(pixels(203, 171)).resize((171, 203)), "JPEG", quality=88, exif=exif)
    stored = encoded(Image.fromarray(pixels(203, 171)).resize((171, 203)), "JPEG", quality=88)
    smaller = Picture(stored, 3).crop(0, 0, -(-203 // by), -(-171 // by), by=by)
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
    image = Image.fromarray(np.ascontiguousarray(smaller))
    whole = np.asarray(image.transpose(Image.Transpose(turn[orientation])) if orientation in turn else image)
    picture = Picture(item, 3)
    for box in [(0, 0, picture.height, picture.width), (17, 40, 100, 90), (60, 8, 80, 150), (150, 100, 21, 71)]:
        top, left, height, width = shrink(box, by)
        crop = picture.crop(top, left, height, width, by=by)
        assert np.array_equal(crop, whole[top : top + height, left : left + width])


@pytest.mark.parametrize("orientation", [1, 6])
def test_what_is_decoded_can_be_taken_as_a_tensor(orientation: int, path: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode(encoded(RGB, "JPEG", exif=exif), 3).flags.c_contiguous


# ---- plain JPEG: the fast way


def test_of_several_pictures_in_a_jpeg_the_first_is_taken(path: str, monkeypatch: pytest.MonkeyPatch):
    """As phones store them: the picture, then a smaller one or one for the other eye."""
    first, second = Image.fromarray(pixels(90, 120)), Image.fromarray(255 - pixels(60, 80))
    item = encoded(first, "MPO", save_all=True, append_images=[second], quality=90)
    with Image.open(io.BytesIO(item)) as file:
        assert (file.format, getattr(file, "n_frames", 1)) == ("MPO", 2)
        whole = np.asarray(file.convert("RGB"))
    monkeypatch.setattr(module, "_pillow", None)  # not by way of Pillow's own reading of the file, which is slower
    assert np.array_equal(decode(item, 3), whole)
    assert np.array_equal(Picture(item, 3).crop(10, 20, 50, 60), whole[10:60, 20:80])


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True}])
def test_every_crop_is_the_crop_of_the_whole_image(subsampling: str, channels: int, options: dict, path: str):
    item = encoded(Image.fromarray(pixels(203, 171)), "JPEG", subsampling=subsampling, quality=88, **options)
    whole = Image.open(io.BytesIO(item))
    if channels == 1:
        whole.draft("L", whole.size)
    whole = np.asarray(whole).reshape(203, 171, channels)
    assert np.array_equal(decode(item, channels), whole)
    rng = np.random.default_rng(1)
    scratch = Scratch()
    for bottom in [*range(1, 50), *rng.integers(50, 204, 20).tolist()]:
        top, left, width = int(rng.integers(bottom)), int(rng.integers(100)), int(rng.integers(1, 72))
        crop = Picture(item, channels).crop(top, left, bottom - top, width, scratch if bottom % 2 else None)
        assert np.array_equal(crop, whole[top:bottom, left : left + width])


def test_rows_below_the_crop_are_not_decoded(monkeypatch: pytest.MonkeyPatch):
    """What the speed of crops rests on."""
    simplejpeg = pytest.importorskip("simplejpeg")
    heights = []

    class Watched:
        @staticmethod
        def decode_jpeg(data: bytes, *args: object, **options: object) -> np.ndarray:
            got = simplejpeg.decode_jpeg(data, *args, **options)
            heights.append(len(got))
            return got

    monkeypatch.setattr(module, "simplejpeg", Watched)
    Picture(encoded(Image.fromarray(pixels(400, 50)), "JPEG"), 3).crop(10, 0, 90, 50)
    assert heights == [102]


@pytest.mark.skipif(not NATURAL.exists(), reason="../shared/data/natural is not there")
def test_photographs_decode_as_pillow_decodes_them(path: str):
    with tarfile.open(NATURAL) as tar:
        items = [tar.extractfile(m).read() for m in tar if m.name.lower().endswith((".jpg", ".jpeg"))]  # type: ignore[union-attr]
    assert len(items) > 100
    for item in items[::3]:
        reference = ImageOps.exif_transpose(Image.open(io.BytesIO(item))).convert("RGB")
        assert np.array_equal(decode(item, 3), np.asarray(reference))


# ---- arrays


def test_arrays_and_npy():
    for array in (pixels(7, 9, 5), pixels(7, 9, 1)[..., 0]):
        file = io.BytesIO()
        np.save(file, array)
        channels = 1 if array.ndim == 2 else 5
        for item in (array, file.getvalue()):
            assert np.array_equal(decode(item, channels), array.reshape(7, 9, channels))
    deep = np.linspace(0, 65535, 7 * 9 * 2).reshape(7, 9, 2).astype(np.uint16)
    assert np.array_equal(decode(deep, 2), deep // 256)


def test_npy_is_not_unpickled(tmp_path: Path):
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    file = io.BytesIO()
    np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(BadImage, match="npy"):
        decode(file.getvalue(), 3)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("item", "channels", "reason"),
    [
        (pixels(4, 4, 3), 4, "3 channels where 4 are wanted"),
        (pixels(4, 4, 3)[..., 0], 3, "1 channels where 3 are wanted"),
        (pixels(4, 4).astype(np.float32), 3, "array of float32"),
        (np.zeros((2, 2, 2, 3), np.uint8), 3, "of shape"),
        (np.zeros((0, 5, 3), np.uint8), 3, "no pixels"),
        (encoded(RGB), 4, "1 or 3 channels; 4 are read from .npy"),
    ],
)
def test_what_does_not_fit_is_refused(item: bytes | np.ndarray, channels: int, reason: str):
    with pytest.raises(BadImage, match=reason):
        decode(item, channels)


# ---- bad files

JPEG = encoded(Image.fromarray(pixels(203, 171)), "JPEG", quality=90)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_jpeg_is_bad_however_small_the_crop(options: dict, share: float, path: str):
    whole = encoded(Image.fromarray(pixels(203, 171)), "JPEG", quality=90, **options)
    with pytest.raises(BadImage):
        Picture(whole[: int(share * len(whole))], 3).crop(0, 0, 1, 1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP"])
def test_other_truncated_files_are_bad(kind: str):
    whole = encoded(RGB, kind)
    with pytest.raises(BadImage):
        decode(whole[: len(whole) // 2], 3)


def test_what_is_no_image_is_bad(path: str):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    for item, reason in (
        (b"", "empty"),
        (b"some text", "not an image"),
        (b"\x00" * 1000, "not an image"),
        (b"\xff\xd8\xff\xd9", "cannot|image"),
        (postscript, "not an image"),  # Pillow would hand it to Ghostscript
    ):
        with pytest.raises(BadImage, match=reason) as caught:
            decode(item, 3)
        assert caught.value.reason


def test_a_decompression_bomb_is_bad(path: str):
    # a JPEG header that says 65,000 x 65,000, and a PNG of as many zeros
    at = JPEG.index(b"\xff\xc0") + 5
    bomb = JPEG[:at] + (65_000).to_bytes(2, "big") * 2 + JPEG[at + 4 :]
    for item in (bomb, encoded(Image.new("1", (30_000, 10_000)))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(BadImage, match="bomb"):
                decode(item, 3)


def test_random_damage_raises_nothing_else(path: str):
    rng = np.random.default_rng(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    originals = [JPEG, encoded(RGB), encoded(RGB, "WEBP"), encoded(RGB, "JPEG", exif=exif), encoded(RGB, "TIFF")]
    bad = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            item = bytearray(originals[rng.integers(len(originals))])
            for _ in range(rng.integers(1, 6)):
                item[rng.integers(min(len(item), 400))] = rng.integers(256)
            try:
                assert decode(bytes(item), 3).dtype == np.uint8
            except BadImage:
                bad += 1
    assert 50 < bad < 300
