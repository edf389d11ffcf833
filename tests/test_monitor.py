"""The collapse monitor: its two measures against closed forms, and what it says when."""

import math

import pytest
import torch

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
    assert monitor.features({"feature_std": 0.5, "feature_rank": 20.0}) == []
    said = monitor.features({"feature_std": 0.001, "feature_rank": 1.2})
    assert len(said) == 2
    assert "all images get nearly the same" in said[0]
    assert "1.2 directions" in said[1]
