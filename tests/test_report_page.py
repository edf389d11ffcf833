"""The page of `ssl-report`: as a browser shows it, with names that try to break out of it, and with odd run folders."""

import base64
import hashlib
import io
import json
import math
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chromium
import numpy as np
import pytest
import yaml
from chromium import Chromium
from conftest import ROOT
from PIL import Image
from report_pages import Elements, charts, table
from ssl_pretrain.launch import report_page, report_pictures
from ssl_pretrain.launch.report import main
from ssl_pretrain.launch.report_page import MOST_BYTES, plain, safe_json
from ssl_pretrain.launch.run_folder import read

from ssl_pretrain.loggers.tensorboard import TensorBoard
from ssl_pretrain.loop import pictures

needs_browser = pytest.mark.skipif(chromium.PROGRAM is None, reason="no Chromium here to show the page")
SETTINGS = {"method": "mae", "encoder": "vit_micro", "data": "photos", "batch_size": 16, "steps": 100, "lr": 0.001}
MANIFEST = {
    "state": "finished", "steps": 100, "data": {"path": "photos", "images": 320, "fingerprint": "ab12"},
    "launches": [
        {
            "time": "2026-11-30T10:00:00+0000", "step": 0, "command": ["ssl-pretrain", "--method", "mae"], "processes": 1,
            "hosts": ["secret-host"], "device": "Some CPU", "cores": 2, "python": "3.11.7",
            "versions": {"torch": "2.13.0"}, "commit": "0123456789abcdef",
        }
    ],
    "ended": "2026-11-30T10:03:20+0000",
}  # fmt: skip
HOSTILE = (
    "</script><script>window.broken = 1; alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror='window.broken = 2'>",
    "\" autofocus onfocus='window.broken = 3' x=\"",
    "=cmd|' /C calc'!A0",
    "a\u2028b\u2029c\u202ed\x00e\x1bf",
    "&lt;b&gt; ${window.broken = 4} {{7*7}}",
    "]]><svg onload=alert(1)>",
)


def lines(count: int, seed: int = 0, **more: Any) -> list[dict[str, Any]]:
    """A log of so many steps."""
    noise = np.random.default_rng(seed)
    return [
        {
            "step": i,
            "loss": 2 * math.exp(-i / count) + 0.1 * noise.random(),
            "lr": 0.001 * (1 - i / count) + 1e-9,
            "weight_decay": 0.05,
            "images_per_s": 500 + 20 * noise.random(),
            "data_wait": 0.1 * noise.random(),
            "epoch": i * 16 / 320,
            "skipped": 0,
            "time": 1796032800.0 + i,
            **more,
        }
        for i in range(1, count + 1)
    ]


def write_run(
    folder: Path, logged: list[dict[str, Any]], settings: dict[str, Any] | None = None, **manifest: Any
) -> Path:
    """A run folder as training leaves it, without an encoder."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, **(settings or {})}))
    (folder / "manifest.json").write_text(json.dumps({**MANIFEST, **manifest}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    return folder


def write_result(folder: Path, evaluator: str, top1: float, classes: dict[str, float], data: str = "photos") -> None:
    """What an evaluator writes."""
    metrics = {"top1": top1, "top1_interval": [top1 - 2, top1 + 2], "per_class": classes}
    result = {
        "evaluator": evaluator, "metrics": metrics, "seconds": 1.5, "protocol": {"data": data},
        "baselines": {"random": {"top1": 20.0}, "pixels": {"top1": 30.0}},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(result))


def write_pictures(run: Path, tag: str, steps: list[int], start: int = 0, size: int = 32) -> None:
    """Pictures as the loop logs them: each of one colour that says its step."""
    board = TensorBoard()
    board.begin(run, {}, start)
    for step in steps:
        board.picture(tag, np.full((size, 2 * size, 3), step % 256, np.uint8), step)
    board.end("finished")


def page_of(*runs: Path, out: Path | None = None) -> str:
    """The page of runs."""
    target = out or runs[0] / "report.html"
    assert main([*map(str, runs), "--out", str(target)]) == 0
    return target.read_text()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs: one with everything, one of another learning rate with gaps, one that failed at its first steps."""
    place = tmp_path_factory.mktemp("runs")
    one = write_run(place / "one", lines(100))
    write_result(one / "knn", "knn", 61.25, {"cat": 50.0, "dog": 70.0})
    write_pictures(one, "input | masked | reconstruction", [0, 50, 100])
    write_pictures(one, "attention", [100])
    (one / "warnings.log").write_text("2026-11-30 10:00:00 features collapse\n")
    gaps = lines(150, seed=1)
    for i in (40, 41, 90):
        gaps[i]["loss"] = None
    two = write_run(place / "two-with-a-name-that-is-longer-than-most-screens-are-wide", gaps, {"lr": 0.002})
    write_result(two / "knn", "knn", 70.5, {"cat": 60.0, "dog": 81.0})
    three = write_run(place / "three", lines(2, seed=2), state="failed: the disk is full")
    return [one, two, three]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium") / "profile") as found:
        yield found


# The colours on the canvas of each chart; a blank one has one
COLOURS = """[...document.querySelectorAll(".plot canvas")].map(canvas => {
  const pixels = new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  return new Set(pixels).size;
})"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("count", [1, 3], ids=["one", "several"])
def test_a_browser_shows_it(
    count: int, width: int, dark: bool, folders: list[Path], browser: Chromium, tmp_path: Path
) -> None:
    page = page_of(*folders[:count], out=tmp_path / "report.html")
    browser.open(tmp_path / "report.html", width=width, dark=dark)
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [
        (tmp_path / "report.html").resolve().as_uri()
    ]
    assert browser.run("document.documentElement.scrollWidth") == browser.run("innerWidth") == width
    assert min(browser.run(COLOURS)) > 3
    assert len(browser.run(COLOURS)) == len(charts(page)) >= 4
    pixels = np.asarray(Image.open(browser.screenshot(tmp_path / "page.png")).convert("L"))
    assert pixels.shape[1] == width
    assert (np.median(pixels) < 80) == dark
    assert (pixels.max() - pixels.min()) > 150  # text that can be read
    # Nothing is cut off: whatever is wider than the page scrolls within it.
    cut = """[...document.querySelectorAll("main *")].filter(e => !e.closest(".wide, dialog, [hidden], .uplot, pre") &&
      e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.run(cut) == []


READ = '[...document.querySelector(".chart .read").children].map(e => e.textContent).join(" ")'
INK = 'document.querySelector(".chart canvas").toDataURL()'


def send(selector: str, change: str, event: str) -> str:
    """JavaScript that changes an element, which it calls `e`, as a person would."""
    element = f"document.querySelector({json.dumps(selector)})"
    return f"(e => {{ {change}; e.dispatchEvent(new Event('{event}', {{bubbles: true}})) }})({element})"


@needs_browser
def test_values_can_be_read_with_the_keyboard_and_the_mouse(folders: list[Path], browser: Chromium) -> None:
    page_of(folders[0])
    browser.open(folders[0] / "report.html", width=1280)
    logged = lines(100)
    assert browser.run(READ) == f"last {logged[-1]['loss']:.4g}"
    browser.run('document.querySelector(".plot").focus()')
    browser.key("ArrowRight")
    browser.key("ArrowRight")
    assert browser.run(READ) == f"step 2 {logged[1]['loss']:.4g}"
    browser.key("End")
    browser.key("ArrowLeft")
    assert browser.run(READ) == f"step 99 {logged[98]['loss']:.4g}"
    browser.key("Escape")
    assert browser.run(READ).startswith("last")
    browser.run('document.querySelector(".plot").scrollIntoView({block: "center", behavior: "instant"})')
    left, top, wide, high = browser.run(
        '(r => [r.left, r.top, r.width, r.height])(document.querySelector(".u-over").getBoundingClientRect())'
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + wide / 2, y=top + high / 2)
    step = int(re.match(r"step (\d+)", browser.run("new Promise(d => setTimeout(() => d(" + READ + "), 100))"))[1])
    assert 45 <= step <= 56
    # The cursor is at the same step in all charts.
    other = browser.run('document.querySelectorAll(".chart .read")[1].firstChild.textContent')
    assert other == f"step {step}"
    assert browser.problems == []


@needs_browser
def test_controls_change_the_charts(folders: list[Path], browser: Chromium, tmp_path: Path) -> None:
    page_of(*folders, out=tmp_path / "report.html")
    browser.open(tmp_path / "report.html", width=1280)
    drawn = [browser.run(INK)]
    for script in (
        send(".chart .log", "e.checked = true", "change"),
        send("#smoothing", "e.value = 0.9", "input"),
        send("[data-run='1']", "e.checked = false", "input"),
        send("#across", "e.value = 'images'", "input"),
        'document.querySelector("#theme").click()',
        'dispatchEvent(new Event("beforeprint"))',
    ):
        browser.run(script)
        browser.run("new Promise(done => setTimeout(done, 50))")
        drawn.append(browser.run(INK))
    assert len(set(drawn[:-1])) == len(drawn) - 1, "a control changed nothing"
    assert drawn[-1] == drawn[-3], "printed as in light mode"
    assert browser.run("document.documentElement.dataset.theme") == "light"
    browser.run('dispatchEvent(new Event("afterprint"))')
    assert browser.run("document.documentElement.dataset.theme") == "dark"
    assert "two" not in browser.run(READ)
    assert "three" in browser.run(READ)
    browser.run(send("[data-run='0']", "e.checked = false", "input"))
    browser.run(send("[data-run='2']", "e.checked = false", "input"))
    assert browser.run('document.querySelectorAll(".plot canvas").length') == 0
    assert browser.problems == []


def test_pictures_of_every_run_are_explained() -> None:
    """By what the page says below the heading of each kind that `loop/pictures.py` draws."""
    drawn = {pictures.VIEWS, pictures.COMPONENTS, pictures.SIMILARITY, pictures.ATTENTION, pictures.NEAREST}
    assert set(report_page.EXPLAINED) == drawn
    png = report_pictures.Picture(5, b"", 500, 100)
    both = [report_pictures.Series(tag, [png], 1) for tag in (pictures.NEAREST, "input | masked")]
    run: Any = SimpleNamespace(name="one")
    neighbours, own = (report_page._figure(run, each, "picture-0-0", several=False) for each in both)
    assert "the training images with the most similar features" in neighbours
    assert 'class="note"' not in own


@needs_browser
def test_earlier_pictures_can_be_stepped_through(folders: list[Path], browser: Chromium) -> None:
    page_of(folders[0])
    browser.open(folders[0] / "report.html", width=390)
    visible = '[...document.querySelectorAll("#picture-0-0 img")].filter(i => i.offsetWidth > 0).map(i => i.alt)'
    assert browser.run(visible) == ["one, step 100: input | masked | reconstruction"]
    browser.run('document.querySelector("#picture-0-0 input").focus()')
    browser.key("ArrowLeft")
    if browser.run(visible) != ["one, step 50: input | masked | reconstruction"]:  # a browser may not step by key here
        browser.run(send("#picture-0-0 input", "e.value = 1", "input"))
    assert browser.run(visible) == ["one, step 50: input | masked | reconstruction"]
    assert browser.run('document.querySelector("#picture-0-0 output").textContent') == "50"
    browser.run('document.querySelector("#picture-0-0 .enlarge").click()')
    assert browser.run('document.querySelector("#large").open')
    assert browser.run('document.querySelector("#large img").alt') == "one, step 50: input | masked | reconstruction"
    browser.run('document.querySelector("#close").click()')
    assert browser.problems == []


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which every name is hostile."""
    place = tmp_path_factory.mktemp("hostile")
    numbers = {name: i + 0.5 for i, name in enumerate(HOSTILE)}
    logged = lines(30)
    for line in logged:
        line |= {name: value * line["step"] for name, value in numbers.items()}
    run = write_run(
        place / "<img src=x onerror=alert(1)>",
        logged,
        {"method": HOSTILE[0], HOSTILE[1]: HOSTILE[2], "data": HOSTILE[3]},
        state=f"failed: {HOSTILE[0]}",
        data={"images": 5, "fingerprint": HOSTILE[2]},
        launches=[{**MANIFEST["launches"][0], "device": HOSTILE[0], "command": list(HOSTILE), "commit": HOSTILE[7]}],
    )
    write_result(run / "<b>knn", HOSTILE[0], 50.0, dict.fromkeys(HOSTILE, 10.0), data=HOSTILE[2])
    write_pictures(run, HOSTILE[0], [1, 2])
    (run / "warnings.log").write_text("\n".join(HOSTILE[:5]))
    bad = [{"index": i, "name": name, "reason": HOSTILE[7]} for i, name in enumerate(HOSTILE)]
    (run / "bad_images.jsonl").write_text("".join(json.dumps(each) + "\n" for each in bad))
    return run


def test_hostile_names_stay_text(hostile: Path) -> None:
    page = page_of(hostile)
    found = Elements(page)
    assert found.tags.count("script") == 2
    assert found.tags.count("style") == 1
    assert found.tags.count("svg") == 3  # the bars of the score and its baselines
    assert found.tags.count("img") == 2 + 1  # pictures, and the empty one of an enlarged picture
    assert not [each for each in found.attributes if each[1].startswith("on")]
    for name in HOSTILE:
        shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in name)
        assert shown in found.text
    assert any(HOSTILE[0] in value for _, attribute, value in found.attributes if attribute == "alt")
    for wrong in "\u2028\u2029\u202e\x00\x1b":
        assert wrong not in page
    assert len(charts(page)) >= len(HOSTILE)


@needs_browser
def test_hostile_names_do_nothing_in_a_browser(hostile: Path, browser: Chromium) -> None:
    page_of(hostile)
    browser.open(hostile / "report.html", width=390)
    assert browser.problems == []
    assert browser.run("typeof window.broken") == "undefined"
    assert browser.run('document.querySelectorAll("script").length') == 2
    assert [url for url in browser.requests if not url.startswith(("data:", "file:"))] == []
    assert browser.run("document.documentElement.scrollWidth") == 390
    assert min(browser.run(COLOURS)) > 3


@needs_browser
def test_a_run_name_cannot_end_the_data(browser: Chromium, tmp_path: Path) -> None:
    """Runs of one name are named by their paths, which may hold a whole tag."""
    place = tmp_path / "a<" / "script><script>window.broken = 5<" / "script><!--<script>"
    page = page_of(write_run(place / "run", lines(30)), write_run(tmp_path / "b" / "run", lines(30)))
    assert len(charts(page)["loss"]) == 2
    browser.open(place / "run" / "report.html", width=390)
    assert browser.problems == []
    assert browser.run("typeof window.broken") == "undefined"
    assert "a</script><script>window.broken = 5</script><!--<script>/run" in browser.run(READ)


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """The address of a server on this machine, and what it is asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", paths
        server.shutdown()
        thread.join()


@needs_browser
@pytest.mark.parametrize("policy", [True, False], ids=["policy", "none"])
def test_the_policy_lets_nothing_in(
    policy: bool, folders: list[Path], browser: Chromium, asked: tuple[str, list[str]], tmp_path: Path
) -> None:
    """What an attacker puts into the page is not run, and nothing is asked for. Without the policy all of it is."""
    address, paths = asked
    page = page_of(folders[0])
    added = (
        f"<script>window.broken = 1; fetch('{address}/fetch')</script><img src='{address}/image'>"
        f"<style>body {{ color: rgb(1, 2, 3) }}</style><link rel=stylesheet href='{address}/style'>"
        f"<script src='{address}/script'></script><iframe src='{address}/frame'></iframe>"
    )
    page = page.replace('<main id="main">', f'<main id="main">{added}')
    if not policy:
        page = re.sub('<meta http-equiv="Content-Security-Policy".*?>', "", page)
    (tmp_path / "report.html").write_text(page)
    browser.open(tmp_path / "report.html", width=1280)
    assert (browser.run("typeof window.broken") == "undefined") == policy
    assert (browser.run("getComputedStyle(document.body).color") != "rgb(1, 2, 3)") == policy
    if policy:
        browser.run(f"fetch('{address}/later').catch(() => 0)")
        assert paths == []
        assert sum("Content Security Policy" in problem for problem in browser.problems) >= 6
    else:
        assert {"/fetch", "/image", "/style", "/script", "/frame"} <= set(paths)
    assert min(browser.run(COLOURS)) > 3  # its own scripts run


def test_the_policy_names_what_is_on_the_page(folders: list[Path]) -> None:
    page = page_of(folders[0])
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert " style=" not in page.replace(re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0], "")


def test_json_cannot_end_its_element() -> None:
    text = safe_json({name: name for name in HOSTILE})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {name: name for name in HOSTILE}
    assert plain("a\u202eb<") == "a\\u202eb&lt;"
    assert len(plain("x" * 10_000)) < 500


# ---- Many numbers.


def test_long_logs_are_thinned_and_say_so(tmp_path: Path) -> None:
    count = 50_000
    logged = [{"step": i, "loss": math.sin(i / 7000) + i % 10 / 100, "lr": i / count} for i in range(1, count + 1)]
    logged[20_000]["loss"] = 25.0  # a peak of one step
    logged[30_000]["loss"] = None
    page = page_of(write_run(tmp_path / "long", logged))
    (curve,) = charts(page)["loss"]
    assert len(curve.steps) == 1000
    assert "A point is the mean of up to 50 logged values" in page
    values = np.array([np.nan if line["loss"] is None else line["loss"] for line in logged]).reshape(1000, 50)
    gap = np.isnan(values).any(1)
    assert [value is None for value in curve.mean] == gap.tolist()
    for found, expected in ((curve.mean, values.mean(1)), (curve.low, values.min(1)), (curve.high, values.max(1))):
        np.testing.assert_allclose(np.array(found, float)[~gap], expected[~gap], atol=2e-3)
    assert max(value for value in curve.high if value is not None) == 25.0
    assert curve.steps == np.arange(1, count + 1).reshape(1000, 50).mean(1).astype(int).tolist()
    assert "Not finite: 1 of 50,000 values." in page
    row = next(row for row in re.findall(r"<tr>.*?</tr>", page) if ">25 <" in row)
    assert "step 20,001" in row


def test_a_log_with_more_gaps_than_values_is_still_a_curve(tmp_path: Path) -> None:
    logged = [{"step": i, "loss": None if i % 3 else float(i)} for i in range(1, 9001)]
    (curve,) = charts(page_of(write_run(tmp_path / "odd", logged)))["loss"]
    known = [value for value in curve.mean if value is not None]
    assert len(known) == 1000
    np.testing.assert_allclose(known, [9 * i + 6 for i in range(1000)], atol=4)


def test_steps_out_of_order_and_twice(tmp_path: Path) -> None:
    logged = [
        {"step": step, "loss": value} for step, value in [(3, 0.3), (1, 0.1), (2, 0.2), (3, 0.9), (10**11, 1e299)]
    ]
    (curve,) = charts(page_of(write_run(tmp_path / "odd", logged)))["loss"]
    assert list(zip(curve.steps, curve.mean, strict=True)) == [(1, 0.1), (2, 0.2), (3, 0.9), (10**11, 1e299)]


def test_constants_and_single_values_are_numbers(tmp_path: Path) -> None:
    logged = [{"step": i, "loss": i / 3, "momentum": 0.99, "never": None} for i in range(1, 6)]
    logged[2]["probe/top1"] = 12.5
    one = write_run(tmp_path / "one", logged)
    other = write_run(tmp_path / "two", [{**line, "momentum": 0.9} for line in logged[:1]])
    page = page_of(one)
    assert charts(page).keys() == {"loss"}
    assert table(page, "numbers")[1:] == [["Momentum momentum", "0.99"], ["Top1 (probe) probe/top1", "12.5 step 3"]]
    assert "Never finite: never." in page
    both = table(page_of(one, other), "numbers")
    assert both[0] == ["", "one", "two"]
    assert both[1] == ["Momentum momentum", "0.99", "0.9"]
    assert "<mark>0.9</mark>" in page_of(one, other)


def test_the_page_of_many_runs_is_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    names = [f"term_{i}" for i in range(40)]
    runs = [
        write_run(
            tmp_path / f"run{i}",
            [{"step": 7 * s, **dict(zip(names, noise.random(40), strict=True))} for s in range(1, 121)],
            {"lr": i / 1000, "seed": i},
        )
        for i in range(30)
    ]
    page = page_of(*runs, out=tmp_path / "many.html")
    assert len(page.encode()) <= MOST_BYTES < 1_500_000
    drawn = charts(page)
    assert len(drawn) == 40
    assert len(drawn["term_0"]) == 30
    assert 10 <= len(drawn["term_0"][0].steps) < 120
    assert "logged values; the band" in page


# ---- Pictures.


def shown(run: Path, budget: int = 10**7) -> tuple[dict[str, list[int]], list[str]]:
    """The steps of the pictures that are shown, by tag; each picture says its step."""
    series, notes = report_pictures.read(run, budget)
    for each in series:
        for picture in each.shown:
            assert np.asarray(Image.open(io.BytesIO(picture.png)))[0, 0, 0] == picture.step % 256
    return {each.tag: [picture.step for picture in each.shown] for each in series}, notes


def test_first_last_and_some_pictures_between(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lines(5))
    write_pictures(run, "views", list(range(0, 201, 10)))
    assert shown(run) == ({"views": [0, 20, 50, 80, 110, 140, 170, 200]}, [])
    page = page_of(run)
    assert "13 more were logged." in page
    assert page.count("<img alt=") == 8 + 1  # and the empty one of the enlarged picture


def test_pictures_of_before_a_restart_are_not_shown_twice_and_lost_steps_not_at_all(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lines(5))
    write_pictures(run, "views", [10, 20, 30, 40])
    write_pictures(run, "views", [25, 40], start=20)  # went on from step 20 with another --picture-every
    assert shown(run) == ({"views": [10, 20, 25, 40]}, [])


def test_pictures_have_a_budget(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lines(5))
    for tag in ("a", "b"):
        write_pictures(run, tag, [10, 20, 30])
    size = len(report_pictures.read(run, 10**7)[0][0].shown[0].png)
    assert shown(run, 7 * size)[0] == {"a": [10, 20, 30], "b": [10, 20, 30]}
    assert shown(run, 4 * size + 9)[0] == {"a": [10, 30], "b": [10, 30]}
    assert shown(run, 2 * size + 9)[0] == {"a": [30], "b": [30]}
    found, notes = shown(run, size + 9)
    assert found == {"a": [30]}
    assert notes == ["the pictures 'b' are left out: too many or too large"]


def test_damaged_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_run(tmp_path / "run", lines(5))
    write_pictures(run, "views", [10, 20])
    (events,) = (run / "tensorboard").iterdir()
    whole = events.read_bytes()
    events.write_bytes(whole[:-30])  # killed while it wrote
    assert shown(run)[0] == {"views": [10]}
    events.write_bytes(b"no events" * 100)
    assert shown(run)[0] == {}
    assert "No pictures were logged" in page_of(run)
    events.write_bytes(whole)
    (run / "tensorboard" / "notes.txt").write_text("foreign")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard"), filename_suffix=".other") as board:
        board.file_writer.add_summary(_picture("broken", b"<svg onload=alert(1)>"), 5)
    found, notes = shown(run)
    assert found == {"views": [10, 20]}
    assert notes == ["1 of the pictures 'broken' cannot be decoded, or are too large"]
    assert "cannot be decoded" in page_of(run)
    assert "run: 1 of the pictures" not in capsys.readouterr().out


def _picture(tag: str, content: bytes) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(height=1, width=1, colorspace=3, encoded_image_string=content)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


# ---- Facts.


def test_time_between_starts_is_not_training_time(tmp_path: Path) -> None:
    first = {**MANIFEST["launches"][0], "time": "2026-11-30T10:00:00+0000"}
    second = {**first, "time": "2026-11-30T12:00:00+0000", "step": 50}
    begin, again = 1796032800, 1796040000  # the same in seconds
    logged = [{"step": 50, "loss": 1.0, "time": begin + 60}, {"step": 100, "loss": 0.5, "time": again + 90}]
    run = write_run(tmp_path / "run", logged, launches=[first, second], ended="2026-11-30T12:01:40+0000")
    assert read(run, "run", "ssl-report").seconds == 60 + 100
    text = Elements(page_of(run)).text
    assert "2 min 40 s" in text
    assert "2, the last at step 50" in text


def test_scores_of_several_runs_are_in_one_place(folders: list[Path], tmp_path: Path) -> None:
    page = page_of(*folders, out=tmp_path / "report.html")
    (tile,) = re.findall(r'<figure class="tile">.*?</figure>', page)
    named = re.findall(r'<th scope="row">(.*?)</th>.*?class="value">([\d.]+)', tile)
    rows = [(re.sub("<.*?>", "", name), float(value)) for name, value in named]
    assert rows == [("one", 61.25), (folders[1].name, 70.5), ("untrained (one)", 20.0), ("raw pixels", 30.0)]
    bars = [float(width) for width in re.findall(r'<rect width="([\d.]+)" height="8"/>', tile)]
    np.testing.assert_allclose(bars, [value for _, value in rows], atol=0.06)  # of 100 that are the whole bar
    order = [page.index(f'<section id="{name}"') for name in ("scores", "pictures", "curves", "differences", "about")]
    assert order == sorted(order)


def test_the_verdict_of_a_run_is_at_the_top(folders: list[Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lines(30))
    (run / "verdict.txt").write_text("kNN top-1: 40.0 %\nverdict: <b>clearly</b> better\n")
    (section,) = re.findall(r'<section id="scores".*?</section>', page_of(run), re.DOTALL)
    assert "<p>kNN top-1: 40.0 %</p><p>verdict: &lt;b&gt;clearly&lt;/b&gt; better</p>" in section
    assert "No evaluator has scored" not in section
    both = Elements(page_of(folders[0], run, out=tmp_path / "both.html")).text
    assert "kNN top-1: 40.0 %" in both
    assert "61.25" in both


def test_a_result_without_a_headline_is_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lines(30))
    write_result(run / "own", "own", 50.0, {})
    content = json.loads((run / "own" / "results.json").read_text())
    content["metrics"] = {"loss_at_9": 0.125, "n": 7, "words": "x", "bad": None}
    (run / "own" / "results.json").write_text(json.dumps({**content, "baselines": {}}))
    rows = table(page_of(run), "scores")[1:]
    assert [[row[0], row[1], row[3], row[4], row[6]] for row in rows] == [
        ["run", "own", "loss_at_9", "0.125", "own"],
        ["run", "own", "n", "7", "own"],
    ]


UPLOT = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE-uPlot.txt": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}


def test_uplot_is_unchanged() -> None:
    """Version 1.6.32, as it is in the npm registry."""
    folder = ROOT / "launch" / "report_assets"
    for name, checksum in UPLOT.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == checksum, name
    for place in (folder / "README.md", ROOT / "NOTICE"):
        assert "1.6.32" in place.read_text()
    assert "(v1.6.32)" in (folder / "uPlot.iife.min.js").read_text()[:100]
