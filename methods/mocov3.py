"""MoCo v3 (Chen, Xie & He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021).

A query encoder identifies each image's other view among the keys of the whole batch. The keys come from a momentum
encoder, and there is no memory queue. Shapes: B images of this process, N of all processes, two views of each, D
encoder width, K embedding width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain import distributed
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, FROM_0_BELOW_1, FROM_0_TO_1, NOT_NEGATIVE, POSITIVE, within
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.ema_teacher import EncoderWithHeads, cosine_momentum, ema_copy, ema_update_
from ssl_pretrain.parts.heads import l2_normalize, mlp
from ssl_pretrain.parts.init import xavier_
from ssl_pretrain.parts.views import asymmetric_views, encode_pooled, require_token_drop
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod


@final
class MoCoV3(WholeBatchMethod):
    """Contrast queries with the momentum encoder's keys; the exported encoder is that of the queries.

    Defaults are the paper's for ViTs (sections 3 to 5): batch 4,096, 300 epochs of ImageNet. Raises UserError for
    options out of range.
    """

    recipe = Recipe(
        lr=1.5e-4,
        lr_batch=256,
        betas=(0.9, 0.999),
        weight_decay=0.1,
        decay="all",
        warmup=40 / 300,
        encoder={"positions": "sincos", "pool": "cls"},
        small={
            "lr": 1e-3,
            "momentum": 0.98,
            "hidden_dim": 512,
            "blur": 0.0,
            "crop_scale": (0.2, 1.0),
            "patch_size": 8,
            "steps": 150,
        },
        tiny={"hidden_dim": 64, "embedding_dim": 16},
    )

    # The patch embedding is frozen at its random start (`freeze_patch_embed`), so the momentum encoder's is the same.
    constant = frozenset(
        f"{network}.patch_embed.proj.{tensor}"
        for network in ("encoder", "teacher.encoder")
        for tensor in ("weight", "bias")
    )
    least_batch = 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """MoCo v3."""

        temperature: float = 0.2
        """Temperature of the similarities."""
        momentum: float = 0.99
        """Momentum encoder's momentum at the start; it rises to 1 along half a cosine."""
        freeze_patch_embed: bool = True
        """Freeze a ViT's patch embedding at its random initial values (section 4.2); those of other encoders (Swin, Hiera)
        are trained."""
        hidden_dim: int | None = None
        """Width of the hidden layers of projector and predictor (default: by the encoder; 4,096 from ViT-S on)."""
        embedding_dim: int = 256
        """Width of the embeddings that are contrasted."""
        crop_scale: tuple[float, float] = (0.08, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        blur: float = 1.0
        """Factor on the blur probabilities (1 and 0.1 for the two views); 0 is usual for images of 32 pixels."""
        token_drop: float = 0.0
        """Share of the patches that the student does not see (FLIP), drawn for each view; 0 in the last 5 % of a run."""

        def __post_init__(self) -> None:
            within(self, FROM_0_BELOW_1, "token_drop")
            within(self, POSITIVE, "temperature")
            within(self, FROM_0_TO_1, "momentum")
            within(self, AT_LEAST_1, "hidden_dim", "embedding_dim")
            within(self, NOT_NEGATIVE, "blur")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        require_token_drop(encoder, "mocov3", config.token_drop)
        hidden, width = self.config.hidden_dim, config.embedding_dim
        self.projector = mlp((encoder.pooled_dim, hidden, hidden, width), last_norm="plain")
        self.predictor = mlp((width, hidden, width), last_norm="plain")
        patch_embed = getattr(encoder, "patch_embed", None)
        # A vision transformer of one width. Hierarchical ones (Swin, Hiera) keep their own initialisation.
        if isinstance(patch_embed, nn.Module) and encoder.token_dim == encoder.dim:
            _initialise(encoder)
            patch_embed.requires_grad_(not config.freeze_patch_embed)

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """The momentum encoder begins as the query encoder; it has no predictor."""
        self.teacher = ema_copy(EncoderWithHeads({"encoder": self.encoder, "projector": self.projector}))

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {"hidden_dim": sizes.width(4096, encoder.dim, full=sizes.VIT_SMALL)}

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """BYOL's two crops: one is always blurred, the other is sometimes solarized (section 5, "augmentation")."""
        return asymmetric_views(
            ("view1", "view2"), image_size, config.crop_scale, config.blur, interpolation="bilinear"
        )

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Both views' vectors (B, 2, D) by the query encoder, "query", and by the momentum encoder, "key"."""
        # Two batches: if the encoder has batch norm, its statistics are those of one view, as in the paper.
        views = [batch.views["view1"], batch.views["view2"]]
        query = encode_pooled(self.encoder, views, step, self.config.token_drop)
        with torch.no_grad():
            key = encode_pooled(self.teacher.backbone, views, step)
        return {"query": torch.stack(query, dim=1), "key": torch.stack(key, dim=1)}

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """InfoNCE of each view's queries with the other's keys, times 2T, both directions added (algorithm 1)."""
        queries = [l2_normalize(self.predictor(self.projector(view))) for view in embedded["query"].unbind(1)]
        with torch.no_grad():
            keys = [l2_normalize(self.teacher["projector"](view)) for view in embedded["key"].unbind(1)]
        each = self._contrast(queries[0], keys[1]) + self._contrast(queries[1], keys[0])
        return Losses(total=each.mean(), per_sample=each.detach())

    def _contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(B,) losses of finding each unit query's (B, K) own key among the keys (B, K) of all processes."""
        with torch.autocast(queries.device.type, enabled=False):
            scores = queries @ distributed.gather(keys).T / self.config.temperature  # (B, N)
        own = torch.arange(len(queries), device=scores.device) + distributed.rank() * len(queries)
        return 2 * self.config.temperature * F.cross_entropy(scores, own, reduction="none")

    def after_step(self, step: Step) -> None:
        """Update the momentum encoder from the query encoder, for the keys of the next step.

        The release updates it before it computes a step's keys. In the first step that changes nothing, because both
        encoders have the same initial weights. So this is the same sequence, with the momentum of the next step.
        """
        queries = EncoderWithHeads({"encoder": self.encoder, "projector": self.projector})
        ema_update_(self.teacher, queries, cosine_momentum(self.config.momentum, (step.step + 1) / step.total), step.ok)

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The loss if all similarities are equal."""
        equal = 4 * self.config.temperature * math.log(batch_size)
        return {"loss": (equal, "all views get the same embedding, so images cannot be distinguished")}


def _initialise(encoder: Backbone) -> None:
    """Initialise a ViT as in the release: Xavier uniform, with queries, keys and values as three matrices (the bound is
    that of (D, D), not of the joint (3D, D)), and a class token near zero."""
    xavier_(encoder)
    for name, parameter in encoder.named_parameters():
        if name.endswith("qkv.weight"):
            bound = math.sqrt(6 / (2 * parameter.shape[1]))
            nn.init.uniform_(parameter, -bound, bound)
        elif name.endswith("cls_token"):
            nn.init.normal_(parameter, std=1e-6)
