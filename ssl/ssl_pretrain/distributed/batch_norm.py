"""Batch normalisation with statistics over the global batch, that is over all processes' samples, on CPU and GPU.

Shapes: B images of this process, C channels, ... any further sizes, W processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from . import gather, size


class _GlobalBatchNorm(_BatchNorm):
    """Batch normalisation (Ioffe & Szegedy, 2015) whose training statistics are those of the global batch, with
    gradients through them. Entries of the state have torch's names. A batch that is not finite does not change the
    running statistics, so a skipped step changes nothing."""

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """(B, C, ...) to the same shape; every process must have the same number of values per channel.

        visible: (B, 1, ...) bool, the positions that exist, of any number in each process. Statistics are those of them,
        and the result is 0 at all others.
        """
        self._check_input_dim(x)
        if visible is not None:
            return self._of_visible(x, visible)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        running = torch.stack([self.running_mean, self.running_var])
        mean, var = running.unbind()
        if size() == 1:
            out = F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        else:
            out = self._across(x, (mean, var))
        self._keep(running)
        return out

    @torch.no_grad()
    def _keep(self, running: Tensor) -> None:
        """Take new running statistics (2, C), the mean and the variance, if all of them are finite. Both at once and with
        few kernels, because a network has many layers."""
        assert self.running_mean is not None
        assert self.running_var is not None
        kept = [self.running_mean, self.running_var]
        finite = (running * 0 == 0).all()
        torch._foreach_copy_(kept, list(torch.where(finite, running, torch.stack(kept)).unbind()))

    def _of_visible(self, x: Tensor, visible: Tensor) -> Tensor:
        """`forward` over the positions `visible` (B, 1, ...) of all processes. Their number is not known on the host, so
        they are not gathered: the sums are over all positions, with zeros at the others."""
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.training:
            count = visible.sum().to(x32.dtype)
            mean = torch.where(visible, x32, 0).sum(axes) / count.clamp(min=1)
            away = torch.where(visible, x32 - mean.view(shape), 0)
            var = away.square().sum(axes) / count.clamp(min=1)
            if size() > 1:
                # As in `_across`, with the processes weighted by their numbers of positions.
                counts, means, variances = gather(torch.stack([count.expand_as(mean), mean, var])[None]).unbind(1)
                count = counts[:, 0].sum()
                shares = counts / count.clamp(min=1)
                mean = (shares * means).sum(0)
                var = (shares * (variances + (means - mean).square())).sum(0)
            with torch.no_grad():
                unbiased = var * (count / (count - 1).clamp(min=1))
                now = torch.stack([mean, unbiased]).to(self.running_mean.dtype)
                self._keep(torch.stack([self.running_mean, self.running_var]).lerp(now, self.momentum or 0.0))
        else:
            mean, var = self.running_mean, self.running_var
        scale, shift = torch.rsqrt(var + self.eps), -mean * torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        out = torch.where(visible, torch.addcmul(shift.view(shape), x32, scale.view(shape)), 0)
        return out.to(x.dtype)

    def _across(self, x: Tensor, running: tuple[Tensor, Tensor]) -> Tensor:
        """As F.batch_norm in training, over all processes; updates `running` (mean, variance) in place."""
        axes = [axis for axis in range(x.ndim) if axis != 1]
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(x32, dim=axes, correction=0)
        # Means and variances instead of sums of squares: no cancellation (Chan et al., 1979). One collective.
        means, variances = gather(torch.stack([mean, var])[None]).unbind(1)  # (W, C) each
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)
        with torch.no_grad():
            n = x.numel() // x.shape[1] * len(means)
            for kept, new in zip(running, (mean, var * (n / max(n - 1, 1))), strict=True):
                kept.lerp_(new.to(kept.dtype), self.momentum or 0.0)
        shape = [1, -1] + [1] * (x.ndim - 2)
        scale = torch.rsqrt(var + self.eps)
        out = (x32 - mean.view(shape)) * scale.view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


class BatchNorm1d(_GlobalBatchNorm):
    """Over vectors (B, C) or sequences (B, C, L). See `_GlobalBatchNorm`."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim not in (2, 3):
            raise ValueError(f"BatchNorm1d takes (B, C) or (B, C, L), not {tuple(x.shape)}")


class BatchNorm2d(_GlobalBatchNorm):
    """Over images (B, C, H, W). See `_GlobalBatchNorm`."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim != 4:
            raise ValueError(f"BatchNorm2d takes (B, C, H, W), not {tuple(x.shape)}")


def globalize(module: nn.Module, others: dict[type, type] | None = None) -> None:
    """Give the batch norms of a module of another library the statistics of the global batch, in place. Parameters,
    buffers and their names stay.

    others: classes of the library, and for each the subclass of one of ours that replaces it. Raises UserError for a
    batch norm of any other class, which may compute something else, and for one without running statistics.
    """
    kinds = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, **(others or {})}
    for name, part in module.named_modules():
        if not isinstance(part, _BatchNorm) or isinstance(part, _GlobalBatchNorm):
            continue
        if type(part) not in kinds or part.running_mean is None or part.momentum is None:
            raise UserError(
                f"{name} of the encoder is a {type(part).__name__} that cannot have the statistics of all processes: use "
                f"torch's BatchNorm1d or BatchNorm2d with running statistics and a momentum"
            )
        part.__class__ = kinds[type(part)]  # our classes have no attributes of their own


def couples_samples(module: nn.Module) -> bool:
    """Whether a module's output for one image depends on the other images of its batch."""
    known: tuple[Any, ...] = (_BatchNorm,)
    return any(isinstance(part, known) for part in module.modules())


@contextmanager
def constant_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, forwards of a module leave the running statistics of its batch norms as they are. The result is the same:
    in training it is made from the batch."""
    norms = [(part, part.momentum) for part in module.modules() if isinstance(part, _BatchNorm)]
    try:
        for norm, _ in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum
