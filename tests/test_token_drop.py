"""Students that do not see all patches (FLIP): which are dropped, when, and that teachers see whole images."""

import inspect
from typing import Any

import pytest
import torch
from method_helpers import losses_of

from ssl_pretrain import backbones, plugins, pretext
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.conformance import one_step
from ssl_pretrain.conformance.one_step import BATCH
from ssl_pretrain.errors import UserError
from ssl_pretrain.loop import grad_cache
from ssl_pretrain.parts.views import dropped, encode_pooled
from ssl_pretrain.pretext import Method, Step, WholeBatchMethod

METHODS = [
    name
    for name in plugins.own("ssl_pretrain.methods")
    if "token_drop" in inspect.signature(pretext.load(name).Config).parameters
]
TAUGHT = ("byol", "dino", "mocov3")
every_method = pytest.mark.parametrize("name", METHODS)


def vit(**options: Any) -> backbones.backbone.Backbone:
    torch.manual_seed(0)
    small = {**backbones.defaults("vit_micro"), "patch_size": 8, "depth": 1, **options}
    return backbones.build("vit_micro", image_size=(32, 32), **small).train()


def step(progress: float = 0.3, rows: slice = slice(0, BATCH)) -> Step:
    return Step(
        step=int(progress * 1000),
        total=1000,
        noise=7,
        rows=rows,
        batch_size=BATCH,
        device=torch.device("cpu"),
    )


def test_the_methods_that_can() -> None:
    listed = [*TAUGHT, "barlow", "distill", "lejepa", "mvmr", "nnclr", "simclr", "simsiam", "swav", "vicreg"]
    assert sorted(listed) == METHODS, "tests/test_token_drop.py lists them"


def test_each_view_keeps_as_many_random_patches() -> None:
    encoder, views = vit(), torch.zeros(3, BATCH, 3, 48, 32)
    keep = dropped(encoder, views, step(), 0.6)["keep"]
    assert keep.shape == (3 * BATCH, int(24 * 0.4))
    assert all(len(row.unique()) == 9 for row in keep)
    assert len({tuple(sorted(row.tolist())) for row in keep}) > 40  # drawn for each view of each image
    counts = torch.bincount(keep.flatten(), minlength=24)
    assert counts.min() > 4  # of 18 on average
    # A part of the batch has the rows of the whole.
    part = dropped(encoder, views[:, 4:9], step(rows=slice(4, 9)), 0.6)["keep"]
    assert torch.equal(part.unflatten(0, (3, -1)), keep.unflatten(0, (3, -1))[:, 4:9])
    assert dropped(encoder, torch.zeros(BATCH, 3, 8, 8), step(), 0.9)["keep"].shape == (BATCH, 1)  # never none


def test_nothing_is_dropped_at_the_end_in_evaluation_and_by_default() -> None:
    encoder, views = vit(), torch.randn(BATCH, 3, 32, 32)
    assert dropped(encoder, views, step(0.95), 0.5) != {}
    assert dropped(encoder, views, step(0.951), 0.5) == {}
    assert dropped(encoder, views, step(), 0.0) == {}
    assert dropped(encoder.eval(), views, step(), 0.5) == {}


@pytest.mark.parametrize("options", [{}, {"pool": "cls"}, {"drop_path": 0.5}, {"positions": "rope"}])
def test_pooled_vectors_are_those_of_the_kept_patches(options: dict[str, Any]) -> None:
    encoder = vit(**options)
    crops = [torch.randn(2, BATCH, 3, 32, 32), torch.randn(BATCH, 3, 16, 16)]
    found = encode_pooled(encoder, crops, step(), 0.5)
    again = step()  # the same draws, in the same order
    for views, vectors in zip(crops, found, strict=True):
        keep = dropped(encoder, views, again, 0.5)
        if options.get("drop_path"):
            drop = again.rand(views.shape[0] if views.ndim == 5 else 1, 2).transpose(0, 1).flatten(0, 1)
            keep["drop"] = drop
        images = views.flatten(0, 1) if views.ndim == 5 else views
        torch.testing.assert_close(vectors, encoder(images, **keep).pooled, rtol=1e-4, atol=1e-5)


@every_method
def test_students_see_less_and_teachers_all(name: str) -> None:
    method = one_step.build(name, token_drop=0.5)
    seen: dict[str, list[int]] = {"student": [], "teacher": []}

    def watch(encoder: torch.nn.Module, who: str) -> None:
        def before(module: torch.nn.Module, given: tuple, options: dict) -> None:
            images, keep = given[0], given[1] if len(given) > 1 else options.get("keep")
            patches = images.shape[-2] // 8 * (images.shape[-1] // 8)
            seen[who].append(patches if keep is None else keep.shape[1])

        encoder.patch_embed.register_forward_pre_hook(before, with_kwargs=True)

    watch(method.encoder, "student")
    if name in TAUGHT:
        watch(method.teacher.backbone, "teacher")
    losses_of(method)
    assert set(seen["student"]) <= {8, 2}  # of 16 patches, and of 4 or 5 of a small crop
    assert 8 in seen["student"]
    assert set(seen["teacher"]) == ({16} if name in TAUGHT else set())


@every_method
def test_two_micro_batches_give_the_gradient_of_one(name: str) -> None:
    """The second pass of GradCache draws the same patches, and each part the rows of the whole."""

    def gradients(parts: int) -> dict[str, torch.Tensor]:
        method: Method = one_step.build(name, token_drop=0.5)
        size = BATCH // parts
        slices = [slice(i * size, (i + 1) * size) for i in range(parts)]
        given = [(one_step.batch(method, rows), step(rows=rows)) for rows in slices]
        if isinstance(method, WholeBatchMethod) and parts > 1:
            from contextlib import nullcontext

            grad_cache.backward(method, given, nullcontext(), list(method.parameters()))
        else:
            for part in given:
                (method(*part).total / parts).backward()
        return {n: p.grad for n, p in method.named_parameters() if p.grad is not None}

    one, two = gradients(1), gradients(2)
    assert one.keys() == two.keys()
    for key, gradient in one.items():
        torch.testing.assert_close(two[key], gradient, rtol=1e-3, atol=1e-5)


def test_an_encoder_that_cannot_drop_tokens_is_refused() -> None:
    kind = pretext.load("simclr")
    encoder = backbones.build("resnet18", image_size=(32, 32))
    kind(encoder, kind.Config())
    with pytest.raises(UnsupportedByBackbone, match="simclr --token-drop needs an encoder that supports 'keep'"):
        kind(encoder, kind.Config(token_drop=0.5))


def test_an_anchor_that_compares_patches_is_refused() -> None:
    with pytest.raises(UserError, match="--token-drop hides some"):
        one_step.build("dino", token_drop=0.5, anchor="gram")
