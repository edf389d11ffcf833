"""Many results in one table, as Markdown, CSV, JSON and HTML: one row for each encoder, one column for each evaluator
and data set.

Each number is followed by its interval. Controls (untrained encoders, raw pixels, the most frequent class) are rows
below the encoders. With several data sets an evaluator has one more column: the unweighted mean of its numbers.
"""

import csv
import html
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

# The headline number of a result is the first of these metrics that it has
HEADLINES = ("miou", "jf", "j", "corrupted_top1", "top1", "map", "r2", "nmi", "rankme", "silhouette")
CONTROLS = {"random": "untrained", "pixels": "raw pixels", "majority": "most frequent class"}
MEAN = "mean"


@dataclass(frozen=True)
class Cell:
    """One evaluation."""

    encoder: str
    data: str
    evaluator: str
    metric: str  # name of the metric in `value`; "" if there is none
    value: float | None
    interval: tuple[float, float] | None
    control: bool  # of a baseline, not of a listed encoder
    seconds: float | None
    result: str  # the path of its results.json; "" for a baseline or a failure
    failed: str  # reason why there is no value; "" if nothing failed


def cells_of(
    encoder: str, data: str, evaluator: str, result: dict[str, Any], path: str, metric: str | None
) -> list[Cell]:
    """The cell of a result (the content of a results.json), and the cells of its baselines. metric: the one to show
    (None: the first of HEADLINES that it has). Raises KeyError for a metric that the result does not have."""
    metrics = result["metrics"]
    name = metric or next((key for key in HEADLINES if isinstance(metrics.get(key), float)), "")
    value = metrics[name] if name else None
    if value is not None and not isinstance(value, int | float):
        raise KeyError(name)
    found = [Cell(encoder, data, evaluator, name, value, _interval(metrics, name), False, result["seconds"], path, "")]
    for kind, scores in result["baselines"].items():
        if name in scores:
            row = CONTROLS.get(kind, kind) + (f" ({encoder})" if kind == "random" else "")
            found.append(Cell(row, data, evaluator, name, scores[name], _interval(scores, name), True, None, "", ""))
    return found


def merge(cells: Sequence[Cell]) -> list[Cell]:
    """The cells without duplicate controls: untrained encoders whose numbers are all equal become one row."""
    rows: dict[str, dict[tuple[str, str], float | None]] = {}
    for cell in cells:
        rows.setdefault(cell.encoder, {})[cell.data, cell.evaluator] = cell.value
    controls = {cell.encoder for cell in cells if cell.control}
    same = {name: next(other for other in rows if other in controls and rows[other] == rows[name]) for name in controls}
    kept: dict[tuple[str, str, str], Cell] = {}
    for cell in cells:
        if not cell.control or same[cell.encoder] == cell.encoder:
            kept.setdefault((cell.encoder, cell.data, cell.evaluator), cell)
    return list(kept.values())


@dataclass(frozen=True)
class Table:
    """Rows and columns of text, controls last."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]
    failures: list[str]

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> "Table":
        """The table of those cells."""
        cells = merge(cells)
        data = list(dict.fromkeys(cell.data for cell in cells))
        columns, kinds = [], []
        for evaluator in dict.fromkeys(cell.evaluator for cell in cells):
            metrics = dict.fromkeys(c.metric for c in cells if c.evaluator == evaluator and c.metric)
            if metrics or any(c.failed for c in cells if c.evaluator == evaluator):
                where = [*data, MEAN] if len(data) > 1 else data
                columns += [f"{evaluator} {'/'.join(metrics)}, {place}".replace(" ,", ",") for place in where]
                kinds += [(evaluator, place) for place in where]
        names = sorted(
            dict.fromkeys(cell.encoder for cell in cells), key=lambda n: any(c.control for c in cells if c.encoder == n)
        )
        rows = [(name, [_text(cells, name, *kind) for kind in kinds]) for name in names]
        failures = [f"{c.encoder}, {c.data}, {c.evaluator}: {c.failed}" for c in cells if c.failed]
        return cls(columns, rows, failures)

    def markdown(self) -> str:
        """A table of GitHub's Markdown."""
        lines = ["| encoder | " + " | ".join(map(_pipe, self.columns)) + " |", "| --- " * (len(self.columns) + 1) + "|"]
        lines += [f"| {_pipe(name)} | " + " | ".join(map(_pipe, row)) + " |" for name, row in self.rows]
        return (
            "\n".join([*lines, *([""] if self.failures else []), *(f"- {_pipe(text)}" for text in self.failures)])
            + "\n"
        )

    def page(self, title: str) -> str:
        """A self-contained HTML page."""
        escape = html.escape
        head = "".join(f"<th>{escape(column)}</th>" for column in ["encoder", *self.columns])
        body = "".join(
            "<tr><td>" + escape(name) + "</td>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>\n"
            for name, row in self.rows
        )
        failed = "".join(f"<li>{escape(text)}</li>" for text in self.failures)
        style = "table{border-collapse:collapse}th,td{border:1px solid #999;padding:.3em .6em;text-align:right}"
        return (
            f'<!doctype html>\n<meta charset="utf-8"><title>{escape(title)}</title>\n'
            f"<style>body{{font-family:sans-serif}}{style}td:first-child,th:first-child{{text-align:left}}</style>\n"
            f"<h1>{escape(title)}</h1>\n"
            f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>\n"
            + (f"<h2>Failed</h2><ul>{failed}</ul>\n" if failed else "")
        )


def as_csv(cells: Sequence[Cell]) -> str:
    """CSV with one line for each cell, for other programs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = "encoder", "data", "evaluator", "metric", "value", "low", "high", "control", "seconds", "result", "failed"
    writer.writerow(heads)
    for c in merge(cells):
        low, high = c.interval or ("", "")
        where = c.encoder, c.data, c.evaluator, c.metric
        writer.writerow([*where, c.value, low, high, int(c.control), c.seconds, c.result, c.failed])
    return out.getvalue()


def as_json(cells: Sequence[Cell]) -> str:
    """The cells, and the means over data sets."""
    merged = merge(cells)
    means = [
        {"encoder": name, "evaluator": kind, "mean": mean}
        for name in dict.fromkeys(c.encoder for c in merged)
        for kind in dict.fromkeys(c.evaluator for c in merged)
        if (mean := _mean(merged, name, kind)) is not None
    ]
    return json.dumps({"cells": [asdict(cell) for cell in merged], "means": means}, indent=1, allow_nan=False) + "\n"


def _interval(scores: dict[str, Any], name: str) -> tuple[float, float] | None:
    found = scores.get(f"{name}_interval")
    return (found[0], found[1]) if found else None


def _mean(cells: Sequence[Cell], encoder: str, evaluator: str) -> float | None:
    """The mean over all data sets; None if a number is missing."""
    data = {c.data for c in cells}
    values = [c.value for c in cells if (c.encoder, c.evaluator) == (encoder, evaluator)]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(data) else None


def _text(cells: Sequence[Cell], encoder: str, evaluator: str, place: str) -> str:
    if place == MEAN:
        mean = _mean(cells, encoder, evaluator)
        return "" if mean is None else f"{mean:.2f}"
    cell = next((c for c in cells if (c.encoder, c.evaluator, c.data) == (encoder, evaluator, place)), None)
    if cell is None or (cell.value is None and not cell.failed):
        return ""
    if cell.value is None:
        return "failed"
    return f"{cell.value:.2f}" + (" ({:.2f} to {:.2f})".format(*cell.interval) if cell.interval else "")


def _pipe(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
