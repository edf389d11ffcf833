"""A neck of torchvision's detectors over the maps of an encoder."""

from typing import Any

from torch import Tensor, nn


class Pyramid(nn.Module):
    """What torchvision's detectors take: a dict of maps "0" to "3" and the attribute out_channels."""

    def __init__(self, torchvision: Any, model: Any) -> None:
        super().__init__()
        self.model, self.out_channels = model, 32
        self.fpn = torchvision.ops.FeaturePyramidNetwork(list(model.map_channels), self.out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): x for i, x in enumerate(self.model(images, maps=True).maps)})
