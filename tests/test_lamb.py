"""LAMB against NumPy written from You et al. (2020), algorithm 2, and against timm's; skipped steps; its state."""

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, losses
from oracles import import_timm
from ssl_pretrain.launch.pretrain import main

from ssl_pretrain import checkpoint, optim

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from counted import Counted

BETAS, EPS, LR, DECAY = (0.9, 0.95), 1e-6, 0.05, 0.02


def groups(w: torch.nn.Parameter, b: torch.nn.Parameter) -> list[dict]:
    return [
        {"params": [w], "names": ["w"], "decays": True, "lr_scale": 1.0, "weight_decay": 0.0},
        {"params": [b], "names": ["b"], "decays": False, "lr_scale": 0.5, "weight_decay": 0.0},
    ]


def adam(moments: list[np.ndarray], g: np.ndarray, t: int) -> np.ndarray:
    m, v = moments
    m[:] = BETAS[0] * m + (1 - BETAS[0]) * g
    v[:] = BETAS[1] * v + (1 - BETAS[1]) * g**2
    return (m / (1 - BETAS[0] ** t)) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)


def test_steps_with_trust_ratio_and_decay_but_none_of_them_for_biases() -> None:
    rng = np.random.default_rng(0)
    w0, b0 = rng.normal(size=(4, 3)), rng.normal(size=3)
    w, b = (torch.nn.Parameter(torch.tensor(x)) for x in (w0, b0))
    optimizer = optim.build("lamb", groups(w, b), BETAS)
    of_w, of_b = ([np.zeros_like(x), np.zeros_like(x)] for x in (w0, b0))
    t = 0
    for number in range(5):
        g, h = rng.normal(size=(4, 3)), rng.normal(size=3)
        bad = number == 2  # not finite: as if it had not been
        w.grad, b.grad = (torch.tensor(x * np.nan if bad else x) for x in (g, h))
        optim.set_rates(optimizer, lr=LR, weight_decay=DECAY)
        optim.step_unless(torch.tensor(float(bad)), optimizer)
        if bad:
            continue
        t += 1
        u = adam(of_w, g, t) + DECAY * w0
        w0 = w0 - LR * np.linalg.norm(w0) / np.linalg.norm(u) * u
        b0 = b0 - LR / 2 * adam(of_b, h, t)
    np.testing.assert_allclose(w.detach().numpy(), w0, rtol=1e-12)
    np.testing.assert_allclose(b.detach().numpy(), b0, rtol=1e-12)


def test_it_is_timms() -> None:
    import_timm()
    timm = importlib.import_module("timm.optim")
    generator = torch.Generator().manual_seed(0)
    w, b = (torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((5, 4), (5,)))
    w1, b1 = (torch.nn.Parameter(each.detach().clone()) for each in (w, b))
    mine = optim.build("lamb", groups(w, b), BETAS)
    # Its own clipping is on by default; here the loop clips.
    theirs = timm.Lamb(
        [{"params": [w1], "weight_decay": DECAY}, {"params": [b1], "weight_decay": 0.0, "lr": LR / 2}],
        lr=LR, betas=BETAS, eps=EPS, max_grad_norm=None,
    )  # fmt: skip
    for _ in range(6):
        for p, q in ((w, w1), (b, b1)):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optim.set_rates(mine, lr=LR, weight_decay=DECAY)
        optim.step_unless(torch.tensor(0.0), mine)
        theirs.step()
    torch.testing.assert_close(w, w1, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b, b1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_with_nan_leaves_no_trace_and_zero_weights_can_leave_zero(decay: float) -> None:
    w, b = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = optim.build("lamb", groups(w, b), BETAS)
    optim.set_rates(optimizer, lr=0.1, weight_decay=decay)
    w.grad, b.grad = torch.full((2, 2), float("nan")), torch.full((2,), float("inf"))
    optim.step_unless(torch.tensor(1.0), optimizer)
    assert torch.equal(w.detach(), torch.zeros(2, 2))
    assert torch.equal(b.detach(), torch.ones(2))
    assert all(not value.any() for value in optim.state_by_name(optimizer).values())
    w.grad, b.grad = torch.ones(2, 2), torch.ones(2)
    optim.step_unless(torch.tensor(0.0), optimizer)  # |w| is 0: the ratio is 1, Adam's first step has length 1
    torch.testing.assert_close(w.detach(), torch.full((2, 2), -0.1))


def test_norms_are_those_of_whole_tensors() -> None:
    """As if three other processes held parts of the same norm."""
    w, b = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    seen = []

    def whole(norms: torch.Tensor) -> torch.Tensor:
        seen.append(norms.clone())
        return norms * torch.tensor([2.0, 4.0])

    optimizer = optim.build("lamb", groups(w, b), BETAS, whole)
    optim.set_rates(optimizer, lr=0.1, weight_decay=1.0)
    w.grad, b.grad = torch.ones(2, 2), torch.ones(2)
    optim.step_unless(torch.tensor(0.0), optimizer)
    torch.testing.assert_close(seen, [torch.tensor([2.0, 4.0])])  # |1| and |1 + 1| of four numbers, once a group
    torch.testing.assert_close(w.detach(), torch.full((2, 2), 1 - 0.1 * (2 * 2) / (4 * 4) * 2))


def test_a_parameter_without_gradient_stays_and_its_counter_too() -> None:
    w, b = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    both = [{"params": [w, b], "names": ["w", "b"], "decays": True, "lr_scale": 1.0, "weight_decay": 0.0}]
    optimizer = optim.build("lamb", both, BETAS)
    optim.set_rates(optimizer, lr=0.1, weight_decay=0.1)
    w.grad = torch.ones(2, 2)
    optim.step_unless(torch.tensor(0.0), optimizer)
    state = optim.state_by_name(optimizer)
    assert (float(state["w/step"]), float(state["b/step"])) == (1.0, 0.0)
    assert torch.equal(b.detach(), torch.ones(2))
    assert not torch.equal(w.detach(), torch.ones(2, 2))


def test_its_kernels_are_as_many_however_many_parameters_there_are() -> None:
    def kernels(count: int) -> int:
        parameters = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(count)]
        names = [str(i) for i in range(count)]
        group = {"params": parameters, "names": names, "decays": True, "lr_scale": 1.0, "weight_decay": 0.0}
        optimizer = optim.build("lamb", [group], BETAS)
        optim.set_rates(optimizer, lr=0.1, weight_decay=0.1)
        for _ in range(2):  # the first one makes the state
            for parameter in parameters:
                parameter.grad = torch.ones(3, 3)
            with Counted() as counted:
                optim.step_unless(torch.tensor(0.0), optimizer)
            assert not counted.waits
        return sum(counted.kernels.values())

    assert kernels(20) == kernels(10)
    assert kernels(10) <= 22


def test_a_run_with_it_resumes_bit_for_bit(
    photos: Path, tmp_path: Path, pretrain_here: Callable, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    argv = ["--method", "mae", "--data", photos, "--out", out, "--steps", 6, "--log-every", 1, "--checkpoint-every", 3]
    argv += [*TINY, "--workers", 0, "--optimizer", "lamb", "--lr", "1e-2", "--clip-grad", 5, "--no-score"]
    argv += ["--schedule", "step", "--milestones", 0.5, 0.8]
    pretrain_here(*argv)
    curve, folder = losses(out), out / "checkpoints"
    assert curve[6] < curve[1]
    whole = {n: v.clone() for n, v in checkpoint.load(folder, 6)["method"].items()}
    state = checkpoint.load(folder, 6)["optimizer"]
    assert {"decoder_embed.weight/exp_avg", "decoder_embed.weight/exp_avg_sq", "decoder_embed.weight/step"} < set(state)
    shutil.rmtree(folder / "step-00000006")
    pretrain_here(*argv)
    assert all(torch.equal(v, whole[n]) for n, v in checkpoint.load(folder, 6)["method"].items())
    assert losses(out) == curve
    pretrain_here("--config", out / "config.yaml", "--out", tmp_path / "again")  # which says the last rate, too
    assert losses(tmp_path / "again") == curve
    assert main([*map(str, argv), "--final-lr", "1e-5"]) == 2
    assert "--final-lr 1e-05: --schedule step ends at 0.0001" in capsys.readouterr().err
