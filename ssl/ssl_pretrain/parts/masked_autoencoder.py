"""MAE's masking, decoder and target (He et al., CVPR 2022, section 3), for methods that reconstruct the pixels of masked
patches.

Shapes: B images, N patches on an (h, w) grid, K of them kept, M = N - K masked, D encoder width, E decoder width, F values
of a patch, P prefix tokens of the encoder, U mask units (on a ViT a unit is a patch).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.backbone import Backbone, Features
from ..backbones.positions import sincos_table
from ..backbones.vit import Block
from ..errors import UserError
from ..pretext import Step
from . import sizes
from .init import xavier_
from .masks import put, random_masking, rows
from .patches import moments, normalise, patchify, unpatchify
from .units import patches_of, unit_grid


@runtime_checkable
class HasDecoder(Protocol):
    """A method after `add_blocks`. The parts are the method's own attributes, because their names are in checkpoints."""

    encoder: Backbone
    grid: tuple[int, int]  # of images of the run's size
    decoder_embed: nn.Linear
    mask_token: nn.Parameter
    decoder_blocks: nn.ModuleList
    decoder_norm: nn.LayerNorm
    decoder_pos_embed: Tensor


class Predicts(HasDecoder, Protocol):
    """A method after `add_decoder`."""

    decoder_pred: nn.Linear


def decoder_sizes(given_width: int | None, encoder: Backbone) -> dict[str, int]:
    """The decoder's sizes by the rule of `parts.sizes`, from the paper's: 512 x 8 with 16 heads. given_width: None for the
    rule's."""
    width = given_width or sizes.width(512, encoder.dim, multiple=32)
    return {
        "decoder_dim": width,
        "decoder_depth": sizes.depth(8, encoder.depth),
        "decoder_heads": sizes.heads(16, width, encoder.dim),
    }


def add_decoder(
    method: Predicts, *, width: int, depth: int, heads: int, mask_ratio: float, values: int | None = None
) -> None:
    """Give a method a decoder of that many `values` a patch (None: its pixels, F). Raises UserError for sizes that do not
    fit, and for a masking ratio that leaves no patch."""
    add_blocks(method, width=width, depth=depth, heads=heads, mask_ratio=mask_ratio)
    encoder = method.encoder
    p, q = encoder.stride
    method.decoder_pred = nn.Linear(width, p * q * encoder.in_chans if values is None else values)


def add_blocks(method: HasDecoder, *, width: int, depth: int, heads: int, mask_ratio: float) -> None:
    """Give a method a decoder without the layer that predicts. Raises UserError for sizes that do not fit, and for a
    masking ratio that leaves no patch."""
    encoder = method.encoder
    if width % heads or width % 4:
        raise UserError(f"--decoder-dim {width} must be a multiple of 4 and of --decoder-heads {heads}")
    (h, w), (p, q) = encoder.image_size, encoder.stride
    method.grid = (h // p, w // q)
    units = unit_grid(encoder, encoder.image_size)
    if kept(units[0] * units[1], mask_ratio) < 1:
        what = "patches" if encoder.unit == encoder.stride else "mask units of the encoder"
        raise UserError(f"--mask-ratio {mask_ratio} leaves none of the {units[0]} x {units[1]} {what}")
    method.decoder_embed = nn.Linear(encoder.dim, width)
    method.mask_token = nn.Parameter(torch.zeros(1, 1, width))
    method.decoder_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
    method.decoder_norm = nn.LayerNorm(width, eps=1e-6)
    assert isinstance(method, nn.Module)
    method.register_buffer("decoder_pos_embed", sincos_table(method.grid, width)[None], persistent=False)


def initialise(method: HasDecoder) -> None:
    """Initialise the decoder and the encoder as MAE (appendix A.1)."""
    assert isinstance(method, nn.Module)
    xavier_(method)
    nn.init.normal_(method.mask_token, std=0.02)
    for name, parameter in method.encoder.named_parameters():
        if name.endswith("cls_token"):
            nn.init.normal_(parameter, std=0.02)


def initialise_decoder(method: Predicts) -> None:
    """Initialise the decoder alone as MAE's."""
    for part in (method.decoder_embed, method.decoder_blocks, method.decoder_pred):
        xavier_(part)
    nn.init.normal_(method.mask_token, std=0.02)


def kept(patches: int, mask_ratio: float) -> int:
    """How many of `patches` patches the encoder sees: rounded down, as released."""
    return int(patches * (1 - mask_ratio))


@dataclass(frozen=True)
class Masking:
    """Which mask units of each image an encoder sees."""

    units: Tensor  # (B, kept units) int64: the option `keep` of the encoder
    keep: Tensor  # (B, K) int64: their patches, in the order in which the encoder gives them
    masked: Tensor  # (B, M) int64: the other patches
    grid: tuple[int, int]  # (h, w) of the patches


def masking_of_units(encoder: Backbone, images: Tensor, step: Step, mask_ratio: float) -> Masking:
    """Random mask units, the share `mask_ratio` of them masked. Raises UserError for images that are no whole number of
    units."""
    (height, width), (p, q) = images.shape[-2:], encoder.stride
    grid = unit_grid(encoder, (height, width))
    units = grid[0] * grid[1]
    keep, masked = random_masking(step.rand(units), kept(units, mask_ratio))
    kept_patches, masked_patches = patches_of(keep, encoder, grid), patches_of(masked, encoder, grid)
    return Masking(keep, kept_patches, masked_patches, (height // p, width // q))


def masking(encoder: Backbone, images: Tensor, step: Step, mask_ratio: float) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Random indices of the kept patches (B, K) and of the masked ones (B, M), int64, and the grid of the images, for an
    encoder whose units are patches."""
    drawn = masking_of_units(encoder, images, step, mask_ratio)
    return drawn.keep, drawn.masked, drawn.grid


def decoded(method: Predicts, seen: Features, keep: Tensor, masked: Tensor, grid: tuple[int, int]) -> Tensor:
    """The decoder's predictions (B, M, F) for the masked patches, from features of the kept ones."""
    *others, last = method.decoder_blocks
    x = _entering(method, seen, keep, masked, grid)
    for block in others:
        x = block(x)
    x = last(x, first=masked.shape[1])
    return method.decoder_pred(method.decoder_norm(x))


def decoder_tokens(
    method: HasDecoder, seen: Features, keep: Tensor, masked: Tensor, grid: tuple[int, int], block: int
) -> Tensor:
    """The output (B, M + P + K, E) of a decoder's block, without the norm at its end, for all tokens in the order masked,
    prefix, kept."""
    x = _entering(method, seen, keep, masked, grid)
    for each in list(method.decoder_blocks)[: block + 1]:
        x = each(x)
    return x


def _entering(method: HasDecoder, seen: Features, keep: Tensor, masked: Tensor, grid: tuple[int, int]) -> Tensor:
    """The tokens (B, M + P + K, E) that enter a decoder's first block, in the order masked, prefix, kept."""
    fusion = getattr(method, "fusion", None)  # of a hierarchical encoder
    if fusion is not None:
        seen = fusion(seen)
    positions = method.decoder_pos_embed
    if grid != method.grid:
        positions = sincos_table(grid, method.decoder_embed.out_features)[None].to(keep.device, non_blocking=True)
    # Prefix tokens take part in the decoder's attention, but have no position.
    tokens = method.decoder_embed(seen.patches if seen.tokens is None else seen.tokens)
    prefix, tokens = tokens.split([tokens.shape[1] - keep.shape[1], keep.shape[1]], dim=1)
    tokens = tokens + F.embedding(keep, positions[0]).to(tokens.dtype)
    masked_tokens = (method.mask_token + F.embedding(masked, positions[0])).to(tokens.dtype)
    # The order does not matter, because positions are added as embeddings. Masked tokens come first, so that the
    # last block can compute its outputs for them alone.
    return torch.cat([masked_tokens, prefix, tokens], dim=1)


def pixel_loss(
    predicted: Tensor, images: Tensor, masked: Tensor, patch: tuple[int, int], norm_pix: bool
) -> tuple[Tensor, Tensor]:
    """The mean squared error () of predictions (B, M, F) of the masked patches, and each image's (B,), detached; float32.

    norm_pix: the target is each patch normalised by its own mean and variance.
    """
    target = rows(patchify(images, patch), masked).float()
    if norm_pix:
        target = normalise(target)
    # Every image has the same number of masked patches: the mean over all is the paper's sum(loss * mask) / sum(mask).
    predicted = predicted.float()
    per_sample = F.mse_loss(predicted.detach(), target, reduction="none").mean(dim=(1, 2))
    return F.mse_loss(predicted, target), per_sample


def mean_colour(method: Predicts) -> tuple[float, str]:
    """What `pixel_loss` is with `norm_pix` if nothing is learned, and what that means."""
    values = method.decoder_pred.out_features
    return (values - 1) / values, "every patch is reconstructed as its mean colour; nothing is learned"


def painted(
    images: Tensor, predicted: Tensor, masked: Tensor, patch: tuple[int, int], grid: tuple[int, int], norm_pix: bool
) -> dict[str, Tensor]:
    """Input, masked input and reconstruction of the masked patches, (B, C, H, W). Reconstructions of normalised targets
    get the true mean and variance, because the loss does not train these."""
    patches = patchify(images, patch).float()
    predicted = predicted.float()
    if norm_pix:
        mean, deviation = moments(rows(patches, masked))
        predicted = predicted * deviation + mean
    return {
        "input": images,
        "masked": unpatchify(put(patches, masked, torch.zeros_like(predicted)), patch, grid),
        "reconstruction": unpatchify(put(patches, masked, predicted), patch, grid),
    }
