"""The label-free measures against NumPy from their formulas, what is said of features that are wrong in a known way, and
evaluators of images without labels as commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from pixel_tasks import whole_task
from small_encoders import small_encoder
from ssl_pretrain.eval import diagnose
from ssl_pretrain.launch.evaluate import main
from synthetic_data import ArraySource, noisy_classes

from ssl_pretrain import encoder as exported
from ssl_pretrain.errors import UserError


def spectrum(n: int, width: int, alpha: float, seed: int = 0) -> np.ndarray:
    """Rows with a covariance whose eigenvalues are rank^-alpha, exactly, and mean 0."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, width))
    left = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[0]
    right = np.linalg.qr(rng.standard_normal((width, width)))[0]
    return np.sqrt(n) * left * np.arange(1, width + 1) ** (-alpha / 2) @ right


def entropy_rank(values: np.ndarray) -> float:
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.parametrize(("n", "width"), [(200, 30), (20, 30)])
def test_measures_are_those_of_the_formulas(n: int, width: int) -> None:
    rows = np.random.default_rng(0).standard_normal((n, width)) * np.linspace(0.1, 2, width) + 0.5
    found = diagnose.measures(torch.from_numpy(rows))
    centred = rows - rows.mean(0)
    assert found["rankme"] == pytest.approx(entropy_rank(np.linalg.svd(rows, compute_uv=False)), rel=1e-6)
    singular = np.linalg.svd(centred, compute_uv=False)
    assert found["effective_rank"] == pytest.approx(entropy_rank(singular), rel=1e-4)
    share = np.cumsum(singular**2) / (singular**2).sum()
    assert found["utilised_rank"] == int((share < 0.99).sum()) + 1
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert found["spread"] == pytest.approx(unit.std(0, ddof=1).mean() * np.sqrt(width))
    kernel = np.exp(-2 * ((unit[:, None] - unit) ** 2).sum(2))
    assert found["uniformity"] == pytest.approx(np.log((kernel.sum() - n) / (n * (n - 1))))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_alpha_is_the_exponent_of_the_spectrum(alpha: float) -> None:
    found = diagnose.measures(torch.from_numpy(spectrum(300, 40, alpha)))
    assert found["alpha"] == pytest.approx(alpha, abs=1e-6)


def test_ranks_of_a_few_even_directions() -> None:
    found = diagnose.measures(torch.from_numpy(spectrum(300, 40, 0.0)))
    assert found["effective_rank"] == pytest.approx(40)
    plane = spectrum(300, 4, 0.0) @ np.linalg.qr(np.random.default_rng(1).standard_normal((40, 4)))[0].T
    found = diagnose.measures(torch.from_numpy(plane))
    assert (found["effective_rank"], found["utilised_rank"]) == (pytest.approx(4, abs=1e-6), 4)


def test_pairs_are_measured_as_the_formulas_say() -> None:
    rng = np.random.default_rng(0)
    views = rng.standard_normal((12, 1, 6)) + 0.3 * rng.standard_normal((12, 5, 6))
    found = diagnose.of_pairs(torch.from_numpy(views))
    unit = views / np.linalg.norm(views, axis=2, keepdims=True)
    squared = [((unit[i, a] - unit[i, b]) ** 2).sum() for i in range(12) for a in range(5) for b in range(5) if a != b]
    assert found["alignment"] == pytest.approx(np.mean(squared))
    flat, own = unit.reshape(60, 6), np.arange(60) // 5
    cosine = flat @ flat.T
    np.fill_diagonal(cosine, -2)
    assert found["views_found"] == pytest.approx(100 * (own[cosine.argmax(1)] == own).mean())

    between = np.cov(views.mean(1).T)
    within = np.mean([np.cov(image.T) for image in views], axis=0) + 1e-4 * np.eye(6)
    values, axes = np.linalg.eigh(within)
    root = axes / np.sqrt(values) @ axes.T
    assert found["lidar"] == pytest.approx(entropy_rank(np.linalg.eigvalsh(root @ between @ root)), rel=1e-6)


def said(rows: np.ndarray, **more: float) -> str:
    features = torch.from_numpy(rows.astype(np.float32))
    return " | ".join(diagnose.findings([{"feature": "pooled", **diagnose.measures(features), **more}], features))


def test_what_is_wrong_is_said_in_words() -> None:
    healthy = spectrum(300, 40, 0.8)
    assert said(healthy) == "nothing looks wrong"
    assert "collapsed: all images" in said(1e-4 * healthy + 1)
    plane = spectrum(300, 2, 0.0) @ np.linalg.qr(np.random.default_rng(1).standard_normal((40, 2)))[0].T
    assert "dimensional collapse: the features fill about 2 of 40" in said(plane)
    assert "a common direction outweighs the rest" in said(healthy + 3)
    dead = healthy.copy()
    dead[:, 5:8] = 0.25
    assert "3 of 40 floats are the same" in said(dead)
    massive = healthy.copy()
    massive[:, 3] += 30
    assert "one float of 40 holds" in said(massive)
    outlier = healthy.copy()
    outlier[7] *= 60
    assert "outliers: the longest feature is" in said(outlier)
    assert "only 30 images for 40 floats" in said(healthy[:30])
    assert "views of an image are not near each other" in said(healthy, views_found=3.0, alignment=1.9)


def test_an_earlier_block_that_serves_better_is_named() -> None:
    features = torch.from_numpy(spectrum(300, 40, 0.8))
    measured = diagnose.measures(features)
    entries = [{"feature": name, **measured, "knn": knn} for name, knn in (("pooled", 50.0), ("cls@-2", 60.0))]
    assert diagnose.findings(entries, features) == [
        "an earlier feature is better: cls@-2 has kNN top-1 60.0 %, pooled 50.0 %"
    ]
    entries[1]["knn"] = 51.0
    assert diagnose.findings(entries, features) == ["nothing looks wrong"]


def test_views_are_those_of_their_images_and_a_function_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (30, 1, 1, 3), dtype=np.uint8)
    images = ArraySource(np.tile(colours, (1, 8, 8, 1)), None)  # any crop of an image in one colour is the image
    task = whole_task(images, 0)
    config = diagnose.Config(view_images=24, views=4)
    outcome = diagnose.evaluate(task, config)
    assert outcome.metrics["alignment"] > 1e-3  # the colour jitter
    assert "knn" not in outcome.metrics
    assert diagnose.evaluate(task, config).metrics == outcome.metrics
    assert {"alignment", "lidar"}.isdisjoint(diagnose.evaluate(task, diagnose.Config(view_images=0)).metrics)
    monkeypatch.setattr(diagnose, "Jitter", lambda: None)
    plain = diagnose.evaluate(task, config).metrics
    assert plain["views_found"] == 100
    assert plain["alignment"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("count", "config", "message"),
    [
        (1, diagnose.Config(), "one image that can be read"),
        (9, diagnose.Config(images=1), "--images is 1"),
        (9, diagnose.Config(views=1), "--views 1"),
    ],
)
def test_what_cannot_be_diagnosed(count: int, config: diagnose.Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        diagnose.evaluate(whole_task(noisy_classes(count, 1)), config)


# ---- Commands on images without labels.


@pytest.fixture
def unlabelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for i in range(24):
        picture(i, (16, 20)).save(tmp_path / "photos" / f"{i:02d}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    exported.save(tmp_path / "run" / "encoder", small_encoder())
    return tmp_path


def run(folder: Path, name: str, *argv: object, code: int = 0) -> dict:
    words = [
        name,
        "--encoder",
        folder / "run",
        "--data",
        folder / "photos",
        "--out",
        folder / name,
        "--workers",
        0,
        *argv,
    ]
    assert main(list(map(str, words))) == code
    return json.loads((folder / name / "results.json").read_text()) if code == 0 else {}


@pytest.mark.parametrize("name", ["diagnose", "cluster", "retrieval", "embed"])
def test_no_labels_are_needed(name: str, unlabelled: Path, capsys: pytest.CaptureFixture) -> None:
    found = run(unlabelled, name)
    assert set(found) == {"evaluator", "metrics", "protocol", "baselines", "encoder", "seconds", "all"}
    assert found["metrics"]["n"] == 24
    assert (found["protocol"]["test"]["unlabelled"], len(found["protocol"]["test"]["bad"])) == (25, 1)
    assert "majority" not in found["baselines"]
    assert ("random" in found["baselines"]) == (name != "embed")
    shown = capsys.readouterr().out
    assert "(24 images)" in shown
    assert "1 images could not be read" in shown
    if name == "diagnose":
        assert [entry["feature"] for entry in found["all"]] == ["pooled", "cls@-3", "cls@-2", "cls"]
        assert found["metrics"]["findings"][-1] in shown


@pytest.mark.parametrize("name", ["diagnose", "cluster", "retrieval", "embed"])
def test_nan_features_are_an_error_and_one_image_is_told(
    name: str, unlabelled: Path, capsys: pytest.CaptureFixture
) -> None:
    spoilt = small_encoder()
    with torch.no_grad():
        spoilt.backbone.norm.weight[0] = torch.nan
    exported.save(unlabelled / "run" / "encoder", spoilt)
    run(unlabelled, name, code=2)
    assert "gives NaN or infinity" in capsys.readouterr().err
    exported.save(unlabelled / "run" / "encoder", small_encoder())
    for path in sorted((unlabelled / "photos").iterdir())[1:]:
        path.unlink()
    run(unlabelled, name, code=0 if name == "embed" else 2)
    shown = capsys.readouterr()
    assert shown.err.count("\n") == (name != "embed")
    assert name == "embed" or "one image that can be read" in shown.err or "images, which are 1" in shown.err


def test_the_split_is_named_by_test_split(unlabelled: Path, capsys: pytest.CaptureFixture) -> None:
    run(unlabelled, "diagnose", "--train-split", "train", code=2)
    assert "takes a single set of images: name it with --test-split train" in capsys.readouterr().err
    run(unlabelled, "diagnose", "--test-split", "val", code=2)
    assert "has no split 'val'" in capsys.readouterr().err
