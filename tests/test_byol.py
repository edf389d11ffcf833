"""BYOL: loss and gradients against float64 NumPy from the encoders' vectors on, the target network, and the wiring.

The oracle of heads and the finite differences serve the other siamese methods' tests too.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from one_step import after_step, batch, build
from ssl_pretrain.methods.byol import BYOL
from torch import nn

from ssl_pretrain.errors import UserError
from ssl_pretrain.pretext import Batch, Step

Arrays = dict[str, np.ndarray]
PROJECTOR = PREDICTOR = "linear norm relu linear"


def step(number: int = 3, ok: bool = True) -> Step:
    made = Step(step=number, total=10, noise=1, rows=slice(0, 16), batch_size=16, device=torch.device("cpu"))
    made.ok = torch.tensor(ok)
    return made


def doubles(method: nn.Module) -> Batch:
    """The batch of `one_step` in float64."""
    made = batch(method, slice(0, 16))  # type: ignore[arg-type]
    made.views = {name: view.double() for name, view in made.views.items()}
    return made


def arrays(module: nn.Module, prefix: str) -> Arrays:
    return {f"{prefix}{n}": v.detach().numpy().copy() for n, v in module.named_parameters()}


def numpy_head(weights: Arrays, prefix: str, layout: str, x: np.ndarray) -> np.ndarray:
    """A head's output from its parameters, by the numbers of its layers; batch norm with this batch's statistics."""
    for i, layer in enumerate(layout.split()):
        gain, shift = weights.get(f"{prefix}{i}.weight"), weights.get(f"{prefix}{i}.bias", 0.0)
        if layer == "linear":
            assert gain is not None
            x = x @ gain.T + shift
        elif layer == "norm":
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * (1.0 if gain is None else gain) + shift
        else:
            x = np.maximum(x, 0)
    return x


def numpy_unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def check_gradients(oracle: Callable[[Arrays], float], at: Arrays, gradients: Arrays) -> None:
    """Every gradient along a random direction against the oracle's central difference."""
    rng = np.random.default_rng(0)
    for name, value in at.items():
        direction = rng.standard_normal(value.shape)
        up, down = (oracle({**at, name: value + sign * 1e-8 * direction}) for sign in (1, -1))
        slope = (up - down) / 2e-8  # so short that no ReLU turns
        assert (gradients[name] * direction).sum() == pytest.approx(slope, rel=1e-5, abs=1e-6), name


def shaken(module: nn.Module) -> None:
    """A teacher unlike its student."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


def made() -> BYOL:
    method = build("byol").double()
    assert isinstance(method, BYOL)
    shaken(method.teacher)
    return method


def test_loss_and_gradients_against_numpy() -> None:
    method = made()
    rng = np.random.default_rng(0)
    at = {"online": rng.standard_normal((16, 2, method.encoder.dim))}
    at |= arrays(method.projector, "projector.") | arrays(method.predictor, "predictor.")
    target = rng.standard_normal(at["online"].shape)
    held = arrays(method.teacher["projector"], "")
    targets = [numpy_unit(numpy_head(held, "", PROJECTOR, target[:, v])) for v in (0, 1)]

    def each(given: Arrays) -> np.ndarray:
        predicted = []
        for v in (0, 1):
            z = numpy_head(given, "projector.", PROJECTOR, given["online"][:, v])
            predicted.append(numpy_unit(numpy_head(given, "predictor.", PREDICTOR, z)))
        return ((predicted[0] - targets[1]) ** 2).sum(1) + ((predicted[1] - targets[0]) ** 2).sum(1)

    online = torch.tensor(at["online"], requires_grad=True)
    other = torch.tensor(target, requires_grad=True)
    losses = method.loss({"online": online, "target": other}, step())
    assert losses.total.item() == pytest.approx(each(at).mean(), rel=1e-10)
    assert losses.per_sample is not None
    np.testing.assert_allclose(losses.per_sample.numpy(), each(at), rtol=1e-10)
    losses.total.backward()
    gradients = {n: p.grad.numpy() for n, p in method.named_parameters() if p.grad is not None}
    assert online.grad is not None
    check_gradients(lambda given: each(given).mean(), at, {**gradients, "online": online.grad.numpy()})
    assert other.grad is None  # nothing flows into the target network
    assert not any(name.startswith("teacher") for name in gradients)


def test_heads_have_the_papers_shape() -> None:
    method = BYOL(build("byol").encoder, BYOL.Config())
    shapes = {n: tuple(p.shape) for n, p in method.named_parameters() if not n.startswith("encoder")}
    assert shapes == {
        "projector.0.weight": (4096, 128), "projector.1.weight": (4096,), "projector.1.bias": (4096,),
        "projector.3.weight": (256, 4096),
        "predictor.0.weight": (4096, 256), "predictor.1.weight": (4096,), "predictor.1.bias": (4096,),
        "predictor.3.weight": (256, 4096),
    }  # fmt: skip


def test_each_view_goes_through_both_networks() -> None:
    method = made()
    images = doubles(method)
    embedded = method.embed(images, step())
    for v, name in enumerate(("view1", "view2")):
        with torch.no_grad():
            torch.testing.assert_close(embedded["online"][:, v], method.encoder(images.views[name]).pooled)
            torch.testing.assert_close(embedded["target"][:, v], method.teacher["encoder"](images.views[name]).pooled)
    assert not torch.allclose(embedded["online"], embedded["target"])
    assert embedded["online"].requires_grad
    assert not embedded["target"].requires_grad


@pytest.mark.parametrize("ok", [True, False])
def test_the_target_follows_the_online_network_where_the_step_was_good(ok: bool) -> None:
    method = made()
    before = {n: v.clone() for n, v in method.teacher.named_parameters()}
    after_step(method, step(3, ok), {})
    tau = 1 - (1 - 0.996) * (np.cos(np.pi * 3 / 10) + 1) / 2  # section 3.3
    online = {**arrays(method.encoder, "encoder."), **arrays(method.projector, "projector.")}
    assert before.keys() == online.keys()
    for name, now in method.teacher.named_parameters():
        old = before[name].numpy()
        np.testing.assert_allclose(
            now.numpy(), tau * old + (1 - tau) * online[name] if ok else old, rtol=1e-5, atol=1e-7
        )


def test_the_online_encoder_is_exported_and_the_target_begins_as_it() -> None:
    method = build("byol")
    assert method.exported() is method.encoder
    for name, value in method.encoder.state_dict().items():
        assert torch.equal(method.teacher["encoder"].state_dict()[name], value)


def test_the_two_views_are_not_alike() -> None:
    first, second = BYOL.views(BYOL.Config(), (48, 32))
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    first, second = BYOL.views(BYOL.Config(blur=0.0, crop_scale=(0.2, 1.0)), (48, 32))
    assert (first.blur, second.blur, first.scale, second.scale) == (0.0, 0.0, (0.2, 1.0), (0.2, 1.0))


def test_the_collapsed_value_is_the_loss_of_equal_embeddings() -> None:
    method = build("byol")
    method.projector, method.predictor, method.teacher["projector"] = (nn.Identity() for _ in range(3))
    equal = torch.ones(16, 2, 8)
    losses = method.loss({"online": equal, "target": 2 * equal}, step())  # type: ignore[attr-defined]
    assert method.collapsed(16)["loss"][0] == pytest.approx(losses.total.item(), abs=1e-6)


def test_a_momentum_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"--momentum is 1.5; it must lie between 0 and 1"):
        BYOL(build("byol").encoder, BYOL.Config(momentum=1.5))
