"""The page of `ssl-report`: one HTML file that needs nothing else and may load nothing else.

Everything that comes from a run folder is text: escaped in HTML, and escaped once more in the JSON that the charts read.
Styles and scripts are those of report_assets/ and uPlot, allowed by their hash in the Content-Security-Policy.
"""

import base64
import hashlib
import html
import json
import math
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import ssl_pretrain
from ssl_pretrain import flags
from ssl_pretrain.config import Run as RunSettings

from . import report_pictures
from .report_curves import GROUPS, Chart, Curve, charts, never_finite, number
from .report_pictures import Picture, Series
from .run_folder import LISTED, MOST, Result, Run, entry
from .table import Cell, merge

ASSETS = Path(__file__).parent / "report_assets"
MOST_BYTES = 1_400_000  # of the page without its pictures
POINTS = (1000, 500, 250, 120, 60, 30, 15)  # of a curve: as many as fit
CLASSES = 100  # of which the accuracy is listed
LONGEST = 400  # characters of a value in a table
TOP = 12  # runs that are at the top of the page
COMPARED = (
    "state",
    "method",
    "encoder",
    "data",
    "images",
    "step",
    "images seen",
    "hardware",
)  # marked where they differ
KEYS = 28  # runs that look different: 7 colours times 4 kinds of dashes
# Headline numbers of evaluators (`table.HEADLINES`): title and largest value; others go up to the largest of the tile
METRICS = {
    "top1": ("top-1 accuracy, %", 100.0),
    "corrupted_top1": ("top-1 accuracy on corrupted images, %", 100.0),
    "map": ("mAP, %", 100.0),
    "miou": ("mIoU, %", 100.0),
    "jf": ("J&F, %", 100.0),
    "j": ("J, %", 100.0),
    "r2": ("R\u00b2", 1.0),
    "nmi": ("NMI", 1.0),
    "silhouette": ("silhouette", 1.0),
    "rankme": ("RankMe", None),
}
# What to see on the pictures that every run has (loop/pictures.py)
EXPLAINED = {
    "views": "Training images as the model sees them: one column per image, one row per view.",
    "patch features (PCA)": "Patches with similar features have similar colours.",
    "similarity to the class token": "Bright patches are the most similar to the vector of the whole image.",
    "attention of the last block": "Bright patches are those to which the class token (else: all tokens) attends most.",
    "nearest neighbours": "Left: an image. Right of it: the training images with the most similar features.",
}
# Settings of every run that say most about it; those of the method and the encoder come after them
MATTER = (
    *("method", "encoder", "data", "image_size", "batch_size", "steps", "epochs", "optimizer", "lr", "schedule"),
    *("warmup_steps", "weight_decay", "precision", "aug", "init_from", "seed"),
)
OF_THE_RUN = {flags.stored_name(field) for field in fields(RunSettings)}
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
"""


def page(runs: Sequence[Run]) -> tuple[str, list[str]]:
    """The HTML page of the runs, and what could not be shown, in words."""
    pictures = [report_pictures.read(run.folder, report_pictures.PAGE_BYTES // len(runs)) for run in runs]
    notes = {run.name: said for run, (_, said) in zip(runs, pictures, strict=True)}
    shown = [series for series, _ in pictures]
    body = ""
    for points in POINTS:
        found = charts(runs, points)
        body = _body(runs, found, shown, notes, 0)
        if _size(body, shown) <= MOST_BYTES:
            break
    left_out = 0
    while _size(body, shown) > MOST_BYTES and left_out < len(found):
        left_out = min(len(found), left_out + max(1, len(found) // 10))
        body = _body(runs, found[: len(found) - left_out], shown, notes, left_out)
    return body, [each for said in notes.values() for each in said]


def _size(page: str, shown: Sequence[list[Series]]) -> int:
    """Bytes of a page without its pictures."""
    pictures = (len(picture.png) for each in shown for series in each for picture in series.shown)
    return len(page.encode("utf-8", "backslashreplace")) - sum(4 * math.ceil(count / 3) for count in pictures)


def plain(value: Any, longest: int = LONGEST) -> str:
    """A value as text for HTML: escaped, what is invisible or turns the direction of writing as in Python, not too long."""
    text = str(value)
    if len(text) > longest:
        text = text[:longest] + f"... ({len(text):,} characters)"
    shown = "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)
    return html.escape(shown)


def safe_json(value: Any) -> str:
    """JSON that may stand in a <script> element: ASCII, and nothing that begins a tag, a comment or an entity."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _body(
    runs: Sequence[Run], found: Sequence[Chart], shown: Sequence[list[Series]], notes: dict[str, list[str]], left: int
) -> str:
    """The whole page. left: charts that are left out."""
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    style, script = _read("uPlot.min.css") + _read("report.css"), _read("uPlot.iife.min.js") + _read("report.js")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    drawn = [chart for chart in found if not chart.constant]
    sections = [
        ("scores", "Scores", _scores(runs)),
        ("pictures", "Pictures", _pictures(runs, shown, notes)),
        ("curves", "Curves", _curves(runs, drawn, left)),
        ("numbers", "Constants and single values", _numbers(runs, [chart for chart in found if chart.constant])),
        ("runs", "Runs", _overview(runs)),
        ("differences", "Settings that differ", _differences(runs)),
        ("about", "How it was made" if len(runs) == 1 else "How they were made", _abouts(runs)),
        ("warnings", "Warnings and unreadable images", _warnings(runs)),
    ]
    there = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in there)
    parts = [
        HEAD.format(policy=policy, title=plain(title), style=style),
        '<a class="skip" href="#main">Skip to the content</a>\n',
        f'<header><h1>{plain(title)}</h1><button type="button" id="theme" hidden>Dark mode</button>',
        f'<nav aria-label="Sections">{links}</nav></header>\n<main id="main">\n',
        _top(runs),
        *(
            f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{heading}</h2>\n{content}</section>\n'
            for name, heading, content in there
        ),
        "</main>\n",
        f"<footer>Written by ssl-report {plain(ssl_pretrain.__version__)} on {time.strftime('%Y-%m-%d %H:%M')}. "
        "This file needs no connection and loads nothing. Charts: uPlot (MIT License).</footer>\n",
        '<dialog id="large" aria-label="Enlarged picture"><button type="button" id="close">Close</button>'
        '<div><img alt="" src="data:,"></div></dialog>\n',
        f'<script type="application/json" id="data">{safe_json(_chart_data(runs, drawn))}</script>\n',
        f"<script>{script}</script>\n</body>\n</html>\n",
    ]
    return "".join(parts)


def _read(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(text: str) -> str:
    """How a Content-Security-Policy names a script or a style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """An HTML table that scrolls where it is wide. The cells are HTML already; the first of a row is its heading."""
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="Table"><table class="{kind}"><thead><tr>{head}</tr>'
        f"</thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _key(index: int) -> str:
    """The line of a run in the charts, as a mark before its name."""
    return f'<span class="key k{index % KEYS % 7} d{index % KEYS // 7}" aria-hidden="true"></span>'


# ---- What is at the top, and the overview.


def _top(runs: Sequence[Run]) -> str:
    """What each run is and how it stands, in a line; and why it ended, where something was wrong."""
    lines = []
    for i, run in enumerate(runs):
        state = str(run.manifest.get("state", "unknown"))
        facts = [run.setting("method"), run.setting("encoder"), _images(run), _progress(run)]
        facts += [duration(run.seconds) if run.seconds is not None else ""]
        said = " &middot; ".join(plain(fact, 80) for fact in facts if fact)
        name = f"{_key(i)}<b>{plain(run.name)}</b> " if len(runs) > 1 else ""
        reason = f'<div class="reason">{plain(state)}</div>' if ":" in state else ""
        lines.append(f"<li>{name}{_state(state)} {said}{reason}</li>")
    more = ""
    if len(lines) > TOP:
        more = f"<details><summary>{len(lines) - TOP} more runs</summary><ul>{''.join(lines[TOP:])}</ul></details>"
    return f'<div class="top"><ul>{"".join(lines[:TOP])}</ul>{more}</div>\n'


def _state(state: str) -> str:
    """The first word of a run's state, as a mark."""
    word = state.split(":", maxsplit=1)[0]
    kind = {"finished": "good", "running": "going", "failed": "bad"}.get(word, "other")
    return f'<span class="state {kind}">{plain(word, 40)}</span>'


def _images(run: Run) -> str:
    images = entry(run.manifest, "data", "images")
    return f"{images:,} images of {run.setting('data')}" if isinstance(images, int) else ""


def _progress(run: Run) -> str:
    """How far the run is, and how long it will be."""
    if not run.columns:
        return "no step is logged yet"
    steps = run.manifest.get("steps") or run.setting("steps")
    return f"{run.step:,} of {steps:,} steps" if isinstance(steps, int) else f"{run.step:,} steps"


def _overview(runs: Sequence[Run]) -> str:
    """Main figures of several runs as a table, what differs marked; those of one run are in `_about`."""
    if len(runs) == 1:
        return ""
    heads = ["state", "method", "encoder", "data", "images", "step", "images seen", "training time", "last loss"]
    heads += ["images/s", "hardware", "skipped steps", "bad images"]
    cells = [_facts(run) for run in runs]
    columns = [
        _differing(column) if head in COMPARED else column
        for head, column in zip(heads, zip(*cells, strict=True), strict=True)
    ]
    rows = [
        [_key(i) + plain(run.name), *row]
        for i, (run, row) in enumerate(zip(runs, zip(*columns, strict=True), strict=True))
    ]
    return _table(["run", *heads], rows, kind="runs")


def _differing(cells: Sequence[str]) -> list[str]:
    """The cells (HTML) of what several runs have; those that are not what most have are marked."""
    counts = Counter(cells)
    if len(counts) == 1 or len(counts) == len(cells) > 2:  # all are alike, or none
        return list(cells)
    usual = cells[0] if len(cells) == 2 else counts.most_common(1)[0][0]
    return [cell if cell == usual else f"<mark>{cell or '&mdash;'}</mark>" for cell in cells]


def _facts(run: Run) -> list[str]:
    """State, method, encoder, data, ...: the cells of a run's overview, HTML."""
    loss, skipped, speeds = run.last("loss"), run.last("skipped"), _speeds(run)
    images = entry(run.manifest, "data", "images")
    cells = [
        run.setting("method") or "",
        run.setting("encoder") or "",
        run.setting("data") or "",
        f"{images:,}" if isinstance(images, int) else "",
        _progress(run),
        _seen(run),
        duration(run.seconds) if run.seconds is not None else "",
        "" if loss is None else number(loss),
        f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "",
        _hardware(run),
        "" if skipped is None or not math.isfinite(skipped) else f"{skipped:,.0f}",
        f"{len(run.bad_images):,}",
    ]
    return [_state(str(run.manifest.get("state", "unknown"))), *map(plain, cells)]


def _speeds(run: Run) -> list[float]:
    """The logged speeds in images/s, sorted."""
    rate = run.columns.get("images_per_s")
    return sorted(filter(math.isfinite, rate.values)) if rate else []


def _seen(run: Run) -> str:
    """How many images the run was trained on, and how often it saw each."""
    size, epochs = run.setting("batch_size"), run.last("epoch")
    if not isinstance(size, int) or not run.columns:
        return ""
    often = f" ({number(epochs)} epochs)" if epochs is not None and math.isfinite(epochs) else ""
    return f"{run.step * size:,}{often}"


def _hardware(run: Run) -> str:
    """Device, processes and cores of the last start."""
    if not run.launches:
        return ""
    last = run.launches[-1]
    parts = [str(last["device"])] if last.get("device") else []
    count, hosts = last.get("processes"), last.get("hosts")
    if isinstance(count, int):
        machines = len(set(map(str, hosts))) if isinstance(hosts, list) else 1
        parts.append(f"{count} process" + ("es" if count > 1 else "") + (f" on {machines} machines" * (machines > 1)))
    if isinstance(last.get("cores"), int):
        parts.append(f"{last['cores']} CPU cores")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """A length of time for people: 45 s, 3 min 20 s, 5 h 12 min, 3 d 4 h."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


# ---- Scores.


def _scores(runs: Sequence[Run]) -> str:
    """What evaluators found: bars with the baselines for each evaluation, and everything as a table."""
    said = "".join(
        f'<div class="verdict">{_key(i) + f"<b>{plain(run.name)}</b>" if len(runs) > 1 else ""}'
        + "".join(f"<p>{plain(line)}</p>" for line in run.verdict[:LISTED])
        + "</div>\n"
        for i, run in enumerate(runs)
        if run.verdict
    )
    if not any(run.results for run in runs):
        if said:
            return said
        these = "this run" if len(runs) == 1 else "these runs"
        command = "<code>ssl-eval knn --encoder RUN --data DIR --out RUN/knn</code>"
        return f"<p>No evaluator has scored {these}. Results below a run folder are shown here: {command}</p>\n"
    cells = [(i, result, cell) for i, run in enumerate(runs) for result in run.results for cell in result.cells]
    controls = {id(cell) for cell in merge([cell for _, _, cell in cells]) if cell.control}  # each once
    groups: dict[tuple[str, str, str], list[tuple[int, Result, Cell]]] = {}
    for i, result, cell in cells:
        if not cell.control or id(cell) in controls:
            groups.setdefault((cell.evaluator, cell.metric, cell.data), []).append((i, result, cell))
    parts = [said, '<div class="tiles">']
    for (evaluator, metric, data), members in groups.items():
        title, most = METRICS.get(metric, (metric, None))
        full = most or max([1e-12, *(cell.value or 0.0 for _, _, cell in members)])
        often = Counter(i for i, _, cell in members if not cell.control)
        bars = []
        for i, result, cell in sorted(members, key=lambda each: each[2].control):
            key = _key(i) if len(runs) > 1 and not cell.control else ""
            where = f' <span class="soft">{plain(result.where, 60)}</span>' if often[i] > 1 and not cell.control else ""
            bars.append(_bar(cell, full, key, where))
        parts.append(
            f'<figure class="tile"><figcaption><b>{plain(evaluator)}</b> {plain(title)}, on {plain(data, 80)}'
            f"</figcaption><table>{''.join(bars)}</table></figure>"
        )
    heads = ["encoder", "evaluator", "data", "metric", "value", "95 % interval", "in"]
    listed = [
        [
            plain(cell.encoder),
            plain(cell.evaluator),
            plain(cell.data),
            plain(cell.metric),
            f"{cell.value:.2f}",
            "{:.2f} to {:.2f}".format(*cell.interval) if cell.interval else "",
            plain(result.where),
        ]
        for _, result, cell in cells
    ]
    for run in runs:  # results of plugins that have none of the headline numbers
        for result in run.results:
            if not result.cells:
                listed += [
                    [plain(run.name), plain(result.content["evaluator"]), "", plain(name), number(value), "", where]
                    for name, value in _known(entry(result.content, "metrics"))[:LISTED]
                    for where in [plain(result.where)]
                ]
    parts.append(f"</div>\n<details><summary>All scores</summary>{_table(heads, listed)}</details>\n")
    classes = [_by_class(run, result.where, result.content) for run in runs for result in run.results]
    if found := [each for each in classes if each]:
        parts.append(f"<details><summary>Accuracy of each class</summary>{''.join(found)}</details>\n")
    return "".join(parts)


def _bar(cell: Cell, full: float, key: str, where: str) -> str:
    """A row of a tile: whose number, a bar, the number."""
    assert cell.value is not None  # a result without a number is not kept
    share = min(1.0, max(0.0, cell.value / full))
    interval = f' <span class="soft">{cell.interval[0]:.1f} to {cell.interval[1]:.1f}</span>' if cell.interval else ""
    kind = "control" if cell.control else "own"
    bar = (
        '<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="8"/>'
        f'<rect width="{100 * share:.1f}" height="8"/></svg>'
    )
    return (
        f'<tr class="{kind}"><th scope="row">{key}{plain(cell.encoder, 60)}{where}</th><td class="bar">{bar}</td>'
        f'<td class="value">{cell.value:.2f}{interval}</td></tr>'
    )


def _by_class(run: Run, where: str, content: dict[str, Any]) -> str:
    """The accuracy of each class, the lowest first."""
    known = _known(entry(content, "metrics", "per_class"))
    if not known:
        return ""
    ordered = sorted(known, key=lambda each: each[1])
    rows = [[plain(name), f"{value:.1f}"] for name, value in ordered[:CLASSES]]
    more = f" (the {CLASSES} lowest of {len(ordered):,})" if len(ordered) > CLASSES else ""
    title = f"{plain(run.name)}: {plain(content['evaluator'])} in {plain(where)}{more}"
    return f"<h4>{title}</h4>{_table(['class', 'accuracy in %'], rows)}"


def _known(values: Any) -> list[tuple[str, float]]:
    """The finite numbers of what may be a mapping, and their names."""
    if not isinstance(values, dict):
        return []
    return [
        (name, value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST
    ]


# ---- Pictures.


def _pictures(runs: Sequence[Run], shown: Sequence[list[Series]], notes: dict[str, list[str]]) -> str:
    """The last picture of each kind, with the earlier ones to step through. The same kind of several runs is together."""
    tags = dict.fromkeys(series.tag for each in shown for series in each)
    parts = [
        _figure(runs[i], series, f"picture-{number}-{i}", several=len(runs) > 1)
        for number, tag in enumerate(tags)
        for i, each in enumerate(shown)
        for series in each
        if series.tag == tag
    ]
    said = [plain(f"{name}: {text}") for name, texts in notes.items() for text in texts]
    lost = "".join(f'<p class="note">{text}</p>' for text in said)
    if not parts:
        empty = (
            "<p>No pictures were logged: <code>--picture-every</code> with the logger <code>tensorboard</code>.</p>\n"
        )
        return empty + lost
    return f'<div class="pictures">{"".join(parts)}</div>\n{lost}'


def _figure(run: Run, series: Series, name: str, *, several: bool) -> str:
    rows = series.tag.split(" | ")
    heading = ", ".join(rows)[:1].upper() + ", ".join(rows)[1:]
    below = " (rows from top to bottom)" if len(rows) > 1 else ""
    meaning = f'<p class="note">{EXPLAINED[series.tag]}</p>' if series.tag in EXPLAINED else ""
    of_run = f"{plain(run.name)}, " if several else ""
    last = len(series.shown) - 1
    images = "".join(
        _image(f"{run.name}, step {picture.step:,}: {series.tag}", picture, shown=i == last)
        for i, picture in enumerate(series.shown)
    )
    steps = " ".join(str(picture.step) for picture in series.shown)
    left = f" {series.logged - last - 1:,} more were logged." if series.logged > last + 1 else ""
    control = (
        f'<label class="stepper" hidden>Over time <input type="range" min="0" max="{last}" value="{last}" step="1" '
        f'data-steps="{steps}" aria-controls="{name}"></label>'
        if last
        else ""
    )
    return (
        f'<figure class="picture" id="{name}"><figcaption><b>{plain(heading)}</b>{below} <span class="soft">'
        f"{of_run}step <output>{series.shown[-1].step:,}</output>.{left}</span></figcaption>"
        f'{meaning}<button type="button" class="enlarge" title="Enlarge">{images}</button>{control}</figure>\n'
    )


def _image(text: str, picture: Picture, *, shown: bool) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    twice = picture.width < 480  # small images are hard to see
    size = f'width="{(1 + twice) * picture.width}" height="{(1 + twice) * picture.height}"'
    kind = ' class="twice"' if twice else ""
    hidden = "" if shown else " hidden"
    return f'<img alt="{plain(text)}" {size}{kind}{hidden} src="data:image/png;base64,{data}">'


# ---- Curves.


def _curves(runs: Sequence[Run], drawn: Sequence[Chart], left_out: int) -> str:
    """The places of the charts, with what a reader without the charts needs; report.js draws them."""
    lost = never_finite(runs)
    notes = [f"{left_out} more numbers are left out: the page would be too large."] if left_out else []
    notes += [f"Never finite: {', '.join(lost[:50])}."] if lost else []
    said = "".join(f'<p class="note">{plain(note)}</p>\n' for note in notes)
    if not drawn:
        empty = not any(run.columns for run in runs)
        return ("<p>No metrics are logged yet.</p>\n" if empty else "") + said
    keys = "".join(
        f'<label><input type="checkbox" checked data-run="{i}">{_key(i)}{plain(run.name, 80)}</label>'
        for i, run in enumerate(runs)
    )
    names = f'<fieldset><legend>Runs</legend><div class="keys">{keys}</div></fieldset>' if len(runs) > 1 else ""
    seen = '<option value="images">images seen</option>' if all(_batch(run) for run in runs) else ""
    controls = (
        '<form class="controls" hidden><label>Smoothing <input type="range" id="smoothing" min="0" max="0.99" '
        'step="0.01" value="0"> <output>0</output></label><label>Across <select id="across"><option value="steps">steps'
        f"</option>{seen}</select></label>{names}</form>\n"
        '<p class="note" id="how" hidden>Drag across a chart to zoom, double-click to see all. With the keyboard: arrow '
        "keys move along the curve, Escape shows all.</p>\n"
        "<noscript><p>The charts need JavaScript. The numbers below each heading do not.</p></noscript>\n"
    )
    parts = [controls, said]
    for group in GROUPS:
        members = [(i, chart) for i, chart in enumerate(drawn) if chart.group == group]
        if members:
            figures = "".join(_chart(runs, i, chart) for i, chart in members)
            parts.append(f'<h3>{group}</h3>\n<div class="charts">{figures}</div>\n')
    return "".join(parts)


def _batch(run: Run) -> int | None:
    size = run.setting("batch_size")
    return size if isinstance(size, int) and size > 0 else None


def _chart(runs: Sequence[Run], index: int, chart: Chart) -> str:
    unit = f' <span class="soft">{plain(chart.unit)}</span>' if chart.unit else ""
    notes = []
    if (each := max(curve.each for curve in chart.curves)) > 1:
        notes.append(
            f"A point is the mean of up to {each:,} logged values; the band is from the lowest to the highest."
        )
    if lost := sum(curve.not_finite for curve in chart.curves):
        notes.append(f"Not finite: {lost:,} of {sum(curve.logged for curve in chart.curves):,} values.")
    heads = ["run", "first", "last", "lowest", "highest", "values"]
    rows = [[plain(runs[curve.run].name), *_ends(curve), f"{curve.logged:,}"] for curve in chart.curves]
    said = "; ".join(
        f"{runs[curve.run].name} from {number(curve.first[1])} at step {curve.first[0]:,} to {number(curve.last[1])} at "
        f"step {curve.last[0]:,}"
        for curve in chart.curves[:8]
    )
    log = '<label><input type="checkbox" class="log"> log scale</label>'
    return (
        f'<figure class="chart" data-chart="{index}"><figcaption><b>{plain(chart.title)}</b>{unit} '
        f"<code>{plain(chart.name)}</code>{log}</figcaption>"
        f'<div class="plot" tabindex="0" role="img" aria-label="{plain(chart.title)}: {plain(said, 2000)}"></div>'
        f'<p class="read" aria-live="polite"></p>'
        + "".join(f'<p class="note">{note}</p>' for note in notes)
        + f"<details><summary>Numbers</summary>{_table(heads, rows)}</details></figure>\n"
    )


def _ends(curve: Curve) -> list[str]:
    return [
        f'{number(value)} <span class="soft">step {step:,}</span>'
        for step, value in (curve.first, curve.last, curve.lowest, curve.highest)
    ]


def _chart_data(runs: Sequence[Run], drawn: Sequence[Chart]) -> dict[str, Any]:
    """What report.js draws. Steps are shared by the curves that have the same."""
    steps: dict[tuple[int, ...], int] = {}

    def short(values: Sequence[float], digits: int) -> list[float | int | None]:
        """Numbers with as many digits as one can see; null for a gap."""
        rounded = [None if math.isnan(value) else float(f"{value:.{digits}g}") for value in values]
        return [int(v) if v is not None and v == int(v) and abs(v) < 1e6 else v for v in rounded]

    listed = []
    for chart in drawn:
        curves = []
        for curve in chart.curves:
            place = steps.setdefault(tuple(curve.steps), len(steps))
            one: dict[str, Any] = {"run": curve.run, "x": place, "y": short(curve.mean, 6)}
            if curve.each > 1:
                one |= {"low": short(curve.low, 4), "high": short(curve.high, 4)}
            curves.append(one)
        listed.append({"unit": chart.unit, "curves": curves})
    named = [{"name": run.name, "batch": _batch(run) or 1} for run in runs]
    return {"runs": named, "steps": [list(each) for each in steps], "charts": listed}


def _numbers(runs: Sequence[Run], single: Sequence[Chart]) -> str:
    """Numbers that are no curves: logged once, or always the same."""
    rows = []
    for chart in single:
        values = {curve.run: curve.first for curve in chart.curves}
        cells = _differing([number(values[i][1]) if i in values else "" for i in range(len(runs))])
        if all(curve.logged == 1 for curve in chart.curves):
            cells = [
                f'{cell} <span class="soft">step {values[i][0]:,}</span>' if i in values else ""
                for i, cell in enumerate(cells)
            ]
        unit = f' <span class="soft">{plain(chart.unit)}</span>' if chart.unit else ""
        rows.append([f"{plain(chart.title)}{unit} <code>{plain(chart.name)}</code>", *cells])
    heads = ["", *(plain(run.name, 80) for run in runs)] if len(runs) > 1 else ["", "value"]
    return _table(heads, rows) if rows else ""


# ---- Settings.


def _differences(runs: Sequence[Run]) -> str:
    """The settings that differ between the runs, and what differs in data, versions and hardware."""
    if len(runs) == 1:
        return ""
    every: list[dict[str, str]] = []
    for run in runs:
        last = run.launches[-1] if run.launches else {}
        around = {
            "data fingerprint": entry(run.manifest, "data", "fingerprint"),
            "hardware": _hardware(run),
            "commit": str(last.get("commit") or "")[:12],
            **{f"version of {name}": value for name, value in _versions(last).items()},
        }
        settings = {key: _value(run, key) for key in run.config if key != "out"}
        every.append({**settings, **{name: str(value) for name, value in around.items() if value}})
    keys = dict.fromkeys(key for each in every for key in each)
    unlike = [key for key in keys if len({each.get(key) for each in every}) > 1]
    if not unlike:
        return "<p>None: the runs have the same settings.</p>\n"
    columns = [_differing([plain(each.get(key, "")) for each in every]) for key in unlike]
    rows = [
        [_key(i) + plain(run.name), *cells]
        for i, (run, cells) in enumerate(zip(runs, zip(*columns, strict=True), strict=True))
    ]
    return _table(["run", *map(plain, unlike)], rows, kind="runs")


def _value(run: Run, key: str) -> str:
    """A setting as one would write it after a flag."""
    value = run.setting(key)
    if isinstance(value, list) and all(isinstance(each, int | float | str) for each in value):
        return " ".join(map(str, value))
    return value if isinstance(value, str) else run.config.get(key, "")


def _abouts(runs: Sequence[Run]) -> str:
    return "".join(_about(run, several=len(runs) > 1) for run in runs)


def _about(run: Run, *, several: bool) -> str:
    """Command, settings, data, hardware and versions of a run."""
    parts = [f"<h3>{plain(run.name)}</h3>\n"] if several else []
    commands = dict.fromkeys(
        shlex.join(map(str, words)) for each in run.launches if isinstance(words := each.get("command"), list)
    )
    for command in list(commands)[:5]:
        parts.append(f'<pre class="command" tabindex="0" aria-label="Command">{plain(command, 20_000)}</pre>\n')
    if several:
        parts.append("<details><summary>Settings, data, time and hardware</summary>")
    given = [key for key in run.config if run.config[key] != "null"]
    own = [key for key in given if key not in OF_THE_RUN]
    parts.append("<h4>Settings of the run</h4>" + _list({key: _value(run, key) for key in MATTER if key in given}))
    parts.append("<h4>Settings of the method and the encoder</h4>" + _list({key: _value(run, key) for key in own[:80]}))
    last, skipped, speeds = run.launches[-1] if run.launches else {}, run.last("skipped"), _speeds(run)
    facts = {
        "Data": run.setting("data"),
        "Images": f"{images:,}" if isinstance(images := entry(run.manifest, "data", "images"), int) else None,
        "Data fingerprint": entry(run.manifest, "data", "fingerprint"),
        "Hardware": _hardware(run),
        "Started": _moment(run.launches[0].get("time")) if run.launches else None,
        "Ended": _moment(run.manifest.get("ended")),
        "Starts": f"{len(run.launches)}, the last at step {last.get('step')}" if len(run.launches) > 1 else None,
        "Training time": duration(run.seconds) if run.seconds is not None else None,
        "Images seen": _seen(run),
        "Speed": f"{speeds[len(speeds) // 2]:,.0f} images/s (median)" if speeds else None,
        "Skipped steps": f"{skipped:,.0f}" if skipped is not None and math.isfinite(skipped) else None,
        "Unreadable images": f"{len(run.bad_images):,}",
        "Commit": str(last.get("commit") or "")[:12],
        "Versions": ", ".join(
            f"{name} {version}"
            for name, version in [*_versions(last).items(), ("python", last.get("python"))]
            if version
        ),
    }
    parts.append("<h4>Data, time and hardware</h4>" + _list({name: value for name, value in facts.items() if value}))
    rows = [[plain(key), plain(_value(run, key))] for key in run.config]
    parts.append(f"<details><summary>All settings</summary>{_table(['setting', 'value'], rows)}</details>\n")
    if several:
        parts.append("</details>\n")
    return "".join(parts)


def _moment(text: Any) -> str:
    """A time of the manifest, for people."""
    return str(text or "").replace("T", " ")


def _list(values: dict[str, Any]) -> str:
    """Names and values, side by side."""
    items = "".join(f"<div><dt>{plain(name)}</dt><dd>{plain(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="settings">{items}</dl>\n'


def _versions(launch: dict[str, Any]) -> dict[str, Any]:
    found = launch.get("versions")
    return found if isinstance(found, dict) else {}


def _warnings(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        kept = run.warnings[-LISTED:]
        said = (
            [f"{len(run.warnings) - len(kept):,} earlier warnings are left out"] if len(run.warnings) > LISTED else []
        )
        bad = [f"{each.get('name')}: {each.get('reason')}" for each in run.bad_images[:LISTED]]
        more = [f"{len(run.bad_images):,} images in all"] if len(run.bad_images) > LISTED else []
        if notes := [*said, *kept, *bad, *more]:
            items = "".join(f"<li>{plain(note)}</li>" for note in notes)
            parts.append((f"<h3>{plain(run.name)}</h3>" if len(runs) > 1 else "") + f"<ul>{items}</ul>\n")
    return "".join(parts)
