"""Collectives: the communication of a run's processes.

`gather` and `mean` propagate gradients, so a method may call them inside a loss. The others are for the training loop.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

# torch would import this later by itself. Its functions store the process group that exists at import as their default,
# and keep it with its threads until the interpreter exits, which may then abort. At this point there is no group yet.
import torch.distributed.nn
from torch import Tensor, nn

from ..errors import UserError

T = TypeVar("T")


_alone = threading.Event()  # set: this process acts as a run of one, in all threads (autograd has its own)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it, this process acts as a run of one: it communicates with no other, so it cannot wait for one that fails.
    For measurements whose result is not used for training."""
    _alone.set()
    try:
        yield
    finally:
        _alone.clear()


def _together() -> bool:
    """Whether there are processes to communicate with."""
    return dist.is_initialized() and not _alone.is_set()


def size() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if _together() else 0


class _Gather(torch.autograd.Function):
    """All processes' rows. In the backward pass each row's gradient is the sum over the processes that used it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        world = dist.get_world_size()
        ctx.mine = slice(dist.get_rank() * len(rows), (dist.get_rank() + 1) * len(rows))
        out = rows.new_empty(world * len(rows), *rows.shape[1:])
        dist.all_gather(list(out.chunk(world)), rows.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.mine]


class _Mean(torch.autograd.Function):
    """The mean over processes of a tensor of the same shape on each. In the backward pass, the mean of the
    gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _mean_(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _mean_(grads[0].clone())


def _mean_(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor.div_(dist.get_world_size())


def gather(rows: Tensor) -> Tensor:
    """Every process's rows (B, ...), the same number from each, in the order of ranks: (W * B, ...). With gradients.

    A loss computed from them is the same on all processes. The loop averages its gradients over processes; because the
    backward pass sums over processes, this average is the gradient of the global loss.
    """
    return _Gather.apply(rows) if size() > 1 else rows


def mean(tensor: Tensor) -> Tensor:
    """The mean over processes of a tensor of the same shape on each. With gradients, as in `gather`."""
    return _Mean.apply(tensor) if size() > 1 else tensor


def all_reduce_(tensor: Tensor, how: str = "sum") -> Tensor:
    """Reduce a tensor in place over all processes ("sum" or "max"). Without gradients: not for use inside a loss."""
    if _together():
        dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how])
    return tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds, with shared memory; any other tensor unchanged."""
    with torch.no_grad():  # otherwise several operations would be recorded in an autograd graph
        return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def sharded_like(part: Tensor, other: Tensor) -> Tensor:
    """This process's `part` as a sharded tensor with the shape and placement of `other`; it shares the part's
    memory."""
    from torch.distributed.tensor import DTensor

    assert isinstance(other, DTensor)
    mesh, placements = other.device_mesh, other.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=other.shape, stride=other.stride())


def mean_gradients_(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, all in one all-reduce."""
    if not _together():
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch._utils._flatten_dense_tensors(grads)
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())
    torch._foreach_copy_(grads, torch._utils._unflatten_dense_tensors(flat, grads))


def any_of(*flags: bool) -> tuple[bool, ...]:
    """For each flag whether it is true on any process. It is exchanged over the CPU, without waiting for an
    accelerator."""
    if not _together():
        return flags
    packed = torch.tensor([int(flag) for flag in flags])
    dist.all_reduce(packed, dist.ReduceOp.MAX, group=cpu_group())
    return tuple(map(bool, packed.tolist()))


@functools.cache
def cpu_group() -> dist.ProcessGroup | None:
    """The process group for communication over the CPU; None (the default group) if the default backend is gloo."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def barrier() -> None:
    """Wait for all processes."""
    if _together():
        dist.barrier()


def from_first(value: Any) -> Any:
    """The first process's value (plain data), on every process."""
    if not _together():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_all(work: Callable[[], T]) -> T:
    """The result of `work` on each process; the first process runs it before the others. A UserError on one process is
    raised on all, and the first reports it."""
    value: T | None = None
    mine: UserError | None = None
    for turn in (rank() == 0, rank() != 0):
        if turn:
            try:
                value = work()
            except UserError as problem:
                mine = problem
        found = [text for text in from_all(None if mine is None else str(mine)) if text is not None]
        if found:
            mistake = mine or UserError(found[0])
            mistake.args, mistake.reported_elsewhere = (found[0],), rank() != 0
            raise mistake
        if not _together():
            break
    return cast(T, value)


def from_all(value: Any) -> list[Any]:
    """Every process's value (plain data), in the order of ranks, on every process."""
    if not _together():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
