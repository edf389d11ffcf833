"""Learning rate and weight decay as functions of the step, without any state to save."""

import math
from collections.abc import Sequence
from typing import Literal


def learning_rate(
    step: int,
    *,
    steps: int,
    peak: float,
    final: float,
    warmup: int,
    start: float = 0.0,
    kind: Literal["cosine", "constant", "step"],
    stretch: float = 1.0,
    cooldown: int = 0,
    shape: Literal["linear", "sqrt"] = "linear",
    milestones: Sequence[float] = (),
    factor: float = 0.1,
) -> float:
    """The rate of step `step` of `steps` (from 0).

    Warm-up: linear over the first `warmup` steps to the peak, from the rate `start` one step before the first. From 0 the
    first step has peak / warmup, so no step has the rate 0. Then one of:

    "cosine": half a cosine to `final` (SGDR, Loshchilov & Hutter 2017, one period), which it reaches at `steps`, one past
    the last; with `stretch` at `stretch * steps`, so that the run ends before it (V-JEPA, Bardes et al., 2024, section 3).
    "constant": the peak until the last `cooldown` steps, which fall to `final` at `steps` (warm-up, stable, decay):
    linearly, or with "sqrt" as 1 - sqrt(share of the cooldown) (Haegele et al., "Scaling Laws and Compute-Optimal
    Training Beyond Fixed Training Durations", 2024, section 3).
    "step": the peak, multiplied by `factor` from the step nearest to each of the `milestones`, shares of `steps`, on.
    """
    if step < warmup:
        return start + (peak - start) * (step + 1) / warmup
    if kind == "cosine":
        return cosine((step - warmup) / max(1, steps * stretch - warmup), peak, final)
    if kind == "step":
        return peak * factor ** sum(step >= round(share * steps) for share in milestones)
    left = steps - step
    if left >= cooldown:
        return peak
    if shape == "sqrt":
        return final + (peak - final) * (1 - math.sqrt(1 - left / cooldown))
    return final + (peak - final) * left / cooldown


def cosine(share: float, start: float, end: float) -> float:
    """Half a cosine from `start` (share 0) to `end` (share 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
