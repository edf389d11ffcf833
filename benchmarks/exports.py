"""Which programs open an export, and how far their features are from ours: the table of docs/exports.md.

    python benchmarks/exports.py [--rows ROW ...] [--columns COLUMN ...] [--fixed-size]

Every row is an encoder with random weights (norms, biases and layer scale are noise as well), exported and opened by: timm
(`local-dir:`, from the export's folder), transformers (`AutoModel`, from the same folder; where it cannot, from the folder
of `ssl-export to transformers`), ONNX Runtime and `torch.export.load`. A cell is the largest difference of a feature over
its largest value, or the reason why the program cannot express the encoder.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssl_pretrain import backbones, encoder
from ssl_pretrain.backbones import forms
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.foreign import programs, to_libraries

SMALL = {"dim": 64, "depth": 2, "heads": 4, "patch_size": 8}
# Row -> name of the encoder, side of the images, options.
ROWS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit_micro": ("vit_micro", 32, {"patch_size": 8}),
    "vit_tiny": ("vit_tiny", 224, {}),
    "vit_small": ("vit_small", 224, {}),
    "vit_base": ("vit_base", 224, {}),
    "resnet18": ("resnet18", 224, {}),
    "resnet50": ("resnet50", 224, {}),
    "convnext_micro": ("convnext_micro", 64, {}),
    "convnext_tiny": ("convnext_tiny", 224, {}),
    "swin_micro": ("swin_micro", 64, {}),
    "hiera_micro": ("hiera_micro", 64, {}),
    "convnextv2_micro": ("convnextv2_micro", 64, {}),
    "resnet_micro": ("resnet_micro", 32, {}),
    "octic_micro": ("octic_micro", 32, {"patch_size": 8}),
    "grouper_micro": ("grouper_micro", 32, {}),
    "jumbo_micro": ("jumbo_micro", 32, {"patch_size": 8}),
    "ViT, `--pool cls`": ("vit_micro", 32, {**SMALL, "pool": "cls"}),
    "ViT, `--no-cls`": ("vit_micro", 32, {**SMALL, "cls": False}),
    "ViT, `--registers 4`": ("vit_micro", 32, {**SMALL, "registers": 4}),
    "ViT, `--positions sincos`": ("vit_micro", 32, {**SMALL, "positions": "sincos"}),
    "ViT, `--positions rope`": ("vit_micro", 32, {**SMALL, "positions": "rope"}),
    "ViT, DINOv3's options": (
        "vit_micro", 32,
        {**SMALL, "positions": "rope", "registers": 4, "layer_scale": 0.1, "norm_eps": 1e-5, "pool": "cls"},
    ),
    "ViT, `--positions rope --qk-norm`": ("vit_micro", 32, {**SMALL, "positions": "rope", "qk_norm": True}),
    "ViT, `--positions relative --pool cls`": ("vit_micro", 32, {**SMALL, "positions": "relative", "pool": "cls"}),
    "ViT, `--positions relative --pool cls --no-qkv-bias`": (
        "vit_micro", 32, {**SMALL, "positions": "relative", "pool": "cls", "qkv_bias": False}
    ),
    "ViT, `--positions relative`": ("vit_micro", 32, {**SMALL, "positions": "relative"}),
    "ViT, `--layer-scale`": ("vit_micro", 32, {**SMALL, "layer_scale": 0.1}),
    "ViT, `--swiglu`": ("vit_micro", 32, {**SMALL, "swiglu": True}),
    "ViT, `--qk-norm`": ("vit_micro", 32, {**SMALL, "qk_norm": True}),
    "ViT, `--norm-eps 1e-5`": ("vit_micro", 32, {**SMALL, "norm_eps": 1e-5}),
    "ViT, `--norm-eps 1e-4`": ("vit_micro", 32, {**SMALL, "norm_eps": 1e-4}),
    "ViT, `--norms patches` (AIM)": ("vit_micro", 32, {**SMALL, "norms": "patches"}),
    "ViT, `--norms post` (data2vec 2.0)": ("vit_micro", 32, {**SMALL, "norms": "post"}),
    "ViT, `--rms-norm`": ("vit_micro", 32, {**SMALL, "rms_norm": True}),
    "ViT, `--shortcut-decay`": ("vit_micro", 32, {**SMALL, "shortcut_decay": 0.7}),
    "resnet18, `--stem small`": ("resnet18", 32, {"stem": "small"}),
}  # fmt: skip


def made(row: str) -> Encoder:
    """The encoder of a row, in eval mode."""
    name, side, options = ROWS[row]
    torch.manual_seed(0)
    backbone = backbones.build(name, image_size=(side, side), **options).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    how = Preprocessing.for_size((side, side), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Encoder(backbone, name, how, {"method": "random"})


def by_timm(of: Encoder, folder: Path) -> str:
    """The cell of timm."""
    if isinstance(reason := forms.timm_form(of.backbone), str):
        try:
            return f"{_largest(to_libraries.to_timm(of, folder / 'timm'))} (`ssl-export to timm`)"
        except UserError:
            return f"no: {reason}"
    import timm

    model: Any = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True).eval()
    return _largest(to_libraries._compared(of, folder, lambda x: (model.forward_features(x), model(x))))


def by_transformers(of: Encoder, folder: Path) -> str:
    """The cell of transformers."""
    form = forms.of_export(of.backbone)
    if form is None or not form.wrapped:
        try:
            return f"{_largest(to_libraries.to_transformers(of, folder / 'hf')[1])} (`ssl-export to transformers`)"
        except UserError:
            return "no: neither its classes nor timm's fit"
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder / "encoder").eval()

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = model(x)
        return output.last_hidden_state, output.pooler_output.flatten(1)

    return _largest(to_libraries._compared(of, folder, run))


COLUMNS: dict[str, Callable[[Encoder, Path, bool], str]] = {
    "timm": lambda of, folder, any_size: by_timm(of, folder),
    "AutoModel": lambda of, folder, any_size: by_transformers(of, folder),
    "ONNX": lambda of, folder, any_size: _largest(programs.to_onnx(of, folder / "x.onnx", any_size=any_size)),
    "torch.export": lambda of, folder, any_size: _largest(
        programs.to_torch_export(of, folder / "x.pt2", any_size=any_size)
    ),
}


def cells(row: str, columns: list[str], any_size: bool) -> list[str]:
    """A row of the table."""
    of, found = made(row), []
    with tempfile.TemporaryDirectory() as folder:
        encoder.save(Path(folder) / "encoder", of)
        for column in columns:
            try:
                found.append(COLUMNS[column](of, Path(folder), any_size))
            except UserError as problem:
                found.append(f"no: {problem}")
    return found


def _declare_operators() -> None:
    """Two operators that torchvision, which timm imports, wants even beside a CPU build of torch."""
    global _library  # noqa: PLW0603 (the declaration lasts as long as the library object)
    if not hasattr(torch.ops.torchvision, "nms"):
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_library: torch.library.Library | None = None


def _largest(differences: dict[str, float]) -> str:
    return f"{max(differences.values()):.0e}"


def main(argv: list[str] | None = None) -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS), metavar="COLUMN")
    parser.add_argument("--fixed-size", action="store_true", help="files for images of the encoder's own size only")
    options = parser.parse_args(argv)
    _declare_operators()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print("| encoder |", " | ".join(options.columns), "|")
    print("| --- |" + " --- |" * len(options.columns))
    for row in options.rows:
        print(f"| {row} |", " | ".join(cells(row, options.columns, not options.fixed_size)), "|", flush=True)


if __name__ == "__main__":
    main()
