"""The collapse monitor: its two measures against closed forms, and what it says when."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, metrics

from ssl_pretrain.loop import probes
from ssl_pretrain.loop.monitor import CollapseMonitor, feature_statistics


def test_spread_of_known_features() -> None:
    same = feature_statistics(torch.ones(64, 8))
    assert same["feature_std"] == pytest.approx(0.0, abs=1e-9)
    generator = torch.Generator().manual_seed(0)
    sphere = feature_statistics(torch.randn(4096, 16, generator=generator))
    assert sphere["feature_std"] == pytest.approx(1.0, abs=0.02)
    assert sphere["feature_rank"] == pytest.approx(16.0, abs=0.1)
    line = torch.randn(256, 1, generator=generator).double() * torch.randn(1, 16, generator=generator).double()
    assert feature_statistics(line)["feature_rank"] == pytest.approx(1.0, abs=1e-6)


def test_rank_is_the_exponential_of_the_entropy_of_the_singular_values() -> None:
    u, _ = torch.linalg.qr(torch.randn(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    u = u - u.mean(0)
    u, _ = torch.linalg.qr(u)  # orthonormal columns of mean zero
    singular = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    p = (singular / 8).tolist()
    expected = math.exp(-sum(x * math.log(x) for x in p))
    assert feature_statistics(u * singular)["feature_rank"] == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_stays_at_its_collapsed_value_is_named_once() -> None:
    monitor = CollapseMonitor({"loss": (math.log(1024), "the teacher is uniform")})
    stuck = {"loss": math.log(1024) + 1e-3}
    assert [w for _ in range(10) for w in monitor.losses(stuck, warm=False)] == []
    said = [w for _ in range(10) for w in monitor.losses(stuck, warm=True)]
    assert len(said) == 1
    assert "the teacher is uniform" in said[0]
    assert "6.93" in said[0]
    assert monitor.losses({"loss": 3.0}, warm=True) == []
    assert len([w for _ in range(5) for w in monitor.losses(stuck, warm=True)]) == 1


def test_passing_the_value_on_the_way_down_is_no_alarm() -> None:
    monitor = CollapseMonitor({"loss": (1.0, "nothing is learned")})
    falling = [1.2, 1.1, 1.0005, 1.0, 0.9995, 0.99, 0.9]
    assert [w for loss in falling for w in monitor.losses({"loss": loss}, warm=True)] == []


def test_collapsed_features_are_said_in_words() -> None:
    monitor = CollapseMonitor({})
    assert monitor.features({"feature_std": 0.5, "feature_rank": 20.0}, 256) == []
    said = monitor.features({"feature_std": 0.001, "feature_rank": 1.2}, 256)
    assert len(said) == 2
    assert "all images get nearly the same" in said[0]
    assert "1.2 directions" in said[1]


def test_features_that_are_not_finite_are_said_in_words_and_end_nothing() -> None:
    monitor = CollapseMonitor({})
    for harm in (math.nan, math.inf):
        features = torch.randn(64, 8)
        features[3, 2] = harm
        seen = feature_statistics(features)
        assert all(map(math.isnan, seen.values()))
    (said,) = monitor.features(seen, 64)
    assert "features are not finite" in said
    assert monitor.features(seen, 64) == []


def test_nothing_is_said_on_few_images() -> None:
    monitor = CollapseMonitor({})
    assert monitor.features({"feature_std": 0.0, "feature_rank": 1.0}, 31) == []
    assert monitor.features({"feature_std": math.nan, "feature_rank": math.nan}, 8) == []
    assert len(monitor.features({"feature_std": 0.0, "feature_rank": 1.0}, 32)) == 2


WATCHED = [*TINY[: TINY.index("--batch-size")], *TINY[TINY.index("--decoder-dim") : TINY.index("--monitor-every")],
           "--picture-every", "0", "--precision", "fp32", "--monitor-every", "1", "--steps", "2", "--workers", "0",
           "--no-score", "--log-every", "1"]  # fmt: skip


def seen_by(run: Path) -> list[tuple[float, float]]:
    lines = [line for line in metrics(run) if "features/feature_rank" in line]
    return [(line["features/feature_rank"], line["features/feature_std"]) for line in lines]


@pytest.mark.slow
def test_the_same_images_are_watched_however_the_batch_is_shared(
    photos: Path, tmp_path: Path, pretrain_here: Callable, pretrain: Callable
) -> None:
    same = ["--method", "mae", "--data", photos, *WATCHED, "--batch-size", 64]
    pretrain_here(*same, "--out", tmp_path / "one")
    pretrain_here(*same, "--out", tmp_path / "sixteen", "--accumulate", 16)
    pretrain(*same, "--out", tmp_path / "two", "--nproc", 2, "--accumulate", 2)
    assert len(seen_by(tmp_path / "one")) == 2
    for other in ("sixteen", "two"):
        for found, expected in zip(seen_by(tmp_path / other), seen_by(tmp_path / "one"), strict=True):
            assert found == pytest.approx(expected, rel=1e-4)
        assert not (tmp_path / other / "warnings.log").exists()


@pytest.mark.parametrize(("batch", "accumulate", "images"), [(512, 2, 256), (320, 5, 256), (8, 2, 8)])
def test_of_a_batch_the_first_images_are_watched(
    batch: int,
    accumulate: int,
    images: int,
    photos: Path,
    tmp_path: Path,
    pretrain_here: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = []

    def few(features: torch.Tensor) -> dict[str, float]:
        counted.append(len(features))
        return {"feature_rank": 1.0, "feature_std": math.nan}

    monkeypatch.setattr(probes, "feature_statistics", few)
    same = ["--method", "mae", "--data", photos, *WATCHED, "--batch-size", batch, "--accumulate", accumulate]
    pretrain_here(*same, "--steps", 1, "--out", tmp_path / "run")
    assert counted == [images]
    assert [line["features/feature_std"] for line in metrics(tmp_path / "run") if "features/feature_std" in line] == [
        None
    ]
    assert (tmp_path / "run" / "warnings.log").exists() == (images >= 32)


def test_a_run_whose_features_are_not_finite_goes_on_and_says_so(
    photos: Path, tmp_path: Path, pretrain_here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = probes.exported_features
    monkeypatch.setattr(probes, "exported_features", lambda *args: true(*args) * math.nan)
    pretrain_here("--method", "mae", "--data", photos, *WATCHED, "--batch-size", 32, "--out", tmp_path / "run")
    assert seen_by(tmp_path / "run") == [(None, None)] * 2
    (warning,) = (tmp_path / "run" / "warnings.log").read_text().splitlines()
    assert "features are not finite" in warning
