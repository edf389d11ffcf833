"""NPID (Wu, Xiong, Yu & Lin, "Unsupervised Feature Learning via Non-Parametric Instance-level Discrimination", CVPR 2018).

Every image is its own class. The class's weight vector is the embedding that the image had when it was last seen; a
memory bank stores it. Shapes: B images of this process, M images of the data set, D encoder width, K embedding width, m
negatives.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain import distributed
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import Jitter, ViewSpec
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, FROM_0_BELOW_1, NOT_NEGATIVE, POSITIVE, within
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.heads import l2_normalize
from ssl_pretrain.parts.views import encode_pooled
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod


@final
class NPID(WholeBatchMethod):
    """Discriminate each image from m others of the bank by noise-contrastive estimation (section 3.2), or from all of
    them by the exact softmax (section 3.1).

    Defaults are the paper's and its release's (sections 3 and 4.2): momentum SGD, learning rate 0.03 for 256 images,
    4,096 negatives, temperature 0.07. Raises UserError for options out of range.
    """

    bank: Tensor
    normaliser: Tensor

    recipe = Recipe(
        optimizer="sgd",
        lr=0.03,
        lr_batch=256,
        betas=(0.9, 0.999),
        weight_decay=1e-4,
        decay="all",
        warmup=0.0,
        encoder={"pool": "cls"},
        small={"optimizer": "adamw", "lr": 1e-3, "negatives": 1024, "warmup_steps": 20, "steps": 130},
        tiny={"embedding_dim": 16, "negatives": 8},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Non-parametric instance discrimination (NPID)."""

        embedding_dim: int = 128
        """Width of the embeddings; the memory bank stores one for each image of the data."""
        negatives: int | None = None
        """Number of negatives of each image, drawn from the bank again in each step (default: by the number of images;
        4,096 for ImageNet-1k)."""
        loss: Literal["nce", "softmax"] = "nce"
        """nce: noise-contrastive estimation with --negatives; softmax: exact, over the whole bank, for data of up to
        some hundred thousand images."""
        temperature: float = 0.07
        """Temperature of the similarities."""
        bank_momentum: float = 0.5
        """Momentum of the bank: weight of an image's old embedding when it is updated."""
        proximal: float = 0.0
        """Weight of the squared distance to the image's embedding in the bank (the paper's lambda; the release uses the
        bank's momentum instead)."""
        crop_scale: tuple[float, float] = (0.2, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        interpolation: Literal["bicubic", "bilinear"] = "bicubic"
        """How crops are resized."""

        def __post_init__(self) -> None:
            within(self, AT_LEAST_1, "embedding_dim", "negatives")
            within(self, POSITIVE, "temperature")
            within(self, FROM_0_BELOW_1, "bank_momentum")
            within(self, NOT_NEGATIVE, "proximal")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        self.projector = nn.Linear(encoder.pooled_dim, config.embedding_dim)
        # The normalisation constant (section 3.2, "Z"), estimated in the first step; 0 until then.
        self.register_buffer("normaliser", torch.zeros(()))

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """A bank of random unit vectors (M, K)."""
        self.register_buffer("bank", F.normalize(torch.randn(images, self.config.embedding_dim), dim=1))

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {"negatives": sizes.at_most_a_share(4096, images, 1 / 4)}

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One crop with colour jitter (section 4.2 and the release)."""
        strong = Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, p=1.0)
        return (
            ViewSpec(
                name="image",
                size=image_size,
                scale=config.crop_scale,
                interpolation=config.interpolation,
                jitter=strong,
                grayscale=0.2,
            ),
        )

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Unit embeddings "embedding" (B, K) and the sample ids "index" (B,)."""
        (pooled,) = encode_pooled(self.encoder, [batch.views["image"]], step)
        return {"embedding": l2_normalize(self.projector(pooled)), "index": batch.index}

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """The NCE loss (eqs. 5 to 7) or the softmax's (eqs. 2 and 3), and the proximal term (eq. 8)."""
        v, index = embedded["embedding"], embedded["index"]
        nce = self.config.loss == "nce"
        contrast, normaliser = self._nce(v, index, step) if nce else (self._softmax(v, index), self.normaliser)
        proximal = (v - self.bank[index]).square().sum(1)
        each = contrast + self.config.proximal * proximal
        return Losses(
            total=each.mean(),
            terms={"contrast": contrast.mean().detach(), "proximal": proximal.mean().detach()},
            per_sample=each.detach(),
            carry={"index": index, "embedding": v.detach(), "normaliser": normaliser[None]},
        )

    def _nce(self, v: Tensor, index: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The loss of each image (B,), and Z, which the first step estimates, from its whole batch."""
        count, m = len(self.bank), self.config.negatives
        others = (step.rand(m) * count).long().clamp_max(count - 1)  # (B, m), uniform; the image itself is not excluded
        bank = self.bank[torch.cat([index[:, None], others], dim=1)]  # (B, 1 + m, K)
        with torch.autocast(v.device.type, enabled=False):  # bfloat16 logits of 14 (1 / 0.07) are off by 0.03
            logits = torch.einsum("bk,bmk->bm", v, bank) / self.config.temperature
        first = distributed.mean(logits.detach()[:, 1:].exp().mean()) * count
        normaliser = torch.where(self.normaliser > 0, self.normaliser, first)
        # h = P / (P + m / M) with P = exp(logit) / Z, so its log-odds are these
        odds = logits - torch.log(normaliser) - math.log(m / count)
        return F.softplus(-odds[:, 0]) + F.softplus(odds[:, 1:]).sum(1), normaliser

    def _softmax(self, v: Tensor, index: Tensor) -> Tensor:
        """The loss of each image (B,): which of all M it is."""
        with torch.autocast(v.device.type, enabled=False):
            logits = v @ self.bank.T / self.config.temperature
        return F.cross_entropy(logits, index, reduction="none")

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Every image seen moves its place in the bank (section 3.1; momentum as released)."""
        index, v = distributed.gather(step.carried["index"]), distributed.gather(step.carried["embedding"])
        # For an image that is twice in a batch both writes have the last embedding, so their order does not matter.
        same = index[:, None] == index
        last = (same * torch.arange(1, len(index) + 1, device=index.device)).argmax(1)
        keep = self.config.bank_momentum
        moved = F.normalize(keep * self.bank[index] + (1 - keep) * v[last], dim=1)
        self.bank[index] = torch.where(step.ok, moved, self.bank[index])
        self.normaliser.copy_(torch.where(step.ok, step.carried["normaliser"].mean(), self.normaliser))

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The loss if all similarities are equal: h = 1 / (1 + m), or 1 / M for the softmax. For NCE it is the smallest
        loss that equal similarities can have, for any normalisation constant, so unsuccessful training ends there."""
        m = self.config.negatives
        softmax = self.config.loss == "softmax"
        return {
            "contrast": (
                math.log(len(self.bank)) if softmax else math.log(1 + m) + m * math.log1p(1 / m),
                "no image is distinguished from the others: all similarities are equal",
            )
        }
