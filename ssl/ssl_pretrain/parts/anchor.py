"""Anchors to the start weights: extra losses that keep a continued encoder near the network that it began as.

Shapes: V views of each of B images, N patches of a view, D channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.adapters import NAMES
from ..backbones.backbone import Backbone, Features
from ..data.views import Reads, ViewSpec
from ..errors import UserError
from ..frozen import Frozen
from ..pretext import Losses
from .align import resized

Kind = Literal["none", "gram", "features", "weights"]
NETWORK = "anchor"  # its name in `Method.frozen`


def networks(kind: Kind) -> tuple[str, ...]:
    """What `Method.frozen` gives for an anchor of this kind."""
    return () if kind == "none" else (NETWORK,)


def twins(kind: Kind, specs: Sequence[ViewSpec], zoom: float) -> tuple[ViewSpec, ...]:
    """The views of the frozen network: clean renderings of `specs` with `zoom` times the patches along each side."""
    if kind not in ("gram", "features"):
        return ()
    return tuple(
        replace(
            spec,
            name=f"{spec.name}_{NETWORK}",
            of=spec.name,
            clean=True,
            network=NETWORK,
            reads=Reads(outputs=("cls", "patches") if kind == "features" else ("patches",)),
            size=(round(spec.size[0] * zoom), round(spec.size[1] * zoom)),
        )
        for spec in specs
    )


@final
class Anchor:
    """The loss of an anchor. It has no weights, and it is no module: nothing of it is in a checkpoint.

    kind "gram": mean squared difference of the cosine similarities of all pairs of patches of an image (Gram anchoring of
    DINOv3, Simeoni et al., 2025, section 4.2, with the start weights as the Gram teacher). "features": 1 - cosine of each
    patch and of the class token, half each (without a class token of patches alone). "weights": half the squared distance
    of the encoder's parameters from the start (L2-SP; Li et al., ICML 2018), summed over all of them.

    Raises UserError where the frozen network does not fit the encoder, and where nothing would be held.
    """

    def __init__(self, kind: Kind, encoder: Backbone, frozen: Frozen) -> None:
        self.kind, self.frozen = kind, frozen
        self.sees = kind in ("gram", "features")  # whether it needs the encoder's features
        self._start = _start_of_weights(encoder, frozen) if kind == "weights" else []
        cells = [-(-side // step) for side, step in zip(encoder.image_size, encoder.stride, strict=True)]
        if kind == "gram" and math.prod(cells) < 2:
            raise UserError(
                f"--anchor gram compares the patches of an image, and the encoder has one patch an image at --image-size "
                f"{encoder.image_size[0]} {encoder.image_size[1]}: use --anchor features, or larger images"
            )
        if kind == "features" and frozen.dim != encoder.dim:
            raise UserError(
                f"--anchor features: {frozen.spec} has {frozen.dim} channels and the encoder {encoder.dim}: use --anchor "
                f"gram, which compares similarities, or a network of the same width"
            )

    def __call__(self, own: Features, views: Tensor) -> Tensor:
        """The loss of each image of the kinds "gram" and "features": float32 (V * B,), in the order of `own`.

        own: the encoder's features of views, one view after another. views: what the frozen network sees of them,
        (V, B, C, H, W) or (B, C, H, W).
        """
        there = self.frozen(views.flatten(0, 1) if views.ndim == 5 else views)
        patches, target = own.patches.float(), resized(there.patches.float(), there.grid, own.grid)
        patches, target = F.normalize(patches, dim=-1), F.normalize(target, dim=-1)
        if self.kind == "gram":
            with torch.autocast(patches.device.type, enabled=False):
                return (patches @ patches.mT - target @ target.mT).square().mean((1, 2))
        loss = (1 - (patches * target).sum(-1)).mean(1)
        if own.cls is None or there.cls is None:
            return loss
        return (loss + 1 - F.cosine_similarity(own.cls.float(), there.cls.float(), dim=-1)) / 2

    def distance(self) -> Tensor:
        """The loss of the kind "weights": float32 ()."""
        return 0.5 * torch.stack([(own - start.to(own.device)).square().sum() for own, start in self._start]).sum()

    def add(self, losses: Losses, weight: float, each: Tensor | None) -> None:
        """Add the loss to a method's, as the term "anchor". each: float32 (B,), of each image; None for the kind
        "weights"."""
        whole = self.distance() if each is None else each.mean()
        losses.total = losses.total + weight * whole
        losses.terms["anchor"] = whole.detach()
        if losses.per_sample is not None:
            losses.per_sample = losses.per_sample + weight * (whole if each is None else each).detach()


def _start_of_weights(encoder: Backbone, frozen: Frozen) -> list[tuple[Tensor, Tensor]]:
    """Each trained parameter of the encoder, with its value in the frozen network. Raises UserError where it has none."""
    start = encoder.adapt(dict(frozen.backbone.state_dict()), frozen.backbone.image_size)
    trained, found = {id(p) for p in encoder.parameters() if p.requires_grad}, []
    # By the names of a state, as in `start`: those of a wrapped model's parameters are others.
    for name, parameter in encoder.state_dict(keep_vars=True).items():
        if id(parameter) not in trained:
            continue
        trained.remove(id(parameter))  # a shared one counts once
        if fnmatchcase(name, NAMES):
            raise UserError(
                "--anchor weights holds weights, and --adapters lora trains updates in their place: use --anchor gram or "
                "features"
            )
        if name not in start or start[name].shape != parameter.shape:
            raise UserError(
                f"--anchor weights: {frozen.spec} has no {name} of the encoder's shape: use --anchor gram or features, or "
                f"a network of the encoder's architecture"
            )
        found.append((parameter, start[name].detach()))
    return found


def make(kind: Kind, encoder: Backbone, networks: Mapping[str, Frozen]) -> Anchor | None:
    """The anchor of a method, None for the kind "none"."""
    return None if kind == "none" else Anchor(kind, encoder, networks[NETWORK])
