"""What encoders share that wrap a module of another library or of the user's own code.

Shapes: B images, D channels of the features, N patches on an (h, w) grid, P prefix tokens, L = P + N tokens.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .backbone import Features

INNER = "model"  # the attribute that holds the wrapped module


def use_inner_names(wrapper: nn.Module) -> None:
    """From now on the names in `wrapper.state_dict()` are those of the wrapped module: "conv1.weight" instead of
    "model.conv1.weight". So weights in checkpoints and exports have the library's names."""
    wrapper.register_state_dict_post_hook(_inner_names)
    wrapper.register_load_state_dict_pre_hook(_outer_names)


def _inner_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Remove the wrapper's part of the names, in their order."""
    outer = f"{prefix}{INNER}."
    for name in [name for name in state if name.startswith(outer)]:
        state[prefix + name.removeprefix(outer)] = state.pop(name)


def _outer_names(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """The opposite of `_inner_names`."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}{INNER}.{name.removeprefix(prefix)}"] = state.pop(name)


def dropouts(module: nn.Module) -> dict[str, _DropoutNd]:
    """The dropout layers of a module that drop anything, by name. Their noise comes from the process's random state, so
    several processes and a continued run would not draw the same."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, _DropoutNd)}
    return {name: part for name, part in found.items() if part.p > 0}


def of_map(x: Tensor, pooled: Tensor) -> Features:
    """Features of a map (B, D, h, w)."""
    return Features(cls=None, patches=x.flatten(2).mT, grid=(x.shape[2], x.shape[3]), pooled=pooled)


def of_tokens(x: Tensor, images: Tensor, prefix: int, has_cls: bool, pooled: Tensor | None) -> Features:
    """Features of tokens (B, L, D). `prefix` of them are before the patches; the first of those is CLS if there is one.
    If the library defines no pooling, it is the CLS token, or else the mean of the patches. Raises ValueError for a
    number of patches that fills no grid."""
    cls, patches = x[:, 0] if has_cls else None, x[:, prefix:]
    if pooled is None:
        pooled = patches.mean(1) if cls is None else cls
    grid = square_grid(patches.shape[1], images.shape[2], images.shape[3])
    tokens = (x[:, :prefix], x) if prefix else (None, None)
    return Features(cls=cls, patches=patches, grid=grid, pooled=pooled, prefix=tokens[0], tokens=tokens[1])


def square_grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """The grid (h, w) of that number of square patches of an image. Raises ValueError if there is none."""
    for h in range(1, patches + 1):
        if patches % h == 0 and h * width == patches // h * height:
            return h, patches // h
    raise ValueError(f"{patches} patches do not fill an image of {height} x {width} pixels with squares")
