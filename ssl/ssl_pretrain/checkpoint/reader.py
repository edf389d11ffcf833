"""Reads a checkpoint with any number of processes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from .folder import description


@final
class Reader:
    """Reads a complete checkpoint. The headers of its files, one file for each process that wrote it, are read once."""

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
        """Read the tensors into those of `into` (by part and name, sharded or not, on any device); return the plain
        data. Each process reads the parts that it holds. Files are memory-mapped, so nothing is in memory twice.

        Raises ValueError if the names or shapes differ.
        """
        flat = {f"{part}/{name}": t.detach() for part, each in into.items() for name, t in each.items()}
        there = {f"{part}/{name}": shape for (part, name), shape, _ in self.entries()}
        wanted = {name: tuple(tensor.shape) for name, tensor in flat.items()}
        if there != wanted:
            different = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
            raise ValueError(f"{self.path} belongs to another model: {', '.join(different[:10])}")
        self.read_some(flat)
        recorded = description(self.path)
        return {name: value for name, value in recorded.items() if name not in ("files", "step")}

    def read_some(self, into: dict[str, Tensor]) -> None:
        """Read some of the tensors, by "part/name", into those of `into`."""
        dcp.load(into, storage_reader=self._storage, no_dist=True)


class _Storage(HuggingFaceStorageReader):
    """torch's reader, which by itself reads all headers again at every request for the metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "_found"):
            self._found = super().read_metadata()
        return self._found

    def reset(self, checkpoint_id: Any = None) -> None:
        """See StorageReader. It does nothing: this reader belongs to one checkpoint."""


def load(folder: Path, step: int) -> dict[str, Any]:
    """The whole state of a checkpoint as it was given to `save`, with tensors in host memory."""
    reader = Reader(folder, step)
    parts: dict[str, dict[str, Tensor]] = {}
    for (part, name), shape, dtype in reader.entries():
        parts.setdefault(part, {})[name] = torch.empty(shape, dtype=dtype)
    return {**parts, **reader.read(parts)}
