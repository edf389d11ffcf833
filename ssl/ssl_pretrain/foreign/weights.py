"""Reads weight files of other sources without executing their content, and compares weights name for name."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError, system_error

SHOWN = 8  # largest number of names that a message lists for each kind of mismatch


def read_file(file: Path) -> Mapping[str, Any]:
    """The content of a checkpoint, on the CPU: a safetensors file, or a torch file of tensors and plain data.

    Nothing in it is executed. Besides tensors, only an `argparse.Namespace` (of settings; it does nothing) is accepted.
    Raises UserError for a file that needs more, is damaged, or has no weights by name.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        if not _may_be_torch(file) or "operand" in str(problem):  # a byte that is none of a pickle's
            raise UserError(
                f"{file} cannot be read as a checkpoint: it is damaged, or no torch file: copy or download it again"
            ) from None
        wants = re.search(r"GLOBAL ([\w.]+)", str(problem))
        raise UserError(
            f"{file} wants {wants[1] if wants else 'more than tensors'} to be run on reading, and nothing from a file is "
            f"executed here; where you trust the file, save its tensors alone once: torch.save(torch.load(FILE, "
            f"weights_only=False)['model'], NEW), with the name its weights have in it instead of 'model'"
        ) from None
    except Exception as problem:  # of a damaged file: what torch's reader raises has no end
        if _is_program(file):
            raise UserError(
                f"{file} is a program (TorchScript or torch.export), not weights, and nothing from a file is executed "
                f"here; load it in a function of your own and name that: module:PACKAGE:FUNCTION"
            ) from None
        if file.is_file() and file.stat().st_size == 0:
            raise UserError(f"{file} is empty: copy or download it again") from None
        why = (str(problem).splitlines() or ["it ends in the middle"])[0].partition(". ")[0]  # behind it: advice
        if isinstance(problem, OSError):
            why = system_error(problem)
        raise UserError(f"{file} cannot be read as a checkpoint: {why}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}, not weights by name")
    return content


def _may_be_torch(file: Path) -> bool:
    """Whether a file begins as torch's do: as a zip archive, or as a pickle of protocol 2 or more."""
    with open(file, "rb") as opened:
        head = opened.read(4)
    return head == b"PK\x03\x04" or head[:1] == b"\x80"


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
    """A description of how weights differ from an architecture's; empty if names and shapes are the same."""
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
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False
    return any(re.search(r"(^|/)(code/|constants\.pkl$|archive_format$|models/)", name) for name in names)
