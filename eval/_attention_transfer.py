"""Attention transfer (Li et al., "On the Surprising Effectiveness of Attention Transfer for Vision Transformers", NeurIPS
2024): in fine-tuning, the first blocks of a student get the attention of a frozen teacher's blocks, and nothing else.

Shapes: B images, N patches on an (h, w) grid, L tokens of an image, D width.
"""

from typing import Any, Literal, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain.backbones.backbone import Backbone, Features
from ssl_pretrain.backbones.vit import Attention, ViT
from ssl_pretrain.data.views import Sight
from ssl_pretrain.encoder import Encoder, load
from ssl_pretrain.errors import UserError
from ssl_pretrain.foreign import libraries
from ssl_pretrain.foreign.specs import Spec
from ssl_pretrain.frozen import Frozen
from ssl_pretrain.parts.targets import attention_maps, check_attention

Mode = Literal["copy", "distil"]
SHARE = 0.75  # of the student's blocks, the first ones: 18 of 24 in the paper


class CopiedAttention(nn.Module):
    """Attention of a block whose weights are given: of its own it computes values and output only. It keeps the names of
    the parameters; those of queries and keys are not used."""

    def __init__(self, own: Attention) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = own.heads, own.qkv, own.proj
        self.q_norm, self.k_norm = own.q_norm.requires_grad_(False), own.k_norm.requires_grad_(False)
        self.relative_position_bias_table = own.relative_position_bias_table
        if self.relative_position_bias_table is not None:
            self.relative_position_bias_table.requires_grad_(False)
        self.weights: Tensor | None = None  # (B, heads, L, L), for the next forward

    def forward(
        self, x: Tensor, mask: Any, causal: bool, rope: Any, packed: Any, first: int | None, *rest: Any
    ) -> Tensor:
        """Tokens (B, L, D) to (B, L, D), or the `first` of them. See `vit.Attention`; positions and masks are in the given
        weights."""
        weights, self.weights = self.weights, None
        assert weights is not None, "the weights of the attention are given before each forward"
        width, bias = self.proj.out_features, self.qkv.bias
        v = F.linear(x, self.qkv.weight[2 * width :], None if bias is None else bias[2 * width :])
        v = v.unflatten(2, (self.heads, -1)).transpose(1, 2)
        y = weights[:, :, :first].to(v.dtype) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


@final
class AttentionTransfer:
    """A frozen teacher whose attention the first blocks of a student copy, or learn to have.

    Raises UserError for a teacher that does not fit the student: without attention maps, with fewer blocks or other heads,
    or with other tokens.
    """

    def __init__(
        self,
        spec: str,
        student: Encoder,
        mode: Mode,
        blocks: int | None,
        weight: float,
        device: torch.device,
        code: str | None = None,
    ) -> None:
        """blocks: how many of the first blocks; None: three quarters of them. weight: of the loss of "distil". code: name
        of the code that the teacher may import (`encoder.load`)."""
        backbone = student.backbone
        if not isinstance(backbone, ViT):
            raise UserError(
                f"--attention-from: {student.name} is no ViT of this package ({type(backbone).__name__}), whose attention "
                f"could be that of another encoder"
            )
        if backbone.config.parallel_branches > 1:
            raise UserError(
                f"--attention-from: the blocks of {student.name} have several attentions (--parallel-branches)"
            )
        count = max(1, int(SHARE * backbone.depth)) if blocks is None else blocks
        if not 1 <= count <= backbone.depth:
            raise UserError(f"--attention-blocks {count}: {student.name} has {backbone.depth} blocks")
        self.mode, self.blocks, self.weight = mode, tuple(range(count)), weight
        self.teacher = _opened(spec, student, device, code)
        check_attention("--attention-from", self.teacher)
        depth = self.teacher.backbone.depth
        if depth < count:
            raise UserError(
                f"--attention-from {spec} has {depth} blocks, and {count} of {student.name} are to get their attention: "
                f"give --attention-blocks {depth} or fewer"
            )
        self.check(backbone.to(device))

    @torch.no_grad()
    def check(self, student: Backbone) -> None:
        """Raise UserError unless the attention of both is of the same heads and tokens."""
        training, device = student.training, next(student.parameters()).device
        images = torch.zeros(1, student.in_chans, *student.image_size, device=device)
        own = student.eval()(images, attention_of=self.blocks[-1:])
        student.train(training)
        view = self._view(images, own.grid)
        theirs = self.teacher(view, attention_of=self.blocks[-1:])
        mine, wanted = own.attention[0].shape, theirs.attention[0].shape
        if theirs.grid != own.grid or mine[3] != wanted[3]:
            described = [
                f"{each.grid[0]} x {each.grid[1]} patches and {shape[3] - each.patches.shape[1]} other tokens"
                for each, shape in ((theirs, wanted), (own, mine))
            ]
            raise UserError(
                f"--attention-from {self.teacher.spec} has {described[0]} where the encoder has {described[1]}: attention "
                f"can be transferred between the same tokens only"
            )
        if mine[1] != wanted[1]:
            raise UserError(
                f"--attention-from {self.teacher.spec} has {wanted[1]} attention heads and the encoder {mine[1]}: "
                f"attention can be transferred between equal numbers of heads only"
            )

    @property
    def options(self) -> dict[str, Any]:
        """Options of the student's forward in training."""
        return {"attention_of": self.blocks, "attention_logits": True} if self.mode == "distil" else {}

    def loss(self, features: Features, images: Tensor) -> Tensor:
        """For "distil" the weighted sum over blocks of the cross-entropy between the teacher's attention and the
        student's, a mean over images, heads and queries; () float32. features: of `images` with `options`."""
        wanted = attention_maps(self.teacher, self._view(images, features.grid), self.blocks)
        each = [
            -(theirs * own.log_softmax(-1)).sum(-1).mean()
            for own, theirs in zip(features.attention, wanted, strict=True)
        ]
        return self.weight * torch.stack(each).sum()

    def attach(self, student: Backbone) -> None:
        """For "copy": from now on each forward of the student, or of a copy of it, asks the teacher first."""
        for i in self.blocks:
            block = cast(ViT, student).blocks[i]
            block.attn = CopiedAttention(cast(Attention, block.attn))

        def give(module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
            images, (p, q) = given[0], cast(ViT, module).stride
            view = self._view(images, (images.shape[-2] // p, images.shape[-1] // q))
            for i, weights in zip(self.blocks, attention_maps(self.teacher, view, self.blocks), strict=True):
                cast(Any, module).blocks[i].attn.weights = weights

        student.register_forward_pre_hook(give, with_kwargs=True)

    def facts(self) -> dict[str, Any]:
        """What the protocol says of it."""
        return {
            "encoder": self.teacher.spec,
            "fingerprint": self.teacher.fingerprint,
            "mode": self.mode,
            "blocks": len(self.blocks),
            **({"weight": self.weight} if self.mode == "distil" else {}),
        }

    def _view(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The student's images (B, C, H, W) with as many patches of the teacher's size."""
        size = [cells * step for cells, step in zip(grid, self.teacher.sight.stride, strict=True)]
        if list(images.shape[-2:]) == size:
            return images
        return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def _opened(spec: str, student: Encoder, device: torch.device, code: str | None) -> Frozen:
    """The teacher, for images in the student's normalisation."""
    opened, own = libraries.load(spec) if Spec.parse(spec) else load(spec, code=code), student.preprocessing
    how = opened.preprocessing
    if how.channels != own.channels:
        raise UserError(
            f"--attention-from {spec} takes images of {how.channels} channels, and the encoder of {own.channels}"
        )
    return Frozen(
        opened.backbone.to(device),
        spec=spec,
        fingerprint=opened.fingerprint,
        sight=Sight(opened.backbone.stride, how.interpolation, opened.backbone.unit),
        own=(how.mean, how.std),
        run=(own.mean, own.std),
    )
