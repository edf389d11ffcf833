"""Evaluates all combinations of listed encoders, data sets and evaluators and writes one table (`ssl-eval suite`).

    encoders: {mae: runs/mae, resnet: timm:resnet50}
    data: {photos: labelled-photos/, birds: {data: birds/, test-split: val}}
    evaluators:
      knn:
      linear: {lrs: [0.01, 0.1]}
      linear-dino: {evaluator: linear, protocol: dino}
    options: {workers: 4}

The table shows the names. In a list instead of a mapping, the name is the last part of the path. The entries of a data
set, of an evaluator and of `options` are flags of `ssl-eval`; `metric` is the number to show.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_pretrain import encoder as exported
from ssl_pretrain import flags
from ssl_pretrain.config import load_yaml
from ssl_pretrain.data.source import open_source
from ssl_pretrain.errors import UserError, nearest
from ssl_pretrain.files import make_folder, write_text
from ssl_pretrain.foreign.specs import Spec

from .table import Cell, Table, as_csv, as_json, cells_of

KEYS = ("encoders", "data", "evaluators", "options")
OURS = ("encoder", "out", "like")  # flags that the suite sets
Evaluate = Callable[[list[str]], tuple[dict[str, Any], Path]]  # a command's arguments -> its result and file


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The suite."""

    list: Path
    """YAML file that lists encoders, data and evaluators (example in docs/evaluators.md)."""
    out: Path = Path("suite")
    """Folder for the table (suite.md, .csv, .json, .html) and each evaluation's folder."""
    again: bool = False
    """Repeat evaluations whose results exist already."""


@dataclass(frozen=True)
class Entry:
    """One evaluation to run."""

    encoder: str
    data: str
    evaluator: str
    path: str  # of the encoder
    argv: tuple[str, ...]  # the arguments of ssl-eval, without --out
    metric: str | None

    def folder(self, out: Path) -> Path:
        return out / "/".join(_file(name) for name in (self.encoder, self.data, self.evaluator))


def read(path: Path) -> list[Entry]:
    """The evaluations of a list file. Raises UserError for an invalid file."""
    try:
        text = load_yaml(path.read_bytes())
    except OSError as problem:
        raise UserError(f"--list {path} cannot be read ({problem.strerror})") from None
    except ValueError as problem:
        raise UserError(f"--list {path} {problem}") from None
    if not isinstance(text, dict):
        raise UserError(f"--list {path}: it needs encoders, data and evaluators")
    for key in text:
        if key not in KEYS:
            raise UserError(f"--list {path}: unknown key {key!r}{nearest(str(key), KEYS)}")
    encoders, data, evaluators = (_named(path, text, key) for key in KEYS[:3])
    options = text.get("options") or {}
    if not isinstance(options, dict):
        raise UserError(f"--list {path}: options must be flags, like {{workers: 4}}")
    entries = []
    for encoder, place in encoders.items():
        if not isinstance(place, str):
            raise UserError(f"--list {path}: encoders: {encoder} is not a path, or timm:, hf:, torch:, module:")
        for images, source in data.items():
            where = {"data": source} if isinstance(source, str) else dict(source or {})
            if not isinstance(where.get("data"), str):
                raise UserError(f"--list {path}: data: {images} has no path ({images}: PATH, or {{data: PATH, ...}})")
            for label, given in evaluators.items():
                words = {**options, **where, **_mapping(path, label, given)}
                kind, metric = words.pop("evaluator", label), words.pop("metric", None)
                if wrong := next((key for key in words if key.replace("_", "-") in OURS), None):
                    raise UserError(f"--list {path}: {label}: {wrong} is set by the suite; it cannot be given")
                argv = (str(kind), "--encoder", place, *(word for item in words.items() for word in _arguments(*item)))
                entries.append(Entry(encoder, images, label, place, argv, metric))
    return entries


def run(entries: Sequence[Entry], suite: Suite, check: Callable[[list[str]], object], evaluate: Evaluate) -> int:
    """Run all evaluations, one after another. A failure is listed in the table, and the others continue. Returns 1 if
    one failed.

    check: parses the arguments of a command or raises UserError. The table is written after each evaluation. Results of
    an earlier suite are reused if encoder, images and flags are the same.
    """
    for entry in entries:
        try:
            check(list(entry.argv))
        except UserError as mistake:
            raise UserError(f"{suite.list}: {entry.evaluator} of {entry.encoder} on {entry.data}: {mistake}") from None
    cells: list[Cell] = []
    for number, entry in enumerate(entries):
        print(f"{number + 1} of {len(entries)}: {entry.encoder}, {entry.data}, {entry.evaluator}", flush=True)
        began = time.monotonic()
        folder = entry.folder(suite.out)
        try:
            result = None if suite.again else _existing_result(entry, folder)
            if result is None:
                result, _ = evaluate([*entry.argv, "--out", str(folder)])
                write_text(folder / "command.json", json.dumps(list(entry.argv)) + "\n")
            path = str(folder / "results.json")
            cells += cells_of(entry.encoder, entry.data, entry.evaluator, result, path, entry.metric)
        except KeyError as missing:
            failed = f"no metric {missing}"
            cells.append(_failure(entry, failed, began))
        except UserError as mistake:
            cells.append(_failure(entry, str(mistake), began))
        except Exception as problem:  # one error must not end a long suite
            traceback.print_exc()
            cells.append(_failure(entry, f"{type(problem).__name__}: {problem}", began))
        if cells[-1].failed:
            print(f"failed: {cells[-1].failed}", file=sys.stderr, flush=True)
        _write(cells, suite.out)
    table = Table.of(cells)
    print(table.markdown())
    print(f"written: {suite.out / 'suite.md'}, .csv, .json, .html")
    return 1 if table.failures else 0


def _write(cells: Sequence[Cell], out: Path) -> None:
    table = Table.of(cells)
    make_folder(out)
    try:
        for name, text in (
            ("suite.md", table.markdown()),
            ("suite.html", table.page("Encoders compared")),
            ("suite.csv", as_csv(cells)),
            ("suite.json", as_json(cells)),
        ):
            write_text(out / name, text)
    except OSError as problem:
        raise UserError(f"{out} cannot be written ({problem.strerror}): choose another folder with --out") from None


def _existing_result(entry: Entry, folder: Path) -> dict[str, Any] | None:
    """The result of the same command on the same encoder and images, if it exists."""
    try:
        if json.loads((folder / "command.json").read_text()) != list(entry.argv):
            return None
        result = json.loads((folder / "results.json").read_text())
        protocol = result["protocol"]
        own = not Spec.parse(entry.path) and Path(entry.path).exists()
        code = flags.word(list(entry.argv), "--code")
        if own and exported.load(entry.path, code=code).fingerprint != protocol["encoder_fingerprint"]:
            return None
        for side in (protocol[name] for name in ("train", "test") if name in protocol):
            if side["fingerprint"] != _fingerprint(protocol["data"], side["split"]):
                return None
        return result
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fingerprint(data: str, split: str) -> str:
    return open_source(data, None if split == "all images" else split).fingerprint


def _failure(entry: Entry, why: str, began: float) -> Cell:
    seconds = round(time.monotonic() - began, 1)
    return Cell(entry.encoder, entry.data, entry.evaluator, "", None, None, False, seconds, "", why)


def _named(path: Path, text: dict[str, Any], key: str) -> dict[str, Any]:
    """The entries of a key, by name."""
    found = text.get(key)
    if isinstance(found, list):
        pairs = [(str(item).rstrip("/").split("/")[-1], item if key != "evaluators" else None) for item in found]
        if len(dict(pairs)) < len(pairs):
            raise UserError(f"--list {path}: two {key} have the same name; give names: {{name: path}}")
        found = dict(pairs)
    if not isinstance(found, dict) or not found:
        raise UserError(f"--list {path}: {key} is missing; give at least one")
    return {str(name): value for name, value in found.items()}


def _mapping(path: Path, label: str, given: Any) -> dict[str, Any]:
    if given is not None and not isinstance(given, dict):
        raise UserError(f"--list {path}: evaluators: {label} takes flags, like {{k: [10, 20]}}, not {given!r}")
    return given or {}


def _arguments(name: str, value: Any) -> list[str]:
    """The command-line arguments of a flag."""
    flag = str(name).replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]


def _file(name: str) -> str:
    """A name with only characters that are safe in folder names."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
