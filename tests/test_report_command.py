"""`ssl-report`: what is on the page is what is in the runs' folders."""

import base64
import html
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, command, metrics
from PIL import Image
from report_pages import Elements, charts, table
from ssl_pretrain.launch.report import main
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator


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


def test_one_run(runs: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    one, _ = runs
    assert main([str(one)]) == 0
    assert f"written: {one / 'report.html'}" in capsys.readouterr().out
    page = (one / "report.html").read_text()
    found = Elements(page)
    drawn = charts(page)
    assert next(iter(drawn)) == "loss"
    assert {"loss", "lr", "grad_norm", "images_per_s", "data_wait"} <= drawn.keys()
    # The curves are what was logged.
    for name, curves in drawn.items():
        (curve,) = curves
        logged = [(entry["step"], entry[name]) for entry in metrics(one) if name in entry]
        assert curve.steps == [step for step, _ in logged]
        np.testing.assert_allclose(curve.mean, [value for _, value in logged], rtol=1e-5)
    assert len(drawn["loss"][0].steps) == 14
    assert "finished" in found.text
    assert "14 of 14 steps" in found.text
    assert f"224 ({224 / 97:.4g} epochs)" in found.text  # 14 steps of 16 images; there are 96 and one that is broken
    # A number that never changes is no curve.
    assert "checkpoint_wait" not in drawn or len({*drawn["checkpoint_wait"][0].mean}) > 1
    constants = {row[0].split()[-1]: row[1] for row in table(page, "numbers")[1:]}
    assert constants["weight_decay"] == "0.05"
    knn = json.loads((one / "knn" / "results.json").read_text())["metrics"]
    assert re.search(rf'class="own">.*?<td class="value">{knn["top1"]:.2f} ', page)
    assert f"<td>top1</td><td>{knn['top1']:.2f}</td>" in page
    assert "untrained" in found.text
    assert "broken<i>.jpg" in found.text
    assert "i" not in found.tags
    # Every picture that was logged, the last one of each kind shown.
    logged = pictures_of(one)
    on_page = re.findall(r'<img alt="one, (.*?)" ([^>]*?)( hidden)? src="data:image/png;base64,(.*?)"', page)
    assert [text for text, *_ in on_page] == [f"step {step}: {tag}" for tag, steps in logged.items() for step in steps]
    assert [text for text, _, hidden, _ in on_page if not hidden] == [f"step 14: {tag}" for tag in logged]
    for text, size, _, png in on_page:
        picture = base64.b64decode(png)
        step, tag = text.removeprefix("step ").split(": ", 1)
        assert picture == logged[tag][int(step)]
        assert f'width="{(2 if "twice" in size else 1) * Image.open(io.BytesIO(picture)).width}"' in size
    assert list(logged["input | masked | reconstruction"])[-2:] == [12, 14]
    links = [value for _, name, value in found.attributes if name in ("src", "href", "srcset", "action")]
    assert all(value.startswith(("data:", "#")) for value in links), "the page must need nothing else"
    (written,) = re.findall(r'<pre class="command".*?>(.*?)</pre>', page)
    launch = json.loads((one / "manifest.json").read_text())["launches"][0]
    assert shlex.split(html.unescape(written)) == launch["command"]
    assert launch["device"] in found.text
    assert launch["hosts"][0] not in found.text.split()  # the page is sent to others


def pictures_of(run: Path) -> dict[str, dict[int, bytes]]:
    """The pictures of a run by tag and step, as TensorBoard reads them."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={IMAGES: 0})
    events.Reload()
    return {tag: {each.step: each.encoded_image_string for each in events.Images(tag)} for tag in events.Tags()[IMAGES]}


def test_several_runs_lie_over_one_another(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert main([*map(str, runs), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    curves = charts(page)["loss"]
    assert [(curve.run, len(curve.steps)) for curve in curves] == [(0, 14), (1, 5)]
    heads, one, two = table(page, "differences")
    assert heads[:5] == ["run", "steps", "lr", "warmup_steps", "picture_every"]
    assert two[:3] == ["two", "5", "0.004"]
    assert one[0] == "one"
    # What differs from the first run is marked, also in the overview and in the numbers.
    assert "<mark>0.004</mark>" in page
    assert "<mark>5 of 5 steps</mark>" in page
    assert "<mark>mae</mark>" not in page
    top = table(page, "runs")
    assert [row[0] for row in top] == ["run", "one", "two"]


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
    text = Elements(page).text
    assert "running" in text
    assert "6 of 14 steps" in text
    (curve,) = charts(page)["loss"]
    assert [value is None for value in curve.mean] == [False, False, True, False, False, False]
    assert "Not finite: 1 of 6 values." in text
    assert "No evaluator has scored this run" in text
    assert "No pictures were logged" in text


@pytest.mark.parametrize("log", ["", None, '{"step": 1, "lo'])
def test_a_run_that_has_logged_nothing(log: str | None, runs: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("config.yaml", "manifest.json"):
        (tmp_path / name).write_text((runs[0] / name).read_text().replace('"finished"', '"failed: <no> \\u202e disk"'))
    if log is not None:
        (tmp_path / "metrics.jsonl").write_text(log)
    assert main([str(tmp_path)]) == 0
    text = Elements((tmp_path / "report.html").read_text()).text
    assert "No metrics are logged yet." in text
    assert "no step is logged yet" in text
    assert "failed: <no> \\u202e disk" in text


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
