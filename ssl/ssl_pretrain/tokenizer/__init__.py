"""Exported tokenizers: written by the training loop, read by methods that predict ids (`--tokenizer`).

An export is a folder with `model.safetensors` and `config.json`, as of an encoder (`ssl_pretrain.encoder`), with the
codebook and how much of it is used. Reading one runs no code that a file names.
Shapes: B images, C channels, H x W pixels, an (h, w) grid of ids, K codes of d channels.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..backbones.quantizer import Quantizer
from ..backbones.scales import read_scales
from ..encoder import (
    Encoder,
    Preprocessing,
    check_hash,
    check_names,
    described,
    from_description,
    read_export,
    weights_hash,
    write_export,
)
from ..errors import UserError
from ..files import export_folder, sync

FORMAT = 1  # of config.json


@final
class Tokenizer(nn.Module):
    """An encoder with a codebook: images become maps of ids.

    Attributes: `encoder` (with `preprocessing` and `lineage`); `quantizer`, the codebook.
    """

    def __init__(self, encoder: Encoder, quantizer: Quantizer) -> None:
        super().__init__()
        self.encoder, self.quantizer = encoder, quantizer

    @torch.no_grad()
    def ids(self, images: Tensor) -> Tensor:
        """Ids (B, h, w) int64, below `codes`, of images (B, C, H, W) from `preprocess`. In the precision of the weights,
        also under autocast. Of a tokenizer of several scales those of the finest one."""
        with torch.autocast(images.device.type, enabled=False):
            seen = self.encoder(images)
            return self.quantizer.ids(seen.patches, seen.grid)

    @torch.no_grad()
    def ids_by_scale(self, images: Tensor) -> tuple[Tensor, ...]:
        """Ids (B, h_s, w_s) int64 of every scale s, the coarsest first, of images as for `ids`; the last are `ids`. A scale
        says what the coarser ones leave of the map (`backbones.scales`). Of a tokenizer of one scale: `ids` alone."""
        if self.quantizer.scales is None:
            return (self.ids(images),)
        with torch.autocast(images.device.type, enabled=False):
            seen = self.encoder(images)
            shapes, found = self.quantizer.scales.shapes(seen.grid), self.quantizer.levels(seen.patches, seen.grid).ids
        parts = found.split([h * w for h, w in shapes], dim=1)
        return tuple(part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))

    @torch.no_grad()
    def lookup_scales(self, ids: Sequence[Tensor]) -> Tensor:
        """The vectors (B, h, w, d) of ids by scale (as `ids_by_scale` gives them): the sum over all scales."""
        if self.quantizer.scales is None:
            return self.lookup(ids[0])
        grid = (ids[-1].shape[1], ids[-1].shape[2])
        together = torch.cat([each.flatten(1) for each in ids], dim=1)
        return self.quantizer.scales.lookup(together, grid, self.quantizer.vectors())[-1].unflatten(1, grid)

    def forward(self, images: Tensor) -> Tensor:
        """`ids`."""
        return self.ids(images)

    @torch.no_grad()
    def lookup(self, ids: Tensor) -> Tensor:
        """The codes (B, h, w, d) of ids (B, h, w), of one scale."""
        return self.quantizer.lookup(ids)

    def preprocess(self, images: Sequence[Image.Image | np.ndarray | bytes]) -> Tensor:
        """Convert pictures to (B, C, H, W) float32, as `Encoder.preprocess`."""
        return self.encoder.preprocess(images)

    @property
    def codes(self) -> int:
        """The number of codes, K."""
        return self.quantizer.size

    @property
    def scales(self) -> tuple[int, ...]:
        """Cells of each scale along the longer side of the grid of the training images; empty for one scale."""
        return () if self.quantizer.scales is None else self.quantizer.scales.sides

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels of an id (height, width)."""
        return self.encoder.backbone.stride

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid of ids (h, w) of images of `size` (H, W), a multiple of the stride."""
        return size[0] // self.stride[0], size[1] // self.stride[1]

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared."""
        return self.encoder.preprocessing

    @property
    def lineage(self) -> dict[str, Any]:
        """The origin of the weights."""
        return self.encoder.lineage

    @property
    def usage(self) -> dict[str, Any]:
        """See `Quantizer.usage`: over a fixed number of tokens of training images, at least ten for each code."""
        return self.quantizer.usage()

    @property
    def fingerprint(self) -> str:
        """Hex text, equal for equal weights, codes, architecture and preprocessing. Ids of two tokenizers have the same
        meaning only if it is equal."""
        text = json.dumps(_description(self), sort_keys=True) + weights_hash(self.state_dict())
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def save(path: Path, tokenizer: Tokenizer) -> None:
    """Write an export to the folder `path`; an older one is replaced. Files are written as `encoder.save` does, so a killed
    process leaves the old export or the new one. Raises OSError if it cannot be written."""
    weights = {name: value.detach().cpu().contiguous() for name, value in tokenizer.state_dict().items()}
    facts = {"usage": tokenizer.usage, "lineage": tokenizer.lineage, "weights": weights_hash(weights)}
    write_export(path, weights, {"format": FORMAT, **_description(tokenizer), **facts})
    sync(path)


def load(path: str | Path, device: str | torch.device = "cpu", *, code: str | None = None) -> Tokenizer:
    """Load the tokenizer in a folder, or in the `tokenizer/` of a run folder; in eval mode on `device`. code: as for
    `encoder.load`.

    Raises UserError if there is none, if its weights do not match its description key for key, or if they are not the ones
    that were saved.
    """
    folder = export_folder(Path(path), "tokenizer")
    config, weights = read_export(folder)
    wanted = config.get("quantizer")
    if not isinstance(wanted, dict):
        raise UserError(
            f"{folder} is no tokenizer: give a run of a tokenizer (--method vqtok), or the tokenizer/ in one"
        )
    try:
        size, width, dim = (int(wanted[name]) for name in ("size", "width", "dim"))
        shapes = {"codes": (size, width), "project.weight": (width, dim)}  # compared before memory is taken for them
        for name, shape in shapes.items():
            if tuple(weights[f"quantizer.{name}"].shape) != shape:
                raise ValueError(f"{name} is not {shape}")
        quantizer = Quantizer(dim, size, width, unit=bool(wanted["unit"]), scales=read_scales(wanted))
    except (KeyError, TypeError, ValueError) as problem:
        raise UserError(f"{folder / 'config.json'} does not describe a tokenizer: {problem}") from None
    tokenizer = Tokenizer(from_description(config, folder, code), quantizer)
    check_names(tokenizer, weights, folder)
    tokenizer.load_state_dict(weights)
    check_hash(config, weights, folder)
    return tokenizer.to(device).eval()


def _description(tokenizer: Tokenizer) -> Mapping[str, Any]:
    """Architecture and preprocessing for config.json."""
    return {**described(tokenizer.encoder), "quantizer": tokenizer.quantizer.describe()}
