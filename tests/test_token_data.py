"""Token data sets: the ids are the tokenizer's of the crops that are promised; killed, damaged and foreign ones."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from ssl_pretrain.launch.data import main

from ssl_pretrain import backbones, tokenizer
from ssl_pretrain.backbones.quantizer import Quantizer
from ssl_pretrain.data import rows
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.tokenizer import Tokenizer
from ssl_pretrain.tokenizer.token_data import open_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ in two classes, one image unreadable; tokens/, a tokenizer; and ids/, 3 crops."""
    folder = tmp_path_factory.mktemp("tokens")
    for i in range(20):
        place = folder / "photos" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture(i).save(place / f"{i:03d}.png")
    (folder / "photos" / "a" / "004.png").write_bytes(b"none")
    save(folder / "tokens", 0)
    call(folder, "--crops", "3", "--out", folder / "ids")
    return folder


def save(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    backbone = backbones.build("vit_micro", image_size=(32, 32), patch_size=8, depth=1, dim=32, heads=2)
    exported = Encoder(backbone, "vit_micro", Preprocessing.for_size((32, 32), (0.4,) * 3, (0.3,) * 3), {})
    tokenizer.save(path, Tokenizer(exported, Quantizer(backbone.dim, 16, 4)))


def call(folder: Path, *words: object, code: int = 0) -> None:
    argv = ["tokenize", folder / "photos", "--tokenizer", folder / "tokens", *words]
    assert main(list(map(str, argv))) == code


def test_ids_of_the_crop_of_evaluators(folder: Path):
    """Crop 0 by the tokenizer's own preprocessing; the random ones are other parts of the image."""
    found, opened = open_tokens(folder / "ids"), tokenizer.load(folder / "tokens")
    assert (len(found), found.crops, found.grid) == (19, 3, (4, 4))
    paths = sorted((folder / "photos").rglob("*.png"), key=lambda path: path.name)
    paths = [path for path in paths if path.name != "004.png"]
    assert found.labels.tolist() == ["ab".index(path.parent.name) for path in paths]
    assert found.classes == ("a", "b")
    assert found.numbers.tolist() == [i for i in range(20) if i != 4]
    with torch.no_grad():
        wanted = opened.ids(opened.preprocess([Image.open(path) for path in paths]))
    assert found.ids(range(19)).equal(wanted)
    assert found[7][0].equal(wanted[7])
    assert not found.ids(range(19), 1).equal(wanted)
    assert not found.ids(range(19), 1).equal(found.ids(range(19), 2))
    assert found.lookup(found[0]).equal(opened.lookup(found[0]))
    found.check(opened)
    with pytest.raises(IndexError):
        found[19]


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(rows, "PART_BYTES", 1)
    call(folder, "--crops", "3", "--workers", "2", "--out", tmp_path / "again")
    assert open_tokens(tmp_path / "again").ids(range(19), 2).equal(open_tokens(folder / "ids").ids(range(19), 2))
    call(folder, "--crops", "3", "--seed", "1", "--out", tmp_path / "other")
    other = open_tokens(tmp_path / "other")
    assert other.ids(range(19), 0).equal(open_tokens(folder / "ids").ids(range(19), 0))
    assert not other.ids(range(19), 2).equal(open_tokens(folder / "ids").ids(range(19), 2))
    assert other.fingerprint != open_tokens(folder / "ids").fingerprint


def test_an_unfinished_one_is_refused_and_continued(folder: Path, tmp_path: Path, monkeypatch, capsys):
    plain = rows.write_array

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "write_array", killed)
    call(folder, "--out", tmp_path / "ids", code=1)
    with pytest.raises(UserError, match="is not whole: the same ssl-data tokenize continues it"):
        open_tokens(tmp_path / "ids")
    monkeypatch.setattr(rows, "write_array", plain)
    capsys.readouterr()
    call(folder, "--out", tmp_path / "ids")
    said = capsys.readouterr().out
    assert "0 bytes to write" in said
    assert "1 images could not be read" in said
    assert open_tokens(tmp_path / "ids").ids(range(19)).equal(open_tokens(folder / "ids").ids(range(19)))
    call(folder, "--crops", "2", "--out", tmp_path / "ids", code=2)
    assert "holds other ids (crops: 1, now 2" in capsys.readouterr().err


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path, capsys):
    save(tmp_path / "other", 1)
    with pytest.raises(UserError, match="ids of two tokenizers have nothing in common"):
        open_tokens(folder / "ids").check(tokenizer.load(tmp_path / "other"))
    argv = ["tokenize", folder / "photos", "--tokenizer", tmp_path / "other", "--crops", "3", "--out", folder / "ids"]
    assert main(list(map(str, argv))) == 2
    assert "holds other ids (tokenizer: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.update(whole=False),
        lambda facts: facts.update(kind="teacher cache"),
        lambda facts: facts.update(size=0),
        lambda facts: facts.update(size=1 << 60),
        lambda facts: facts.update(bad=-1),
        lambda facts: facts.update(bad=3),
        lambda facts: facts.pop("classes"),
        lambda facts: facts.update(layout={}),
        lambda facts: facts["layout"].update(count=1 << 40),
        lambda facts: facts["layout"].update(fields=[["ids", "uint16", [3]]]),
    ],
)
def test_a_damaged_head_is_one_message(change: Callable[[dict], object], folder: Path):
    head = folder / "ids" / rows.HEAD
    whole = head.read_text()
    facts = json.loads(whole)
    change(facts)
    head.write_text(json.dumps(facts))
    try:
        with pytest.raises(UserError) as refused:
            open_tokens(folder / "ids")
        assert str(folder / "ids") in str(refused.value)
    finally:
        head.write_text(whole)


def test_ids_beyond_the_codebook_are_refused(folder: Path):
    part = rows.part_path(folder / "ids", 0)
    whole = part.read_bytes()
    part.write_bytes(whole[:-2] + b"\xff\xff")
    try:
        with pytest.raises(UserError, match="has ids beyond its 16 codes"):
            open_tokens(folder / "ids").ids(range(19), 2)
    finally:
        part.write_bytes(whole)
    assert np.load(part, allow_pickle=False)["f0"].shape == (20, 3, 4, 4)
