"""MoCo v3: loss and gradients against float64 NumPy from the encoders' vectors on, the momentum encoder against the
order of the release, the frozen patch embedding, and the wiring."""

import numpy as np
import pytest
import torch
from method_helpers import check_stated, double_batch, losses_of, make_constant_, perturb_, step
from numpy_oracles import Weights, check_gradients, numpy_head, numpy_normalize, weights_of
from ssl_pretrain.methods.mocov3 import MoCoV3

from ssl_pretrain import backbones
from ssl_pretrain.conformance.one_step import after_step, build
from ssl_pretrain.errors import UserError
from ssl_pretrain.optim import parameter_groups

KERNELS = 402  # of a step: python tests/kernels.py mocov3
DEVICE_KERNELS = 418  # with the optimiser, on an accelerator: python tests/device.py mocov3

PROJECTOR, PREDICTOR = "linear norm relu linear norm relu linear norm", "linear norm relu linear norm"
SMALL = {"hidden_dim": 64, "embedding_dim": 16}


def made(**knobs: object) -> MoCoV3:
    method = MoCoV3(build("mocov3").encoder, MoCoV3.Config(**{**SMALL, **knobs}))  # type: ignore[arg-type]
    method.prepare(16)
    return method.double()


@pytest.mark.parametrize("temperature", [0.2, 0.5])
def test_loss_and_gradients_against_numpy(temperature: float) -> None:
    method = made(temperature=temperature)
    perturb_(method.teacher)
    rng = np.random.default_rng(0)
    at = {"query": rng.standard_normal((16, 2, method.encoder.dim))}
    at |= weights_of(method.projector, "projector.") | weights_of(method.predictor, "predictor.")
    key = rng.standard_normal(at["query"].shape)
    held = weights_of(method.teacher["projector"], "")
    keys = [numpy_normalize(numpy_head(held, "", PROJECTOR, key[:, v])) for v in (0, 1)]

    def each(given: Weights) -> np.ndarray:
        total = np.zeros(16)
        for v in (0, 1):
            z = numpy_head(given, "projector.", PROJECTOR, given["query"][:, v])
            q = numpy_normalize(numpy_head(given, "predictor.", PREDICTOR, z))
            for i in range(16):
                chances = np.exp(keys[1 - v] @ q[i] / temperature)
                total[i] -= 2 * temperature * np.log(chances[i] / chances.sum())
        return total

    query, other = torch.tensor(at["query"], requires_grad=True), torch.tensor(key, requires_grad=True)
    losses = method.loss({"query": query, "key": other}, step())
    assert losses.total.item() == pytest.approx(each(at).mean(), rel=1e-10)
    assert losses.per_sample is not None
    np.testing.assert_allclose(losses.per_sample.numpy(), each(at), rtol=1e-10)
    losses.total.backward()
    gradients = {n: p.grad.numpy() for n, p in method.named_parameters() if p.grad is not None}
    assert query.grad is not None
    check_gradients(lambda given: each(given).mean(), at, {**gradients, "query": query.grad.numpy()})
    assert other.grad is None  # keys are constants
    assert not any(name.startswith("teacher") for name in gradients)


def test_heads_have_the_papers_shape() -> None:
    method = MoCoV3(made().encoder, MoCoV3.Config(hidden_dim=4096))
    shapes = {n: tuple(p.shape) for n, p in method.named_parameters() if not n.startswith("encoder")}
    assert shapes == {
        "projector.0.weight": (4096, 128), "projector.1.weight": (4096,), "projector.1.bias": (4096,),
        "projector.3.weight": (4096, 4096), "projector.4.weight": (4096,), "projector.4.bias": (4096,),
        "projector.6.weight": (256, 4096),  # and a batch norm without gain and shift, as in the predictor
        "predictor.0.weight": (4096, 256), "predictor.1.weight": (4096,), "predictor.1.bias": (4096,),
        "predictor.3.weight": (256, 4096),
    }  # fmt: skip


def test_each_view_goes_through_both_encoders() -> None:
    method = made()
    perturb_(method.teacher)
    images = double_batch(method)
    embedded = method.embed(images, step())
    for v, name in enumerate(("view1", "view2")):
        with torch.no_grad():
            torch.testing.assert_close(embedded["query"][:, v], method.encoder(images.views[name]).pooled)
            torch.testing.assert_close(embedded["key"][:, v], method.teacher["encoder"](images.views[name]).pooled)
    assert not torch.allclose(embedded["query"], embedded["key"])
    assert not embedded["key"].requires_grad


def test_the_momentum_encoder_is_the_releases_at_the_time_it_makes_keys() -> None:
    """The release moves it before each step's keys, we after each step: what makes the keys must be the same."""
    method = made()
    names = [n for n, _ in method.projector.named_parameters()]
    rng = np.random.default_rng(0)
    expected = weights_of(method.projector, "")
    for number in range(5):
        momentum = 1 - (1 - 0.99) * (np.cos(np.pi * number / 10) + 1) / 2
        queries = weights_of(method.projector, "")
        expected = {n: momentum * expected[n] + (1 - momentum) * queries[n] for n in names}
        for name, parameter in method.teacher["projector"].named_parameters():
            np.testing.assert_allclose(
                parameter.numpy(), expected[name], rtol=1e-5, atol=1e-7, err_msg=f"step {number}"
            )
        with torch.no_grad():  # as the optimiser
            for parameter in method.projector.parameters():
                parameter += torch.from_numpy(rng.standard_normal(parameter.shape))
        after_step(method, step(number), {})


def test_a_bad_step_moves_no_teacher() -> None:
    method = made()
    perturb_(method.teacher)
    before = {n: v.clone() for n, v in method.teacher.state_dict().items()}
    after_step(method, step(ok=False), {})
    assert all(torch.equal(v, before[n]) for n, v in method.teacher.state_dict().items())


@pytest.mark.parametrize("frozen", [True, False])
def test_the_patch_embedding_stays_at_its_random_start_where_asked_for(frozen: bool) -> None:
    method = made(freeze_patch_embed=frozen)
    names = {n for group in parameter_groups(method, method.encoder, rule=method.recipe.decay) for n in group["names"]}
    assert ("encoder.patch_embed.proj.weight" in names) is not frozen
    assert ("encoder.patch_embed.proj.bias" in names) is not frozen
    assert "encoder.blocks.0.attn.qkv.weight" in names
    assert not any(name.startswith("teacher") for name in names)
    method(double_batch(method), step()).total.backward()
    gradient = method.encoder.get_parameter("patch_embed.proj.weight").grad
    assert gradient is None if frozen else gradient is not None and bool(gradient.any())


def test_all_parameters_decay() -> None:
    method = made()
    assert all(group["decays"] for group in parameter_groups(method, method.encoder, rule=MoCoV3.recipe.decay))


@pytest.mark.parametrize("name", ["swin_micro", "hiera_micro", "convnext_micro"])
def test_hierarchical_encoders_keep_their_own_initialisation_and_train_all(name: str) -> None:
    """A Swin's gains after each branch begin at 0, a Hiera's biases at 0.02."""
    encoder = backbones.build(name, image_size=(64, 64))
    start = {name: value.clone() for name, value in encoder.state_dict().items()}
    MoCoV3(encoder, MoCoV3.Config(**SMALL))  # type: ignore[arg-type]
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert all(torch.equal(value, start[name]) for name, value in encoder.state_dict().items())


def test_initialisation_is_the_releases() -> None:
    torch.manual_seed(0)
    options = {**backbones.defaults("vit_small"), "depth": 1, **MoCoV3.recipe.encoder}
    encoder = backbones.build("vit_small", image_size=(64, 64), **options)
    MoCoV3(encoder, MoCoV3.Config(**SMALL))  # type: ignore[arg-type]
    bounds = {
        "patch_embed.proj.weight": np.sqrt(6 / (3 * 16 * 16 + 384)),
        "blocks.0.attn.qkv.weight": np.sqrt(6 / (384 + 384)),
        "blocks.0.attn.proj.weight": np.sqrt(6 / (384 + 384)),
        "blocks.0.mlp.fc1.weight": np.sqrt(6 / (384 + 1536)),
    }
    for name, bound in bounds.items():
        weight = encoder.get_parameter(name).detach().numpy()
        assert 0.99 * bound < np.abs(weight).max() <= bound * (1 + 1e-6), name
        assert weight.std() == pytest.approx(bound / np.sqrt(3), rel=0.01), name
    assert encoder.get_parameter("cls_token").abs().max() < 1e-5
    assert not encoder.get_parameter("patch_embed.proj.bias").any()


def test_the_two_views_are_not_alike() -> None:
    first, second = MoCoV3.views(MoCoV3.Config(crop_scale=(0.2, 1.0)), (48, 32))
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert first.scale == second.scale == (0.2, 1.0)
    assert [view.blur for view in MoCoV3.views(MoCoV3.Config(blur=0.0), (48, 32))] == [0.0, 0.0]


def test_the_query_encoder_is_exported() -> None:
    method = made()
    assert method.exported() is method.encoder


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_collapsed_state_has_the_stated_loss(temperature: float) -> None:
    method = build("mocov3", temperature=temperature)
    make_constant_(method.encoder)
    make_constant_(method.teacher.backbone)
    check_stated(method, {"loss": losses_of(method)})


@pytest.mark.parametrize("knob", [{"momentum": -0.1}, {"temperature": 0.0}])
def test_knobs_out_of_range_are_refused(knob: dict) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(knob))} is "):
        made(**knob)
