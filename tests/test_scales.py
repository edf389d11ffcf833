"""Quantisation over several scales (VAR): ids, sums, losses and gradients against NumPy in float64, usage, the export."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from method_helpers import perturb_
from scale_oracles import convs_of, numpy_area, numpy_conv, numpy_cubic, numpy_levels
from ssl_pretrain.methods.vqtok import VQTok

from ssl_pretrain import tokenizer
from ssl_pretrain.backbones.quantizer import USAGE, Quantizer
from ssl_pretrain.backbones.scales import Scales, read_scales, resampled
from ssl_pretrain.conformance import one_step
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.tokenizer import Tokenizer

Weights = dict[str, np.ndarray]


# ---- The scales


@pytest.mark.parametrize(("old", "new"), [((4, 4), (1, 2)), ((5, 7), (2, 3)), ((2, 3), (8, 7)), ((1, 1), (4, 5))])
def test_resampling_against_numpy(old: tuple[int, int], new: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal((*old, 3))
    maps = torch.from_numpy(x).permute(2, 0, 1)[None]
    for mode, oracle in (("area", numpy_area), ("bicubic", numpy_cubic)):
        found = resampled(maps, new, mode)[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found, oracle(x, new), atol=1e-12)


@pytest.mark.parametrize("sides", [(1, 2), (1, 2, 3), (1, 2, 4, 8), (1, 2, 3, 4, 5), tuple(range(1, 11))])
def test_every_convolution_serves_neighbouring_scales(sides: tuple[int, ...]) -> None:
    used = Scales(sides, 4)._conv_of
    assert used == sorted(used)
    assert set(used) == set(range(min(4, len(sides))))


def test_grids_of_scales() -> None:
    scales = Scales((1, 2, 4), 3)
    assert scales.shapes((4, 4)) == ((1, 1), (2, 2), (4, 4))
    assert scales.shapes((4, 2)) == ((1, 1), (2, 1), (4, 2))
    assert scales.shapes((8, 6)) == ((2, 2), (4, 3), (8, 6))
    assert scales.shapes((1, 1)) == ((1, 1), (1, 1), (1, 1))


def test_levels_against_numpy() -> None:
    torch.manual_seed(0)
    scales = Scales((1, 2, 4), 5).double()
    for part in scales.parameters():
        torch.nn.init.normal_(part, std=0.3)
    codes, z = torch.randn(7, 5).double(), torch.randn(3, 12, 5).double()
    found = scales(z, (4, 3), codes)
    shapes = [(1, 1), (2, 2), (4, 3)]
    for b in range(3):
        ids, vectors, sums = numpy_levels(z[b].view(4, 3, 5).numpy(), codes.numpy(), shapes, convs_of(scales))
        np.testing.assert_array_equal(found.ids[b], np.concatenate(ids))
        np.testing.assert_allclose(found.residuals[b], np.concatenate(vectors), atol=1e-10)
        for own, expected in zip(found.sums[:, b].detach(), sums, strict=True):
            np.testing.assert_allclose(own.view(4, 3, 5), expected, atol=1e-10)
    torch.testing.assert_close(scales.lookup(found.ids, (4, 3), codes), found.sums)
    assert len(found.ids.unique()) > 3


def test_before_the_start_the_vectors_stand_for_themselves() -> None:
    """The convolutions begin as the identity, so nothing of the map is lost."""
    z = torch.randn(2, 16, 3)
    found = Scales((1, 2, 4), 3)(z, (4, 4), torch.randn(5, 3), torch.tensor(False))
    torch.testing.assert_close(found.sums[-1], z, rtol=1e-5, atol=1e-5)
    assert float((found.sums[0] - z).detach().abs().max()) > 0.1


# ---- The method


def built(**knobs) -> VQTok:
    """A small instance with codes in use."""
    method = one_step.build("vqtok", scales=(1, 2, 4), revive_every=0, **knobs)
    perturb_(method.quantizer.project)
    if method.config.codebook == "ema":
        take(method, 0)
    with torch.no_grad():
        for conv in method.quantizer.scales.convs:
            conv.weight += 0.1 * torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(2))
            conv.bias += 0.1
    return method.eval()


def take(method: VQTok, number: int, micro_batches: int = 1, ok: bool = True):
    """One step without an optimiser; parts out of order. Returns what its forwards carried."""
    size, carried = one_step.BATCH // micro_batches, []
    for i in reversed(range(micro_batches)):
        rows = slice(i * size, (i + 1) * size)
        taken = one_step.step(rows, number=number)
        carried.append(method(one_step.batch(method, rows), taken).carry)
    taken.ok = torch.tensor(ok)
    together = {name: torch.cat([each[name] for each in carried]) for name in carried[0]}
    one_step.after_step(method, taken, together)
    return together


def embedded(method: VQTok) -> np.ndarray:
    with torch.no_grad():
        patches = method.encoder(one_step.batch(method).views["image"]).patches
        return method.quantizer.embed(patches).double().numpy()


SHAPES = [(1, 1), (2, 2), (4, 4)]


def all_levels(method: VQTok, z: np.ndarray, codes: np.ndarray, convs: list) -> tuple[list, list, np.ndarray]:
    each = [numpy_levels(x.reshape(4, 4, -1), codes, SHAPES, convs) for x in z]
    sums = np.array([[s.reshape(16, -1) for s in one[2]] for one in each]).swapaxes(0, 1)  # (S, B, N, d)
    return [one[0] for one in each], [one[1] for one in each], sums


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_loss_and_gradient_against_numpy(codebook: str) -> None:
    method = built(codebook=codebook)
    batch = one_step.batch(method)
    losses = method(batch, one_step.step(number=5))
    losses.total.backward()
    z, scales = embedded(method), method.quantizer.scales
    codes = method.quantizer.codes.detach().double().numpy()
    _, _, sums = all_levels(method, z, codes, convs_of(scales))
    target = method.targets(batch, (4, 4)).double().numpy()
    with torch.no_grad():
        predicted = method.decoded(torch.from_numpy(sums[-1]).float(), (4, 4)).double().numpy()
    reconstruction = ((predicted - target) ** 2).mean((1, 2))
    expected = reconstruction + 1.25 * ((sums - z) ** 2).mean((0, 2, 3))
    np.testing.assert_allclose(losses.per_sample, expected, rtol=1e-4)

    # The codes and convolutions move by the second term alone: by finite differences of it, with the ids as they are.
    def second(at: Weights) -> float:
        convs = [(at[f"w{k}"], at[f"b{k}"]) for k in scales._conv_of]
        total, found = np.zeros((len(z), 4, 4, z.shape[-1])), 0.0
        for i, shape in enumerate(SHAPES):
            for b in range(len(z)):
                own = at["codes"][ids[b][i]].reshape(*shape, -1)
                large = own if shape == (4, 4) else numpy_cubic(own, (4, 4))
                total[b] += 0.5 * large + 0.5 * numpy_conv(large, *convs[i])
            found += ((total.reshape(z.shape) - z) ** 2).mean() / len(SHAPES)
        return found

    ids, _, _ = all_levels(method, z, codes, convs_of(scales))
    at = {"codes": codes}
    found = {}
    for k, conv in enumerate(scales.convs):
        at |= {f"w{k}": conv.weight.detach().double().numpy(), f"b{k}": conv.bias.detach().double().numpy()}
        found |= {f"w{k}": conv.weight.grad, f"b{k}": conv.bias.grad}
    if codebook == "gradient":
        found["codes"] = method.quantizer.codes.grad
    rng = np.random.default_rng(0)
    for name, grad in found.items():
        direction = rng.standard_normal(at[name].shape)
        up, down = (second({**at, name: at[name] + sign * 1e-5 * direction}) for sign in (1, -1))
        slope = float((grad.double().numpy() * direction).sum())
        assert slope == pytest.approx((up - down) / 2e-5, rel=2e-3, abs=1e-6), name

    # The vectors: the decoder's gradient goes straight through, and the commitment's is added.
    entering = torch.from_numpy(sums[-1]).float().requires_grad_()
    ((method.decoded(entering, (4, 4)) - torch.from_numpy(target)) ** 2).mean().backward()
    at_z = entering.grad.double().numpy() + 0.25 * 2 * (z - sums).mean(0) / z.size
    with torch.no_grad():
        patches = method.encoder(batch.views["image"]).patches.double().numpy()
    layer = method.quantizer.project
    raw = patches @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    at_raw = (at_z - z * (at_z * z).sum(-1, keepdims=True)) / np.sqrt((raw**2).sum(-1, keepdims=True))
    np.testing.assert_allclose(layer.bias.grad, at_raw.sum((0, 1)), rtol=2e-3, atol=1e-6)


def test_moving_averages_are_of_all_scales() -> None:
    method = built(codebook_decay=0.8)
    codes, z = method.quantizer.codes.double().numpy().copy(), embedded(method)
    counts, total = method.counts.double().numpy().copy(), method.sums.double().numpy().copy()
    ids, vectors, _ = all_levels(method, z, codes, convs_of(method.quantizer.scales))
    flat = np.concatenate([np.concatenate(each) for each in ids])
    rows = np.concatenate([np.concatenate(each) for each in vectors])
    assert len(flat) == one_step.BATCH * 21
    counts = 0.8 * counts + 0.2 * np.bincount(flat, minlength=len(codes))
    total = 0.8 * total + 0.2 * np.array([rows[flat == k].sum(0) for k in range(len(codes))])
    take(method, 1)
    np.testing.assert_allclose(method.counts, counts, rtol=1e-4)
    np.testing.assert_allclose(method.sums, total, rtol=1e-3, atol=1e-4)


def test_usage_of_each_scale_against_numpy() -> None:
    method = built(codebook="gradient")
    z, codes = embedded(method), method.quantizer.codes.detach().double().numpy()
    ids, _, _ = all_levels(method, z, codes, convs_of(method.quantizer.scales))
    terms = method(one_step.batch(method), one_step.step()).terms
    for _ in range(2):  # 21 tokens of 16 images a step; 10 x 32 are wanted
        take(method, 1)
    assert int(method.quantizer.hits.sum()) >= USAGE * 32
    found = method.quantizer.usage()
    for i, side in enumerate((1, 2, 4)):
        counts = np.bincount(np.concatenate([each[i] for each in ids]), minlength=len(codes))
        share = counts[counts > 0] / counts.sum()
        perplexity = np.exp(-(share * np.log(share)).sum())
        assert float(terms[f"perplexity_{side}"]) == pytest.approx(perplexity, rel=1e-4)
        assert found["scales"][i]["perplexity"] == pytest.approx(perplexity, rel=1e-4)
        assert found["scales"][i]["codes_used"] == (counts > 0).sum()
    assert found["tokens"] == sum(each["tokens"] for each in found["scales"])


def test_micro_batches_in_any_order_change_no_code() -> None:
    whole, parts = (one_step.build("vqtok", scales=(1, 2, 4), revive_every=1) for _ in range(2))
    for number in range(3):
        take(whole, number)
        take(parts, number, micro_batches=4)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)
    before = whole.quantizer.state_dict()["codes"].clone()
    take(whole, 3, ok=False)
    assert torch.equal(whole.quantizer.codes, before)


def test_mistakes_in_flags() -> None:
    with pytest.raises(UserError, match="--scales 4: give two or more different numbers"):
        VQTok.Config(scales=(4,))
    with pytest.raises(UserError, match="--codebook ema or gradient, not norm_ema"):
        VQTok.Config(scales=(1, 4), codebook="norm_ema")
    with pytest.raises(UserError, match="--scales ends with 8, and the encoder has 4 x 4 patches: let it end with 4"):
        one_step.build("vqtok", scales=(1, 8))
    for wrong in ([0, 4], [4], [4, 2], [2, 2], ["1", 2], [1, 10**9], 7):
        with pytest.raises(ValueError, match="scales are"):
            read_scales({"scales": wrong})
    assert read_scales({}) == ()


# ---- The export


def test_an_export_has_the_ids_of_all_scales(tmp_path: Path) -> None:
    method = built()
    how = Preprocessing.for_size((32, 32), (0.5,) * 3, (0.25,) * 3)
    made = Tokenizer(Encoder(method.encoder, "vit_micro", how, {}), method.quantizer).eval()
    tokenizer.save(tmp_path, made)
    read = tokenizer.load(tmp_path)
    assert read.scales == (1, 2, 4)
    assert read.fingerprint == made.fingerprint
    images = torch.randn(2, 3, 32, 32)
    ids = read.ids_by_scale(images)
    assert [tuple(each.shape) for each in ids] == [(2, 1, 1), (2, 2, 2), (2, 4, 4)]
    assert torch.equal(ids[-1], read.ids(images))
    seen = made.encoder(images)
    levels = made.quantizer.levels(seen.patches, seen.grid)
    assert torch.equal(torch.cat([each.flatten(1) for each in ids], 1), levels.ids)
    torch.testing.assert_close(read.lookup_scales(ids).flatten(1, 2), levels.sums[-1])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantizer"]["scales"] == [1, 2, 4]
    assert len(config["usage"]["scales"]) == 3
    with torch.no_grad():
        made.quantizer.scales.convs[0].bias += 1e-3
    assert made.fingerprint != read.fingerprint
    # A tokenizer of one scale is described as before.
    plain = Quantizer(8, 5, 3)
    assert "scales" not in plain.describe()
    assert list(plain.state_dict()) == ["codes", "hits", "project.weight", "project.bias"]


def test_a_run_exports_its_scales(pretrain_here, photos: Path, tmp_path: Path) -> None:
    flags = [
        "--method",
        "vqtok",
        "--data",
        photos,
        "--codes",
        24,
        "--scales",
        1,
        2,
        4,
        "--image-size",
        32,
        "--depth",
        1,
    ]
    flags += [
        "--encoder",
        "vit_micro",
        "--batch-size",
        8,
        "--patch-size",
        8,
        "--workers",
        0,
        "--no-score",
        "--lr",
        "1e-3",
    ]
    flags += ["--picture-every", 0]
    pretrain_here(*flags, "--steps", 4, "--out", tmp_path / "run")
    read = tokenizer.load(tmp_path / "run")
    assert read.scales == (1, 2, 4)
    assert read.usage["tokens"] == sum(each["tokens"] for each in read.usage["scales"]) >= 240
