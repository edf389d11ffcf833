"""How a finished model is spread over the processes: from outside, in one order, for any method.

The order: 1. activations that are computed again instead of kept, 2. compilation, 3. replication (DDP) or sharding
(FSDP2). The first two work on the model's repeated blocks, and so does sharding: a block is the unit that is gathered,
used and let go. Teachers, heads, prototypes are modules like any other and are sharded with the rest; buffers (queues,
centres, banks) stay whole on every process.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from .. import distributed
from ..config import Resolved
from ..distributed import World
from ..distributed.batch_norm import constant_statistics, couples_samples
from ..errors import UserError
from ..pretext import Method, WholeBatchMethod

# Containers of repeated blocks: a ViT's and a ConvNeXt's "blocks", a decoder's "decoder_blocks", a ResNet's "layer3"
REPEATED = re.compile(r"(.*blocks|layer\d)$")


def check(run: Resolved, method: Method, world: World) -> None:
    """Raise UserError for a way of spreading that cannot work with the run's other settings."""
    shards = run.parallel != "ddp"
    if run.gradient_checkpointing and getattr(method.encoder, "drops_by_state", False):
        raise UserError(
            f"--gradient-checkpointing computes the blocks of {run.encoder} again when the noise of its drop path is gone: "
            f"give --drop-path 0, or leave out --gradient-checkpointing"
        )
    if run.cpu_offload and not shards:
        raise UserError("--cpu-offload needs --parallel fsdp or hsdp: only sharded parameters can be kept on the host")
    if run.cpu_offload and world.device.type == "cpu":
        raise UserError("--cpu-offload: the parameters are on the host already, for there is no GPU here")
    if run.shard_size is not None and run.parallel != "hsdp":
        raise UserError("--shard-size is how many processes share one copy of the model with --parallel hsdp; add it")
    if run.parallel == "hsdp" and (world.size % _shard_size(run, world) or _shard_size(run, world) < 1):
        raise UserError(f"--shard-size {_shard_size(run, world)} does not divide the {world.size} process(es)")
    if not shards or world.size == 1:
        return
    if getattr(method.config, "anchor", None) == "weights":
        raise UserError(
            f"--anchor weights compares whole parameters, and --parallel {run.parallel} leaves a process a part of each: "
            f"use --parallel ddp, or --anchor gram or features"
        )
    if run.optimizer == "muon":
        raise UserError(
            f"--optimizer muon turns whole matrices, and --parallel {run.parallel} leaves a process a part of each: "
            f"use --parallel ddp, or another optimiser"
        )
    if run.accumulate > 1 and isinstance(method, WholeBatchMethod):
        raise UserError(
            f"--accumulate with --method {run.method} embeds every micro-batch twice, which --parallel {run.parallel} "
            f"does not do: use --parallel ddp, or --gradient-checkpointing to save memory"
        )


def blocks(method: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, in the order of their names."""
    return [
        block
        for name, part in method.named_modules()
        if isinstance(part, nn.ModuleList | nn.Sequential) and REPEATED.match(name.rsplit(".", 1)[-1])
        for block in part
    ]


def wrap(method: Method, run: Resolved, world: World) -> nn.Module:
    """The method as the loop calls it; `method` itself stays what holds the parameters."""
    if run.gradient_checkpointing:
        for block in blocks(method):
            block.forward = _recomputed(block)
    if run.compile:
        for block in blocks(method):
            block.compile()
    if world.size == 1:
        return method
    if run.parallel == "ddp":
        # Buffers agree by construction; the option that says so has another name from torch 2.13 on.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
        }
        unused = method.encoder.partly_used
        return DistributedDataParallel(method, gradient_as_bucket_view=True, find_unused_parameters=unused, **buffers)
    _shard(method, run, world)
    return method


def _recomputed(block: nn.Module) -> Callable[..., Any]:
    """A block's forward that keeps no activations. It is computed again in the backward pass, without a second update of
    its batch norms' running statistics."""
    options: dict[str, Any] = {"use_reentrant": False}
    if couples_samples(block):
        options["context_fn"] = lambda: (nullcontext(), constant_statistics(block))
    return functools.partial(checkpoint, block.forward, **options)


def _shard(method: Method, run: Resolved, world: World) -> None:
    """FSDP2: every block is a unit of its own, what is left (embeddings, heads, teachers' too) one more."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    if run.parallel == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    else:
        size = _shard_size(run, world)
        mesh = init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))
    how: dict[str, Any] = {
        "mesh": mesh,
        # Autocast goes on deciding what is computed in what; parameters are gathered in bfloat16 (half the traffic), and
        # gradients are summed in float32. The residual stream stays as wide as autocast leaves it, which is why a CPU
        # gathers float32: its layer norm takes no parameters that are narrower than what they are applied to.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if run.precision == "bf16" and world.device.type != "cpu" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy() if run.cpu_offload else OffloadPolicy(),
    }
    for block in blocks(method):
        fully_shard(block, **how)
    fully_shard(method, **how)


def _shard_size(run: Resolved, world: World) -> int:
    return run.shard_size or world.local_size


def is_sharded(method: nn.Module) -> bool:
    """Whether `wrap` has sharded it."""
    return any(hasattr(parameter, "to_local") for parameter in method.parameters())


def last_backward(wrapped: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Around a micro-batch: gradients are exchanged with the last one of a step only."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    if hasattr(wrapped, "set_requires_gradient_sync"):
        cast(Any, wrapped).set_requires_gradient_sync(last)
    return nullcontext()


@contextmanager
def gathered(method: nn.Module) -> Iterator[None]:
    """With the parameters outside of blocks whole, so that parts of the method can be called by themselves (blocks gather
    their own). All processes must enter it, and call the same blocks."""
    if not hasattr(method, "unshard"):
        yield
        return
    sharded = cast(Any, method)
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()


def name_of(part: nn.Module, whole: nn.Module) -> str | None:
    """What the names of a part's tensors begin with in the whole's state ("encoder."); None where it is no part of it."""
    return next((f"{name}." if name else "" for name, each in whole.named_modules() if each is part), None)


@torch.no_grad()
def copy_whole(source: nn.Module, target: nn.Module | None) -> None:
    """Copy every parameter and buffer of `source`, gathered where it is sharded (all processes must call this then), to
    `target`, a module of the same names; None where the copy is not wanted here."""
    there = {} if target is None else target.state_dict()
    for name, tensor in source.state_dict().items():
        whole = cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if target is not None:
            there[name].copy_(whole)


class Shards:
    """The trained parameters as this process's optimiser sees them: its parts of sharded ones, sharing their memory.

    An optimiser over plain tensors needs to know nothing of sharding; what crosses parts goes through `norms`.
    """

    def __init__(self, method: nn.Module, device: torch.device) -> None:
        self._device = device  # where processes talk; the parts themselves may be in host memory
        self._own: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self._group: dist.ProcessGroup | None = None
        for parameter in method.parameters():
            if parameter.requires_grad and hasattr(parameter, "to_local"):
                mine = nn.Parameter(distributed.local(parameter))
                self._own[id(parameter)] = parameter, mine
                mesh = cast(Any, parameter).device_mesh
                self._group = mesh.get_group("shard")

    def __call__(self, parameter: nn.Parameter) -> nn.Parameter:
        """This process's part of a parameter, itself where it is not sharded."""
        return self._own[id(parameter)][1] if id(parameter) in self._own else parameter

    def take_gradients(self) -> None:
        """Move the gradients that backward left at the sharded parameters to this process's parts."""
        for parameter, mine in self._own.values():
            mine.grad = None if parameter.grad is None else distributed.local(parameter.grad)
            parameter.grad = None

    def norms(self, own: Tensor) -> Tensor:
        """2-norms of whole tensors (any shape) from those of this process's parts; the others are asked for theirs."""
        if self._group is None:
            return own
        squares = own.to(self._device).square()
        dist.all_reduce(squares, group=self._group)
        return squares.sqrt()

    def entries(self, optimizer_state: dict[str, Tensor], method: nn.Module) -> dict[str, Tensor]:
        """The optimiser's state by "parameter/entry" as it is stored: what has a part's shape is sharded as its
        parameter."""
        if not self._own:
            return optimizer_state
        by_name = dict(method.named_parameters())
        out = {}
        for path, value in optimizer_state.items():
            parameter = by_name[path.rsplit("/", 1)[0]]
            whole = value.ndim == 0 or value.shape != self(parameter).shape
            out[path] = value if whole else distributed.sharded_like(value, parameter)
        return out
