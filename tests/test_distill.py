"""Distillation: every loss and its gradient against float64 NumPy, the teacher's pixels, mixup, the queue, the report."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_bits, metrics
from method_helpers import check_stated, losses_of, make_constant_, make_uniform_, make_zero_, perturb_, step
from numpy_oracles import Weights, check_gradients, numpy_normalize, numpy_prototype_head, numpy_softmax
from oracles import import_timm
from ssl_pretrain.launch.pretrain import main
from ssl_pretrain.methods.distill import Distill

from ssl_pretrain import backbones, checkpoint, encoder, pretext
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.conformance import one_step
from ssl_pretrain.conformance.one_step import OWN, after_step, batch, build, networks
from ssl_pretrain.data.views import Sight, fitted
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.frozen import Frozen
from ssl_pretrain.loop import teacher_run
from ssl_pretrain.parts.mixup import check_pairs, mixed
from ssl_pretrain.parts.query_projector import QueryProjector
from ssl_pretrain.parts.similarity import FilledQueue, divergences, relations
from ssl_pretrain.parts.targets import final_norm, last_blocks, tap
from ssl_pretrain.parts.views import dropped
from ssl_pretrain.pretext import Step

KERNELS = 306  # of a step: python tests/kernels.py distill
DEVICE_KERNELS = 328  # with the optimiser, on an accelerator: python tests/device.py distill

ONLY = {
    "pooled": {"relations_weight": 0.0, "dense_weight": 0.0},
    "relations": {"pooled_weight": 0.0, "dense_weight": 0.0},
    "dense": {"pooled_weight": 0.0, "relations_weight": 0.0, "dense_weight": 1.0, "dense_centred_weight": 0.0},
}


# ---- Oracles


def numpy_kl(target: np.ndarray, own: np.ndarray) -> float:
    """KL(softmax(target) || softmax(own)) of two vectors, term by term."""
    p, q = numpy_softmax(target), numpy_softmax(own)
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def numpy_bilinear(x: np.ndarray, grid: tuple[int, int], to: tuple[int, int]) -> np.ndarray:
    """One map (h * w, D) at the centres of another grid's cells; beyond the outer centres the border holds."""
    h, w = grid
    x = x.reshape(h, w, -1)
    rows = []
    for i in range(to[0]):
        for j in range(to[1]):
            y = min(max((i + 0.5) * h / to[0] - 0.5, 0), h - 1)
            z = min(max((j + 0.5) * w / to[1] - 0.5, 0), w - 1)
            top, left = min(int(y), h - 1), min(int(z), w - 1)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            a, b = y - top, z - left
            rows.append(
                (1 - a) * ((1 - b) * x[top, left] + b * x[top, right])
                + a * ((1 - b) * x[bottom, left] + b * x[bottom, right])
            )
    return np.array(rows)


def numpy_distance(p: np.ndarray, t: np.ndarray, loss: str) -> float:
    """The mean over places of two maps (N, D)."""
    if loss == "mse":
        return float(((p - t) ** 2).mean())
    return float(np.mean([1 - a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(p, t, strict=True)]))


def numpy_linear(at: Weights, head: str, x: np.ndarray) -> np.ndarray:
    return x @ at[f"{head}.weight"].T + at[f"{head}.bias"]


def of_heads(method: Distill) -> Weights:
    """The parameters behind the encoder, float64."""
    return {n: p.detach().double().numpy().copy() for n, p in method.named_parameters() if not n.startswith("encoder")}


def check_against(method: Distill, oracle: Callable[[Weights], float], at: Weights, losses) -> None:
    """The loss and the gradient of every parameter behind the encoder; the encoder computes in float32."""
    assert float(losses.total.detach()) == pytest.approx(oracle(at), rel=2e-5)
    assert float(losses.per_sample.mean()) == pytest.approx(float(losses.total.detach()), rel=1e-5)
    losses.total.backward()
    gradients = dict(method.named_parameters())
    rng = np.random.default_rng(0)
    for name, value in at.items():
        direction = rng.standard_normal(value.shape)
        up, down = (oracle({**at, name: value + sign * 1e-5 * direction}) for sign in (1, -1))
        found = gradients[name].grad
        assert found is not None, name
        slope = float((found.double().numpy() * direction).sum())
        assert slope == pytest.approx((up - down) / 2e-5, rel=2e-3, abs=1e-6), name


# ---- Losses


@pytest.mark.parametrize("filled", [0, 5, 40])
def test_pooled_loss_and_gradients_against_numpy(filled: int) -> None:
    method = build("distill", **ONLY["pooled"], mixup=False)
    rng = np.random.default_rng(1)
    dim = method.teacher.dim
    old = numpy_normalize(rng.standard_normal((filled, dim)))
    if filled:
        method.queue.put_(torch.from_numpy(old).float(), torch.tensor(True))
    given = batch(method)
    with torch.no_grad():
        pooled = method.encoder(given.views["image"]).pooled.double().numpy()
        theirs = method.teacher(given.views["teacher"]).pooled.double().numpy()
    targets = numpy_normalize(theirs)
    keys = np.concatenate([old, targets])  # rows of the queue that were never filled do not count

    def oracle(at: Weights) -> float:
        own = numpy_normalize(numpy_linear(at, "pooled_head", pooled))
        return float(np.mean([numpy_kl(keys @ t / 0.07, keys @ s / 0.07) for t, s in zip(targets, own, strict=True)]))

    losses = method(given, one_step.step())
    check_against(method, oracle, of_heads(method), losses)
    entropies = [-(p * np.log(p)).sum() for p in (numpy_softmax(keys @ t / 0.07) for t in targets)]
    uniform = math.log(len(keys)) - np.mean(entropies)
    assert float(losses.terms["pooled_relative"]) == pytest.approx(float(losses.terms["pooled"]) / uniform, rel=1e-3)


def test_relations_and_gradients_against_numpy() -> None:
    """The teacher's grid is 2 x 2 and the student's 4 x 4: the student's projected map is resized."""
    method = build("distill", **ONLY["relations"], mixup=False, temperature=0.2)
    given = batch(method)
    with torch.no_grad():
        own, target = method.encoder(given.views["image"]), method.teacher(given.views["teacher"])
    assert (own.grid, target.grid) == ((4, 4), (2, 2))
    patches, theirs = own.patches.double().numpy(), target.patches.double().numpy()

    def oracle(at: Weights) -> float:
        total = 0.0
        for x, t in zip(numpy_linear(at, "relations_head", patches), theirs, strict=True):
            s, t = numpy_normalize(numpy_bilinear(x, (4, 4), (2, 2))), numpy_normalize(t)
            for i in range(4):
                total += numpy_kl(np.array([t[i] @ t[j] for j in range(4)]) / 0.2, s @ s[i] / 0.2) / 4
        return total / len(patches)

    check_against(method, oracle, of_heads(method), method(given, one_step.step()))


@pytest.mark.parametrize(
    ("loss", "norm", "centred"), [("mse", "none", 0.0), ("mse", "layer_norm", 0.5), ("cosine", "l2", 0.75)]
)
def test_dense_loss_and_gradients_against_numpy(loss: str, norm: str, centred: float) -> None:
    knobs = {
        **ONLY["dense"],
        "dense_loss": loss,
        "dense_norm": norm,
        "dense_centred_weight": centred,
        "dense_weight": 2.0,
    }
    method = build("distill", **knobs, mixup=False)
    given = batch(method)
    with torch.no_grad():
        own, target = method.encoder(given.views["image"]), method.teacher(given.views["teacher"])
    patches, theirs = own.patches.double().numpy(), target.patches.double().numpy()
    if norm == "layer_norm":
        theirs = (theirs - theirs.mean(-1, keepdims=True)) / np.sqrt(theirs.var(-1, keepdims=True) + 1e-6)
    elif norm == "l2":
        theirs = numpy_normalize(theirs)

    def oracle(at: Weights) -> float:
        total = 0.0
        for x, t in zip(numpy_linear(at, "dense_head", patches), theirs, strict=True):
            p = numpy_bilinear(x, (4, 4), (2, 2))
            total += numpy_distance(p, t, loss) + centred * numpy_distance(p - p.mean(0), t - t.mean(0), loss)
        return 2 * total / len(patches)

    losses = method(given, one_step.step())
    check_against(method, oracle, of_heads(method), losses)
    # The term is relative to the best constant prediction.
    if loss == "mse":
        constant = ((theirs - theirs.mean((0, 1))) ** 2).mean()
    else:
        unit = numpy_normalize(theirs)
        mean = unit.mean((0, 1))
        constant = np.mean(1 - unit @ mean / np.linalg.norm(mean))
    assert float(losses.terms["dense_relative"]) == pytest.approx(float(losses.terms["dense"]) / constant, rel=1e-4)


def test_removing_the_mean_is_removing_the_dc_coefficient() -> None:
    """ScaleKD's frequency view: DCT-II of each channel's map, the first coefficient to 0, and back."""
    from scipy.fft import dctn, idctn

    x = np.random.default_rng(0).standard_normal((5, 6, 3))
    spectrum = dctn(x, axes=(0, 1), norm="ortho")
    spectrum[0, 0] = 0
    np.testing.assert_allclose(idctn(spectrum, axes=(0, 1), norm="ortho"), x - x.mean((0, 1)), atol=1e-12)


def test_losses_are_added_with_their_weights() -> None:
    weights = {"pooled_weight": 2.0, "relations_weight": 3.0, "dense_weight": 0.5}
    losses = losses_of(build("distill", **weights))
    expected = sum(weights[f"{name}_weight"] * float(losses.terms[name]) for name in ("pooled", "relations", "dense"))
    assert float(losses.total) == pytest.approx(expected, rel=1e-5)


def test_divergences_against_numpy_and_check_gradients() -> None:
    rng = np.random.default_rng(2)
    at = {"own": rng.standard_normal((3, 6))}
    target = rng.standard_normal((3, 6))
    known = np.array([True, False, True, True, False, True])

    def oracle(given: Weights) -> float:
        return float(np.mean([numpy_kl(t[known], s[known]) for t, s in zip(target, given["own"], strict=True)]))

    own = torch.tensor(at["own"], requires_grad=True)
    each, uniform = divergences(torch.from_numpy(target), own, torch.from_numpy(known))
    each.mean().backward()
    assert float(each.mean().detach()) == pytest.approx(oracle(at), rel=1e-10)
    assert own.grad is not None
    assert not own.grad[:, ~torch.from_numpy(known)].any()
    check_gradients(oracle, at, {"own": own.grad.numpy()})
    flat = divergences(torch.from_numpy(target), torch.zeros(3, 6, dtype=torch.float64), torch.from_numpy(known))[0]
    torch.testing.assert_close(uniform, flat)


def test_relations_do_not_depend_on_lengths_or_rotations() -> None:
    torch.manual_seed(0)
    target, own = torch.randn(2, 2, 9, 5).unbind(0)
    rotation = torch.linalg.qr(torch.randn(5, 5))[0]
    found = relations(target, own, 0.1)[0]
    torch.testing.assert_close(relations(target, 3 * own @ rotation, 0.1)[0], found, rtol=1e-4, atol=1e-6)
    assert relations(target, target @ rotation, 0.1)[0].abs().max() < 1e-5
    assert found.min() > 1e-2


# ---- The teacher


def frozen(*, patch: int, size: int, seed: int = 5) -> Frozen:
    """A teacher of random weights with its own normalisation."""
    torch.manual_seed(seed)
    backbone = backbones.build("vit_micro", image_size=(size, size), patch_size=patch, depth=2, dim=96, heads=3)
    return Frozen(
        backbone,
        spec="t",
        fingerprint="t",
        sight=Sight(backbone.stride),
        own=OWN,
        run=((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
    )


@pytest.mark.parametrize(
    ("patch", "size", "grid"), [(16, 0, (2, 2)), (14, 0, (2, 2)), (14, 70, (5, 5)), (8, 48, (6, 6))]
)
def test_a_teacher_of_another_patch_size_and_normalisation_sees_the_same_pixels(
    patch: int, size: int, grid: tuple[int, int]
) -> None:
    """Targets and loss against a computation by hand from the pixels of the teacher's view, mixed by hand."""
    teacher = frozen(patch=patch, size=patch * 4)
    method = Distill(build("distill").encoder, Distill.Config(queue=8, dense_weight=1.0, teacher_size=size))
    method.prepare(16, {"teacher": teacher})
    specs = fitted(Distill.views(method.config, (32, 32)), (32, 32), (8, 8), {"teacher": teacher.sight})
    assert specs[1].size == (grid[0] * patch, grid[1] * patch)
    pixels = torch.rand(16, 3, *specs[1].size, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    given = batch(method)
    given.views["teacher"] = (pixels - mean) / std
    share = one_step.step().shared_rand(1)
    by_hand = torch.stack([share * pixels[i] + (1 - share) * pixels[i ^ 1] for i in range(16)])
    with torch.no_grad():
        expected = teacher.backbone((by_hand - 0.5) / 0.25)
        found = method.taught(mixed(given.views["teacher"], share), maps=True)
        embedded = method.embed(given, one_step.step())
    assert found.grid == expected.grid == grid
    torch.testing.assert_close(found.patches, expected.patches, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        embedded["target"], torch.nn.functional.normalize(expected.pooled, dim=1), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(embedded["dense_mean"], expected.patches.mean(1), rtol=1e-5, atol=1e-5)


def test_the_teacher_and_the_student_have_the_same_box_flips_and_colours() -> None:
    image, teacher = fitted(
        Distill.views(Distill.Config(teacher_size=96), (32, 48)), (32, 48), (8, 8), {"teacher": Sight((14, 14))}
    )
    assert image.size == (32, 48)
    assert teacher.size == (98, 140)  # 96 x 144 to multiples of 14
    assert image.jitter == teacher.jitter
    assert image.jitter is not None
    assert (teacher.scale, teacher.grayscale, teacher.of) == (image.scale, image.grayscale, "image")
    assert (image.jitter.brightness, image.jitter.saturation, image.jitter.hue) == (0.4, 0.2, 0.1)
    assert Distill.views(Distill.Config(colour=0.0), (32, 32))[0].jitter is None


def test_last_blocks_side_by_side() -> None:
    teacher, images = networks(("teacher",))["teacher"], torch.randn(2, 3, 64, 64)
    found = last_blocks(teacher, images, 2)
    torch.testing.assert_close(found.patches[..., :96], tap(teacher, images, 0, True).patches)
    torch.testing.assert_close(found.patches[..., 96:], teacher(images).patches)
    torch.testing.assert_close(found.pooled, teacher(images).pooled)
    method = build("distill", dense_blocks=2)
    assert method.dense_head.out_features == 2 * 96
    alone = build("distill", dense_blocks=1)
    method.load_state_dict({**method.state_dict(), **{n: v for n, v in alone.state_dict().items() if "dense" not in n}})
    for name in ("pooled", "relations"):  # of the last block all the same
        assert torch.equal(losses_of(method).terms[name], losses_of(alone).terms[name])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_wee_patch16_reg1_gap_256"])
def test_blocks_of_a_teacher_of_timm_are_normed(name: str) -> None:
    """By its final norm, which the second one has behind the pooling."""
    import_timm()
    backbone = backbones.build(f"timm:{name}", image_size=(32, 32))
    teacher = Frozen(backbone, spec="t", fingerprint="t", sight=Sight(backbone.stride), own=OWN, run=OWN)
    images = torch.randn(1, 3, 32, 32)
    raw, patches = tap(teacher, images, -1, False).patches, teacher(images).patches
    assert not torch.allclose(raw, patches, atol=1e-3)
    torch.testing.assert_close(final_norm(teacher, raw), patches)
    before = tap(teacher, images, -2, True).patches
    torch.testing.assert_close(before.mean(-1), torch.zeros(before.shape[:-1]), rtol=0, atol=1e-4)
    torch.testing.assert_close(last_blocks(teacher, images, 2).patches[..., : backbone.dim], before)


# ---- Mixup


def test_pairs_are_mixed_with_one_share() -> None:
    images = torch.randn(5, 3, 4, 4)
    found = mixed(images, torch.tensor([0.3]))
    for i, j in ((0, 1), (1, 0), (2, 3), (3, 2)):
        torch.testing.assert_close(found[i], 0.3 * images[i] + 0.7 * images[j])
    assert torch.equal(found[4], images[4])


def test_student_and_teacher_see_the_same_mix_and_validation_none() -> None:
    method = build("distill", **ONLY["pooled"])
    given, taken = batch(method), one_step.step()
    share = taken.restarted().shared_rand(1)
    with torch.no_grad():
        found = method.embed(given, taken)
        own = method.encoder(mixed(given.views["image"], share)).pooled
        torch.testing.assert_close(found["student"], torch.nn.functional.normalize(method.pooled_head(own), dim=1))
        theirs = method.teacher(mixed(given.views["teacher"], share)).pooled
        torch.testing.assert_close(found["target"], torch.nn.functional.normalize(theirs, dim=1))
        whole = method.eval().embed(given, one_step.step())["target"]
        plain = method.teacher(given.views["teacher"]).pooled
    torch.testing.assert_close(whole, torch.nn.functional.normalize(plain, dim=1))
    assert not torch.allclose(whole, found["target"], atol=1e-4)


@pytest.mark.parametrize(
    ("start", "stop", "fits"), [(0, 16, True), (4, 8, True), (0, 15, True), (0, 3, False), (3, 6, False)]
)
def test_pairs_lie_within_a_micro_batch(start: int, stop: int, fits: bool) -> None:
    size = 15 if stop == 15 else 16
    taken = Step(step=0, total=1, noise=1, rows=slice(start, stop), batch_size=size, device=torch.device("cpu"))
    if fits:
        check_pairs(taken)
    else:
        with pytest.raises(UserError, match=r"3 images a process.*--no-mixup"):
            check_pairs(taken)


# ---- The queue


def test_the_queue_is_first_in_first_out_counts_and_skips_bad_steps() -> None:
    queue = FilledQueue(7, 4)
    expected: list[np.ndarray] = []
    for number, count in enumerate((3, 3, 3, 7, 2, 11, 1)):
        rows = torch.nn.functional.normalize(
            torch.randn(count, 4, generator=torch.Generator().manual_seed(number)), dim=1
        )
        state = {n: v.clone() for n, v in queue.state_dict().items()}
        queue.put_(rows * torch.nan, torch.tensor(False))
        assert all(torch.equal(v, state[n]) for n, v in queue.state_dict().items())
        queue.put_(rows, torch.tensor(True))
        expected = [*expected, *rows.numpy()][-7:]
        batch_rows = torch.ones(2, 4)
        keys, known = queue.with_batch(batch_rows)
        assert int(known.sum()) == len(expected) + 2
        assert torch.equal(keys[-2:], batch_rows)
        kept = {tuple(row) for row in keys[known][:-2].tolist()}
        assert kept == {tuple(row.tolist()) for row in expected}


def test_a_step_fills_the_queue_with_the_teachers_vectors() -> None:
    method = build("distill")
    losses = method(batch(method), step())
    assert not method.queue.rows.any()  # forward changes nothing
    after_step(method, step(ok=False), losses.carry)
    assert int(method.queue.taken) == 0
    after_step(method, step(), losses.carry)
    assert torch.equal(method.queue.rows[:16], losses.carry["target"])
    assert int(method.queue.taken) == 16


@pytest.mark.parametrize(("images", "length"), [(50, 16), (100, 32), (20_000, 4096), (50_000, 8192), (None, 8192)])
def test_the_length_of_the_queue(images: int | None, length: int) -> None:
    assert Distill.sizes(Distill.Config(), build("distill").encoder, images) == {"queue": length}


# ---- Options


def test_patches_are_left_out_until_the_end_and_the_teacher_sees_all() -> None:
    method = build("distill", token_drop=0.5, mixup=False)
    given, taken = batch(method), one_step.step()
    kept = dropped(method.encoder, given.views["image"], taken.restarted(), 0.5)["keep"]
    assert kept.shape == (16, 8)
    assert len({tuple(sorted(row.tolist())) for row in kept}) > 8
    method.train()
    with torch.no_grad():
        found = method.embed(given, taken)
        own = method.encoder(given.views["image"], keep=kept)
        target = method.teacher(given.views["teacher"]).patches
        for b in range(16):
            # The teacher's map on the student's grid, at the kept places
            t = torch.from_numpy(numpy_bilinear(target[b].double().numpy(), (2, 2), (4, 4)))[kept[b]].float()
            expected = relations(t[None], method.relations_head(own.patches[b])[None], 0.07)[0]
            torch.testing.assert_close(found["relations"][b], expected[0], rtol=1e-4, atol=1e-5)


def test_the_attention_projector_against_numpy() -> None:
    torch.manual_seed(0)
    projector = QueryProjector(5, (2, 3), 4, (3, 2)).double()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    found = projector(x, (2, 3), (3, 2)).detach().numpy()
    w = {n: p.detach().numpy() for n, p in projector.named_parameters()}

    def norm(v: np.ndarray, name: str) -> np.ndarray:
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5)
        return v * w[f"{name}.weight"] + w[f"{name}.bias"]

    erf = np.vectorize(math.erf)
    for b in range(2):
        padded = np.pad(x[b].numpy().reshape(2, 3, 5), ((1, 1), (1, 1), (0, 0)))
        maps = np.array([
            sum(w["conv.weight"][:, :, r, c] @ padded[i + r, j + c] for r in range(3) for c in range(3))
            for i in range(2) for j in range(3)
        ])  # fmt: skip
        keys = np.maximum(norm(maps, "norm"), 0) + w["positions"][0]
        queries = np.maximum(w["queries"][0] @ w["query.weight"].T + w["query.bias"], 0)
        seen = numpy_softmax(queries @ keys.T / 2) @ keys
        hidden = seen @ w["mlp.0.weight"].T + w["mlp.0.bias"]
        hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
        np.testing.assert_allclose(found[b], norm(hidden @ w["mlp.2.weight"].T + w["mlp.2.bias"], "last"), atol=1e-10)
    assert projector(x, (3, 2), (4, 4)).shape == (2, 16, 4)  # of a stage with other images


def test_the_attention_projector_trains() -> None:
    method = build("distill", **ONLY["dense"], dense_projector="attention")
    losses = method(batch(method), step())
    losses.total.backward()
    assert all(p.grad is not None and p.grad.any() for p in method.dense_head.parameters())


@pytest.mark.parametrize("name", ["resnet18", "convnext_micro"])
def test_a_convolutional_student_and_teacher(name: str) -> None:
    """The student's map of 4 x 4 places is resized to the teacher's 2 x 2; a teacher without class token."""
    options = {"stem": "small"} if name == "resnet18" else {"stem_patch": 1}
    torch.manual_seed(0)
    student = backbones.build(name, image_size=(32, 32), **options)
    method = Distill(student, Distill.Config(queue=8, dense_weight=1.0))
    method.prepare(16, networks(("teacher",)))
    losses = method(batch(method), step())
    losses.total.backward()
    assert all(torch.isfinite(value) for value in losses.terms.values())
    assert all(p.grad is not None for p in method.parameters())
    teacher = Frozen(student, spec="t", fingerprint="t", sight=Sight(student.stride), own=OWN, run=OWN)
    pupil = Distill(build("distill").encoder, Distill.Config(queue=8, dense_weight=1.0))
    pupil.prepare(16, {"teacher": teacher})
    given = batch(pupil)
    given.views["teacher"] = given.views["image"]
    assert torch.isfinite(pupil(given, step()).total)


def test_collapsed_is_what_it_states() -> None:
    states = {}
    pooled = build("distill", **ONLY["pooled"])
    make_zero_(pooled.pooled_head)  # no image is nearer to one than to another
    states["pooled_relative"] = losses_of(pooled)
    same = build("distill", **ONLY["relations"])
    make_constant_(same.encoder)
    states["relations_relative"] = losses_of(same)
    for loss in ("mse", "cosine"):
        dense = build("distill", **ONLY["dense"], dense_loss=loss, mixup=False)
        make_zero_(dense.dense_head)
        with torch.no_grad():
            patches = dense.teacher(batch(dense).views["teacher"]).patches
            unit = torch.nn.functional.normalize(patches, dim=-1) if loss == "cosine" else patches
            dense.dense_head.bias.copy_(unit.mean((0, 1)))
        states["dense_relative"] = losses_of(dense)
        check_stated(build("distill", dense_loss=loss, dense_centred_weight=0.0), states)


# ---- Several teachers


def take(method: Distill, number: int, micro_batches: int = 1, ok: bool = True):
    """One step without an optimiser, as of GradCache: each part is embedded, then one loss of all. Returns it."""
    parts, size = [], one_step.BATCH // micro_batches
    for i in range(micro_batches):
        rows = slice(i * size, (i + 1) * size)
        parts.append(method.embed(batch(method, rows), one_step.step(rows, number=number)))
    whole = one_step.step(slice(0, one_step.BATCH), number=number)
    losses = method.loss({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, whole)
    whole.ok = torch.tensor(ok)
    after_step(method, whole, losses.carry)
    return losses


TWO = {"more_teachers": ("b",), "standardise_images": 16}


def test_each_teacher_has_heads_of_its_own_and_its_weight() -> None:
    both = build("distill", **TWO, standardise="none", teacher_weights=(1.0, 0.25), mixup=False)
    losses = losses_of(both)
    total = 0.0
    for name, prefix, weight in (("teacher", "", 1.0), ("teacher2", "teacher2_", 0.25)):
        alone = build("distill", mixup=False)
        alone.teachers = [both.teachers[bool(prefix)]]
        heads = both.further[0] if prefix else both
        own = {n: v for n, v in heads.state_dict().items() if not n.startswith(("encoder", "further"))}
        alone.load_state_dict({**{n: v for n, v in both.state_dict().items() if n.startswith("encoder")}, **own})
        given = batch(alone)
        given.views["teacher"] = batch(both).views[name]
        expected = alone(given, step())
        for term, value in expected.terms.items():
            torch.testing.assert_close(losses.terms[prefix + term], value, rtol=1e-5, atol=1e-6)
        total += weight * float(expected.total.detach())
    assert float(losses.total) == pytest.approx(total, rel=1e-5)
    assert set(losses.carry) == {"target", "teacher2/target", "place"}
    assert float(losses.terms["teacher2_dense"]) != pytest.approx(float(losses.terms["dense"]), rel=1e-4)
    assert set(both.collapsed(16)) <= set(losses.terms)
    assert (
        sum(name.startswith("teacher2_") for name in build("distill", **TWO, dense_centred_weight=0.0).collapsed(16))
        == 3
    )


def numpy_whitened(x: np.ndarray, of: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Centred by the mean of the rows `of`, then rotated and scaled."""
    return (x - of.mean(0)) @ transform


def test_standardised_targets_of_two_teachers_and_gradients_against_numpy() -> None:
    """RADIO's form: 1 - cosine of pooled vectors, mean square of maps, both of PHI-S targets."""
    knobs = {"relations_weight": 0.0, "pooled_loss": "cosine", "dense_weight": 2.0, "dense_centred_weight": 0.0}
    method = build("distill", **TWO, **knobs, teacher_weights=(1.0, 3.0), mixup=False)
    first = take(method, 0)
    assert float(first.total.detach()) == 0.0  # the statistics are not known
    assert all(float(first.terms[name]) == 1.0 for name in first.terms if name.endswith("relative"))
    given = batch(method)
    pixels = method.encoder(given.views["image"])
    pooled, patches = pixels.pooled.detach().double().numpy(), pixels.patches.detach().double().numpy()
    targets = []
    for name, teacher, heads in zip(("teacher", "teacher2"), method.teachers, (method, method.further[0]), strict=True):
        seen = teacher(given.views[name])
        found = []
        for part, statistics in (
            (seen.pooled[:, None], heads.pooled_statistics),
            (seen.patches, heads.dense_statistics),
        ):
            rows, matrix = part.flatten(0, 1).double().numpy(), statistics.transform.double().numpy()
            assert bool(statistics.ready)
            # A rotation and one scale, by which the mean variance of the channels becomes 1
            np.testing.assert_allclose(matrix.T @ matrix, np.eye(96) / rows.var(0).mean(), rtol=1e-3, atol=1e-4)
            found.append(numpy_whitened(part.double().numpy(), rows, matrix))
        targets.append((found[0][:, 0], found[1]))

    def oracle(at: Weights) -> float:
        total = 0.0
        for prefix, weight, (vectors, maps) in zip(("", "further.0."), (1.0, 3.0), targets, strict=True):
            own = numpy_linear(at, f"{prefix}pooled_head", pooled)
            cosines = (numpy_normalize(own) * numpy_normalize(vectors)).sum(-1)
            dense = [
                numpy_distance(numpy_bilinear(x, (4, 4), (2, 2)), t, "mse")
                for x, t in zip(numpy_linear(at, f"{prefix}dense_head", patches), maps, strict=True)
            ]
            total += weight * (np.mean(1 - cosines) + 2 * np.mean(dense))
        return float(total)

    check_against(method, oracle, of_heads(method), method(given, one_step.step()))


def test_no_teacher_dominates() -> None:
    """The scale of a teacher's features changes nothing, and a constant prediction of each costs 1."""
    found = []
    for scale in (1.0, 100.0):
        method = build("distill", **ONLY["dense"], **TWO, mixup=False)
        with torch.no_grad():
            method.teachers[1].backbone.norm.weight.mul_(scale)
            method.teachers[1].backbone.norm.bias.mul_(scale)
        take(method, 0)
        for heads in (method, method.further[0]):
            make_zero_(heads.dense_head)
        found.append(losses_of(method))
    for losses in found:
        for prefix in ("", "teacher2_"):
            assert float(losses.terms[f"{prefix}dense"]) == pytest.approx(1.0, rel=1e-3)
            assert float(losses.terms[f"{prefix}dense_relative"]) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("knobs", [{}, {"pooled_loss": "mse"}, {"standardise": "channels"}], ids=str)
def test_micro_batches_and_skipped_steps_with_two_teachers(knobs: dict) -> None:
    """As on several processes: losses, queues and statistics are functions of the global batch."""
    whole, parts = (build("distill", **TWO | {"standardise_images": 32} | knobs) for _ in range(2))
    for number in range(4):
        one, other = take(whole, number, ok=number != 1), take(parts, number, micro_batches=4, ok=number != 1)
        torch.testing.assert_close(one.total, other.total, rtol=1e-4, atol=1e-5)
        assert bool(whole.dense_statistics.ready) == (number >= 2)  # of two steps that were not skipped
    state = parts.state_dict()
    for name, value in whole.state_dict().items():
        if "queue" in name or ("statistics" in name and "transform" not in name):
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4, msg=name)
    if "pooled_loss" not in knobs:
        for heads in (whole, whole.further[0]):  # vectors of before the statistics were known are not kept
            assert int(heads.queue.taken) == 16
    assert take(whole, 5).carry.keys() == (
        {"target", "teacher2/target", "place"} if whole.config.pooled_loss == "similarity" else set()
    )


def test_a_run_with_two_teachers(pretrain_here, photos_in_classes: Path, tmp_path: Path, capsys) -> None:
    """Both are in the manifest, the lineage and the scores; it is resumed with the same bits, and not with others."""
    first, second = exported(tmp_path / "t"), exported(tmp_path / "u", seed=4)
    common = ["--method", "distill", "--data", photos_in_classes, "--image-size", 32, "--encoder", "vit_micro"]
    common += ["--patch-size", 8, "--depth", 2, "--dim", 64, "--heads", 2, "--batch-size", 16, "--workers", 0]
    common += ["--teacher", first, "--more-teachers", second, "--queue", 16, "--dense-weight", 1]
    common += ["--standardise-images", 32, "--log-every", 1, "--picture-every", 0]
    pretrain_here(*common, "--steps", 4, "--knn-every", 2, "--out", tmp_path / "whole")
    kept = (tmp_path / "whole" / "verdict.txt").read_text()
    assert "kNN top-1 of the teacher on the same images" in kept
    assert f"kNN top-1 of teacher2, {second}, on the same images" in kept
    scored = [line for line in metrics(tmp_path / "whole") if "knn/top1" in line]
    assert len(scored) == 2
    for line in scored:
        for name in ("teacher", "teacher2"):
            assert line[f"knn/{name}_share"] == pytest.approx(line["knn/top1"] / line[f"knn/{name}_top1"])
    recorded = json.loads((tmp_path / "whole" / "manifest.json").read_text())["networks"]
    known = [encoder.load(each).fingerprint for each in (first, second)]
    assert [recorded[name]["fingerprint"] for name in ("teacher", "teacher2")] == known
    lineage = encoder.load(tmp_path / "whole").lineage
    assert [lineage[name]["fingerprint"] for name in ("teacher", "teacher2")] == known
    assert "teacher2: " in (tmp_path / "whole" / "encoder" / "README.md").read_text()

    stopped = ["--no-score", "--checkpoint-every", 1, "--out", tmp_path / "parts"]
    pretrain_here(*common, *stopped, "--steps", 4)
    for each in (tmp_path / "parts" / "checkpoints").iterdir():
        if each.name.endswith("4"):
            shutil.rmtree(each)  # as if the process was killed after step 3
    pretrain_here(*common, *stopped, "--steps", 4)
    ends = [checkpoint.load(tmp_path / name / "checkpoints", 4) for name in ("whole", "parts")]
    assert_same_bits(*ends)
    shutil.rmtree(second)
    exported(second, seed=5)
    capsys.readouterr()
    assert main([str(word) for word in (*common, *stopped, "--steps", 4)]) == 2
    assert "began with another teacher2" in capsys.readouterr().err


@pytest.mark.parametrize("standardise", ["none", "channels"])
def test_taps_of_two_blocks_and_gradients_against_numpy(standardise: str) -> None:
    knobs = {**ONLY["dense"], "dense_taps": (0.5, 1.0), "mixup": False, "standardise": standardise}
    method = build("distill", **knobs, standardise_images=16)
    if standardise != "none":
        take(method, 0)
    given = batch(method)
    with torch.no_grad():
        own, target = (
            method.encoder(given.views["image"], blocks=(0,)),
            method.teacher(given.views["teacher"], blocks=(0,)),
        )
        first = final_norm(method.teacher, target.blocks[0])[:, 1:]
    assert (method.encoder.depth, method.teacher.backbone.depth) == (2, 2)
    pairs = {"tap1": (own.blocks[0][:, 1:], first), "dense": (own.patches, target.patches)}
    rows = {name: (x.double().numpy(), t.double().numpy()) for name, (x, t) in pairs.items()}
    if standardise != "none":
        rows = {name: (x, (t - t.mean((0, 1))) / t.std((0, 1))) for name, (x, t) in rows.items()}

    def oracle(at: Weights) -> float:
        total = 0.0
        for name, (x, theirs) in rows.items():
            for own_map, t in zip(numpy_linear(at, f"{name}_head", x), theirs, strict=True):
                total += numpy_distance(numpy_bilinear(own_map, (4, 4), (2, 2)), t, "mse") / len(x)
        return total

    losses = method(given, one_step.step())
    check_against(method, oracle, of_heads(method), losses)
    assert {"tap1", "dense", "tap1_relative"} <= set(losses.terms)
    assert set(method.collapsed(16)) == {"tap1_relative", "dense_relative"}


# ---- The teacher's prototype heads


def with_heads(kind: str) -> Frozen:
    """A frozen teacher that is a small run of this method."""
    torch.manual_seed(7)
    backbone = backbones.build("vit_micro", image_size=(32, 32), patch_size=16, depth=2, dim=96, heads=3, pool="cls")
    method_class = pretext.load(kind)
    method = method_class(backbone, method_class.Config(prototypes=12, hidden_dim=16, bottleneck_dim=8))
    return Frozen(backbone, spec="t", fingerprint="t", sight=Sight((16, 16)), own=OWN, run=OWN, method=method)


def numpy_sinkhorn(logits: np.ndarray, temperature: float) -> np.ndarray:
    """(R, K): three times columns, then rows, divided by their sums."""
    q = np.exp((logits - logits.max()) / temperature)
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdims=True)
    return q


@pytest.mark.parametrize("kind", ["dino", "ibot", "dinov2"])
def test_losses_through_the_teachers_heads_and_gradients_against_numpy(kind: str) -> None:
    teacher = with_heads(kind)
    knobs = {"pooled_weight": 0.0, "relations_weight": 0.0, "dense_weight": 0.0, "heads_weight": 2.0, "mixup": False}
    method = one_step.build_reading("distill", {"teacher_heads": teacher}, knobs)
    patches = kind != "dino"
    perturb_(method.class_head)  # vectors of length 1e-4 have gradients that no finite difference has
    if patches:
        perturb_(method.patch_head)
    given = batch(method)
    with torch.no_grad():
        own, target = method.encoder(given.views["image"]), teacher(given.views["teacher"])
    parts = {"class_head": (own.cls[:, None], target.cls[:, None])}
    if patches:
        resized = [numpy_bilinear(x.double().numpy(), (4, 4), (2, 2)) for x in own.patches]
        parts["patch_head"] = (torch.from_numpy(np.array(resized)), target.patches)
    assert hasattr(method, "patch_head") == patches
    wanted = {}
    for (name, (_, theirs)), head in zip(parts.items(), teacher.method.prototype_heads(), strict=False):
        logits = numpy_prototype_head(head, theirs)
        wanted[name] = numpy_sinkhorn(logits.reshape(-1, 12), 0.07).reshape(logits.shape)

    def oracle(at: Weights) -> float:
        total = 0.0
        for name, (vectors, _) in parts.items():
            x = vectors.double().numpy()
            for k in (0, 2, 4):
                x = x @ at[f"{name}.mlp.{k}.weight"].T + at[f"{name}.mlp.{k}.bias"]
                x = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2 if k < 4 else x
            logits = numpy_normalize(x) @ numpy_normalize(at[f"{name}.prototypes.weight"]).T / 0.1
            for p, own_logits in zip(wanted[name].reshape(-1, 12), logits.reshape(-1, 12), strict=True):
                total += 2 * (p * (np.log(p) - np.log(numpy_softmax(own_logits)))).sum() / logits[..., 0].size
        return float(total)

    check_against(method, oracle, of_heads(method), method(given, one_step.step()))


def test_collapsed_heads_are_what_they_state() -> None:
    knobs = {"pooled_weight": 0.0, "relations_weight": 0.0, "dense_weight": 0.0, "heads_weight": 1.0}
    method = one_step.build_reading("distill", {"teacher_heads": with_heads("dinov2")}, knobs)
    for head in (method.class_head, method.patch_head):
        make_uniform_(head.prototypes)
    losses = losses_of(method)
    check_stated(method, {"class_relative": losses, "patch_relative": losses})


def test_a_run_as_teacher_gives_its_ema_teachers_heads(photos: Path, tmp_path: Path, pretrain_here) -> None:
    small = ["--data", photos, "--image-size", 32, "--encoder", "vit_micro", "--patch-size", 8, "--depth", 1]
    small += ["--batch-size", 8, "--steps", 1, "--workers", 0, "--no-score", "--picture-every", 0]
    heads = ["--prototypes", 16, "--hidden-dim", 16, "--bottleneck-dim", 8, "--local-views", 0, "--lr", "1e-2"]
    pretrain_here("--method", "dino", *small, *heads, "--warmup-steps", 0, "--pool", "cls", "--out", tmp_path / "dino")
    found = teacher_run.open_run(str(tmp_path / "dino"), "distill", "vit_micro", heads=True)
    kept = checkpoint.load(tmp_path / "dino" / "checkpoints", 1)["method"]
    for name, value in found.method.state_dict().items():
        assert torch.equal(value, kept["centre" if name == "centre" else f"teacher.{name}"]), name
    assert not torch.equal(kept["head.prototypes.weight"], kept["teacher.head.prototypes.weight"])
    with pytest.raises(UserError, match="is a run of dino, which has no decoder of masked patches"):
        teacher_run.open_run(str(tmp_path / "dino"), "g2sd", "vit_micro")
    flags = ["--method", "distill", *small, "--teacher", tmp_path / "dino", "--heads-weight", 1, "--queue", 8]
    pretrain_here(*flags, "--out", tmp_path / "run")
    (facts,) = json.loads((tmp_path / "run" / "manifest.json").read_text())["networks"].values()
    assert facts["part"] == "heads"
    assert not any("teacher" in name for name in checkpoint.load(tmp_path / "run" / "checkpoints", 1)["method"])
    pretrain_here("--method", "mae", *small, "--out", tmp_path / "mae")
    with pytest.raises(UserError, match=r"is a run of mae, which has no prototype heads.*give a run of dino, ibot or"):
        teacher_run.open_run(str(tmp_path / "mae"), "distill", "vit_micro", heads=True)


# ---- Mistakes


def test_mistakes_in_flags() -> None:
    with pytest.raises(UserError, match="all 0: nothing is to be learned"):
        Distill.Config(pooled_weight=0.0, relations_weight=0.0)
    with pytest.raises(UserError, match=r"has 1 values, and there are 2 teachers .*give one for each"):
        Distill.Config(more_teachers=("b",), teacher_weights=(1.0,))
    for taps in ((0.5,), (0.5, 0.5, 1.0), ()):
        with pytest.raises(UserError, match="--dense-taps: give different shares of the depth, the last one 1"):
            Distill.Config(dense_taps=taps)
    with pytest.raises(UserError, match="--dense-taps and --dense-blocks both choose blocks"):
        Distill.Config(dense_taps=(0.5, 1.0), dense_blocks=2)
    with pytest.raises(UserError, match="--teacher-weights are all 0"):
        Distill.Config(more_teachers=("b",), teacher_weights=(0.0, 0.0))
    with pytest.raises(UserError, match="needs the student's whole map: leave out --token-drop"):
        Distill.Config(token_drop=0.5, dense_weight=1.0, dense_projector="attention")
    with pytest.raises(UserError, match=r"--dense-blocks 3: teacher has 2 blocks"):
        build("distill", dense_blocks=3)
    resnet = backbones.build("resnet18", image_size=(32, 32), stem="small")
    with pytest.raises(UnsupportedByBackbone, match=r"distill --token-drop needs an encoder that supports 'keep'"):
        Distill(resnet, Distill.Config(token_drop=0.5))
    teacher = Frozen(resnet, spec="runs/r", fingerprint="t", sight=Sight((8, 8)), own=OWN, run=OWN)
    method = Distill(build("distill").encoder, Distill.Config(queue=8, dense_weight=1.0, dense_blocks=2))
    with pytest.raises(UserError, match=r"--dense-blocks 2: runs/r gives the features of its last block only"):
        method.prepare(16, {"teacher": teacher})
    method = Distill(build("distill").encoder, Distill.Config(queue=8, dense_weight=1.0, dense_taps=(0.5, 1.0)))
    with pytest.raises(UserError, match=r"--dense-taps: runs/r gives the features of its last block only"):
        method.prepare(16, {"teacher": teacher})
    coarse = Distill(backbones.build("resnet18", image_size=(32, 32), stem="imagenet"), Distill.Config(queue=8))
    with pytest.raises(UserError, match=r"compares the places of an image.*1 x 1.*give --relations-weight 0"):
        coarse.prepare(16, networks(("teacher",)))


def test_a_run_without_a_teacher_or_with_one_that_cannot_see_its_view(pretrain, photos: Path, tmp_path: Path) -> None:
    flags = ["--method", "distill", "--data", photos, "--image-size", 32, "--steps", 1, "--out", tmp_path / "run"]
    assert "name it with --teacher" in pretrain(*flags, code=2).stderr
    torch.manual_seed(0)
    teacher = backbones.build("convnext_micro", image_size=(32, 32), stem_patch=1)

    class Picky(type(teacher)):  # type: ignore[misc]
        def forward(self, images, **options):
            if images.shape[-1] != 64:
                raise RuntimeError("only 64 pixels")
            return super().forward(images, **options)

    teacher.__class__ = Picky
    network = Frozen(teacher, spec="t", fingerprint="t", sight=Sight((8, 8)), own=OWN, run=OWN)
    with pytest.raises(UserError, match=r"--teacher t does not take images of 32 x 32 pixels: only 64 pixels"):
        network.check("teacher", (32, 32), own_pixels=True)
    network.check("teacher", (64, 64), own_pixels=True)


# ---- The share of the teacher's kNN


def exported(path: Path, seed: int = 3) -> Path:
    torch.manual_seed(seed)
    backbone = backbones.build("vit_micro", image_size=(32, 32), patch_size=8, depth=2, pool="mean")
    encoder.save(path, Encoder(backbone, "vit_micro", Preprocessing.for_size((32, 32), *OWN), {}))
    return path


def test_a_run_reports_the_share_of_its_teachers_knn(pretrain, photos_in_classes: Path, tmp_path: Path) -> None:
    """A student that is its teacher, and is not trained, reaches all of it."""
    teacher = exported(tmp_path / "t")
    common = ["--data", photos_in_classes, "--image-size", 32]
    common += ["--encoder", "vit_micro", "--patch-size", 8, "--depth", 2, "--pool", "mean"]
    common += ["--mean", *OWN[0], "--std", *OWN[1], "--batch-size", 16, "--workers", 0, "--log-every", 1]
    flags = ["--method", "distill", *common, "--teacher", teacher, "--queue", 16, "--steps", 2, "--knn-every", 1]
    said = pretrain(*flags, "--init-from", teacher, "--lr", 0, "--out", tmp_path / "run").stdout
    kept = (tmp_path / "run" / "verdict.txt").read_text()
    line = next(line for line in kept.splitlines() if "teacher" in line)
    assert line in said
    student = float(kept.split(": ")[1].split(" %")[0])
    assert line == f"kNN top-1 of the teacher on the same images: {student:.1f} %; the encoder reaches 100 % of it"
    for each in (line for line in metrics(tmp_path / "run") if "knn/top1" in line):
        assert each["knn/teacher_top1"] == each["knn/top1"]
        assert each["knn/teacher_share"] == 1.0
    # Any method with a teacher; none without one
    pretrain("--method", "featmim", *common, "--teacher", teacher, "--steps", 1, "--out", tmp_path / "other")
    assert "of the teacher on the same images" in (tmp_path / "other" / "verdict.txt").read_text()
    pretrain("--method", "mae", *common, "--knn-every", 1, "--steps", 1, "--out", tmp_path / "mae")
    assert "teacher" not in (tmp_path / "mae" / "verdict.txt").read_text()
    assert not any("knn/teacher_top1" in line for line in metrics(tmp_path / "mae"))


def test_a_teacher_that_is_gone_at_the_end_costs_only_its_line(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from ssl_pretrain.loop import verdict
    from ssl_pretrain.loop.score import share

    run = SimpleNamespace(teacher=str(tmp_path / "gone"), encoder="vit_micro")
    (tmp_path / "manifest.json").write_text(json.dumps({"networks": {"teacher": {"spec": "gone"}}}))
    (line,) = verdict.of_teacher(run, tmp_path, 50.0, None)
    assert line.startswith("the teacher could not be scored: ")
    more = {"teacher": {"spec": "gone"}, "teacher2": {"spec": str(tmp_path / "lost")}}
    (tmp_path / "manifest.json").write_text(json.dumps({"networks": more}))
    lines = verdict.of_teacher(run, tmp_path, 50.0, None)
    assert lines[1].startswith(f"teacher2, {tmp_path / 'lost'}, could not be scored: ")
    (tmp_path / "manifest.json").write_text(json.dumps({"networks": {"anchor": {"spec": "gone"}}}))
    assert verdict.of_teacher(run, tmp_path, 50.0, None) == []
    assert (share(30.0, 60.0), share(30.0, 0.0)) == (0.5, 0.0)


def test_the_teacher_is_in_no_checkpoint() -> None:
    method = build("distill")
    inside = {id(p) for p in method.parameters()}
    assert not any(id(p) in inside for p in method.teacher.backbone.parameters())
    assert {name.split(".")[0] for name in method.state_dict()} == {
        *("encoder", "pooled_head", "relations_head", "dense_head", "queue")
    }
