"""Who writes which part of a checkpoint, found by every process for itself.

torch's own plan is made by the first process for all of them, tensor by tensor and process by process: minutes for a
thousand processes, in a thread that takes the interpreter from training. All that decides is known everywhere.
"""

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan
from torch.distributed.tensor import DTensor


def mine(state: Mapping[str, Tensor], *, first: bool) -> dict[str, Tensor]:
    """Of a state that all processes hold, by the same names in the same order, what this one writes.

    The first writes what is whole everywhere. Of a sharded tensor each process writes its part; where several hold the
    same one (hsdp), whole tensors go to the group of processes that has the fewest bytes so far.
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
    """How many copies there are of each part, and the number of this process's one (-1: it holds none)."""
    mesh, where = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    copies, own = 1, 0
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            copies, own = copies * mesh.size(dim), own * mesh.size(dim) + (where[dim] if where else 0)
    return copies, own if where else -1


@final
class OwnPlan(DefaultSavePlanner):
    """Writes what it is given. The others' parts are not looked at: whether all of them are there is seen by who gives the
    checkpoint its name."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Any]:
        """See SavePlanner; of one process's plan."""
        return all_plans, Metadata({})
