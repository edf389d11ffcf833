"""What the checks of several kinds share."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from .. import flags
from ..config import Run
from ..data.source import Source
from . import Fault

CACHE = "SSL_PRETRAIN_CACHE"


def expect(holds: bool, fault: str) -> None:
    """Raise Fault with this message unless it holds."""
    if not holds:
        raise Fault(fault)


def check_config(config: Any, where: str, module: ModuleType, besides: set[str]) -> None:
    """A frozen dataclass whose every field is explained, is no flag of the run or of `besides`, and is read in `module` as
    `config.<field>`."""
    expect(
        isinstance(config, type) and dataclasses.is_dataclass(config), f"{where} must be a dataclass, not {config!r}"
    )
    expect(config.__dataclass_params__.frozen, f"{where} must be frozen: @dataclass(frozen=True, kw_only=True)")
    explained, source = flags.docs(config), inspect.getsource(module)
    for field in dataclasses.fields(config):
        expect(bool(explained.get(field.name)), f"{where}.{field.name} has no help: a string below it")
        expect(field.name not in besides, f"{where}.{field.name} has the name of another flag of the command")
        read = re.search(rf"\bconfig\.{field.name}\b", source)
        expect(read is not None, f"nothing in {module.__name__} reads config.{field.name}")


def run_flags() -> set[str]:
    """The flags that `ssl-pretrain` has whatever the method and the encoder."""
    launch = importlib.import_module("ssl_pretrain.launch.options").Launch
    return {field.name for kind in (Run, launch) for field in dataclasses.fields(kind)}


def picture(label: int, number: int, size: tuple[int, int] = (24, 32)) -> Image.Image:
    """A small RGB image of class 0, 1 or 2, which its strongest channel tells; no two numbers are alike."""
    height, width = size
    rng = np.random.default_rng([label, number])
    pixels = rng.integers(0, 100, (height, width, 3))
    pixels[..., label] += 120
    return Image.fromarray(pixels.astype(np.uint8))


def contents(opened: Source) -> str:
    """Hex hash of all names, labels and items of a source."""
    digest = hashlib.blake2b(digest_size=16)
    for i in range(len(opened)):
        label = None if opened.labels is None else int(opened.labels[i])
        digest.update(json.dumps([opened.name(i), label]).encode())
        digest.update(item_bytes(opened[i]))
    return digest.hexdigest()


def item_bytes(item: bytes | np.ndarray) -> bytes:
    """An item of a source, to compare."""
    return item if isinstance(item, bytes) else repr(item.shape).encode() + item.tobytes()


def own_folder(owner: object) -> Path:
    """A temporary folder that is removed when the owner is gone."""
    folder = Path(tempfile.mkdtemp(prefix="conformance-"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


def with_cache(folder: Callable[[], Path], checks: list[Callable[[], None]]) -> list[Callable[[], None]]:
    """The same checks, each with a cache of its own in `folder()` in the place of the user's."""

    def wrapped(check: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(check)
        def run() -> None:
            with _cache(folder() / "cache"):
                check()

        return run

    return [wrapped(check) for check in checks]


@contextlib.contextmanager
def _cache(path: Path) -> Iterator[None]:
    before = os.environ.get(CACHE)
    os.environ[CACHE] = str(path)
    try:
        yield
    finally:
        del os.environ[CACHE]
        if before is not None:
            os.environ[CACHE] = before
