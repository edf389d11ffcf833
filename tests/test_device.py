"""A step of every method as an accelerator would get it (device.py): the host waits for nothing, list operations start one
kernel, and the whole step starts no more kernels than `DEVICE_KERNELS` of the method's test.

The figures are what was counted when they were written: a change that adds operations must raise them, knowingly.
"""

import math
from collections.abc import Callable

import pytest
import torch
from device import DEVICE, OnDevice, Stopped, finishing, followed, simulated, stated
from torch import Tensor

from ssl_pretrain import optim, plugins
from ssl_pretrain.data import colour, composed
from ssl_pretrain.data.views import Jitter, ViewSpec
from ssl_pretrain.features import neighbours
from ssl_pretrain.features.products import exact, tf32
from ssl_pretrain.optim import lars, scaling
from ssl_pretrain.parts import ema_teacher

METHODS = plugins.own("ssl_pretrain.methods")
# What is known and not mended: the faults of a method's step, and why. They must be found: a mended one must go.
KNOWN: dict[str, tuple[list[str], str]] = {}
# What no picture may do. They are drawn seldom, so they may wait and copy.
WRONG_IN_PICTURES = ("two devices", "index on the host")


@pytest.mark.parametrize("name", METHODS)
def test_a_step_on_a_device_waits_for_nothing_and_starts_no_more_kernels_than_before(name: str) -> None:
    found = followed(name)
    assert found.step.faults == KNOWN.get(name, ([], ""))[0]
    kernels, total = stated(name), sum(found.step.kernels.values())
    assert total <= kernels, f"{total} kernels, {kernels} before: {found.step.kernels.most_common(12)}"
    assert total > 0.9 * kernels, f"{total} kernels, {kernels} before: lower the figure"
    assert found.monitor.faults == []
    assert [fault for fault in found.pictures.faults if fault.startswith(WRONG_IN_PICTURES)] == []


# With batch norm in the encoder, whose running statistics cost kernels for each layer; with other optimisers.
OTHERS = {
    "resnet18": (("simclr", "resnet18", None), 328, []),
    "lamb": (("mae", None, "lamb"), 172, []),
    # Muon of torch cannot skip a step on the device.
    "muon": (("mae", None, "muon"), None, ["waits: _local_scalar_dense at ssl_pretrain.optim.muon in step"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_so_does_a_step_with_another_encoder_or_optimiser(name: str) -> None:
    arguments, kernels, faults = OTHERS[name]
    found = followed(*arguments).step
    assert found.faults == faults
    if kernels is not None:
        total = sum(found.kernels.values())
        assert 0.9 * kernels < total <= kernels, f"{total} kernels: {found.kernels.most_common(12)}"


# ---- Each kind of fault is found. Each function gets a (4, 3) on the device.


def adds_a_tensor_of_the_host(x: Tensor) -> None:
    x + torch.ones(4, 3)


def reads_a_number(x: Tensor) -> None:
    float(x.sum())


def decides_on_the_host(x: Tensor) -> None:
    if x.sum() > 0:
        x.mul_(2)


def asks_where(x: Tensor) -> None:
    x.nonzero()


def copies_to_the_host(x: Tensor) -> None:
    x.cpu()


def copies_into_a_tensor_of_the_host(x: Tensor) -> None:
    torch.zeros(4, 3).copy_(x)


def selects_by_a_mask(x: Tensor) -> None:
    x[x > 0]


def writes_by_a_mask(x: Tensor) -> None:
    x[x > 0] = 1.0


def selects_by_a_list(x: Tensor) -> None:
    x[[0, 2]]


def writes_by_a_list(x: Tensor) -> None:
    x[[0, -1]] /= 2


def selects_by_a_tensor_of_the_host(x: Tensor) -> None:
    x[torch.tensor([0, 2])]


def sends_a_list(x: Tensor) -> None:
    torch.tensor([1.0, 2.0], device=x.device)


def sends_a_tensor(x: Tensor) -> None:
    torch.ones(3).to(x.device)


def writes_a_tensor_of_the_host(x: Tensor) -> None:
    x.copy_(torch.ones(4, 3))


def scales_each_by_its_own(x: Tensor) -> None:
    torch._foreach_mul_([x, x[0]], list(x[0, :2].unbind()))


def adds_unlike_dtypes(x: Tensor) -> None:
    torch._foreach_add_([x, x], [x.half(), x.half()])


def repeats_by_counts_of_the_device(x: Tensor) -> None:
    x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=x.device), dim=0)


def adds_a_number_of_the_device_to_a_list(x: Tensor) -> None:
    torch._foreach_add_([x, x], x[0, 0])


def fails_in_the_backward_pass(x: Tensor) -> None:
    (x.requires_grad_() * 2)[[0, 2]].sum().backward()


@pytest.mark.parametrize(
    ("wrong", "kinds"),
    [
        (adds_a_tensor_of_the_host, ["two devices"]),
        (reads_a_number, ["waits"]),
        (decides_on_the_host, ["waits"]),
        (asks_where, ["waits"]),
        (copies_to_the_host, ["waits"]),
        (copies_into_a_tensor_of_the_host, ["waits"]),
        (selects_by_a_mask, ["waits"]),
        (writes_by_a_mask, ["waits"]),
        (selects_by_a_list, ["index on the host"]),
        (writes_by_a_list, ["index on the host", "index on the host"]),
        (selects_by_a_tensor_of_the_host, ["index on the host"]),
        (sends_a_list, ["blocking copy to the device"]),
        (sends_a_tensor, ["blocking copy to the device"]),
        (writes_a_tensor_of_the_host, ["blocking copy to the device"]),
        (scales_each_by_its_own, ["foreach of unlike tensors"]),
        (adds_unlike_dtypes, ["foreach of unlike tensors"]),
        (repeats_by_counts_of_the_device, ["waits"]),
        (adds_a_number_of_the_device_to_a_list, ["waits"]),
        (fails_in_the_backward_pass, ["index on the host", "index on the host"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_each_kind_of_fault_is_found(wrong: Callable[[Tensor], None], kinds: list[str]) -> None:
    with simulated():
        x = torch.randn(4, 3, device=DEVICE)
        try:
            with OnDevice() as found:
                wrong(x)
        except Stopped:
            pass
    assert [fault.split(":")[0] for fault in found.faults] == kinds
    if "backward" not in wrong.__name__:
        assert all(fault.endswith(f" at test_device in {wrong.__name__}") for fault in found.faults)


def test_what_is_right_is_no_fault_and_kernels_are_counted() -> None:
    with simulated():
        x = torch.randn(4, 3, device=DEVICE)
        with OnDevice() as found:
            sent = torch.arange(6).reshape(2, 3)
            assert sent.sum().item() == 15  # the host reads its own tensors, which have values
            sent.to(DEVICE, non_blocking=True)
            x[x.argmax(1)].t()
            x[:, :2] *= 2
            torch._foreach_mul_([x, x[0]], x[0, 0])
            torch.where(x > 0, x, 0.0)
    assert found.faults == []
    assert dict(found.kernels) == {
        "_to_copy": 1, "argmax": 1, "index": 1, "mul_": 1, "copy_": 1, "_foreach_mul_": 1, "gt": 1,
        "scalar_tensor": 1, "where": 1,
    }  # fmt: skip


def test_a_kernel_more_is_counted() -> None:
    """Of lists that start one kernel for each tensor, each one is counted."""
    with simulated():
        x = torch.randn(4, 3, device=DEVICE)
        with OnDevice() as found:
            torch._foreach_mul_([x, x[0], x[1]], list(x[0].unbind()))
    assert found.kernels["_foreach_mul_"] == 3


# ---- Parts that no method's step reaches.


@pytest.mark.parametrize("kind", ["adamw", "sgd", "lars", "lamb"])
def test_an_optimiser_does_not_wait_if_a_parameter_has_no_gradient(kind: str) -> None:
    with simulated():
        parameters = [torch.nn.Parameter(torch.randn(size, device=DEVICE)) for size in (3, 4, 5)]
        optimizer = optim.build(kind, [{"params": parameters, "decays": True, "lr_scale": 1.0}], (0.9, 0.95))  # type: ignore[arg-type]
        with OnDevice() as found:
            for parameter in parameters[:2]:
                parameter.grad = torch.randn_like(parameter)
            optim.set_rates(optimizer, 1e-3, 0.1)
            optim.step_unless(torch.zeros((), device=DEVICE), optimizer)
    assert found.faults == []


EVERYTHING = ViewSpec(
    name="image", size=(32, 32), jitter=Jitter(p=0.8), grayscale=0.2, blur=0.5, solarize=0.2, noise_patch=0.1
)
FINISH = {"exact": (colour.finish, 403), "fast": (composed.finish, 72)}  # kernels for 32 views


@pytest.mark.parametrize("kind", FINISH)
def test_colours_are_finished_on_a_device_without_a_wait(kind: str) -> None:
    finish, kernels = FINISH[kind]
    found = finishing(finish, EVERYTHING, 32)
    assert found.faults == []
    total = sum(found.kernels.values())
    assert 0.9 * kernels < total <= kernels, f"{total} kernels: {found.kernels.most_common(12)}"
    more = sum(finishing(finish, EVERYTHING, 64).kernels.values())
    assert more <= total + 5 * 32 * 0.1 * 4, "a kernel for each image"


# ---- What an accelerator computes in another way than a CPU gives the same numbers.


def lists(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in ((3,), (4, 5), (2, 3, 1, 1), (1,), (257,))]


def test_scaling_with_factors_written_out_gives_the_same_bits() -> None:
    one, other, factors = lists(0), lists(0), torch.rand(5, generator=torch.Generator().manual_seed(1))
    scaling.scale_each_(one, factors)
    scaling.scale_by_written_out_(other, factors)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], lists(0)[0])


@pytest.mark.parametrize("weight", [0.0, 0.01, 0.7, 1.0])
def test_an_ema_with_one_weight_for_all_is_the_average(weight: float) -> None:
    old, new = lists(0), lists(1)
    ema_teacher.lerp_by_one_(old, new, torch.tensor(weight))
    for moved, before, target in zip(old, lists(0), lists(1), strict=True):
        torch.testing.assert_close(moved, (1 - weight) * before + weight * target)


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_momentum_in_one_kernel_is_that_of_lists_and_skips_steps(bad: float) -> None:
    one, other = ([lists(0), lists(1), lists(2)] for _ in range(2))
    if bad:
        for gradients in (one[1], other[1]):
            gradients[1].fill_(math.nan)
    lars.advance_in_lists_(*one, torch.tensor(bad), 0.9, 0.1)
    lars.advance_fused_(*other, torch.tensor(bad), 0.9, 0.1)
    for k in (0, 2):
        for a, b, before in zip(one[k], other[k], lists(k), strict=True):
            torch.testing.assert_close(a, b)
            assert torch.equal(b, before) == bool(bad)


def test_products_are_fast_on_a_gpu_only() -> None:
    precision = torch.get_float32_matmul_precision
    assert precision() == "highest"
    with tf32(torch.device("cpu")):
        assert precision() == "highest"
    with tf32(DEVICE):
        assert precision() == "high"
        with exact():
            assert precision() == "highest"
        assert precision() == "high"
    assert precision() == "highest"


def test_neighbours_are_searched_exactly_within_training(monkeypatch: pytest.MonkeyPatch) -> None:
    found, unit = [], neighbours._unit

    def look(*arguments: object) -> object:
        found.append(torch.get_float32_matmul_precision())
        return unit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(neighbours, "_unit", look)
    with tf32(DEVICE):
        neighbours.nearest(torch.eye(8), torch.eye(8), 2, rounded=False)
        assert torch.get_float32_matmul_precision() == "high"
    assert set(found) == {"highest"}
