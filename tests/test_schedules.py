"""Learning-rate schedules against the formulas, point by point."""

import math

import pytest

from ssl_pretrain.optim.schedules import cosine, learning_rate


def test_warmup_then_half_a_cosine() -> None:
    rates = [learning_rate(s, steps=100, peak=2.0, final=0.5, warmup=10, kind="cosine") for s in range(101)]
    for s in range(10):
        assert rates[s] == pytest.approx(2.0 * (s + 1) / 10)
    for s in range(10, 101):
        assert rates[s] == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * (s - 10) / 90)) / 2)
    assert rates[10] == 2.0
    assert rates[100] == 0.5


def test_warmup_from_a_rate() -> None:
    """I-JEPA's: 2e-4 before the first of 40 epochs, 1e-3 at the end of the last."""
    rates = [learning_rate(s, steps=100, peak=1e-3, final=0.0, warmup=40, start=2e-4, kind="cosine") for s in range(41)]
    assert rates[:40] == pytest.approx([2e-4 + 8e-4 * (s + 1) / 40 for s in range(40)])
    assert rates[39] == rates[40] == 1e-3


def test_constant_with_cooldown() -> None:
    rates = [learning_rate(s, steps=50, peak=1.0, final=0.0, warmup=5, kind="constant", cooldown=10) for s in range(51)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:41] == [1.0] * 36
    assert rates[40:] == pytest.approx([1 - i / 10 for i in range(11)])


def test_without_warmup_or_cooldown() -> None:
    assert learning_rate(0, steps=3, peak=1.0, final=0.0, warmup=0, kind="cosine") == 1.0
    assert learning_rate(2, steps=3, peak=1.0, final=0.0, warmup=0, kind="constant") == 1.0


def test_cosine_ends_where_it_says() -> None:
    assert (cosine(0.0, 0.04, 0.4), cosine(1.0, 0.04, 0.4)) == pytest.approx((0.04, 0.4))
    assert cosine(0.5, 0.0, 1.0) == pytest.approx(0.5)
    assert cosine(2.0, 0.04, 0.4) == pytest.approx(0.4)
