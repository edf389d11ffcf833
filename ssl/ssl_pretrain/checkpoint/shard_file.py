"""A process's part of a checkpoint as a safetensors file, written tensor by tensor.

torch's writer builds the whole file in memory first, which needs the memory of the optimiser's state again. This one
holds one tensor at a time, and computes the checksum of what it writes.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any, final

import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.futures import Future

# The format's names of types (https://huggingface.co/docs/safetensors)
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@final
class ShardWriter(HuggingFaceStorageWriter):
    """Storage for `torch.distributed.checkpoint.save`: one file per process, readable by HuggingFaceStorageReader.

    `written`: size and CRC-32 of this process's file by its name, once it is synced.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder, self.number = folder, rank + 1
        self.written: dict[str, tuple[int, int]] = {}

    def write_data(self, plan: Any, planner: Any) -> Future:
        """See StorageWriter. Raises OSError."""
        done: Future = Future()
        done.set_result([])  # an index that only files of another layout need
        # Wide types first, so that every tensor starts at a multiple of its own width.
        items = sorted(plan.items, key=lambda item: -item.tensor_data.properties.dtype.itemsize)
        if not items:
            return done
        offsets = {item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)} for item in items}
        about = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
        header: dict[str, Any] = {"__metadata__": about}
        at = 0
        for item in items:
            shape, dtype = list(item.tensor_data.chunk.sizes), item.tensor_data.properties.dtype
            end = at + torch.Size(shape).numel() * dtype.itemsize
            header[item.index.fqn] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        # The file name that the reader's library uses
        path = self.folder / f"shard-{self.number:05d}-model-00001-of-00001.safetensors"
        size = crc = 0
        with open(path, "wb") as file:
            for piece in (len(text).to_bytes(8, "little"), text, *map(planner.resolve_data, items)):
                if isinstance(piece, torch.Tensor):
                    piece = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                file.write(piece)
                size, crc = size + len(piece), zlib.crc32(piece, crc)
            file.flush()
            os.fsync(file.fileno())
        self.written[path.name] = size, crc
        return done
