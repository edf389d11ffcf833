"""What the system refuses is told as what it is: reading and writing apart, in the same words in every command."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, command
from ssl_pretrain.launch import data as data_command
from ssl_pretrain.launch import evaluate, pretrain
from ssl_pretrain.launch.run_command import cannot_write

from ssl_pretrain import files
from ssl_pretrain.data.source import open_source
from ssl_pretrain.errors import Unreadable, UserError, reading, system_error
from ssl_pretrain.features import extract, pixel_encoder
from ssl_pretrain.loop import manifest

FLAGS = [*TINY, "--workers", "0", "--no-score", "--log-every", "1"]


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (errno.ENOSPC, 75, "cannot write the run: No space left on device (/r/x): free some space there"),
        (errno.EDQUOT, 75, "free some space"),
        (errno.EFBIG, 75, "free some space"),
        (errno.EMFILE, 1, "Too many open files (/r/x): raise the limit of open files (ulimit -n)"),
        (errno.EPIPE, 1, "what read this output has ended"),
        (errno.EACCES, 1, "Permission denied (/r/x): get the rights"),
        (errno.EROFS, 1, "read-only file system: choose another place"),
        (errno.ELOOP, 1, "a symbolic link leads back to itself"),
        (errno.EIO, 1, "the disk or the network file system fails"),
    ],
)
def test_only_a_disk_without_room_asks_for_room_and_another_try(number: int, code: int, words: str) -> None:
    text, found = cannot_write(OSError(number, os.strerror(number), "/r/x"))
    assert found == code
    assert words in text
    assert ("free some space" in text) == (code == 75)
    assert "\n" not in text


def test_a_message_without_a_number_or_a_file() -> None:
    assert system_error(OSError("shard 3 is short\nmore")) == "shard 3 is short"
    assert system_error(OSError()) == "OSError"


def test_reading_names_the_data() -> None:
    words = r"^photos cannot be read: Too many levels of symbolic links \(photos/a\): a symbolic link"
    with pytest.raises(Unreadable, match=words), reading("photos"):
        _raise(errno.ELOOP, "photos/a")


def _raise(number: int, name: str) -> None:
    raise OSError(number, os.strerror(number), name)


@pytest.mark.parametrize("name", ["pretrain", "evaluate", "data"])
def test_data_that_cannot_be_read_is_no_full_disk(
    name: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # The system refuses to list a folder of the data, in the middle of the walk.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sub").symlink_to(photos)
    inside = os.path.realpath(tmp_path / "data" / "sub")
    scandir = os.scandir

    def refusing(path: object = ".") -> object:
        if os.path.realpath(os.fsdecode(path)) == inside:  # type: ignore[arg-type]
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refusing)
    data = str(tmp_path / "data")
    call = {
        "pretrain": lambda: pretrain.main(["--method", "mae", "--data", data, "--out", str(tmp_path / "run"), *FLAGS]),
        "evaluate": lambda: evaluate.main(["knn", "--encoder", "pixels", "--data", data]),
        "data": lambda: data_command.main(["check", data]),
    }[name]
    assert call() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{data} cannot be read: Input/output error ({inside}" in line.replace(f"{data}/sub", inside)
    assert "space" not in line
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_too_many_open_files_is_the_machines_fault_and_no_bad_image(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from ssl_pretrain.data.folder import FolderSource

    def full(*_: object) -> None:
        _raise(errno.EMFILE, "photos/001.jpg")

    monkeypatch.setattr(FolderSource, "__getitem__", full)
    run = ["--method", "mae", "--data", str(photos), "--out", str(tmp_path / "run"), "--steps", "3", *FLAGS]
    for call in (lambda: pretrain.main(run), lambda: data_command.main(["check", str(photos)])):
        assert call() == 2
        assert "Too many open files (photos/001.jpg): raise the limit" in capsys.readouterr().err
    with pytest.raises(UserError, match="Too many open files"):
        extract(pixel_encoder((8, 8), 3), open_source(str(photos), None), ["pooled"], cache=False)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["state"].startswith("failed: images cannot")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EPIPE, errno.EACCES])
def test_a_run_that_the_system_stops_says_why_and_fails(
    number: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from ssl_pretrain.loop.report import Report

    monkeypatch.setattr(Report, "metrics", lambda *_: _raise(number, "metrics.jsonl"))
    run = ["--method", "mae", "--data", str(photos), "--out", str(tmp_path / "run"), "--steps", "3", *FLAGS]
    assert pretrain.main(run) == 1
    said = capsys.readouterr().err
    assert os.strerror(number) in said
    assert "space" not in said
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["state"].startswith(
        "failed: the system refused"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")
def test_a_disk_that_is_full_to_the_last_byte(photos: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        (disk / "other").write_bytes(bytes(2_000_000))
        run = command("pretrain", "--method", "mae", "--data", photos, "--out", disk / "run", "--steps", 300,
                      "--checkpoint-every", 3, "--keep-every", 3, *FLAGS)  # fmt: skip
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 75, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if "cannot write" in line]
        assert "No space left on device" in line
        assert "Traceback" not in done.stderr
        assert json.loads((disk / "run" / "manifest.json").read_text())["state"].startswith("failed: cannot write")
        assert list((disk / "run" / "checkpoints").glob(".writing*")) == []
        assert list((disk / "run").rglob(".*.[0-9]*")) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_manifest_is_written_over_itself_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest.end(tmp_path, "running", steps=5)
    size = (tmp_path / "manifest.json").stat().st_size

    def full(*_: object) -> None:
        _raise(errno.ENOSPC, "manifest.json")

    monkeypatch.setattr(manifest, "write_text", full)
    manifest.end(tmp_path, "failed: cannot write the run: No space left on device")
    found = manifest.read(tmp_path)
    assert (found["state"][:20], found["steps"]) == ("failed: cannot write", 5)
    assert (tmp_path / "manifest.json").stat().st_size <= size


def test_lines_are_strict_json_and_damaged_ones_are_named(tmp_path: Path) -> None:
    line = files.json_line({"a": float("nan"), "b": [1, float("-inf")], "c": {"d": 0.5}, "e": "x"})
    assert json.loads(line, parse_constant=pytest.fail) == {
        "a": None, "b": [1, None], "c": {"d": 0.5}, "e": "x",
    }  # fmt: skip
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n{"b": "\xff"}\n[1]\n\n{"c": 2}\n{"d"')
    left_out: list[str] = []
    assert files.read_lines(file, left_out) == [{"a": 1}, {"c": 2}]
    assert left_out == ["x.jsonl, line 2: not JSON; left out", "x.jsonl, line 3: no JSON object; left out"]


def test_one_foreign_byte_in_a_runs_lists_does_not_stop_a_resume(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    run = ["--method", "mae", "--data", str(photos), "--out", str(out), *FLAGS]
    assert pretrain.main([*run, "--steps", "3"]) == 0
    for name in ("metrics.jsonl", "bad_images.jsonl", "warnings.log"):
        with open(out / name, "ab") as file:
            file.write(b'{"step": "one"}\n\xff\n{"index": 1}\n"foreign"\n')
    assert pretrain.main([*run, "--steps", "5", "--extend"]) == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    assert "metrics.jsonl, line 5: not JSON; left out" in capsys.readouterr().err
    assert pretrain.main([*run, "--steps", "4", "--extend"]) == 2
    assert "has reached step 5, and --steps 4 lies below" in capsys.readouterr().err


def test_grown_data_names_the_way_on(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i, path in enumerate(sorted(photos.iterdir())):
        (images / path.name).write_bytes(path.read_bytes())
        if i == 31:
            break
    run = ["--method", "mae", "--data", str(images), "--out", str(tmp_path / "run"), "--steps", "2", *FLAGS]
    assert pretrain.main(run) == 0
    (images / "more.jpg").write_bytes((images / "000.jpg").read_bytes())
    assert pretrain.main(run) == 2
    assert f"--init-from {tmp_path / 'run'}" in capsys.readouterr().err


def test_one_class_is_not_no_labels(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split in ("train", "val"):
        (tmp_path / "data" / split / "cat").mkdir(parents=True)
        for path in sorted(photos.iterdir())[:8]:
            (tmp_path / "data" / split / "cat" / path.name).symlink_to(path)
    assert evaluate.main(["knn", "--encoder", "pixels", "--data", str(tmp_path / "data")]) == 2
    said = capsys.readouterr().err
    assert "of one class, cat" in said
    assert "no labels" not in said


@pytest.mark.parametrize("content", [b"", b"PK", b"<html>", b"PK\x03\x04", b"\x80\x02}q\x00", b"\x00" * 40])
def test_a_short_checkpoint_of_others(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from ssl_pretrain.launch.export import main as export

    (tmp_path / "x.pt").write_bytes(content)
    assert export(["import", str(tmp_path / "x.pt"), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "x.pt" in line
    assert "weights_only" not in line  # it is damaged: trust is no remedy


@pytest.mark.slow
def test_bytes_that_are_not_utf8_in_names(photos: Path, tmp_path: Path) -> None:
    """From training to the evaluators, the report and the export, with real processes: names come from their arguments."""
    data = os.fsencode(tmp_path) + b"/d\xe9ta"
    try:
        os.makedirs(data)
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    for i, path in enumerate(sorted(photos.iterdir())):
        folder = data + [b"/train", b"/val"][i % 2] + [b"/c\xe9t", b"/\xff"][i // 2 % 2]
        os.makedirs(folder, exist_ok=True)
        os.symlink(os.fsencode(path), folder + b"/im\xe9ge%d.jpg" % i)
    with open(data + b"/train/\xff/b\xe4d.jpg", "wb") as bad:
        bad.write(b"no image")
    out = tmp_path / "run"
    calls = [
        command("pretrain", "--method", "mae", "--out", out, "--steps", 3, *FLAGS, "--data"),
        command("pretrain", "--method", "mae", "--out", out, "--steps", 3, *FLAGS, "--data"),
        command("evaluate", "knn", "--encoder", out, "--no-baselines", "--out", tmp_path / "knn", "--data"),
        command("evaluate", "embed", "--encoder", out, "--out", tmp_path / "embed", "--data"),
        command("data", "check"),
    ]
    for call in calls:
        done = subprocess.run([*map(os.fsencode, call), data], capture_output=True, check=False)
        allowed = 1 if "check" in call else 0  # one bad image is found
        assert done.returncode == allowed, done.stderr.decode(errors="replace")
        assert b"Traceback" not in done.stderr
    done = subprocess.run(command("report", out), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "report.html").read_text(encoding="utf-8")
    read = "import sys; from ssl_pretrain import encoder; print(encoder.load(sys.argv[1]).lineage['method'])"
    assert subprocess.run([sys.executable, "-c", read, str(out)], capture_output=True, text=True, check=True).stdout
