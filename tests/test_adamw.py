"""Our AdamW against torch's, bit by bit: skipped steps, missing gradients, rates that change, a state that is loaded."""

import copy

import pytest
import torch
from torch import nn

from ssl_pretrain import optim
from ssl_pretrain.optim.adamw import AdamW


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 17), nn.LayerNorm(17), nn.Linear(17, 5))


def groups(model: nn.Module) -> list[dict]:
    named = list(model.named_parameters())
    kinds = [[(n, p) for n, p in named if (p.ndim > 1) == matrix] for matrix in (True, False)]
    return [
        {
            "params": [p for _, p in kind],
            "names": [n for n, _ in kind],
            "decays": decays,
            "lr_scale": 1.0 if decays else 0.5,
            "weight_decay": 0.0,
        }
        for kind, decays in zip(kinds, (True, False), strict=True)
    ]


def walk(
    optimizer: torch.optim.Optimizer, model: nn.Module, steps: range, *, bad: tuple[int, ...] = (), without: str = ""
) -> None:
    """The same gradients for every optimiser; at `bad` steps they hold NaN; at odd ones what is `without` has none."""
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        for name, parameter in model.named_parameters():
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if without and name.startswith(without) and number % 2 else grad
            if number in bad and parameter.grad is not None:
                parameter.grad.fill_(float("nan"))
        optim.set_rates(optimizer, 0.1 / (1 + number), 0.05)
        optim.step_unless(torch.tensor(float(number in bad)), optimizer)


def equal(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("bad", [(), (0, 3, 4)])
@pytest.mark.parametrize("without", ["", "0.", "1.weight", "2"])
def test_every_step_is_torchs(bad: tuple[int, ...], without: str) -> None:
    ours, theirs = layers(), layers()
    mine = AdamW(groups(ours), betas=(0.9, 0.95))
    reference = torch.optim.AdamW(groups(theirs), lr=0.0, betas=(0.9, 0.95), fused=True)
    for number in range(7):
        walk(mine, ours, range(number, number + 1), bad=bad, without=without)
        walk(reference, theirs, range(number, number + 1), bad=bad, without=without)
        assert equal(ours, theirs)
    kept, expected = optim.state_by_name(mine), optim.state_by_name(reference)
    assert set(kept) == set(expected)
    for path, value in expected.items():
        assert torch.equal(kept[path], value), path
        assert kept[path].dtype == value.dtype


def test_without_found_inf_it_steps_too() -> None:
    ours, theirs = layers(), layers()
    mine, reference = AdamW(groups(ours), betas=(0.9, 0.95)), torch.optim.AdamW(theirs.parameters(), fused=True)
    for optimizer, model in ((mine, ours), (reference, theirs)):
        for group in optimizer.param_groups:
            group.update(lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert equal(ours, theirs)


def test_a_loaded_state_is_taken_up_also_after_steps() -> None:
    straight, ours = layers(), layers()
    reference = AdamW(groups(straight), betas=(0.9, 0.95))
    walk(reference, straight, range(4))
    weights, state = copy.deepcopy(straight.state_dict()), copy.deepcopy(optim.state_by_name(reference))
    walk(reference, straight, range(4, 8))
    mine = AdamW(groups(ours), betas=(0.9, 0.95))
    walk(mine, ours, range(20, 23))  # another past, to be forgotten
    ours.load_state_dict(weights)
    optim.load_state_by_name(mine, state)
    walk(mine, ours, range(4, 8))
    assert equal(ours, straight)
    assert float(mine.state[ours[0].weight]["step"]) == 8
