"""I-JEPA: its masks against a simulation written from the paper, its loss, gradient and teacher against float64 NumPy."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_constant_, make_zero_
from ssl_pretrain.methods.ijepa import IJEPA

from ssl_pretrain import backbones
from ssl_pretrain.conformance import one_step
from ssl_pretrain.conformance.one_step import after_step
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.multi_block_masks import block_size, multi_block_masks
from ssl_pretrain.pretext import Batch, Step

KERNELS = 313  # of a step: python tests/kernels.py ijepa
DEVICE_KERNELS = 256  # with the optimiser, on an accelerator: python tests/device.py ijepa
ON_THE_HOST = ["_local_scalar_dense"]  # of a tensor that is on the CPU wherever the run is: nothing waits

GRID = (14, 14)


def build(size: tuple[int, int] = (32, 48), **knobs: object) -> IJEPA:
    torch.manual_seed(0)
    options = {**backbones.defaults("vit_micro"), "patch_size": 8, "depth": 2, **IJEPA.recipe.encoder}
    encoder = backbones.build("vit_micro", image_size=size, **options)
    small = {"predictor_dim": 32, "predictor_depth": 1, "predictor_heads": 4, **knobs}
    method = IJEPA(encoder, IJEPA.Config(**small)).double()
    method.prepare(4)
    with torch.no_grad():
        for weight in method.teacher.parameters():  # not the encoder's own, as after some steps
            weight.add_(0.02 * torch.randn(weight.shape, dtype=weight.dtype))
    return method


def step(batch: int = 4, noise: int = 1, rows: slice | None = None, at: int = 0) -> Step:
    rows = slice(0, batch) if rows is None else rows
    return Step(step=at, total=10, noise=noise, rows=rows, batch_size=batch, device=torch.device("cpu"))


def images(batch: int = 4, size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def a_batch(x: torch.Tensor) -> Batch:
    return Batch(views={"image": x}, index=torch.arange(len(x)))


# ---- Masks


def simulated(rng: np.random.Generator, batch: int, grid: tuple[int, int], reference: bool) -> Iterator[tuple]:
    """One step's masks, image by image: the context's patches before it is cut short, and the targets'."""
    less = 1 if reference else 0

    def size(scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
        r = rng.random()
        area = int(grid[0] * grid[1] * (scale[0] + r * (scale[1] - scale[0])))
        ratio = aspect[0] + r * (aspect[1] - aspect[0])
        h, w = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        return max(1, min(h, grid[0] - less)), max(1, min(w, grid[1] - less))

    def place(h: int, w: int) -> set[int]:
        top, left = rng.integers(0, grid[0] - h + 1 - less), rng.integers(0, grid[1] - w + 1 - less)
        return {r * grid[1] + c for r in range(top, top + h) for c in range(left, left + w)}

    target, around = size((0.15, 0.2), (0.75, 1.5)), size((0.85, 1.0), (1.0, 1.0))
    enough = min(10, max(1, around[0] * around[1] // 4))
    for _ in range(batch):
        blocks = [place(*target) for _ in range(4)]
        block = place(*around)
        for taken in range(4, -1, -1):
            context = block - set().union(*blocks[:taken])
            if len(context) >= enough:
                break
        yield context, blocks


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("grid", [GRID, (8, 8), (4, 7)])
def test_statistics_of_the_masks_are_those_of_a_simulation(grid: tuple[int, int], reference: bool) -> None:
    steps, batch, patches = 100, 12, grid[0] * grid[1]
    rng = np.random.default_rng(0)
    seen, targeted, lengths, areas = [], [], [], []
    theirs_seen, theirs_targeted, theirs_lengths, theirs_areas = [], [], [], []
    for number in range(steps):
        context, targets = multi_block_masks(step(batch, number), grid, reference=reference)
        lengths.append(context.shape[1])
        areas.append(targets.shape[2])
        targeted.append(np.bincount(targets.flatten(), minlength=patches) / batch)
        seen.append(np.bincount(context.flatten(), minlength=patches) / batch / context.shape[1])
        drawn = list(simulated(rng, batch, grid, reference))
        shortest = min(len(context) for context, _ in drawn)
        theirs_lengths.append(shortest)
        theirs_areas.append(len(drawn[0][1][0]))
        flat = [p for _, blocks in drawn for block in blocks for p in block]
        theirs_targeted.append(np.bincount(flat, minlength=patches) / batch)
        kept = [sorted(c)[:shortest] if reference else rng.permutation(sorted(c))[:shortest] for c, _ in drawn]
        theirs_seen.append(np.bincount(np.concatenate(kept), minlength=patches) / batch / shortest)

    def same(ours: list, theirs: list) -> None:  # means over independent steps, at each patch
        a, b = np.array(ours, dtype=float), np.array(theirs, dtype=float)
        error = np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / steps) + 1e-9
        assert np.all(np.abs(a.mean(0) - b.mean(0)) < 4.5 * error), (a.mean(0), b.mean(0))

    for ours, theirs in (
        (lengths, theirs_lengths),
        (areas, theirs_areas),
        (targeted, theirs_targeted),
        (seen, theirs_seen),
    ):
        same(ours, theirs)


def test_every_patch_is_reached_but_not_in_the_reference() -> None:
    for reference in (False, True):
        context, targets = zip(
            *(multi_block_masks(step(64, n), GRID, reference=reference) for n in range(40)), strict=True
        )
        found = np.bincount(torch.cat([c.flatten() for c in context]), minlength=196).reshape(14, 14)
        hidden = np.bincount(torch.cat([t.flatten() for t in targets]), minlength=196).reshape(14, 14)
        if not reference:
            assert found.min() > 0.1 * found.max()
            assert hidden.min() > 0
            continue
        assert not hidden[13].any()
        assert not hidden[:, 13].any()
        assert not found[13].any()
        assert not found[:, 13].any()
        assert found[12].sum() < 0.2 * found[0].sum()  # the end of the longer contexts was cut off


def test_one_uniform_number_gives_the_size_and_the_shape_of_a_block() -> None:
    # 196 * 0.15 = 29.4; sqrt(29 * 0.75) = 4.66, sqrt(29 / 0.75) = 6.22. 196 * 0.2 - 1 ulp = 39; sqrt(39 * 1.5) = 7.65
    assert block_size(GRID, (0.15, 0.2), (0.75, 1.5), 0.0) == (5, 6)
    assert block_size(GRID, (0.15, 0.2), (0.75, 1.5), 0.999) == (8, 5)
    assert block_size(GRID, (0.85, 1.0), (1.0, 1.0), 0.999) == (14, 14)
    assert block_size(GRID, (0.85, 1.0), (1.0, 1.0), 0.999, margin=1) == (13, 13)
    assert block_size((2, 2), (0.15, 0.2), (0.75, 1.5), 0.5) == (1, 1)


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (2, 9)])
@pytest.mark.parametrize("reference", [False, True])
def test_small_grids_have_masks_too(grid: tuple[int, int], reference: bool) -> None:
    for number in range(30):
        context, targets = multi_block_masks(step(32, number), grid, reference=reference)
        assert context.shape[1] >= 1
        assert targets.shape[2] >= 1
        for row in torch.cat([context, targets.flatten(1)], 1):
            assert 0 <= int(row.min()) <= int(row.max()) < grid[0] * grid[1]
        assert all(len(set(row.tolist())) == context.shape[1] for row in context)


def test_a_context_holds_no_target_unless_too_little_were_left() -> None:
    for number in range(20):
        context, targets = multi_block_masks(step(32, number), GRID, min_keep=1)
        for row, blocks in zip(context.tolist(), targets.flatten(1).tolist(), strict=True):
            assert not set(row) & set(blocks)
    leaks = []
    for number in range(20):
        context, targets = multi_block_masks(step(32, number), GRID, min_keep=40, target_scale=(0.3, 0.4))
        assert context.shape[1] >= 40
        pairs = zip(context.tolist(), targets.tolist(), strict=True)
        leaks += [bool(set(row) & set(blocks[-1])) for row, blocks in pairs]
        assert not any(
            set(row) & set(blocks[0]) for row, blocks in zip(context.tolist(), targets.tolist(), strict=True)
        )
    assert any(leaks)
    assert not all(leaks)


def test_masks_are_the_same_however_the_batch_is_divided() -> None:
    whole = multi_block_masks(step(8), GRID)
    parts = [multi_block_masks(step(8, rows=r), GRID) for r in (slice(0, 3), slice(3, 8), torch.tensor([7, 0]))]
    for i in (0, 1):
        assert torch.equal(torch.cat([parts[0][i], parts[1][i]]), whole[i])
        assert torch.equal(parts[2][i], whole[i][[7, 0]])


# ---- Loss


def normed(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def test_loss_and_gradient_against_numpy() -> None:
    method, x = build(), images()
    torch.nn.init.normal_(method.predictor_proj.bias, std=1.5)  # errors on both sides of the kink
    found = method(a_batch(x), step())
    found.total.backward()
    context, targets = multi_block_masks(step(), (4, 6))
    with torch.no_grad():
        predicted = method.predict(x, context, targets, step()).numpy()
        features = normed(method.teacher(x).patches.numpy())
    wanted = np.stack([[features[i, block] for block in targets[i].numpy()] for i in range(4)])
    error = predicted - wanted
    assert (np.abs(error) > 1).any()
    assert (np.abs(error) < 1).any()
    each = np.where(np.abs(error) < 1, error**2 / 2, np.abs(error) - 0.5)
    assert float(found.total.detach()) == pytest.approx(each.mean(), rel=1e-5)
    np.testing.assert_allclose(found.per_sample.numpy(), each.mean((1, 2, 3)), rtol=1e-5)
    gradient = np.clip(error, -1, 1).sum((0, 1, 2)) / error.size
    np.testing.assert_allclose(method.predictor_proj.bias.grad.numpy(), gradient, rtol=1e-4, atol=1e-7)
    spread = features.std(0).mean()
    assert float(found.terms["target_std"]) == pytest.approx(spread, rel=1e-5)
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


def test_the_predictor_sees_the_context_and_where_its_own_block_is() -> None:
    method, x = build(), images()
    context, targets = method.masks(x, step())
    with torch.no_grad():
        whole = method.predict(x, context, targets, step())
        for t in range(4):  # a block alone, with the predictor's own parts put together by hand
            block = targets[:, t]
            seen = method.predictor_embed(method.encoder(x, keep=context).patches) + method.predictor_pos_embed[context]
            tokens = torch.cat([seen, method.mask_token + method.predictor_pos_embed[block]], 1)
            for layer in method.predictor_blocks:
                tokens = layer(tokens)
            alone = method.predictor_proj(method.predictor_norm(tokens))[:, context.shape[1] :]
            torch.testing.assert_close(whole[:, t], alone)
    patches = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, N, C, p, p)
    hidden = torch.ones(4, 24, dtype=torch.bool).scatter(1, context, False)
    patches = torch.where(hidden[..., None, None, None], patches + 1, patches)
    other = patches.unflatten(1, (4, 6)).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    assert not torch.equal(other, x)
    with torch.no_grad():
        assert torch.equal(method.predict(other, context, targets, step()), whole)


def test_the_teacher_follows_with_a_linearly_rising_momentum_and_is_exported() -> None:
    method = build(momentum=0.9)
    ours, theirs = (part.blocks[0].mlp.fc1.weight.detach().numpy() for part in (method.encoder, method.teacher))
    expected = 0.94 * theirs + 0.06 * ours  # four tenths of the way from 0.9 to 1
    after_step(method, step(at=4), {})
    np.testing.assert_allclose(method.exported().blocks[0].mlp.fc1.weight.numpy(), expected, rtol=1e-4, atol=1e-8)
    bad = step(at=4)
    bad.ok = torch.tensor(False)
    after_step(method, bad, {})
    np.testing.assert_allclose(method.teacher.blocks[0].mlp.fc1.weight.numpy(), expected, rtol=1e-4, atol=1e-8)


def test_collapsed_state_has_the_stated_loss() -> None:
    method = one_step.build("ijepa")
    make_constant_(method.teacher)
    features = np.linspace(-1, 1, method.encoder.dim)
    make_zero_(method.predictor_proj)
    with torch.no_grad():
        method.predictor_proj.bias.copy_(torch.from_numpy(features / features.std()))  # normalised over the channels
    check_stated(method, dict.fromkeys(("loss", "target_std"), losses_of(method)))


def test_the_way_contexts_are_cut_short_is_a_knob() -> None:
    x = images(16)
    ours, theirs = (build(context_truncation=kind).masks(x, step(16))[0] for kind in ("random", "reference"))
    assert int(theirs.max()) < 18  # of a 4 x 6 grid, not the last row
    assert bool((theirs % 6 < 5).all())
    assert int(ours.max()) >= 18


def test_other_image_sizes_than_the_configured_one() -> None:
    found = build().float()(a_batch(images(2, (48, 32)).float()), step(2))
    assert torch.isfinite(found.total)


@pytest.mark.parametrize(
    "knobs",
    [{"targets": 0}, {"target_scale": (0.3, 0.2)}, {"context_scale": (0.5, 1.5)}, {"target_aspect": (0.0, 1.0)},
     {"predictor_dim": 30}, {"predictor_heads": 5}, {"momentum": 1.0}, {"min_keep": 0}, {"size": (8, 32)}],
)  # fmt: skip
def test_knobs_that_cannot_be(knobs: dict) -> None:
    with pytest.raises(UserError, match="--"):
        build(**knobs)
