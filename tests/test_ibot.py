"""iBOT against float64 NumPy written from the paper."""

import math

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_certain_, make_uniform_
from numpy_oracles import (
    directional_derivative,
    numpy_masked_patches,
    numpy_prototype_head,
    numpy_softmax,
    numpy_view_pairs,
)
from ssl_pretrain.methods.ibot import IBOT

from ssl_pretrain import backbones
from ssl_pretrain.conformance import one_step
from ssl_pretrain.conformance.one_step import after_step
from ssl_pretrain.data.views import fitted
from ssl_pretrain.errors import UserError
from ssl_pretrain.optim.groups import decays
from ssl_pretrain.pretext import Batch, Step

KERNELS = 2392  # of a step: python tests/kernels.py ibot
DEVICE_KERNELS = 442  # with the optimiser, on an accelerator: python tests/device.py ibot

SIZE = (32, 48)
BATCH = 5
SMALL = {"hidden_dim": 24, "bottleneck_dim": 8, "prototypes": 12, "local_views": 2}


def build(**knobs: object) -> IBOT:
    torch.manual_seed(0)
    options = {**backbones.defaults("vit_micro"), "dim": 32, "patch_size": 8, "depth": 2, **IBOT.recipe.encoder}
    encoder = backbones.build("vit_micro", image_size=SIZE, **{**options, "drop_path": 0.0})
    method = IBOT(encoder, IBOT.Config(**{**SMALL, **knobs})).double()
    method.prepare(100)
    with torch.no_grad():
        for tensor in [*method.parameters(), method.class_centre, method.patch_centre]:
            tensor.add_(0.05 * torch.randn_like(tensor))  # so that teacher and student differ, and nothing is zero
    return method


def step(number: int = 1, noise: int = 3, batch: int = BATCH) -> Step:
    where = {"rows": slice(0, batch), "batch_size": batch, "device": torch.device("cpu")}
    return Step(step=number, total=100, noise=noise, **where)


def batch(method: IBOT) -> Batch:
    generator = torch.Generator().manual_seed(1)
    specs = fitted(IBOT.views(method.config, SIZE), SIZE, method.encoder.stride)
    views = {
        s.name: torch.randn(*((s.count,) if s.count > 1 else ()), BATCH, 3, *s.size, generator=generator).double()
        for s in specs
    }
    return Batch(views=views, index=torch.arange(BATCH))


def by_loops(method: IBOT, batch: Batch, step: Step) -> dict[str, float]:
    """The losses from the encoders' features, view by view."""
    config = method.config
    masks = method.masks((4, 6), step)
    views = [batch.views["global1"], batch.views["global2"]]
    with torch.no_grad():
        seen = [method.teacher["encoder"](v) for v in views]
        masked = [method.encoder(v, replace=(masks[:, i], method.mask_token)) for i, v in enumerate(views)]
        local = [method.encoder(v) for v in batch.views["local"]]
    start, share = config.teacher_temperature_start, step.progress / config.teacher_temperature_warmup
    ends = (config.teacher_temperature, config.teacher_patch_temperature)
    temperature, patch_temperature = (start + (end - start) * min(1.0, share) for end in ends)
    centre, patch_centre = method.class_centre.numpy(), method.patch_centre.numpy()
    teacher = np.stack([numpy_prototype_head(method.teacher["head"], f.cls) for f in seen])
    student = np.stack([numpy_prototype_head(method.head, f.cls) for f in masked + local])
    of_class = numpy_view_pairs(student, numpy_softmax((teacher - centre) / temperature), config.student_temperature)
    of_patches = [
        numpy_masked_patches(
            numpy_prototype_head(method.head, masked[v].patches),
            numpy_softmax(
                (numpy_prototype_head(method.teacher["head"], seen[v].patches) - patch_centre) / patch_temperature
            ),
            masks[:, v].numpy(),
            config.student_temperature,
        )
        for v in (0, 1)
    ]
    patch = float(np.mean(of_patches))
    return {"total": config.class_weight * of_class + config.patch_weight * patch, "class": of_class, "patch": patch}


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"class_weight": 0.5, "patch_weight": 3.0, "teacher_patch_temperature": 0.2},
        {"masking": "random"},
        {"norm_last_layer": False},
    ],
    ids=["paper", "weighted", "random", "learned lengths"],
)
def test_loss_and_gradient(knobs: dict) -> None:
    method = build(**knobs)
    images = batch(method)
    losses = method(images, step())
    expected = by_loops(method, images, step())
    assert expected["patch"] > 0
    assert float(losses.total.detach()) == pytest.approx(expected["total"], rel=1e-5)
    assert float(losses.terms["class"]) == pytest.approx(expected["class"], rel=1e-5)
    assert float(losses.terms["patch"]) == pytest.approx(expected["patch"], rel=1e-5)
    assert float(losses.per_sample.mean()) == pytest.approx(expected["total"], rel=1e-5)
    losses.total.backward()
    trained = [p for p in method.parameters() if p.requires_grad]
    assert all(p.grad is None for p in method.teacher.parameters())
    for group in (trained, [method.mask_token], list(method.head.parameters())):
        directions = [torch.randn_like(p) for p in group]
        found = sum(float((p.grad * d).sum()) for p, d in zip(group, directions, strict=True))
        slope = directional_derivative(group, directions, lambda: by_loops(method, images, step())["total"])
        assert found == pytest.approx(slope, rel=1e-4)


def test_autocast_changes_little() -> None:
    method = build(teacher_temperature=0.2, teacher_patch_temperature=0.2, teacher_temperature_start=0.2).float()
    images = batch(method)
    images.views = {name: view.float() for name, view in images.views.items()}
    exact = method(images, step())
    with torch.autocast("cpu", torch.bfloat16):
        found = method(images, step())
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total, exact.total, rtol=0.02, atol=0)
    found.total.backward()


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


@pytest.mark.parametrize("masking", ["block", "random"])
def test_masks_hide_a_uniform_share_of_half_of_the_views(masking: str) -> None:
    method, many = build(masking=masking), 3000
    masks = method.masks((10, 10), step(batch=many))
    assert masks.shape == (many, 2, 100)
    counts = masks.sum(2).numpy()
    assert (counts > 0).mean(0) == pytest.approx(0.5, abs=5 * math.sqrt(0.25 / many))
    assert ((counts > 0).all(1).mean()) == pytest.approx(0.25, abs=5 * math.sqrt(0.19 / many))  # each view for itself
    assert counts.max() <= 50
    shares = np.sort(counts[counts > 0])
    quartiles = np.quantile(shares, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quartiles, [20, 30, 40], atol=2)  # U(10, 50), a little short for rectangles
    if masking == "random":
        assert shares.min() == 10
        assert masks.flatten(0, 1).double().mean(0).std() < 0.02


def test_knobs_of_the_masks() -> None:
    always = build(mask_probability=1.0, mask_ratio=(0.25, 0.25), masking="random").masks((4, 6), step())
    assert bool((always.sum(2) == 6).all())


def test_teacher_and_centres_follow() -> None:
    method = build(momentum=0.9, centre_momentum=0.7)
    images = batch(method)
    views = [images.views["global1"], images.views["global2"]]
    with torch.no_grad():
        seen = [method.teacher["encoder"](v) for v in views]
    outputs = [numpy_prototype_head(method.teacher["head"], f.cls) for f in seen]
    parts = [numpy_prototype_head(method.teacher["head"], f.patches) for f in seen]
    expected = {
        "class_centre": 0.7 * method.class_centre.numpy() + 0.3 * np.mean(outputs, axis=(0, 1)),
        "patch_centre": 0.7 * method.patch_centre.numpy() + 0.3 * np.mean(parts, axis=(0, 1, 2)),
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


def test_collapsed_state_has_the_stated_loss() -> None:
    method = one_step.build("ibot", mask_probability=1.0, mask_ratio=(0.4, 0.5))
    for head in (method.head, method.teacher["head"]):
        make_uniform_(head.prototypes)
    uniform = losses_of(method)
    # Not stated, for a random number of views is masked: the value is that share of ln K.
    assert float(uniform.terms["patch"]) == pytest.approx(math.log(method.config.prototypes), rel=1e-6)

    method = one_step.build("ibot")
    make_certain_(method.teacher["head"])
    check_stated(method, {"class": uniform, "teacher_entropy": losses_of(method)})


def test_prototypes_are_frozen_at_the_start() -> None:
    method = build(freeze_prototypes=0.02, norm_last_layer=False)
    for number, still in ((1, True), (2, False)):
        method.zero_grad()
        method(batch(method), step(number)).total.backward()
        for parameter in method.head.prototypes.parameters():
            assert bool((parameter.grad == 0).all()) == still


def test_learned_lengths_of_prototypes_begin_at_one_and_decay() -> None:
    """As in the release, whose gains are a matrix (K, 1) and so are among the parameters that decay."""
    fixed, learned = (
        IBOT(one_step.build("ibot").encoder, IBOT.Config(**SMALL, norm_last_layer=normed)) for normed in (True, False)
    )
    assert fixed.head.prototypes.gain is None
    assert learned.head.prototypes.gain is not None
    assert learned.head.prototypes.gain.shape == (12, 1)
    x = torch.randn(3, fixed.encoder.dim)
    learned.load_state_dict(fixed.state_dict(), strict=False)
    assert torch.equal(fixed.head(x), learned.head(x))
    assert decays("head.prototypes.gain", learned.head.prototypes.gain, IBOT.recipe.decay)


def test_views_and_pictures() -> None:
    first, second, local = IBOT.views(IBOT.Config(), (224, 224))
    assert (first.blur, second.blur, local.blur) == (1.0, 0.1, 0.5)
    assert (first.solarize, second.solarize, local.count, local.size) == (0.0, 0.2, 10, (96, 96))
    assert len(IBOT.views(IBOT.Config(local_views=0), (224, 224))) == 2
    method = build(mask_probability=1.0)
    pictures = method.pictures(batch(method), step())
    hidden = pictures["masked"] == 0
    assert torch.equal(pictures["masked"][~hidden], pictures["view"][~hidden])
    assert 0.05 < hidden.float().mean() < 0.5


def test_mistakes() -> None:
    options = {**backbones.defaults("vit_micro"), "patch_size": 8, "depth": 1}
    bare = IBOT(backbones.build("vit_micro", image_size=SIZE, **options, cls=False), IBOT.Config(**SMALL))
    bare.prepare(1)
    images = Batch(views={n: torch.zeros(1, 3, *SIZE) for n in ("global1", "global2")}, index=torch.arange(1))
    with pytest.raises(UserError, match="--cls"):
        bare(images, step(batch=1))
    encoder = backbones.build("vit_micro", image_size=SIZE, **options)
    for knobs in ({"momentum": 1.0}, {"mask_probability": 0.0}, {"mask_ratio": (0.5, 0.1)}, {"mask_ratio": (0.1, 1.0)}):
        with pytest.raises(UserError, match="--" + next(iter(knobs)).replace("_", "-")):
            IBOT(encoder, IBOT.Config(**SMALL, **knobs))
    encoder.supports = frozenset({"keep"})
    with pytest.raises(UserError, match="ibot needs an encoder that supports 'replace'"):
        IBOT(encoder, IBOT.Config(**SMALL))
