"""Drop path that computes kept samples only, against the same branches multiplied by factors, and its draws."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ssl_pretrain.eval import finetune
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssl_pretrain import backbones, plugins
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.backbones.drop_path import kept_samples
from ssl_pretrain.backbones.vit import ViT
from ssl_pretrain.conformance import one_step

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from counted import Counted

DEPTH, DIM = 3, 32
RATE = 0.4
UNIFORM = {"drop_path": RATE, "drop_path_uniform": True}
PATCHES = 16


def vit(seed: int = 0, **options: Any) -> ViT:
    torch.manual_seed(seed)
    sizes = {"dim": DIM, "depth": DEPTH, "heads": 2, "patch_size": 8}
    made = backbones.build("vit_micro", image_size=(32, 32), **{**sizes, "layer_scale": 0.7, **options})
    assert isinstance(made, ViT)
    return made.double().train()


def noise(count: int, seed: int = 1, depth: int = DEPTH) -> Tensor:
    return torch.rand(count, 2 * depth, generator=torch.Generator().manual_seed(seed))


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def by_hand(drawn: np.ndarray, rates: list[float], group: int) -> np.ndarray:
    """Factors (B, n): of each group the samples of most noise have (samples) / (kept), the others 0."""
    factors = np.zeros_like(drawn)
    for branch, rate in enumerate(rates):
        for begin in range(0, len(drawn), group):
            few = max(round(group * (1 - rate)), 1)
            some = sorted(range(begin, begin + group), key=lambda i: -drawn[i, branch])[:few]
            factors[some, branch] = group / few
    return factors


def mask(count: int) -> Tensor:
    """Who sees whom, of each image another, everyone themselves."""
    seen = torch.rand(count, PATCHES + 1, PATCHES + 1, generator=torch.Generator().manual_seed(3)) > 0.4
    return seen | torch.eye(PATCHES + 1, dtype=torch.bool)


def kept_patches(count: int) -> Tensor:
    return torch.rand(count, PATCHES, generator=torch.Generator().manual_seed(4)).argsort(1)[:, :9]


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"positions": "rope", "qk_norm": True}, {"keep": kept_patches(5)}),
    ({"positions": "rope"}, {}),
    ({"positions": "relative"}, {"keep": kept_patches(5)}),
    ({"positions": "relative"}, {"attention": mask(5)}),
    ({"norms": "post", "shortcut_decay": 0.5}, {"attention": "causal"}),
    ({"swiglu": True, "registers": 1}, {"attention": "prefix", "prefix_length": torch.tensor([1, 9, 4, 2, 16])}),
    ({"pool": "cls"}, {"pooled_only": True}),
]


@pytest.mark.parametrize(("options", "how"), CASES, ids=[f"{a}-{list(b)}" for a, b in CASES])
@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "rising"])
def test_kept_samples_alone_give_the_outputs_and_gradients_of_factors(
    options: dict[str, Any], how: dict[str, Any], uniform: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = {"drop_path": RATE, "drop_path_uniform": uniform}
    drawn, x = noise(5), images(5).requires_grad_()
    model = vit(drop_rows=True, **top, **options)
    rates = [RATE] * 6 if uniform else [0, 0, RATE / 2, RATE / 2, RATE, RATE]
    factors = by_hand(drawn.numpy(), rates, 5)
    if not uniform:  # the first block drops nothing, whichever way
        assert (factors[:, :2] == 1).all()
    assert (factors[:, 2:] == 0).any(0).all()

    def run(of: ViT) -> list[Tensor]:
        features = of(x, drop=drawn, **how)
        wanted = [x, *of.parameters()]
        grads = torch.autograd.grad(features.pooled.sin().sum(), wanted, allow_unused=True)
        return [features.pooled, *(torch.zeros(()) if g is None else g for g in grads)]

    found = run(model)
    monkeypatch.setattr(ViT, "_drop_path", lambda self, drops, packed=None: ([torch.from_numpy(factors)], []))
    expected = run(model)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)  # the scale is a float32


def test_which_samples_are_kept_is_fair_and_their_number_fixed() -> None:
    count, groups, rates = 64, 500, [0.15, 0.3, 0.5, 0.95]
    kept = np.zeros((4, count))
    for i in range(groups):
        for branch, some in enumerate(kept_samples(noise(count, i, 2), rates)):
            rows = some.rows.numpy()
            assert len(np.unique(rows)) == len(rows)
            few = {0.15: 27, 0.3: 22, 0.5: 16, 0.95: 2}[rates[branch]]
            assert [(rows < 32).sum(), (rows >= 32).sum()] == [few, few]
            assert float(some.scale) == pytest.approx(32 / few)
            kept[branch, rows] += float(some.scale)
    np.testing.assert_allclose(kept[:3] / groups, 1, atol=0.2)  # each sample's branch has the mean of one never dropped
    np.testing.assert_allclose(kept.mean(1) / groups, 1, rtol=1e-6)
    (least,) = kept_samples(noise(3)[:, :1], [0.9])
    assert least.rows.tolist() == [int(noise(3)[:, 0].argmax())]
    assert float(least.scale) == 3


@pytest.mark.parametrize("parts", [2, 3])
def test_shares_of_a_batch_draw_what_the_whole_does(parts: int) -> None:
    """Processes and micro-batches of a multiple of 32 images: the same run on any number of them."""
    model, drawn = vit(drop_rows=True, **UNIFORM), noise(96 * parts)
    x = images(96 * parts)
    with torch.no_grad():
        whole = model(x, drop=drawn).pooled
        shares = [model(a, drop=b).pooled for a, b in zip(x.chunk(parts), drawn.chunk(parts), strict=True)]
    torch.testing.assert_close(torch.cat(shares), whole, rtol=1e-10, atol=1e-10)


def test_up_to_a_tenth_each_sample_is_drawn_for_itself() -> None:
    options = {"drop_path": 0.1, "drop_path_uniform": True}
    model, other = vit(**options), vit(**options, drop_rows=True)
    with torch.no_grad():
        assert torch.equal(model(images(5), drop=noise(5)).pooled, other(images(5), drop=noise(5)).pooled)
        model.eval()
        other.eval()
        assert torch.equal(model(images(5)).pooled, other(images(5)).pooled)


@pytest.mark.parametrize("together", [False, True])
def test_it_costs_what_is_kept_and_nobody_waits(together: bool) -> None:
    def cost(depth: int, **options: Any) -> int:
        model = vit(depth=depth, **options)
        crops = images(32), images(64)[..., :16, :16]
        batches = [(x, {"drop": noise(len(x), depth=depth)}) for x in crops]
        with Counted() as counted, FlopCounterMode(display=False) as flops:
            each = model.forward_crops(batches) if together else [model(x, **how) for x, how in batches]
            torch.stack([features.pooled.sum() for features in each]).sum().backward()
        assert counted.waits == []
        return flops.get_total_flops()

    half = {"drop_path": 0.5, "drop_path_uniform": True, "drop_rows": True}
    of_a_block = cost(2) - cost(1)
    assert cost(2, **half) - cost(1, **half) == of_a_block / 2
    assert cost(2, **half | {"drop_rows": False}) - cost(1, **half | {"drop_rows": False}) == of_a_block


def test_under_autocast_the_stream_stays_float32() -> None:
    torch.manual_seed(0)
    model = vit(drop_rows=True, **UNIFORM).float()
    exact = model(images(5).float(), drop=noise(5), blocks=(0,))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images(5).float(), drop=noise(5), blocks=(0,))
        both = model.forward_crops([(images(5).float(), {"drop": noise(5)}), (images(3).float(), {"drop": noise(3)})])
    assert {found.blocks[0].dtype, found.pooled.dtype, both[0].pooled.dtype} == {torch.float32}
    torch.testing.assert_close(found.pooled, exact.pooled, atol=0.05, rtol=0.05)
    torch.testing.assert_close(both[0].pooled, found.pooled, atol=0.05, rtol=0.05)


@pytest.mark.filterwarnings("default")  # the tracer looks at gradients of tensors that have none
def test_it_is_one_graph_for_the_compiler() -> None:
    model = vit(drop_rows=True, positions="rope", **UNIFORM)

    def together(large: Tensor, small: Tensor) -> list[Tensor]:
        batches = [(large, {"drop": noise_of_large}), (small, {"drop": noise_of_small})]
        return [features.pooled for features in model.forward_crops(batches)]

    noise_of_large, noise_of_small = noise(4), noise(6)
    crops = images(4), images(6)[..., :16, :16]
    compiled = torch.compile(together, backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(*crops), together(*crops), strict=True):
        torch.testing.assert_close(one, other)


def test_the_last_block_gives_all_tokens_of_a_row_whose_samples_are_chosen() -> None:
    model = vit(drop_rows=True, pool="cls", **UNIFORM)
    batches = [(images(4), {"drop": noise(4)}), (images(6)[..., :16, :16], {"drop": noise(6)})]
    less = [(x, how | {"pooled_only": True}) for x, how in batches]
    with torch.no_grad():
        for one, other in zip(model.forward_crops(less), model.forward_crops(batches), strict=True):
            assert torch.equal(one.pooled, other.pooled)


def test_fine_tuning_drops_its_own_way() -> None:
    model = vit(drop_rows=True, **UNIFORM)
    finetune.prepare(model, finetune.Config(drop_path=0.2), torch.Generator())
    assert (model.config.drop_path, model.config.drop_path_uniform, model.config.drop_rows) == (0.2, False, False)


@pytest.mark.parametrize("name", plugins.own("ssl_pretrain.methods"))
def test_every_method_draws_the_noise(name: str) -> None:
    method = one_step.build(name).train()
    for part in method.modules():
        if isinstance(part, Backbone):
            part.config = dataclasses.replace(part.config, drop_path=0.3)
    batch = one_step.batch(method)
    with_drops = method(batch, one_step.step())
    assert torch.isfinite(with_drops.total)
    for part in method.modules():
        if isinstance(part, Backbone):
            part.config = dataclasses.replace(part.config, drop_path=0.0)
    assert not torch.equal(with_drops.total, method(batch, one_step.step()).total)
