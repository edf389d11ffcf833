"""DINOv2 against float64 NumPy written from the paper."""

import math

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_certain_, make_constant_, make_uniform_
from numpy_oracles import (
    directional_derivative,
    numpy_masked_patches,
    numpy_normalize,
    numpy_prototype_head,
    numpy_sinkhorn,
    numpy_softmax,
    numpy_view_pairs,
)
from ssl_pretrain.methods.dinov2 import DINOv2

from ssl_pretrain import backbones
from ssl_pretrain.conformance import one_step
from ssl_pretrain.conformance.one_step import after_step
from ssl_pretrain.data.views import fitted
from ssl_pretrain.errors import UserError
from ssl_pretrain.pretext import Batch, Step

KERNELS = 2563  # of a step: python tests/kernels.py dinov2
DEVICE_KERNELS = 607  # with the optimiser, on an accelerator: python tests/device.py dinov2

SIZE = (32, 48)
BATCH = 5
SMALL = {"hidden_dim": 24, "bottleneck_dim": 8, "prototypes": 12, "local_views": 2}


def build(**knobs: object) -> DINOv2:
    torch.manual_seed(0)
    options = {**backbones.defaults("vit_micro"), "dim": 32, "patch_size": 8, "depth": 2, **DINOv2.recipe.encoder}
    encoder = backbones.build("vit_micro", image_size=SIZE, **{**options, "drop_path": 0.0})
    method = DINOv2(encoder, DINOv2.Config(**{**SMALL, **knobs})).double()
    method.prepare(100)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # so that teacher and student differ
        for name, centre in list(method.named_buffers(recurse=False)):
            setattr(method, name, 0.05 * torch.randn_like(centre))
    return method


def step(number: int = 1, noise: int = 3, batch: int = BATCH) -> Step:
    where = {"rows": slice(0, batch), "batch_size": batch, "device": torch.device("cpu")}
    return Step(step=number, total=100, noise=noise, **where)


def batch(method: DINOv2) -> Batch:
    generator = torch.Generator().manual_seed(1)
    specs = fitted(DINOv2.views(method.config, SIZE), SIZE, method.encoder.stride)
    views = {
        s.name: torch.randn(*((s.count,) if s.count > 1 else ()), BATCH, 3, *s.size, generator=generator).double()
        for s in specs
    }
    return Batch(views=views, index=torch.arange(BATCH))


def koleo(x: np.ndarray) -> float:
    x = numpy_normalize(x)
    near = [min(np.linalg.norm(a - b) for j, b in enumerate(x) if j != i) for i, a in enumerate(x)]
    return -float(np.mean(np.log(near)))


def kde(x: np.ndarray, kappa: float) -> float:
    kernel = np.exp(kappa * numpy_normalize(x) @ numpy_normalize(x).T)
    np.fill_diagonal(kernel, 0)
    return float(np.mean(np.log(kernel.sum(1) / (len(x) - 1))))


def by_loops(method: DINOv2, batch: Batch, step: Step) -> dict[str, float]:
    """The losses from the encoders' features, view by view, over lists of masked patches without padding."""
    config, names = method.config, ("class", "class" if method.config.shared_head else "patch")
    masks = method.masks((4, 6), step)
    views = [batch.views["global1"], batch.views["global2"]]
    with torch.no_grad():
        seen = [method.teacher["encoder"](v) for v in views]
        masked = [method.encoder(v, replace=(masks[:, i], method.mask_token)) for i, v in enumerate(views)]
        local = [method.encoder(v) for v in batch.views["local"]]
    share = min(1.0, step.progress / config.teacher_temperature_warmup)
    temperature = config.teacher_temperature_start * (1 - share) + config.teacher_temperature * share
    of_views = masks.transpose(0, 1).numpy()
    teacher = np.stack([numpy_prototype_head(method.teacher["heads"][names[0]], f.cls) for f in seen])
    parts = np.stack([numpy_prototype_head(method.teacher["heads"][names[1]], f.patches) for f in seen])
    if config.centering == "centre":
        assigned = numpy_softmax((teacher - method.class_centre.numpy()) / temperature)
        targets = numpy_softmax((parts - method.patch_centre.numpy()) / temperature)
    else:
        flat = teacher.reshape(-1, teacher.shape[-1])
        assigned = numpy_sinkhorn(flat, temperature, config.sinkhorn_iterations).reshape(teacher.shape)
        targets = np.zeros_like(parts)
        targets[of_views] = numpy_sinkhorn(parts[of_views], temperature, config.sinkhorn_iterations)
    student = np.stack([numpy_prototype_head(method.heads[names[0]], f.cls) for f in masked + local])
    of_class = numpy_view_pairs(student, assigned, config.student_temperature)
    patch = np.mean(
        [
            numpy_masked_patches(
                numpy_prototype_head(method.heads[names[1]], f.patches), t, m, config.student_temperature
            )
            for f, t, m in zip(masked, targets, of_views, strict=True)
        ]
    )
    tokens = [f.cls.numpy() for f in masked]
    spread = sum(koleo(x) if config.regulariser == "koleo" else kde(x, config.concentration) for x in tokens)
    total = config.class_weight * of_class + config.patch_weight * patch + config.regulariser_weight * spread
    return {"total": total, "class": of_class, "patch": float(patch), config.regulariser: spread}


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"centering": "centre", "shared_head": True, "regulariser_weight": 0.0},
        {
            "regulariser": "kde",
            "concentration": 3.0,
            "class_weight": 0.5,
            "patch_weight": 2.0,
            "sinkhorn_iterations": 1,
        },
    ],
    ids=["paper", "centre and shared head", "kde"],
)
def test_loss_and_gradient(knobs: dict) -> None:
    method = build(**knobs)
    images = batch(method)
    losses = method(images, step())
    expected = by_loops(method, images, step())
    assert float(losses.total.detach()) == pytest.approx(expected["total"], rel=1e-5)
    for name in losses.terms.keys() - {"teacher_entropy"}:
        assert float(losses.terms[name]) == pytest.approx(expected[name], rel=1e-5), name
    assert (method.config.regulariser in losses.terms) == (method.config.regulariser_weight > 0)
    losses.total.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    trained = [p for p in method.parameters() if p.requires_grad]
    for group in (trained, [method.mask_token], list(method.heads.parameters())):
        directions = [torch.randn_like(p) for p in group]
        found = sum(float((p.grad * d).sum()) for p, d in zip(group, directions, strict=True))
        slope = directional_derivative(group, directions, lambda: by_loops(method, images, step())["total"], 1e-6)
        assert found == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("centering", ["sinkhorn", "centre"])
def test_autocast_changes_little(centering: str) -> None:
    method = build(centering=centering, teacher_temperature=0.2, teacher_temperature_start=0.2).float()
    images = batch(method)
    images.views = {name: view.float() for name, view in images.views.items()}
    exact = method(images, step())
    with torch.autocast("cpu", torch.bfloat16):
        found = method(images, step())
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total, exact.total, rtol=0.02, atol=0)
    torch.testing.assert_close(found.carry, exact.carry, rtol=0.05, atol=0.05)
    found.total.backward()


def test_heads_are_one_or_two() -> None:
    assert len(build(shared_head=True).heads) == 1
    two = build(shared_head=False)
    assert len(two.heads) == len(two.teacher["heads"]) == 2


def test_the_student_cannot_see_what_it_predicts() -> None:
    method = build(local_views=0)
    images = batch(method)
    for view in images.views.values():
        view.requires_grad_()
    method(images, step()).total.backward()
    masks = method.masks((4, 6), step())
    for i, name in enumerate(("global1", "global2")):
        grad = images.views[name].grad.abs().sum(1).unflatten(2, (6, 8)).unflatten(1, (4, 8)).sum((2, 4)).flatten(1)
        assert masks[:, i].any()
        assert bool((grad[masks[:, i]] == 0).all())
        assert bool((grad[~masks[:, i]] > 0).all())


@pytest.mark.parametrize("complete", [False, True])
def test_masks_are_stratified_over_the_global_batch(complete: bool) -> None:
    method, many = build(complete_masks=complete), 200
    whole = method.masks((14, 14), step(batch=many))
    counts = whole.sum(2).flatten()
    assert int((counts > 0).sum()) == many  # half of 2 * 200 views
    edges = np.linspace(0.1, 0.5, many + 1)
    found, most, least = np.sort(counts[counts > 0].numpy()), np.floor(196 * edges[1:]), np.floor(196 * edges[:-1])
    assert (found <= most).all()
    assert (found >= least - (0 if complete else 6)).all()
    if not complete:
        assert 0.02 < np.mean(found < least) < 0.3  # some masks stay short
    # A process's rows are rows of the same masks.
    share = step(batch=many)
    share.rows = slice(60, 100)
    assert torch.equal(method.masks((14, 14), share), whole[60:100])
    # The image's place in the batch says nothing about its mask: another step has another order.
    other = method.masks((14, 14), step(batch=many, noise=4)).sum(2).flatten()
    assert abs(np.corrcoef(counts.numpy(), other.numpy())[0, 1]) < 0.25


def test_knobs_of_the_masks() -> None:
    method = build(mask_probability=1.0, mask_ratio=(0.25, 0.25), complete_masks=True)
    assert bool((method.masks((4, 6), step()).sum(2) == 6).all())


def test_teacher_and_centres_follow() -> None:
    method = build(momentum=0.9, centre_momentum=0.7, centering="centre")
    images = batch(method)
    masks = method.masks((4, 6), step())
    views = [images.views["global1"], images.views["global2"]]
    with torch.no_grad():
        seen = [method.teacher["encoder"](v) for v in views]
    outputs = [numpy_prototype_head(method.teacher["heads"]["class"], f.cls) for f in seen]
    parts = [numpy_prototype_head(method.teacher["heads"]["patch"], f.patches)[masks[:, i]] for i, f in enumerate(seen)]
    expected = {
        "class_centre": 0.7 * method.class_centre.numpy() + 0.3 * np.mean(outputs, axis=(0, 1)),
        "patch_centre": 0.7 * method.patch_centre.numpy() + 0.3 * np.concatenate(parts).mean(0),
    }
    weight = 1 - (1 - 0.9) * (math.cos(math.pi * 0.01) + 1) / 2
    teacher = {
        n: weight * p.numpy() + (1 - weight) * dict(method.named_parameters())[n].detach().numpy()
        for n, p in method.teacher.named_parameters()
    }
    here = step()
    losses = method(images, here)
    before = {n: v.clone() for n, v in method.state_dict().items()}
    here.ok = torch.zeros((), dtype=torch.bool)
    after_step(method, here, losses.carry)
    assert all(torch.equal(v, before[n]) for n, v in method.state_dict().items())
    here.ok = torch.ones((), dtype=torch.bool)
    after_step(method, here, losses.carry)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(method, name).numpy(), value, rtol=1e-5, atol=1e-7)
    for name, parameter in method.teacher.named_parameters():
        np.testing.assert_allclose(parameter.numpy(), teacher[name], rtol=1e-7, atol=1e-9)
    assert method.exported() is method.teacher["encoder"]
    # A step in which no patch was masked leaves the patches' centre where it is.
    still = method.patch_centre.clone()
    after_step(method, here, losses.carry | {n: torch.zeros_like(losses.carry[n]) for n in ("patch", "patches")})
    assert torch.equal(method.patch_centre, still)


@pytest.mark.parametrize(
    ("centering", "regulariser", "weight"), [("sinkhorn", "koleo", 0.1), ("centre", "kde", 0.1), ("centre", "koleo", 0)]
)
def test_collapsed_state_has_the_stated_loss(centering: str, regulariser: str, weight: float) -> None:
    knobs = {"centering": centering, "regulariser": regulariser, "regulariser_weight": weight}
    method = one_step.build("dinov2", **knobs, mask_ratio=(0.4, 0.5))  # four patches at least: a rectangle has no fewer
    for heads in (method.heads, method.teacher["heads"]):
        for head in heads.values():
            make_uniform_(head.prototypes)
    states = dict.fromkeys(("class", "patch"), losses_of(method))

    method = one_step.build("dinov2", **knobs)
    if centering == "centre":  # Sinkhorn-Knopp lets no prototype have all images
        make_certain_(method.teacher["heads"]["class"])
        states["teacher_entropy"] = losses_of(method)

    make_constant_(method.encoder)
    if weight:
        states[regulariser] = losses_of(method)
    check_stated(method, states)


def test_prototypes_are_frozen_at_the_start() -> None:
    method = build(freeze_prototypes=0.02)
    for number, still in ((1, True), (2, False)):
        method.zero_grad()
        method(batch(method), step(number)).total.backward()
        for head in method.heads.values():
            assert bool((head.prototypes.weight.grad == 0).all()) == still


def test_views() -> None:
    expected = {"paper": (1.0, 0.1, 0.5), "released": (0.0, 0.9, 0.5), "none": (0.0, 0.0, 0.0)}
    for blur, probabilities in expected.items():
        views = DINOv2.views(DINOv2.Config(blur=blur), (224, 224))
        assert tuple(view.blur for view in views) == probabilities
    assert (views[2].count, views[2].size, views[1].solarize) == (8, (96, 96), 0.2)
    assert fitted(views, (224, 224), (14, 14))[2].size == (98, 98)
    assert len(DINOv2.views(DINOv2.Config(local_views=0), (224, 224))) == 2


def test_one_image_is_a_mistake_where_neighbours_are_looked_for() -> None:
    images = Batch(views={n: torch.randn(1, 3, *SIZE).double() for n in ("global1", "global2")}, index=torch.arange(1))
    with pytest.raises(UserError, match="--batch-size of at least 2"):
        build(local_views=0)(images, step(batch=1))
    alone = build(local_views=0, regulariser_weight=0.0)(images, step(batch=1))
    assert bool(torch.isfinite(alone.total))


def test_a_process_without_masked_patches_has_a_finite_loss() -> None:
    method = build()
    embedded = method.embed(batch(method), step())
    embedded["counted"] = torch.zeros_like(embedded["counted"])
    losses = method.loss(embedded, step())
    assert float(losses.terms["patch"]) == 0
    losses.total.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in method.parameters() if p.grad is not None)


def test_mistakes() -> None:
    options = {**backbones.defaults("vit_micro"), "patch_size": 8, "depth": 1}
    bare = DINOv2(backbones.build("vit_micro", image_size=SIZE, **options, cls=False), DINOv2.Config(**SMALL))
    bare.prepare(1)
    images = Batch(views={n: torch.zeros(1, 3, *SIZE) for n in ("global1", "global2")}, index=torch.arange(1))
    with pytest.raises(UserError, match="--cls"):
        bare(images, step(batch=1))
    encoder = backbones.build("vit_micro", image_size=SIZE, **options)
    for knobs in ({"momentum": 1.0}, {"mask_probability": 0.0}, {"mask_ratio": (0.5, 0.1)}, {"mask_ratio": (0.1, 1.0)}):
        with pytest.raises(UserError, match="--" + next(iter(knobs)).replace("_", "-")):
            DINOv2(encoder, DINOv2.Config(**SMALL, **knobs))
    encoder.supports = frozenset({"keep"})
    with pytest.raises(UserError, match="dinov2 needs an encoder that supports 'replace'"):
        DINOv2(encoder, DINOv2.Config(**SMALL))
