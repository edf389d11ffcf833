"""BYOL (Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", NeurIPS 2020).

An online network predicts, from one view of an image, the target network's projection of the other view. The target is
an EMA of the online network; there are no negatives. Shapes: B images of this process, two views of each, D encoder
width, K embedding width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, FROM_0_BELOW_1, FROM_0_TO_1, NOT_NEGATIVE, within
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.ema_teacher import EncoderWithHeads, cosine_momentum, ema_copy, ema_update_
from ssl_pretrain.parts.heads import l2_normalize, mlp
from ssl_pretrain.parts.views import asymmetric_views, encode_pooled, require_token_drop
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod


@final
class BYOL(WholeBatchMethod):
    """Predict the target network's projection of the other view; the exported encoder is the online one.

    Defaults are the paper's (section 3.3 and appendix B): batch 4,096, 1,000 epochs of ImageNet with ResNet-50. Raises
    UserError for options out of range.
    """

    recipe = Recipe(
        optimizer="lars",
        lr=0.2,
        lr_batch=256,
        betas=(0.9, 0.999),
        weight_decay=1.5e-6,
        warmup=10 / 1000,
        encoder={"pool": "cls"},
        small={
            "optimizer": "adamw",
            "lr": 1e-3,
            "warmup_steps": 12,
            "momentum": 0.98,
            "hidden_dim": 512,
            "blur": 0.0,
            "crop_scale": (0.2, 1.0),
            "patch_size": 8,
            "steps": 150,
        },
        tiny={"hidden_dim": 64, "embedding_dim": 16},
    )
    least_batch = 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Bootstrap your own latent (BYOL)."""

        momentum: float = 0.996
        """Target network's momentum at the start; it rises to 1 along half a cosine."""
        hidden_dim: int | None = None
        """Width of the hidden layer of projector and predictor (default: by the encoder; 4,096 from ViT-B on)."""
        embedding_dim: int = 256
        """Width of the projections that are predicted."""
        crop_scale: tuple[float, float] = (0.08, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        blur: float = 1.0
        """Factor on the blur probabilities (1 and 0.1 for the two views); 0 is usual for images of 32 pixels."""
        token_drop: float = 0.0
        """Share of the patches that the student does not see (FLIP), drawn for each view; 0 in the last 5 % of a run."""

        def __post_init__(self) -> None:
            within(self, FROM_0_BELOW_1, "token_drop")
            within(self, FROM_0_TO_1, "momentum")
            within(self, AT_LEAST_1, "hidden_dim", "embedding_dim")
            within(self, NOT_NEGATIVE, "blur")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        require_token_drop(encoder, "byol", config.token_drop)
        # Unlike SimCLR's, the outputs are not normalised (section 3.3); their linear layers have no bias, as released.
        self.projector = mlp((encoder.pooled_dim, self.config.hidden_dim, config.embedding_dim), last_bias=False)
        self.predictor = mlp((config.embedding_dim, self.config.hidden_dim, config.embedding_dim), last_bias=False)

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """The target network begins as the online one; it has no predictor."""
        self.teacher = ema_copy(EncoderWithHeads({"encoder": self.encoder, "projector": self.projector}))

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {"hidden_dim": sizes.width(4096, encoder.dim)}

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """Two crops: one is always blurred, the other is sometimes solarized (appendix B, table 6)."""
        return asymmetric_views(("view1", "view2"), image_size, config.crop_scale, config.blur)

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Both views' vectors (B, 2, D) by the online encoder, "online", and by the target's, "target"."""
        # Two batches: if the encoder has batch norm, its statistics are those of one view, as in the paper.
        views = [batch.views["view1"], batch.views["view2"]]
        online = encode_pooled(self.encoder, views, step, self.config.token_drop)
        with torch.no_grad():  # stop-gradient: nothing flows into the target
            target = encode_pooled(self.teacher.backbone, views, step)
        return {"online": torch.stack(online, dim=1), "target": torch.stack(target, dim=1)}

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """The squared distance of unit vectors, predicted and target, added over both directions (eq. 2)."""
        first, second = (l2_normalize(self.predictor(self.projector(view))) for view in embedded["online"].unbind(1))
        with torch.no_grad():
            targets = [l2_normalize(self.teacher["projector"](view)) for view in embedded["target"].unbind(1)]
        each = 4 - 2 * (first * targets[1]).sum(-1) - 2 * (second * targets[0]).sum(-1)
        return Losses(total=each.mean(), per_sample=each.detach())

    def after_step(self, step: Step) -> None:
        """The target follows the online network (section 3.1)."""
        online = EncoderWithHeads({"encoder": self.encoder, "projector": self.projector})
        ema_update_(self.teacher, online, cosine_momentum(self.config.momentum, step.progress), step.ok)

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The loss if all embeddings are the same vector."""
        return {"loss": (0.0, "all views of all images get the same embedding")}
