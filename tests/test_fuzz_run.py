"""Damaged files of a run and of an export: read right, or one line; never a traceback, a hang or a silent change.

python tests/fuzz.py fuzz_run 2000      more mutants than the suite's
"""

import json
import time
from pathlib import Path

import pytest
import torch
import yaml
from fuzz import damage
from ssl_pretrain.launch import pretrain, report, report_page, run_folder

from ssl_pretrain import backbones, checkpoint, config, encoder
from ssl_pretrain.checkpoint import folder
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.foreign.weights import flat, read_file
from ssl_pretrain.loop import manifest

SECONDS = 5.0  # of the CPU, for one file


def timed(began: float) -> None:
    assert time.process_time() - began < SECONDS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few numbers."""
    place = tmp_path_factory.mktemp("checkpoints")
    checkpoint.save(place, 12, {"method": {"w": torch.arange(5.0)}, "skipped": 3})
    return place / "step-00000012"


def test_checkpoint_json(saved: Path) -> None:
    file = saved / "checkpoint.json"
    whole, facts = file.read_bytes(), folder.description(saved)

    def read(mutant: bytes) -> str:
        file.write_bytes(mutant)
        problem = folder.damage(saved)
        if problem is not None:
            assert "\n" not in problem
            return "damaged"
        assert folder.description(saved) == facts  # what passes is what was written
        assert checkpoint.load(saved.parent, 12)["skipped"] == 3
        return "right"

    try:
        found = damage(whole, 1, read, allowed=())
    finally:
        file.write_bytes(whole)
    assert found["damaged"] > 0.9 * found.total()


def test_every_bit_of_checkpoint_json_counts(saved: Path) -> None:
    file = saved / "checkpoint.json"
    whole, facts = file.read_bytes(), folder.description(saved)
    try:
        for at in range(len(whole)):
            for bit in range(8):
                harmed = bytearray(whole)
                harmed[at] ^= 1 << bit
                file.write_bytes(harmed)
                assert folder.damage(saved) is not None or folder.description(saved) == facts, (at, bit)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("missing", ["step", "files", "skipped", "checksum"])
def test_a_missing_entry_is_damage(missing: str, saved: Path) -> None:
    file = saved / "checkpoint.json"
    whole = file.read_text()
    try:
        facts = json.loads(whole)
        del facts[missing]
        if missing != "checksum":
            del facts["checksum"]  # as an earlier version wrote it, but for the one that is missing
            file.write_text(json.dumps(facts))
            assert folder.damage(saved) is not None
        else:
            file.write_text(json.dumps(facts))
            assert folder.damage(saved) is None  # of an earlier version
    finally:
        file.write_text(whole)


RECORD = {
    "method": "mae", "data": "photos", "out": "runs/mae", "encoder": "vit_small", "image_size": [224, 224], "lr": 0.001,
    "epochs": None, "stages": ["0.5 image_size=112"], "compile": False, "betas": [0.9, 0.95], "mask_ratio": 0.75,
}  # fmt: skip


def test_config_yaml(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"

    def read(mutant: bytes) -> str:
        began = time.process_time()
        file.write_bytes(mutant)
        try:
            config.differences(config.read_recorded(file), RECORD, config.CHANGEABLE)
            return "mapping"
        finally:
            timed(began)

    assert damage(yaml.safe_dump(RECORD, sort_keys=False).encode(), 2, read).total()


FLAGS = (
    b"method: mae\nencoder: vit_micro\nlr: 1e-3\nsteps: 10\nimage_size: [32, 32]\nmask-ratio: 0.5\nbetas: [0.9, 0.95]\n"
)


def test_config_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "flags.yaml"

    def read(mutant: bytes) -> str:
        file.write_bytes(mutant)
        pretrain.read_command(["--method", "mae", "--encoder", "vit_micro", "--config", str(file)])
        return "read"

    assert damage(FLAGS, 3, read)["error"]


ALIASES = b"a: &a {x: 1, y: [2, 3]}\nb: &b [*a, *a, *a]\nc: {<<: *a, z: *b}\nd: &d\n  - *b\n  - [*b, *b]\nlr: 0.1\n"


def test_yaml_with_aliases() -> None:
    def read(mutant: bytes) -> str:
        began = time.process_time()
        try:
            found = config.load_yaml(mutant)
        finally:
            timed(began)
        json.dumps(found, default=str, skipkeys=True)  # it is finite
        return "read"

    assert damage(ALIASES, 4, read, allowed=(ValueError,))["read"]


@pytest.mark.parametrize(
    "bomb",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "a: &a {x: 1}\n"
        + "".join(f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "[" * 20_000,
        "a: " + "{b: " * 5_000,
        "a: " + "x" * 300_000,
        "lr: " + "9" * 5000,
        "day: 2020-99-99\n",
        "? [1, 2]\n: 3\n",
        "a: !!python/object/apply:os.system [ls]\n",
        "a: !!timestamp x\n",
        "a: !!int x\n",
        "a: !!omap x\n",
    ],
)  # fmt: skip
def test_yaml_bombs_end_in_one_line_and_in_time(bomb: str, tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(bomb)
    began = time.process_time()
    with pytest.raises(UserError) as found:
        config.read_yaml(file)
    timed(began)
    assert str(found.value).startswith(f"--config {file} ")
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 500


LINE = {"step": 1, "loss": 0.5, "grad_norm": 1.5, "lr": 0.001, "images_per_s": 100.0, "data_wait": 0.1, "epoch": 0.1}
RESULT = {
    "evaluator": "knn", "metrics": {"top1": 50.0, "top1_interval": [40.0, 60.0], "n": 100}, "seconds": 1.5,
    "protocol": {"data": "photos", "headline": "k 20"}, "baselines": {"random": {"top1": 10.0}}, "encoder": {}, "all": [],
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    place = tmp_path / "run"
    (place / "knn").mkdir(parents=True)
    (place / "config.yaml").write_text(yaml.safe_dump(RECORD))
    manifest.end(place, "finished", steps=40, data={"images": 100, "fingerprint": "ab"})
    (place / "metrics.jsonl").write_text("".join(json.dumps({**LINE, "step": i}) + "\n" for i in range(1, 41)))
    (place / "knn" / "results.json").write_text(json.dumps(RESULT, indent=1))
    (place / "bad_images.jsonl").write_text(json.dumps({"index": 1, "name": "a.jpg", "reason": "cut off"}) + "\n")
    return place


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "knn/results.json", "manifest.json", "bad_images.jsonl", "config.yaml"]
)
def test_the_report_of_a_damaged_run(name: str, run: Path, capsys: pytest.CaptureFixture) -> None:
    file = run / name

    def read(mutant: bytes) -> str:
        file.write_bytes(mutant)
        page, _ = report_page.page([run_folder.read(run, "run", "ssl-report")])
        page.encode("utf-8", "backslashreplace")
        return "page"

    found = damage(file.read_bytes(), 5, read)
    assert found["page"]


def test_lines_of_others_are_named_and_skipped(run: Path, capsys: pytest.CaptureFixture) -> None:
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": "x"}\n[]\n\xff\xfe\n{"step": 41, "loss": "low", "lr": 1e999}\n{"other": true}\n')
    (run / "knn" / "results.json").write_text(json.dumps({"evaluator": "knn", "metrics": 5}))
    assert report.main([str(run)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6
    assert any("line 42: no JSON object" in line for line in said)
    assert any("line 43: not JSON" in line for line in said)
    assert any("step 41: loss is no number" in line for line in said)
    assert any("knn/results.json: no result of an evaluator" in line for line in said)
    assert "41 of 40" not in (run / "report.html").read_text()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    options = {**backbones.defaults("vit_micro"), "depth": 1, "patch_size": 16}
    backbone = backbones.build("vit_micro", image_size=(32, 32), **options)
    how = Preprocessing.for_size((32, 32), (0.5,) * 3, (0.25,) * 3)
    encoder.save(place, Encoder(backbone, "vit_micro", how, {"method": "mae", "data": "photos"}))
    return place


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_export(name: str, export: Path) -> None:
    whole, fingerprint = (export / name).read_bytes(), encoder.load(export).fingerprint

    def read(mutant: bytes) -> str:
        began = time.process_time()
        (export / name).write_bytes(mutant)
        loaded = encoder.load(export)
        timed(began)
        if name == "model.safetensors":
            assert loaded.fingerprint == fingerprint
        return "read"

    try:
        assert damage(whole, 6, read)["error"]
    finally:
        (export / name).write_bytes(whole)


def test_checkpoints_of_others(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"model": {"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}, "epoch": 3}, file)

    def read(mutant: bytes) -> str:
        file.write_bytes(mutant)
        flat(read_file(file))
        return "read"

    assert damage(file.read_bytes(), 7, read)["error"]
