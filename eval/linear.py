"""Linear probe: softmax regression on frozen features. Heads for all learning rates, blocks and poolings are trained at
once (the grid of DINOv2, appendix B.3; features of the last four blocks also in I-JEPA; batch norm before the head in
MAE, A.1).

Shapes: B images of a step, n of a split, F floats of an input, G heads that share an input, C classes. The weights of
all heads of one input are one matrix (F, G * C), so a step of all of them is two matrix products.
"""

import contextlib
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pretrain.data.loader import Share, to_batch
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Tap, blocks, poolings, vectors
from ssl_pretrain.features.products import tf32
from ssl_pretrain.optim.lars import TRUST
from ssl_pretrain.randomness import key, numpy_generator

from ._results import Outcome, classification
from ._task import Side, Task

BASELINES = ("random",)
SHARED = True
# Published protocols, as far as their sources and this code allow (docs/evaluators.md lists the differences): MAE A.1,
# and its release's 50 epochs for ViT-L and H; DINO's released evaluation of ViT-S and of ViT-B; DINOv2 B.3; MoCo v3's
# release; I-JEPA A.1 (VISSL's); LeJEPA's offline probe, whose learning rate and length are not published: we chose them.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "mae": {"layers": (1,), "poolings": ("cls",), "norm": "batch", "optimizer": "lars", "lrs": (0.1,), "epochs": 90.0,
            "warmup": 10 / 90, "probe_batch_size": 16384, "augment": True},
    **{name: {"layers": (1,), "poolings": ("cls",), "norm": "batch", "optimizer": "lars", "lrs": (0.1,), "epochs": 50.0,
              "warmup": 10 / 50, "probe_batch_size": 16384, "augment": True} for name in ("mae-large", "mae-huge")},
    "dino": {"layers": (4,), "poolings": ("cls",), "norm": "none", "lrs": (1e-3,), "epochs": 100.0,
             "probe_batch_size": 1024, "augment": True},
    "dino-base": {"layers": (1,), "poolings": ("cls+mean",), "norm": "none", "lrs": (1e-3,), "epochs": 100.0,
                  "probe_batch_size": 1024, "augment": True},
    "dinov2": {"layers": (1, 4), "poolings": ("cls", "cls+mean"), "norm": "none", "steps": 12500, "select": "test",
               "lrs": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
               "probe_batch_size": 1024, "augment": True},
    "mocov3": {"layers": (1,), "poolings": ("cls",), "norm": "none", "lrs": (3.0,), "epochs": 90.0,
               "probe_batch_size": 1024, "augment": True},
    "ijepa": {"layers": (1, 4), "poolings": ("mean",), "norm": "batch", "lrs": (0.01,), "epochs": 28.0, "nesterov": True,
              "weight_decay": 5e-4, "schedule": "step", "probe_batch_size": 1024, "augment": True, "select": "test"},
    "msn": {"layers": (1,), "poolings": ("cls",), "norm": "l2", "lrs": (0.1,), "epochs": 100.0, "nesterov": True,
            "probe_batch_size": 16384, "augment": True},
    "lejepa": {"layers": (2,), "poolings": ("cls",), "norm": "layer", "optimizer": "adamw", "lrs": (1e-4, 1e-3, 1e-2),
               "weight_decay": 1e-6, "epochs": 100.0, "augment": True},
}  # fmt: skip
MOMENTUM = 0.9
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
INIT_STD = 0.01  # of the initial weights; biases start at 0
BATCH_NORM_EPS = 1e-6
CHUNK = 2048  # rows scored at a time
EPOCHS, MIN_STEPS = 10, 2000
LR_BATCH = 256  # learning rates are given for this number of images per step
DROPS = 3  # number of divisions by ten in the step schedule, evenly spaced over training, except at the end
Pooling = Literal["cls", "mean", "cls+mean"]
Optimizer = Literal["sgd", "lars", "adamw"]
Norm = Literal["batch", "layer", "l2", "none"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Linear probe."""

    lrs: tuple[float, ...] = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
    """Peak learning rates to try, per 256 images of a step (DINOv2's grid times 10, because inputs are
    standardised)."""
    layers: tuple[int, ...] | None = None
    """Numbers of last blocks whose features form an input; each number is tried (default: 1 and 4, if the encoder gives
    outputs of blocks)."""
    poolings: tuple[Pooling, ...] | None = None
    """Features of a block: cls, mean (of the patches), or cls+mean (cls of each block and mean of the last). Default:
    all that the encoder has."""
    optimizer: Optimizer = "sgd"
    """Optimiser: sgd or lars (both with momentum 0.9), or adamw."""
    nesterov: bool = False
    """Use Nesterov momentum with sgd."""
    steps: int | None = None
    """Number of training steps (default: 10 passes over the training images, at least 2000 steps)."""
    epochs: float | None = None
    """Number of passes over the training images, instead of --steps."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises (warm-up)."""
    schedule: Literal["cosine", "step"] = "cosine"
    """Learning rate after the warm-up: cosine (to 0 along half a cosine) or step (divided by 10 at 2/7, 4/7 and 6/7 of
    the steps)."""
    probe_batch_size: int = 512
    """Images per training step of the heads (at most the number of training images)."""
    weight_decay: float = 0.0
    """L2 penalty on the weights (adamw: decoupled decay)."""
    norm: Norm = "batch"
    """Normalisation of the inputs: batch (mean and variance over the training features, as batch norm without affine),
    layer (over the input's own channels), l2 (as layer, then scaled to length 1) or none."""
    select: Literal["held-out", "test"] = "held-out"
    """Images that select the best head: held-out training images, or the test images. Some papers do the latter; it
    gives numbers that are too good."""
    held_out: float = 0.1
    """Share of the training images of each class that is held out."""
    augment: bool = False
    """Train on random crops (0.08 to 1 of the area) and flips, which pass the encoder in every step, instead of cached
    features."""


@dataclass(frozen=True)
class Input:
    """The features that are a head's input."""

    layers: int
    pooling: str

    @property
    def taps(self) -> tuple[str, ...]:
        """The features that are concatenated."""
        kind = "mean" if self.pooling == "mean" else "cls"
        taps = tuple(str(Tap(kind, -block)) for block in range(1, self.layers + 1))
        return (*taps, "mean") if self.pooling == "cls+mean" else taps

    def of(self, features: dict[str, Tensor]) -> Tensor:
        """The input (B, F), concatenated from the features by tap."""
        return torch.cat([features[tap] for tap in self.taps], dim=1)


@final
class LinearProbes:
    """G linear classifiers of the same input with different learning rates, in one matrix. They are independent: one
    that diverges to NaN does not change the others."""

    def __init__(
        self,
        width: int,
        classes: int,
        lrs: Sequence[float],
        *,
        weight_decay: float,
        generator: torch.Generator,
        device: torch.device,
        optimizer: Optimizer = "sgd",
        nesterov: bool = False,
    ) -> None:
        """Weights N(0, 0.01), the same in each head; biases 0. `lrs`: peak learning rates, not scaled again.
        `generator`: on the CPU."""
        start = torch.randn(width, classes, generator=generator) * INIT_STD
        self.weight = start.repeat(1, len(lrs)).to(device)  # (F, G * C)
        self.bias = torch.zeros(len(lrs) * classes, device=device)
        self.lr = torch.tensor(lrs, device=device).repeat_interleave(classes)  # (G * C,)
        self.weight_decay = weight_decay
        self.shape = len(lrs), classes
        self.optimizer, self.nesterov, self.steps = optimizer, nesterov, 0
        self._momentum = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        if optimizer == "adamw":
            self._squares = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, x: Tensor) -> Tensor:
        """(B, G, C) of inputs (B, F)."""
        return torch.addmm(self.bias, x, self.weight).view(-1, *self.shape)

    def gradient(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of each head's mean cross-entropy with `labels` (B,): of the weights (F, G * C) and biases (G * C).
        With p the softmax and y the one-hot label they are x' (p - y) / B and the sum of (p - y) / B."""
        error = self.logits(x).softmax(2)
        error[torch.arange(len(x), device=x.device), :, labels] -= 1
        error = error.view(len(x), -1).div_(len(x))
        return x.T @ error, error.sum(0)

    def step(self, x: Tensor, labels: Tensor, scale: float) -> None:
        """One step at `scale` times each head's peak learning rate."""
        weight, bias = self.gradient(x, labels)
        self.steps += 1
        if self.optimizer == "adamw":
            self._adamw(weight, bias, scale)
            return
        if self.weight_decay:
            weight.add_(self.weight, alpha=self.weight_decay)
        if self.optimizer == "lars":
            weight.mul_(self._trust(weight))
        for parameter, velocity, gradient in zip((self.weight, self.bias), self._momentum, (weight, bias), strict=True):
            velocity.mul_(MOMENTUM).add_(gradient)
            change = gradient.add(velocity, alpha=MOMENTUM) if self.nesterov else velocity
            parameter.addcmul_(change, self.lr, value=-scale)

    def _trust(self, gradient: Tensor) -> Tensor:
        """LARS' trust ratio of the head of each column, (G * C,): TRUST |w| / |g| of the head's matrix, 1 if a norm is
        0. It is not applied to biases."""
        w, g = (each.view(-1, *self.shape).square().sum((0, 2)).sqrt() for each in (self.weight, gradient))
        factor = torch.where((w > 0) & (g > 0), TRUST * w / g, 1.0)
        return factor.repeat_interleave(self.shape[1])

    def _adamw(self, weight: Tensor, bias: Tensor, scale: float) -> None:
        first, second = ADAM_BETAS
        rate = self.lr * scale
        self.weight.mul_(1 - rate * self.weight_decay)
        for parameter, mean, square, gradient in zip(
            (self.weight, self.bias), self._momentum, self._squares, (weight, bias), strict=True
        ):
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            size = (square / (1 - second**self.steps)).sqrt_().add_(ADAM_EPS)
            parameter.sub_(rate * (mean / (1 - first**self.steps)) / size)


def example(data: Path) -> list[str]:
    """Flags of a run of seconds, for the conformance check."""
    return ["--steps", "5", "--lrs", "0.01", "0.1"]


def evaluate(task: Task, config: Config) -> Outcome:
    """Train heads on a part of the training images, select the best on the others, train it again on all training
    images, and test it once. A single head is only trained and tested. With `select` "test" all heads are trained on
    all training images, and the one that is best on the test images is the result.

    Raises UserError for options out of range, if every class has a single training image, if all heads diverge, and as
    `Task.features`.
    """
    _check(config)
    inputs = _inputs(task, config)
    taps = tuple(dict.fromkeys(tap for one in inputs for tap in one.taps))
    train, test = task.features(taps)
    everything, test_rows = np.arange(len(train.labels)), np.arange(len(test.labels))
    single, on_test = len(inputs) * len(config.lrs) == 1, config.select == "test"
    fit, held_out = (everything, test_rows) if single or on_test else hold_out(train.labels, config.held_out, task.seed)
    batch = min(config.probe_batch_size, len(fit))
    steps = _steps(config, len(fit), batch)

    def trained(rows: np.ndarray, inputs: Sequence[Input], lrs: Sequence[float], what: str) -> tuple[_Scaling, _Groups]:
        scaling = _Scaling(train, tuple(dict.fromkeys(tap for one in inputs for tap in one.taps)), rows, config.norm)
        groups = _train(
            task, config, train, rows, inputs=inputs, lrs=lrs, scaling=scaling, batch=batch, steps=steps, what=what
        )
        return scaling, groups

    scaling, heads = trained(fit, inputs, config.lrs, "heads")
    scored_on = test if single or on_test else train
    tried: list[dict[str, Any]] = [
        {"lr": lr, "layers": one.layers, "pooling": one.pooling, "top1": top1, "loss": loss}
        for one, scores in zip(inputs, _score(heads, scored_on, held_out, scaling, task.device), strict=True)
        for lr, (top1, loss) in zip(config.lrs, scores, strict=True)
    ]
    finite = [head for head in tried if head["top1"] is not None]
    if not finite:
        raise UserError(f"every head diverged at --lrs {' '.join(map(str, config.lrs))}: give lower ones")
    best = max(finite, key=lambda head: (head["top1"], -head["loss"]))  # the first of equal ones
    one, place = Input(best["layers"], best["pooling"]), config.lrs.index(best["lr"])
    if not (single or on_test):
        scaling, heads = trained(everything, [one], [best["lr"]], "the best head")
        place = 0
    ranked = [
        heads[one].logits(x)[:, place].sort(dim=1, descending=True, stable=True).indices[:, :5].cpu()
        for x, _ in _chunks(one, test, test_rows, scaling, task.device)
    ]

    if single:
        selection = "a single head: nothing was chosen"
    elif on_test:
        selection = "highest top-1 on the test images themselves, as requested (--select test): the number is too good"
    else:
        selection = (
            f"highest top-1 on {len(held_out)} held-out training images ({config.held_out:g} of each class); "
            f"the selected head was trained again on all training images and tested once"
        )
    at_edge = len(config.lrs) > 1 and best["lr"] in (min(config.lrs), max(config.lrs))
    return Outcome(
        classification(torch.cat(ranked).numpy(), test.labels, task.data.classes),
        {
            "headline": f"pooling {best['pooling']} of the last {best['layers']} block(s), lr {best['lr']:g}"
            + (" (at the edge of the grid)" if at_edge else "")
            + (", chosen on the test images" if on_test and not single else ""),
            "features": list(one.taps),
            "selected": best,
            "selection": selection,
            "all_scored_on": "test" if single or on_test else "held-out training images",
            "sweep": {
                "lrs": list(config.lrs),
                "inputs": [{"layers": one.layers, "pooling": one.pooling} for one in inputs],
                "optimizer": config.optimizer,
                "nesterov": config.nesterov,
                "warmup": config.warmup,
                "schedule": config.schedule,
                "lr_batch": LR_BATCH,
                "weight_decay": config.weight_decay,
                "steps": steps,
                "batch_size": batch,
                "norm": config.norm,
                "augment": config.augment,
            },
            **task.protocol(train, test),
        },
        tried,
    )


def _steps(config: Config, images: int, batch: int) -> int:
    """Number of training steps for that number of images."""
    if config.epochs is not None:
        return max(1, round(config.epochs * images / batch))
    return config.steps or max(MIN_STEPS, EPOCHS * images // batch)


def _rate(config: Config, step: int, steps: int) -> float:
    """The learning rate of a step, as a share of the peak."""
    rising = round(config.warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if config.schedule == "step":
        return 0.1 ** sum(step >= steps * 2 * (drop + 1) / (2 * DROPS + 1) for drop in range(DROPS))
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of `labels` (n,) for training, and held-out ones for selection.

    `share` of each class's images, but at least one and not all, are held out, drawn by `seed`. A class with a single
    image is only used for training. Raises UserError if no image can be held out."""
    held_out = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held_out.append(numpy_generator(seed, "held out", int(label)).permutation(members)[:count])
    chosen = np.sort(np.concatenate(held_out))
    if not len(chosen):
        raise UserError(
            "every class has a single training image, so no head can be selected without the test images: use knn"
        )
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def _check(config: Config) -> None:
    if not config.lrs or not all(math.isfinite(lr) and lr > 0 for lr in config.lrs):
        raise UserError(f"--lrs {' '.join(map(str, config.lrs))}: learning rates must be above 0")
    if config.layers is not None and (not config.layers or min(config.layers) < 1):
        raise UserError(f"--layers {' '.join(map(str, config.layers))}: numbers of blocks must be at least 1")
    if (config.steps is not None and config.steps < 1) or config.probe_batch_size < 1:
        raise UserError(
            f"--steps is {config.steps} and --probe-batch-size {config.probe_batch_size}; both must be at least 1"
        )
    if config.steps is not None and config.epochs is not None:
        raise UserError("give --steps or --epochs, not both")
    if config.epochs is not None and not config.epochs > 0:
        raise UserError(f"--epochs is {config.epochs}; it must be above 0")
    if not 0 <= config.warmup < 1:
        raise UserError(f"--warmup is {config.warmup}; it must be at least 0 and below 1")
    if config.nesterov and config.optimizer != "sgd":
        raise UserError(f"--nesterov works with sgd, not with --optimizer {config.optimizer}")
    if not 0 < config.held_out < 1:
        raise UserError(f"--held-out is {config.held_out}; it must lie between 0 and 1")
    if config.weight_decay < 0:
        raise UserError(f"--weight-decay is {config.weight_decay}; it must not be negative")


def _inputs(task: Task, config: Config) -> list[Input]:
    """The inputs to try on this encoder."""
    layers = config.layers or ((1, 4) if blocks(task.encoder) >= 4 else (1,))
    has_cls = "cls" in poolings(task.encoder, task.device)
    kinds = config.poolings or (("cls", "mean", "cls+mean") if has_cls else ("mean",))
    return [Input(number, kind) for number in dict.fromkeys(layers) for kind in dict.fromkeys(kinds)]


_Groups = dict[Input, LinearProbes]


# ---- From features to the heads' inputs.


class _Scaling:
    """Normalises features: by statistics over rows of the training features, by each input's own, or not at all."""

    def __init__(self, train: Side, taps: Sequence[str], rows: np.ndarray, norm: Norm) -> None:
        self.norm = norm
        self._by_tap = {tap: _statistics(train.features[tap], rows) for tap in taps} if norm == "batch" else {}

    def __call__(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features by tap, (B, F) each, standardised by the training features."""
        if self.norm != "batch":
            return features
        result = {}
        for tap, x in features.items():
            mean, deviation = (value.to(x.device, non_blocking=True) for value in self._by_tap[tap])
            result[tap] = (x - mean) / deviation
        return result

    def of(self, one: Input, scaled: dict[str, Tensor]) -> Tensor:
        """The input (B, F) from standardised features; normalised over its own channels if `norm` is layer or l2."""
        x = one.of(scaled)
        if self.norm in ("layer", "l2"):
            x = F.layer_norm(x, x.shape[1:])
        return F.normalize(x, dim=1) if self.norm == "l2" else x


def _statistics(features: np.ndarray, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(variance + eps), (F,) float32, over the given rows of (n, F)."""
    total, squares = np.zeros(features.shape[1]), np.zeros(features.shape[1])
    parts = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    for part in parts:
        total += features[part].sum(0, dtype=np.float64)
    mean = total / len(rows)
    for part in parts:
        squares += ((features[part] - mean) ** 2).sum(0)
    deviation = np.sqrt(squares / len(rows) + BATCH_NORM_EPS)
    return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(deviation.astype(np.float32))


def _rows(side: Side, taps: Sequence[str], rows: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    return {tap: torch.from_numpy(side.features[tap][rows]).to(device, non_blocking=True) for tap in taps}


def _chunks(
    one: Input, side: Side, rows: np.ndarray, scaling: _Scaling, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs (B, F) and labels (B,) of the given rows, in order."""
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        yield (
            scaling.of(one, scaling(_rows(side, one.taps, part, device))),
            torch.from_numpy(side.labels[part]).to(device),
        )


# ---- Training.


@torch.no_grad()
def _train(
    task: Task,
    config: Config,
    train: Side,
    rows: np.ndarray,
    *,
    inputs: Sequence[Input],
    lrs: Sequence[float],
    scaling: _Scaling,
    batch: int,
    steps: int,
    what: str,
) -> _Groups:
    """Heads for each input and learning rate, trained on the given rows of the training images."""
    taps = tuple(dict.fromkeys(tap for one in inputs for tap in one.taps))
    supply = _augmented if config.augment else _cached
    heads = {}
    for one in inputs:
        heads[one] = LinearProbes(
            sum(train.features[tap].shape[1] for tap in one.taps),
            len(task.data.classes),
            [lr * batch / LR_BATCH for lr in lrs],
            weight_decay=config.weight_decay,
            generator=torch.Generator().manual_seed(key(task.seed, "heads", one.layers, one.pooling)),
            device=task.device,
            optimizer=config.optimizer,
            nesterov=config.nesterov,
        )
    with contextlib.closing(supply(task, train, rows, taps, batch=batch, steps=steps)) as given:
        for step, (features, labels) in enumerate(given):
            scale = _rate(config, step, steps)
            scaled = scaling(features)
            for one, group in heads.items():
                group.step(scaling.of(one, scaled), labels, scale)
            if step % 50 == 49 or step + 1 == steps:
                task.report(what, step + 1, steps)
    return heads


Supply = Generator[tuple[dict[str, Tensor], Tensor], None, None]  # features by tap, (B, F) each, and labels (B,)


def _cached(task: Task, train: Side, rows: np.ndarray, taps: Sequence[str], *, batch: int, steps: int) -> Supply:
    """Batches of the extracted features, in another order in each epoch; an incomplete last batch is left out."""
    each = len(rows) // batch
    for step in range(steps):
        epoch, place = divmod(step, each)
        if place == 0:
            order = numpy_generator(task.seed, "order", epoch).permutation(rows)
        chosen = np.sort(order[place * batch : (place + 1) * batch])  # sorted: a memory map is read from front to back
        yield _rows(train, taps, chosen, task.device), torch.from_numpy(train.labels[chosen]).to(task.device)


def _augmented(task: Task, train: Side, rows: np.ndarray, taps: Sequence[str], *, batch: int, steps: int) -> Supply:
    """Batches of random crops and flips, through the encoder."""
    how = task.encoder.preprocessing
    specs = (ViewSpec(name="image", size=how.crop, scale=(0.08, 1.0), interpolation=how.interpolation),)
    labels = torch.from_numpy(train.labels[rows]).to(task.device)
    wanted = [Tap.parse(tap) for tap in taps]
    loader = task.crops(Subset(task.data.train.source, train.index[rows]), specs, Share(batch), steps)
    with contextlib.closing(loader):
        for raw in loader:
            given = to_batch(raw, specs, how.mean, how.std, task.device)
            with tf32(task.device), torch.autocast(task.device.type, torch.bfloat16, enabled=task.precision == "bf16"):
                features = vectors(task.encoder, given.views["image"], wanted)
            yield features, labels[given.index]


@torch.no_grad()
def _score(
    heads: _Groups, side: Side, rows: np.ndarray, scaling: _Scaling, device: torch.device
) -> list[list[tuple[float | None, float | None]]]:
    """For each input and each of its heads: top-1 in percent and mean cross-entropy on the given rows; None, None for a
    head that diverged."""
    result = []
    for one, group in heads.items():
        right, loss = torch.zeros(2, group.shape[0], dtype=torch.float64, device=device)
        for x, labels in _chunks(one, side, rows, scaling, device):
            log_p = group.logits(x).log_softmax(2)
            right += (log_p.argmax(2) == labels[:, None]).sum(0)
            loss -= log_p[torch.arange(len(x), device=device), :, labels].sum(0)
        scores = zip((100 * right / len(rows)).tolist(), (loss / len(rows)).tolist(), strict=True)
        result.append([(top1, mean) if math.isfinite(mean) else (None, None) for top1, mean in scores])
    return result
