"""An encoder whose stem is a tokenizer: its features against its parts, its export by itself, evaluators, other formats."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import import_timm, import_transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from ssl_pretrain.launch import export
from ssl_pretrain.launch.evaluate import main as evaluate_here
from ssl_pretrain.launch.pretrain import main as pretrain_here

from ssl_pretrain import backbones, encoder
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.backbones.token_stem import TokenStem
from ssl_pretrain.backbones.vit import ViT
from ssl_pretrain.conformance import one_step
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.frozen import Frozen
from ssl_pretrain.parts.token_stem import begin_with, with_tokenizer


def tokenizer() -> Frozen:
    """8 codes of patches of 16 pixels, in another normalisation than the run's."""
    return one_step.networks(("tokenizer",))["tokenizer"]


def reading(**options: object) -> ViT:
    """A ViT that reads ids; the images of the run have 32 pixels and patches of 8."""
    torch.manual_seed(3)
    made = backbones.build("vit_micro", image_size=(32, 32), patch_size=8, depth=2, dim=64, heads=2, **options)
    return begin_with(made, tokenizer(), "mage")


def stem(**options: object) -> TokenStem:
    return with_tokenizer(reading(**options), tokenizer()).eval()


def saved(place: Path, made: TokenStem) -> Path:
    how = Preprocessing.for_size(made.image_size, *tokenizer().run)
    encoder.save(place, Encoder(made, made.name, how, {"method": "mage"}))
    return place


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_its_features_are_those_of_vectors_of_the_ids(positions: str):
    """The patch embedding of a plain ViT gives the vectors of the ids, as images of one channel a code (one-hot)."""
    made, network = stem(positions=positions), tokenizer()
    images = torch.randn(3, 3, 64, 64)
    ids = network.ids(images)
    assert len(ids.unique()) > 2
    plain = ViT((4, 4), 8, made.vit.config).eval()
    weights = {name: value for name, value in made.vit.state_dict().items() if "patch_embed" not in name}
    table = made.vit.state_dict()["patch_embed.proj.weight"]
    weights |= {"patch_embed.proj.weight": table.T[:, :, None, None].clone(), "patch_embed.proj.bias": torch.zeros(64)}
    plain.load_state_dict(weights)
    one_hot = torch.nn.functional.one_hot(ids, 8).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected, found = plain(one_hot), made(images)
    for name in ("pooled", "patches", "cls"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert found.grid == (4, 4)
    keep = torch.tensor([[5, 2, 9]] * 3)
    masked = torch.zeros(3, 16, dtype=torch.bool)
    masked[:, [2, 3]] = True
    options = {
        "keep": keep,
        "replace": (masked, torch.ones(64)),
        "attention": "causal",
        "blocks": (0, -1),
        "attention_of": (1,),
    }
    with torch.no_grad():
        expected, found = plain(one_hot, **options), made(images, **options)
    torch.testing.assert_close(found.patches, expected.patches)
    torch.testing.assert_close(found.blocks, expected.blocks)
    torch.testing.assert_close(found.attention, expected.attention)


def test_in_training_the_tokenizer_is_no_part_of_it():
    vit, whole = reading(), stem()
    assert not any("tokenizer" in name for name in vit.state_dict())
    own = sum(value.numel() for value in vit.state_dict().values())
    network = tokenizer()
    theirs = sum(p.numel() for part in (network.backbone, network.quantizer) for p in part.state_dict().values())
    assert sum(value.numel() for value in whole.state_dict().values()) == own + theirs
    assert (vit.stride, vit.image_size) == ((8, 8), (32, 32))  # of the run
    assert (whole.stride, whole.image_size) == ((16, 16), (64, 64))  # of the tokenizer


def test_an_export_is_whole_by_itself_and_trains_no_tokenizer(tmp_path: Path):
    made = stem()
    read = encoder.load(saved(tmp_path / "e", made))
    images = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        assert torch.equal(read(images).patches, made(images).patches)
    assert read.name == "tokens:vit_micro"
    assert read.backbone.describe() == made.describe()
    names = [name for name, _ in read.backbone.named_parameters()]
    assert names
    assert all(name.startswith("vit.") for name in names)
    assert {read.backbone.layer_of(name) for name in names} == {0, 1, 2, 3}
    read.backbone.train()
    assert not any(part.training for part in read.backbone.tokenizer.modules())
    other = encoder.random_like(read, seed=1)
    with torch.no_grad():
        assert not torch.equal(other(images).pooled, read(images).pooled)
    # From the pixels of pictures, in the run's normalisation, to the ids that the method trained with.
    pictures = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(2)]
    seen = read.preprocess(pictures)
    assert seen.shape == (2, 3, 64, 64)
    assert torch.equal(read.backbone.tokenizer(seen), tokenizer().ids(seen))


def test_another_image_size_resizes_the_positions_of_ids():
    made, larger = stem(), encoder.another("tokens:vit_micro", stem())
    twice = backbones.build("tokens:vit_micro", image_size=(128, 96), **made.describe())
    twice.load_state_dict(twice.adapt(made.state_dict(), made.image_size))
    assert twice.vit.pos_embed.shape == (1, 1 + 8 * 6, 64)
    larger.load_state_dict(larger.adapt(made.state_dict(), made.image_size))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(larger.eval()(images).pooled, made(images).pooled)


def test_finetuning_and_probes_work_and_leave_the_tokenizer_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    place = saved(tmp_path / "run" / "encoder", stem())
    for split, count in (("train", 8), ("val", 3)):
        for number in range(2 * count):
            folder = tmp_path / "data" / split / ("bright" if number % 2 else "dark")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([number, count]).integers(0, 120, (40, 40, 3)) + 120 * (number % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    common = ["--encoder", tmp_path / "run", "--data", tmp_path / "data", "--workers", 0, "--batch-size", 8]
    for name, more in (
        ("knn", ["--k", 3]),
        ("linear", ["--lrs", 0.1, "--steps", 10, "--layers", 1, 2]),
        ("finetune", ["--epochs", 1, "--save", "--layer-decay", 0.7]),
    ):
        argv = [name, *common, *more, "--out", tmp_path / name]
        assert evaluate_here([str(word) for word in argv]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (place, tmp_path / "finetune" / "encoder"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("vit.") for name in changed)


@pytest.mark.parametrize(
    ("kind", "end", "more"), [("torch-export", ".pt2", []), ("onnx", ".onnx", ["--fixed-size"])], ids=["any", "fixed"]
)
def test_a_program_of_it(kind: str, end: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    for name in ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ():
        pytest.importorskip(name, reason=f"{name} is not installed: no ONNX files")
    saved(tmp_path / "e", stem())
    assert export.main(["to", kind, str(tmp_path / "e"), "--out", str(tmp_path / f"x{end}"), *more]) == 0
    assert "tokens:vit_micro" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_libraries_have_no_such_model(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    import_timm()
    import_transformers()
    saved(tmp_path / "e", stem())
    assert export.main(["to", kind, str(tmp_path / "e"), "--out", str(tmp_path / "x")]) == 2
    assert "begins with a tokenizer" in capsys.readouterr().err


def edited(folder: Path, change) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config["backbone"]["options"])
    config["backbone"]["name"] = f"tokens:{config['backbone']['options']['encoder']}"
    weights = load_file(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "config": json.dumps(config)})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o["tokenizer"]["backbone"].update(name="module:os:getcwd"), "nothing is imported because"),
        (lambda o: o["tokenizer"]["quantizer"].update(size=10**12), "that is too much"),
        (lambda o: o["tokenizer"]["quantizer"].update(size=9), "of another shape"),
        (lambda o: o["tokenizer"].pop("own"), "does not describe an encoder"),
        (lambda o: o.update(encoder="resnet18", options={}), "is a ViT of this package"),
        (lambda o: o.update(encoder="tokens:vit_micro"), "is a ViT of this package"),
    ],
    ids=["code", "too large", "another shape", "incomplete", "no ViT", "two stems"],
)
def test_a_wrong_description_is_refused_in_words(change, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        encoder.load(edited(saved(tmp_path / "e", stem()), change))


def test_other_encoders_and_code_are_refused():
    with pytest.raises(UnsupportedByBackbone, match="mage needs an encoder that supports ids"):
        begin_with(backbones.build("resnet18", image_size=(32, 32)), tokenizer(), "mage")
    network = tokenizer()
    network.backbone.name = "module:mine:make"
    with pytest.raises(UserError, match="made by your own code"):
        begin_with(backbones.build("vit_micro", image_size=(32, 32), patch_size=8), network, "mage")


def test_it_is_not_trained_further(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    flags = ["--method", "simclr", "--data", photos, "--steps", "2", "--out", tmp_path / "run"]
    place = saved(tmp_path / "e", stem())
    for more in (["--encoder", "tokens:vit_micro"], ["--init-from", place]):
        assert pretrain_here([str(word) for word in [*flags, *more]]) == 2
        assert "is not trained further" in capsys.readouterr().err
