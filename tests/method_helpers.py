"""What tests of several methods need beside `one_step`: steps, batches in float64, collapsed states."""

import torch
from torch import nn

from ssl_pretrain import pretext
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.conformance.one_step import BATCH, batch
from ssl_pretrain.parts.heads import PrototypeHead, Prototypes
from ssl_pretrain.pretext import Batch, Losses, Method, Step


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


# ---- Collapsed states


def make_constant_(encoder: Backbone) -> None:
    """A vision transformer gives every image, every view and every patch the same features, which are not zero."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
        encoder.norm.bias.copy_(torch.linspace(-1, 1, encoder.dim))


def make_zero_(layer: nn.Linear) -> None:
    """The layer gives zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def make_uniform_(prototypes: Prototypes) -> None:
    """No prototype is nearer than another: all are one vector."""
    with torch.no_grad():
        prototypes.weight.copy_(prototypes.weight[:1].expand_as(prototypes.weight).clone())


def make_certain_(head: PrototypeHead, prototype: int = 3) -> None:
    """The head gives every image the same vector: that of one prototype, to which all others are opposite."""
    make_zero_(head.mlp[-1])
    nn.init.ones_(head.mlp[-1].bias)
    make_nearest_(head.prototypes, prototype)


def make_nearest_(prototypes: Prototypes, prototype: int) -> None:
    """To a vector of ones, one prototype is equal and all others are opposite."""
    nn.init.constant_(prototypes.weight, -1)
    with torch.no_grad():
        prototypes.weight[prototype] = 1


def losses_of(method: Method, images: Batch | None = None) -> Losses:
    """The method's own forward, on the batch of `one_step` where there are no `images`."""
    with torch.no_grad():
        return method(batch(method, slice(0, BATCH)) if images is None else images, step())


def check_stated(method: Method, states: dict[str, Losses]) -> None:
    """Each term that `collapsed` names has the stated value in its collapsed state, as near as the monitor asks for.

    states: by term, the losses of a forward in the state that the words of `collapsed` describe; all terms, no others.
    """
    stated = method.collapsed(BATCH)
    assert states.keys() == stated.keys()
    for term, losses in states.items():
        value, words = stated[term]
        found = float(losses.total if term == "loss" else losses.terms[term])
        assert abs(found - value) <= 1e-3 * max(1, abs(value)), f"{term} is {found}, stated {value}: {words}"


def tiny_flags(method: str) -> list[str]:
    """The method's small knobs, as flags."""
    words = []
    for knob, value in pretext.load(method).recipe.tiny.items():
        name = "--" + knob.replace("_", "-")
        if isinstance(value, bool):
            words.append(name if value else "--no-" + name[2:])
        else:
            words += [name, *map(str, value if isinstance(value, tuple) else [value])]
    return words
