"""A scattering transform: a fixed representation of an image by two layers of wavelets and moduli (Bruna & Mallat,
"Invariant Scattering Convolution Networks", PAMI 2013). Nothing of it is learned.

Shapes: B images, C channels, H x W pixels, J scales, L angles.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = 0.8  # of the finest wavelet's envelope in pixels; each scale doubles it
FREQUENCY = 3 * math.pi / 4  # of the finest wavelet in radians a pixel; each scale halves it
RADIUS = 3.0  # of a filter, in standard deviations


def scattering(images: Tensor, scales: int = 2, angles: int = 8) -> Tensor:
    """Coefficients (B, C * paths, H / 2^J, W / 2^J) float32 of images (B, C, H, W), rounded up.

    Each channel by itself, mirrored at the border: the image, the moduli of its J * L Morlet wavelets, and the moduli of
    the coarser wavelets of each of these, J (J - 1) / 2 * L^2. All are smoothed by a Gaussian and sampled at every 2^J-th
    pixel. paths = 1 + J L + J (J - 1) / 2 L^2, in this order (channel first).
    """
    x = images.float().flatten(0, 1).unsqueeze(1)  # (B * C, 1, H, W)
    with torch.autocast(images.device.type, enabled=False):
        moduli = [_modulus(x, scale, angles) for scale in range(scales)]  # each (B * C, L, H, W)
        second = [
            _modulus(moduli[first].flatten(0, 1).unsqueeze(1), scale, angles)
            .unflatten(0, (len(x), angles))
            .flatten(1, 2)
            for first in range(scales)
            for scale in range(first + 1, scales)
        ]
        paths = torch.cat([x, *moduli, *second], dim=1)
        smooth = _filtered(paths.flatten(0, 1).unsqueeze(1), gaussian(scales, x.device)[None, None], 2**scales)
    return smooth.reshape(len(images), -1, *smooth.shape[-2:])


def _modulus(x: Tensor, scale: int, angles: int) -> Tensor:
    """|x * wavelet| at all angles of a scale: (n, 1, H, W) to (n, L, H, W)."""
    wavelets = morlet(scale, angles, x.device)  # (L, k, k) complex
    parts = _filtered(x, torch.cat([wavelets.real, wavelets.imag])[:, None], 1)
    real, imaginary = parts.chunk(2, dim=1)
    return torch.hypot(real, imaginary)


def _filtered(x: Tensor, filters: Tensor, stride: int) -> Tensor:
    """Convolution with odd square filters, the image mirrored at its border (as often as its size asks for)."""
    left = filters.shape[-1] // 2
    while left > 0:
        pad = min(left, x.shape[-2] - 1, x.shape[-1] - 1)
        x = F.pad(x, (pad, pad, pad, pad), mode="reflect") if pad else F.pad(x, (left,) * 4, mode="replicate")
        left -= pad or left
    return F.conv2d(x, filters.flip(-2, -1), stride=stride)


@functools.cache
def gaussian(scales: int, device: torch.device) -> Tensor:
    """The smoothing filter (k, k), float32, of sum 1."""
    y, x = _points(SIGMA * 2 ** (scales - 1))
    values = torch.exp(-(x.square() + y.square()) / (2 * (SIGMA * 2 ** (scales - 1)) ** 2))
    return (values / values.sum()).float().to(device)


@functools.cache
def morlet(scale: int, angles: int, device: torch.device) -> Tensor:
    """Wavelets (L, k, k) complex64: a Gaussian that is longer across its waves (by L / 4) than along them, times a wave
    minus the constant that makes its sum 0; over 2 pi sigma^2 and the length."""
    sigma, frequency, slant = SIGMA * 2**scale, FREQUENCY / 2**scale, 4 / angles
    y, x = _points(sigma)
    found = []
    for angle in (math.pi * i / angles for i in range(angles)):
        along = x * math.cos(angle) + y * math.sin(angle)
        across = y * math.cos(angle) - x * math.sin(angle)
        envelope = torch.exp(-(along.square() + (slant * across).square()) / (2 * sigma**2))
        wave = torch.polar(envelope, frequency * along)
        found.append((wave - envelope * (wave.sum() / envelope.sum())) * (slant / (2 * math.pi * sigma**2)))
    return torch.stack(found).to(torch.complex64).to(device)


def _points(sigma: float) -> tuple[Tensor, Tensor]:
    """Rows and columns of a filter's pixels from its centre, float64."""
    reach = math.ceil(RADIUS * sigma)
    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return y, x
