"""Tokenizers as exports: ids and lookups against NumPy, strict and safe reading, and what a run refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ssl_pretrain import backbones, encoder, tokenizer
from ssl_pretrain.backbones.nearest_codes import CHUNK
from ssl_pretrain.backbones.quantizer import Quantizer
from ssl_pretrain.conformance import one_step
from ssl_pretrain.data.views import Sight
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.frozen import Frozen
from ssl_pretrain.tokenizer import Tokenizer


def make(size: int = 10, width: int = 4, unit: bool = False, patch: int = 8) -> Tokenizer:
    torch.manual_seed(0)
    backbone = backbones.build("vit_micro", image_size=(32, 32), patch_size=patch, depth=2, dim=64, heads=2)
    how = Preprocessing.for_size((32, 32), (0.1, 0.2, 0.3), (0.9, 0.8, 0.7))
    made = Tokenizer(Encoder(backbone, "vit_micro", how, {"method": "made"}), Quantizer(64, size, width, unit=unit))
    with torch.no_grad():
        made.quantizer.codes.mul_(torch.linspace(0.5, 1.5, size)[:, None])
        made.quantizer.hits.copy_(torch.arange(size))
    return made.eval()


@pytest.mark.parametrize("unit", [False, True])
def test_ids_and_lookup_against_numpy(unit: bool):
    made = make(unit=unit)
    images = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        patches = made.encoder(images).patches.double().numpy()
    layer = made.quantizer.project
    z = patches @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    z = z / np.sqrt((z**2).sum(-1, keepdims=True))
    codes = made.quantizer.codes.double().numpy()
    codes = codes / np.sqrt((codes**2).sum(-1, keepdims=True)) if unit else codes
    expected = ((z[:, :, None] - codes) ** 2).sum(-1).argmin(-1).reshape(3, 4, 6)
    found = made.ids(images)
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found, expected)
    assert len(set(expected.ravel())) > 2
    np.testing.assert_allclose(made.lookup(found), codes[expected], rtol=1e-6)
    assert made.grid((32, 48)) == (4, 6)
    assert (made.codes, made.stride) == (10, (8, 8))


def test_many_vectors_are_compared_in_parts():
    quantizer = Quantizer(4, 6, 3)
    z = torch.randn(2, CHUNK, 3)
    expected = torch.cdist(z.double(), quantizer.codes.double()[None].expand(2, -1, -1)).argmin(-1)
    assert torch.equal(quantizer.nearest(z), expected)


def test_usage_is_counted_over_the_hits():
    made = make()
    share = np.arange(10) / 45
    perplexity = np.exp(-(share[1:] * np.log(share[1:])).sum())
    assert made.usage == {"tokens": 45, "codes_used": 9, "perplexity": pytest.approx(perplexity)}
    made.quantizer.hits.zero_()
    assert made.usage == {"tokens": 0, "codes_used": 0, "perplexity": 0.0}


def test_an_export_is_read_as_it_was_written(tmp_path: Path):
    made = make(unit=True)
    tokenizer.save(tmp_path / "run" / "tokenizer", made)
    for place in (tmp_path / "run", tmp_path / "run" / "tokenizer"):
        read = tokenizer.load(place)
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(read.ids(images), made.ids(images))
        assert read.fingerprint == made.fingerprint
        assert read.preprocessing == made.preprocessing
        assert read.lineage == {"method": "made"}
        assert not read.training
    config = json.loads((tmp_path / "run" / "tokenizer" / "config.json").read_text())
    assert config["usage"] == made.usage
    assert sorted(p.name for p in (tmp_path / "run" / "tokenizer").iterdir()) == ["config.json", "model.safetensors"]
    other = make(unit=True)
    with torch.no_grad():
        other.quantizer.codes[0, 0] += 1e-3
    assert other.fingerprint != made.fingerprint


def break_(folder: Path, how: str) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    weights = load_file(folder / "model.safetensors")
    if how == "code":
        config["backbone"]["name"] = "module:evil:function"
    elif how == "size":
        config["quantizer"]["size"] = 10**12
    elif how == "no quantizer":
        del config["quantizer"]
    elif how == "missing":
        del weights["quantizer.project.bias"]
    elif how == "other bits":
        weights["quantizer.codes"][0, 0] += 1
    file.write_text(json.dumps(config))
    if how in ("missing", "other bits"):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "config": json.dumps(config)})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("code", "nothing is imported because a file names it"),
        ("size", "does not describe a tokenizer"),
        ("no quantizer", "is no tokenizer"),
        ("missing", "1 missing: quantizer.project.bias"),
        ("other bits", "is damaged or was replaced"),
    ],
)
def test_a_wrong_export_is_refused_in_words(how: str, message: str, tmp_path: Path):
    tokenizer.save(tmp_path / "t", make())
    break_(tmp_path / "t", how)
    with pytest.raises(UserError, match=message):
        tokenizer.load(tmp_path / "t")


def test_an_encoder_is_no_tokenizer_and_the_reverse(tmp_path: Path):
    made = make()
    encoder.save(tmp_path / "e", made.encoder)
    tokenizer.save(tmp_path / "t", made)
    with pytest.raises(UserError, match="is no tokenizer"):
        tokenizer.load(tmp_path / "e")
    with pytest.raises(UserError, match="is a tokenizer, not an encoder"):
        encoder.load(tmp_path / "t")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="has no tokenizer"):
        tokenizer.load(tmp_path / "run")


def frozen(made: Tokenizer, run) -> Frozen:
    how = made.preprocessing
    sight = Sight(made.stride, how.interpolation)
    return Frozen(
        made.encoder.backbone,
        **{"spec": "t", "fingerprint": "x", "sight": sight, "own": (how.mean, how.std), "run": run},
        quantizer=made.quantizer,
    )


def test_a_frozen_tokenizer_sees_the_same_pixels_in_every_precision():
    made, run = make(), ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    pixels = torch.rand(4, 3, 32, 32)

    def normalised(mean, std):
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    network = frozen(made, run)
    expected = made.ids(normalised(made.preprocessing.mean, made.preprocessing.std))
    assert torch.equal(network.ids(normalised(*run)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.ids(normalised(*run)), expected)
    assert not torch.equal(network.ids(pixels), expected)  # the check would see a normalisation that is left out
    assert not any(p.requires_grad for p in made.parameters())


def test_a_grid_that_is_not_the_encoders_is_refused():
    class Coarse(torch.nn.Module):
        in_chans, dim = 3, 64

        def forward(self, images):
            seen = made.encoder.backbone(images)
            seen.grid = (2, 8)
            return seen

    made = make()
    network = frozen(made, (made.preprocessing.mean, made.preprocessing.std))
    network.check("tokenizer", (32, 32))
    network.backbone = Coarse()
    with pytest.raises(UserError, match=r"--tokenizer t gives 2 x 8 ids where the encoder has 4 x 4 patches"):
        network.check("tokenizer", (32, 32))


def test_conformance_has_a_small_one():
    network = one_step.networks(("tokenizer",))["tokenizer"]
    ids = network.ids(torch.randn(8, 3, 64, 64))
    assert ids.shape == (8, 4, 4)
    assert len(ids.unique()) > 3


def test_a_method_that_reads_no_tokenizer_refuses_one(pretrain, photos, tmp_path):
    flags = ["--method", "mae", "--tokenizer", "nowhere", "--data", photos, "--steps", "2"]
    said = pretrain(*flags, "--out", tmp_path / "run", code=2).stderr
    assert "--tokenizer is given, and --method mae with these flags reads none" in said
