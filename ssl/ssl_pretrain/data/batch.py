"""What a method sees of the images of one micro-batch. Shapes: B images of this micro-batch, C channels, H x W pixels."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Batch:
    """One micro-batch on the device."""

    views: dict[str, Tensor]  # by ViewSpec.name: (B, C, H, W), or (count, B, C, H, W) where the spec's count is above 1
    index: Tensor  # (B,) int64 sample ids in the data set
    geometry: dict[str, Tensor] = field(default_factory=dict)
    # by view name, (B, 6) or (count, B, 6) float32: top, left, height, width of the crop as shares of the whole image; 1
    # where it was flipped left-right, else 0; 1 where it was flipped top-bottom, else 0. `views.to_image` reads it.
    labels: Tensor | None = None  # (B,) int64; -1 where unknown; for probes and supervised controls only
