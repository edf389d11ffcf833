"""LARS against NumPy written from You, Gitman & Ginsburg (2017), and steps that are skipped."""

import sys
from pathlib import Path

import numpy as np
import torch

from ssl_pretrain import optim

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from counted import Counted


def groups(w: torch.nn.Parameter, b: torch.nn.Parameter) -> list[dict]:
    return [
        {"params": [w], "names": ["w"], "decays": True, "lr_scale": 1.0, "weight_decay": 0.0},
        {"params": [b], "names": ["b"], "decays": False, "lr_scale": 1.0, "weight_decay": 0.0},
    ]


def test_three_steps_with_trust_ratio_decay_and_momentum_but_none_of_them_for_biases() -> None:
    rng = np.random.default_rng(0)
    w0, b0 = rng.normal(size=(4, 3)), rng.normal(size=3)
    w, b = (torch.nn.Parameter(torch.tensor(x)) for x in (w0, b0))
    optimizer = optim.build("lars", groups(w, b), (0.9, 0.999))
    v, u = np.zeros_like(w0), np.zeros_like(b0)
    for number in range(3):
        g, h = rng.normal(size=(4, 3)), rng.normal(size=3)
        w.grad, b.grad = torch.tensor(g), torch.tensor(h)
        optim.set_rates(optimizer, lr=0.5, weight_decay=0.01)
        optim.step_unless(
            torch.tensor(float(number == 1)), optimizer
        )  # the second is not finite: as if it had not been
        if number == 1:
            continue
        g = g + 0.01 * w0
        v = 0.9 * v + 0.001 * np.linalg.norm(w0) / np.linalg.norm(g) * g
        u = 0.9 * u + h
        w0, b0 = w0 - 0.5 * v, b0 - 0.5 * u
    np.testing.assert_allclose(w.detach().numpy(), w0, rtol=1e-12)
    np.testing.assert_allclose(b.detach().numpy(), b0, rtol=1e-12)


def test_a_step_with_nan_leaves_no_trace_and_zero_weights_can_leave_zero() -> None:
    w, b = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = optim.build("lars", groups(w, b), (0.9, 0.999))
    optim.set_rates(optimizer, lr=0.1, weight_decay=0.0)
    w.grad, b.grad = torch.full((2, 2), float("nan")), torch.full((2,), float("nan"))
    optim.step_unless(torch.tensor(1.0), optimizer)
    assert torch.equal(w.detach(), torch.zeros(2, 2))
    assert torch.equal(b.detach(), torch.ones(2))
    w.grad, b.grad = torch.ones(2, 2), torch.ones(2)
    optim.step_unless(torch.tensor(0.0), optimizer)
    assert torch.equal(w.detach(), torch.full((2, 2), -0.1))


def test_its_state_goes_through_a_checkpoint() -> None:
    w, b = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = optim.build("lars", groups(w, b), (0.9, 0.999))
    w.grad, b.grad = torch.ones(2, 2), torch.ones(2)
    optim.step_unless(torch.tensor(0.0), optimizer)
    state = optim.state_by_name(optimizer)
    assert set(state) == {"w/momentum_buffer", "b/momentum_buffer"}
    other = optim.build("lars", groups(w, b), (0.9, 0.999))
    optim.load_state_by_name(other, state)
    assert torch.equal(other.state[w]["momentum_buffer"], optimizer.state[w]["momentum_buffer"])


def test_its_kernels_are_few_however_many_parameters_there_are() -> None:
    def kernels(count: int) -> int:
        parameters = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(count)]
        names = [str(i) for i in range(count)]
        group = {"params": parameters, "names": names, "decays": True, "lr_scale": 1.0, "weight_decay": 0.0}
        optimizer = optim.build("lars", [group], (0.9, 0.999))
        for _ in range(2):  # the first one makes the state
            for parameter in parameters:
                parameter.grad = torch.ones(3, 3)
            with Counted() as counted:
                optim.step_unless(torch.tensor(0.0), optimizer)
        return sum(counted.kernels.values())

    assert kernels(20) - kernels(10) == 10  # one a parameter, that no NaN stays
    assert kernels(10) <= 40
