"""Fine-tunes the encoder, or a part of it, with labels and a linear classifier (the recipe of MAE, He et al., CVPR
2022, appendix A.1, table 9).

Shapes: B images of a step, n of a split, D floats of the feature, C classes. Learning rates fall by `--layer-decay` from
block to block (BEiT, Bao et al., ICLR 2022, appendix; `optim.parameter_groups`).
"""

import contextlib
import copy
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_pretrain import encoder as exported
from ssl_pretrain import optim
from ssl_pretrain.backbones import adapters
from ssl_pretrain.backbones.backbone import Backbone, Features
from ssl_pretrain.data import mix, randaugment
from ssl_pretrain.data.loader import Failure, RawBatch, Share, to_batch
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.encoder import Encoder
from ssl_pretrain.errors import UserError, nearest
from ssl_pretrain.features import Bad, NotFinite, Tap, crops_of, vectors
from ssl_pretrain.features.products import tf32
from ssl_pretrain.foreign.libraries import Foreign
from ssl_pretrain.optim import schedules
from ssl_pretrain.parts.ema_teacher import ema_copy, ema_update_
from ssl_pretrain.randomness import key, numpy_generator

from ._attention_transfer import AttentionTransfer, Mode
from ._label_teacher import Kind, LabelTeacher
from ._results import Outcome, classification
from ._task import Images, Side, Task
from .linear import hold_out

BASELINES = ("random",)
# He et al. (2022), appendix A.1, table 9: the defaults are those of ViT-B.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "mae": {},
    "mae-large": {"lrs": (1e-3,), "layer_decay": 0.75, "drop_path": 0.2, "epochs": 50.0, "warmup": 0.1},
    "mae-huge": {"lrs": (1e-3,), "layer_decay": 0.75, "drop_path": 0.3, "epochs": 50.0, "warmup": 0.1},
}
SCOPES = ("full", "attention", "bias", "lora", "last-4")
BETAS = (0.9, 0.999)
FINAL_LR = 1e-6  # before layer-wise decay
LR_BATCH = 256  # learning rates are given for this many images a step
SMALLEST_BATCH, LARGEST_BATCH = 16, 1024  # images per step, if --train-batch-size is not given
LEAST_STEPS = 32  # steps per epoch that have priority over a batch above the smallest
HEAD_STD = 2e-5
CROP_SCALE = (0.08, 1.0)
CHUNK = 4096  # rows scored at a time
RECORDED = (  # options that are copied into the protocol
    "epochs", "layer_decay", "layer_decay_blocks", "weight_decay", "warmup", "randaugment", "erase", "mixup", "cutmix",
    "label_smoothing", "ema",
)  # fmt: skip
LOOK_EVERY = 20  # steps between reads of the loss, which synchronise with the device


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fine-tuning."""

    scope: str = "full"
    """Part of the encoder that is trained, in addition to the classifier: full, attention (its matrices and biases),
    bias (all biases), lora (low-rank updates of the attention matrices), or last-K (the last K blocks and all layers
    after them)."""
    lrs: tuple[float, ...] = (5e-4,)
    """Peak learning rates to try, per 256 images of a step (MAE: 5e-4 for ViT-B, 1e-3 for larger ones). If there are
    several, the best one on held-out training images is selected, and training is repeated on all images."""
    epochs: float = 100
    """Passes over the training images (MAE: 100 for ViT-B, 50 for larger ones)."""
    train_batch_size: int | None = None
    """Images per step, in passes of at most --batch-size (default: 1024, or the largest power of two that gives 32
    steps per epoch, but at least 16)."""
    layer_decay: float = 0.65
    """Layer decay: factor on the learning rate from each block to the previous one (MAE: 0.65 for ViT-B, 0.75 for
    larger ones)."""
    layer_decay_blocks: int = 1
    """Number of consecutive blocks that share a factor of --layer-decay (ConvNeXt: 3)."""
    weight_decay: float = 0.05
    """Weight decay of AdamW; not applied to biases, norms, tokens and positions."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises (warm-up)."""
    drop_path: float = 0.1
    """Drop path rate (stochastic depth) of the last block, if the encoder supports it (MAE: 0.1, 0.2, 0.3 for ViT-B, L,
    H)."""
    randaugment: float = 9.0
    """Magnitude of RandAugment, 0 to 10 (0: none)."""
    erase: float = 0.25
    """Probability of random erasing."""
    mixup: float = 0.8
    """Alpha of mixup (0: none)."""
    cutmix: float = 1.0
    """Alpha of CutMix (0: none)."""
    label_smoothing: float = 0.1
    """Label smoothing: share of the target that is spread over all classes."""
    ema: float = 0.0
    """Momentum of an EMA of the weights; the EMA is tested (0: none)."""
    lora_rank: int = 8
    """Rank of the updates of --scope lora."""
    lora_alpha: float = 16.0
    """Scale of the updates of --scope lora: they are multiplied by this value / the rank."""
    feature: Literal["pooled", "cls", "mean"] = "pooled"
    """Input of the classifier: pooled (as the encoder defines it), cls (the CLS token), or mean (of the patches)."""
    held_out: float = 0.1
    """Share of the training images of each class that is held out to select the learning rate."""
    curve: int = 0
    """Number of evenly spaced points of a curve of test accuracy during training (0: none); it selects nothing."""
    teacher: str | None = None
    """Distil labels: the folder of a fine-tuned encoder (`ssl-eval finetune --save`) of the same classes, whose
    predictions train a second classifier (DeiT; G2SD's specific stage)."""
    teacher_loss: Kind = "hard"
    """With --teacher: hard (the teacher's class) or soft (its probabilities)."""
    teacher_temperature: float = 1.0
    """With --teacher-loss soft: temperature of both probabilities."""
    attention_from: str | None = None
    """Attention transfer: an encoder (as --encoder) whose attention the first blocks get (Li et al., NeurIPS 2024)."""
    attention_mode: Mode = "distil"
    """With --attention-from: distil (an extra loss trains the attention) or copy (the blocks use that of the other
    encoder, which then also runs in the test)."""
    attention_blocks: int | None = field(default=None, metadata={"default": "three quarters of the blocks"})
    """With --attention-from: number of blocks, counted from the first."""
    attention_weight: float = 3.0
    """With --attention-mode distil: weight of the attention loss; the cross-entropy of the labels has 1."""
    save: bool = False
    """Write the fine-tuned encoder and its classifier to encoder/ next to results.json."""


def example(data: Path) -> list[str]:
    """Flags of a run of seconds, for the conformance check."""
    return ["--epochs", "1", "--train-batch-size", "8"]


def evaluate(task: Task, config: Config) -> Outcome:
    """Fine-tune a copy of the encoder on all training images and test it once. With several learning rates, each is
    first trained on a part of the images, and the others select the best.

    Raises UserError for options out of range, an encoder without the parts that the scope trains, if every class has a
    single training image but several learning rates are given, if training diverges, and as `Task.single`.
    """
    _check(task, config)
    transfer = None
    if config.attention_from is not None:
        transfer = AttentionTransfer(
            config.attention_from, task.encoder, config.attention_mode, config.attention_blocks, config.attention_weight,
            task.device, task.code,
        )  # fmt: skip
    labeller = None
    if config.teacher is not None:
        labeller = LabelTeacher(
            config.teacher,
            task.encoder,
            task.data.classes,
            config.teacher_loss,
            config.teacher_temperature,
            task.device,
            task.code,
        )
    tried: list[dict[str, Any]] = []
    if len(config.lrs) > 1:
        fit, held_out = hold_out(task.data.train.labels, config.held_out, task.seed)
        known = task.data.train
        selection_images = Images(known.split, Subset(known.source, held_out), known.labels[held_out], 0)
        for lr in config.lrs:
            tried.append({"lr": lr, "top1": None, "loss": None})
            with contextlib.suppress(NotFinite):
                found = _train(task, config, fit, lr, f"lr {lr:g}", transfer=transfer, labeller=labeller)
                ranked, loss, side = _test(task, config, found, selection_images)
                tried[-1] |= {"top1": 100 * float((ranked[:, 0] == side.labels).mean()), "loss": loss}
    whole = [one for one in tried if one["top1"] is not None]
    if tried and not whole:
        raise UserError(f"training diverged at every one of --lrs {' '.join(map(str, config.lrs))}: give lower ones")
    # the highest top-1, of equal ones the lower loss, of equal ones the first
    lr = max(whole, key=lambda one: (one["top1"], -one["loss"]))["lr"] if tried else config.lrs[0]

    rows = np.arange(len(task.data.train.labels))
    curve: list[dict[str, float]] = []
    tuned = _train(task, config, rows, lr, "all training images" if tried else "training", curve, transfer, labeller)
    try:
        ranked, _, test = _test(task, config, tuned, task.data.test)
    except NotFinite:
        raise UserError(f"training diverged at --lrs {lr:g}: give a lower one") from None
    if config.save and task.out is not None:
        _save(task, config, tuned, lr)
    return Outcome(
        {**classification(ranked, test.labels, task.data.classes), **({"curve": curve} if curve else {})},
        {
            "headline": f"scope {config.scope}, {config.epochs:g} epochs, lr {lr:g}"
            + (f", attention by {config.attention_mode}" if transfer else "")
            + (f", {config.teacher_loss} labels of a teacher" if labeller else "")
            + (" (at the edge of the grid)" if tried and lr in (min(config.lrs), max(config.lrs)) else ""),
            "features": [config.feature],
            "scope": config.scope,
            "trained_parameters": tuned.trained,
            **({"attention_from": transfer.facts()} if transfer else {}),
            **({"teacher": labeller.facts()} if labeller else {}),
            **(
                {
                    "selected": next(one for one in tried if one["lr"] == lr),
                    "selection": f"highest top-1 on {len(held_out)} held-out training images ({config.held_out:g} of each "
                    f"class); trained again on all training images and tested once",
                    "all_scored_on": "held-out training images",
                }
                if tried
                else {"selection": "nothing was chosen: trained on all training images and tested once"}
            ),
            "training": {
                "optimizer": f"AdamW {BETAS}, warm-up, cosine to {FINAL_LR:g}",
                "lr_batch": LR_BATCH,
                "steps": _steps(config, len(rows)),
                "batch_size": _batch(config, len(rows)),
                "crop_scale": CROP_SCALE,
                **{name: getattr(config, name) for name in RECORDED},
                "drop_path": config.drop_path if "drop_path" in task.encoder.backbone.supports else 0.0,
                **({"lora_rank": config.lora_rank, "lora_alpha": config.lora_alpha} if config.scope == "lora" else {}),
            },
            **task.protocol(_seen(task, tuned.failures), test),
        },
        tried,
    )


def _check(task: Task, config: Config) -> None:
    if not config.lrs or not all(math.isfinite(lr) and lr > 0 for lr in config.lrs):
        raise UserError(f"--lrs {' '.join(map(str, config.lrs))}: learning rates must be above 0")
    if not (config.epochs > 0 and math.isfinite(config.epochs)):
        raise UserError(f"--epochs is {config.epochs}; it must be above 0")
    if config.train_batch_size is not None and config.train_batch_size < 1:
        raise UserError(f"--train-batch-size is {config.train_batch_size}; it must be at least 1")
    if not 0 < config.layer_decay <= 1:
        raise UserError(f"--layer-decay is {config.layer_decay}; it must be above 0 and at most 1")
    if config.layer_decay_blocks < 1:
        raise UserError(f"--layer-decay-blocks is {config.layer_decay_blocks}; it must be at least 1")
    if not 0 < config.held_out < 1:
        raise UserError(f"--held-out is {config.held_out}; it must lie between 0 and 1")
    for name in ("warmup", "drop_path", "label_smoothing", "ema"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be at least 0 and below 1")
    if not 0 <= config.erase <= 1 or not 0 <= config.randaugment <= randaugment.MOST:
        raise UserError(
            f"--erase is {config.erase} and --randaugment {config.randaugment}; they must lie in 0 to 1 and 0 to 10"
        )
    if config.curve < 0:
        raise UserError(f"--curve is {config.curve}; it must not be negative")
    for name in ("weight_decay", "mixup", "cutmix", "attention_weight"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must not be negative")
    if not config.teacher_temperature > 0:
        raise UserError(f"--teacher-temperature is {config.teacher_temperature}; it must be above 0")
    if config.lora_rank < 1:
        raise UserError(f"--lora-rank is {config.lora_rank}; it must be at least 1")
    if next(task.encoder.parameters(), None) is None:
        raise UserError(f"{task.encoder.name} has no weights: there is nothing to fine-tune")
    if config.save and isinstance(task.encoder.backbone, Foreign):
        raise UserError("--save writes encoders of this package only, and this one is another library's")
    if config.save and config.attention_from is not None and config.attention_mode == "copy":
        raise UserError(
            "--save: an encoder with copied attention needs the other one in each forward; use --attention-mode distil"
        )
    trained(task.encoder.backbone, config.scope)


def _batch(config: Config, images: int) -> int:
    """Images per step."""
    if config.train_batch_size:
        return min(config.train_batch_size, images)
    fitting = 2 ** int(math.log2(max(1, images // LEAST_STEPS)))
    return min(images, max(SMALLEST_BATCH, min(LARGEST_BATCH, fitting)))


def _steps(config: Config, images: int) -> int:
    return max(1, round(config.epochs * images / _batch(config, images)))


def _seen(task: Task, failures: Sequence[Failure]) -> Side:
    """The training images that could be read."""
    bad = {index: Bad(index, name, reason) for index, name, reason in failures}
    index = np.delete(np.arange(len(task.data.train.labels)), sorted(bad))
    return Side({}, task.data.train.labels[index], index, [bad[i] for i in sorted(bad)])


# ---- What is trained.


def trained(backbone: Backbone, scope: str) -> set[str]:
    """Names of the backbone's parameters that a scope trains. For scope "lora": the matrices that get low-rank updates,
    though they are not trained themselves. Raises UserError for an unknown scope and if the backbone has no such
    parameters."""
    names = [name for name, _ in backbone.named_parameters()]
    attention = [name for name in names if re.search(r"(^|\.)(attn|attention|self_attn)\.", name)]
    if scope == "full":
        found = names
    elif scope == "attention":
        # three things everyone should know about ViTs (Touvron et al., ECCV 2022), section 4
        found = attention
    elif scope == "bias":
        found = [name for name in names if name.rsplit(".", 1)[-1] == "bias"]  # BitFit, Zaken et al., ACL 2022
    elif scope == "lora":
        found = adapters.attention_matrices(backbone)
    elif match := re.fullmatch(r"last-(\d+)", scope):
        blocks = int(match[1])
        if isinstance(backbone, Foreign):
            raise UserError(f"--scope {scope}: the block structure of another library's encoder is not known")
        if not 1 <= blocks <= backbone.depth:
            raise UserError(
                f"--scope {scope}: this encoder has {backbone.depth} block(s), last-1 to last-{backbone.depth}"
            )
        found = [name for name in names if backbone.layer_of(name) > backbone.depth - blocks]
    else:
        raise UserError(f"--scope {scope} is unknown{nearest(scope, SCOPES)} (last-K: the last K blocks)")
    if not found:
        raise UserError(f"--scope {scope}: {type(backbone).__name__} has no such weights; use --scope full")
    return set(found)


def prepare(backbone: Backbone, config: Config, generator: torch.Generator) -> None:
    """Enable gradients only for the parameters that the scope trains, and set the drop path rate."""
    names = trained(backbone, config.scope)
    if "drop_path" in backbone.supports:
        # The drop path settings of pretraining do not apply to fine-tuning.
        others = {n: False for n in ("drop_path_uniform", "drop_rows") if hasattr(backbone.config, n)}
        backbone.config = replace(backbone.config, drop_path=config.drop_path, **others)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name in names and config.scope != "lora")
    if config.scope == "lora":
        adapters.add(backbone, names, config.lora_rank, config.lora_alpha, generator)


@final
class Classifier(nn.Module):
    """An encoder with a linear classifier, whose initial weights are nearly zero (truncated normal, 2e-5; MAE).

    `second` is another classifier of the same feature, which a teacher trains; the classifier is then the mean of both.
    """

    def __init__(
        self,
        encoder: Backbone,
        width: int,
        classes: int,
        feature: str,
        generator: torch.Generator,
        *,
        second: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.feature = encoder, feature
        self.head = nn.utils.skip_init(nn.Linear, width, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD, a=-2 * HEAD_STD, b=2 * HEAD_STD, generator=generator)
        nn.init.zeros_(self.head.bias)
        self.second = copy.deepcopy(self.head) if second else None

    def merged(self) -> nn.Linear:
        """The classifier (D -> C), the mean of both if there are two."""
        head = copy.deepcopy(self.head)
        if self.second is not None:
            with torch.no_grad():
                for mine, other in zip(head.parameters(), self.second.parameters(), strict=True):
                    mine.add_(other).mul_(0.5)
        return head

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Logits (B, C) of images (B, channels, H, W). The noise of drop path is drawn from `generator`."""
        x, _ = self.embed(images, generator)
        return self.head(x) if self.second is None else (self.head(x) + self.second(x)) / 2

    def embed(self, images: Tensor, generator: torch.Generator, **options: Any) -> tuple[Tensor, Features]:
        """The classifier's input (B, D), and the encoder's features with these options."""
        if self.encoder.training and "drop_path" in self.encoder.supports:
            shape = len(images), 2 * self.encoder.depth
            options["drop"] = torch.rand(shape, generator=generator, device=images.device)
        features = self.encoder(images, **options)
        x = features.patches.mean(1) if self.feature == "mean" else getattr(features, self.feature)
        return x, features

    def train(self, mode: bool = True) -> "Classifier":
        """As `nn.Module.train`, with two exceptions. Batch norms whose gain is not trained keep their statistics.
        Modules of other libraries stay in evaluation mode, because their dropout would use the process's random
        state."""
        super().train(mode)
        for part in self.modules():
            frozen = isinstance(part, _BatchNorm) and (part.weight is None or not part.weight.requires_grad)
            if frozen or isinstance(part, Foreign):
                part.eval()
        return self


# ---- Training and testing.


@dataclass(frozen=True)
class _Tuned:
    """A fine-tuned encoder and its classifier."""

    encoder: Encoder
    head: nn.Linear
    trained: int  # number of trained values of encoder and classifier
    failures: list[Failure]  # training images that could not be read, by their index into the rows


def _train(
    task: Task,
    config: Config,
    rows: np.ndarray,
    lr: float,
    what: str,
    curve: list[dict[str, float]] | None = None,
    transfer: AttentionTransfer | None = None,
    labeller: LabelTeacher | None = None,
) -> _Tuned:
    """Fine-tune a copy of the encoder on the training images `rows`; the weights are not finite if training diverges.
    curve: the points that `config.curve` requests are added to it."""
    how, device = task.encoder.preprocessing, task.device
    blank = torch.zeros(1, how.channels, *how.crop, device=device)
    with torch.no_grad():
        width = vectors(task.encoder.to(device).eval(), blank, [Tap(config.feature)])[config.feature].shape[1]
    own = copy.deepcopy(task.encoder.backbone)
    generator = torch.Generator().manual_seed(key(task.seed, "finetune", config.scope))
    prepare(own, config, generator)
    if transfer is not None and transfer.mode == "copy":
        transfer.attach(own)
    distils = transfer if transfer is not None and transfer.mode == "distil" else None
    classes, second = len(task.data.classes), labeller is not None
    model = Classifier(own, width, classes, config.feature, generator, second=second).to(device).train()
    average = ema_copy(model) if config.ema else None
    groups = optim.parameter_groups(
        model,
        model.encoder,
        rule="no_1d_tokens",
        layer_decay=config.layer_decay,
        decay_blocks=config.layer_decay_blocks,
    )
    optimizer = optim.build("adamw", groups, BETAS)

    batch, steps = _batch(config, len(rows)), _steps(config, len(rows))
    share = Share(batch, next(n for n in range(-(-batch // task.batch_size), batch + 1) if batch % n == 0))
    peak = lr * batch / LR_BATCH
    spec = ViewSpec(name="image", size=how.crop, scale=CROP_SCALE, interpolation=how.interpolation)
    labels = torch.from_numpy(task.data.train.labels[rows]).to(device)
    loader = task.crops(Subset(task.data.train.source, rows), (spec,), share, steps)
    yes, failures = torch.ones((), dtype=torch.bool, device=device), []
    with contextlib.closing(loader):
        for raw in loader:
            failures += raw.failures
            images, targets = _augment(task, config, raw, share, spec, labels)
            noise = torch.Generator(device).manual_seed(key(task.seed, "drop path", raw.step, raw.micro))
            with tf32(device), torch.autocast(device.type, torch.bfloat16, enabled=task.precision == "bf16"):
                x, features = model.embed(images, noise, **({} if distils is None else distils.options))
                logits = model.head(x)
                extra = None if distils is None else distils.loss(features, images)
                taught = None if labeller is None or model.second is None else labeller.loss(model.second(x), images)
            loss = mix.soft_cross_entropy(logits, targets)
            loss = loss if taught is None else (loss + taught) / 2
            loss = loss if extra is None else loss + extra
            (loss / share.accumulate).backward()
            if raw.micro + 1 < share.accumulate:
                continue
            rate = schedules.learning_rate(
                raw.step, steps=steps, peak=peak, final=min(FINAL_LR, peak), warmup=round(config.warmup * steps),
                kind="cosine",
            )  # fmt: skip
            optim.set_rates(optimizer, rate, config.weight_decay)
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                ema_update_(average, model, config.ema, yes)
                for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
                    mine.copy_(theirs)
            if curve is not None and (raw.step + 1) * config.curve // steps > raw.step * config.curve // steps:
                point = {
                    "step": raw.step + 1,
                    "epoch": (raw.step + 1) * batch / len(rows),
                    "loss": float(loss.detach()),
                }
                curve.append({**point, "top1": _accuracy(task, model if average is None else average)})
                model.train()
            if raw.step % LOOK_EVERY == LOOK_EVERY - 1 or raw.step + 1 == steps:
                task.report(what, raw.step + 1, steps)
                if not loss.isfinite():
                    break
    number = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    best = model if average is None else average
    adapters.merge(best.encoder)
    best.encoder.config = task.encoder.backbone.config  # the original drop path
    best.eval().requires_grad_(True)
    return _Tuned(Encoder(best.encoder, task.encoder.name, how, task.encoder.lineage), best.merged(), number, failures)


def _augment(
    task: Task, config: Config, raw: RawBatch, share: Share, spec: ViewSpec, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Augmented images (B, channels, H, W) and targets (B, C) for training; labels (n,) are those of all rows."""
    how = task.encoder.preprocessing
    first = raw.step * share.batch_size + share.rows(raw.micro).start
    epochs = np.arange(first, first + share.micro_size) // len(labels)
    strength = {"magnitude": config.randaugment, "erase": config.erase}
    plan = randaugment.draw(task.seed, epochs, raw.index, spec.size, **strength)
    raw.views[spec.name] = randaugment.apply(raw.views[spec.name].to(task.device, non_blocking=True), plan, how.mean)
    given = to_batch(raw, (spec,), how.mean, how.std, task.device)
    images = randaugment.erase_(given.views[spec.name], plan)
    targets = mix.soft_labels(labels[given.index], len(task.data.classes), config.label_smoothing)
    rng = numpy_generator(task.seed, "mix", raw.step, raw.micro)
    drawn = mix.draw(rng, spec.size, mixup=config.mixup, cutmix=config.cutmix)
    return (images, targets) if drawn is None else mix.apply(images, targets, drawn)


@torch.no_grad()
def _accuracy(task: Task, model: nn.Module) -> float:
    """Top-1 in percent on the test images with the current weights."""
    model.eval()
    right, labels, at = 0, task.data.test.labels, 0
    read = 0
    for images, failures in crops_of(task.encoder.preprocessing, task.data.test.source, task.batch_size, task.workers):
        gone = {one.index for one in failures}
        index = [i for i in range(at, at + len(images) + len(failures)) if i not in gone]
        at += len(images) + len(failures)
        if index:
            pixels = task.encoder.normalise(torch.from_numpy(images).to(task.device))
            with tf32(task.device), torch.autocast(task.device.type, torch.bfloat16, enabled=task.precision == "bf16"):
                found = model(pixels, torch.Generator(task.device)).argmax(1)
            right += int((found.cpu().numpy() == labels[index]).sum())
            read += len(index)
    return 100 * right / max(read, 1)


@torch.no_grad()
def _test(task: Task, config: Config, tuned: _Tuned, images: Images) -> tuple[np.ndarray, float, Side]:
    """For the readable images: the most probable classes, best first, (n, min(5, C)) int64; the mean cross-entropy; and
    these images. Raises NotFinite if training diverged."""
    tuned_task = replace(task, encoder=tuned.encoder, data=replace(task.data, test=images), cache=False)
    side = tuned_task.single((config.feature,))
    ranked, loss = [], 0.0
    for start in range(0, len(side.labels), CHUNK):
        part = slice(start, start + CHUNK)
        x = torch.from_numpy(side.features[config.feature][part]).to(task.device)
        log_p = tuned.head(x).log_softmax(1)
        loss -= float(log_p.gather(1, torch.from_numpy(side.labels[part]).to(task.device)[:, None]).sum())
        ranked.append(log_p.sort(dim=1, descending=True, stable=True).indices[:, :5].cpu())
    if not math.isfinite(loss):
        raise NotFinite("the classifier gives NaN or infinity")
    return torch.cat(ranked).numpy(), loss / len(side.labels), side


def _save(task: Task, config: Config, tuned: _Tuned, lr: float) -> None:
    """Write the encoder's export and, beside its folder, the classifier: head.safetensors with weight (C, D) and bias
    (C,), to be applied to the feature that its header names. (In the export's folder timm would not know which file has
    the weights.)"""
    assert task.out is not None
    folder = task.out / "encoder"
    facts = {"data": task.data.name, "scope": config.scope, "lr": lr, "epochs": config.epochs, "seed": task.seed}
    tuned.encoder.lineage = {**task.encoder.lineage, "finetuned": facts}
    head = {name: value.detach().cpu().contiguous() for name, value in tuned.head.state_dict().items()}
    header = json.dumps({"feature": config.feature, "classes": task.data.classes})
    try:
        exported.save(folder, tuned.encoder)
        save_file(head, task.out / "head.safetensors", metadata={"head": header})
    except OSError as problem:
        raise UserError(f"{folder} cannot be written ({problem.strerror}): choose another folder with --out") from None
