"""Tokenizers: the codebook's updates, loss and gradient against NumPy in float64; usage; what a run exports."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_constant_, perturb_, step
from ssl_pretrain.methods.vqtok import CANDIDATES, VQTok, usage

from ssl_pretrain import tokenizer
from ssl_pretrain.conformance import one_step
from ssl_pretrain.errors import UserError
from ssl_pretrain.parts.codebook import EPS, ITERATIONS, averaged, kmeans, revived, sums
from ssl_pretrain.parts.targets import distances

KERNELS = 258  # of a step: python tests/kernels.py vqtok
DEVICE_KERNELS = 272  # with the optimiser, on an accelerator: python tests/device.py vqtok
# The host reads once, in the first two steps of a process, whether the codes are started.
ON_THE_HOST = ["_local_scalar_dense"]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def vectors(n: int, d: int = 5, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((n, d)))


def nearest(z: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return ((z[:, None] - codes) ** 2).sum(-1).argmin(-1)


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x))


# ---- The codebook


def test_sums_against_loops():
    z, ids = vectors(5000), np.random.default_rng(1).integers(0, 6, 5000)
    counts, total = sums(tensor(z), tensor(ids), 7)
    for k in range(7):
        assert counts[k] == (ids == k).sum()
        np.testing.assert_allclose(total[k], z[ids == k].sum(0), atol=1e-10)


def kmeans_oracle(z: np.ndarray, start: np.ndarray, spherical: bool) -> tuple[np.ndarray, np.ndarray]:
    centres = start.copy()
    for _ in range(ITERATIONS):
        ids = nearest(z, centres)
        for k in range(len(centres)):
            if (ids == k).any():
                mean = z[ids == k].mean(0)
                centres[k] = unit(mean) if spherical else mean
    return centres, np.bincount(ids, minlength=len(centres))


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("n", [300, 5])
def test_kmeans_against_numpy(n: int, spherical: bool):
    z = vectors(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3)).numpy()
    expected, sizes = kmeans_oracle(z, z[order[np.arange(12) % n]], spherical)
    centres, counts = kmeans(tensor(z), 12, torch.Generator().manual_seed(3), unit=spherical)
    np.testing.assert_allclose(centres, expected, atol=1e-8)
    np.testing.assert_array_equal(counts, sizes)


def smooth(n: np.ndarray, s: np.ndarray) -> np.ndarray:
    return s / ((n + EPS) / (n.sum() + len(n) * EPS) * n.sum())[:, None]


def test_averages_against_numpy():
    n, s = np.random.default_rng(0).random(6) * 3, vectors(6)
    np.testing.assert_allclose(averaged(tensor(n), tensor(s)), smooth(n, s), rtol=1e-10)


def test_only_dead_codes_are_revived_and_they_stay():
    n, s, z = np.array([0.0, 4.0, 0.1, 8.0]), vectors(4) * 2, vectors(30, seed=5)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2)).numpy()
    counts, total = revived(tensor(n), tensor(s), tensor(z), 0.1, torch.Generator().manual_seed(2))
    least = 0.1 * n.mean()
    np.testing.assert_allclose(counts, [least, 4.0, least, 8.0])
    np.testing.assert_allclose(total, [z[order[0]] * least, s[1], z[order[2]] * least, s[3]])
    # The code that follows from the counts and sums is the candidate, and not what it was.
    np.testing.assert_allclose(averaged(counts, total)[0], z[order[0]], rtol=1e-3)


# ---- The method


def started(**knobs) -> VQTok:
    """A small instance whose codes are started by k-means of the batch of `one_step`."""
    method = one_step.build("vqtok", **knobs)
    perturb_(method.quantizer.project)
    take(method, number=0)
    return method


def take(method: VQTok, number: int, ok: bool = True, micro_batches: int = 1, noise: int = 7):
    """One step without an optimiser. Returns what its forwards carried."""
    size = one_step.BATCH // micro_batches
    carried = []
    for i in reversed(range(micro_batches)):  # out of order, as rows of several processes come
        rows = slice(i * size, (i + 1) * size)
        taken = one_step.step(rows, number=number, noise=noise)
        carried.append(method(one_step.batch(method, rows), taken).carry)
    taken.ok = torch.tensor(ok)
    together = {name: torch.cat([each[name] for each in carried]) for name in carried[0]}
    one_step.after_step(method, taken, together)
    return together


def embedded(method: VQTok) -> np.ndarray:
    """The vectors (B, N, d) of the batch, float64, from the encoder's features."""
    with torch.no_grad():
        patches = method.encoder(one_step.batch(method).views["image"]).patches.double().numpy()
    layer = method.quantizer.project
    return unit(patches @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy())


def test_the_first_codes_are_means_of_the_batch():
    method = started()
    assert bool(method.started)
    assert len(torch.unique(method.quantizer.nearest(torch.from_numpy(embedded(method)).float()))) > 20
    codes = method.quantizer.codes.double().numpy()
    z = embedded(method).reshape(-1, codes.shape[1])
    assert z.shape[0] == one_step.BATCH * 16
    moved = np.array([z[nearest(z, codes) == k].mean(0) for k in np.unique(nearest(z, codes))])
    assert np.abs(moved - codes[np.unique(nearest(z, codes))]).max() < 0.3  # centres of clusters, not random directions
    assert float(method.counts.sum()) == pytest.approx(len(z), rel=0.1)


@pytest.mark.parametrize("codebook", ["ema", "norm_ema"])
def test_updates_against_numpy(codebook: str):
    method = started(codebook=codebook, codebook_decay=0.8, revive_every=0)
    codes = method.quantizer.codes.double().numpy().copy()
    z = embedded(method).reshape(-1, codes.shape[1])
    if codebook == "ema":
        n, s = method.counts.double().numpy().copy(), method.sums.double().numpy().copy()
    for number in range(1, 4):
        ids = nearest(z, codes)
        count = np.bincount(ids, minlength=len(codes))
        total = np.array([z[ids == k].sum(0) for k in range(len(codes))])
        if codebook == "ema":
            n, s = 0.8 * n + 0.2 * count, 0.8 * s + 0.2 * total
            codes = smooth(n, s)
        else:
            for k in np.flatnonzero(count):
                codes[k] = unit(0.8 * codes[k] + 0.2 * unit(total[k]))
        take(method, number)
        np.testing.assert_allclose(method.quantizer.codes, codes, rtol=1e-4, atol=1e-5)
    before = method.quantizer.codes.clone()
    take(method, 4, ok=False)
    assert torch.equal(method.quantizer.codes, before)


def kill_(method: VQTok) -> None:
    """Three codes are far from every vector and have no count."""
    method.counts[:3] = 0
    method.sums[:3] = 0
    method.quantizer.codes[:3] = 50


def test_dead_codes_become_vectors_of_the_batch():
    method = started(revive_every=2, revive_below=0.1)
    kill_(method)
    take(method, 3)
    assert torch.allclose(method.quantizer.codes[:3], torch.zeros(3, 8), atol=1e-6)  # not the step for it
    carried = take(method, 4)
    candidates = carried["candidates"].flatten(0, 1)
    assert len(candidates) == one_step.BATCH * min(16, CANDIDATES)
    for code in method.quantizer.codes[:3]:
        assert float((candidates - code).norm(dim=1).min()) < 1e-2
    kill_(method)
    take(method, 8)  # of ten: no code is replaced in the last fifth
    assert torch.allclose(method.quantizer.codes[:3], torch.zeros(3, 8), atol=1e-6)


def test_micro_batches_in_any_order_change_no_code():
    """As several processes do: start, update and revival are functions of the global batch."""
    whole, parts = (one_step.build("vqtok", revive_every=1) for _ in range(2))
    for number in range(3):
        take(whole, number)
        take(parts, number, micro_batches=4)
        if number == 1:
            kill_(whole)
            kill_(parts)
    torch.testing.assert_close(parts.quantizer.codes, whole.quantizer.codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.counts, whole.counts, rtol=1e-4, atol=1e-5)
    assert torch.equal(parts.quantizer.hits, whole.quantizer.hits)


@pytest.mark.parametrize("knobs", [{}, {"target": "hog"}, {"target": "teacher"}, {"codebook": "gradient"}], ids=str)
def test_loss_and_gradient_against_numpy(knobs: dict):
    gradient = knobs.get("codebook") == "gradient"
    method = one_step.build("vqtok", **knobs) if gradient else started(**knobs)
    method.eval()
    batch = one_step.batch(method)
    losses = method(batch, one_step.step(number=5))
    losses.total.backward()
    z = embedded(method)
    codes = method.quantizer.vectors().detach().double().numpy()
    chosen = codes[nearest(z.reshape(-1, 8), codes)].reshape(z.shape)
    target = method.targets(batch, (4, 4)).double().numpy()
    entering = torch.from_numpy(chosen).float().requires_grad_()
    predicted = method.decoded(entering, (4, 4))
    p = predicted.detach().double().numpy()
    if method.config.target == "pixels":
        each = ((p - target) ** 2).mean(-1)
    else:
        each = 1 - (p * target).sum(-1) / np.sqrt((p**2).sum(-1) * (target**2).sum(-1))
    apart = ((z - chosen) ** 2).mean((1, 2))
    expected = each.mean(1) + (0.25 + gradient) * apart
    assert float(losses.total.detach()) == pytest.approx(expected.mean(), rel=1e-5)
    np.testing.assert_allclose(losses.per_sample, expected, rtol=1e-4)

    # The gradient of the projection: the decoder's at the codes goes straight through, and the commitment's is added.
    distance = "mse" if method.config.target == "pixels" else "cosine"
    (through,) = torch.autograd.grad(distances(predicted, tensor(target), distance).mean(), entering)
    at_z = through.double().numpy() + 0.25 * 2 * (z - chosen) / z.size
    with torch.no_grad():
        patches = method.encoder(batch.views["image"]).patches.double().numpy()
    layer = method.quantizer.project
    raw = patches @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    length = np.sqrt((raw**2).sum(-1, keepdims=True))
    at_raw = (at_z - z * (at_z * z).sum(-1, keepdims=True)) / length
    np.testing.assert_allclose(layer.bias.grad, at_raw.sum((0, 1)), rtol=2e-3, atol=1e-7)
    if gradient:
        ids, by_hand = nearest(z.reshape(-1, 8), codes), np.zeros_like(codes)
        np.add.at(by_hand, ids, 2 * (chosen - z).reshape(-1, 8) / z.size)
        norms = np.sqrt((method.quantizer.codes.detach().double().numpy() ** 2).sum(1, keepdims=True))
        by_hand = (by_hand - codes * (by_hand * codes).sum(1, keepdims=True)) / norms
        np.testing.assert_allclose(method.quantizer.codes.grad, by_hand, rtol=2e-3, atol=1e-7)


def through(method: VQTok, entering: np.ndarray, batch) -> np.ndarray:
    """The gradient of the mean reconstruction loss at what enters the decoder, float64."""
    leaf = torch.from_numpy(entering).float().requires_grad_()
    target = method.targets(batch, (4, 4))
    (found,) = torch.autograd.grad(distances(method.decoded(leaf, (4, 4)), target, "mse").mean(), leaf)
    return found.double().numpy()


def reconstruction(method: VQTok, entering: np.ndarray, batch) -> np.ndarray:
    with torch.no_grad():
        predicted = method.decoded(torch.from_numpy(entering).float(), (4, 4)).double().numpy()
    return ((predicted - method.targets(batch, (4, 4)).double().numpy()) ** 2).mean((1, 2))


def test_frozen_codebook_against_numpy():
    method = started(codebook="frozen", revive_every=0).eval()
    centres, layer, batch = method.centres.clone(), method.code_projector, one_step.batch(method)
    seen = method.teacher(batch.views["teacher"]).patches.double().numpy().reshape(-1, centres.shape[1])
    own = centres.double().numpy()
    members = [np.flatnonzero(nearest(seen, own) == k) for k in range(len(own))]
    assert sum(len(m) > 0 for m in members) > 5
    spread = ((seen[:, None] - own) ** 2).sum(-1).min(1).mean()
    assert spread < 0.8 * ((seen - seen.mean(0)) ** 2).sum(-1).mean()  # k-means of the teacher's features

    losses = method(batch, one_step.step(number=5))
    losses.total.backward()
    raw = own @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    codes, z = unit(raw), embedded(method)
    ids = nearest(z.reshape(-1, 8), codes)
    chosen = codes[ids].reshape(z.shape)
    expected = reconstruction(method, chosen, batch) + 0.25 * 1.33 * ((z - chosen) ** 2).mean((1, 2))
    np.testing.assert_allclose(losses.per_sample, expected, rtol=1e-4)
    at_codes = np.zeros_like(codes)  # only their move to the vectors reaches the projector
    np.add.at(at_codes, ids, 0.25 * 0.33 * 2 * (chosen - z).reshape(-1, 8) / z.size)
    at_raw = (at_codes - codes * (at_codes * codes).sum(1, keepdims=True)) / np.sqrt((raw**2).sum(1, keepdims=True))
    np.testing.assert_allclose(layer.weight.grad, at_raw.T @ own, rtol=2e-3, atol=1e-7)

    with torch.no_grad():
        layer.weight.mul_(-1)
    take(method, 6)
    assert torch.equal(method.centres, centres)
    assert torch.allclose(method.quantizer.codes, method._projected())  # what the tokenizer exports
    before = method.quantizer.codes.clone()
    with torch.no_grad():
        layer.weight.mul_(-1)
    take(method, 7, ok=False)
    assert torch.equal(method.quantizer.codes, before)


def test_soft_choice_against_numpy():
    method = one_step.build("vqtok", codebook="gumbel", kl_weight=0.3).eval()
    perturb_(method.quantizer.project)
    batch = one_step.batch(method)
    losses = method(batch, one_step.step(number=5))
    losses.total.backward()
    codes, z = method.quantizer.vectors().detach().double().numpy(), embedded(method)
    noise = one_step.step(number=5).rand(16, len(codes)).double().numpy()
    warmth = 1 / 16 + (1 - 1 / 16) * (1 + np.cos(np.pi * 0.5)) / 2  # step 5 of 10
    assert one_step.step(number=5).progress == 0.5
    logits = 10 * z @ codes.T

    def softmax(x: np.ndarray) -> np.ndarray:
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    weights = softmax((logits - np.log(-np.log(noise.clip(1e-9, 1 - 1e-7)))) / warmth)
    share = softmax(logits)
    divergence = (share * np.log(share * len(codes))).sum(-1)
    expected = reconstruction(method, weights @ codes, batch) + 0.3 * divergence.mean(1)
    np.testing.assert_allclose(losses.per_sample, expected, rtol=1e-4)
    assert 0 < divergence.mean() < np.log(len(codes))

    at_mean = through(method, weights @ codes, batch)  # (B, N, d)
    at_weights = at_mean @ codes.T
    at_logits = weights * (at_weights - (at_weights * weights).sum(-1, keepdims=True)) / warmth
    slope = np.log(share * len(codes)) + 1
    at_logits += 0.3 * share * (slope - (share * slope).sum(-1, keepdims=True)) / z[..., 0].size
    flat = (-1, len(codes))
    at_codes = weights.reshape(flat).T @ at_mean.reshape(-1, 8) + 10 * at_logits.reshape(flat).T @ z.reshape(-1, 8)
    norms = np.sqrt((method.quantizer.codes.detach().double().numpy() ** 2).sum(1, keepdims=True))
    at_codes = (at_codes - codes * (at_codes * codes).sum(1, keepdims=True)) / norms
    np.testing.assert_allclose(method.quantizer.codes.grad, at_codes, rtol=2e-3, atol=1e-6)


def test_the_choice_becomes_hard():
    method = one_step.build("vqtok", codebook="gumbel")
    z = torch.from_numpy(embedded(method)).float()
    soft, ids, _ = method._chosen_softly(z, one_step.step(number=0))
    hard, _, _ = method._chosen_softly(z, one_step.step(number=9))
    codes = method.quantizer.vectors()
    apart = [
        float((entering[..., None, :] - codes).detach().norm(dim=-1).min(-1).values.mean()) for entering in (soft, hard)
    ]
    assert apart[1] < 0.3 * apart[0]
    assert torch.equal(ids, method.quantizer.nearest(z))  # those of the exported tokenizer, without noise


@pytest.mark.parametrize("depth", [1, 4])
def test_semantic_regularisation_against_numpy(depth: int):
    method = started(semantic_weight=0.5, decoder_depth=depth).eval()
    plain = started(decoder_depth=depth).eval()
    plain.load_state_dict(method.state_dict(), strict=False)
    batch = one_step.batch(method)
    losses = method(batch, one_step.step(number=5))
    base = plain(one_step.batch(plain), one_step.step(number=5))
    z, codes = embedded(method), method.quantizer.vectors().double().numpy()
    chosen = torch.from_numpy(codes[nearest(z.reshape(-1, 8), codes)].reshape(z.shape)).float()
    with torch.no_grad():
        x = method.decoder_embed(chosen) + method.decoder_pos_embed
        for block in method.decoder_blocks[:3]:
            x = block(x)
        first, _, last = method.semantic_head
        hidden = x.double().numpy() @ first.weight.double().numpy().T + first.bias.double().numpy()
        erf = np.vectorize(math.erf)
        hidden = 0.5 * hidden * (1 + erf(hidden / np.sqrt(2)))
        predicted = hidden @ last.weight.double().numpy().T + last.bias.double().numpy()
    target = method.teacher(batch.views["teacher"]).patches.double().numpy()
    cosine = (unit(predicted) * unit(target)).sum(-1)
    np.testing.assert_allclose(losses.per_sample, base.per_sample.numpy() + 0.5 * (1 - cosine).mean(1), rtol=1e-4)
    losses.total.backward()
    assert float(method.semantic_head[0].weight.grad.abs().max()) > 0
    assert float(method.encoder.patch_embed.proj.weight.grad.abs().max()) > 0  # it shapes the codes


def test_semantic_regularisation_of_the_teachers_own_features_is_refused():
    with pytest.raises(UserError, match="--semantic-weight: --target teacher predicts the same"):
        VQTok.Config(target="teacher", semantic_weight=0.5)


def test_frozen_codes_do_not_depend_on_micro_batches():
    whole, parts = (one_step.build("vqtok", codebook="frozen") for _ in range(2))
    for number in range(2):
        take(whole, number)
        take(parts, number, micro_batches=4)
    torch.testing.assert_close(parts.centres, whole.centres, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.quantizer.codes, whole.quantizer.codes, rtol=1e-4, atol=1e-5)


def test_before_the_start_the_decoder_gets_the_vectors():
    method = one_step.build("vqtok").eval()
    batch = one_step.batch(method)
    losses = method(batch, one_step.step(number=0))
    predicted = method.decoded(torch.from_numpy(embedded(method)).float(), (4, 4))
    by_hand = ((predicted - method.targets(batch, (4, 4))) ** 2).mean()
    assert float(losses.total.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-4)


def test_usage_against_numpy():
    counts = np.array([0, 5, 10, 25, 0, 0, 60, 0])
    share = counts[counts > 0] / 100
    perplexity = np.exp(-(share * np.log(share)).sum())
    found = usage(torch.from_numpy(counts).float(), 100)
    assert float(found["codes_used"]) == 0.5
    assert float(found["perplexity"]) == pytest.approx(perplexity, rel=1e-5)
    assert float(found["diversity"]) == 1.0  # above a quarter of 8
    many = torch.zeros(100)
    many[:10] = 1
    assert float(usage(many, 1000)["diversity"]) == pytest.approx(0, abs=1e-5)
    many[:20] = 1
    assert 0 < float(usage(many, 1000)["diversity"]) < 1


def test_hits_are_of_a_fixed_number_of_tokens():
    method = started()
    found = [int(method.quantizer.hits.sum())]
    for number in range(1, 6):
        take(method, number)
        found.append(int(method.quantizer.hits.sum()))
    # 256 tokens a step, 320 wanted: two steps make one count
    assert found == [256, 512, 512, 512, 512, 512]
    take(method, 6, ok=False)
    assert int(method.recent.sum()) == 0


def test_collapsed_is_what_it_states():
    method = started()
    make_constant_(method.encoder)
    check_stated(method, {"diversity": losses_of(method)})
    assert step().total == 10


def test_run_that_collapses_says_so(pretrain, tmp_path: Path):
    """Codes of random directions, without k-means, which BEiT v2's moving average does not bring back."""
    flags = ["--method", "vqtok", "--codebook", "norm_ema", "--no-kmeans", "--codes", "512", "--steps", "40"]
    small = ["--encoder", "vit_micro", "--dim", "64", "--heads", "2", "--depth", "1", "--batch-size", "16"]
    run = [*flags, *small, "--log-every", "4", "--warmup-steps", "1", "--workers", "0", "--no-score"]
    said = pretrain(*run, "--out", tmp_path / "run")
    assert "the codebook collapses" in said.stdout + said.stderr


def test_run_exports_its_tokenizer(pretrain, photos: Path, tmp_path: Path):
    flags = [
        "--method",
        "vqtok",
        "--data",
        photos,
        "--codes",
        "24",
        "--steps",
        "6",
        "--image-size",
        "32",
        "--lr",
        "1e-3",
    ]
    small = ["--encoder", "vit_micro", "--depth", "1", "--batch-size", "8", "--patch-size", "8", "--workers", "0"]
    pretrain(*flags, *small, "--no-score", "--out", tmp_path / "run")
    read = tokenizer.load(tmp_path / "run")
    assert read.codes == 24
    assert read.lineage["method"] == "vqtok"
    assert read.usage["tokens"] >= 240
    config = json.loads((tmp_path / "run" / "tokenizer" / "config.json").read_text())
    assert config["usage"]["codes_used"] == read.usage["codes_used"] > 1
    ids = read.ids(read.preprocess([np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)]))
    assert ids.shape == (1, 4, 4)
