"""Collapse, looked for while it happens and said in plain words. Shapes: n images, D features."""

import math

import torch
from torch import Tensor


def feature_statistics(features: Tensor) -> dict[str, float]:
    """How much of the feature space a batch fills; `features` (n, D), any dtype.

    "rank": effective rank of the centred features, exp of the entropy of the normalised singular values (RankMe, Garrido
    et al. 2023, eq. 1, on centred features), between 1 and min(n, D). "std": mean over dimensions of the standard
    deviation of the L2-normalised features, times sqrt(D): 1 where they fill the sphere, 0 where all images are alike
    (SimSiam, Chen & He 2021, section 4.1). Both are NaN where a feature is not finite, or of fewer than two images.
    """
    features = features.double()
    if len(features) < 2 or not bool(features.isfinite().all()):
        return {"feature_rank": math.nan, "feature_std": math.nan}
    unit = torch.nn.functional.normalize(features, dim=1)
    std = unit.std(0).mean() * features.shape[1] ** 0.5
    singular = torch.linalg.svdvals(features - features.mean(0))
    share = singular / singular.sum().clamp_min(1e-300)
    rank = torch.exp(-(share * share.clamp_min(1e-300).log()).sum())
    return {"feature_rank": float(rank), "feature_std": float(std)}


class CollapseMonitor:
    """Turns what a run logs into warnings, each said once until it clears.

    collapsed: by loss term, the value of a method that learned nothing and what that means (`Method.collapsed`).
    """

    FEWEST = 32  # images whose features say something: few images vary in few directions, collapsed or not
    PATIENCE = 5  # logs in a row, so that passing a value on the way down is no alarm

    def __init__(self, collapsed: dict[str, tuple[float, str]]) -> None:
        self.collapsed = collapsed
        self._near: dict[str, int] = {}
        self._said: set[str] = set()

    def losses(self, terms: dict[str, float], warm: bool) -> list[str]:
        """Warnings for this log's loss terms; `warm` once the warm-up is over (before it nothing is expected)."""
        warnings = []
        for name, (value, meaning) in self.collapsed.items():
            if name not in terms:
                continue
            near = warm and abs(terms[name] - value) <= 1e-3 * max(1.0, abs(value))
            self._near[name] = self._near.get(name, 0) + 1 if near else 0
            if self._near[name] >= self.PATIENCE:
                warnings += self._once(name, f"{name} stays at {terms[name]:.4f}: {meaning} ({value:.4f})")
            elif not near:
                self._said.discard(name)
        return warnings

    def features(self, seen: dict[str, float], images: int) -> list[str]:
        """Warnings for what `feature_statistics` measured on so many images; none for fewer than FEWEST."""
        warnings: list[str] = []
        if images < self.FEWEST:
            return warnings
        if not all(map(math.isfinite, seen.values())):
            return self._once("finite", "features are not finite: the encoder gives NaN or infinity for some images")
        self._said.discard("finite")
        if seen["feature_std"] < 0.01:
            warnings += self._once(
                "std", f"features collapse: all images get nearly the same one (spread {seen['feature_std']:.4f} of 1)"
            )
        else:
            self._said.discard("std")
        if seen["feature_rank"] < 2.0:
            warnings += self._once(
                "rank", f"features collapse: they vary in {seen['feature_rank']:.1f} directions (effective rank)"
            )
        else:
            self._said.discard("rank")
        return warnings

    def _once(self, name: str, text: str) -> list[str]:
        if name in self._said:
            return []
        self._said.add(name)
        return [text]
