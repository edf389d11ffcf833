"""Several runs of one command that differ in some flags (`--grid lr=1e-4,3e-4 method=mae,lejepa`), and their table."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_pretrain.errors import UserError
from ssl_pretrain.files import read_lines

NOTE = "SSL_PRETRAIN_GRID_NOTE"  # set for a run of a grid: the file that says why it did not begin


@dataclass(frozen=True)
class Point:
    """One run of a grid."""

    settings: dict[str, str]
    out: str
    argv: list[str]


def expand(words: tuple[str, ...], argv: list[str], out: Path) -> list[Point]:
    """All combinations of the grid's values; each run's arguments are `argv` and then its own settings and folder.

    Raises UserError for a word that is no FLAG=VALUE,VALUE.
    """
    axes: dict[str, list[str]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        name = name.lstrip("-").replace("_", "-")
        if not equals or not name or not all(values.split(",")):
            raise UserError(f"--grid {word}: write FLAG=VALUE,VALUE,... like lr=1e-4,3e-4")
        if name in axes or name in ("out", "grid"):
            raise UserError(f"--grid {word}: --{name} {'stands there twice' if name in axes else 'cannot vary'}")
        if len(set(values.split(","))) < len(values.split(",")):
            raise UserError(f"--grid {word} has a value twice")
        axes[name] = values.split(",")
    points = []
    for combination in itertools.product(*axes.values()):
        settings = dict(zip(axes, combination, strict=True))
        folder = str(out / re.sub(r"[/\s]", "_", ",".join(f"{name}={value}" for name, value in settings.items())))
        own = [word for name, value in settings.items() for word in (f"--{name}", value)]
        points.append(Point(settings, folder, [*argv, *own, "--out", folder]))
    if len({point.out for point in points}) < len(points):
        raise UserError("--grid: two runs would have the same folder; their values differ in / and _ only")
    return points


def first(argv: list[str], name: str) -> str | None:
    """The first value that a command's --grid gives a flag; None where it does not vary. Before anything is parsed."""
    found = next((word for word in argv if word.startswith(f"{name}=")), None) if "--grid" in argv else None
    return None if found is None else found.partition("=")[2].split(",")[0]


def pick(spec: str | None, count: int) -> tuple[list[int], int]:
    """The runs that --array names of `count`, and how many at a time. Raises UserError if the text is not valid."""
    which, _, at_once = (spec or "").partition("%")
    try:
        runs: list[int] = []
        for part in which.split(",") if which else []:
            first, dash, last = part.partition("-")
            runs += range(int(first), int(last if dash else first) + 1)
        limit = int(at_once) if at_once else len(runs) or count
    except ValueError:
        raise UserError(f"--array {spec}: write numbers like 0-3,7, and after % how many at a time") from None
    wrong = [run for run in runs if run >= count]
    if wrong or limit < 1 or (which and not runs):
        raise UserError(f"--array {spec}: the grid's runs are 0 to {count - 1}")
    return sorted(set(runs)) or list(range(count)), limit


def table(points: list[Point]) -> str:
    """The runs and how they stand, one line each: number, settings, state, step, last loss or results, folder."""
    rows = [["run", *points[0].settings, "state", "step", "result", "folder"]]
    for number, point in enumerate(points):
        folder = Path(point.out)
        facts = _json(folder / "manifest.json")
        last = _last_line(folder / "metrics.jsonl")
        metrics = _json(folder / "results.json").get("metrics", {})
        result = " ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, int | float))
        if not result and last.get("loss") is not None:
            result = f"loss {last['loss']:.4g}"
        state = str(facts.get("state", "finished" if metrics else "-")).split(";")[0]
        if (why := _why(point)) and not state.startswith("failed"):
            state, _, result = why.partition(": ")
        step = str(last.get("step", "-"))
        rows.append([str(number), *point.settings.values(), state, step, result or "-", point.out])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


@contextlib.contextmanager
def member(point: Point) -> Iterator[None]:
    """Around one run of a grid: what keeps it from beginning is noted beside its folder, which may not be there, for the
    table. A note of an earlier try is removed."""
    note = _note(point)
    with contextlib.suppress(OSError):
        note.unlink(missing_ok=True)
    os.environ[NOTE] = str(note)
    try:
        yield
    except Exception as problem:
        _write_note("failed", f"{type(problem).__name__}: {problem}")
        raise
    finally:
        del os.environ[NOTE]


def note_mistake(message: str) -> None:
    """What a command says before it ends with exit code 2: noted where it is a run of a grid."""
    _write_note("mistake", message)


def ended(point: Point, code: int) -> None:
    """A run of a grid has ended with that exit code: noted where it is a failure that has not said why."""
    if code not in (0, 75) and not _note(point).exists():
        os.environ[NOTE] = str(_note(point))
        _write_note("failed", f"exit code {code}; its log says more")
        del os.environ[NOTE]


def _note(point: Point) -> Path:
    folder = Path(point.out)
    return folder.with_name(folder.name + ".why")


def _write_note(state: str, text: str) -> None:
    path = os.environ.get(NOTE)
    if path is not None:
        with contextlib.suppress(OSError):  # a full disk must not hide how the run itself has ended
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(f"{state}: {' '.join(text.split())}\n")


def _why(point: Point) -> str:
    """The note of the run's last try: "mistake: ..." or "failed: ..."; empty where the run began after it."""
    note, manifest = _note(point), Path(point.out) / "manifest.json"
    try:
        if manifest.exists() and manifest.stat().st_mtime > note.stat().st_mtime:
            return ""
        return note.read_text().strip()
    except OSError:
        return ""


def summarize(points: list[Point]) -> None:
    """Write the table to `summary.txt` in the folder of the runs' folders."""
    folder = Path(points[0].out).parent
    with contextlib.suppress(OSError):  # a full disk must not hide how the run itself has ended
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.txt").write_text(table(points) + "\n")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_line(path: Path) -> dict[str, Any]:
    """The newest whole line with a loss of a metrics.jsonl; empty without one."""
    try:
        lines = read_lines(path)
    except OSError:
        return {}
    return next((line for line in reversed(lines) if "loss" in line), {})
