"""Coordinates of patches that change from step to step (`--rope-shift`, `--rope-jitter`, `--rope-rescale`)."""

from torch import nn

from ..backbones.vit import ViT


def move_positions(encoder: nn.Module, key: int) -> None:
    """Tell the ViTs in an encoder whose coordinates change the key of this step, of which they are a function."""
    for part in encoder.modules():
        if isinstance(part, ViT) and part.moves_positions:
            part.positions_key = key
