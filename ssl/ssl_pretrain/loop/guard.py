"""What the scores of a run say while it trains: the best step so far, and whether the encoder has become worse than the
weights that it started from.

The record of all scores that matter later is in every checkpoint. So a resumed run knows what was known at that step.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from ..config import Resolved

DOMAIN, ORIGINAL, HELD_OUT = "knn", "knn_original", "val"  # groups of scores, as in metrics.jsonl
LOWER_IS_BETTER = frozenset({HELD_OUT})
BEST = "best"  # the folder in a run's


@dataclass
class Record:
    """What is known of one group of scores. Plain data."""

    images: str  # fingerprint of the images: scores of other images are not comparable
    start: float | None = None  # the score of the start weights, at step 0; None for random weights
    best: float | None = None
    best_step: int = 0
    last: float | None = None
    below: bool = False  # whether the warning was given and the score has not recovered


@final
class Guard:
    """Takes every score of the first process, and says what it means. Other processes hold one that gets no score."""

    def __init__(self, run: Resolved, images: Mapping[str, str], before: Mapping[str, Any]) -> None:
        """images: the fingerprint of the images of each group that is scored; before: `record` in the checkpoint that the
        run continues from. Scores of other images than before are forgotten."""
        self.run = run
        self._records = {group: Record(of) for group, of in images.items()}
        known = {field.name for field in dataclasses.fields(Record)}
        for group, facts in before.items():
            if group not in images or facts.get("images") == images[group]:
                self._records[group] = Record(**{name: value for name, value in facts.items() if name in known})

    @property
    def record(self) -> dict[str, Any]:
        """All that is known, as plain data, for checkpoints and the manifest."""
        return {group: dataclasses.asdict(each) for group, each in self._records.items() if each.last is not None}

    @property
    def best(self) -> Record | None:
        """What is known of the scores of --keep-best; None without that, or before the first score."""
        found = None if self.run.keep_best is None else self._records.get(self.run.keep_best)
        return None if found is None or found.best is None else found

    def forget_best(self) -> None:
        """Look for the best step from here on: the one that is known cannot be kept any more."""
        assert self.run.keep_best is not None
        self._records[self.run.keep_best].best = None

    def judge(self, group: str, score: float, step: int) -> list[str]:
        """Take a score after `step` steps; returns what is to be said about it, each once until the score recovers."""
        known = self._records[group]
        if step == 0:
            known.start = score
        sign = -1 if group in LOWER_IS_BETTER else 1
        if math.isfinite(score):
            known.last = score
            if known.best is None or sign * score > sign * known.best:  # of equal ones the first
                known.best, known.best_step = score, step
        if known.start is None or group not in (DOMAIN, ORIGINAL):
            return []
        lost = 0.0 if group == DOMAIN else self.run.knn_drop
        warm = group == ORIGINAL or step > self.run.warmup_steps
        below = score < known.start - lost and (warm or known.below)
        new, known.below = below and not known.below, below
        return [self._sentence(group, score)] if new else []

    def _sentence(self, group: str, score: float) -> str:
        known, domain = self._records[group], self._records.get(DOMAIN)
        if group == DOMAIN:
            text = (
                f"the kNN accuracy is {score:.1f} %, below the {known.start:.1f} % of the start weights: so far training "
                f"has made the encoder worse for these images"
            )
        else:
            text = (
                f"the kNN accuracy on --knn-original fell from {known.start:.1f} % with the start weights to "
                f"{score:.1f} %, by more than --knn-drop {self.run.knn_drop:g}: the encoder forgets what it knew"
            )
        named = known if domain is None or domain.best is None else domain
        of = "" if named is known else " on the run's domain"
        where = f", kept in {self.run.out / BEST}" if self.run.keep_best == DOMAIN and named is domain else ""
        at = f"step {named.best_step}" if named.best_step else "step 0, the start weights"
        return f"{text}. The best{of} was {named.best:.1f} % at {at}{where}. Lower --lr, or train for fewer --steps"
