"""manifest.json of a run folder: what ran where, on what data, with which versions, and how it ended."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..distributed import World, cores
from ..errors import NO_ROOM
from ..files import overwrite_text, write_text

ROOM = 1000  # bytes kept free at the end of the file


def read(out: Path) -> dict[str, Any]:
    """The manifest of a run folder; empty where there is none or it cannot be read."""
    try:
        found = json.loads((out / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def starts(out: Path) -> list[int]:
    """The step that each start of the run in a folder began at, the oldest first."""
    return [
        each["step"] for each in _launches(read(out)) if isinstance(each, dict) and isinstance(each.get("step"), int)
    ]


def images(out: Path) -> tuple[str | None, int | None]:
    """Fingerprint and number of the images that the run in a folder is trained on; None where it does not say."""
    data = read(out).get("data")
    known = data if isinstance(data, dict) else {}
    found, count = known.get("fingerprint"), known.get("images")
    return found if isinstance(found, str) else None, count if isinstance(count, int) else None


def begin(out: Path, *, world: World, step: int, hosts: list[str], **facts: Any) -> None:
    """Note a start (or restart) at `step`: the command, versions, commit and hardware (`hosts` in the order of ranks, none
    for one process), and facts to keep (the data, frozen networks); the state becomes "running"."""
    launch = {
        "time": _now(),
        "step": step,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "processes": world.size,
        "hosts": hosts or [platform.node()],
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else _processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("ssl-pretrain", "torch", "numpy", "pillow", "safetensors")
        },
        "commit": commit(),
    }
    before = read(out)
    manifest = {**before, **facts, "state": "running", "launches": [*_launches(before), launch]}
    _write(out, manifest)


def end(out: Path, state: str, **facts: Any) -> None:
    """Note how the run stands, and facts to keep.

    "finished"; "stopped: SIGTERM at step 120" (by a person: the same command continues); "preempted: SIGTERM at step
    120; requeued ..." (in a Slurm job); "failed: why".
    """
    manifest = {**read(out), **facts, "state": state, "ended": _now()}
    _write(out, manifest)


def _write(out: Path, manifest: dict[str, Any]) -> None:
    """Write it, on a full disk over the old one: it has room for the words of how the run ended."""
    text = json.dumps(manifest, indent=1)
    try:
        write_text(out / "manifest.json", text + " " * ROOM + "\n")
    except OSError as problem:
        if problem.errno not in NO_ROOM:
            raise
        overwrite_text(out / "manifest.json", text + "\n")


def _launches(manifest: dict[str, Any]) -> list[Any]:
    found = manifest.get("launches", [])
    return found if isinstance(found, list) else []


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the source tree this runs from, with "+" where it has changes; None for an installed package."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        git = ["git", "-C", folder]
        commit_hash = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        tracked = subprocess.run([*git, "ls-files", __file__], capture_output=True, text=True, timeout=5, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if not tracked.stdout.strip():
        return None
    return commit_hash.stdout.strip() + ("+" if changed.stdout.strip() else "")
