"""Decides which process writes which part of a checkpoint. Every process computes this by itself.

torch's own plan is made by the first process for all others, tensor by tensor and process by process. That takes
minutes for a thousand processes, in a thread that blocks the interpreter for training. All processes know the needed
facts.
"""

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan
from torch.distributed.tensor import DTensor


def mine(state: Mapping[str, Tensor], *, first: bool) -> dict[str, Tensor]:
    """The tensors of a state that this process writes. All processes have the same names in the same order.

    The first process writes tensors that are not sharded. Of a sharded tensor each process writes its part. If several
    hold the same part (hsdp), each tensor is assigned to the group of processes with the fewest bytes so far.
    """
    chosen: dict[str, Tensor] = {}
    given: dict[int, list[int]] = {}  # bytes by copy, for each number of copies
    for name, tensor in state.items():
        if not isinstance(tensor, DTensor):
            if first:
                chosen[name] = tensor
            continue
        copies, own = _copies(tensor)
        so_far = given.setdefault(copies, [0] * copies)
        writes = so_far.index(min(so_far))
        so_far[writes] += tensor.numel() * tensor.element_size()
        if own == writes and tensor.to_local().numel():
            chosen[name] = tensor
    return chosen


def _copies(tensor: DTensor) -> tuple[int, int]:
    """The number of copies of each part, and the index of this process's copy (-1: it holds none)."""
    mesh, where = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    copies, own = 1, 0
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            copies, own = copies * mesh.size(dim), own * mesh.size(dim) + (where[dim] if where else 0)
    return copies, own if where else -1


@final
class OwnPlan(DefaultSavePlanner):
    """Writes the given tensors without a plan for the other processes. The process that renames the checkpoint checks
    that all parts exist."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Any]:
        """See SavePlanner. The plan of this process only."""
        return all_plans, Metadata({})
