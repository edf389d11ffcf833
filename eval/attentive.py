"""Attentive probe of the frozen encoder: a learned query that attends to all patch tokens, and a linear classifier
(AIM, V-JEPA, CAPI). Probes for all blocks, learning rates and weight decays are trained in one pass.

Shapes: B images of a step, n of a split, N patch tokens of an image, D channels, G probes of a block, C classes.
"""

import contextlib
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain import optim
from ssl_pretrain.data.decode import decode
from ssl_pretrain.data.loader import Share, to_batch
from ssl_pretrain.data.source import Source
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.data.views import ViewSpec, resize_and_crop
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Bad, NotFinite, blocks, crops_of
from ssl_pretrain.features.products import tf32
from ssl_pretrain.optim import schedules
from ssl_pretrain.parts.attentive_pool import INIT_STD, AttentivePool, TokenNorm, Variant
from ssl_pretrain.randomness import key

from ._results import Outcome, classification
from ._task import Images, Side, Task
from .linear import hold_out

BASELINES = ("random",)
# El-Nouby et al. (2024), AIM; Bardes et al. (2024), V-JEPA, whose probe has one learning rate; Darcet et al. (2025), CAPI,
# which gives its length in steps of its own batch size; here it is in passes over the images.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "aim": {"variant": "aim"},
    "vjepa": {"variant": "vjepa", "blocks": (1,), "lrs": (1e-3,), "weight_decays": (1e-3,), "epochs": 20.0},
    "capi": {
        "variant": "capi",
        "blocks": (1,),
        "lrs": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
        "weight_decays": (5e-4, 1e-3, 5e-2),
    },
}
BETAS = (0.9, 0.95)
WARMUP = 0.1  # share of the steps
HEAD_CHANNELS = 64  # channels of an attention head, if --heads is not given
REPORT_EVERY = 10  # steps


@dataclass(frozen=True, kw_only=True)
class Config:
    """Attentive probe."""

    variant: Variant = "aim"
    """Kind of pooling: aim (batch norm, keys and values), capi (keys and values), or vjepa (a cross-attention block
    with an MLP)."""
    blocks: tuple[int, ...] | None = None
    """Blocks whose tokens are probed, counted from the end (1: the last). Default: the last, and those at 5/6, 2/3 and
    1/2 of the depth, if the encoder gives outputs of blocks."""
    lrs: tuple[float, ...] = (1e-4, 5e-4, 2e-3, 1e-2)
    """Peak learning rates to try (CAPI: ten from 1e-5 to 1e-2)."""
    weight_decays: tuple[float, ...] = (5e-4, 5e-2)
    """Weight decays to try with each learning rate (CAPI: 5e-4, 1e-3 and 5e-2)."""
    heads: int | None = None
    """Number of attention heads; must divide the channels (default: one for each 64 channels)."""
    epochs: float = 20
    """Passes over the training images (V-JEPA: 20)."""
    probe_batch_size: int = 256
    """Images per training step of the probes (at most the number of training images)."""
    augment: bool = True
    """Train on random crops (0.08 to 1 of the area) and flips instead of the test crops."""
    held_out: float = 0.1
    """Share of the training images of each class that is held out to select the best probe."""


def example(data: Path) -> list[str]:
    """Flags of a run of seconds, for the conformance check."""
    return ["--epochs", "1", "--probe-batch-size", "8"]


def evaluate(task: Task, config: Config) -> Outcome:
    """Train probes on a part of the training images, select the best on the others, train it again on all training
    images, and test it once.

    Raises UserError for options out of range, if every class has a single training image, and if all probes diverge.
    """
    _check(config)
    wanted = _blocks(task.encoder, config)
    fit, held_out = hold_out(task.data.train.labels, config.held_out, task.seed)
    settings = [(lr, decay) for lr in dict.fromkeys(config.lrs) for decay in dict.fromkeys(config.weight_decays)]
    known = task.data.train
    banks, _ = _train(task, config, fit, wanted, settings, "probes")
    scores = _score(task, banks, Images(known.split, Subset(known.source, held_out), known.labels[held_out], 0))
    tried: list[dict[str, Any]] = [
        {"block": block, "lr": lr, "weight_decay": decay, "top1": top1, "loss": loss}
        for block in wanted
        for (lr, decay), (top1, loss) in zip(settings, scores[block], strict=True)
    ]
    whole = [probe for probe in tried if probe["top1"] is not None]
    if not whole:
        raise UserError(f"every probe diverged at --lrs {' '.join(map(str, config.lrs))}: give lower ones")
    best = max(whole, key=lambda probe: (probe["top1"], -probe["loss"]))  # the first of equal ones

    rows = np.arange(len(known.labels))
    banks, bad = _train(task, config, rows, [best["block"]], [(best["lr"], best["weight_decay"])], "the best probe")
    ranked, test = _test(task, banks[best["block"]], best["block"])
    metrics = classification(ranked, test.labels, task.data.classes)
    tops = {block: max((p["top1"] for p in whole if p["block"] == block), default=None) for block in wanted}
    if len(wanted) > 1:
        metrics["findings"] = [
            "on held-out training images, block by block from the end: "
            + ", ".join(f"{block}: {'diverged' if top is None else f'{top:.2f} %'}" for block, top in tops.items())
        ]
    edge = len(config.lrs) > 1 and best["lr"] in (min(config.lrs), max(config.lrs))
    batch = min(config.probe_batch_size, len(rows))
    return Outcome(
        metrics,
        {
            "headline": f"{config.variant} probe of block {best['block']} from the end, lr {best['lr']:g}"
            + (" (at the edge of the grid)" if edge else ""),
            "features": [f"patches of block {best['block']} from the end, after the final norm"],
            "selected": best,
            "selection": f"highest top-1 on {len(held_out)} held-out training images ({config.held_out:g} of each class); "
            f"the selected probe was trained again on all training images and tested once",
            "all_scored_on": "held-out training images",
            "best_of_block": {str(block): top for block, top in tops.items()},
            "sweep": {
                "variant": config.variant,
                "blocks": wanted,
                "lrs": list(config.lrs),
                "weight_decays": list(config.weight_decays),
                "optimizer": f"AdamW {BETAS}, warm-up {WARMUP:g} of the steps, cosine to 0",
                "heads": banks[best["block"]].heads,
                "epochs": config.epochs,
                "steps": _steps(config, len(rows)),
                "batch_size": batch,
                "augment": config.augment,
            },
            **task.protocol(_side(known, bad), test),
        },
        tried,
    )


def _check(config: Config) -> None:
    if not config.lrs or not all(math.isfinite(lr) and lr > 0 for lr in config.lrs):
        raise UserError(f"--lrs {' '.join(map(str, config.lrs))}: learning rates must be above 0")
    if not config.weight_decays or min(config.weight_decays) < 0:
        raise UserError(f"--weight-decays {' '.join(map(str, config.weight_decays))}: they must not be negative")
    if not (config.epochs > 0 and math.isfinite(config.epochs)) or config.probe_batch_size < 1:
        raise UserError(
            f"--epochs is {config.epochs} and --probe-batch-size {config.probe_batch_size}; they must be above 0 and at "
            f"least 1"
        )
    if not 0 < config.held_out < 1:
        raise UserError(f"--held-out is {config.held_out}; it must lie between 0 and 1")


def _blocks(encoder: Encoder, config: Config) -> list[int]:
    """The blocks to probe, from the end."""
    depth = blocks(encoder)
    if config.blocks is None:
        return list(dict.fromkeys(depth + 1 - max(1, round(share * depth)) for share in (1, 5 / 6, 2 / 3, 1 / 2)))
    for block in config.blocks:
        if not 1 <= block <= depth:
            raise UserError(f"--blocks {block}: this encoder gives tokens of its last {depth} block(s), 1 to {depth}")
    return list(dict.fromkeys(config.blocks))


def _steps(config: Config, images: int) -> int:
    return max(1, round(config.epochs * images / min(config.probe_batch_size, images)))


# ---- Tokens.


@torch.no_grad()
def _tokens(task: Task, images: Tensor, wanted: Sequence[int]) -> dict[int, Tensor]:
    """The frozen encoder's patch tokens (B, N, D) float32 of normalised images, by block from the end, after the final
    norm. Each pass has at most the task's batch size."""
    earlier = tuple(-block for block in wanted if block > 1)
    parts: list[list[Tensor]] = []
    for some in images.split(task.batch_size):
        with tf32(task.device), torch.autocast(task.device.type, torch.bfloat16, enabled=task.precision == "bf16"):
            features = task.encoder(some, blocks=earlier) if earlier else task.encoder(some)
            prefix = 0 if features.prefix is None else features.prefix.shape[1]
            norm = cast(nn.Module, task.encoder.backbone.norm) if earlier else nn.Identity()
            found = {-block: norm(output)[:, prefix:] for block, output in zip(earlier, features.blocks, strict=True)}
        parts.append([(found | {1: features.patches})[block].float() for block in wanted])
    return {block: torch.cat(pieces) for block, pieces in zip(wanted, zip(*parts, strict=True), strict=True)}


@final
class _Cropped(Source):
    """The images of a source with the test's resizing and cropping, (H, W, C) uint8."""

    def __init__(self, source: Source, how: Preprocessing) -> None:
        self.source, self.how = source, how
        self.labels, self.classes = source.labels, source.classes
        self.fingerprint, self.description = source.fingerprint, source.description

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        how = self.how
        pixels = decode(self.source[index], how.channels)
        return resize_and_crop(pixels, how.resize, how.crop, how.interpolation)

    def name(self, index: int) -> str:
        """The name of the sample in the source."""
        return self.source.name(index)


# ---- Training.


@final
class _Bank(nn.Module):
    """Probes of the tokens of one block; they differ in learning rate and weight decay."""

    def __init__(self, dim: int, classes: int, count: int, config: Config, seed: int) -> None:
        super().__init__()
        self.heads = config.heads or max(1, dim // HEAD_CHANNELS)
        if dim % self.heads:
            near = min((h for h in range(1, dim + 1) if dim % h == 0), key=lambda h: abs(h - self.heads))
            raise UserError(f"--heads {self.heads} must divide the {dim} channels of the tokens; {near} does")
        self.norm = TokenNorm(dim, config.variant)
        self.pools, self.classifiers = nn.ModuleList(), nn.ModuleList()
        for _ in range(count):
            generator = torch.Generator().manual_seed(seed)  # the same initial weights
            self.pools.append(AttentivePool(dim, self.heads, config.variant, generator))
            classifier = nn.utils.skip_init(nn.Linear, dim, classes)
            nn.init.trunc_normal_(classifier.weight, std=INIT_STD, a=-1, b=1, generator=generator)
            nn.init.zeros_(classifier.bias)
            self.classifiers.append(classifier)

    def forward(self, tokens: Tensor) -> Iterator[Tensor]:
        """Logits (B, C) of each probe, one after another, of tokens (B, N, D)."""
        normed = self.norm(tokens)
        for pool, classifier in zip(self.pools, self.classifiers, strict=True):
            yield classifier(pool(normed))


def _train(
    task: Task, config: Config, rows: np.ndarray, wanted: Sequence[int], settings: list[tuple[float, float]], what: str
) -> tuple[dict[int, _Bank], list[Bad]]:
    """Probes of each block for each (learning rate, weight decay), trained on the training images `rows`; and the
    images of these that could not be read."""
    how, device = task.encoder.preprocessing, task.device
    task.encoder.to(device).eval()
    blank = _tokens(task, torch.zeros(1, how.channels, *how.crop, device=device), wanted)
    classes = len(task.data.classes)
    banks = {
        block: _Bank(tokens.shape[2], classes, len(settings), config, key(task.seed, "probe", block)).to(device).train()
        for block, tokens in blank.items()
    }
    groups = [
        {"params": [p for name, p in part if optim.decays(name, p, "no_1d") == decays], "peak": lr}
        | {"weight_decay": decay if decays else 0.0}
        for bank in banks.values()
        for (lr, decay), *parts in zip(settings, bank.pools, bank.classifiers, strict=True)
        for part in [[pair for module in parts for pair in module.named_parameters()]]
        for decays in (True, False)
    ]
    optimizer = optim.build("adamw", groups, BETAS)
    steps = _steps(config, len(rows))
    labels = torch.from_numpy(task.data.train.labels[rows]).to(device)
    failures: dict[int, Bad] = {}
    with contextlib.closing(_supply(task, config, rows, steps, failures)) as given:
        for step, (images, index) in enumerate(given):
            batch_labels = labels[index]
            for block, tokens in _tokens(task, images, wanted).items():
                for logits in banks[block](tokens):
                    F.cross_entropy(logits, batch_labels).backward()  # one at a time, so that only one graph is kept
            share = schedules.learning_rate(
                step, steps=steps, peak=1.0, final=0.0, warmup=round(WARMUP * steps), kind="cosine"
            )
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()
            optimizer.zero_grad()
            if step % REPORT_EVERY == REPORT_EVERY - 1 or step + 1 == steps:
                task.report(what, step + 1, steps)
    for bank in banks.values():
        bank.eval()
    return banks, [failures[index] for index in sorted(failures)]


def _supply(
    task: Task, config: Config, rows: np.ndarray, steps: int, failures: dict[int, Bad]
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Normalised images (B, channels, H, W) and their indices (B,) into `rows`. Unreadable images are added to
    `failures`, by their index in the training images."""
    how = task.encoder.preprocessing
    source: Source = Subset(task.data.train.source, rows)
    spec = ViewSpec(name="image", size=how.crop, interpolation=how.interpolation)
    if not config.augment:
        ratio = how.crop[1] / how.crop[0]
        source, spec = _Cropped(source, how), replace(spec, scale=(1.0, 1.0), ratio=(ratio, ratio), hflip=0.0)
    loader = task.crops(source, (spec,), Share(min(config.probe_batch_size, len(rows))), steps)
    with contextlib.closing(loader):
        for raw in loader:
            failures.update({int(rows[i]): Bad(int(rows[i]), name, reason) for i, name, reason in raw.failures})
            given = to_batch(raw, (spec,), how.mean, how.std, task.device)
            yield given.views[spec.name], given.index


def _side(images: Images, bad: list[Bad]) -> Side:
    """The images that could be read."""
    index = np.delete(np.arange(len(images.labels)), [one.index for one in bad])
    return Side({}, images.labels[index], index, bad)


# ---- Testing.


def _passes(
    task: Task, images: Images, wanted: Sequence[int], bad: list[Bad]
) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
    """Tokens by block and labels (B,) of the readable images, in order; the others are added to `bad`. Raises
    NotFinite."""
    done = 0
    how = task.encoder.preprocessing
    for pixels, failures in crops_of(how, images.source, task.batch_size, task.workers):
        index = np.arange(done, done + len(pixels) + len(failures))
        index = np.setdiff1d(index, [one.index for one in failures])
        done += len(pixels) + len(failures)
        bad += failures
        if len(pixels):
            tokens = _tokens(task, task.encoder.normalise(torch.from_numpy(pixels).to(task.device)), wanted)
            if not all(one.isfinite().all() for one in tokens.values()):
                raise NotFinite(f"the encoder gives NaN or infinity for images of {images.source.description}")
            yield tokens, torch.from_numpy(images.labels[index]).to(task.device)
        task.report(f"probing {images.split}", done, len(images.source))
    if len(bad) == done:
        raise UserError(
            f"none of the images of {images.source.description} can be read; {bad[0].name}: {bad[0].reason}"
        )


@torch.no_grad()
def _score(task: Task, banks: dict[int, _Bank], images: Images) -> dict[int, list[tuple[float | None, float | None]]]:
    """For each block, and each of its probes: top-1 in percent and mean cross-entropy on those images; None, None for a
    probe that diverged."""
    count = 0
    right, loss = ({block: torch.zeros(len(bank.pools)).double() for block, bank in banks.items()} for _ in range(2))
    for tokens, labels in _passes(task, images, list(banks), []):
        count += len(labels)
        for block, bank in banks.items():
            for number, logits in enumerate(bank(tokens[block])):
                right[block][number] += int((logits.argmax(1) == labels).sum())
                loss[block][number] += float(F.cross_entropy(logits, labels, reduction="sum"))
    return {
        block: [
            (100 * hits / count, total / count) if math.isfinite(total) else (None, None)
            for hits, total in zip(right[block].tolist(), loss[block].tolist(), strict=True)
        ]
        for block in banks
    }


@torch.no_grad()
def _test(task: Task, bank: _Bank, block: int) -> tuple[np.ndarray, Side]:
    """The most probable classes of the readable test images, best first, (n, min(5, C)) int64; and these images."""
    bad: list[Bad] = []
    ranked = [
        next(bank(tokens[block])).sort(dim=1, descending=True, stable=True).indices[:, :5].cpu()
        for tokens, _ in _passes(task, task.data.test, [block], bad)
    ]
    return torch.cat(ranked).numpy(), _side(task.data.test, bad)
