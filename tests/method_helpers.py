"""What tests of several methods need beside `one_step`: steps, batches in float64."""

import torch
from one_step import BATCH, batch
from torch import nn

from ssl_pretrain.pretext import Batch, Method, Step


def step(number: int = 3, ok: bool = True) -> Step:
    """A step of ten with the batch of `one_step`."""
    made = Step(step=number, total=10, noise=1, rows=slice(0, BATCH), batch_size=BATCH, device=torch.device("cpu"))
    made.ok = torch.tensor(ok)
    return made


def double_batch(method: Method) -> Batch:
    """The batch of `one_step` in float64."""
    made = batch(method, slice(0, BATCH))
    made.views = {name: view.double() for name, view in made.views.items()}
    return made


def perturb_(module: nn.Module) -> None:
    """Changes every parameter, so that a teacher is unlike its student."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
