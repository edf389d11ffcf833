"""Ten steps of the training loop against a plain loop that is written here from the papers' formulas.

The plain loop takes the initial weights, the batches and the method's forward from the package. It calls the forward
once for the whole batch. Everything else is written here: learning rate, weight decay, layer decay, clipping, optimisers,
skipped steps, EMA teachers. So the test sees a rate that is one step late, a schedule that is dropped, or clipping that
is ignored.

The optimisers here compute in float64. Parameters are rounded to float32 once a step, for the forward.
"""

import contextlib
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics
from torch import Tensor

from ssl_pretrain import backbones, checkpoint, pretext, train
from ssl_pretrain.config import Run
from ssl_pretrain.data.loader import Share, batches, to_batch
from ssl_pretrain.data.source import open_source, pretraining_split
from ssl_pretrain.data.views import fitted
from ssl_pretrain.pretext import Batch, Losses, Method, Step
from ssl_pretrain.randomness import key

STEPS, BATCH, SIZE, SEED, DEPTH = 10, 16, (32, 32), 3, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPTIONS = {"patch_size": 8, "depth": DEPTH}
SMALL = {
    "mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    "dino": {"hidden_dim": 64, "bottleneck_dim": 16, "prototypes": 48, "local_views": 2},
    "simclr": {"hidden_dim": 64, "embedding_dim": 32},
    "byol": {"hidden_dim": 64, "embedding_dim": 16},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run: what its flags say."""

    method: str
    optimizer: str
    lr: float
    final_lr: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    warmup_lr: float = 0.0
    cooldown_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    final_weight_decay: float | None = None
    layer_decay: float = 1.0
    clip_grad: float | None = None
    clip_each: bool = False
    accumulate: int = 1
    knobs: dict[str, float] = field(default_factory=dict)  # the method's; "momentum" is its teacher's, at the start
    bad: tuple[int, ...] = ()  # steps whose loss is made NaN, or, where they are odd, whose gradients are

    @property
    def config(self) -> Any:
        return pretext.load(self.method).Config(**SMALL[self.method], **self.knobs)

    @property
    def options(self) -> Any:
        return backbones.config_class("vit_micro")(**backbones.defaults("vit_micro") | OPTIONS)

    def run(self, data: Path, out: Path) -> Run:
        given = {name: value for name, value in vars(self).items() if name not in ("knobs", "bad")}
        return Run(
            data=str(data), out=out, encoder="vit_micro", image_size=SIZE, batch_size=BATCH, steps=STEPS, seed=SEED,
            workers=0, precision="fp32", log_every=1, checkpoint_every=STEPS // 2, monitor_every=0, picture_every=0,
            **given,
        )  # fmt: skip


ADAMW = Case(
    method="mae", optimizer="adamw", lr=2e-3, final_lr=1e-4, warmup_steps=4, weight_decay=0.05, final_weight_decay=0.4
)
SGD = Case(method="mae", optimizer="sgd", lr=0.05, weight_decay=0.01)
CASES = {
    "adamw": replace(
        ADAMW, layer_decay=0.65, clip_grad=0.3
    ),
    "adamw and a teacher": replace(
        ADAMW, method="dino", schedule="constant", warmup_steps=2, cooldown_steps=5, clip_grad=0.1, clip_each=True,
        knobs={"momentum": 0.8},
    ),
    "adamw and skipped steps": replace(ADAMW, bad=(4, 7)),
    "sgd, accumulated": replace(
        SGD, schedule="constant", accumulate=4, clip_grad=0.3
    ),
    "lars, accumulated by GradCache": Case(
        method="simclr", optimizer="lars", lr=0.3, final_lr=0.05, warmup_steps=3, weight_decay=1e-2, accumulate=2,
        knobs={"temperature": 1.0},  # at 0.1 the biases' steps are long enough to magnify rounding
    ),
    "sgd, accumulated by GradCache, and a teacher": replace(
        SGD, method="byol", final_weight_decay=0.05, accumulate=2, warmup_steps=3, warmup_lr=0.01,
        knobs={"momentum": 0.7}, bad=(2, 5),
    ),
}  # fmt: skip


# ---- The formulas.


def learning_rate(case: Case, t: int) -> float:
    """A linear warm-up from `warmup_lr` one step before the first; its last step has the peak (Goyal et al., 2017, section
    2.2; I-JEPA's code starts above 0). Then half a cosine (Loshchilov & Hutter, 2017, eq. 5), or the peak and a linear
    cooldown. Both reach their end one step after the last."""
    if t < case.warmup_steps:
        return case.warmup_lr + (case.lr - case.warmup_lr) / case.warmup_steps * (t + 1)
    span = case.lr - case.final_lr
    if case.schedule == "cosine":
        return (
            case.final_lr + span * (1 + math.cos(math.pi * (t - case.warmup_steps) / (STEPS - case.warmup_steps))) / 2
        )
    into = t - (STEPS - case.cooldown_steps)
    return case.lr if into <= 0 else case.lr - span * into / case.cooldown_steps


def weight_decay(case: Case, t: int) -> float:
    """DINO (Caron et al., 2021), appendix: by a cosine from start to end."""
    start, end = case.weight_decay, case.final_weight_decay
    return start if end is None else end - (end - start) * (1 + math.cos(math.pi * t / STEPS)) / 2


def rate_factor(case: Case, name: str) -> float:
    """BEiT (Bao et al., 2022), appendix: each block below the output multiplies by the layer decay once more."""
    if not name.startswith("encoder."):
        return 1.0
    if block := re.match(r"encoder\.blocks\.(\d+)\.", name):
        return case.layer_decay ** (DEPTH - int(block[1]))
    return 1.0 if name.startswith("encoder.norm.") else case.layer_decay ** (DEPTH + 1)


def clipped(case: Case, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pascanu et al. (2013), algorithm 1, with torch's 1e-6 below the fraction line."""
    if case.clip_grad is None:
        return gradients
    squares = {name: float(g.square().sum()) for name, g in gradients.items()}
    whole = sum(squares.values())
    norms = {name: math.sqrt(square if case.clip_each else whole) for name, square in squares.items()}
    return {name: g * min(1.0, case.clip_grad / (norms[name] + 1e-6)) for name, g in gradients.items()}


class Optimizer:
    """AdamW, SGD with momentum or LARS, one parameter after another, in float64."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.state: dict[str, dict[str, Tensor]] = {}

    def moved(self, name: str, w: Tensor, g: Tensor, lr: float, decay: float) -> Tensor:
        state = self.state.setdefault(name, {})
        matrix = w.ndim > 1  # neither biases nor the norms' gains decay
        decay = decay if matrix else 0.0
        if self.case.optimizer == "adamw":  # Loshchilov & Hutter (2019), algorithm 2
            one, two = self.case.betas
            t = state["step"] = state.get("step", torch.zeros((), dtype=torch.float64)) + 1
            m = state["exp_avg"] = one * state.get("exp_avg", 0 * g) + (1 - one) * g
            v = state["exp_avg_sq"] = two * state.get("exp_avg_sq", 0 * g) + (1 - two) * g * g
            return w - lr * ((m / (1 - one**t)) / ((v / (1 - two**t)).sqrt() + 1e-8) + decay * w)
        g = g + decay * w
        if self.case.optimizer == "lars" and matrix:  # You et al. (2017), eq. 6: of the gradient with its decay
            g = g * 1e-3 * w.norm() / g.norm()
        v = state["momentum_buffer"] = self.case.betas[0] * state.get("momentum_buffer", 0 * g) + g
        return w - lr * v


# ---- The plain loop.


@contextlib.contextmanager
def broken(case: Case) -> Iterator[None]:
    """With a forward whose loss is NaN in the bad steps; in the odd ones the loss is finite, and its gradients are not."""
    kind = pretext.load(case.method)
    name = "loss" if issubclass(kind, pretext.WholeBatchMethod) else "forward"
    usual = getattr(kind, name)

    def forward(self: Method, batch: Any, step: Step) -> Losses:
        losses = usual(self, batch, step)
        if step.step in case.bad:
            losses.total = losses.total + (torch.sqrt(0 * losses.total) if step.step % 2 else torch.nan)
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, name, forward)
        yield


def whole_batches(method: Method, knobs: Any, data: Path) -> Iterator[Batch]:
    source = open_source(str(data), pretraining_split(str(data)))
    specs = fitted(type(method).views(knobs, SIZE), SIZE, method.encoder.stride)
    for raw in batches(
        source, specs, Share(BATCH), seed=SEED, channels=3, start_step=0, stop_step=STEPS, workers=0, policy="fail"
    ):
        yield to_batch(raw, specs, MEAN, STD, torch.device("cpu"))


@dataclass
class Result:
    """What the plain loop ends with."""

    first: dict[str, Tensor]  # the state before the first step
    state: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # by "parameter/entry"
    norms: list[float]  # of each step's gradient, before clipping
    clipped: list[bool]


def plain_loop(case: Case, data: Path) -> Result:
    kind, knobs = pretext.load(case.method), case.config
    torch.manual_seed(key(SEED, "init"))
    method = kind(backbones.build("vit_micro", image_size=SIZE, **backbones.defaults("vit_micro") | OPTIONS), knobs)
    method.prepare(len(list(data.iterdir())))
    method.train()
    result = Result({name: value.clone() for name, value in method.state_dict().items()}, {}, {}, [], [])
    optimizer = Optimizer(case)
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    for t, batch in enumerate(whole_batches(method, knobs, data)):
        step = Step(
            step=t,
            total=STEPS,
            noise=key(SEED, "step", t),
            rows=slice(0, BATCH),
            batch_size=BATCH,
            device=torch.device("cpu"),
        )
        losses = method(batch, step)
        losses.total.backward()
        gradients = {name: p.grad.double() for name, p in trained.items() if p.grad is not None}
        for p in trained.values():
            p.grad = None
        result.norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients.values())))
        if not (math.isfinite(result.norms[-1]) and bool(losses.total.isfinite())):
            continue
        less = clipped(case, gradients)
        result.clipped.append(any(not torch.equal(less[name], g) for name, g in gradients.items()))
        for name, g in less.items():
            rate, decay = learning_rate(case, t) * rate_factor(case, name), weight_decay(case, t)
            trained[name].data = optimizer.moved(name, trained[name].data.double(), g, rate, decay).float()
        update_teacher(case, method, losses, t)
    result.state = {name: value.clone() for name, value in method.state_dict().items()}
    result.optimizer = {f"{n}/{entry}": value for n, state in optimizer.state.items() for entry, value in state.items()}
    return result


@torch.no_grad()
def update_teacher(case: Case, method: Method, losses: Losses, t: int) -> None:
    """teacher <- m teacher + (1 - m) student, with m from its start to 1 by half a cosine (BYOL, Grill et al., 2020,
    section 3). DINO's centre is such a mean of the teacher's outputs, with 0.9 (eq. 4)."""
    if "momentum" not in case.knobs:
        return
    momentum = 1 - (1 - case.knobs["momentum"]) * (math.cos(math.pi * t / STEPS) + 1) / 2
    student = dict(method.named_parameters())
    for name, parameter in method.named_parameters():
        if name.startswith("teacher."):
            moved = momentum * parameter.double() + (1 - momentum) * student[name.removeprefix("teacher.")].double()
            parameter.copy_(moved)
    if "teacher" in losses.carry:
        centre = method.get_buffer("centre")
        centre.copy_(0.9 * centre.double() + 0.1 * losses.carry["teacher"].double().mean(0))


# ---- The comparison.


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ten_steps_are_those_of_a_plain_loop(case: Case, photos: Path, tmp_path: Path) -> None:
    with broken(case):
        train.train(case.run(photos, tmp_path), case.config, case.options)
        expected = plain_loop(case, photos)
    # that the case shows what it is for
    moved = {n: float((expected.state[n] - v).abs().max()) for n, v in expected.first.items() if v.is_floating_point()}
    assert max(v for name, v in moved.items() if not name.startswith("teacher.")) > 1e-3
    assert "momentum" not in case.knobs or max(v for name, v in moved.items() if name.startswith("teacher.")) > 1e-3
    assert any(expected.clipped) == (case.clip_grad is not None)
    assert_equal(tmp_path, expected, case)


def test_so_are_those_of_a_run_that_continues_after_five(photos: Path, tmp_path: Path) -> None:
    case = CASES["adamw and skipped steps"]  # one of them before the checkpoint, one after it
    with broken(case):
        train.train(case.run(photos, tmp_path), case.config, case.options)
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{STEPS:08d}")
        train.train(case.run(photos, tmp_path), case.config, case.options)
        expected = plain_loop(case, photos)
    assert_equal(tmp_path, expected, case)


def assert_equal(out: Path, expected: Result, case: Case) -> None:
    """The run's last checkpoint and its metrics are those of the plain loop."""
    found = checkpoint.load(out / "checkpoints", STEPS)
    assert found["skipped"] == len(case.bad)
    lines = [line for line in metrics(out) if "loss" in line]
    assert [line["lr"] for line in lines] == pytest.approx([learning_rate(case, t) for t in range(STEPS)], rel=1e-12)
    decays = [weight_decay(case, t) for t in range(STEPS)]
    assert [line["weight_decay"] for line in lines] == pytest.approx(decays, rel=1e-12)
    for line, norm in zip(lines, expected.norms, strict=True):
        assert line["grad_norm"] == (pytest.approx(norm, rel=1e-4) if math.isfinite(norm) else None)
    assert found["method"].keys() == expected.state.keys()
    for name, value in expected.state.items():
        same(name, found["method"][name], value, 1e-5 if "running" in name else 1e-6)
    assert found["optimizer"].keys() == expected.optimizer.keys()
    for name, value in expected.optimizer.items():
        same(name, found["optimizer"][name].double(), value, 1e-4)


def same(name: str, found: Tensor, expected: Tensor, relative: float) -> None:
    """To 1e-6. A bias of the keys is left out: it changes no attention, so its gradient is rounding, of which AdamW makes
    steps of full size."""
    if "attn.qkv.bias" in name and found.ndim:
        (found, _, *others), (value, _, *more) = found.chunk(3), expected.chunk(3)
        found, expected = torch.cat([found, *others]), torch.cat([value, *more])
    torch.testing.assert_close(found, expected, rtol=relative, atol=1e-6, msg=lambda text: f"{name}: {text}")
