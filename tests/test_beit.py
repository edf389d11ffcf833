"""BEiT: loss and gradient against NumPy in float64, masks, the tokenizer's view, and the two stages on images."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from method_helpers import check_stated
from ssl_pretrain.methods.beit import BEiT
from torch import nn

from ssl_pretrain import encoder, tokenizer
from ssl_pretrain.backbones.quantizer import Quantizer
from ssl_pretrain.conformance import one_step
from ssl_pretrain.parts.id_prediction import compared
from ssl_pretrain.pretext import Losses

KERNELS = 2143  # of a step: python tests/kernels.py beit
DEVICE_KERNELS = 189  # with the optimiser, on an accelerator: python tests/device.py beit
SMALL = [
    *["--encoder", "vit_micro", "--depth", "2", "--dim", "64", "--heads", "2", "--image-size", "32", "--no-score"],
    *["--workers", "0", "--batch-size", "32", "--lr", "2e-3", "--log-every", "5"],
]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def parts(method: BEiT) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the batch of `one_step`: patch features (B, N, D), ids (B, N), masks (B, N)."""
    batch, step = one_step.batch(method), one_step.step()
    masks = method.masks((4, 4), step)
    with torch.no_grad():
        seen = method.encoder(batch.views["image"], replace=(masks, method.mask_token))
        ids = method.tokenizer.ids(batch.views["tokens"]).flatten(1)
    return seen.patches.double().numpy(), ids.numpy(), masks.numpy()


def test_loss_terms_and_gradient_against_numpy():
    method = one_step.build("beit").eval()
    losses = method(one_step.batch(method), one_step.step())
    losses.total.backward()
    features, ids, masks = parts(method)
    x, t = np.array([f[m] for f, m in zip(features, masks, strict=True)]), ids[masks].reshape(len(ids), -1)
    w, b = method.head.weight.detach().double().numpy(), method.head.bias.detach().double().numpy()
    logp = log_softmax(x @ w.T + b)
    each = -np.take_along_axis(logp, t[..., None], -1)[..., 0]
    assert float(losses.total.detach()) == pytest.approx(each.mean(), rel=1e-5)
    np.testing.assert_allclose(losses.per_sample, each.mean(1), rtol=1e-4)
    wrong = np.exp(logp) - np.eye(len(w))[t]
    np.testing.assert_allclose(method.head.bias.grad, wrong.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(method.head.weight.grad, np.einsum("bmk,bmd->kd", wrong, x) / t.size, atol=1e-5)
    share = np.bincount(t.ravel(), minlength=len(w)) / t.size
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert float(losses.terms["accuracy"]) == pytest.approx((logp.argmax(-1) == t).mean())
    assert float(losses.terms["majority"]) == pytest.approx(share.max())
    assert float(losses.terms["gain"]) == pytest.approx(max(0, 1 - each.mean() / entropy), abs=1e-5)
    assert share.max() < 0.9


def test_gain_of_a_perfect_prediction_is_one():
    ids = torch.randint(0, 8, (4, 5), generator=torch.Generator().manual_seed(0))
    logits = 100.0 * torch.nn.functional.one_hot(ids, 8)
    found = compared(logits, ids, torch.zeros(4, 5))
    assert float(found["accuracy"]) == 1
    assert float(found["gain"]) == 1


def test_the_tokenizers_view_has_the_students_grid():
    """The tokenizer has patches of 16 pixels, the student of 8. It sees the whole crop, not the masked one."""
    method = one_step.build("beit")
    batch = one_step.batch(method)
    assert batch.views["tokens"].shape[-2:] == (64, 64)
    assert method.tokenizer.ids(batch.views["tokens"]).shape == (one_step.BATCH, 4, 4)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    by_hand = (batch.views["tokens"] * std + mean - 0.5) / 0.25
    with torch.no_grad():
        patches = method.tokenizer.backbone(by_hand).patches
    assert torch.equal(method.tokenizer.quantizer.ids(patches, (4, 4)), method.tokenizer.ids(batch.views["tokens"]))


def test_masks_are_blocks_of_one_size():
    method = one_step.build("beit")
    masks = method.masks((14, 14), one_step.step())
    assert set(masks.sum(1).tolist()) == {int(196 * 0.4)}
    grid = masks.unflatten(1, (14, 14))
    assert (grid[:, :, 1:] == grid[:, :, :-1]).float().mean() > 0.7  # random masks: 0.52


def test_what_is_masked_is_not_seen():
    method = one_step.build("beit").eval()
    batch = one_step.batch(method)
    masks = method.masks((4, 4), one_step.step())
    before = method(batch, one_step.step()).total
    hidden = masks.unflatten(1, (4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    batch.views["image"] = batch.views["image"] + hidden * 5.0
    assert torch.equal(method(batch, one_step.step()).total, before)
    batch.views["image"] = batch.views["image"] + ~hidden * 5.0
    assert not torch.equal(method(batch, one_step.step()).total, before)


def test_aggregation_against_its_parts():
    """The last class token and the patches of block 9 of 12 (here 1 of 2), through the extra block, norm and head."""
    method = one_step.build("beit", aggregate_cls=True, aggregate_depth=1).eval()
    batch, step = one_step.batch(method), one_step.step()
    losses = method(batch, step)
    masks = method.masks((4, 4), one_step.step())
    plain = method.encoder
    with torch.no_grad():
        seen = plain(batch.views["image"], replace=(masks, method.mask_token), blocks=(0, 1))
        first, last = seen.blocks
        torch.testing.assert_close(plain.norm(last[:, 1:]), seen.patches)
        x = method.aggregate_blocks[0](torch.cat([last[:, :1], first[:, 1:]], 1))
        ids = method.tokenizer.ids(batch.views["tokens"]).flatten(1)
        both = [
            nn.functional.cross_entropy(method.head(y[masks]), ids[masks]) for y in (seen.patches, plain.norm(x)[:, 1:])
        ]
    assert float(losses.total.detach()) == pytest.approx(float(sum(both)), rel=1e-5)
    assert float(losses.terms["aggregated"]) == pytest.approx(float(both[1]), rel=1e-5)
    losses.total.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in method.aggregate_blocks.parameters())


def test_collapsed_is_what_it_states():
    method = one_step.build("beit")
    nn.init.zeros_(method.head.weight)
    _, ids, masks = parts(method)
    share = np.bincount(ids[masks], minlength=8) / masks.sum()
    with torch.no_grad():
        method.head.bias.copy_(torch.from_numpy(np.log(share + 1e-9)))
    losses = method(one_step.batch(method), one_step.step())
    check_stated(method, {"gain": Losses(total=losses.total, terms=losses.terms)})


def test_a_run_without_a_tokenizer_is_told_how(pretrain, photos: Path, tmp_path: Path):
    flags = ["--method", "beit", "--data", photos, "--steps", "2", "--out", tmp_path / "run"]
    assert "name it with --tokenizer" in pretrain(*flags, code=2).stderr
    said = pretrain(*flags, "--tokenizer", tmp_path / "nowhere", code=2).stderr
    assert "does not exist" in said


def test_two_stages_on_built_in_images(pretrain, tmp_path: Path):
    """A tokenizer, then BEiT on its ids: ids are predicted better than by the most frequent one. A changed tokenizer is
    refused, and nothing of it is in the checkpoint."""
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    more = ["--codes", "32", "--codebook-decay", "0.9", "--patch-size", "4", "--lr", "1e-3"]
    pretrain("--method", "vqtok", *SMALL, *more, "--steps", "80", "--out", tokens)
    read = tokenizer.load(tokens)
    assert read.usage["codes_used"] > 0.9 * 32
    assert read.usage["tokens"] >= 320
    flags = ["--method", "beit", *SMALL, "--tokenizer", tokens, "--patch-size", "4", "--steps"]
    pretrain(*flags, "100", "--out", run)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in logged if "accuracy" in line][-6:]
    accuracy, majority, gain = (np.mean([line[name] for line in last]) for name in ("accuracy", "majority", "gain"))
    print(f"accuracy {accuracy:.3f}, majority {majority:.3f}, gain {gain:.3f}")
    assert accuracy > majority + 0.03
    assert gain > 0.02
    known = json.loads((run / "manifest.json").read_text())["networks"]["tokenizer"]
    assert known == {"spec": str(tokens), "fingerprint": read.fingerprint}
    assert encoder.load(run).lineage["tokenizer"]["fingerprint"] == read.fingerprint
    assert not (run / "tokenizer").exists()
    with torch.no_grad():
        read.quantizer.codes[0, 0] += 0.5
    tokenizer.save(tokens / "tokenizer", read)
    said = pretrain(*flags, "120", "--extend", "--out", run, code=2).stderr
    assert "began with another tokenizer" in said


def test_the_head_has_the_codes_of_the_tokenizer():
    method = one_step.build("beit")
    network = one_step.networks(("tokenizer",))["tokenizer"]
    network.quantizer = Quantizer(96, 20, 4)
    other = BEiT(method.encoder, replace(method.config))
    other.prepare(1, {"tokenizer": network})
    assert (method.head.out_features, other.head.out_features) == (8, 20)
