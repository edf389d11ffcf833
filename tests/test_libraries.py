"""Encoders of other libraries: what they give is what the library gives, and mistakes are said."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from oracles import import_timm, import_transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_pretrain import encoder as exported
from ssl_pretrain import plugins
from ssl_pretrain.encoder import Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Tap, poolings, vectors
from ssl_pretrain.foreign import libraries
from ssl_pretrain.foreign.specs import Spec

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
FLAGS = "image-size=64,mean=imagenet,std=0.2/0.2/0.2"
CODE = '''
import torch
from torch import nn

from ssl_pretrain.encoder import Preprocessing


class Net(nn.Module):
    """A map (B, 8, 4, 4), and what `shape` makes of it."""

    def __init__(self, shape="map"):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.conv = nn.Conv2d(3, 8, 16, 16)
        self.shape = shape

    def forward(self, images):
        x = self.conv(images)
        return {"map": x, "tokens": x.flatten(2).mT, "vector": x.mean((2, 3)), "words": "no"}[self.shape]


def build():
    return Net()


def tokens():
    return Net("tokens")


def vector():
    return Net("vector")


def words():
    return Net("words")


def stated():
    net = Net()
    net.preprocessing = Preprocessing(72, (64, 64), "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    return net


def nothing():
    return 3
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Somebody's own module, found in the current folder; its name."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def scatter(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


@pytest.fixture
def timm() -> ModuleType:
    return import_timm()


def saved(model: nn.Module, folder: Path) -> Path:
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


# ---- timm.


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_timm_models_give_their_own_features(name: str, timm: ModuleType, tmp_path: Path) -> None:
    model = scatter(timm.create_model(name))
    cfg = model.pretrained_cfg
    encoder = libraries.load(f"timm:{name},checkpoint={saved(model, tmp_path)}")
    how = encoder.preprocessing
    assert how.crop == tuple(cfg["input_size"][1:])
    assert (how.mean, how.std, how.interpolation) == (cfg["mean"], cfg["std"], cfg["interpolation"])
    assert how.resize == int(224 / cfg["crop_pct"])
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        found, expected = encoder(images), model.forward_features(images)
        torch.testing.assert_close(found.pooled, model.forward_head(expected, pre_logits=True))
    if name.startswith("vit"):
        torch.testing.assert_close(found.cls, expected[:, 0])
        torch.testing.assert_close(found.patches, expected[:, 1:])
        assert found.grid == (14, 14)
        assert poolings(encoder, "cpu") == ("pooled", "cls", "mean")
    else:
        assert (found.cls, found.grid) == (None, (7, 7))
        last = expected.permute(0, 2, 3, 1) if name == "resnet18" else expected  # Swin's channels are last
        torch.testing.assert_close(found.patches, last.flatten(1, 2))
    assert encoder.backbone.dim == found.pooled.shape[1] == model.num_features
    assert encoder.lineage["weights"].endswith("weights.safetensors")


def test_another_size_of_a_timm_model(timm: ModuleType, tmp_path: Path) -> None:
    model = scatter(timm.create_model("vit_tiny_patch16_224"))
    encoder = libraries.load(f"timm:vit_tiny_patch16_224,image-size=96,checkpoint={saved(model, tmp_path)}")
    assert encoder.preprocessing.crop == (96, 96)
    assert encoder.preprocessing.resize == round(int(224 / 0.9) * 96 / 224)
    model.set_input_size(img_size=(96, 96))
    images = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images).patches, model.forward_features(images)[:, 1:])


def test_timm_weights_must_be_there_and_fit(timm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo_id, filename: None)
    with pytest.raises(UserError, match=r"nothing is fetched here: give a local file, timm:resnet18,checkpoint=FILE"):
        libraries.load("timm:resnet18")
    with pytest.raises(UserError, match="no such model; did you mean resnet18"):
        libraries.load("timm:resnet18s")
    file = saved(timm.create_model("resnet26"), tmp_path)
    with pytest.raises(UserError, match=r"does not fit timm:resnet18: 54 unknown: .*; 23 of another shape: "):
        libraries.load(f"timm:resnet18,checkpoint={file}")
    file = saved(timm.create_model("resnet18"), tmp_path)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo_id, filename: str(file))  # downloaded before
    assert libraries.load("timm:resnet18").lineage["weights"] == str(file)
    with pytest.raises(UserError, match=r"mean is \(0\.485, 0\.456, 0\.406\) for this model; leave out mean="):
        libraries.load(f"timm:resnet18,checkpoint={file},mean=0.5/0.5/0.5")


# ---- transformers.

SIZES = {"image_size": 64, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PROCESSOR = {
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "size": {"shortest_edge": 72},
    "crop_size": {"height": 64, "width": 64},
    "do_center_crop": True,
    "resample": 3,
}


@pytest.mark.parametrize(
    ("kind", "options", "prefix"),
    [
        ("ViT", SIZES, 1),
        ("IJepa", SIZES, 0),
        ("Beit", SIZES, 1),
        ("Dinov2WithRegisters", {**SIZES, "num_register_tokens": 4}, 5),
        ("ResNet", {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8, "layer_type": "basic"}, 0),
    ],
)
def test_transformers_models_give_their_own_features(kind: str, options: dict, prefix: int, tmp_path: Path) -> None:
    library = import_transformers()
    model = scatter(getattr(library, f"{kind}Model")(getattr(library, f"{kind}Config")(**options)))
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    encoder = libraries.load(f"hf:{tmp_path}")
    assert encoder.preprocessing == Preprocessing(72, (64, 64), "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with torch.inference_mode():
        found, expected = encoder(IMAGES), model(pixel_values=IMAGES)
    if kind == "ResNet":
        torch.testing.assert_close(found.pooled, expected.pooler_output.flatten(1))
        torch.testing.assert_close(found.patches, expected.last_hidden_state.flatten(2).mT)
        return
    tokens = expected.last_hidden_state
    torch.testing.assert_close(found.patches, tokens[:, prefix:])
    assert found.grid == (4, 4)
    if prefix:
        torch.testing.assert_close(found.cls, tokens[:, 0])
        torch.testing.assert_close(found.pooled, tokens[:, 0])
    else:
        assert found.cls is None
        torch.testing.assert_close(found.pooled, tokens.mean(1))


def test_a_folder_of_transformers_that_lacks_something(tmp_path: Path) -> None:
    library = import_transformers()
    with pytest.raises(UserError, match=r"has no config\.json: give a folder that save_pretrained wrote"):
        libraries.load(f"hf:{tmp_path}")
    library.ViTMAEModel(library.ViTMAEConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no preprocessor_config\.json"):
        libraries.load(f"hf:{tmp_path}")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    with pytest.raises(UserError, match=r"into our ViT instead: torch:.*model\.safetensors"):
        libraries.load(f"hf:{tmp_path}")
    (tmp_path / "model.safetensors").rename(tmp_path / "gone")
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot read it without executing it"):
        libraries.load(f"hf:{tmp_path}")


# ---- One's own code.


def expected_map(images: Tensor) -> Tensor:
    """What Net computes, from its seed: patches of 16 pixels times a matrix."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        conv = nn.Conv2d(3, 8, 16, 16)
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3)
    return (patches @ conv.weight.flatten(1).T + conv.bias).detach()  # (B, h, w, D)


def test_what_a_function_of_ones_own_returns(mine: str) -> None:
    expected = expected_map(IMAGES)
    for function in ("build", "tokens"):
        encoder = libraries.load(f"module:{mine}:{function},{FLAGS}")
        found = encoder(IMAGES)
        torch.testing.assert_close(found.patches, expected.flatten(1, 2), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.pooled, expected.mean((1, 2)), atol=1e-5, rtol=1e-5)
        assert (found.grid, encoder.backbone.stride, encoder.backbone.dim) == ((4, 4), (16, 16), 8)
    assert encoder.preprocessing == Preprocessing(64, (64, 64), "bicubic", (0.485, 0.456, 0.406), (0.2, 0.2, 0.2))
    one = libraries.load(f"module:{mine}:vector,{FLAGS}")(IMAGES)
    torch.testing.assert_close(one.pooled, expected.mean((1, 2)), atol=1e-5, rtol=1e-5)
    assert one.grid == (1, 1)
    wide = libraries.load(f"module:{mine}:tokens,image-size=32x64,mean=imagenet,std=imagenet")
    assert wide(IMAGES[:, :, :32]).grid == (2, 4)


def test_preprocessing_that_the_module_states_is_firm(mine: str) -> None:
    encoder = libraries.load(f"module:{mine}:stated")
    assert encoder.preprocessing == Preprocessing(72, (64, 64), "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    libraries.load(f"module:{mine}:stated,mean=0.1/0.2/0.3,resize=72")  # the same, said twice
    for option, words in {"std=imagenet": "std is", "interpolation=bicubic": "interpolation is bilinear"}.items():
        with pytest.raises(UserError, match=words):
            libraries.load(f"module:{mine}:stated,{option}")


def test_mistakes_of_ones_own_code_are_said(mine: str, tmp_path: Path) -> None:
    mistakes = {
        f"module:{mine}:build": "state the preprocessing: ,image-size=224,mean=imagenet",
        f"module:{mine}:build,image-size=64,mean=0.5,std=0.1/0.2": "one number for each channel",
        f"module:{mine}:build,image-size=64,mean=0.5,std=0.5": r"does not take an image of 1 channels and 64 x 64",
        f"module:{mine}:build,image-size=64,mean=some,std=0.5": "mean=some must be one number per channel",
        f"module:{mine}:build,image-size=0,mean=0.5,std=0.5": "image-size=0 must be whole numbers above 0",
        f"module:{mine}:build,image-size=1x2x3,mean=0.5,std=0.5": "image-size is one side",
        f"module:{mine}:build,{FLAGS},interpolation=lanczos": "bicubic or bilinear",
        f"module:{mine}:words,{FLAGS}": r"its forward must give \(B, D\)",
        f"module:{mine}:nothing,{FLAGS}": "must return a torch module, not int",
        f"module:{mine}:bild,{FLAGS}": "has no attribute 'bild'",
        "module:no_such_package:f": "No module named 'no_such_package'",
        "module:one": "write module:PACKAGE:FUNCTION",
        f"module:{mine}:build,men=3": "unknown option 'men'; did you mean mean",
        f"torch:{tmp_path}/x.pth": "x.pth does not exist; give a local checkpoint",
        f"torch:{tmp_path},layout=dyno": "unknown layout 'dyno'; did you mean dino",
    }
    for text, words in mistakes.items():
        with pytest.raises(UserError, match=words):
            libraries.load(text)


def test_what_is_no_spec() -> None:
    for path in ("runs/mae", "random", "C:/encoder", "tim:resnet18"):
        assert Spec.parse(path) is None
    spec = Spec.parse("module:a.b:c.d,image-size=32x48,mean=imagenet")
    assert spec is not None
    assert (spec.kind, spec.name, spec.image_size()) == ("module", "a.b:c.d", (32, 48))
    assert str(spec) == "module:a.b:c.d,image-size=32x48,mean=imagenet"


def test_options_of_a_forward_and_blocks_are_refused(mine: str) -> None:
    encoder = libraries.load(f"module:{mine}:build,{FLAGS}")
    with pytest.raises(UserError, match="called with 'keep', which Foreign does not support"):
        encoder(IMAGES, keep=torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(UserError, match="features of its last 1 block"):
        vectors(encoder, IMAGES, [Tap.parse("mean@-2")])


def test_the_untrained_twin_is_other_weights_of_the_seed(timm: ModuleType, tmp_path: Path) -> None:
    model = scatter(timm.create_model("vit_tiny_patch16_224"))
    encoder = libraries.load(f"timm:vit_tiny_patch16_224,checkpoint={saved(model, tmp_path)}")
    before, kept = torch.get_rng_state(), encoder.fingerprint
    twin = libraries.untrained(encoder, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert twin.fingerprint == libraries.untrained(encoder, 0).fingerprint
    assert len({kept, twin.fingerprint, libraries.untrained(encoder, 1).fingerprint}) == 3
    assert encoder.fingerprint == kept
    mine, theirs = encoder.state_dict(), twin.state_dict()
    assert not [name for name in mine if torch.equal(mine[name], theirs[name])]


# ---- The command.


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Two classes that colour tells apart."""
    for split, count in (("train", 12), ("val", 5)):
        for label in (0, 1):
            folder = tmp_path / "photos" / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.asarray(picture(7 * i + label, (64, 64))) // 2 + 127 * np.array(
                    [label, 0, 1 - label], np.uint8
                )
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_evaluation_of_a_foreign_encoder(
    mine: str, labelled: Path, tmp_path: Path, evaluate: Callable[..., subprocess.CompletedProcess]
) -> None:
    spec = f"module:{mine}:build,{FLAGS}"
    evaluate("knn", "--encoder", spec, "--data", labelled, "--workers", 0, "--k", 3)
    found = json.loads((tmp_path / f"eval-module-{mine}-build-knn-photos" / "results.json").read_text())
    assert found["metrics"]["top1"] == 100
    assert {"random", "pixels", "majority"} == set(found["baselines"])
    assert found["encoder"]["spec"] == spec
    assert found["protocol"]["preprocessing"]["std"] == [0.2, 0.2, 0.2]
    done = evaluate("knn", "--encoder", f"module:{mine}:build,bad=1", "--data", labelled, code=2)
    assert "unknown option 'bad'" in done.stderr
    done = evaluate("knn", "--encoder", spec, code=2)
    assert "name labelled images with --data" in done.stderr


def test_evaluation_of_an_official_checkpoint_and_of_its_untrained_twin(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssl_pretrain.launch.evaluate import main

    monkeypatch.chdir(tmp_path)
    model = import_timm().create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "dino.pth")
    words = ["--data", str(labelled), "--workers", "0", "--k", "3", "--no-baselines"]
    assert main(["knn", "--encoder", f"torch:{tmp_path / 'dino.pth'}", *words]) == 0
    found = json.loads((tmp_path / "eval-torch-dino.pth-knn-photos" / "results.json").read_text())
    assert (found["encoder"]["method"], found["encoder"]["heads"], found["encoder"]["depth"]) == ("dino", 3, 1)
    assert main(["knn", "--encoder", "random", "--like", f"torch:{tmp_path / 'dino.pth'}", *words]) == 0
    exported.save(tmp_path / "encoder", libraries.load(f"torch:{tmp_path / 'dino.pth'}"))
    assert main(["knn", "--encoder", str(tmp_path / "encoder"), *words]) == 0
    again = json.loads((tmp_path / "encoder" / "eval" / "knn-photos" / "results.json").read_text())
    assert again["metrics"] == found["metrics"]


# ---- Optional libraries that are missing, and those whose import fails


BROKEN = {
    "timm": "import no_such_library",
    "transformers": "raise RuntimeError('operator torchvision::nms does not exist')",
    "pyarrow": "raise AttributeError('numpy has no attribute product')",
}


@pytest.mark.parametrize(
    ("library", "argv"),
    [
        ("timm", ["knn", "--encoder", "timm:resnet18"]),
        ("transformers", ["knn", "--encoder", "hf:{folder}"]),
        ("pyarrow", ["embed", "--encoder", "pixels", "--format", "parquet"]),
    ],
)
def test_an_optional_library_whose_import_fails_is_not_called_missing(
    library: str, argv: list[str], tmp_path: Path, evaluate: Callable
) -> None:
    (tmp_path / library).mkdir()
    (tmp_path / library / "__init__.py").write_text(BROKEN[library] + "\n")
    argv = [word.format(folder=tmp_path) for word in argv]
    said = evaluate(*argv, "--data", "fractals", "--out", tmp_path / "out", code=2, PYTHONPATH=str(tmp_path)).stderr
    assert f"needs {library}" in said
    assert "is installed, but its import fails" in said
    assert {"timm": "No module named 'no_such_library'", "transformers": "torchvision::nms", "pyarrow": "product"}[
        library
    ] in said
    assert f"pip install {library}" not in said
    assert len(said.strip().splitlines()) == 1


def test_an_optional_library_that_is_missing_is_named_with_the_command() -> None:
    with pytest.raises(UserError, match=r"^x needs no_such_library: pip install 'it'$"):
        plugins.optional("no_such_library.part", "x", "'it'")


def test_a_part_of_an_optional_library_whose_import_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers does, which imports its models when they are first used: the reason is the cause."""

    def lazily(name: str) -> None:
        raise ModuleNotFoundError(f"Could not import module {name!r}") from RuntimeError(
            "torchvision::nms does not exist"
        )

    library = ModuleType("lazy")
    monkeypatch.setattr(library, "__getattr__", lazily, raising=False)
    with pytest.raises(
        UserError, match=r"^x needs lazy, .* \(RuntimeError: torchvision::nms does not exist\): reinstall"
    ):
        plugins.part(library, "Model", "x")
    assert plugins.part(library, "__name__", "x") == "lazy"


def test_a_parquet_file_says_why_pyarrow_is_of_no_use(tmp_path: Path, pretrain: Callable) -> None:
    (tmp_path / "pyarrow").mkdir()
    (tmp_path / "pyarrow" / "__init__.py").write_text(BROKEN["pyarrow"] + "\n")
    (tmp_path / "train.parquet").write_bytes(b"PAR1" + bytes(64) + b"PAR1")
    said = pretrain("--method", "mae", "--data", tmp_path / "train.parquet", code=2, PYTHONPATH=str(tmp_path)).stderr
    assert "train.parquet is parquet, which needs pyarrow" in said
    assert "its import fails (AttributeError: numpy has no attribute product)" in said
