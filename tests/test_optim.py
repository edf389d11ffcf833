"""Parameter groups by the papers' rules; steps that are skipped on the device; AdamW against NumPy."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ssl_pretrain import backbones, optim
from ssl_pretrain.pretext import Batch, Losses, Method, Step


class Toy(Method):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        pass

    def __init__(self, **options: Any) -> None:
        encoder = backbones.build("vit_micro", image_size=(16, 16), patch_size=8, depth=2, **options)
        super().__init__(encoder, self.Config())
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.head = nn.Linear(128, 8)
        self.fixed = nn.Parameter(torch.zeros(3), requires_grad=False)

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple:
        return ()

    def forward(self, batch: Batch, step: Step) -> Losses:
        raise AssertionError


def decayed(rule: str) -> dict[str, bool]:
    groups = optim.parameter_groups(toy := Toy(), toy.encoder, rule=rule)  # type: ignore[arg-type]
    return {name: group["decays"] for group in groups for name in group["names"]}


def test_mae_rule_decays_matrices_and_tokens_but_no_vector_and_no_bias() -> None:
    found = decayed("no_1d")
    assert found["encoder.cls_token"]
    assert found["mask_token"]
    assert found["encoder.patch_embed.proj.weight"]
    assert found["encoder.blocks.1.attn.qkv.weight"]
    assert not found["encoder.blocks.1.attn.qkv.bias"]
    assert not found["encoder.norm.weight"]
    assert not found["head.bias"]
    assert "fixed" not in found
    trainable = {name for name, p in Toy().named_parameters() if p.requires_grad}
    assert set(found) == trainable  # every one, once


# Of each family: parameters with several axes that are no matrices: tokens, positions, tables.
TABLES = {
    "vit_micro": {"cls_token", "pos_embed"},
    "octic_micro": {"cls_token", "pos_quarters"},
    "jumbo_micro": {"jumbo_token", "pos_embed"},
    "grouper_micro": {"pool_query", "pos_embed"},
    "hiera_micro": {"pos_embed"},
    "swin_micro": set(),
    "convnextv2_micro": set(),
    "resnet_micro": set(),
}


@pytest.mark.parametrize("name", TABLES)
def test_no_family_decays_gains_and_with_fine_tunings_rule_no_tokens(name: str) -> None:
    """Gains of norms, layer scales and tokens by their names, whatever their shape; nor are they matrices for Muon."""
    given = {"octic_micro": {"layer_scale": 1e-4}}.get(name, {})
    built = backbones.build(name, image_size=(64, 64), **{**backbones.defaults(name), **given})
    gains = {
        n for n, _ in built.named_parameters() if re.search(r"norm\d?\.|_norm\.|\.ls\d\.|\.bn\d\.|gamma|\.grn\.", n)
    }
    assert gains
    for rule, tables in (("no_1d", set()), ("no_1d_tokens", TABLES[name])):
        groups = optim.parameter_groups(built, built, rule=rule, matrices=True)  # type: ignore[arg-type]
        found = {n: group for group in groups for n in group["names"]}
        assert not [n for n in gains if found[n]["decays"] or found[n]["matrices"]]
        assert not [n for n in tables if found[n]["decays"]]
    if TABLES[name]:
        groups = optim.parameter_groups(built, built, rule="no_1d")
        assert TABLES[name] <= {n for group in groups if group["decays"] for n in group["names"]}


def test_matrices_are_the_encoders_and_no_tables() -> None:
    groups = optim.parameter_groups(toy := Toy(positions="relative"), toy.encoder, rule="no_1d", matrices=True)
    matrices = [name.split(".", 3)[-1] for group in groups if group["matrices"] for name in group["names"]]
    assert not any(group["matrices"] for group in optim.parameter_groups(toy, toy.encoder, rule="no_1d"))
    assert sorted(set(matrices)) == ["attn.proj.weight", "attn.qkv.weight", "mlp.fc1.weight", "mlp.fc2.weight"]


def test_other_rules() -> None:
    tokens = decayed("no_1d_tokens")
    assert not tokens["encoder.cls_token"]
    assert not tokens["encoder.pos_embed"]
    assert tokens["head.weight"]
    assert all(decayed("all").values())


def test_layer_decay_scales_by_distance_from_the_output() -> None:
    groups = optim.parameter_groups(toy := Toy(), toy.encoder, rule="no_1d", layer_decay=0.5)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["head.weight"] == 1.0
    assert scale["encoder.norm.weight"] == 1.0
    assert scale["encoder.blocks.1.norm1.weight"] == 0.5
    assert scale["encoder.blocks.0.norm1.weight"] == 0.25
    assert scale["encoder.patch_embed.proj.weight"] == scale["encoder.cls_token"] == 0.125


@pytest.mark.parametrize(("depths", "groups"), [((3, 3, 9, 3), 6), ((3, 3, 27, 3), 12)])
def test_groups_of_blocks_share_a_factor_as_in_convnext(depths: tuple[int, ...], groups: int) -> None:
    """The rule as ConvNeXt's appendix has it: stem, stages 1 and 2, threes of stage 3, stage 4, head."""
    with torch.device("meta"):
        encoder = backbones.build("convnext_micro", image_size=(64, 64), depths=depths, dims=(8, 8, 8, 8))
    found = optim.parameter_groups(encoder, encoder, rule="no_1d", layer_decay=0.5, decay_blocks=3)
    scale = {name: group["lr_scale"] for group in found for name in group["names"]}
    expected = {"stem": 0, "norm": groups + 1}
    for name, factor in scale.items():
        part, *rest = name.split(".")
        if part == "stages":
            stage, kind = int(rest[0]), rest[1]
            block = int(rest[2]) if kind == "blocks" else 0
            layer = {0: 1, 1: 2, 2: 3 + block // 3, 3: groups}[stage]
        else:
            layer = expected[part]
        assert factor == 0.5 ** (groups + 1 - layer), name
    one_each = optim.parameter_groups(encoder, encoder, rule="no_1d", layer_decay=0.5, decay_blocks=1)
    assert len({group["lr_scale"] for group in one_each}) == sum(depths) + 2


def small(kind: str) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    groups = [
        {"params": [layer.weight], "names": ["weight"], "decays": True, "lr_scale": 1.0, "weight_decay": 0.0},
        {"params": [layer.bias], "names": ["bias"], "decays": False, "lr_scale": 0.5, "weight_decay": 0.0},
    ]
    return layer, optim.build(kind, groups, (0.9, 0.95))  # type: ignore[arg-type]


def test_adamw_against_numpy() -> None:
    layer, optimizer = small("adamw")
    values = {n: p.detach().double().numpy().copy() for n, p in layer.named_parameters()}
    moments = {n: [np.zeros_like(v), np.zeros_like(v)] for n, v in values.items()}
    rng = np.random.default_rng(0)
    for t in range(1, 6):
        lr, wd = 0.1 / t, 0.05
        for n, p in layer.named_parameters():
            g = rng.normal(size=p.shape)
            p.grad = torch.tensor(g, dtype=torch.float32)
            rate, decay = (lr, wd) if n == "weight" else (lr * 0.5, 0.0)
            m, v = moments[n]
            m[:] = 0.9 * m + 0.1 * g
            v[:] = 0.95 * v + 0.05 * g**2
            values[n] = values[n] * (1 - rate * decay) - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        optim.set_rates(optimizer, lr, wd)
        optim.step_unless(torch.tensor(0.0), optimizer)
    for n, p in layer.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), values[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_skipped_step_changes_nothing_not_even_the_moments(kind: str) -> None:
    layer, optimizer = small(kind)
    optim.set_rates(optimizer, 0.1, 0.1)

    def give(value: float) -> None:
        for p in layer.parameters():
            p.grad = torch.full_like(p, value)

    give(1.0)
    optim.step_unless(torch.tensor(0.0), optimizer)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    state = {n: v.clone() for n, v in optim.state_by_name(optimizer).items()}
    give(float("nan"))
    optim.step_unless(torch.tensor(1.0), optimizer)
    for n, p in layer.named_parameters():
        assert torch.equal(p, before[n])
    for n, v in optim.state_by_name(optimizer).items():
        assert torch.equal(v, state[n]), n
    give(1.0)
    optim.step_unless(torch.tensor(0.0), optimizer)
    assert not torch.equal(layer.weight, before["weight"])


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_state_by_name_continues_bit_for_bit(kind: str) -> None:
    def run(layer: nn.Linear, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for t in steps:
            optim.set_rates(optimizer, 0.1, 0.1)
            for p in layer.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            optim.step_unless(torch.tensor(0.0), optimizer)

    whole, optimizer = small(kind)
    run(whole, optimizer, range(6))
    first, optimizer = small(kind)
    run(first, optimizer, range(3))
    second, fresh = small(kind)
    second.load_state_dict(first.state_dict())
    optim.load_state_by_name(fresh, {n: v.clone() for n, v in optim.state_by_name(optimizer).items()})
    run(second, fresh, range(3, 6))
    assert torch.equal(whole.weight, second.weight)
    assert torch.equal(whole.bias, second.bias)


def test_gradient_norm() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert float(optim.gradient_norms(list(layer.parameters()), lambda s: s).norm()) == pytest.approx(5.0)


def test_clipping_together_and_each_by_itself() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) * scale for shape, scale in (((3, 2), 10.0), ((4,), 0.1))]
    for each in (False, True):
        parameters = [nn.Parameter(torch.zeros(a.shape, dtype=torch.float64)) for a in arrays]
        for p, a in zip(parameters, arrays, strict=True):
            p.grad = torch.tensor(a)
        optim.clip_(parameters, 3.0, optim.gradient_norms(parameters, lambda s: s), each=each)
        whole = np.sqrt(sum((a**2).sum() for a in arrays))
        for p, a in zip(parameters, arrays, strict=True):
            norm = np.linalg.norm(a) if each else whole
            np.testing.assert_allclose(p.grad.numpy(), a * min(1.0, 3.0 / norm), rtol=1e-6)  # type: ignore[union-attr]
    assert np.linalg.norm(arrays[1]) < 3  # the small one was left alone by itself, not beside the large one
