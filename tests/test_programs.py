"""`ssl-export to`: files of other runtimes give the encoder's features, for other batches and image sizes as well."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_cases import SMALL_CONVNEXT, difference, made, vit
from oracles import import_timm, import_transformers
from ssl_pretrain.launch import export
from torch import nn
from torch.utils import _pytree

from ssl_pretrain import encoder
from ssl_pretrain.backbones.backbone import Features
from ssl_pretrain.errors import UserError
from ssl_pretrain.foreign import programs

TINY_CONVNEXT = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}
LOADED = """
import sys, torch
program = torch.export.load(sys.argv[1], extra_files=(extra := {"preprocessing.json": ""}))
found = program.module()(torch.load(sys.argv[2]))
assert not any(name.startswith("ssl_pretrain") for name in sys.modules)
torch.save((found, extra["preprocessing.json"]), sys.argv[3])
"""


def runtime() -> object:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed: no ONNX files")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: nothing runs ONNX files")


def draw(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(9))


def printed(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^(\w+): largest .* value (\S+)$", text, re.M)}


def test_an_onnx_file_of_any_size(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ort = runtime()
    written = vit(depth=1, registers=1, pool="cls")
    encoder.save(tmp_path / "run" / "encoder", written)
    file = tmp_path / "vit.onnx"
    assert export.main(["to", "onnx", str(tmp_path / "run"), "--out", str(file)]) == 0
    said = capsys.readouterr().out
    assert "batches of any number of images of any size" in said
    found = printed(said)
    assert found.keys() == {"pooled", "patches", "cls"}
    assert max(found.values()) <= 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "vit.onnx"]

    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])  # type: ignore[attr-defined]
    assert [out.name for out in session.get_outputs()] == ["pooled", "patches", "cls"]
    stated = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    assert stated["mean"] == [0.5, 0.5, 0.5]
    for count, height, width in ((1, 32, 48), (5, 32, 48), (2, 24, 72)):
        images = draw(count, height, width)
        with torch.no_grad():
            ours = written(images)
        pooled, patches, cls = session.run(None, {"images": images.numpy()})
        assert difference(torch.from_numpy(pooled), ours.pooled) <= 1e-5
        assert difference(torch.from_numpy(patches), ours.patches) <= 1e-5
        assert np.array_equal(pooled, cls)


def test_an_onnx_file_with_relative_positions(tmp_path: Path) -> None:
    """Their scores are added in the attention, which torch.onnx converts in another way."""
    runtime()
    found = programs.to_onnx(vit(depth=1, positions="relative"), tmp_path / "x.onnx", any_size=False)
    assert max(found.values()) <= 1e-5


@pytest.mark.parametrize("kind", ["vit", "rotary", "convnext"])
def test_a_program_of_torch_export(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It is loaded by a process without this package."""
    written = {
        "vit": lambda: vit(depth=1, positions="sincos"),
        "rotary": lambda: vit(depth=1, positions="rope", cls=False),
        "convnext": lambda: made(
            "convnext_micro", dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), stem_patch=1, image_size=(16, 24)
        ),
    }[kind]()
    encoder.save(tmp_path / "encoder", written)
    assert export.main(["to", "torch-export", str(tmp_path / "encoder"), "--out", str(tmp_path / "x.pt2")]) == 0
    found = printed(capsys.readouterr().out)
    assert found.keys() == {"pooled", "patches"} | ({"cls"} if kind == "vit" else set())
    assert max(found.values()) <= 1e-5
    images = draw(4, 40, 16)
    torch.save(images, tmp_path / "images.pt")
    names = ["x.pt2", "images.pt", "features.pt"]
    subprocess.run([sys.executable, "-c", LOADED, *(str(tmp_path / name) for name in names)], check=True)
    features, stated = torch.load(tmp_path / "features.pt")
    with torch.no_grad():
        assert difference(features["pooled"], written(images).pooled) <= 1e-5
    assert json.loads(stated)["crop"] == list(written.preprocessing.crop)


def test_images_smaller_than_two_strides_fix_the_size(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    written = made("convnext_micro", **SMALL_CONVNEXT, stem_patch=4)  # 32 x 48 pixels, stride 32
    encoder.save(tmp_path / "encoder", written)
    assert export.main(["to", "torch-export", str(tmp_path / "encoder"), "--out", str(tmp_path / "x.pt2")]) == 0
    said = capsys.readouterr().out
    assert "any number of images of 32x48 pixels" in said
    assert "fewer than two strides" in said


def test_other_features_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that was made from other weights than the encoder has."""
    right, first, second = programs._program, vit(depth=1), vit(depth=1)
    with torch.no_grad():
        second.backbone.get_parameter("norm.bias")[0] += 0.01
    monkeypatch.setattr(programs, "_program", lambda of, any_size: right(first, any_size))
    with pytest.raises(UserError, match=r"x\.pt2 is not written: its features differ from the encoder's"):
        programs.to_torch_export(second, tmp_path / "x.pt2", any_size=False)
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"an ONNX file needs onnx\w*.*pip install"):
        programs.to_onnx(vit(depth=1), tmp_path / "x.onnx")


def test_an_encoder_that_is_no_program_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.stride, self.image_size, self.in_chans = inner, (8, 8), (32, 48), 3
            self.unit = self.stride

        def forward(self, images: torch.Tensor) -> Features:
            return self.inner(images if float(images.sum()) > 1 else images + 1)

    odd = vit(depth=1)
    odd.backbone = Odd(odd.backbone)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"torch\.export cannot express the encoder vit_micro"):
        programs.to_torch_export(odd, tmp_path / "x.pt2", any_size=False)


def test_folders_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import_timm()
    import_transformers()
    encoder.save(tmp_path / "encoder", vit(registers=2, image_size=(32, 32)))
    for kind in ("timm", "transformers"):
        assert export.main(["to", kind, str(tmp_path / "encoder"), "--out", str(tmp_path / kind)]) == 0
        said = capsys.readouterr().out
        assert max(printed(said).values()) <= 1e-5
        assert f"written: {tmp_path / kind}" in said
    assert "Dinov2WithRegistersModel" in said
    assert "its pooler_output is the class token" in said
    assert sorted(path.name for path in (tmp_path / "timm").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["to"], "--out is needed"),
        (["to", "onnx", "RUN"], "--out"),
        (["to", "onnx", "--out", "x.onnx"], "name the format and the run first"),
        (["to", "onx", "RUN", "--out", "x.onnx"], "unknown format 'onx'; did you mean onnx"),
        (["to", "onnx", "RUN", "--out", "x.pb"], r"must end with \.onnx: --out x\.onnx"),
        (["to", "torch-export", "RUN", "--out", "x"], r"must end with \.pt2"),
        (["to", "timm", "RUN", "--out", "x", "--fixed-size"], "--fixed-size is for onnx and torch-export"),
        (["to", "timm", "RUN", "--out", "full"], "--out full exists already"),
        (["to", "onnx", "nothing", "--out", "x.onnx"], "nothing does not exist"),
        (["too", "onnx"], "unknown word 'too'; did you mean to"),
    ],
)
def test_mistakes(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert export.main(words) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_features_are_mapped_over() -> None:
    """A registered node of pytrees: also of programs that return Features, in and out."""
    model = vit(depth=2, registers=1).backbone
    images = draw(2, 32, 48)
    with torch.no_grad():
        features = model(images, blocks=(0, 1))
        doubled = _pytree.tree_map_only(torch.Tensor, lambda x: 2 * x, features)
        assert isinstance(doubled, Features)
        assert torch.equal(doubled.blocks[1], 2 * features.blocks[1])
        assert doubled.grid == (4, 6)
        program = torch.export.export(model, (images,), strict=False)
        again = program.module()(images)
    assert isinstance(again, Features)
    assert again.grid == (4, 6)
    assert torch.equal(again.patches, model(images).patches)
