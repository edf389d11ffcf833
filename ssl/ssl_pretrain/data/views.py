"""Views: what a method wants to see of an image, declared; and the cutting of it, in the loader's workers.

Shapes: H x W pixels of the whole image, h x w of the view, C channels.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .rows import Rows


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Colour jitter as torchvision's ColorJitter: factors uniform in [1 - x, 1 + x] (hue: shift in [-x, x] of a turn),
    the four operations in a random order, all applied with probability `p`."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    p: float = 0.8


@dataclass(frozen=True)
class Reads:
    """What a method reads of a frozen network that sees a view, so that it can be stored (`ssl-data cache-teacher`)."""

    block: int = -1  # negative numbers count from the end
    normed: bool = True  # after the final norm
    # of its features, in this order; "ids", alone, of a tokenizer
    outputs: tuple[Literal["pooled", "cls", "patches", "ids"], ...] = ("patches",)


@dataclass(frozen=True)
class StoredView:
    """Stored outputs of the frozen network that would see a view: the loader gives them in place of pixels."""

    rows: "Rows"
    field: int  # of the rows' records


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """One kind of view a method declares (`Method.views`); the engine makes it.

    A view is a random resized crop (`scale`: share of the image's area; `ratio`: width over height), flipped, and then
    coloured in the order jitter, grayscale, blur, solarize, noise on a random square ("Patch Gaussian", Lopes et al.,
    2019: side uniform up to the view's shorter one, centre anywhere, sigma uniform up to the largest). Probabilities in
    [0, 1]; `size` in pixels (height, width).
    """

    name: str
    count: int = 1  # with count > 1 the batch holds views[name] as (count, B, C, H, W), else (B, C, H, W)
    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    hflip: float = 0.5
    vflip: float = 0.0
    jitter: Jitter | None = None
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    solarize_threshold: float = 0.5  # of full scale; pixels at or above it are inverted
    noise_patch: float = 0.0
    noise_patch_sigma: float = 0.5  # of full scale, the largest
    fast: bool = (
        False  # decoded and coloured faster, with the differences that `decode.Picture.crop` and `composed` name
    )
    # Another rendering of an earlier view of the same count: the same box and flips, with `size` of its own, and the same
    # colours unless it is `clean`. What this spec says of box, flips and colours is not read.
    of: str | None = None
    clean: bool = False
    # An earlier view, and the least share of this crop's area that lies inside that view's crop. Drawn anew up to ten
    # times, then left as it is (SlotMIM).
    overlap: tuple[str, float] | None = None
    # The frozen network that sees this view. `size` is then in pixels of the encoder's patches: the view gets as many
    # patches of the network's stride. None: the encoder.
    network: str | None = None
    # Of a view for a network: `size` is in pixels of the network, whatever the encoder's patches. It is brought to the
    # nearest multiple of the network's mask unit.
    network_pixels: bool = False
    # What is read of that network, where it sees these pixels and no others; None: its outputs cannot be stored.
    reads: Reads | None = field(default=None, compare=False)
    # Set by the loop for a run that reads stored outputs: the batch then holds (B, 1, L, D) float32, or (B, 1, h, w) int64
    # for ids, in place of the pixels (B, C, H, W).
    stored: StoredView | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Sight:
    """How a network sees: pixels of one patch (height, width), and the interpolation of its images."""

    stride: tuple[int, int]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    unit: tuple[int, int] | None = None  # pixels of one mask unit, of which its images are whole numbers; None: a patch


def fitted(
    specs: tuple[ViewSpec, ...],
    image_size: tuple[int, int],
    stride: tuple[int, int],
    networks: Mapping[str, Sight] | None = None,
    *,
    unit: tuple[int, int] | None = None,
) -> tuple[ViewSpec, ...]:
    """The specs as they are rendered.

    Every size but the run's own `image_size` is brought to the nearest multiple of the encoder's mask `unit` (height,
    width; None: its stride), so that the encoder takes it: a method declares its small crops without knowing the size of a
    patch. A view for one of the frozen `networks` gets the same number of
    patches, with that network's stride, or its own number of pixels (`network_pixels`). A view `of` another one gets its
    box, flips and colours.

    Raises ValueError for a view that refers to none of the earlier ones.
    """

    def multiple(size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
        height, width = (max(step, int(side / step + 0.5) * step) for side, step in zip(size, stride, strict=True))
        return height, width

    out: dict[str, ViewSpec] = {}
    for spec in specs:
        own = spec.network is not None and spec.network_pixels
        if spec.size != tuple(image_size) and not own:
            spec = replace(spec, size=multiple(spec.size, unit or stride))
        if spec.network is not None:
            sight = (networks or {})[spec.network]
            cells = [side // step for side, step in zip(spec.size, stride, strict=True)]
            size = (cells[0] * sight.stride[0], cells[1] * sight.stride[1])
            size = multiple(spec.size, sight.unit or sight.stride) if own else size
            spec = replace(spec, size=size, interpolation=sight.interpolation)
        if spec.of is not None:
            spec = _rendering(spec, out)
        if spec.overlap is not None and spec.overlap[0] not in out:
            raise ValueError(f"the view {spec.name!r} overlaps with {spec.overlap[0]!r}, which is no earlier view")
        out[spec.name] = spec
    return tuple(out.values())


_BOX = ("scale", "ratio", "hflip", "vflip", "overlap")
_COLOURS = ("jitter grayscale blur blur_sigma solarize solarize_threshold noise_patch noise_patch_sigma").split()


def _rendering(spec: ViewSpec, earlier: Mapping[str, ViewSpec]) -> ViewSpec:
    """A view `of` another one, with its box, flips and colours. A blur is as wide in the image as that of the other."""
    other = earlier.get(spec.of or "")
    if other is None or other.of is not None or other.count != spec.count:
        raise ValueError(
            f"the view {spec.name!r} is a rendering of {spec.of!r}, which is no earlier view of its own with {spec.count} "
            f"copies"
        )
    plain = ViewSpec(name="", size=spec.size)
    values: dict[str, Any] = {name: getattr(other, name) for name in _BOX}
    values |= {name: getattr(plain if spec.clean else other, name) for name in _COLOURS}
    if not spec.clean:
        zoom = math.sqrt(spec.size[0] * spec.size[1] / (other.size[0] * other.size[1]))
        values["blur_sigma"] = (other.blur_sigma[0] * zoom, other.blur_sigma[1] * zoom)
    return replace(spec, **values)


# What a sample's random numbers are for: this many uniform draws for every view, whatever it uses of them, so that no
# knob of a view shifts another knob's draws. Two (area, ratio) for each try at a crop, top, left, the flips, then the
# colour.
_TRIES = 10
_COLOUR_AT = 2 * _TRIES + 4
_DRAWS = _COLOUR_AT + 19

# A row of geometry, float32: top, left, height, width as shares of the whole image, flipped left-right, flipped top-bottom
GEOMETRY_PARAMS = 6

# A row of colour parameters, float32: see `colour.apply`
JITTER, FACTORS, ORDER, GRAYSCALE, BLUR_SIGMA, SOLARIZE = 0, slice(1, 5), slice(5, 9), 9, 10, 11
NOISE_SIGMA, NOISE_SQUARE, NOISE_KEY = 12, slice(13, 16), 16
COLOUR_PARAMS = 17


Box = tuple[int, int, int, int]  # top, left, height, width in pixels of the whole image


@dataclass(frozen=True)
class Draw:
    """What chance decided about one view of one image: all of it, before a pixel is touched."""

    box: Box
    hflip: bool
    vflip: bool
    geometry: np.ndarray  # (GEOMETRY_PARAMS,) float32: the box as shares of the whole image, then both flips as 0 or 1
    colour: (
        np.ndarray
    )  # (COLOUR_PARAMS,) float32: jitter yes/no, its four factors, their order, grayscale yes/no, the blur's
    # sigma in pixels or 0 for none, solarize yes/no, the noise's sigma or 0 for none, its square's centre (row, column)
    # and half its side in pixels, and a whole number that its values are drawn from


@dataclass(frozen=True)
class Cut:
    """One view of one image, before its colours are changed."""

    image: np.ndarray  # uint8 (h, w, C)
    geometry: np.ndarray  # as Draw's
    colour: np.ndarray  # as Draw's


def draw(spec: ViewSpec, rng: np.random.Generator, height: int, width: int, beside: Box | None = None) -> Draw:
    """Draw one view of an image of `height` x `width` pixels. Takes the same numbers from `rng` for every spec. Two specs
    that differ in their size get the same box, flips and colours from the same numbers.

    beside: the box that the view must overlap with, where the spec says so.
    """
    uniform = rng.random(_DRAWS).tolist()
    top, left, h, w = box = _random_box(spec, uniform, height, width)
    if spec.overlap is not None and beside is not None:
        for _ in range(_TRIES):
            if _shared(box, beside) >= spec.overlap[1] * h * w:
                break
            top, left, h, w = box = _random_box(spec, rng.random(2 * _TRIES + 2).tolist(), height, width)
    hflip, vflip = uniform[2 * _TRIES + 2] < spec.hflip, uniform[2 * _TRIES + 3] < spec.vflip
    geometry = np.array((top / height, left / width, h / height, w / width, hflip, vflip), dtype=np.float32)
    return Draw(box, hflip, vflip, geometry, _colour_row(spec, uniform[_COLOUR_AT:]))


def cut(image: np.ndarray, spec: ViewSpec, rng: np.random.Generator) -> Cut:
    """One view of `image` (uint8 (H, W, C), any C), drawn from `rng`."""
    drawn = draw(spec, rng, *image.shape[:2])
    pixels = torch.empty(1, *spec.size, image.shape[2], dtype=torch.uint8)
    top, left, height, width = drawn.box
    render(image[top : top + height, left : left + width], spec, drawn, pixels.permute(0, 3, 1, 2))
    return Cut(pixels[0].numpy(), drawn.geometry, drawn.colour)


def to_image(points: Tensor, geometry: Tensor) -> Tensor:
    """Where points of a view lie in the whole image: undoes the flips of both axes, then the crop.

    points: (N, 2) or (..., N, 2), row and column as shares of the view in [0, 1] (the centre of pixel i of n is
    (i + 0.5) / n). geometry: (..., GEOMETRY_PARAMS) of the views, as in `batch.Batch`. Returns (..., N, 2): row and
    column as shares of the whole image.
    """
    corner, size, flips = geometry.unsqueeze(-2).split(2, dim=-1)
    flipped = flips.flip(-1) > 0  # left-right comes first, it is the second coordinate
    return corner + size * torch.where(flipped, 1 - points, points)


def from_image(points: Tensor, geometry: Tensor) -> Tensor:
    """Where points of the whole image lie in a view: the inverse of `to_image`, with the same shapes. Points outside of the
    crop get shares below 0 or above 1."""
    corner, size, flips = geometry.unsqueeze(-2).split(2, dim=-1)
    flipped = flips.flip(-1) > 0
    shares = (points - corner) / size
    return torch.where(flipped, 1 - shares, shares)


def render(crop: np.ndarray, spec: ViewSpec, drawn: Draw, out: Tensor) -> None:
    """Resize and flip the pixels of `drawn.box`, uint8 (height, width, C), into `out`: uint8 (1, C, h, w) of the spec's
    size, in channels-last memory."""
    if drawn.hflip or drawn.vflip:
        upright = torch.empty_like(out)
        _resize(crop, spec.interpolation, upright)
        torch.ops.aten.flip.out(upright, [2] * drawn.vflip + [3] * drawn.hflip, out=out)
    else:
        _resize(crop, spec.interpolation, out)


def resize_and_crop(
    image: np.ndarray, resize: int, crop: tuple[int, int], interpolation: Literal["bicubic", "bilinear"] = "bicubic"
) -> np.ndarray:
    """The deterministic view of evaluation: the shorter side to `resize` pixels, then the central `crop` (height,
    width).

    image: uint8 (H, W, C). Returns uint8 (*crop, C). The longer side keeps the aspect ratio, rounded down. Nothing is
    ever padded: where the crop would not fit, the image is made just large enough for it, more than `resize`.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    short_to = max(resize, -(-crop[0] * short // height), -(-crop[1] * short // width))
    size = short_to * height // short, short_to * width // short
    resized = torch.empty(1, *size, image.shape[2], dtype=torch.uint8)
    _resize(image, interpolation, resized.permute(0, 3, 1, 2))
    top, left = round((size[0] - crop[0]) / 2), round((size[1] - crop[1]) / 2)
    return resized[0, top : top + crop[0], left : left + crop[1]].contiguous().numpy()


# The operators behind torch.nn.functional.interpolate(antialias=True), in the form that writes where it is told: a
# fresh 224 x 224 result for each image costs a third of the resize in page faults. uint8 in, uint8 out, any number of
# channels.
_RESIZE = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}


def _resize(pixels: np.ndarray, interpolation: str, out: Tensor) -> None:
    """Antialiased resize of uint8 (H, W, C) to `out`, uint8 (1, C, h, w) in channels-last memory."""
    pixels = np.ascontiguousarray(pixels)  # a copy of its rows here is faster than the one that torch would make
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that must not be written to: it is only read
        source = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    if source.shape == out.shape:
        out.copy_(source)
    else:
        _RESIZE[interpolation](source, out.shape[2:], False, None, None, out=out)


def _random_box(spec: ViewSpec, uniform: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    """The crop of Szegedy et al., "Going deeper with convolutions" (2015), section 6, in the form everybody uses: area
    uniform, ratio log-uniform, ten tries; then the largest central crop whose ratio is allowed."""
    log_low, log_high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    for i in range(_TRIES):
        area = height * width * (spec.scale[0] + uniform[2 * i] * (spec.scale[1] - spec.scale[0]))
        ratio = math.exp(log_low + uniform[2 * i + 1] * (log_high - log_low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniform[2 * _TRIES] * (height - h + 1))
            left = int(uniform[2 * _TRIES + 1] * (width - w + 1))
            return top, left, h, w
    w = min(width, max(1, round(height * spec.ratio[1])))
    h = min(height, max(1, round(width / spec.ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def _shared(box: Box, other: Box) -> int:
    """Pixels that two boxes share."""
    height = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
    width = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
    return max(0, height) * max(0, width)


def _colour_row(spec: ViewSpec, uniform: list[float]) -> np.ndarray:
    row = np.zeros(COLOUR_PARAMS, dtype=np.float32)
    jitter = spec.jitter
    if jitter is not None:
        row[JITTER] = uniform[0] < jitter.p
        for i, strength in enumerate((jitter.brightness, jitter.contrast, jitter.saturation)):
            low = max(0.0, 1 - strength)
            row[1 + i] = low + uniform[1 + i] * (1 + strength - low)
        row[4] = (2 * uniform[4] - 1) * jitter.hue
        row[ORDER] = sorted(range(4), key=uniform[5:9].__getitem__)
    row[GRAYSCALE] = uniform[9] < spec.grayscale
    if uniform[10] < spec.blur:
        row[BLUR_SIGMA] = spec.blur_sigma[0] + uniform[11] * (spec.blur_sigma[1] - spec.blur_sigma[0])
    row[SOLARIZE] = uniform[12] < spec.solarize
    if uniform[13] < spec.noise_patch:
        height, width = spec.size
        row[NOISE_SIGMA] = uniform[14] * spec.noise_patch_sigma
        row[NOISE_SQUARE] = uniform[15] * height, uniform[16] * width, uniform[17] * min(height, width) / 2
        row[NOISE_KEY] = int(uniform[18] * 2**24)  # exact in float32
    return row
