"""MAGE: loss and gradient against NumPy in float64, masks of every ratio, what is hidden, MAGE-C, and the two stages."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from method_helpers import check_stated
from ssl_pretrain.methods.mage import MAGE
from torch import Tensor, nn

from ssl_pretrain import backbones, checkpoint, encoder, tokenizer
from ssl_pretrain.conformance import one_step
from ssl_pretrain.errors import UserError
from ssl_pretrain.loop import grad_cache
from ssl_pretrain.pretext import Losses

KERNELS = 258  # of a step: python tests/kernels.py mage
DEVICE_KERNELS = 280  # with the optimiser, on an accelerator: python tests/device.py mage
SMALL = [
    *["--encoder", "vit_micro", "--depth", "2", "--dim", "64", "--heads", "2", "--image-size", "32", "--no-score"],
    *["--workers", "0", "--batch-size", "32", "--lr", "2e-3", "--log-every", "5", "--patch-size", "4"],
]


def parts(method: MAGE) -> tuple[Tensor, Tensor, Tensor]:
    """Of the batch of `one_step`: the decoder's features (B, N, D), ids (B, N), masks (B, N)."""
    maps = method.tokenizer.ids(one_step.batch(method).views["image"])
    masked, order, dropped, _ = method.masks(16, 1, one_step.step())
    keep = order[:, dropped:]
    with torch.no_grad():
        seen = method.encoder(maps[:, None], keep=keep, replace=(masked, method.mask_token))
        return method.decoded(seen, keep, masked, (4, 4)), maps.flatten(1), masked


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


def test_loss_terms_and_gradient_against_numpy():
    method = one_step.build("mage").eval()
    with torch.no_grad():
        method.code_bias.copy_(torch.linspace(-0.5, 0.5, 8))
        method.encoder.patch_embed.proj.weight.mul_(10)
    losses = method(one_step.batch(method), one_step.step())
    losses.total.backward()
    features, ids, masked = (each.double().numpy() for each in parts(method))
    ids, masked = ids.astype(int), masked.astype(bool)
    weights = {name: p.detach().double().numpy() for name, p in method.named_parameters()}
    hidden = features @ weights["code_fc.weight"].T + weights["code_fc.bias"]
    hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
    normed = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
    vectors = weights["encoder.patch_embed.proj.weight"]
    logits = (normed * weights["code_norm.weight"] + weights["code_norm.bias"]) @ vectors.T + weights["code_bias"]
    logits = logits - logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = 0.9 * np.eye(8)[ids] + 0.1 / 8  # label smoothing 0.1
    each = -(target * logp).sum(-1)
    count = masked.sum(1)
    assert len(set(count)) == 1
    per_sample = (each * masked).sum(1) / count
    assert float(losses.total.detach()) == pytest.approx(per_sample.mean(), rel=1e-5)
    np.testing.assert_allclose(losses.per_sample, per_sample, rtol=1e-4)
    wrong = (np.exp(logp) - target) * masked[..., None] / masked.sum()
    np.testing.assert_allclose(method.code_bias.grad, wrong.sum((0, 1)), atol=1e-6)
    np.testing.assert_allclose(method.code_norm.weight.grad, ((wrong @ vectors) * normed).sum((0, 1)), atol=1e-5)
    np.testing.assert_allclose(method.code_norm.bias.grad, (wrong @ vectors).sum((0, 1)), atol=1e-5)
    share = np.bincount(ids[masked], minlength=8) / masked.sum()
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    plain = -np.take_along_axis(logp, ids[..., None], -1)[..., 0]
    assert float(losses.terms["accuracy"]) == pytest.approx((logp.argmax(-1) == ids)[masked].mean())
    assert float(losses.terms["majority"]) == pytest.approx(share.max())
    assert float(losses.terms["gain"]) == pytest.approx(max(0, 1 - plain[masked].mean() / entropy), abs=1e-5)
    assert share.max() < 0.9


def test_the_codes_vectors_learn_only_as_inputs():
    """The prediction compares with the vectors of the codes, and gives them no gradient."""
    method = one_step.build("mage").eval()
    losses = method(one_step.batch(method), one_step.step())
    losses.total.backward()
    _, ids, masked = parts(method)
    _, order, dropped, _ = method.masks(16, 1, one_step.step())
    entering = torch.zeros_like(masked).scatter_(1, order[:, dropped:], True) & ~masked
    seen = set(ids[entering].tolist())
    gradient = method.encoder.patch_embed.proj.weight.grad.abs().sum(1)
    assert {int(i) for i in gradient.nonzero()} == seen
    assert len(seen) < 8 or len(set(ids[masked].tolist())) <= len(seen)


def test_ratios_follow_the_cut_normal_distribution():
    """Against the quantiles of the standard library; every row of a step has the same number."""
    method = one_step.build("mage")
    normal, counts = NormalDist(0.55, 0.25), []
    low, high = normal.cdf(0.5), normal.cdf(1.0)
    for noise in range(300):
        masked, order, dropped, count = method.masks(256, 1, one_step.step(noise=noise))
        step = one_step.step(noise=noise)
        step.rand(1, 256)
        expected = normal.inv_cdf(low + float(step.shared_rand(1)) * (high - low))
        assert abs(float(count) - math.ceil(256 * expected)) <= 1
        assert dropped == 128
        assert set(masked.sum(1).tolist()) == {int(count)}
        assert bool(masked.gather(1, order[:, : int(count)]).all())
        counts.append(float(count) / 256)
    assert min(counts) >= 0.5
    assert max(counts) <= 1
    middle = [normal.inv_cdf(low + share * (high - low)) for share in np.linspace(0.001, 0.999, 999)]
    assert np.mean(counts) == pytest.approx(np.mean(middle), abs=0.03)
    first = method.masks(256, 1, one_step.step(slice(0, 4)))[3]
    assert float(first) == float(method.masks(256, 1, one_step.step(slice(8, 16)))[3])


def test_what_is_masked_is_not_seen():
    method = one_step.build("mage").eval()
    maps = method.tokenizer.ids(one_step.batch(method).views["image"])
    masked, order, dropped, _ = method.masks(16, 1, one_step.step())
    keep = order[:, dropped:]

    def decoded(ids: Tensor) -> Tensor:
        with torch.no_grad():
            seen = method.encoder(ids[:, None], keep=keep, replace=(masked, method.mask_token))
            return method.decoded(seen, keep, masked, (4, 4))

    before, other, grid = decoded(maps), (maps + 1) % 8, masked.unflatten(1, (4, 4))
    assert torch.equal(decoded(torch.where(grid, other, maps)), before)
    assert not torch.equal(decoded(torch.where(grid, maps, other)), before)


def test_masked_places_begin_as_the_class_token():
    """Without blocks and positions, the decoder gives all of them the same features, and the others' are their own."""
    method = one_step.build("mage").eval()
    method.decoder_blocks = nn.ModuleList()
    method.decoder_pos_embed.zero_()
    features, _, masked = parts(method)
    with torch.no_grad():
        maps = method.tokenizer.ids(one_step.batch(method).views["image"])
        _, order, dropped, _ = method.masks(16, 1, one_step.step())
        keep = order[:, dropped:]
        seen = method.encoder(maps[:, None], keep=keep, replace=(masked, method.mask_token))
        own = method.decoder_norm(method.decoder_embed(seen.patches))
        cls = method.decoder_norm(method.decoder_embed(seen.cls))
    for row in range(len(masked)):
        torch.testing.assert_close(features[row][masked[row]], cls[row].expand(int(masked[row].sum()), -1))
        for place, value in zip(keep[row], own[row], strict=True):
            if not masked[row, place]:
                torch.testing.assert_close(features[row, place], value)


def test_contrast_is_nt_xent_of_mean_vectors_and_exact_in_micro_batches():
    method = one_step.build("mage", contrast=True).eval()
    given, whole = one_step.batch(method), one_step.step()
    assert given.views["image"].shape == (2, one_step.BATCH, 3, 64, 64)
    losses = method(given, whole)
    losses.total.backward()
    embedded = method.embed(given, one_step.step())
    z = method.projector(embedded["pooled"]).detach().double().numpy()
    z = z.swapaxes(0, 1).reshape(2 * one_step.BATCH, -1)
    z = z / np.sqrt((z**2).sum(1, keepdims=True))
    s = z @ z.T / 0.2
    np.fill_diagonal(s, -np.inf)
    positive = s[np.arange(32), (np.arange(32) + 16) % 32]
    expected = (np.log(np.exp(s).sum(1)) - positive).mean()
    assert float(losses.terms["contrast"]) == pytest.approx(expected, rel=1e-5)
    assert float(losses.total.detach()) == pytest.approx(float(losses.terms["tokens"]) + 0.1 * expected, rel=1e-5)
    other = one_step.build("mage", contrast=True).eval()
    halves = [(one_step.batch(other, rows), one_step.step(rows)) for rows in (slice(0, 8), slice(8, 16))]
    again = grad_cache.backward(other, halves, nullcontext(), list(other.parameters()))
    assert float(again.total.detach()) == pytest.approx(float(losses.total.detach()), rel=1e-5)
    for (name, one), two in zip(method.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_collapsed_is_what_it_states():
    method = one_step.build("mage")
    _, ids, masked = parts(method)
    share = np.bincount(ids[masked], minlength=8) / masked.sum().item()
    with torch.no_grad():
        method.code_norm.weight.zero_()
        method.code_norm.bias.zero_()
        method.code_bias.copy_(torch.from_numpy(np.log(share + 1e-9)))
    losses = method(one_step.batch(method), one_step.step())
    single = one_step.build("mage")
    single.tokenizer.quantizer.codes[1:] = -single.tokenizer.quantizer.codes[:1] * 100
    one = single(one_step.batch(single), one_step.step())
    check_stated(method, {"gain": losses, "majority": Losses(total=one.total, terms=one.terms)})


def test_wrong_encoders_and_ratios_are_refused():
    plain = {"image_size": (32, 32), "patch_size": 8, "depth": 1}
    with pytest.raises(UserError, match="--stem hmlp: mage reads ids in the place of patches; leave --stem out"):
        MAGE(backbones.build("vit_micro", image_size=(32, 32), patch_size=8, stem="hmlp"), MAGE.Config())
    with pytest.raises(UserError, match="give --cls"):
        MAGE(backbones.build("vit_micro", **plain, cls=False), MAGE.Config())
    with pytest.raises(UserError, match="multiple of 4 and of --decoder-heads 3"):
        MAGE(backbones.build("vit_micro", **plain), MAGE.Config(decoder_heads=3))
    with pytest.raises(UserError, match="--mask-ratio"):
        MAGE.Config(mask_ratio=(0.9, 0.5))


def test_two_stages_on_built_in_images(pretrain, tmp_path: Path):
    """A tokenizer, then MAGE on its ids: they are predicted better than by the most frequent one, and the export takes
    images without the tokenizer's folder."""
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    pretrain("--method", "vqtok", *SMALL, "--codes", "32", "--codebook-decay", "0.9", "--steps", "60", "--out", tokens)
    read = tokenizer.load(tokens)
    more = ["--decoder-depth", "1", "--steps", "150"]
    pretrain("--method", "mage", *SMALL, *more, "--tokenizer", tokens, "--out", run)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in logged if "accuracy" in line][-6:]
    accuracy, majority, gain = (np.mean([line[name] for line in last]) for name in ("accuracy", "majority", "gain"))
    print(f"accuracy {accuracy:.3f}, majority {majority:.3f}, gain {gain:.3f}")
    assert accuracy > majority + 0.02
    assert gain > 0.01
    assert not (run / "tokenizer").exists()
    (step,) = checkpoint.steps(run / "checkpoints")
    state = checkpoint.load(run / "checkpoints", step)
    assert not any("tokenizer" in name for part in ("method", "optimizer") for name in state[part])
    trained = sum(value.numel() for name, value in state["method"].items() if name.startswith("encoder."))
    for file in tokens.rglob("*.safetensors"):
        file.unlink()
    exported = encoder.load(run)
    assert exported.lineage["tokenizer"]["fingerprint"] == read.fingerprint
    assert json.loads((run / "manifest.json").read_text())["networks"]["tokenizer"]["fingerprint"] == read.fingerprint
    assert sum(p.numel() for p in exported.parameters()) == trained
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(exported.backbone.tokenizer(images), read.ids(images))  # the same normalisation
    assert exported(images).pooled.shape == (2, 64)
