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


def test_a_cosine_that_is_longer_than_the_run() -> None:
    """V-JEPA's: over 1.25 times the run. Its end is not reached."""
    rates = [learning_rate(s, steps=80, peak=1.0, final=0.1, warmup=20, kind="cosine", stretch=1.25) for s in range(81)]
    whole = [learning_rate(s, steps=100, peak=1.0, final=0.1, warmup=20, kind="cosine") for s in range(81)]
    assert rates == whole
    assert rates[80] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 60 / 80)) / 2)
    assert rates[80] > 0.2


def test_steps_at_shares_of_the_run() -> None:
    """SimMIM's on Swin: a tenth from 700 of 800 epochs on; and two changes, of which one is not at a whole step."""
    rates = [
        learning_rate(s, steps=800, peak=2.0, final=0.0, warmup=10, start=0.5, kind="step", milestones=(0.875,))
        for s in range(800)
    ]
    assert rates[:10] == pytest.approx([0.5 + 1.5 * (s + 1) / 10 for s in range(10)])
    assert rates[10:700] == [2.0] * 690
    assert rates[700:] == pytest.approx([0.2] * 100)
    two = [
        learning_rate(s, steps=7, peak=1.0, final=0.0, warmup=0, kind="step", milestones=(0.5, 0.8), factor=0.5)
        for s in range(7)
    ]
    assert two == [1.0] * 4 + [0.5] * 2 + [0.25]  # 3.5 is rounded to the even 4, 5.6 to 6


def test_a_cooldown_by_the_square_root() -> None:
    rates = [
        learning_rate(s, steps=50, peak=1.0, final=0.2, warmup=5, kind="constant", cooldown=16, shape="sqrt")
        for s in range(51)
    ]
    assert rates[5:35] == [1.0] * 30
    assert rates[34:] == pytest.approx([0.2 + 0.8 * (1 - math.sqrt(i / 16)) for i in range(17)])
    assert rates[38] == pytest.approx(0.6)  # a quarter of the cooldown: half of the way
