"""Checkpoints of a run: written atomically; a run resumes from the newest readable one.

`checkpoints/step-00001000/` contains the tensors in safetensors files, one for each process that held a part of them,
in the layout of torch.distributed.checkpoint (so any number of processes can read them, with any sharding), and
`checkpoint.json`: the step, plain data, and size and CRC-32 of each file. It is written under another name, synced and
then renamed, so a killed process or a full disk does not damage the earlier ones.
"""

import warnings

from .folder import clear, damage, description, newest, prune, steps
from .reader import Reader, load
from .writer import Writer, save

# torch warns for every checkpoint that one process writes or reads alone, which is intended here
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


__all__ = [
    "Reader",
    "Writer",
    "clear",
    "damage",
    "description",
    "load",
    "newest",
    "prune",
    "save",
    "steps",
]
