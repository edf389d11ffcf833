"""A step's cost where no clock is needed: no method makes the host wait for the device, and none starts more kernels than
its figure.

Operations are counted below autograd, forward, backward and what follows the step (teachers, queues) together, of a ViT of
two blocks; views and empty allocations do not count. The figures are what was counted when they were written: a change that
adds operations must raise them here, knowingly.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from one_step import BATCH, after_step, batch, build
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_pretrain import plugins
from ssl_pretrain.pretext import Step

METHODS = plugins.own("ssl_pretrain.methods")
KERNELS = {
    "aim": 145, "barlow": 365, "byol": 464, "data2vec2": 219, "dino": 415, "dinov2": 2715, "ibot": 2532, "ijepa": 318,
    "lejepa": 548, "mae": 165, "mocov3": 649, "msn": 444, "nnclr": 494, "npid": 166, "semaim": 196, "simclr": 242,
    "simmim": 119, "simsiam": 454, "supervised": 122, "swav": 468, "vicreg": 402,
}  # fmt: skip
ON_THE_HOST = {"ijepa": ["_local_scalar_dense"]}  # of a tensor that is on the CPU wherever the run is: nobody waits
# What the host must wait for on a GPU: a number it reads, or a size that depends on values.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "unique_consecutive"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
FREE = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "lift_fresh",
    "detach",
    "set_",
    "resize_",
}


class Counted(TorchDispatchMode):
    """Counts kernels, and lists what the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in INDEXED and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1])
        repeats = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in WAITS or masks or repeats:
            self.waits.append(name)
        if not func.is_view and name not in FREE:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


def counted(name: str) -> Counted:
    """The second step of a method, whose first may set things up."""
    method = build(name)
    given = batch(method, slice(0, BATCH))
    for number in (3, 4):
        step = Step(step=number, total=10, noise=7, rows=slice(0, BATCH), batch_size=BATCH, device=torch.device("cpu"))
        with Counted() as count:
            losses = method(given, step)
            losses.total.backward()
            after_step(method, step, losses.carry)
        for parameter in method.parameters():
            parameter.grad = None
    return count


@pytest.mark.parametrize("name", METHODS)
def test_a_step_makes_nobody_wait_and_starts_no_more_kernels_than_before(name: str) -> None:
    count = counted(name)
    assert count.waits == ON_THE_HOST.get(name, [])
    total = sum(count.kernels.values())
    assert total <= KERNELS[name], f"{total} kernels, {KERNELS[name]} before: {count.kernels.most_common(12)}"
    assert total > 0.9 * KERNELS[name], f"{total} kernels, {KERNELS[name]} before: lower the figure"


def test_the_counter_sees_what_it_is_for() -> None:
    x = torch.arange(6.0, requires_grad=True)
    with Counted() as count:
        float(x.detach().sum())
        x[x > 2].sum().backward()
        x.view(2, 3).t()
    assert sorted(count.waits) == ["_local_scalar_dense", "index", "index_put"]
    assert count.kernels["sum"] == 2
    assert "view" not in count.kernels


if __name__ == "__main__":
    for each in METHODS:
        found = counted(each)
        print(f'    "{each}": {sum(found.kernels.values())},', found.waits)
