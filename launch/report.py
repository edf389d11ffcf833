"""The command `ssl-report`: writes a self-contained page of curves, scores and pictures of one or several runs."""

import base64
import html
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_pretrain import flags
from ssl_pretrain.config import read_recorded
from ssl_pretrain.errors import UserError
from ssl_pretrain.files import read_lines, write_text

from . import chart
from .run_command import run_command
from .table import cells_of

PROG = "ssl-report"
USAGE = f"""usage: {PROG} RUN [RUN ...] [flags]

Write a page with curves, scores, warnings and pictures of one run, or of several runs in the same plots: loss and all
other numbers of metrics.jsonl, results of evaluators, settings in which the runs differ, and the last pictures of each
run. RUN is the --out folder of ssl-pretrain. The page of a run that has not finished shows its current state.

{PROG} --help shows all flags. Exit codes: 0 done, 2 wrong flags, 1 any other error."""
NOT_DRAWN = ("step", "time", "epoch", "skipped", "bad_images")
MOST, MOST_STEPS = 1e300, 10**12  # of a number that is drawn
LISTED = 20  # warnings and bad images that are shown of a run
STYLE = """body{font:14px sans-serif;margin:2em;max-width:1100px}table{border-collapse:collapse;margin:.5em 0}
th,td{border:1px solid #999;padding:.25em .6em;text-align:left}svg{background:#fff}svg text{font:11px sans-serif}
.grid{stroke:#ddd}polyline{fill:none;stroke-width:1.5}figure{display:inline-block;margin:0 1em 1em 0}
figcaption{font-weight:bold}img{max-width:100%;image-rendering:pixelated}i{display:inline-block;width:2em;height:0;
border-top:3px solid;vertical-align:middle}"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The page."""

    out: Path | None = None
    """File to write (default: report.html in the first run's folder)."""


@dataclass(frozen=True)
class Run:
    """Content of a run's folder."""

    name: str
    folder: Path
    manifest: dict[str, Any]
    config: dict[str, str]
    lines: list[dict[str, Any]]
    warnings: list[str]
    bad_images: list[dict[str, Any]]
    results: list[tuple[str, dict[str, Any]]]  # path within the folder, and the content of its results.json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; it prints all messages and returns its exit code."""
    return run_command(PROG, _main, argv)


def _main(argv: list[str]) -> int:
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    folders, words = argv[:count], argv[count:]
    if not folders and not {"-h", "--help"} & set(words):
        print(USAGE, file=sys.stderr)
        return 2
    (options,) = flags.parse([Options], words, {}, prog=f"{PROG} RUN [RUN ...]", description=USAGE.split("\n\n")[1])
    runs = [read(Path(folder), name) for folder, name in zip(folders, _names(folders), strict=True)]
    out: Path = options.out or runs[0].folder / "report.html"
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    write_text(out, page(runs))
    print(f"written: {out}")
    return 0


def _names(folders: Sequence[str]) -> list[str]:
    """Names of runs: their folders' names if these are unique, else their paths below the common folder."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError("the same run is given twice")
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


# ---- Reading.


def read(folder: Path, name: str) -> Run:
    """Read a run's folder. Raises UserError if it is not a run."""
    if not (folder / "metrics.jsonl").is_file():
        found = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
        inside = f"; there are runs in it: {', '.join(found[:5])}" if found else ""
        what = "is not a run: it has no metrics.jsonl" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}{inside}. Give the --out folder of an ssl-pretrain run")
    try:
        config = read_recorded(folder / "config.yaml")
    except UserError as problem:
        raise UserError(f"{folder} is no whole run: {problem}") from None
    skipped: list[str] = []
    lines = [_numbers(line, skipped) for line in read_lines(folder / "metrics.jsonl", skipped)]
    bad_images = read_lines(folder / "bad_images.jsonl", skipped)
    manifest = _manifest(folder, skipped)
    results = []
    for path in sorted(folder.rglob("results.json")):
        where = str(path.parent.relative_to(folder))
        try:
            result = json.loads(path.read_bytes())
            _score_rows(name, where, result)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
            skipped.append(f"{path.relative_to(folder)}: no result of an evaluator; left out")
            continue
        results.append((where, result))
    warnings = folder / "warnings.log"
    said = warnings.read_text(encoding="utf-8", errors="backslashreplace").splitlines() if warnings.exists() else []
    for text in skipped[:LISTED]:
        print(f"{PROG}: {folder}: {text}", file=sys.stderr)
    if len(skipped) > LISTED:
        print(f"{PROG}: {folder}: ... ({len(skipped)} in all)", file=sys.stderr)
    return Run(
        name,
        folder,
        manifest,
        {key: json.dumps(value, default=str) for key, value in config.items()},
        [line for line in lines if line],
        [*said, *skipped],
        bad_images,
        results,
    )


def _numbers(line: dict[str, Any], skipped: list[str]) -> dict[str, float | None]:
    """The numbers of a line of metrics.jsonl, None for one that was not finite; empty for a line of another program."""
    step = line.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < MOST_STEPS:
        skipped.append(f"metrics.jsonl: a line without a step ({json.dumps(line)[:60]}); left out")
        return {}
    kept: dict[str, float | None] = {}
    for name, value in line.items():
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            kept[name] = value if value is not None and abs(value) < MOST else None
        else:
            skipped.append(f"metrics.jsonl, step {step}: {name} is no number; left out")
    return kept


def _manifest(folder: Path, skipped: list[str]) -> dict[str, Any]:
    try:
        found = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        skipped.append("manifest.json is missing or damaged: the page lacks its content")
    return found if isinstance(found, dict) else {}


def pictures(folder: Path) -> list[tuple[str, int, bytes]]:
    """The last pictures that a run logged: their content from top to bottom, the step, PNG bytes."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns about purged steps, which a resumed run has
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    if not (folder / "tensorboard").is_dir():
        return []
    try:
        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={IMAGES: 1})
        events.Reload()
        last: dict[str, Any] = {tag: events.Images(tag)[-1] for tag in events.Tags()[IMAGES]}
        return [(tag, picture.step, picture.encoded_image_string) for tag, picture in last.items()]
    except Exception as problem:  # a damaged file; what its reader raises is not documented
        print(f"{PROG}: {folder / 'tensorboard'}: pictures cannot be read ({type(problem).__name__})", file=sys.stderr)
        return []


# ---- Writing.


def page(runs: Sequence[Run]) -> str:
    """The HTML page of the runs."""
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    parts = [f"<h1>{html.escape(title)}</h1>", _summary(runs), _differences(runs), "<h2>Curves</h2>"]
    for name in _drawn(runs):
        svg = chart.draw([(i, curve(run, name)) for i, run in enumerate(runs)])
        if svg:
            parts.append(f"<figure><figcaption>{html.escape(name)}</figcaption>{svg}</figure>")
    parts.append(_scores(runs))
    for run in runs:
        notes = [
            *run.warnings[-LISTED:],
            *(f"{bad.get('name')}: {bad.get('reason')}" for bad in run.bad_images[:LISTED]),
        ]
        if notes:
            items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
            parts.append(f"<h2>Warnings and unreadable images: {html.escape(run.name)}</h2><ul>{items}</ul>")
        for tag, step, png in pictures(run.folder):
            text = f"{run.name}, step {step:,}: {tag}"
            data = base64.b64encode(png).decode()
            parts.append(
                f'<h2>{html.escape(text)}</h2><img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'
            )
    head = f'<!doctype html>\n<meta charset="utf-8"><title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n'
    return head + "\n".join(part for part in parts if part) + "\n"


def curve(run: Run, name: str) -> list[tuple[float, float | None]]:
    """The (step, value) points of one logged number of a run; None where it was not finite."""
    points = [(line["step"], line[name]) for line in run.lines if name in line and "step" in line]
    return [(step, y if isinstance(y, int | float) and math.isfinite(y) else None) for step, y in points]


def _drawn(runs: Sequence[Run]) -> list[str]:
    """The names of all numbers that were logged, the loss first."""
    names = dict.fromkeys(name for run in runs for line in run.lines for name in line if name not in NOT_DRAWN)
    return sorted(names, key=lambda name: name != "loss")


def _summary(runs: Sequence[Run]) -> str:
    heads = ["run", "method", "encoder", "images", "state", "step", "loss", "images/s", "skipped steps", "bad images"]
    rows = []
    for i, run in enumerate(runs):
        last: dict[str, Any] = next((line for line in reversed(run.lines) if "loss" in line), {})
        speeds = sorted(speed for line in run.lines if (speed := line.get("images_per_s")) is not None)
        step = last.get("step", 0)
        ink, dashes = chart.colour(i)
        key = f'<i style="border-color:{ink};border-top-style:{"dashed" if dashes else "solid"}"></i> '
        cells = [
            json.loads(run.config.get("method", '""')),
            json.loads(run.config.get("encoder", '""')),
            f"{images:,}" if isinstance(images := _of(run.manifest.get("data"), "images"), int) else "",
            run.manifest.get("state", ""),
            f"{step:,} of {steps:,}" if isinstance(steps := run.manifest.get("steps"), int) else f"{step:,}",
            "" if "loss" not in last else "not finite" if last["loss"] is None else f"{last['loss']:.4f}",
            f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "",
            str(last.get("skipped", "")),
            str(len(run.bad_images)),
        ]
        rows.append([key + html.escape(run.name), *(html.escape(str(cell)) for cell in cells)])
    return _table(heads, rows)


def _of(part: Any, name: str) -> Any:
    """An entry of what may be a mapping."""
    return part.get(name) if isinstance(part, dict) else None


def _differences(runs: Sequence[Run]) -> str:
    """The settings that differ between the runs."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "out")
    unlike = [key for key in keys if len({run.config.get(key) for run in runs}) > 1]
    if not unlike:
        return ""
    rows = [[html.escape(run.name), *(html.escape(run.config.get(key, "")) for key in unlike)] for run in runs]
    return "<h2>Settings that differ</h2>" + _table(["run", *unlike], rows)


def _scores(runs: Sequence[Run]) -> str:
    """What evaluators found, with their intervals and baselines."""
    rows = [row for run in runs for path, result in run.results for row in _score_rows(run.name, path, result)]
    heads = ["encoder", "evaluator", "data", "metric", "value", "95 % interval", "in"]
    return "<h2>Scores</h2>" + _table(heads, rows) if rows else ""


def _score_rows(name: str, path: str, result: dict[str, Any]) -> list[list[str]]:
    """The cells of a result and of its baselines. Raises where it is no result: LookupError, TypeError, ValueError,
    AttributeError."""
    rows = []
    data = str(result["protocol"].get("data", ""))
    for cell in cells_of(name, data, str(result["evaluator"]), result, path, None):
        if cell.value is not None:
            between = "{:.2f} to {:.2f}".format(*cell.interval) if cell.interval else ""
            what = [cell.encoder, cell.evaluator, cell.data, cell.metric, f"{cell.value:.2f}", between, path]
            rows.append([html.escape(text) for text in what])
    return rows


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; the cells are HTML already."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


if __name__ == "__main__":
    sys.exit(main())
