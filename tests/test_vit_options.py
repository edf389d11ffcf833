"""The ViT's stem of three steps, parallel branches, keys without bias, shared relative positions, and rotary positions that
change in training: against timm's models with the same weights where timm has them, else against NumPy."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, losses
from oracles import import_timm
from ssl_pretrain.launch.pretrain import main
from torch import Tensor, nn

from ssl_pretrain import backbones, checkpoint, encoder
from ssl_pretrain.backbones import forms
from ssl_pretrain.backbones.hmlp_stem import HMLPStem
from ssl_pretrain.backbones.parallel_block import spread
from ssl_pretrain.backbones.positions import augmented, rope_angles
from ssl_pretrain.backbones.vit import ViT
from ssl_pretrain.distributed import batch_norm
from ssl_pretrain.distributed.batch_norm import BatchNorm2d
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.ema_teacher import ema_copy

SIZE, DIM, DEPTH, HEADS = (32, 48), 64, 2, 4  # a grid of 4 x 6 patches of 8 pixels
HMLP: dict[str, Any] = {"stem": "hmlp"}
PARALLEL: dict[str, Any] = {"parallel_branches": 2}
BEIT: dict[str, Any] = {"positions": "relative", "pool": "cls", "k_bias": False}
SHARED: dict[str, Any] = {**BEIT, "shared_relative": True}
ROPE: dict[str, Any] = {"positions": "rope", "rope_shift": 0.5, "rope_jitter": 1.5, "rope_rescale": 2.0}
ALL = {
    "hmlp": HMLP,
    "parallel": PARALLEL,
    "parallel, class token, layer scale": {**PARALLEL, "pool": "cls", "layer_scale": 0.5, "registers": 2},
    "keys without bias": {"k_bias": False},
    "shared relative positions": SHARED,
    "rotary positions that change": ROPE,
    "all": {**HMLP, **ROPE, "parallel_branches": 3, "k_bias": False, "swiglu": True, "qk_norm": True},
}  # fmt: skip
each_option = pytest.mark.parametrize("options", ALL.values(), ids=ALL)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vit(size: tuple[int, int] = SIZE, **options: Any) -> ViT:
    """A small ViT in eval mode whose every parameter is noise."""
    options = {"patch_size": 8, "dim": DIM, "depth": DEPTH, "heads": HEADS, **options}
    model = backbones.build("vit_micro", image_size=size, **options)
    assert isinstance(model, ViT)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.15 * draw(*parameter.shape, seed=i) + (0.5 if parameter.ndim == 1 else 0.0))
    return model.eval()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


# ---- The same as timm.


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (PARALLEL, SIZE),
        ({**PARALLEL, "pool": "cls", "layer_scale": 0.5, "registers": 2, "qk_norm": True}, SIZE),
        ({"k_bias": False}, SIZE),
        (BEIT, (32, 32)),
        (SHARED, (32, 32)),
    ],
    ids=str,
)  # fmt: skip
def test_outputs_and_gradients_are_timms(options: dict[str, Any], size: tuple[int, int]) -> None:
    timm = import_timm()
    ours = vit(size, **options)
    form = forms.timm_form(ours)
    assert isinstance(form, forms.Form), form
    theirs = timm.create_model(form.architecture, num_classes=0, **form.arguments).eval()
    weights = {name: value.clone() for name, value in ours.state_dict().items()}
    if not ours.config.k_bias:
        for name in weights:
            if name.endswith("qkv.bias"):
                weights[name].chunk(3)[1].zero_()  # the noise there has no effect
    theirs.load_state_dict(form.theirs(weights), strict=False)
    x = draw(2, 3, *size, seed=9)
    found, expected = ours(x), theirs.forward_features(x)
    tokens = found.patches if found.tokens is None else found.tokens
    close(tokens, expected)
    square = torch.linspace(0.5, 1.5, tokens.numel()).view_as(tokens)
    (tokens.square() * square).sum().backward()
    (expected.square() * square).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    ours_by_theirs = form.theirs({n: p.grad for n, p in ours.named_parameters() if p.grad is not None})
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        # What changes no output (a bias of keys) has rounding errors as its gradient.
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        mine = ours_by_theirs[name]
        if name == "pos_embed" and ours.config.registers:
            continue  # registers have positions there, which are 0 at the start, and none here
        close(mine / scale, gradient / scale, 1e-4)
    assert len(gradients) > 10 * DEPTH


@pytest.mark.parametrize("options", [PARALLEL, SHARED, {"k_bias": False}], ids=str)
def test_their_exports_open_in_timm(options: dict[str, Any], tmp_path: Path) -> None:
    timm = import_timm()
    ours = vit((32, 32), **options)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if not ours.config.k_bias and name.endswith("qkv.bias"):
                parameter.chunk(3)[1].zero_()
    written = Encoder(ours, "vit_micro", Preprocessing.for_size((32, 32), (0.5,) * 3, (0.2,) * 3), {})
    encoder.save(tmp_path, written)
    x = draw(2, 3, 32, 32, seed=3)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        close(theirs(x), written(x).pooled)
        again = encoder.load(tmp_path)
        assert again.fingerprint == written.fingerprint
        assert torch.equal(again(x).pooled, written(x).pooled)


@pytest.mark.parametrize("options", [HMLP, ROPE, ALL["all"]], ids=str)
def test_an_export_is_the_encoder(options: dict[str, Any], tmp_path: Path) -> None:
    """Also of what timm has not; rotary positions that changed in training are as they are afterwards."""
    written = Encoder(vit(**options), "vit_micro", Preprocessing.for_size(SIZE, (0.5,) * 3, (0.2,) * 3), {})
    encoder.save(tmp_path, written)
    x = draw(2, 3, *SIZE, seed=3)
    assert torch.equal(encoder.load(tmp_path)(x).patches, written(x).patches)


# ---- What holds for every option.


@each_option
def test_keep_and_replace_are_a_plain_forward(options: dict[str, Any]) -> None:
    """All patches kept, in another order, give the same patches in that order; replaced ones are not looked at."""
    model, x = vit(**options), draw(2, 3, *SIZE, seed=1)
    whole = model(x)
    order = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    kept = model(x, keep=order)
    close(kept.patches, whole.patches.gather(1, order[:, :, None].expand(-1, -1, DIM)))
    masked, token = torch.zeros(2, 24, dtype=torch.bool), draw(DIM, seed=5)
    masked[:, [0, 5, 17]] = True
    replaced = model(x, replace=(masked, token)).patches
    assert not torch.allclose(replaced, whole.patches)
    other = x.clone()
    other[:, :, :8, :8] = 7.0  # patch 0
    assert torch.equal(model(other, replace=(masked, token)).patches, replaced)


@each_option
def test_crops_together_give_what_each_gives_alone(options: dict[str, Any]) -> None:
    model = vit((32, 32), **options)
    large, small = draw(2, 3, 32, 32, seed=1), draw(4, 3, 16, 16, seed=2)
    together = model.forward_crops([(large, {"pooled_only": True}), (small, {"pooled_only": True})])
    for found, x in zip(together, (large, small), strict=True):
        close(found.pooled, model(x).pooled)


@each_option
def test_every_parameter_has_a_layer_and_a_gradient(options: dict[str, Any]) -> None:
    model = vit(**options)
    model(draw(2, 3, *SIZE)).patches.square().sum().backward()
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert set(layers.values()) == set(range(DEPTH + 2))
    for name, parameter in model.named_parameters():
        assert layers[name] == (
            int(name.split(".")[1]) + 1 if name.startswith("blocks.") else DEPTH + 1 if name[:5] == "norm." else 0
        )
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stem": "hmlp", "patch_size": 2}, "--stem hmlp needs multiples of 4"),
        ({"parallel_branches": 2, "norms": "post"}, "--parallel-branches does not go with"),
        ({"parallel_branches": 2, "drop_rows": True}, "--parallel-branches does not go with"),
        ({"shared_relative": True}, "--shared-relative is of --positions relative, not of learned"),
        ({"rope_rescale": 2.0}, "--rope-rescale is of --positions rope, not of learned"),
        ({"positions": "rope", "rope_jitter": 0.5}, "--rope-jitter is 0.5; it must be at least 1"),
    ],
)
def test_a_mistake_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        vit(**options)


# ---- The stem.


def stem_of(patches: np.ndarray, stem: HMLPStem, counted: np.ndarray | None) -> np.ndarray:
    """Patches (M, C, p, p) to (M, D) in float64, as matrices on ever larger squares. counted: which patches the statistics
    are of, bool (M,); None: the running statistics."""
    parts = [p for p in stem.proj if not isinstance(p, nn.GELU)]
    x = patches.astype(np.float64)
    for number, (conv, norm) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        weight = conv.weight.detach().double().numpy()
        out, _, k, _ = weight.shape
        m, c, side, _ = x.shape
        cells = x.reshape(m, c, side // k, k, side // k, k).transpose(0, 2, 4, 1, 3, 5).reshape(m, -1, c * k * k)
        y = cells @ weight.reshape(out, -1).T + conv.bias.detach().double().numpy()
        if counted is None:
            mean, var = norm.running_mean.double().numpy(), norm.running_var.double().numpy()
        else:
            mean, var = y[counted].mean((0, 1)), y[counted].var((0, 1))
        y = (y - mean) / np.sqrt(
            var + norm.eps
        ) * norm.weight.detach().double().numpy() + norm.bias.detach().double().numpy()
        if number < 2:
            y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = y.transpose(0, 2, 1).reshape(m, out, side // k, side // k)
    return x[:, :, 0, 0]


def cut(x: Tensor, p: int) -> np.ndarray:
    b, c, h, w = x.shape
    return x.numpy().reshape(b, c, h // p, p, w // p, p).transpose(0, 2, 4, 1, 3, 5).reshape(-1, c, p, p)


@pytest.mark.parametrize("patch", [8, 16, 4])
@pytest.mark.parametrize("training", [False, True])
def test_the_stem_is_what_numpy_computes(patch: int, training: bool) -> None:
    torch.manual_seed(0)
    stem = HMLPStem(patch, 3, 32).train(training)
    for part in stem.modules():
        if isinstance(part, nn.BatchNorm2d) or hasattr(part, "running_mean"):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    x = draw(2, 3, 2 * patch, 3 * patch)
    everything = np.ones(12, bool) if training else None
    expected = stem_of(cut(x, patch), stem, everything)
    found = stem(x).detach().reshape(12, 32)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_statistics_are_those_of_the_patches_that_are_seen() -> None:
    """Kept ones, or those that no mask token replaces; both together, too. The running statistics as well."""
    torch.manual_seed(0)
    patch, x = 8, draw(3, 3, 16, 32)
    keep = torch.tensor([[1, 2, 7], [0, 4, 5], [6, 3, 1]])
    rows = (keep + 8 * torch.arange(3)[:, None]).flatten().numpy()
    chosen = np.zeros(24, bool)
    chosen[rows] = True
    masked = torch.from_numpy(~chosen).view(3, 8)

    def run(**options: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        stem = HMLPStem(patch, 3, 32).train()
        return stem(x, **options).detach(), torch.cat([v for n, v in stem.state_dict().items() if "running" in n])

    torch.manual_seed(1)
    expected = stem_of(cut(x, patch), HMLPStem(patch, 3, 32), chosen)[rows]
    of_kept, statistics = run(keep=keep)
    np.testing.assert_allclose(of_kept.reshape(9, 32), expected, rtol=1e-4, atol=1e-4)
    of_replaced, also = run(masked=masked)
    np.testing.assert_allclose(of_replaced.reshape(24, 32)[rows], expected, rtol=1e-4, atol=1e-4)
    close(also, statistics)
    both = torch.zeros(3, 8, dtype=torch.bool)
    both[0, 2] = True  # a kept patch
    of_both, _ = run(keep=keep, masked=both)
    chosen[2] = False
    torch.manual_seed(1)
    expected = stem_of(cut(x, patch), HMLPStem(patch, 3, 32), chosen)[rows]
    seen = chosen[rows]  # the result of the replaced one is not used
    np.testing.assert_allclose(of_both.reshape(9, 32)[seen], expected[seen], rtol=1e-4, atol=1e-4)


def test_pixels_of_replaced_patches_change_nothing_in_training() -> None:
    masked, token = torch.zeros(2, 24, dtype=torch.bool), draw(DIM, seed=5)
    masked[:, ::2] = True
    found = []
    for value in (0.0, 50.0):
        model = vit(stem="hmlp").train()
        x = draw(2, 3, *SIZE, seed=1)
        pixels = masked.view(2, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
        x = torch.where(pixels, torch.tensor(value), x).requires_grad_()
        y = model(x, replace=(masked, token)).patches
        y.square().sum().backward()
        assert x.grad is not None
        assert not x.grad[pixels.expand_as(x)].any()
        found.append((y.detach(), model.patch_embed.state_dict()["proj.1.running_mean"]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("none", [False, True], ids=["some", "none"])
def test_statistics_are_those_of_all_processes(none: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with different numbers of seen patches, one after the other, give what one gives for all images; also
    where one has none."""
    x, seen = draw(4, 3, 8, 8), torch.ones(4, 1, 4, 4, dtype=torch.bool)
    seen[0, :, :3], seen[3, :, 1] = False, False
    seen[2:] &= not none
    seen = seen.repeat_interleave(2, 2).repeat_interleave(2, 3)
    whole = BatchNorm2d(3).train()
    expected = whole(x, seen)
    halves = ((x[:2], seen[:2]), (x[2:], seen[2:]))
    told: list[Tensor] = []
    monkeypatch.setattr(batch_norm, "size", lambda: 2)

    def collect(rows: Tensor) -> Tensor:
        told.append(rows)
        return torch.cat([rows, rows])

    monkeypatch.setattr(batch_norm, "gather", collect)
    for half in halves:
        BatchNorm2d(3).train()(*half)
    monkeypatch.setattr(batch_norm, "gather", lambda rows: torch.cat(told))
    for half, wanted in zip(halves, (expected[:2], expected[2:]), strict=True):
        norm = BatchNorm2d(3).train()
        close(norm(*half), wanted)
        close(norm.running_mean, whole.running_mean)  # type: ignore[arg-type]
        close(norm.running_var, whole.running_var)  # type: ignore[arg-type]


# ---- Parallel branches.


def test_it_has_the_parameters_of_a_deeper_vit() -> None:
    count = {
        n: sum(p.numel() for p in vit(depth=6 // n, parallel_branches=n).parameters()) for n in (1, 2, 3)
    }  # fmt: skip
    assert count[1] == count[2] == count[3]


def test_every_branch_drops_for_itself() -> None:
    """The output with one branch dropped is that of a model without it, and each noise drops its own."""
    noise = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0))
    wide = spread(noise, 2)
    assert wide.shape == (20_000, 8)
    assert torch.equal(wide[:, ::2], noise)
    dropped = (wide < 0.3).double()
    np.testing.assert_allclose(dropped.mean(0), 0.3, atol=0.015)
    together = dropped.T @ dropped / len(dropped)
    np.testing.assert_allclose(together[~np.eye(8, dtype=bool)], 0.09, atol=0.012)
    assert spread(noise[:3], 3).shape == (3, 12)

    model, x = vit(parallel_branches=2, drop_path=0.5, drop_path_uniform=True).train(), draw(1, 3, *SIZE)
    u = noise[:1]
    kept = (spread(u, 2) >= 0.5)[0]
    assert 0 < kept.sum() < 8
    expected = vit(parallel_branches=2)
    with torch.no_grad():
        for i, block in enumerate(expected.blocks):
            for j in range(2):
                of_attention, of_mlp = (2.0 * float(kept[4 * i + 2 * k + j]) for k in range(2))
                for part, factor in ((block.attns[j]["attn"].proj, of_attention), (block.ffns[j]["mlp"].fc2, of_mlp)):
                    part.weight.mul_(factor)
                    part.bias.mul_(factor)
    close(model(x, drop=u).patches, expected(x).patches)


# ---- Keys without bias.


def test_the_bias_of_keys_stays_zero() -> None:
    torch.manual_seed(0)
    model = backbones.build(
        "vit_micro", image_size=SIZE, patch_size=8, dim=DIM, depth=1, heads=HEADS, k_bias=False, positions="rope"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(draw(2, 3, *SIZE)).patches[:, :3].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    q, k, v = model.get_parameter("blocks.0.attn.qkv.bias").chunk(3)
    assert q.all()
    assert not k.any()
    assert v.all()
    assert (
        backbones.build("vit_micro", image_size=SIZE, patch_size=8, qkv_bias=False, k_bias=False)
        .blocks[0]
        .attn.qkv.bias
        is None
    )


# ---- Rotary positions that change.


def test_coordinates_are_shifted_then_stretched() -> None:
    grid, head = (4, 6), 16
    changes = [augmented(key, grid, 0.5, 1.5, 2.0) for key in range(300)]
    shifts = np.array([[axis[0] for axis in change] for change in changes if change])
    factors = np.log([[axis[1] for axis in change] for change in changes if change])
    assert 0.45 < abs(shifts).max() <= 0.5
    assert abs(factors).max() <= math.log(3.0)
    assert abs(factors[:, 0] - factors[:, 1]).max() <= 2 * math.log(1.5)  # one of both axes, one of each
    assert np.std(factors[:, 0] - factors[:, 1]) == pytest.approx(math.log(1.5) * math.sqrt(2 / 3), rel=0.15)
    assert np.std(factors.mean(1)) == pytest.approx(math.sqrt(math.log(2) ** 2 / 3 + math.log(1.5) ** 2 / 6), rel=0.15)
    assert abs(factors.mean()) < 0.1
    only = augmented(0, grid, None, None, 2.0)
    assert only is not None
    assert only[0][0] == only[1][0] == 0
    assert only[0][1] == only[1][1]
    assert augmented(0, grid, None, None, None) is None

    change = ((0.25, 1.5), (-0.5, 0.8))
    found = rope_angles(grid, head, None, change).reshape(4, 6, 8)
    periods = 100.0 ** (np.arange(4) / 4)
    y = ((2 * np.arange(4) + 1) / 4 - 1 + 0.25) * 1.5
    x = ((2 * np.arange(6) + 1) / 6 - 1 - 0.5) * 0.8
    expected = np.concatenate([np.broadcast_to((2 * np.pi * y[:, None] / periods)[:, None], (4, 6, 4)),
                               np.broadcast_to(2 * np.pi * x[:, None] / periods, (4, 6, 4))], axis=2)  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_draw_is_the_steps_and_there_is_none_in_evaluation_nor_in_teachers() -> None:
    model, x = vit(**ROPE), draw(2, 3, *SIZE)
    plain = model(x).patches
    model.positions_key = 5
    assert torch.equal(model(x).patches, plain)
    model.train()
    changed = model(x).patches
    assert not torch.allclose(changed, plain, atol=1e-3)
    assert torch.equal(model(x).patches, changed)  # again, in the same step
    close(model(x[1:]).patches, changed[1:])  # another micro-batch of it
    model.positions_key = 6
    assert not torch.allclose(model(x).patches, changed, atol=1e-3)
    assert torch.equal(ema_copy(vit(**ROPE)).train()(x).patches, plain)


def test_a_run_with_all_of_them_resumes_bit_for_bit(photos: Path, tmp_path: Path) -> None:
    words = [
        "--method",
        "mae",
        "--data",
        str(photos),
        "--workers",
        "0",
        "--steps",
        "4",
        "--log-every",
        "1",
        "--no-score",
    ]
    words += [*TINY, "--positions", "rope", "--no-k-bias", "--drop-path", "0.2"]
    changing = [*words, "--rope-rescale", "2", "--rope-jitter", "1.5"]
    all_of_them = [*changing, "--stem", "hmlp", "--parallel-branches", "2", "--checkpoint-every", "2"]
    out = tmp_path / "run"
    assert main([*all_of_them, "--out", str(out)]) == 0
    curve, folder = losses(out), out / "checkpoints"
    whole = {name: value.clone() for name, value in checkpoint.load(folder, 4)["method"].items()}
    shutil.rmtree(folder / "step-00000004")
    assert main([*all_of_them, "--out", str(out)]) == 0
    assert losses(out) == curve
    assert all(torch.equal(value, whole[name]) for name, value in checkpoint.load(folder, 4)["method"].items())
    # The step decides on the coordinates: micro-batches of it see the same, and without the flags there are others.
    for name, argv in (("plain", words), ("changing", changing), ("accumulated", [*changing, "--accumulate", "2"])):
        assert main([*argv, "--out", str(tmp_path / name)]) == 0
    assert losses(tmp_path / "accumulated") == pytest.approx(losses(tmp_path / "changing"), rel=1e-4)
    assert losses(tmp_path / "plain") != pytest.approx(losses(tmp_path / "changing"), rel=1e-4)
