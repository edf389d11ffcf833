"""The wandb logger, offline: what is in the file that wandb would send, read by the test itself."""

import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, metrics
from PIL import Image

wandb = pytest.importorskip("wandb", reason="wandb is not installed")
KEY = "feedface" * 5
SMALL = ["--method", "mae", "--log-every", 2, "--workers", 0, "--no-score", *TINY]
SEEN = ["--monitor-every", 3, "--picture-every", 4, "--val-images", 8, "--val-every", 3]
OFFLINE = {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: after 7 bytes, blocks of 32 KiB of chunks (checksum, length, kind, content)."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no room for a chunk's head
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def logged(out: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """The ids of the runs in the folder, and the rows of all starts, in their order."""
    runs: set[str] = set()
    rows: list[dict[str, Any]] = []
    for path in sorted((out / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                runs.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                rows.append({})
                for item in record.history.item:
                    *above, name = item.nested_key or [item.key]
                    place = rows[-1]
                    for key in above:
                        place = place.setdefault(key, {})
                    place[name] = yaml.safe_load(item.value_json)
    return runs, rows


def test_curves_scores_and_pictures_are_in_the_file_and_a_continued_run_adds_what_is_new(
    photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    out = tmp_path / "run"
    same = [*SMALL, *SEEN, "--data", photos, "--out", out, "--logger", "wandb", "--checkpoint-every", 4]
    pretrain(*same, "--steps", 6, "--nproc", 2, **OFFLINE)
    first, rows = logged(out)
    assert len(list((out / "wandb").glob("offline-run-*"))) == 1  # of the first process
    assert [row["_step"] for row in rows] == [0, 2, 3, 4, 6]
    lines = metrics(out)
    for name in ("loss", "lr", "images_per_s"):
        assert [row[f"train/{name}"] for row in rows if f"train/{name}" in row] == [
            pytest.approx(line[name]) for line in lines if name in line
        ]
    assert [row["_step"] for row in rows if "val/loss" in row] == [3, 6]
    assert [row["_step"] for row in rows if "features/feature_rank" in row] == [3, 6]
    (picture,) = [row["pictures/input | masked | reconstruction"] for row in rows if row["_step"] == 4]
    (file,) = out.glob("wandb/offline-run-*/files/" + picture["path"])
    with Image.open(file) as pixels:
        assert pixels.size == (picture["width"], picture["height"]) == (8 * 96 + 7 * 2, 3 * 96 + 2 * 2)

    # Back to step 4, as after a kill: the steps up to 6 are run again and are not logged again.
    for folder in (out / "checkpoints").glob("step-00000006*"):
        folder.rename(tmp_path / folder.name)
    pretrain(*same, "--steps", 8, "--extend", **OFFLINE)
    again, rows = logged(out)
    assert again == first
    assert len(first) == 1
    assert [row["_step"] for row in rows] == [0, 2, 3, 4, 6, 8]
    assert_private(out, tmp_path)


def assert_private(out: Path, own: Path) -> None:
    """Neither the key nor what tells of the machine, the code or the user is in a file that wandb wrote."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert len(files) > 10
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    sent = [path for path in (out / "wandb").rglob("*") if path.is_file() and path.suffix != ".log"]
    names = {path.name for path in sent}
    assert {name.split(".")[-1] for name in names} <= {"wandb", "json", "png"}
    assert not names & {"requirements.txt", "output.log", "wandb-metadata.json", "diff.patch", "conda-environment.yaml"}
    (file, *_) = [path for path in sent if path.suffix == ".wandb"]
    kinds = {record.WhichOneof("record_type") for record in records(file)}
    assert not kinds & {"stats", "output", "output_raw", "alert", "environment"}
    for record in records(file):
        if record.WhichOneof("record_type") == "run":
            assert not record.run.host
            assert not record.run.git.commit
    content = file.read_bytes()
    for word in (f"host{socket.gethostname()}", sys.executable, str(Path(__file__).parent)):
        assert word.encode() not in content
    assert os.environ.get("WANDB_API_KEY") != KEY


def test_without_a_login_the_run_goes_on(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    home = tmp_path / "home"
    home.mkdir()
    without = {"HOME": str(home), "WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": str(home / "netrc")}
    done = pretrain(
        *SMALL, "--data", photos, "--out", tmp_path / "run", "--steps", 2, "--logger", "wandb",
        **without, WANDB_BASE_URL="http://127.0.0.1:9",
    )  # fmt: skip
    assert done.stderr.count("wandb is not logged in: run 'wandb login'") == 1
    assert len(metrics(tmp_path / "run")) == 1
