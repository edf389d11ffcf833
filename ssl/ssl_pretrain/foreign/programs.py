"""Programs from encoders: ONNX and torch.export files, for any batch and, as far as the encoder allows it, any image size.

A program takes `images` (B, C, H, W) float32, normalised as the encoder's preprocessing says, and gives `pooled` (B, D),
`patches` (B, N, D) and, with a class token, `cls` (B, D). It needs neither this package nor the export. The preprocessing
is in the file as JSON text.

Each file is checked before it gets its name: it runs on batches of several sizes and must give the encoder's features.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import plugins
from ..backbones.hiera import Hiera
from ..backbones.swin import Swin
from ..encoder import Encoder
from ..errors import UserError
from ..files import sync

LIMIT = 1e-4  # largest difference over largest value that is accepted; usual are 1e-7 to 1e-6
BATCH = 65536  # largest batch of a program
SIDE = 1024  # largest number of patches (mask units, where these are larger) a side
WHOLE = 3 * 2**29  # bytes of weights: more are written beside an ONNX file, which cannot be larger than 2 GiB

Run = Callable[[Tensor], dict[str, Tensor]]


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference over the largest value, of each feature. Raises ValueError if names or shapes differ."""
    if found.keys() != expected.keys():
        raise ValueError(f"the result has {', '.join(found)} instead of {', '.join(expected)}")
    differences = {}
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise ValueError(f"{name} has the shape {(*found[name].shape,)} instead of {(*value.shape,)}")
        between = (found[name].double() - value.double()).abs().max() / value.abs().max().clamp_min(1e-30)
        differences[name] = float(between) if torch.isfinite(between) else float("inf")
    return differences


class _Plain(nn.Module):
    """The encoder with tensors by name as its output."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.backbone = encoder.backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        found = {"pooled": features.pooled, "patches": features.patches, "cls": features.cls}
        return {name: value for name, value in found.items() if value is not None}


def features(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    """What a program of the encoder gives for images (B, C, H, W)."""
    with torch.no_grad():
        return _Plain(encoder)(images)


def to_torch_export(encoder: Encoder, file: Path, *, any_size: bool = True) -> dict[str, float]:
    """Write a file that `torch.export.load` reads; returns the difference of each feature from the encoder's, the
    largest over several batches. Raises UserError as `to_onnx` does."""
    any_size = any_size and takes_any_size(encoder)
    program = _program(encoder, any_size)
    extra = {"preprocessing.json": _preprocessing(encoder)}
    with _checked(file) as aside:
        torch.export.save(program, aside, extra_files=extra)
        module = torch.export.load(aside).module()
        return _compared(encoder, file, any_size, module)


def to_onnx(encoder: Encoder, file: Path, *, any_size: bool = True) -> dict[str, float]:
    """Write an ONNX file and run it with ONNX Runtime; returns the difference of each feature from the encoder's, the
    largest over several batches. More than 1.5 GiB of weights are put in `file`.data beside it.

    Raises UserError if a library is missing, if torch cannot express the encoder (an encoder of another package) and if
    the file does not give the encoder's features.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        plugins.optional(name, "an ONNX file", "'ssl-pretrain[export]'")
    runtime: Any = plugins.optional("onnxruntime", "an ONNX file")
    any_size = any_size and takes_any_size(encoder)
    names = list(features(encoder, _example(encoder, any_size)))
    size = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    with _checked(file) as aside:
        made = _onnx_program(encoder, any_size, names)
        made.model.metadata_props["preprocessing"] = _preprocessing(encoder)
        made.save(aside, external_data=size > WHOLE)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(str(aside), options, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> dict[str, Tensor]:
            given = session.run(names, {"images": images.numpy()})
            return {name: torch.from_numpy(value) for name, value in zip(names, given, strict=True)}

        return _compared(encoder, file, any_size, run)


def takes_any_size(encoder: Encoder) -> bool:
    """Whether a program for images of any size can be made (`needs_one_size`)."""
    return needs_one_size(encoder) is None


def needs_one_size(encoder: Encoder) -> str | None:
    """Why no program for images of any size can be made; None if it can. The last map of a convolutional network may have
    one row or column for its own images, which torch.export takes for a fixed number; windows of attention and their
    padding depend on the size."""
    if isinstance(encoder.backbone, Swin):
        return "the windows of its attention depend on the size"
    if isinstance(encoder.backbone, Hiera):
        return "the order of its tokens by mask units depends on the size"
    sizes = list(zip(encoder.backbone.image_size, encoder.backbone.unit, strict=True))
    if _by_patch(encoder) or all(side >= 2 * stride for side, stride in sizes):
        return None
    return f"{'x'.join(str(side) for side, _ in sizes)} pixels are fewer than two strides"


def _onnx_program(encoder: Encoder, any_size: bool, names: list[str]) -> Any:
    """The encoder as torch.onnx's program."""

    def made() -> Any:
        program = _program(encoder, any_size)
        with _quiet():
            return torch.onnx.export(
                program, input_names=["images"], output_names=names, dynamo=True, optimize=True, verbose=False
            )

    try:
        return made()
    except RuntimeError:
        # torch 2.13 cannot convert the CPU's attention kernel with scores that are added (relative positions).
        with sdpa_kernel(SDPBackend.MATH):
            try:
                return made()
            except RuntimeError as problem:
                reason = " ".join(str(problem).split())[:300]
                raise UserError(f"torch.onnx cannot express the encoder {encoder.name}: {reason}") from None


def _program(encoder: Encoder, any_size: bool) -> torch.export.ExportedProgram:
    """The encoder as a program."""
    dim = torch.export.Dim
    shape: dict[int, Any] = {0: dim("batch", min=1, max=BATCH)}
    if any_size:
        rows, columns = dim("rows", min=1, max=SIDE), dim("columns", min=1, max=SIDE)
        (p, q), by_patch = encoder.backbone.unit, _by_patch(encoder)
        if by_patch:
            shape |= {2: p * rows, 3: q * columns}
        else:  # a last map of one position would be a program of its own
            shape |= {2: dim("height", min=2 * p, max=SIDE * p), 3: dim("width", min=2 * q, max=SIDE * q)}
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(
                _Plain(encoder).eval(), (_example(encoder, any_size),), dynamic_shapes={"images": shape}, strict=False
            )
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, UserError) as problem:
        size = " for images of any size (--fixed-size may work)" if any_size else ""
        reason = " ".join(str(problem).split())[:300]
        raise UserError(f"torch.export cannot express the encoder {encoder.name}{size}: {reason}") from None


def _by_patch(encoder: Encoder) -> bool:
    """Whether an image's sides must be multiples of the stride, or of the mask unit (a ViT, a Hiera)."""
    p, q = encoder.backbone.unit
    try:
        features(encoder, torch.zeros(1, encoder.backbone.in_chans, 2 * p + 1, 2 * q + 1))
    except UserError:
        return True
    return False


def _example(encoder: Encoder, any_size: bool) -> Tensor:
    """The batch that a program is made from. For any size its sides differ from each other and are several patches, as
    torch.export takes equal sides and 1 for fixed numbers."""
    (p, q), (height, width) = encoder.backbone.unit, encoder.backbone.image_size
    if any_size:
        height, width = 3 * p, 4 * q
    return torch.zeros(2, encoder.backbone.in_chans, height, width)


def _batches(encoder: Encoder, any_size: bool) -> Iterator[Tensor]:
    """The batches of a check: noise, the same on every call."""
    (p, q), (height, width) = encoder.backbone.unit, encoder.backbone.image_size
    shapes = [(1, height, width), (3, height, width)]
    if any_size:
        shapes += [(2, height + p, width + 2 * q), (1, max(2 * p, height // 2 // p * p), 2 * q)]
    generator = torch.Generator().manual_seed(0)
    for count, *size in shapes:
        yield torch.randn(count, encoder.backbone.in_chans, *size, generator=generator)


def _compared(encoder: Encoder, file: Path, any_size: bool, run: Run) -> dict[str, float]:
    """The differences of a program's features from the encoder's."""
    largest: dict[str, float] = {}
    for images in _batches(encoder, any_size):
        with torch.no_grad():
            found = difference(run(images), features(encoder, images))
        largest = {name: max(value, largest.get(name, 0.0)) for name, value in found.items()}
    if max(largest.values()) > LIMIT:
        text = ", ".join(f"{name} {value:.1e}" for name, value in largest.items())
        raise UserError(f"{file} is not written: its features differ from the encoder's ({text} of the largest value)")
    return largest


def _preprocessing(encoder: Encoder) -> str:
    return json.dumps(dataclasses.asdict(encoder.preprocessing))


@contextlib.contextmanager
def _checked(file: Path) -> Iterator[Path]:
    """A path of the same name in a folder beside the file; what is there at the end of the block without an error is
    moved to its place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.parent / f".{file.name}.{os.getpid()}"
    aside.mkdir()
    try:
        yield aside / file.name
        for made in sorted(aside.iterdir(), reverse=True):  # weights before the file that names them
            os.replace(made, file.parent / made.name)
        sync(file.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings about their own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
