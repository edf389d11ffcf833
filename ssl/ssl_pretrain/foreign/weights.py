"""Files of weights from elsewhere: read without executing anything in them, and compared name for name."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError

SHOWN = 8  # names listed in a message of each kind of mismatch


def read_file(file: Path) -> Mapping[str, Any]:
    """What a checkpoint holds, on the CPU: safetensors, or a torch file of tensors and plain data.

    Nothing in it is executed: beside tensors, only an `argparse.Namespace` (of settings; it does nothing) is let through.
    Raises UserError for a file that wants more, or is damaged, or holds no names.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        wants = re.search(r"GLOBAL ([\w.]+)", str(problem))
        raise UserError(
            f"{file} wants {wants[1] if wants else 'more than tensors'} to be run on reading, and nothing from a file is "
            f"executed here; where you trust the file, save its tensors alone once: torch.save(torch.load(FILE, "
            f"weights_only=False)['model'], NEW), with the name its weights have in it instead of 'model'"
        ) from None
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as problem:
        if _is_program(file):
            raise UserError(
                f"{file} is a program (TorchScript or torch.export), not weights, and nothing from a file is executed "
                f"here; load it in a function of your own and name that: module:PACKAGE:FUNCTION"
            ) from None
        raise UserError(f"{file} cannot be read as a checkpoint: {str(problem).splitlines()[0]}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}, not weights by name")
    return content


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """All tensors of nested mappings, by their names joined with dots."""
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
    return found


def difference(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """How weights differ from what an architecture holds, in words; empty where names and shapes are the same."""
    kinds = {
        "missing": sorted(own.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(own.keys() & weights.keys())
            if own[name].shape != weights[name].shape
        ],
    }
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for kind, names in kinds.items()
        if names
    )


def _is_program(file: Path) -> bool:
    """Whether it is a TorchScript or torch.export archive."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(
            re.search(r"(^|/)(code/|constants\.pkl$|archive_format$|models/)", name) for name in archive.namelist()
        )
