"""Checkpoints of a run: whole or absent, newest readable one first.

`checkpoints/step-00001000/` holds the tensors in safetensors files, one for each process that held a part of them, as
torch.distributed.checkpoint lays them out (so that any number of processes can read them, however they share the
parameters out), and `checkpoint.json`: the step, plain data, and size and CRC-32 of each file. It is written under another
name, synced and then renamed, so that a killed process or a full disk leaves the ones before it as they were.
"""

import warnings

from .folder import clear, damage, newest, prune, steps
from .reader import Reader, load
from .writer import Writer, save

# Said of every checkpoint that one process writes or reads for itself, which is what is meant
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


__all__ = [
    "Reader",
    "Writer",
    "clear",
    "damage",
    "load",
    "newest",
    "prune",
    "save",
    "steps",
]
