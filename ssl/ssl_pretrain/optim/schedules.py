"""Learning rate and weight decay as functions of the step, without any state to save."""

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    steps: int,
    peak: float,
    final: float,
    warmup: int,
    start: float = 0.0,
    kind: Literal["cosine", "constant"],
    cooldown: int = 0,
) -> float:
    """The rate of step `step` of `steps` (from 0).

    Warm-up: linear over the first `warmup` steps to the peak, from the rate `start` one step before the first. From 0 the
    first step has peak / warmup, so no step has the rate 0. Then "cosine": half a cosine to `final` (SGDR, Loshchilov &
    Hutter 2017, one period); or "constant": the peak until the last `cooldown` steps, which fall linearly to `final`
    (warm-up, stable, decay). Both reach `final` at `steps`, one past the last.
    """
    if step < warmup:
        return start + (peak - start) * (step + 1) / warmup
    if kind == "cosine":
        return cosine((step - warmup) / max(1, steps - warmup), peak, final)
    left = steps - step
    return peak if left >= cooldown else final + (peak - final) * left / cooldown


def cosine(share: float, start: float, end: float) -> float:
    """Half a cosine from `start` (share 0) to `end` (share 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
