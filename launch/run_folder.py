"""Reads a run folder for `ssl-report`: settings, numbers, scores, warnings. What is damaged is named and left out."""

import json
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ssl_pretrain.config import read_recorded
from ssl_pretrain.errors import UserError
from ssl_pretrain.files import each_line, read_lines

from .table import Cell, cells_of

MOST, MOST_STEPS = 1e300, 10**12  # of a number that is drawn
LISTED = 20  # warnings and bad images that are shown of a run
VERDICT = "verdict.txt"  # the scores that a run printed at its end, in words
NOT_DRAWN = ("step", "time", "epoch", "skipped", "bad_images")


@dataclass
class Column:
    """One logged number: the steps at which it was logged, and its values, NaN where one was not finite."""

    steps: array = field(default_factory=lambda: array("q"))
    values: array = field(default_factory=lambda: array("d"))

    @property
    def last(self) -> float:
        """The value that was logged last."""
        return self.values[-1]


@dataclass(frozen=True)
class Result:
    """A results.json below the run folder."""

    where: str  # the path of its folder within the run folder
    content: dict[str, Any]
    cells: list[Cell]  # its headline number, and those of its baselines


@dataclass(frozen=True)
class Run:
    """Content of a run's folder."""

    name: str
    folder: Path
    manifest: dict[str, Any]
    config: dict[str, str]  # values as JSON
    columns: dict[str, Column]
    verdict: list[str]  # lines
    warnings: list[str]
    bad_images: list[dict[str, Any]]
    results: list[Result]

    def setting(self, name: str) -> Any:
        """A setting of config.yaml; None where it has none of that name."""
        return json.loads(self.config.get(name, "null"))

    def last(self, name: str) -> float | None:
        """The value of a number that was logged last, NaN if that was not finite; None where there is none."""
        return self.columns[name].last if name in self.columns else None

    @property
    def step(self) -> int:
        """How far the log of the training loss goes."""
        return self.columns["loss"].steps[-1] if "loss" in self.columns else 0

    @property
    def launches(self) -> list[dict[str, Any]]:
        """The starts of the run, the oldest first."""
        found = self.manifest.get("launches")
        return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []

    @property
    def seconds(self) -> float | None:
        """How long the run trained, without the time between its starts; None where the folder does not say."""
        starts = [_seconds(each.get("time")) for each in self.launches]
        known = [start for start in starts if start is not None]
        if not known or len(known) < len(starts):
            return None
        logged = list(self.columns["time"].values) if "time" in self.columns else []
        ended = _seconds(self.manifest.get("ended"))
        total = 0.0
        for i, start in enumerate(known):
            until = known[i + 1] if i + 1 < len(known) else float("inf")
            seen = [moment for moment in logged if start <= moment < until]
            if (
                until == float("inf")
                and ended is not None
                and ended > start
                and self.manifest.get("state") != "running"
            ):
                seen.append(ended)
            total += max(seen, default=start) - start
        return total


def read(folder: Path, name: str, prog: str) -> Run:
    """Read a run's folder; `prog` begins the lines that say what was left out. Raises UserError if it is not a run."""
    begun = (folder / "config.yaml").is_file() and (
        folder / "manifest.json"
    ).is_file()  # it may have logged nothing yet
    if not (folder / "metrics.jsonl").is_file() and not begun:
        found = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
        inside = f"; there are runs in it: {', '.join(found[:5])}" if found else ""
        what = "is not a run: it has no metrics.jsonl" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}{inside}. Give the --out folder of an ssl-pretrain run")
    try:
        config = read_recorded(folder / "config.yaml")
    except UserError as problem:
        raise UserError(f"{folder} is no whole run: {problem}") from None
    skipped: list[str] = []
    columns = _columns(folder / "metrics.jsonl", skipped)
    bad_images = read_lines(folder / "bad_images.jsonl", skipped)
    manifest = _manifest(folder, skipped)
    results = _results(folder, name, skipped)
    said, verdict = _text(folder / "warnings.log"), _text(folder / VERDICT)
    for text in skipped[:LISTED]:
        print(f"{prog}: {folder}: {text}", file=sys.stderr)
    if len(skipped) > LISTED:
        print(f"{prog}: {folder}: ... ({len(skipped)} in all)", file=sys.stderr)
    settings = {str(key): json.dumps(value, default=str) for key, value in config.items()}
    return Run(name, folder, manifest, settings, columns, verdict, [*said, *skipped], bad_images, results)


def _text(path: Path) -> list[str]:
    """The lines of a text file, none where it is not there."""
    return path.read_text(encoding="utf-8", errors="backslashreplace").splitlines() if path.is_file() else []


def _columns(path: Path, skipped: list[str]) -> dict[str, Column]:
    """The numbers of metrics.jsonl by their names; what is no line of a run and no number is said in `skipped`."""
    columns: dict[str, Column] = {}
    for line in each_line(path, skipped):
        step = line.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < MOST_STEPS:
            skipped.append(f"metrics.jsonl: a line without a step ({json.dumps(line)[:60]}); left out")
            continue
        for name, value in line.items():
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                if (column := columns.get(name)) is None:
                    column = columns[name] = Column()
                column.steps.append(step)
                column.values.append(value if value is not None and abs(value) < MOST else float("nan"))
            else:
                skipped.append(f"metrics.jsonl, step {step}: {name} is no number; left out")
    return columns


def _manifest(folder: Path, skipped: list[str]) -> dict[str, Any]:
    try:
        found = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        skipped.append("manifest.json is missing or damaged: the page lacks its content")
    return found if isinstance(found, dict) else {}


def _results(folder: Path, name: str, skipped: list[str]) -> list[Result]:
    results = []
    for path in sorted(folder.rglob("results.json")):
        where = str(path.parent.relative_to(folder))
        try:
            content = json.loads(path.read_bytes())
            data = str(content["protocol"].get("data", ""))
            cells = cells_of(name, data, str(content["evaluator"]), content, where, None)
            for cell in cells:
                if cell.value is not None:
                    _ = f"{cell.value:.2f}", cell.interval and "{:.2f}{:.2f}".format(*cell.interval)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
            skipped.append(f"{path.relative_to(folder)}: no result of an evaluator; left out")
            continue
        results.append(Result(where, content, [cell for cell in cells if cell.value is not None]))
    return results


def _seconds(text: Any) -> float | None:
    """A time as the manifest writes it, in seconds of the clock."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def entry(part: Any, *names: str) -> Any:
    """An entry of what may be a mapping, at any depth; None where there is none."""
    for name in names:
        part = part.get(name) if isinstance(part, Mapping) else None
    return part
