"""Multi-scale fusion (Ryali et al., "Hiera", ICML 2023, section 3): a masked autoencoder's decoder sees the outputs of the
first stages of a hierarchical encoder, too.

Shapes: B images, K kept mask units, N patches of these units, D encoder width.
"""

import dataclasses

from torch import Tensor, nn

from ..backbones.backbone import Backbone, Features


class MultiScaleFusion(nn.Module):
    """Adds the maps that are finer than the patches to the patches, each by a convolution of exactly one patch, and
    normalises the sum.

    A convolution does not see across the edge of a patch, so nothing is mixed between units. As the last level it takes
    `Features.patches`, which the encoder has normalised. The release takes them before that norm, which then has no
    gradient and which fine-tuning begins anew.
    """

    def __init__(self, encoder: Backbone) -> None:
        super().__init__()
        self.levels = [i for i, stride in enumerate(encoder.map_strides) if stride[0] < encoder.stride[0]]
        self.heads = nn.ModuleList()
        for i in self.levels:
            down, right = (int(p // s) for p, s in zip(encoder.stride, encoder.map_strides[i], strict=True))
            self.heads.append(nn.Conv2d(encoder.map_channels[i], encoder.dim, (down, right), (down, right)))
        self.norm = nn.LayerNorm(encoder.dim, eps=1e-6)

    def forward(self, seen: Features) -> Features:
        """Features of kept units, with their maps (B, C_i, K * a_i, b_i), as the same with fused patches (B, N, D). Raises
        ValueError for features without maps."""
        if not seen.maps:
            raise ValueError("multi-scale fusion needs the maps of the kept units: encode with maps=True")
        fused: Tensor = seen.patches
        for i, head in zip(self.levels, self.heads, strict=True):
            fused = fused + head(seen.maps[i]).flatten(2).mT
        return dataclasses.replace(seen, patches=self.norm(fused), maps=())


def make(encoder: Backbone) -> MultiScaleFusion | None:
    """The fusion for an encoder whose maps have different widths and can be left out in units; None for others, such as a
    ViT, all of whose maps are made from its patches."""
    hierarchical = {"keep", "maps"} <= encoder.supports and len(set(encoder.map_channels)) > 1
    return MultiScaleFusion(encoder) if hierarchical else None
