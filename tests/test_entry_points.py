"""Backbones, sources and loggers of another package (methods: test_pretrain_command.py), by real commands in processes;
and that nothing is imported before its name is used, and never what a file names."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from acme import BACKBONE, LOGGER, SOURCE
from conftest import TINY, command, losses, metrics
from distributions import IMPORTED, install

from ssl_pretrain import encoder as exported
from ssl_pretrain.errors import UserError


def diary(run: Path) -> list[list]:
    return [json.loads(line) for line in (run / "diary.jsonl").read_text().splitlines()]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """All three installed, with the file that each writes its name to when it is imported."""
    site = tmp_path / "site"
    sizes = {"acme_small": "acme_net", "acme_wide": "acme_net:Acme"}  # a module, and a class
    install(site, "acme_net", BACKBONE, {"ssl_pretrain.backbones": sizes})
    install(site, "acme_bands", SOURCE, {"ssl_pretrain.sources": {"bands": "acme_bands:Bands"}})
    loggers = {"diary": "acme_diary:Diary", "broken": "acme_diary:Broken", "gone": "acme_diary:Gone"}
    where = install(site, "acme_diary", LOGGER, {"ssl_pretrain.loggers": loggers})
    return {**where, "IMPORTED": str(tmp_path / "imported"), "SSL_PRETRAIN_CACHE": str(tmp_path / "cache")}


def imported(packages: dict[str, str]) -> set[str]:
    """What was imported since this was asked last."""
    file = Path(packages["IMPORTED"])
    names = set(file.read_text().split()) if file.exists() else set()
    file.unlink(missing_ok=True)
    return names


def python(code: str, packages: dict[str, str]) -> str:
    environment = {**os.environ, **packages}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


ACME = "--image-size 16 24 --batch-size 16 --steps 4 --log-every 2 --workers 1 --precision fp32 --no-score".split()


@pytest.mark.slow
def test_an_encoder_of_another_package(
    packages: dict, photos: Path, photos_in_classes: Path, tmp_path: Path, pretrain: Callable, evaluate: Callable
) -> None:
    out = tmp_path / "run"
    same = ["--method", "lejepa", "--data", photos, "--out", out, "--encoder", "acme_small", "--side", "4", *ACME]
    pretrain(*same, "--checkpoint-every", 2, **packages)
    assert imported(packages) == {"acme_net"}
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert (written["encoder"], written["width"], written["side"]) == ("acme_small", 24, 4)
    described = json.loads((out / "encoder" / "config.json").read_text())["backbone"]
    assert (described["name"], described["options"]) == ("acme_small", {"width": 24, "side": 4})
    said = evaluate("knn", "--encoder", out, "--data", photos_in_classes, "--train-split", "train", "--test-split",
                    "other", code=2, **packages).stderr  # fmt: skip
    assert "has no split 'other'" in said
    bands = "bands:32"
    evaluate("knn", "--encoder", out, "--data", bands, "--k", 3, "--workers", 1, **packages)
    found = json.loads((out / "eval" / "knn-bands" / "results.json").read_text())
    assert found["encoder"]["name"] == "acme_small"
    assert set(found["baselines"]) == {"random", "pixels", "majority"}  # random: built again by its name

    help_ = pretrain("--method", "lejepa", "--encoder", "acme_wide", "--help", **packages).stdout
    assert "Channels of a feature. (default: 48)" in " ".join(help_.split())
    said = pretrain("--method", "lejepa", "--encoder", "acme_smal", code=2, **packages).stderr
    assert "unknown encoder 'acme_smal'; did you mean acme_small?" in said
    said = pretrain("--method", "mae", "--encoder", "acme_small", "--data", photos, *ACME, code=2, **packages).stderr
    assert "mae needs an encoder that supports 'keep', and Acme does not" in said


def test_an_export_is_built_again_by_an_installed_package_only(
    packages: dict, photos: Path, tmp_path: Path, pretrain: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    same = ["--method", "lejepa", "--data", photos, "--out", out, "--encoder", "acme_wide", *ACME]
    pretrain(*same, **packages)
    imported(packages)
    read = f"encoder.load({str(out)!r}).backbone"
    load = f"from ssl_pretrain import encoder; e = {read}; print(type(e).__name__, e.dim)"
    assert python(load, packages) == "Acme 48\n"
    assert imported(packages) == {"acme_net"}

    with pytest.raises(UserError, match=r"unknown encoder 'acme_wide'.* needs that package installed"):
        exported.load(out)  # in this process the package is not installed
    # A module that can be imported, and is nobody's entry point, is not imported, however a file spells it.
    (tmp_path / "site" / "evil.py").write_text("class Evil: pass\n" + IMPORTED)
    names = ["evil", "evil:Evil", "acme_net", "acme_net:Acme", "../evil", "vit", "ssl_pretrain.train"]
    described = (out / "encoder" / "config.json").read_text()
    refused = f"""
from pathlib import Path
from ssl_pretrain import encoder, errors
for name in {names}:
    Path({str(out)!r}, "encoder", "config.json").write_text({described!r}.replace("acme_wide", name))
    try: encoder.load({str(out)!r})
    except errors.UserError as mistake: print(mistake)
"""
    said = python(refused, packages).splitlines()
    assert [f"unknown encoder {name!r}" in line for name, line in zip(names, said, strict=True)] == [True] * len(names)
    assert imported(packages) == set()


@pytest.mark.slow
def test_images_of_another_package(
    packages: dict, tmp_path: Path, pretrain: Callable, evaluate: Callable, photos: Path
) -> None:
    out = tmp_path / "run"
    same = ["--method", "mae", "--data", "bands:24", "--steps", 4, "--log-every", 2, *TINY]
    pretrain(*same, "--out", out, "--workers", 2, "--no-score", **packages)
    assert imported(packages) == {"acme_bands"}
    pretrain(*same, "--out", tmp_path / "again", "--workers", 0, **packages)  # with the score: its labels are read
    assert losses(out) == losses(tmp_path / "again")
    data = json.loads((out / "manifest.json").read_text())["data"]
    assert data == {"path": "bands:24", "images": 24, "fingerprint": "ba241"}

    evaluate("knn", "--encoder", out, "--k", 3, "--workers", 2, **packages)  # on the data that its export names
    found = json.loads((out / "eval" / "knn-bands" / "results.json").read_text())
    assert found["protocol"]["data"] == "bands:24"
    assert (found["protocol"]["train"]["split"], found["protocol"]["test"]["split"]) == ("train", "val")
    assert found["metrics"]["top1"] == 100

    def data_command(*argv: object, code: int = 0) -> subprocess.CompletedProcess:
        environment = {**os.environ, **packages}
        done = subprocess.run(command("data", *argv), capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == code, done.stderr
        return done

    assert "48 images can be read, 0 cannot" in data_command("check", "bands:24", "--workers", 2).stdout
    data_command("pack", "bands:24", "--out", tmp_path / "packed")
    assert (tmp_path / "packed").is_dir()
    assert "give the number of images" in data_command("check", "bands:x", code=2).stderr
    imported(packages)
    for data, said in {
        "band:24": "there is no band:24: did you mean bands:24?",
        "bangles:24": "did you mean bands?",
        "nothing:24": "no installed package adds the kind 'nothing'; known: bands, fractals",
        "acme_bands:24": "no installed package adds the kind 'acme_bands'",
    }.items():
        for done in (
            pretrain("--method", "mae", "--data", data, code=2, **packages),
            evaluate("knn", "--encoder", out, "--data", data, code=2, **packages),
            data_command("stats", data, code=2),
        ):
            assert said in done.stderr
            assert "Traceback" not in done.stderr
    assert imported(packages) == set()
    # Of an export whose data is of a kind that is not installed, that is said.
    assert "no installed package adds the kind 'bands'" in evaluate("knn", "--encoder", out, code=2).stderr


@pytest.mark.slow
def test_a_logger_of_another_package(packages: dict, photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    def run(out: str, *argv: object, code: int = 0) -> subprocess.CompletedProcess:
        same = ["--method", "mae", "--data", photos, "--steps", 6, "--log-every", 2, "--workers", 0, "--no-score"]
        shown = [*TINY, "--monitor-every", 3, "--picture-every", 4, "--val-images", 8, "--val-every", 3]
        return pretrain(*same, *shown, "--out", tmp_path / out, *argv, code=code, **packages)

    run("plain")
    assert imported(packages) == set()
    run("told", "--logger", "tensorboard", "diary")
    assert imported(packages) == {"acme_diary"}
    plain, told = metrics(tmp_path / "plain"), metrics(tmp_path / "told")
    timed = {"time", "images_per_s", "data_wait", "checkpoint_wait"}
    assert [{k: v for k, v in line.items() if k not in timed} for line in plain] == [
        {k: v for k, v in line.items() if k not in timed} for line in told
    ]
    weights = "checkpoints/step-00000006"
    for file in sorted((tmp_path / "plain" / weights).glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "told" / weights / file.name).read_bytes()
    entries = diary(tmp_path / "told")
    drawn = ["picture"] * 6
    assert [entry[0] for entry in entries if entry[0] != "warning"] == [
        "begin", *drawn, "metrics", "scores", "scores", "metrics", *drawn, "metrics", "scores", *drawn, "scores", "end",
    ]  # fmt: skip
    assert entries[0][1:] == [yaml.safe_load((tmp_path / "told" / "config.yaml").read_text()), 0]
    assert [entry[1] for entry in entries if entry[0] == "metrics"] == [line for line in told if "loss" in line]
    assert [entry[1] for entry in entries if entry[0] == "scores"] == ["features", "val", "features", "val"]
    shown = [entry for entry in entries if entry[0] == "picture"]
    assert [entry[3] for entry in shown] == [0] * 6 + [4] * 6 + [6] * 6
    assert next(entry for entry in shown if entry[1] == "views")[2] == ["uint8", 96, 8 * (96 + 2) - 2, 3]
    assert entries[-1] == ["end", "finished"]
    assert (tmp_path / "told" / "tensorboard").is_dir()

    assert "unknown logger 'diry'; did you mean diary?" in run("never", "--logger", "diry", code=2).stderr
    assert not (tmp_path / "never").exists()


def test_a_logger_that_raises_is_left_out_and_the_run_goes_on(
    packages: dict, photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    same = ["--method", "mae", "--data", photos, "--steps", 8, "--log-every", 2, "--workers", 0, "--no-score", *TINY]
    done = pretrain(*same, "--out", tmp_path / "run", "--logger", "broken", "gone", "diary", **packages)
    warnings = (tmp_path / "run" / "warnings.log").read_text().splitlines()
    assert len(warnings) == 2
    assert "the logger gone failed and is left out from here on: AttributeError" in warnings[0]
    assert "the logger broken failed and is left out from here on: RuntimeError: the server is gone" in warnings[1]
    assert done.stderr.count("the server is gone") == 1
    assert "Traceback" not in done.stderr
    assert len(metrics(tmp_path / "run")) == 4
    entries = diary(tmp_path / "run")  # the one that works gets everything, the warnings about the others too
    assert [entry[0] for entry in entries if entry[0] != "warning"] == ["begin", *["metrics"] * 4, "end"]
    assert [entry[1] for entry in entries if entry[0] == "warning"] == [line.split(" ", 2)[2] for line in warnings]


@pytest.mark.slow
def test_only_the_first_process_logs_and_a_failure_is_the_end(
    packages: dict, photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    same = ["--method", "mae", "--data", photos, "--log-every", 2, "--workers", 0, "--no-score", *TINY]
    pretrain(*same, "--steps", 4, "--out", tmp_path / "two", "--nproc", 2, "--logger", "diary", **packages)
    assert [entry[0] for entry in diary(tmp_path / "two")] == ["begin", "metrics", "metrics", "end"]
    assert (tmp_path / "two" / "tensorboard").is_dir()
    # What is logged may change when a run is continued.
    longer = ["--steps", 6, "--extend", "--loggers", "diary", "tensorboard"]  # the flag's older name
    pretrain(*same, *longer, "--out", tmp_path / "two", **packages)
    continued = diary(tmp_path / "two")[4:]
    assert [entry[0] for entry in continued] == ["begin", "metrics", "end"]
    assert continued[0][2] == 4

    bad = ["--lr", "1e38", "--warmup-steps", 0, "--clip-grad", "none", "--bad-steps", 2, "--steps", 40]
    pretrain(*same, *bad, "--out", tmp_path / "bad", "--logger", "diary", code=1, **packages)
    entries = diary(tmp_path / "bad")
    assert entries[-1][0] == "end"
    assert entries[-1][1].startswith("failed: ")
    assert "steps in a row were not finite" in entries[-1][1]
    assert any(entry[0] == "warning" and "skipped step" in entry[1] for entry in entries)


def test_listing_imports_no_plugin(packages: dict, tmp_path: Path, pretrain: Callable, evaluate: Callable) -> None:
    install(tmp_path / "site", "acme_method", "", {"ssl_pretrain.methods": {"acme": "acme_method"}})
    install(tmp_path / "site", "acme_eval", "", {"ssl_pretrain.eval": {"acme_score": "acme_eval"}})
    listed = python(
        "import sys\n"
        "from ssl_pretrain import backbones, loggers, plugins\n"
        "print(*backbones.names(), *plugins.names(loggers.GROUP), *plugins.names('ssl_pretrain.methods'))\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "from ssl_pretrain.data import source\n"
        "print(*source.kinds(), *plugins.names('ssl_pretrain.eval'))\n",
        packages,
    ).split()
    assert {"acme_small", "vit_tiny", "diary", "tensorboard", "acme", "mae"} <= set(listed)
    assert {"bands", "parquet", "acme_score", "knn"} <= set(listed)
    assert "acme" in pretrain("--help", **packages).stdout
    assert "acme_score" in evaluate("--help", **packages).stdout
    pretrain("--method", "mae", "--help", **packages)
    evaluate("knn", "--help", **packages)
    assert imported(packages) == set()
