"""Transforms of targets that need statistics of the data: standardised features, PHI-S, and k-means ids.

They are taken from the first images of a run, in `after_step`. So they cost no pass over the data, are state as all other
(a resumed run has their bits), and are the same on any number of processes and micro-batches. Then they are fixed: a
rotation or clusters that went on to change would be another target in each step. Until then there is no target, and a
method sets its loss to 0 (`Fitted.ready`).

Shapes: B images, N patches of each, D channels of a feature, n = B * N, K clusters, P parts of a batch (one for each
micro-batch of this process).
"""

from abc import ABC, abstractmethod
from typing import Literal, final

import torch
from torch import Tensor, nn

from .. import distributed
from ..pretext import Step
from .codebook import kmeans, sums
from .hadamard import hadamard

CANDIDATES = 64  # features of an image from which k-means starts, and that it learns from
LEAST_SHARE = 1e-6  # of the mean variance: channels with less are not enlarged further


class Fitted(nn.Module, ABC):
    """A transform that is learned from the first `images` images, without gradients.

    Attributes: `ready` () bool, whether it was; `seen` () int64, images so far.
    """

    ready: Tensor
    seen: Tensor

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images
        self._known = False  # as `ready`, once it was read from the device
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @property
    def learning(self) -> bool:
        """Whether `carry` may still give something."""
        return not self._known

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """The targets of features (..., D)."""

    @final
    def carry(self, features: Tensor, step: Step) -> dict[str, Tensor]:
        """What `after_step` needs of a batch's features (B, N, D): for `Losses.carry`. Nothing once it is known that
        nothing is learned any more."""
        return {} if self._known else self._carry(features.detach().float(), step)

    @final
    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Learn from the batch of all processes, as long as it is not ready."""
        # Read from the device until it is true, in the first steps.
        self._known = self._known or bool(self.ready)
        if self._known:
            return
        first = not bool(self.seen)
        for name, value in self._learned(step, first).items():
            old: Tensor = getattr(self, name)
            old.copy_(torch.where(step.ok, value, old))
        self.seen.copy_(torch.where(step.ok, self.seen + step.batch_size, self.seen))
        if bool(self.seen >= self.images):
            self._finish()
            self.ready.fill_(True)
            self._known = True

    @abstractmethod
    def _carry(self, features: Tensor, step: Step) -> dict[str, Tensor]: ...

    @abstractmethod
    def _learned(self, step: Step, first: bool) -> dict[str, Tensor]:
        """New values of buffers, by name. first: nothing was learned before."""

    def _finish(self) -> None:
        """Make what is computed once, from the buffers."""


@final
class Whitener(Fitted):
    """Features with mean 0 and variance 1.

    kind "standardise": each channel over its own standard deviation. "phi_s" (PHI-S; Ranzinger et al., 2024): a rotation
    in which all channels have the same variance, and one scale for all: H U^T (x - mean) / sqrt(mean eigenvalue), with the
    eigenvectors U of the covariance and a Hadamard matrix H. So distances keep their proportions.
    """

    count: Tensor
    mean: Tensor
    products: Tensor
    transform: Tensor

    def __init__(self, width: int, kind: Literal["standardise", "phi_s"], images: int) -> None:
        super().__init__(images)
        self.kind = kind
        shape = (width,) if kind == "standardise" else (width, width)
        self.register_buffer("count", torch.zeros(()))  # features
        self.register_buffer("mean", torch.zeros(width))
        # Sums of squared deviations from the mean, or of products of them; the rows of the transform are inputs.
        self.register_buffer("products", torch.zeros(shape))
        self.register_buffer("transform", torch.zeros(shape))

    def forward(self, features: Tensor) -> Tensor:
        """Features (..., D) to float32 (..., D). Unchanged until it is ready."""
        features = features.float()
        with torch.autocast(features.device.type, enabled=False):
            centred = features - self.mean
            moved = centred * self.transform if self.kind == "standardise" else centred @ self.transform
        return torch.where(self.ready, moved, features)

    def _carry(self, features: Tensor, step: Step) -> dict[str, Tensor]:
        rows = features.flatten(0, -2)
        mean = rows.mean(0)
        return {
            "target_count": torch.full((1,), float(len(rows)), device=rows.device),
            "target_mean": mean[None],
            "target_products": self._products(rows - mean, torch.ones((), device=rows.device))[None],
        }

    def _products(self, centred: Tensor, weight: Tensor) -> Tensor:
        """The weighted sum of squares (D,) or of products (D, D) of rows (m, D); weight () or (m, 1)."""
        with torch.autocast(centred.device.type, enabled=False):
            if self.kind == "standardise":
                return (weight * centred.square()).sum(0)
            return (weight * centred).T @ centred

    def _learned(self, step: Step, first: bool) -> dict[str, Tensor]:
        """Statistics of parts are merged by Chan's formula, which subtracts no large squares."""
        counts, means = step.carried["target_count"], step.carried["target_mean"]
        added = distributed.all_reduce_(counts.sum())
        mean = distributed.all_reduce_((counts[:, None] * means).sum(0)) / added
        products = step.carried["target_products"].sum(0) + self._products(means - mean, counts[:, None])
        products = distributed.all_reduce_(products)
        count = self.count + added
        apart = mean - self.mean
        return {
            "count": count,
            "mean": self.mean + apart * (added / count),
            "products": self.products + products + self._products(apart[None], self.count * added / count),
        }

    def _finish(self) -> None:
        if self.kind == "standardise":
            variance = self.products / self.count
            floor = (LEAST_SHARE * variance.mean()).clamp_min(torch.finfo(variance.dtype).tiny)
            self.transform.copy_(variance.clamp_min(floor).rsqrt())
            return
        # On the CPU in float64, and the first process's: eigenvectors have no unique sign.
        covariance = (self.products / self.count).double().cpu()
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        scale = values.clamp_min(0).mean().clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        found = (vectors @ hadamard(len(values)).T / scale).to(self.transform.dtype).to(self.transform.device)
        self.transform.copy_(distributed.all_reduce_(found if distributed.rank() == 0 else torch.zeros_like(found)))


@final
class Clusters(Fitted):
    """Ids of the nearest of K centres: k-means of the first batch, then each batch moves the centres to the running means
    of the features that were nearest to them (mini-batch k-means; Sculley, 2010)."""

    centres: Tensor
    counts: Tensor

    def __init__(self, width: int, size: int, images: int) -> None:
        super().__init__(images)
        self.register_buffer("centres", torch.zeros(size, width))
        self.register_buffer("counts", torch.zeros(size))

    def forward(self, features: Tensor) -> Tensor:
        """Features (..., D) to ids (...) int64; of equal distances the first."""
        rows = features.float()
        with torch.autocast(rows.device.type, enabled=False):
            return (rows @ self.centres.T - 0.5 * self.centres.square().sum(1)).argmax(-1)

    def _carry(self, features: Tensor, step: Step) -> dict[str, Tensor]:
        order = torch.argsort(step.rand(features.shape[1]), dim=1)[:, :CANDIDATES]
        rows = torch.arange(step.batch_size, device=features.device)[step.rows]
        chosen = features.gather(1, order[..., None].expand(-1, -1, features.shape[2]))
        return {"target_features": chosen, "target_rows": rows}

    def _learned(self, step: Step, first: bool) -> dict[str, Tensor]:
        order = torch.argsort(distributed.gather(step.carried["target_rows"]))  # of the global batch, on all processes
        rows = distributed.gather(step.carried["target_features"]).index_select(0, order).flatten(0, 1)
        if first:
            centres, counts = kmeans(rows, len(self.centres), step.generator(), unit=False)
            return {"centres": centres, "counts": counts}
        added, total = sums(rows, self(rows), len(self.centres))
        counts = self.counts + added
        moved = (self.centres * self.counts[:, None] + total) / counts.clamp_min(1)[:, None]
        return {"centres": torch.where((added > 0)[:, None], moved, self.centres), "counts": counts}
