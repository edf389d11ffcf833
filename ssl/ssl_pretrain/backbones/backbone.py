"""The contract of an encoder: images in, Features out. Shapes: B images, C channels, H x W pixels, N patches on a
(h, w) grid, D channels of the encoder, P prefix tokens (CLS and registers), L = P + N, U mask units on a grid of their
own (a unit is one patch or several), E channels of the patch embeddings."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.export
from torch import Tensor, nn

from ..errors import UserError

MASKS = frozenset({"keep", "replace", "visible"})  # words of `Backbone.supports` for what is taken out of an image


class UnsupportedByBackbone(UserError):
    """A method needs something that this backbone does not support; the message names both."""


@dataclass
class Features:
    """The output of an encoder for a batch of images. After the final norm, except `blocks`."""

    cls: Tensor | None  # (B, D), or None if the encoder has no CLS token
    # (B, N, D); with `keep`, only those of the kept units: unit after unit in the requested order, in raster order within
    # a unit; with `visible`, 0 in the units that do not exist.
    patches: Tensor
    grid: tuple[int, int]  # (h, w) of the whole image, also when patches were dropped
    pooled: Tensor  # (B, D), or (B, `pooled_dim`): one vector per image, as the encoder's config defines it
    prefix: Tensor | None = None  # (B, P, D): CLS first if there is one, then registers; None without prefix tokens
    blocks: tuple[Tensor, ...] = ()  # (B, L, D) (prefix first) of each requested block, before the final norm
    tokens: Tensor | None = None  # (B, L, D): prefix and patches as one tensor; None without a prefix
    # A pyramid of maps (B, C_i, h_i, w_i), the finest first; their strides and channels are `Backbone.map_strides` and
    # `map_channels`. Empty unless it was asked for.
    maps: tuple[Tensor, ...] = ()
    # (B, heads, L, L) of each requested block, float32: the weight of each key (column) for each query (row), prefix first,
    # or its logit. Empty unless it was asked for.
    attention: tuple[Tensor, ...] = ()


# So that torch.export, and whatever else maps over the tensors of a result, sees the tensors in it.
torch.export.register_dataclass(Features, serialized_type_name="ssl_pretrain.Features")


class Backbone(nn.Module, ABC):
    """An encoder without any head. Final subclasses live in one file each and are built by `backbones.build`.

    Attributes every backbone sets: `config` (its frozen dataclass), `image_size` (H, W), `in_chans`, `dim` (D, width
    of every token), `depth` (number of blocks or stages), `stride` (pixels a patch side (h, w)), `supports`
    (frozenset of words among "keep", "replace", "visible", "attention", "blocks", "drop_path", "pooled_only", "maps",
    "attention_maps"). Everything that a forward pass uses is in `state_dict()`. A backbone that supports "maps" also
    sets `map_strides` and `map_channels`. Some also define `unit`, `token_dim` and `pooled_dim`.
    """

    config: Any
    name: str = ""  # by which `backbones.build` makes this architecture; empty for one that it did not make
    image_size: tuple[int, int]
    in_chans: int
    dim: int
    depth: int
    stride: tuple[int, int]
    supports: frozenset[str]
    map_strides: tuple[tuple[float, float], ...] = ()  # pixels a position (down, right) of each of `Features.maps`
    map_channels: tuple[int, ...] = ()  # their channels
    no_maps: str = ""  # why there are none, where that is not the same for all encoders of the class
    # Patterns (as of file names) of matrices that weight decay does not apply to, beside biases and norms.
    undecayed: tuple[str, ...] = ()
    # Whether some parameters get no gradient if a method uses only `Features.pooled`, or only `patches`.
    partly_used: bool = False

    @property
    def unit(self) -> tuple[int, int]:
        """Pixels a side (h, w) of a mask unit: the smallest area that `keep`, `replace` and `visible` can take out of an
        image. A whole number of patches; by default one."""
        return self.stride

    @property
    def token_dim(self) -> int:
        """Channels E of the patch embeddings, which `replace` replaces. By default D."""
        return self.dim

    @property
    def pooled_dim(self) -> int:
        """Channels of `Features.pooled`. By default D."""
        return self.dim

    @abstractmethod
    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        replace: tuple[Tensor, Tensor] | None = None,
        attention: str | Tensor = "full",
        prefix_length: Tensor | None = None,
        blocks: tuple[int, ...] = (),
        drop: Tensor | None = None,
    ) -> Features:
        """Encode images (B, C, H, W) float, normalised as the run says; H, W any multiple of `stride`.

        keep: (B, K) int64 indices of mask units in raster order of their grid; only these enter the encoder.
        replace: (mask (B, U) bool, token (E,)); the embeddings of the patches in masked units are replaced by the token
            before positions are added. Pixels of masked units have no influence.
        attention: "full", "causal" (a token attends to itself and earlier ones; prefix tokens come first), "prefix" (as
            causal, but the first `prefix_length` (B,) patches and all prefix tokens attend to each other fully), or a
            bool mask (B or 1, L, L), True if query row may attend to key column.
        blocks: indices of the blocks whose outputs are in `Features.blocks`; negative counts from the end.
        drop: (B, 2 * depth) uniform noise for drop path, drawn by the method from `Step.rand`; needed in training when
            the drop-path rate is above 0.
        Raises UnsupportedByBackbone for an option that the backbone does not support.

        A backbone that supports one of these words takes more options:
        "pooled_only": `pooled_only`; True means that only `Features.pooled` is used, and the rest may be missing.
        "maps": `maps`; True gives `Features.maps`. They are of whole images: with `keep` they are refused (UserError), or
            are those of the kept units below each other, (B, C_i, K * a_i, b_i) of units of a_i x b_i positions.
        "visible": `visible` (B, U) bool, the mask units that exist. Pixels of the others have no influence on anything,
            also not on the statistics of a batch norm; their positions are 0 in `Features.patches` and `maps`, and
            `pooled` is made from visible positions.
        "attention_maps": `attention_of`, indices of the blocks whose attention is in `Features.attention` (as `blocks`),
            and `attention_logits`: True gives the logits before the softmax, -inf where a query may not attend.
        """

    def forward_crops(self, batches: Sequence[tuple[Tensor, dict[str, Any]]]) -> list[Features]:
        """The Features of several batches of images of different sizes, each (images, options of `forward`): the crops
        of multi-crop. Batches do not influence each other (batch norm uses the statistics of one batch). Default: one
        after another; a backbone may process together what its layers compute in the same way for all."""
        return [self(images, **options) for images, options in batches]

    @abstractmethod
    def layer_of(self, parameter: str) -> int:
        """Depth of a parameter for layer-wise learning-rate decay: 0 for the stem (patch embedding, tokens, positions),
        i + 1 for block i, depth + 1 for what follows the blocks."""

    def require(self, method: str, *wishes: str, units: bool = False) -> None:
        """Raise UnsupportedByBackbone unless the backbone supports every word; called in a method's constructor.

        units: the method masks whole units, also where a unit is several patches (`parts.units`). Without it, "keep",
        "replace" and "visible" also need a backbone whose units are patches.
        """
        coarse = not units and self.unit != self.stride
        for wish in wishes:
            if coarse and wish in MASKS and wish in self.supports:
                raise UnsupportedByBackbone(
                    f"{method} masks single patches, of {self.stride[0]} x {self.stride[1]} pixels here, and "
                    f"{type(self).__name__} masks only whole units of {self.unit[0]} x {self.unit[1]}; a ViT "
                    f"(--encoder vit_small) masks patches"
                )
            if wish == "maps" and wish not in self.supports and self.no_maps:
                raise UnsupportedByBackbone(f"{method} needs an encoder that gives maps: {self.no_maps}")
            if wish not in self.supports:
                other = "a ConvNeXt (--encoder convnextv2_tiny)" if wish == "visible" else "a ViT (--encoder vit_small)"
                raise UnsupportedByBackbone(
                    f"{method} needs an encoder that supports {wish!r}, and {type(self).__name__} does not "
                    f"(it supports: {', '.join(sorted(self.supports)) or 'only a plain forward'}); "
                    f"{other} does"
                )

    def require_one_width(self, method: str) -> None:
        """Raise UnsupportedByBackbone if `pooled` is not as wide as patches; for methods that give both to one layer."""
        if self.pooled_dim != self.dim:
            raise UnsupportedByBackbone(
                f"{method} needs a vector of the image as wide as its patches ({self.dim} channels), and that of "
                f"{type(self).__name__} has {self.pooled_dim}; --pool mean, where there is such an option, or a ViT "
                f"(--encoder vit_small) has it"
            )

    def _block(self, i: int) -> int:
        """The index of block `i`, which may count from the end. Raises UserError if there is none."""
        if not -self.depth <= i < self.depth:
            raise UserError(f"the encoder has blocks 0 to {self.depth - 1} (or -{self.depth} to -1), not {i}")
        return i % self.depth

    def refuse_options(
        self,
        keep: Tensor | None,
        replace: tuple[Tensor, Tensor] | None,
        attention: str | Tensor,
        prefix_length: Tensor | None,
        blocks: tuple[int, ...],
    ) -> None:
        """Raise UnsupportedByBackbone for every used option of `forward` that is not in `supports`."""
        full = isinstance(attention, str) and attention == "full" and prefix_length is None
        options = {
            "keep": keep is not None,
            "replace": replace is not None,
            "attention": not full,
            "blocks": bool(blocks),
        }
        for option, given in options.items():
            if given and option not in self.supports:
                raise UnsupportedByBackbone(
                    f"forward was called with {option!r}, which {type(self).__name__} does not support; "
                    f"a ViT (--encoder vit_small) does"
                )

    def adapt(self, weights: dict[str, Tensor], image_size: tuple[int, int]) -> dict[str, Tensor]:
        """Convert weights (a state dict) of the same architecture for another `image_size` to this one's image size.
        Default: unchanged, because most architectures have no weights that depend on the image size."""
        return weights

    def describe(self) -> dict[str, Any]:
        """The architecture's options as plain data, from which `backbones.build` makes the same architecture."""
        return asdict(self.config)
