"""Encoders of the user's own code: trained by `--encoder module:PACKAGE:FUNCTION`, and loaded only if the call names the
same code. What a file names is never imported."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from ssl_pretrain.eval._label_teacher import LabelTeacher
from ssl_pretrain.launch.export import main
from torch import nn

from ssl_pretrain import backbones, encoder
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.distributed.batch_norm import BatchNorm2d
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError

QUICK = "--workers 0 --precision fp32 --monitor-every 0 --picture-every 0 --no-score --batch-size 8 --steps 2".split()
CODE = """
import os
from pathlib import Path

import torch
from torch import nn

from ssl_pretrain.backbones.wrapping import of_map

Path(os.environ["IMPORTED"]).write_text("yes")


class Net(nn.Module):
    def __init__(self, channels, shape):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 8, 8)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 12, 1)
        self.shape = shape

    def forward(self, images):
        x = self.last(torch.relu(self.norm(self.stem(images))))
        return {"map": x, "tokens": x.flatten(2).mT, "vector": x.mean((2, 3)), "words": "no"}[self.shape]


def build(in_chans=3):
    return Net(in_chans, "map")


def tokens():
    return Net(3, "tokens")


def vector():
    return Net(3, "vector")


def words():
    return Net(3, "words")


class Pyramid(Net):
    def __init__(self, steps):
        super().__init__(3, "map")
        self.steps = steps

    def forward(self, images, maps=False):
        x = super().forward(images)
        found = of_map(x, x.mean((2, 3)))
        if maps:
            found.maps = tuple(nn.functional.interpolate(x, scale_factor=step) for step in self.steps)
        return found


def pyramid():
    return Pyramid((4, 2, 1))


def upside_down():
    return Pyramid((1, 2))


def no_pyramid():
    return Pyramid(())


def nothing():
    return 3


def dropped():
    return nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Dropout(0.1))
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Somebody's own module in the current folder; its name. It leaves a file when it is imported."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("IMPORTED", str(tmp_path / "imported"))
    return name


def export(folder: Path, name: str, options: dict) -> Path:
    """An export whose config.json names an encoder, as anybody could write one."""
    preprocessing = Preprocessing.for_size((16, 16), (0.5,) * 3, (0.25,) * 3)
    model = backbones.build("vit_micro", image_size=(16, 16), depth=1, patch_size=8)
    encoder.save(folder, Encoder(model, "vit_micro", preprocessing, {"method": "simclr", "data": "fractals"}))
    config = json.loads((folder / "config.json").read_text())
    config["backbone"] |= {"name": name, "options": options}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"config": json.dumps(config)})
    return folder


@pytest.mark.parametrize(("function", "grid"), [("build", (2, 3)), ("tokens", (2, 3)), ("vector", (1, 1))])
def test_what_a_module_gives_becomes_features(mine: str, function: str, grid: tuple[int, int]) -> None:
    model = backbones.build(f"module:{mine}:{function}", image_size=(16, 24)).eval()
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    found, output = model(images), model.model(images)
    assert (found.grid, model.dim, model.depth) == (grid, 12, 2)
    expected = output.flatten(2).mT if function == "build" else output if function == "tokens" else output[:, None]
    assert torch.equal(found.patches, expected)
    assert torch.allclose(found.pooled, expected.mean(1))
    assert isinstance(model.model.norm, BatchNorm2d)
    assert [model.layer_of(f"model.{name}") for name in ("stem.weight", "norm.bias", "last.bias")] == [0, 1, 2]
    assert list(model.state_dict())[:2] == ["stem.weight", "stem.bias"]  # the module's own names
    with pytest.raises(UserError, match="channels"):
        model(images[:, :2])


@pytest.mark.parametrize(
    ("function", "strides"),
    [
        ("build", ((2, 2), (4, 4), (8, 8), (16, 16))),  # its map resampled
        ("tokens", ((2, 2), (4, 4), (8, 8), (16, 16))),
        ("pyramid", ((2, 2), (4, 4), (8, 8))),  # its own maps
    ],
)
def test_maps_of_a_module(mine: str, function: str, strides: tuple) -> None:
    model = backbones.build(f"module:{mine}:{function}", image_size=(16, 24)).eval()
    assert (model.map_strides, set(model.map_channels)) == (strides, {12})
    images = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    found, plain = model(images, maps=True), model(images)
    assert [tuple(x.shape) for x in found.maps] == [(2, 12, 32 // s, -(-24 // s)) for s, _ in strides]
    assert torch.equal(found.maps[2], found.patches.mT.unflatten(2, (4, 3)))
    assert torch.equal(found.pooled, plain.pooled)
    assert plain.maps == ()


def test_a_module_of_one_vector_has_no_maps(mine: str) -> None:
    model = backbones.build(f"module:{mine}:vector", image_size=(16, 24))
    with pytest.raises(UnsupportedByBackbone, match="gives one vector of an image: let its forward give a map"):
        model(torch.zeros(1, 3, 16, 24), maps=True)


def test_the_function_gets_the_channels_that_it_asks_for(mine: str) -> None:
    assert backbones.build(f"module:{mine}:build", image_size=(16, 16), in_chans=5).model.stem.in_channels == 5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{mine}:words", "not str"),
        ("{mine}:nothing", "must return a torch module, not int"),
        ("{mine}:dropped", "has dropout"),
        ("{mine}:upside_down", "the finest first, not of the shapes"),
        ("{mine}:no_pyramid", "its forward must give Features with `maps`"),
        ("{mine}:gone", "no attribute 'gone'"),
        ("no_such_package:build", "No module named"),
        ("{mine}", "write module:PACKAGE:FUNCTION"),
        ("{mine}:build,checkpoint=x", "is no option of an encoder to train"),
    ],
)
def test_what_is_no_encoder_is_refused_in_words(mine: str, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        backbones.build(f"module:{name.format(mine=mine)}", image_size=(16, 16))


def test_a_run_is_trained_continued_exported_and_evaluated(
    mine: str, photos_in_classes: Path, tmp_path: Path, pretrain: Callable, evaluate: Callable
) -> None:
    """By real commands; each names the code."""
    name, out, imported = f"module:{mine}:build", tmp_path / "run", tmp_path / "imported"
    words = ["--method", "vicreg", "--data", photos_in_classes, "--image-size", 16, "--projector-dim", 16, *QUICK]
    pretrain(*words, "--encoder", name, "--out", out, IMPORTED=str(imported))
    pretrain(*words, "--encoder", name, "--out", out, IMPORTED=str(imported))  # resumed: nothing left to do
    imported.unlink()

    # A file alone never imports it: not an export, not a run's config.yaml as --config.
    said = evaluate("knn", "--encoder", out, "--data", photos_in_classes, code=2, IMPORTED=str(imported)).stderr
    assert f"is made by the code '{name}'" in said
    assert "--code" in said
    said = pretrain("--config", out / "config.yaml", "--out", tmp_path / "x", code=2, IMPORTED=str(imported)).stderr
    assert "name code in the command" in said
    said = pretrain(*words, "--out", tmp_path / "x", "--init-from", out, code=2, IMPORTED=str(imported)).stderr
    assert f"name code in the command, --encoder {name}" in said  # not the export of --init-from either
    with pytest.raises(UserError, match="nothing is imported because a file names it"):
        encoder.load(out)
    with pytest.raises(UserError, match=r"You gave module:other:code\."):
        encoder.load(out, code="module:other:code")
    assert not imported.exists()

    words_of = ["embed", "--encoder", out, "--data", photos_in_classes, "--out", tmp_path / "vectors", "--workers", 0]
    evaluate(*words_of, "--code", name, IMPORTED=str(imported))
    assert imported.exists()
    loaded = encoder.load(out, code=name)
    assert loaded.name == name
    assert set(loaded.backbone.state_dict()) == set(load_file(out / "encoder" / "model.safetensors"))
    pretrain(
        *(*words, "--encoder", name, "--out", tmp_path / "two", "--init-from", out), IMPORTED=str(imported)
    )  # the command names the code
    dino = ["--config", "continue_dino", "--data", photos_in_classes, "--image-size", 32, "--prototypes", 64, *QUICK]
    kept = (*dino, "--anchor", "weights", "--init-from", out, "--encoder", name, "--out", tmp_path / "three")
    pretrain(*kept, IMPORTED=str(imported))  # also for the network of the anchor
    assert encoder.load(tmp_path / "three", code=name).lineage["anchor"]["spec"] == str(out)


def test_every_command_on_an_export_takes_its_code(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --code each refuses and imports nothing."""
    name, out = f"module:{mine}:build", tmp_path / "run" / "encoder"
    how = Preprocessing.for_size((16, 16), (0.5,) * 3, (0.25,) * 3)
    encoder.save(out, Encoder(backbones.build(name, image_size=(16, 16)), name, how, {"method": "simclr"}))
    monkeypatch.delitem(sys.modules, mine)
    imported = tmp_path / "imported"
    imported.unlink()
    for words in (
        ["card", str(out.parent)],
        ["to", "torch-export", str(out), "--out", str(tmp_path / "f.pt2"), "--fixed-size"],
        ["resize", str(out), "--image-size", "24", "--out", str(tmp_path / "resized")],
    ):
        for code in ([], ["--code", "module:other:code"]):
            assert main([*words, *code]) == 2
            assert f"is made by the code '{name}'" in capsys.readouterr().err
        assert not imported.exists()
        assert main([*words, "--code", name]) == 0
        monkeypatch.delitem(sys.modules, mine)
        imported.unlink()
    card = (out / "README.md").read_text()
    assert f'encoder.load("this folder", code="{name}")' in card
    with pytest.raises(SystemExit, match="0"):
        main(["card", str(out), "--help"])
    assert "--code" in capsys.readouterr().out


def test_a_teacher_of_fine_tuning_takes_its_code(mine: str, tmp_path: Path) -> None:
    name, folder = f"module:{mine}:build", tmp_path / "teacher"
    how = Preprocessing.for_size((16, 16), (0.5,) * 3, (0.25,) * 3)
    encoder.save(folder / "encoder", Encoder(backbones.build(name, image_size=(16, 16)), name, how, {}))
    head = {"weight": torch.randn(2, 12), "bias": torch.randn(2)}
    header = json.dumps({"feature": "mean", "classes": ["a", "b"]})
    save_file(head, folder / "head.safetensors", metadata={"head": header})
    student = Encoder(backbones.build("vit_micro", image_size=(16, 16), patch_size=8), "vit_micro", how, {})
    rest = (student, ("a", "b"), "soft", 1.0, torch.device("cpu"))
    with pytest.raises(UserError, match="is made by the code"):
        LabelTeacher(str(folder), *rest)  # type: ignore[arg-type]
    assert LabelTeacher(str(folder), *rest, name).encoder.backbone.code == name  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["module:os:system", "module:evil:build", "module:evil.deeper:build"])
def test_an_export_that_names_code_imports_and_calls_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluate: Callable, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'imported')!r}).write_text('yes')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    called: list[str] = []
    monkeypatch.setattr(os, "system", called.append)
    folder = export(tmp_path / "export", name, {"function": name.removeprefix("module:")})
    for code in (None, "module:mine:build", "os:system", ""):
        with pytest.raises(UserError, match="nothing is imported because a file names it"):
            encoder.load(folder, code=code)
    said = evaluate("knn", "--encoder", folder, "--data", "fractals", code=2, PYTHONPATH=str(tmp_path)).stderr
    assert f"is made by the code '{name}'" in said
    assert (called, (tmp_path / "imported").exists()) == ([], False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_micro", {"function": "os:system"}),
        ("timm:os:system", {}),
        ("module_encoder", {"function": "os:system"}),
        ("evil:build", {}),
    ],
)
def test_other_ways_to_name_code_in_a_file_are_no_encoders(
    name: str, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(os, "system", called.append)
    with pytest.raises(UserError):
        encoder.load(export(tmp_path / "export", name, options))
    assert called == []


@pytest.mark.parametrize("key", ["encoder", "init_from", "teacher"])
def test_a_yaml_file_names_no_code(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    from ssl_pretrain.launch.pretrain import main

    called: list[str] = []
    monkeypatch.setattr(os, "system", called.append)
    (tmp_path / "recipe.yaml").write_text(f"method: simclr\n{key}: module:os:system\n")
    assert main(["--config", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "module:os:system would be imported: name code in the command" in capfd.readouterr().err
    assert called == []


def test_allowed_code_is_no_way_to_other_code(mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is the user's; the options beside it in the file say something else."""
    called: list[str] = []
    monkeypatch.setattr(os, "system", called.append)
    name = f"module:{mine}:build"
    with pytest.raises(UserError, match="leave that option out"):
        encoder.load(export(tmp_path / "export", name, {"function": "os:system"}), code=name)
    assert called == []


def test_a_module_of_the_user_is_checked_for_batch_norms_of_other_kinds(mine: str) -> None:
    class Own(nn.BatchNorm2d):
        pass

    from ssl_pretrain.distributed.batch_norm import globalize

    with pytest.raises(UserError, match="0 of the encoder is a Own"):
        globalize(nn.Sequential(Own(3)))
    with pytest.raises(UserError, match="running statistics"):
        globalize(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))
