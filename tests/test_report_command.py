"""`ssl-report`: what is on the page is what is in the runs' folders."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import TINY, command, metrics
from PIL import Image
from ssl_pretrain.launch import chart
from ssl_pretrain.launch.report import main


@pytest.fixture(scope="module")
def runs(photos_in_classes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with pictures, a bad image and scores, and one that another learning rate and length make different."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "data"
    for photo in (photos_in_classes / "train").rglob("*.jpg"):
        place = data / photo.parent.name / photo.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(photo.resolve())
    (data / "class0" / "broken<i>.jpg").write_bytes(b"none")
    plain = [*TINY[: TINY.index("--monitor-every")], "--monitor-every", "0", "--workers", "0", "--no-score"]
    both = ["--method", "mae", "--data", data, *plain, "--val-images", "0", "--log-every", "1"]
    for name, own in (("one", ["--steps", "14", "--picture-every", "3"]), ("two", ["--steps", "5", "--lr", "0.004"])):
        argv = command("pretrain", *both, "--out", folder / name, *own)
        subprocess.run(argv, check=True, capture_output=True)
    labelled = folder / "labelled"
    labelled.mkdir()
    for split in ("train", "val"):
        (labelled / split).symlink_to(photos_in_classes / "train")
    argv = command("evaluate", "knn", "--encoder", folder / "one", "--data", labelled, "--out", folder / "one" / "knn")
    subprocess.run(argv, check=True)
    return folder / "one", folder / "two"


def figures(page: str) -> dict[str, ElementTree.Element]:
    """The curves on a page by their names."""
    found = re.findall(r"<figure><figcaption>(.*?)</figcaption>(<svg.*?</svg>)</figure>", page, re.DOTALL)
    return {name: ElementTree.fromstring(svg) for name, svg in found}


def drawn(line: ElementTree.Element) -> np.ndarray:
    """The points of a curve (n, 2), pixels from the left and from the top."""
    return np.array([[float(v) for v in point.split(",")] for point in line.attrib["points"].split()])


def test_one_run(runs: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    one, _ = runs
    assert main([str(one)]) == 0
    assert f"written: {one / 'report.html'}" in capsys.readouterr().out
    page = (one / "report.html").read_text()
    named = figures(page)
    assert next(iter(named)) == "loss"
    assert {"loss", "lr", "grad_norm", "images_per_s", "data_wait"} <= named.keys()
    (line,) = named["loss"].findall("polyline")
    # Pixels are a straight line of what was logged, steps from left to right and losses from below.
    logged = [(entry["step"], entry["loss"]) for entry in metrics(one) if "loss" in entry]
    steps, losses = np.array(logged).T
    x, y = drawn(line).T
    assert len(x) == 14
    for pixels, values, sign in ((x, steps, 1), (y, losses, -1)):
        slope, offset = np.polyfit(values, pixels, 1)
        np.testing.assert_allclose(slope * values + offset, pixels, atol=0.11)
        assert slope * sign > 0
    assert "<td>finished</td><td>14 of 14</td>" in page
    knn = json.loads((one / "knn" / "results.json").read_text())["metrics"]
    assert f"<td>top1</td><td>{knn['top1']:.2f}</td>" in page
    assert "untrained" in page
    assert "broken&lt;i&gt;.jpg" in page
    assert "broken<i>" not in page
    (png,) = re.findall(r'src="data:image/png;base64,(.*?)"', page)
    assert "one, step 12: input | masked | reconstruction" in page
    assert Image.open(io.BytesIO(base64.b64decode(png))).size[1] == 3 * 32
    assert not re.search(r'(?:src|href)="(?!data:)', page), "the page must need nothing else"


def test_several_runs_lie_over_one_another(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert main([*map(str, runs), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    lines = figures(page)["loss"].findall("polyline")
    assert [len(drawn(line)) for line in lines] == [14, 5]
    assert lines[0].attrib["stroke"] != lines[1].attrib["stroke"]
    differ = re.search(r"<h2>Settings that differ</h2><table>(.*?)</table>", page, re.DOTALL)
    assert differ
    assert re.findall("<th>(.*?)</th>", differ[1]) == ["run", "steps", "lr", "warmup_steps", "picture_every"]
    assert "<td>two</td><td>5</td><td>0.004</td>" in differ[1]


def test_a_run_that_is_still_going(runs: tuple[Path, Path], tmp_path: Path) -> None:
    going = tmp_path / "going"
    going.mkdir()
    for name in ("config.yaml", "manifest.json"):
        (going / name).write_text((runs[0] / name).read_text().replace("finished", "running"))
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines()[:6]
    lines[2] = json.dumps({**json.loads(lines[2]), "loss": None})
    (going / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 7, "lo']))
    assert main([str(going)]) == 0
    page = (going / "report.html").read_text()
    assert "<td>running</td><td>6 of 14</td>" in page
    assert [len(drawn(line)) for line in figures(page)["loss"].findall("polyline")] == [2, 3]
    assert "<h2>Scores" not in page


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "nowhere does not exist. Give the --out folder of an ssl-pretrain run"),
        (["."], "is not a run: it has no metrics.jsonl; there are runs in it: one, two"),
        (["one", "one/"], "the same run is given twice"),
        (["one", "--out", "no/where.html"], "--out no/where.html: there is no folder no"),
        (["one", "--ot", "x.html"], "--out"),
    ],
)
def test_mistakes(
    argv: list[str],
    said: str,
    runs: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(runs[0].parent)
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_help_is_there_at_once() -> None:
    script = "import sys; from ssl_pretrain.launch.report import main; code = main(['--help']); "
    script += "assert not {'torch', 'tensorboard'} & set(sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "ssl-report RUN [RUN ...]" in done.stdout
    assert "--out" in done.stdout


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.429, 1.556), (3, 3), (-7, 12_345), (1e-9, 3e-9), (0, 0), (-0.001, 0)]
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float) -> None:
    found = chart.ticks(low, high)
    assert 2 <= len(found) <= 8
    assert found[0] <= low
    assert found[-1] >= high
    step = found[1] - found[0]
    np.testing.assert_allclose(np.diff(found), step, rtol=1e-6)
    assert f"{step:.0e}"[0] in "125"
    assert len({chart.label(value) for value in found}) == len(found)


def test_long_curves_are_thinned_and_keep_their_gaps() -> None:
    curve = [(float(x), None if x == 50_000 else x**0.5) for x in range(100_000)]
    page = ElementTree.fromstring(chart.draw([(0, curve)]))
    lines = [drawn(line) for line in page.findall("polyline")]
    assert len(lines) == 2
    assert sum(map(len, lines)) == chart.POINTS - 1
    assert chart.draw([(0, [(1.0, None)])]) == ""
    assert len(ElementTree.fromstring(chart.draw([(0, [(5.0, 0.5)])])).findall("circle")) == 1
