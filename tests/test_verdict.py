"""The verdict at the end of a run: by a paired test, in words."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from scipy.stats import binomtest
from ssl_pretrain.launch.pretrain import main

from ssl_pretrain.loop.verdict import PIXELS, UNTRAINED, Comparison, remedies, sentence


def compared(won: int, lost: int, both: int = 50, neither: int = 50) -> Comparison:
    """With so many images that only one of the two encoders has right."""
    ours = np.repeat([True, False, True, False], [won, lost, both, neither])
    other = np.repeat([False, True, True, False], [won, lost, both, neither])
    return Comparison(ours, other)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (7, 7), (8, 2), (3, 40), (300, 250), (900, 500)])
def test_the_test_is_mcnemars_exact_one(won: int, lost: int) -> None:
    expected = binomtest(won, won + lost, 0.5).pvalue if won + lost else 1.0
    assert compared(won, lost).chance == pytest.approx(expected, rel=1e-9)


def test_what_is_clear() -> None:
    assert [compared(won, lost).clear for won, lost in ((30, 5), (8, 2), (5, 30), (0, 0))] == [1, 0, -1, 0]
    # The same difference of 25 images: clear where few images decide, not where many do
    assert (compared(30, 5).clear, compared(500, 475).clear) == (1, 0)


def test_the_interval_of_the_difference() -> None:
    """By hand, of 200 images: won 60, lost 20: 20 %; variance (80 - 40^2 / 200) / 200^2 = 0.0018."""
    found = compared(60, 20, both=60, neither=60)
    assert found.difference == pytest.approx(20)
    assert found.margin == pytest.approx(100 * 1.96 * 0.0018**0.5)


def test_the_sentence_names_every_comparison() -> None:
    said = sentence({UNTRAINED: compared(60, 20), PIXELS: compared(20, 20)})
    assert said.startswith(
        "clearly better than the untrained encoder (+22.2 ± 9.2), not clearly better than raw pixels (+0.0"
    )
    neither = sentence({UNTRAINED: compared(20, 20), PIXELS: compared(20, 20)})
    assert neither.startswith("not clearly better than the untrained encoder (+0.0 ± 8.9) or raw pixels (+0.0")
    assert "clearly worse than raw pixels (-22.2" in sentence({PIXELS: compared(20, 60)})


def test_what_to_try_names_flags() -> None:
    run: Any = SimpleNamespace(steps=None, images=None, epochs=None)
    lines = remedies(run, Path("runs/x"), {UNTRAINED: compared(20, 20)})
    assert "--epochs 200 --extend" in lines[0]
    assert "ssl-report runs/x" in lines[1]
    run.steps = 300
    assert "--steps 600 --extend" in remedies(run, Path("x"), {UNTRAINED: compared(20, 20)})[0]
    ahead = remedies(run, Path("x"), {UNTRAINED: compared(8, 2)})
    assert ahead[0].startswith("more labelled images")


def test_a_run_ends_with_a_verdict(
    photos: Path, photos_in_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method", "mae", *TINY, "--steps", "2", "--workers", "0"]
    assert main([*words, "--data", str(photos_in_classes), "--out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    scores = (
        r"kNN top-1 \(20 neighbours, 19 images against 77\): [\d.]+ %, untrained encoder [\d.]+ %, raw pixels [\d.]+ %"
    )
    assert re.search(scores + r"\nverdict: (not )?clearly", said)
    kept = (tmp_path / "a" / "verdict.txt").read_text()  # ssl-report shows it
    assert kept in said
    assert re.match(scores + r"\nverdict: ", kept)
    assert main([*words, "--data", str(photos), "--out", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"features of 96 images without labels: effective rank [\d.]+ of 128, untrained encoder [\d.]+", said
    )
    assert "verdict: no collapse" in said
    assert f"ssl-eval diagnose --encoder {tmp_path / 'b'}" in said


def test_a_run_without_a_score_suggests_what_its_labels_allow(
    photos: Path, photos_in_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method", "mae", *TINY, "--steps", "1", "--workers", "0", "--no-score"]
    for data, evaluator in ((photos_in_classes, "linear"), (photos, "diagnose")):
        assert main([*words, "--data", str(data), "--out", str(tmp_path / evaluator)]) == 0
        said = capsys.readouterr().out
        assert "verdict" not in said
        assert f"next:\n  ssl-eval {evaluator} --encoder" in said
