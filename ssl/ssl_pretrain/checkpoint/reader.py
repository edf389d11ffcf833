"""Reading a checkpoint, by any number of processes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader


@final
class Reader:
    """A checkpoint that is whole. The headers of its files, one for each process that wrote, are read once."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / f"step-{step:08d}"
        self._storage = _Storage(str(self.path))

    def entries(self) -> list[tuple[tuple[str, str], tuple[int, ...], torch.dtype]]:
        """Part and name, whole shape and dtype of each tensor."""
        found = self._storage.read_metadata().state_dict_metadata
        return [
            ((name.split("/", 1)[0], name.split("/", 1)[1]), tuple(each.size), each.properties.dtype)
            for name, each in found.items()
        ]

    def read(self, into: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
        """Put the tensors into those of `into` (by part and name, sharded or not, on any device); return the plain data.
        Each process reads what it holds itself; files are memory-mapped, so nothing is in memory twice.

        Raises ValueError where the names or shapes are not the same.
        """
        flat = {f"{part}/{name}": t.detach() for part, each in into.items() for name, t in each.items()}
        there = {f"{part}/{name}": shape for (part, name), shape, _ in self.entries()}
        wanted = {name: tuple(tensor.shape) for name, tensor in flat.items()}
        if there != wanted:
            different = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
            raise ValueError(f"{self.path} is of another model: {', '.join(different[:10])}")
        self.read_some(flat)
        recorded = json.loads((self.path / "checkpoint.json").read_text())
        return {name: value for name, value in recorded.items() if name not in ("files", "step")}

    def read_some(self, into: dict[str, Tensor]) -> None:
        """Put some of the tensors, by "part/name", into those of `into`."""
        dcp.load(into, storage_reader=self._storage, no_dist=True)


class _Storage(HuggingFaceStorageReader):
    """torch's reader, which reads all headers whenever it is asked where things lie."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "_found"):
            self._found = super().read_metadata()
        return self._found

    def reset(self, checkpoint_id: Any = None) -> None:
        """See StorageReader: it is of one checkpoint for good."""


def load(folder: Path, step: int) -> dict[str, Any]:
    """The whole state of a checkpoint, tensors in host memory: what was given to `save`."""
    reader = Reader(folder, step)
    parts: dict[str, dict[str, Tensor]] = {}
    for (part, name), shape, dtype in reader.entries():
        parts.setdefault(part, {})[name] = torch.empty(shape, dtype=dtype)
    return {**parts, **reader.read(parts)}
