"""Tokenizers: vector quantisation of patches, of pixels (VQ-VAE; van den Oord et al., NeurIPS 2017), of HOG, or of a frozen
teacher's features (VQ-KD of BEiT v2; Peng et al., 2022).

The encoder's patch features become unit vectors of few channels, each is replaced by the nearest code of a codebook, and a
small decoder predicts the patch from the codes. The run exports a tokenizer, whose ids other methods predict. Options: a
frozen codebook with a projector (VQGAN-LC; Zhu et al., NeurIPS 2024), a relaxed choice of codes (dVAE of DALL-E; Ramesh et
al., ICML 2021), semantic regularisation (GigaTok; Xiong et al., 2025), and several scales of which each quantises what the
coarser ones leave (VAR; Tian et al., NeurIPS 2024).
Shapes: B images, N patches on an (h, w) grid, D encoder width, K codes of d channels, T values of a target, E channels of
the teacher, S scales with L places together.
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
from ssl_pretrain.backbones.positions import sincos_table
from ssl_pretrain.backbones.quantizer import USAGE, Quantizer
from ssl_pretrain.backbones.scales import Levels
from ssl_pretrain.backbones.vit import Block
from ssl_pretrain.data.views import Reads, ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, BETWEEN_0_AND_1, NOT_NEGATIVE, within
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.optim.schedules import cosine
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.align import resized
from ssl_pretrain.parts.codebook import averaged, kmeans, revived, sums
from ssl_pretrain.parts.hog import hog, values
from ssl_pretrain.parts.patches import patchify, unpatchify
from ssl_pretrain.parts.targets import distances
from ssl_pretrain.parts.views import encode
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step

CELL = 8  # largest side of a HOG cell in pixels
CANDIDATES = 64  # vectors of an image from which k-means and revived codes start
REVIVAL_ENDS = 0.8  # share of the run after which no code is replaced, so that ids are stable when it is exported
PULL = (
    0.33  # with a frozen codebook: weight of the codes' move to the vectors, relative to the vectors' move (VQGAN-LC)
)
SHARPNESS = 10.0  # with --codebook gumbel: the logit of a code is its cosine times this
COLDEST = 1 / 16  # last temperature of --codebook gumbel, from 1 (DALL-E)
SEMANTIC_BLOCK = 3  # the decoder block whose output predicts the teacher's features, or the last one (GigaTok)
USED = (0.1, 0.25)  # shares of the codes: a perplexity below the first is a collapse, one above the second is none


@final
class VQTok(Method):
    """Train a tokenizer. The loss is the distance of the decoder's prediction, plus `commitment` times that of the vectors
    from their codes.

    Raises UserError for options out of range, and for a patch that HOG cells do not fit.
    """

    recipe = Recipe(
        lr=5e-5,
        lr_batch=128,
        final_lr=1e-5,
        betas=(0.9, 0.99),
        weight_decay=1e-4,
        warmup=10 / 100,
        small={"lr": 1e-3, "steps": 250, "batch_size": 64, "patch_size": 4, "codes": 256, "codebook_decay": 0.97},
        tiny={"codes": 32, "decoder_dim": 32, "decoder_heads": 2, "revive_every": 1},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Tokenizer (VQ-VAE, VQ-KD)."""

        target: Literal["pixels", "hog", "teacher"] = "pixels"
        """What the decoder predicts: the pixels (mean square), histograms of oriented gradients or the patch features of
        --teacher (both 1 - cosine)."""
        codes: int | None = None
        """Number of codes (default: by the number of images; 8192 for ImageNet-1k)."""
        code_dim: int = 8
        """Channels of a code. Few channels keep all codes in use."""
        codebook: Literal["ema", "norm_ema", "gradient", "frozen", "gumbel"] = "ema"
        """How codes are learned. ema: moving averages of counts and sums. norm_ema: moving average of directions, of used
        codes only (BEiT v2). gradient: by the loss (VQGAN). frozen: k-means centres of the features of --teacher, of which
        only a linear projection is learned (VQGAN-LC). gumbel: by the loss, with a random soft choice of codes (DALL-E)."""
        scales: tuple[int, ...] = ()
        """Quantise at several scales: cells of each along the longer side of the grid, ascending, the last one that of the
        grid itself, for example 1 2 4 8 (VAR). All scales share the codes. Default: one scale."""
        codebook_decay: float = 0.99
        """Decay of the moving averages."""
        commitment: float = 0.25
        """Weight of the loss that pulls vectors to their codes. Not with --codebook gumbel."""
        kl_weight: float = 0.0
        """With --codebook gumbel: weight of the divergence of each patch's choice from the uniform one."""
        semantic_weight: float = 0.0
        """Weight of semantic regularisation: 1 - cosine of a prediction from the decoder and the patch features of
        --teacher (GigaTok: 0.5)."""
        kmeans: bool = True
        """Start the codes of a moving average by k-means of the first batch."""
        revive_every: int = 10
        """Steps between revivals of dead codes, with --codebook ema; 0: none. They end at 80 % of the run."""
        revive_below: float = 0.1
        """A code is dead if its average count is below this share of the mean."""
        decoder_dim: int | None = None
        """Width of the decoder (default: by the encoder; 768 from ViT-B on)."""
        decoder_depth: int = 1
        """Number of decoder blocks."""
        decoder_heads: int | None = None
        """Number of attention heads of the decoder (default: by the encoder; 12 from ViT-B on)."""
        crop_scale: tuple[float, float] = (0.08, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""

        def __post_init__(self) -> None:
            within(self, AT_LEAST_1, "scales", ascending=True)
            if self.scales and (len(self.scales) < 2 or len(set(self.scales)) < len(self.scales)):
                raise UserError(f"--scales {' '.join(map(str, self.scales))}: give two or more different numbers")
            if self.scales and self.codebook not in ("ema", "gradient"):
                raise UserError(f"--scales needs codes of any length: --codebook ema or gradient, not {self.codebook}")
            within(self, AT_LEAST_1, "codes", "code_dim", "decoder_dim", "decoder_depth", "decoder_heads")
            within(self, BETWEEN_0_AND_1, "codebook_decay", "revive_below")
            within(self, NOT_NEGATIVE, "commitment", "revive_every", "kl_weight", "semantic_weight")
            if self.target == "teacher" and self.semantic_weight:
                raise UserError(
                    "--semantic-weight: --target teacher predicts the same features; choose another --target"
                )
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    counts: Tensor
    sums: Tensor
    started: Tensor
    recent: Tensor
    centres: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        size, width, heads = self.config.codes, self.config.decoder_dim, self.config.decoder_heads
        if width % heads or width % 4:
            raise UserError(f"--decoder-dim {width} must be a multiple of 4 and of --decoder-heads {heads}")
        self.teacher: Frozen | None = None
        self._has_started = False  # as `started`, once it was read from the device
        trained = config.codebook in ("gradient", "gumbel")
        self.grid = (encoder.image_size[0] // encoder.stride[0], encoder.image_size[1] // encoder.stride[1])
        if config.scales and config.scales[-1] != max(self.grid):
            raise UserError(
                f"--scales ends with {config.scales[-1]}, and the encoder has {self.grid[0]} x {self.grid[1]} patches: let "
                f"it end with {max(self.grid)}"
            )
        unit = config.codebook != "ema" and not config.scales  # what coarser scales leave has no length of 1
        self.quantizer = Quantizer(encoder.dim, size, config.code_dim, unit=unit, trained=trained, scales=config.scales)
        counted = (len(config.scales), size) if config.scales else (size,)
        self.register_buffer("recent", torch.zeros(counted, dtype=torch.int64))  # hits of the tokens being counted
        if not trained:
            self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        if config.codebook == "ema":
            self.register_buffer("counts", torch.zeros(size))
            self.register_buffer("sums", torch.zeros(size, config.code_dim))
        self.decoder_embed = nn.Linear(config.code_dim, width)
        self.decoder_blocks = nn.ModuleList(Block(width, heads) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("decoder_pos_embed", sincos_table(self.grid, width)[None], persistent=False)
        nn.init.normal_(self.decoder_embed.weight)  # codes of length 1 begin as large as the positions that are added
        nn.init.zeros_(self.decoder_embed.bias)
        self.cell = min(CELL, *(max(1, side // 2) for side in encoder.stride))
        if config.target == "hog":
            if any(side % self.cell for side in encoder.stride):
                raise UserError(f"--target hog: no cells fit a patch of {encoder.stride[0]} x {encoder.stride[1]}")
            self._add_prediction(values(encoder.in_chans, encoder.stride, self.cell))
        elif config.target == "pixels":
            self._add_prediction(encoder.stride[0] * encoder.stride[1] * encoder.in_chans)

    def _add_prediction(self, width: int) -> None:
        """The decoder's last layer, for a target of `width` values."""
        self.decoder_pred = nn.Linear(self.decoder_norm.normalized_shape[0], width)
        nn.init.trunc_normal_(self.decoder_pred.weight, std=0.02)
        nn.init.zeros_(self.decoder_pred.bias)

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The teacher, if its features are used."""
        used = config.target == "teacher" or config.codebook == "frozen" or config.semantic_weight
        return ("teacher",) if used else ()

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """Keep the teacher, and add what has its width."""
        if not self.frozen(self.config):
            return
        self.teacher, width = networks["teacher"], self.decoder_norm.normalized_shape[0]
        dim = self.teacher.dim
        if self.config.target == "teacher":
            self._add_prediction(dim)
        if self.config.codebook == "frozen":
            self.register_buffer("centres", torch.zeros(self.quantizer.size, dim))
            self.code_projector = nn.Linear(dim, self.quantizer.width)
            nn.init.normal_(self.code_projector.weight, std=self.quantizer.width**-0.5)
        if self.config.semantic_weight:
            hidden = max(width, dim)
            self.semantic_head = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dim))

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from BEiT v2's: its decoder is as wide as its encoder."""
        width = config.decoder_dim or sizes.width(768, encoder.dim, multiple=32)
        return {
            "codes": sizes.prototypes(8192, images, least=256),
            "decoder_dim": width,
            "decoder_heads": sizes.heads(12, width, encoder.dim),
        }

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped, without colour; for a teacher also the same pixels with as many patches."""
        image = ViewSpec(name="image", size=image_size, scale=config.crop_scale)
        if not cls.frozen(config):
            return (image,)
        return (image, ViewSpec(name="teacher", of="image", size=image_size, network="teacher", reads=Reads()))

    def forward(self, batch: Batch, step: Step) -> Losses:
        """The mean over patches of the decoder's loss and of the distance between vectors and codes.

        Before codes are started, the decoder gets the vectors themselves. Terms: "reconstruction" is the decoder's loss;
        "codes_used" the share of codes that occur in the batch, "perplexity" the exp of their entropy, of all processes'
        images (with gradient accumulation: of a micro-batch, averaged); "diversity" is 0 for a perplexity of at most a
        tenth of the codes and 1 from a quarter of them on.
        """
        config, images = self.config, batch.views["image"]
        seen = encode(self.encoder, images, step)
        features = self._features_of_teacher(batch, seen.grid)
        z = self.quantizer.embed(seen.patches)
        replaced = z.detach()  # the vectors that have ids
        if config.codebook == "gumbel":
            entering, ids, apart = self._chosen_softly(z, step)
        elif config.scales:
            entering, ids, apart, replaced = self._chosen_by_scale(z, seen.grid)
        else:
            entering, ids, apart = self._chosen(z)
        predicted, inside = self._decode(entering, seen.grid)
        distance = "mse" if config.target == "pixels" else "cosine"
        target = features if config.target == "teacher" else self._targets_of_pixels(images)
        assert target is not None
        each = distances(predicted, target, distance).mean(1)  # type: ignore[arg-type]
        per_sample, terms = each + apart, {"reconstruction": each.detach().mean()}
        if config.semantic_weight:
            assert features is not None
            semantic = distances(self.semantic_head(inside), features, "cosine").mean(1)
            per_sample = per_sample + config.semantic_weight * semantic
            terms["semantic"] = semantic.detach().mean()
        counts, total = self._counted(replaced, ids, seen.grid)
        carry = {"counts": counts[None]}
        if config.codebook in ("ema", "norm_ema"):
            carry |= {"sums": total[None], **self._candidates(replaced, step)}
        elif config.codebook == "frozen":
            assert features is not None
            carry |= {"codes": self._projected().detach()[None], **self._candidates(features, step)}
        return Losses(
            total=per_sample.mean(),
            terms={**terms, **self._usage(counts, ids.numel() * distributed.size())},
            per_sample=per_sample.detach(),
            carry=carry,
        )

    def _chosen(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest codes of vectors (B, N, d): what enters the decoder (B, N, d), ids (B, N), and the distance of the
        vectors from their codes as a loss (B,)."""
        config = self.config
        codes = self._projected() if config.codebook == "frozen" else self.quantizer.vectors()
        ids = self.quantizer.nearest(z.detach(), codes.detach())
        codes = F.embedding(ids, codes)
        apart = (z - codes.detach()).square().mean((1, 2)) * config.commitment
        entering = z + (codes - z).detach()  # the gradient goes straight through
        if config.codebook in ("gradient", "frozen"):
            weight = 1.0 if config.codebook == "gradient" else PULL * config.commitment
            apart = apart + weight * (codes - z.detach()).square().mean((1, 2))
        if config.codebook != "gradient":
            apart, entering = apart * self.started, torch.where(self.started, entering, z)
        return entering, ids, apart

    def _chosen_by_scale(self, z: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_chosen`, with ids (B, L) of all scales, and the vectors (B, L, d) that they stand for. The loss is the mean
        over scales of the distance between the map and the sum up to the scale."""
        config, scales = self.config, self.quantizer.scales
        assert scales is not None
        started = None if config.codebook == "gradient" else self.started
        levels: Levels = scales(z, grid, self.quantizer.vectors(), started)
        whole = levels.sums[-1]
        apart = config.commitment * (z - levels.sums.detach()).square().mean((0, 2, 3))
        # The codes' move, if they are trained, and that of the convolutions
        apart = apart + (levels.sums - z.detach()).square().mean((0, 2, 3))
        entering = z + (whole - z).detach()
        if started is not None:
            apart, entering = apart * started, torch.where(started, entering, z)
        return entering, levels.ids, apart, levels.residuals

    def _counted(self, vectors: Tensor, ids: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """How many of the vectors (B, L, d) each code has, (K,) or of each scale (S, K), and their sums (K, d)."""
        scales, size = self.quantizer.scales, self.quantizer.size
        if scales is None:
            return sums(vectors.flatten(0, 1), ids.flatten(), size)
        parts = [h * w for h, w in scales.shapes(grid)]
        each = [
            sums(rows.flatten(0, 1), own.flatten(), size)
            for rows, own in zip(vectors.split(parts, dim=1), ids.split(parts, dim=1), strict=True)
        ]
        return torch.stack([counts for counts, _ in each]), torch.stack([total for _, total in each]).sum(0)

    def _usage(self, counts: Tensor, tokens: int) -> dict[str, Tensor]:
        """`usage`; with several scales also the perplexity of each, "perplexity_SIDE"."""
        if self.quantizer.scales is None:
            return usage(counts, tokens)
        share = distributed.mean(counts)
        share = share / share.sum(1, keepdim=True)
        perplexities = torch.exp(-torch.special.xlogy(share, share).sum(1))
        of_scales = {
            f"perplexity_{side}": value
            for side, value in zip(self.quantizer.scales.sides, perplexities.unbind(), strict=True)
        }
        return usage(counts.sum(0), tokens) | of_scales

    def _chosen_softly(self, z: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """As `_chosen`, with the mean code of a random soft choice (Gumbel softmax), and the divergence of the choice
        without noise from the uniform one as the loss."""
        with torch.autocast(z.device.type, enabled=False):
            logits = SHARPNESS * z @ self.quantizer.vectors().T  # (B, N, K)
            noise = -torch.log(-torch.log(step.rand(*logits.shape[1:]).clamp(1e-9, 1 - 1e-7)))
            temperature = cosine(step.progress, 1.0, COLDEST)
            entering = torch.softmax((logits + noise) / temperature, dim=-1) @ self.quantizer.vectors()
            log_share = torch.log_softmax(logits, dim=-1)
            divergence = (log_share.exp() * log_share).sum(-1) + math.log(self.quantizer.size)
        return entering, logits.detach().argmax(-1), self.config.kl_weight * divergence.mean(1)

    def _projected(self) -> Tensor:
        """The codes (K, d) of a frozen codebook, of length 1, float32."""
        with torch.autocast(self.centres.device.type, enabled=False):
            return F.normalize(self.code_projector(self.centres), dim=-1)

    def _candidates(self, z: Tensor, step: Step) -> dict[str, Tensor]:
        """Random vectors of each image, and the images' rows in the global batch."""
        order = torch.argsort(step.rand(z.shape[1]), dim=1)[:, :CANDIDATES]
        rows = torch.arange(step.batch_size, device=z.device)[step.rows]
        return {"candidates": z.gather(1, order[..., None].expand(-1, -1, z.shape[2])), "rows": rows}

    def decoded(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """The decoder's prediction (B, N, T) from vectors (B, N, d)."""
        return self._decode(codes, grid)[0]

    def _decode(self, codes: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The prediction, and the output of the block of semantic regularisation (B, N, width)."""
        positions = self.decoder_pos_embed
        if grid != self.grid:
            positions = sincos_table(grid, self.config.decoder_dim)[None].to(codes.device)
        x = self.decoder_embed(codes)
        x = x + positions.to(x.dtype)
        inside = x
        for i, block in enumerate(self.decoder_blocks):
            x = block(x)
            inside = x if i < SEMANTIC_BLOCK else inside
        return self.decoder_pred(self.decoder_norm(x)), inside

    def targets(self, batch: Batch, grid: tuple[int, int]) -> Tensor:
        """What is predicted of every patch, float32 (B, N, T)."""
        features = self._features_of_teacher(batch, grid) if self.config.target == "teacher" else None
        return self._targets_of_pixels(batch.views["image"]) if features is None else features

    @torch.no_grad()
    def _targets_of_pixels(self, images: Tensor) -> Tensor:
        if self.config.target == "pixels":
            return patchify(images, self.encoder.stride).float()
        return hog(images, self.encoder.stride, self.cell)

    @torch.no_grad()
    def _features_of_teacher(self, batch: Batch, grid: tuple[int, int]) -> Tensor | None:
        """Its patch features on a grid, float32 (B, N, E); None without one."""
        if self.teacher is None:
            return None
        seen = self.teacher(batch.views["teacher"])
        return resized(seen.patches.float(), seen.grid, grid)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Count usage; start the codes, or update them from the batch of all processes; revive dead ones."""
        config, quantizer = self.config, self.quantizer
        counts = distributed.all_reduce_(step.carried["counts"].sum(0))
        self._count(counts, step)
        counts = counts.sum(0) if config.scales else counts
        if config.codebook in ("gradient", "gumbel"):
            return
        if config.codebook == "frozen":
            self._take_projected(step)
            return
        total = distributed.all_reduce_(step.carried["sums"].sum(0))
        # Read from the device until it is true, in the first two steps. A first step that was skipped starts nothing.
        self._has_started = self._has_started or bool(self.started)
        decay = config.codebook_decay
        if not self._has_started:
            new = self._first(step, counts)
        elif config.codebook == "ema":
            mean_counts = decay * self.counts + (1 - decay) * counts
            mean_sums = decay * self.sums + (1 - decay) * total
            if config.revive_every and step.step % config.revive_every == 0 and step.progress < REVIVAL_ENDS:
                candidates = self._gathered(step)
                mean_counts, mean_sums = revived(
                    mean_counts, mean_sums, candidates, config.revive_below, step.generator()
                )
            new = {"counts": mean_counts, "sums": mean_sums, "codes": averaged(mean_counts, mean_sums)}
        else:
            mean = F.normalize(total, dim=1)
            moved = F.normalize(decay * quantizer.codes + (1 - decay) * mean, dim=1)
            new = {"codes": torch.where((counts > 0)[:, None], moved, quantizer.codes)}
        for name, value in new.items():
            old: Tensor = quantizer.codes if name == "codes" else getattr(self, name)
            old.copy_(torch.where(step.ok, value, old))
        self.started.logical_or_(step.ok)

    def _take_projected(self, step: Step) -> None:
        """Start the centres by k-means of the teacher's features; then keep the codes of the last forward pass, which a
        tokenizer exports."""
        self._has_started = self._has_started or bool(self.started)
        if self._has_started:
            self.quantizer.codes.copy_(torch.where(step.ok, step.carried["codes"][-1], self.quantizer.codes))
            return
        centres, _ = kmeans(self._gathered(step), self.quantizer.size, step.generator(), unit=False)
        self.centres.copy_(torch.where(step.ok, centres, self.centres))
        self.started.logical_or_(step.ok)

    def _first(self, step: Step, counts: Tensor) -> dict[str, Tensor]:
        """The first codes, and their counts and sums: k-means of the batch, or random directions with equal counts."""
        config, tokens = self.config, counts.sum()
        if config.kmeans:
            candidates = self._gathered(step)
            codes, own = kmeans(candidates, self.quantizer.size, step.generator(), unit=self.quantizer.unit)
            own = (own * (tokens / len(candidates))).clamp_min(1)
        else:
            codes, own = self.quantizer.codes, (tokens / len(counts)).expand_as(counts)
        if config.codebook == "norm_ema":
            return {"codes": codes}
        return {"codes": codes, "counts": own, "sums": codes * own[:, None]}

    @staticmethod
    def _gathered(step: Step) -> Tensor:
        """The candidates (n, d) of all processes, in the order of the global batch: the same for any number of them."""
        order = torch.argsort(distributed.gather(step.carried["rows"]))
        return distributed.gather(step.carried["candidates"]).index_select(0, order).flatten(0, 1)

    def _count(self, counts: Tensor, step: Step) -> None:
        """Add to the hits of the tokens being counted. When they are enough, they become the codebook's `hits`. So these
        are of a fixed number of tokens of a late part of training, as soon as there were that many. counts: (K,), or (S, K)
        of several scales, whose hits are added."""
        quantizer, size = self.quantizer, self.quantizer.size
        hits = quantizer.hits if quantizer.scales is None else quantizer.hits_of_scales
        found = self.recent + torch.where(step.ok, counts, 0.0).long()
        full = found.sum() >= USAGE * size
        hits.copy_(torch.where(full | (hits.sum() < USAGE * size), found, hits))
        self.recent.copy_(torch.where(full, 0, found))
        if quantizer.scales is not None:
            quantizer.hits.copy_(hits.sum(0))

    def exported_tokenizer(self) -> Quantizer:
        """The codebook."""
        return self.quantizer

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """Few codes for all patches."""
        return {"diversity": (0.0, "the codebook collapses: less than a tenth of the codes carries nearly all patches")}

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The crop and, where pixels are the target, its reconstruction from codes."""
        images = batch.views["image"]
        if self.config.target != "pixels":
            return {"input": images}
        seen = self.encoder(images)
        if self.quantizer.scales is not None:
            painted = self.decoded(self.quantizer.levels(seen.patches, seen.grid).sums[-1], seen.grid).float()
            return {"input": images, "reconstruction": unpatchify(painted, self.encoder.stride, seen.grid)}
        vectors = self._projected() if self.config.codebook == "frozen" else self.quantizer.vectors()
        codes = F.embedding(self.quantizer.nearest(self.quantizer.embed(seen.patches), vectors), vectors)
        painted = self.decoded(codes, seen.grid).float()
        return {"input": images, "reconstruction": unpatchify(painted, self.encoder.stride, seen.grid)}


@torch.no_grad()
def usage(counts: Tensor, tokens: int) -> dict[str, Tensor]:
    """The terms that describe the use of K codes, of this process's counts (K,); over all processes, which have `tokens`
    tokens. A quarter of these bounds what perplexity is compared with: few tokens cannot use many codes."""
    share = distributed.mean(counts)
    share = share / share.sum()
    perplexity = torch.exp(-torch.special.xlogy(share, share).sum())
    low, high = (part * min(len(counts), tokens / 4) for part in USED)
    low = max(low, 1.0)
    high = max(high, low + 1)
    return {
        "codes_used": (share > 0).float().mean(),
        "perplexity": perplexity,
        "diversity": ((perplexity - low) / (high - low)).clamp(0, 1),
    }
