"""Other people's implementations that tests compare with. They are not dependencies: a test skips where one is absent."""

import contextlib
import warnings
from types import ModuleType

import pytest
import torch

_LIBRARY: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """torchvision beside a CPU build of torch: two operators that it wants at import are declared first."""
    global _LIBRARY  # noqa: PLW0603 (the declaration lasts as long as the library object)
    if _LIBRARY is None and not hasattr(torch.ops.torchvision, "nms"):
        _LIBRARY = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return _quietly("torchvision")


def import_timm() -> ModuleType:
    """timm, which needs torchvision."""
    import_torchvision()
    return _quietly("timm")


def import_transformers() -> ModuleType:
    """transformers, which uses torchvision where that is installed."""
    with contextlib.suppress(pytest.skip.Exception):
        import_torchvision()
    return _quietly("transformers")


def _quietly(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed: nothing to compare with")
