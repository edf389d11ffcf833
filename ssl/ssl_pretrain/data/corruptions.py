"""Common corruptions of images: noise, blur, weather-like and digital, each at five severities, after Hendrycks &
Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019), section 3.

Shapes: H x W pixels, C channels, s = min(H, W) the image's side; inside this file images are float64 in [0, 1].

Written from the paper's descriptions. Lengths (radii, displacements, flakes) are shares of s, so that images of 32 and of
224 pixels are corrupted alike; what acts on single pixels or on blocks of 8 (noise, pixelate, JPEG) is not scaled.
Strengths of noise, brightness, contrast, pixelate and JPEG are those of the paper's released code; all others are chosen
here, so that each severity changes an image more than the one before. ImageNet-C itself is made for 224 pixels with other
libraries and kept as JPEG: accuracies here are not comparable with those published on it. Frost is left out, for it is
made of photographs that are not ours to ship.
"""

import io
import math

import numpy as np
from PIL import Image

from ..errors import UserError, nearest

VERSION = 1  # of the pictures: part of the fingerprint of whatever is made from them
SEVERITIES = (1, 2, 3, 4, 5)
FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur": ("gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "glass_blur"),
    "weather": ("snow", "fog", "brightness"),
    "digital": ("contrast", "saturate", "elastic_transform", "pixelate", "jpeg_compression"),
}
NAMES = tuple(name for names in FAMILIES.values() for name in names)
STRENGTHS: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation
    "shot_noise": (60, 25, 12, 5, 3),  # photons of a white pixel
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of the values that become 0 or 1
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),  # standard deviation over the value
    "gaussian_blur": (0.014, 0.018, 0.023, 0.029, 0.037),  # sigma over s
    "defocus_blur": (0.02, 0.026, 0.033, 0.042, 0.055),  # radius over s
    "motion_blur": (0.06, 0.09, 0.12, 0.16, 0.2),  # length over s
    "zoom_blur": (1.08, 1.14, 1.2, 1.27, 1.35),  # largest magnification
    "glass_blur": (0.014, 0.02, 0.028, 0.038, 0.05),  # largest displacement over s
    "snow": (0.01, 0.018, 0.027, 0.038, 0.052),  # share of the cells that hold a flake
    "fog": (0.4, 0.7, 1.1, 1.7, 2.5),  # fog's weight beside the image's
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to the value of HSV
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # factor
    "saturate": (1.5, 2, 3, 5, 9),  # factor
    "elastic_transform": (0.012, 0.018, 0.025, 0.033, 0.043),  # displacement (root mean square) over s
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # share of the pixels that stay, each way
    "jpeg_compression": (25, 18, 15, 10, 7),  # quality
}
FOG_DECAY = 1.7  # of the plasma's amplitude when its grid becomes twice as fine
FLAKE_CELLS = 40  # across s
FLAKE_FALL = 0.05  # length of a flake's trace over s
WHITENING = 6.0  # of snow, times its share of flakes: how much of the image turns pale
ELASTIC_SIGMA = 0.06  # of the smoothing of displacements, over s
ZOOMS = 11  # magnifications that a zoom blur averages
SUBPIXELS = 15  # each way, in which the area of a disk is measured; odd, so that the smallest disk holds one
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def corrupt(image: np.ndarray, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """The image corrupted, a function of the arguments and of what `rng` draws.

    image: uint8 (H, W, C), any C; returns a new array of the same kind. `name`: one of NAMES; `severity`: 1 (mild) to 5.
    Raises UserError as `check`.
    """
    check(name, severity, image.shape[2])
    strength = STRENGTHS[name][severity - 1]
    if name == "pixelate":
        return _pixelated(image, strength)
    if name == "jpeg_compression":
        return _through_jpeg(image, int(strength))
    x, side = image / 255, min(image.shape[:2])
    match name:
        case "gaussian_noise":
            x = x + strength * rng.standard_normal(x.shape)
        case "shot_noise":
            x = rng.poisson(x * strength) / strength
        case "impulse_noise":
            hit = rng.random(x.shape)  # below half the share: pepper; from there to the share: salt
            x = np.where(hit < strength, hit >= strength / 2, x)
        case "speckle_noise":
            x = x + strength * x * rng.standard_normal(x.shape)
        case "gaussian_blur":
            x = _convolved(x, _gaussian(strength * side))
        case "defocus_blur":
            x = _convolved(x, _disk(strength * side))
        case "motion_blur":
            x = _convolved(x, _line(strength * side, rng.uniform(0, math.pi)))
        case "zoom_blur":
            x = np.mean([_magnified(x, zoom) for zoom in np.linspace(1, strength, ZOOMS)], axis=0)
        case "glass_blur":
            shift = strength * side * rng.uniform(-1, 1, (*x.shape[:2], 2))
            x = _moved(x, shift)
        case "snow":
            x = _under_snow(x, strength, rng)
        case "fog":
            height, width = x.shape[:2]
            plasma = _plasma(max(height, width), rng)[:height, :width, None]
            x = (x + strength * plasma) / (1 + strength)
        case "brightness":
            x = _brighter(x, strength)
        case "contrast":
            mean = x.mean((0, 1))
            x = mean + strength * (x - mean)
        case "saturate":
            grey = (x @ LUMA)[:, :, None]
            x = grey + strength * (x - grey)
        case "elastic_transform":
            shift = _convolved(rng.uniform(-1, 1, (*x.shape[:2], 2)), _gaussian(ELASTIC_SIGMA * side))
            x = _moved(x, shift * (strength * side / np.sqrt((shift**2).mean())))
    return np.floor(255 * x.clip(0, 1) + 0.5).astype(np.uint8)


def check(name: str, severity: int, channels: int) -> None:
    """Raise UserError for a corruption or severity that there is not, or one that images of so many channels cannot
    have."""
    if name not in NAMES:
        raise UserError(f"unknown corruption {name!r}{nearest(name, NAMES)}")
    if severity not in SEVERITIES:
        raise UserError(f"severity {severity} of {name}: severities are 1 (mild) to 5 (strong)")
    if name not in usable(channels):
        raise UserError(
            f"{name} needs images of {'3' if name == 'saturate' else '1 or 3'} channels, and these have {channels}: "
            f"leave it out"
        )


def usable(channels: int) -> tuple[str, ...]:
    """The corruptions of NAMES that images of so many channels can have: colours are saturated in RGB only, and a JPEG
    holds grey or RGB."""
    absent = {"saturate"} if channels == 1 else {"saturate", "jpeg_compression"} if channels != 3 else set()
    return tuple(name for name in NAMES if name not in absent)


# ---- Blur.


def _convolved(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """x (H, W, C) convolved with a kernel (2 r + 1, 2 r + 1) of sum 1; outside its border the image is mirrored, the
    edge pixel repeated."""
    height, width = x.shape[:2]
    reach = len(kernel) // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    size = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, size)[:, :, None]
    # the kernel's corner, not its centre, lies at the origin: what did not wrap around begins 2 * reach in
    return np.fft.irfft2(spectrum, size, axes=(0, 1))[2 * reach :, 2 * reach :][:height, :width]


def _gaussian(sigma: float) -> np.ndarray:
    reach = math.ceil(4 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = np.outer(weights, weights)
    return kernel / kernel.sum()


def _disk(radius: float) -> np.ndarray:
    """A disk of that radius in pixels: of each pixel the share of its area inside."""
    reach = math.ceil(radius)
    at = (np.arange((2 * reach + 1) * SUBPIXELS) + 0.5) / SUBPIXELS - reach - 0.5
    inside = at[:, None] ** 2 + at**2 <= radius**2
    kernel = inside.reshape(2 * reach + 1, SUBPIXELS, 2 * reach + 1, SUBPIXELS).mean((1, 3))
    return kernel / kernel.sum()


def _line(length: float, angle: float) -> np.ndarray:
    """A segment of that length in pixels through the centre, at `angle` (radians) to the rows, drawn as points that each
    share out their weight among the four pixels around them."""
    reach = math.ceil(length / 2) + 1
    along = np.linspace(-length / 2, length / 2, 4 * math.ceil(length) + 1)
    down, right = reach + along * math.sin(angle), reach + along * math.cos(angle)
    top, left = np.floor(down).astype(int), np.floor(right).astype(int)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for i in (0, 1):
        for j in (0, 1):
            weight = (1 - abs(down - top - i)) * (1 - abs(right - left - j))
            np.add.at(kernel, (top + i, left + j), weight)
    return kernel / kernel.sum()


def _magnified(x: np.ndarray, zoom: float) -> np.ndarray:
    """The image's centre, enlarged `zoom` times to the whole size."""
    height, width = x.shape[:2]
    rim_x, rim_y = width * (1 - 1 / zoom) / 2, height * (1 - 1 / zoom) / 2
    return _resized(x, (height, width), Image.Resampling.BILINEAR, (rim_x, rim_y, width - rim_x, height - rim_y))


def _resized(
    x: np.ndarray,
    size: tuple[int, int],
    how: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """x (H, W, C), or a box of it (left, top, right, bottom), resized to `size` (height, width)."""
    channels = [Image.fromarray(x[:, :, c].astype(np.float32)) for c in range(x.shape[2])]
    return np.stack([np.asarray(channel.resize(size[::-1], how, box)) for channel in channels], axis=2)


def _moved(x: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Each pixel of x (H, W, C) taken from `shift` (H, W, 2; down and right, in pixels) away, bilinearly, the edge going
    on outside."""
    height, width = x.shape[:2]
    down = (np.arange(height)[:, None] + shift[:, :, 0]).clip(0, height - 1)
    right = (np.arange(width) + shift[:, :, 1]).clip(0, width - 1)
    top, left = np.floor(down).astype(int), np.floor(right).astype(int)
    bottom, beside = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    v, u = (down - top)[:, :, None], (right - left)[:, :, None]
    upper = (1 - u) * x[top, left] + u * x[top, beside]
    lower = (1 - u) * x[bottom, left] + u * x[bottom, beside]
    return (1 - v) * upper + v * lower


# ---- Weather.


def _under_snow(x: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Flakes with a trace of their fall, twice (the second time turned by half a circle), on an image grown paler."""
    height, width = x.shape[:2]
    side = min(height, width)
    cells = math.ceil(FLAKE_CELLS * height / side), math.ceil(FLAKE_CELLS * width / side)
    flakes = (rng.random(cells) < share).astype(np.float32)[:, :, None]
    flakes = _resized(flakes, (height, width), Image.Resampling.BILINEAR)
    flakes = _convolved(flakes, _line(FLAKE_FALL * side, rng.uniform(math.pi / 4, 3 * math.pi / 4)))
    grey = x.mean(2, keepdims=True)
    pale = np.maximum(x, np.minimum(1.5 * grey + 0.5, 1))
    return x + WHITENING * share * (pale - x) + flakes + flakes[::-1, ::-1]


def _plasma(side: int, rng: np.random.Generator) -> np.ndarray:
    """A plasma fractal (n, n) in [0, 1], n >= side a power of two: diamond-square (Fournier, Fussell & Carpenter, 1982)
    on a torus."""
    n = 1 << (side - 1).bit_length()
    field = np.zeros((n, n))
    step, amplitude = n, 1.0
    while step > 1:
        half = step // 2
        corner = field[::step, ::step]
        below, beside = np.roll(corner, -1, 0), np.roll(corner, -1, 1)
        jitter = amplitude * rng.uniform(-1, 1, (3, *corner.shape))
        centre = (corner + below + beside + np.roll(below, -1, 1)) / 4 + jitter[0]
        across = (corner + beside + centre + np.roll(centre, 1, 0)) / 4 + jitter[1]
        down = (corner + below + centre + np.roll(centre, 1, 1)) / 4 + jitter[2]
        field[half::step, half::step], field[::step, half::step], field[half::step, ::step] = centre, across, down
        step, amplitude = half, amplitude / FOG_DECAY
    field -= field.min()
    return field / (field.max() or 1)


def _brighter(x: np.ndarray, added: float) -> np.ndarray:
    """The value of HSV, the largest channel, raised by `added` up to 1; hue and saturation stay. Black becomes grey."""
    value = x.max(2, keepdims=True)
    raised = np.minimum(value + added, 1)
    return np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised)


# ---- Digital.


def _pixelated(image: np.ndarray, share: float) -> np.ndarray:
    """Shrunk to `share` of its size by averaging, and back up by repeating pixels."""
    height, width = image.shape[:2]
    small = max(1, int(width * share)), max(1, int(height * share))
    channels = [Image.fromarray(image[:, :, c]) for c in range(image.shape[2])]
    boxes = [
        channel.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.NEAREST)
        for channel in channels
    ]
    return np.stack([np.asarray(channel) for channel in boxes], axis=2)


def _through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    grey = image.shape[2] == 1
    file = io.BytesIO()
    Image.fromarray(image[:, :, 0] if grey else image).save(file, "JPEG", quality=quality)
    pixels = np.array(Image.open(file))
    return pixels[:, :, None] if grey else pixels
