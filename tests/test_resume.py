"""Promises 2, 3 and 4 as a user meets them: killed processes, other numbers of workers and ranks, signals, full disks."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import TINY, assert_same_bits, command, losses, metrics
from ssl_pretrain.launch.pretrain import main

from ssl_pretrain import checkpoint, config
from ssl_pretrain.config import Run

STEPS = 60


def final_state(run: Path, step: int = STEPS) -> dict:
    return checkpoint.load(run / "checkpoints", step)


def start(photos: Path, out: Path, *more: object) -> subprocess.Popen:
    return subprocess.Popen(
        command("pretrain", "--method", "mae", "--data", photos, "--out", out, "--steps", STEPS, "--log-every", 1,
                "--checkpoint-every", 7, *TINY, *more),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def reached(run: Path) -> int:
    try:
        return len((run / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def wait_for(process: subprocess.Popen, run: Path, step: int) -> None:
    while process.poll() is None and reached(run) < step:
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    process = start(photos, out, "--workers", 1)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return out


@pytest.mark.slow
def test_killed_ten_times_and_with_other_workers_it_ends_with_the_same_bits(
    undisturbed: Path, photos: Path, tmp_path: Path
) -> None:
    rng = random.Random(0)
    out = tmp_path / "run"
    targets = sorted(rng.sample(range(2, STEPS - 1), 10))
    for number, target in enumerate(targets):
        process = start(photos, out, "--workers", number % 3)
        wait_for(process, out, target)
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        process.communicate()
    process = start(photos, out, "--workers", 2)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "continuing from step" in said
    assert_same_bits(final_state(undisturbed), final_state(out))
    assert losses(out) == losses(undisturbed)  # every step once, none twice
    assert (out / "encoder" / "model.safetensors").read_bytes() == (
        undisturbed / "encoder" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_at_the_step_boundary_and_the_same_command_continues(
    name: str, undisturbed: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(photos, out)
    wait_for(process, out, 10)
    process.send_signal(getattr(signal, name))
    said, _ = process.communicate()
    assert process.returncode == 75, said
    assert f"stopped by {name}" in said
    assert "Traceback" not in said
    newest = checkpoint.newest(out / "checkpoints")
    assert newest == max(losses(out))  # the last step done is the last step saved
    assert json.loads((out / "manifest.json").read_text())["state"] == f"stopped: {name} at step {newest}"
    process = start(photos, out)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert_same_bits(final_state(undisturbed), final_state(out))
    assert json.loads((out / "manifest.json").read_text())["state"] == "finished"


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    undisturbed: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(photos, out)
    wait_for(process, out, 30)
    process.kill()
    process.communicate()
    last = checkpoint.steps(out / "checkpoints")[-1]
    file = out / "checkpoints" / f"step-{last:08d}" / "shard-00001-model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    process = start(photos, out)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert f"step-{last:08d} is damaged" in said
    assert f"continuing from step {last - 7}" in said
    assert_same_bits(final_state(undisturbed), final_state(out))


def test_a_changed_number_of_images_is_named_with_the_flag_that_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(images: int, *argv: str, code: int = 2) -> str:
        data = f"fractals:images={images},size=32"
        words = ["--method", "mae", "--data", data, "--out", str(tmp_path / "run"), *TINY, "--no-score", *argv]
        assert main(words) == code
        return capsys.readouterr().err

    said(80, "--epochs", "1.2", code=0)  # 6 steps
    for images, argv, named in [
        (60, ["--epochs", "1.2"], ["--epochs 1.2: 6 -> 5 steps", "number of images: 80 -> 60"]),
        (60, ["--epochs", "1.2", "--extend"], ["number of images: 80 -> 60"]),
        (60, ["--steps", "6"], ["number of images: 80 -> 60"]),
        (60, ["--images", "90"], ["number of images: 80 -> 60"]),  # 6 steps, too
    ]:
        error = said(images, *argv)
        assert "are not those that the run in" in error
        assert "--steps:" not in error
        assert all(each in error for each in named), error
        assert f"put them back, or choose another --out, with --init-from {tmp_path / 'run'}" in error
        assert len(error.strip().splitlines()) == 1
    for argv, named in [
        (
            ["--epochs", "1.2", "--batch-size", "8"],
            "--batch-size: 16 -> 8; --epochs 1.2: 6 -> 12 steps; --warmup-steps:",
        ),
        (["--epochs", "1.2", "--subset", "0.5"], "--epochs 1.2: 6 -> 3 steps; --subset: None -> 0.5"),
        (["--epochs", "1.2", "--val-images", "20"], "--epochs 1.2: 6 -> 5 steps; --val-images: 0 -> 20"),
        (["--epochs", "3"], "--epochs 3: 6 -> 15 steps"),
        (["--images", "240"], "--images 240: 6 -> 15 steps"),
    ]:
        error = said(80, *argv)
        assert named in error
        assert "holds a run with other settings" in error
        assert ("number of images: 80 -> " in error) == (argv[2:3] in (["--subset"], ["--val-images"]))
        assert ("add --extend" in error) == (len(argv) == 2)
    assert "has reached step 6, and --epochs 0.4 (2 steps) lies below" in said(80, "--epochs", "0.4", "--extend")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 6  # nothing is lost
    assert config.length_flag(Run(method="mae")) == "the default of 100 epochs"


def test_other_flags_on_the_same_folder_are_refused_with_the_difference(
    undisturbed: Path, photos: Path, pretrain: Callable
) -> None:
    same = ("--method", "mae", "--data", photos, "--out", undisturbed, *TINY)
    done = pretrain(*same, "--steps", STEPS, "--lr", "1e-2", "--mask-ratio", 0.5, code=2)
    assert "--lr:" in done.stderr
    assert "-> 0.01" in done.stderr
    assert "--mask-ratio: 0.75 -> 0.5" in done.stderr
    done = pretrain(*same, "--steps", STEPS + 10, code=2)
    assert f"--steps: {STEPS} -> {STEPS + 10}" in done.stderr
    assert "--extend" in done.stderr
    done = pretrain(*same, "--steps", STEPS, "--log-every", 5)  # finished: says so again, trains nothing
    assert "encoder:" in done.stdout


def test_extend_continues_a_finished_run(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    same = ("--method", "mae", "--data", photos, "--out", tmp_path / "run", *TINY, "--log-every", 1)
    pretrain(*same, "--steps", 5)
    pretrain(*same, "--steps", 8, "--extend")
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_other_images_on_the_same_folder_are_refused(
    undisturbed: Path, tmp_path: Path, photos: Path, pretrain: Callable
) -> None:
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(photos.iterdir())[:50]:
        (fewer / path.name).symlink_to(path)
    done = pretrain("--method", "mae", "--data", fewer, "--out", undisturbed, "--steps", STEPS, *TINY, code=2)
    assert "not those" in done.stderr


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_message_and_keeps_what_was_saved(
    undisturbed: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(photos, out)
    wait_for(process, out, 20)
    process.kill()
    process.communicate()
    before = checkpoint.newest(out / "checkpoints")
    # A limit on the size of files written stands for the full disk: it fails in the same place, in the middle of a write.
    argv = command("pretrain", "--method", "mae", "--data", photos, "--out", out, "--steps", STEPS, "--log-every", 1,
                   "--checkpoint-every", 7, *TINY)  # fmt: skip
    code = (
        "import resource, signal, subprocess, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)); sys.exit(subprocess.call(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    assert re.search(r"cannot write the run: .*checkpoints/step-\d{8}\)", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint.newest(out / "checkpoints") == before
    process = start(photos, out)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert_same_bits(final_state(undisturbed), final_state(out))


@pytest.mark.slow
def test_one_and_two_ranks_and_micro_batches_give_the_same_run(
    photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    same = ("--method", "mae", "--data", photos, "--steps", 20, "--log-every", 1, *TINY)
    pretrain(*same, "--out", tmp_path / "one")
    pretrain(*same, "--out", tmp_path / "two", "--nproc", 2)
    pretrain(*same, "--out", tmp_path / "micro", "--accumulate", 2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = command("pretrain", *same, "--out", tmp_path / "torchrun")[1:]
    done = subprocess.run([*torchrun, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one = losses(tmp_path / "one")
    assert len(one) == 20
    for other in ("two", "micro", "torchrun"):
        assert losses(tmp_path / other) == pytest.approx(one, rel=1e-4)
    norms = [{m["step"]: m["grad_norm"] for m in metrics(tmp_path / run)} for run in ("one", "two", "micro")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert norms[2] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.slow
def test_a_run_of_two_ranks_is_stopped_and_continued_by_one(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    out = tmp_path / "run"
    same = ("--method", "mae", "--data", photos, "--out", out, "--steps", STEPS, "--log-every", 1, *TINY)
    process = subprocess.Popen(command("pretrain", *same, "--nproc", 2), stderr=subprocess.PIPE, text=True)
    wait_for(process, out, 5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75, said
    step = checkpoint.newest(out / "checkpoints")
    assert step == max(losses(out))
    pretrain(*same)
    assert list(losses(out)) == list(range(1, STEPS + 1))


def ranks_of(command: subprocess.Popen) -> dict[int, int]:
    """The processes that a command with --nproc has started, by rank."""
    ranked = {}
    for child in Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranked.update({int(e[5:]): int(child) for e in environment if e.startswith(b"RANK=")})
    return ranked


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_with_a_message(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    same = ("--method", "mae", "--data", photos, "--out", out, "--steps", 100_000, "--log-every", 1,
            "--checkpoint-every", 3, *TINY)  # fmt: skip
    process = subprocess.Popen(command("pretrain", *same, "--nproc", 2), stderr=subprocess.PIPE, text=True)
    wait_for(process, out, 12)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "process 1 of 2 was killed (SIGKILL)" in said
    state = json.loads((out / "manifest.json").read_text())["state"]
    assert state.startswith("failed: "), state
    assert "rank 1 on" in state
    kept = checkpoint.newest(out / "checkpoints")
    assert kept
    # the same command goes on from there, until another signal to that rank alone
    process = subprocess.Popen(
        command("pretrain", *same, "--nproc", 2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(process, out, max(losses(out)) + 5)
    os.kill(ranks_of(process)[1], signal.SIGUSR2)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "stopped by SIGUSR2 to process 1 " in said
    assert f"continuing from step {kept}" in said
    assert list(losses(out)) == list(range(1, max(losses(out)) + 1))


@pytest.mark.slow
def test_a_killed_command_leaves_no_rank_that_trains_on(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = command("pretrain", "--method", "mae", "--data", photos, "--out", out, "--steps", 100_000, "--log-every", 1,
                   "--nproc", 2, *TINY)  # fmt: skip
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    wait_for(process, out, 5)
    ranks = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert max(losses(out)) == checkpoint.newest(out / "checkpoints")  # they saved


@pytest.mark.parametrize("place", ["files.write_text", "Report", "manifest.begin", "CollapseMonitor"])
def test_what_a_run_leaves_that_was_killed_before_it_began_is_no_obstacle(
    place: str, photos: Path, tmp_path: Path, pretrain_here: Callable
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".preflight-1c10").touch()
    (out / ".config.yaml.123").touch()
    argv = list(map(str, ("--method", "mae", "--data", photos, "--out", out, "--steps", 2, "--workers", 0, *TINY)))
    code = f"""
import os, ssl_pretrain.train as train
from ssl_pretrain.launch.pretrain import main
train.{place} = lambda *_, **__: os._exit(137)
main({argv})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 137
    pretrain_here(*argv)
    assert list(losses(out)) == [2]


def test_a_run_that_does_not_know_a_newer_flag_has_its_default(
    photos: Path, tmp_path: Path, pretrain_here: Callable, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    same = [
        "--method",
        "simmim",
        "--steps",
        2,
        "--lr",
        1e-3,
        "--data",
        photos,
        "--out",
        out,
        "--workers",
        0,
        "--no-score",
    ]
    same += TINY[: TINY.index("--decoder-dim")]
    pretrain_here(*same)
    written = out / "config.yaml"
    record = yaml.safe_load(written.read_text())
    newer = {name: record.pop(name) for name in ("warmup_lr", "interpolation")}
    assert newer == {"warmup_lr": 0.0, "interpolation": "bicubic"}
    written.write_text(yaml.safe_dump(record))
    assert main(list(map(str, [*same, "--interpolation", "bilinear"]))) == 2
    assert "--interpolation: bicubic -> bilinear" in capsys.readouterr().err
    pretrain_here(*same)
    assert yaml.safe_load(written.read_text())["interpolation"] == "bicubic"


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    out = tmp_path / "run"
    same = ("--method", "mae", "--data", photos, "--out", out, "--steps", 100_000, "--workers", 0, *TINY)
    process = subprocess.Popen(command("pretrain", *same, "--log-every", 1), stderr=subprocess.DEVNULL)
    try:
        wait_for(process, out, 3)
        done = pretrain(*same, code=2)
        assert f"another process trains in {out}" in done.stderr
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_mistake_of_several_processes_is_said_once(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    out = tmp_path / "run"
    same = ("--method", "mae", "--data", photos, "--out", out, "--steps", 2, "--nproc", 2, "--workers", 0, *TINY)
    pretrain(*same)
    done = pretrain(*same, "--lr", 0.5, code=2)
    assert done.stderr.count("with other settings") == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert json.loads((out / "manifest.json").read_text())["state"] == "finished"
    done = pretrain(*same[:4], "--out", tmp_path / "new", *same[6:], "--val-images", 1, code=2)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "--val-images is 1" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_bad_images_of_all_processes_are_counted_in_the_metrics(
    photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i, photo in enumerate(sorted(photos.rglob("*.*"))[:48]):
        (data / photo.name).write_bytes(b"no picture" if i % 8 == 0 else photo.read_bytes())
    out = tmp_path / "run"
    pretrain("--method", "mae", "--data", data, "--out", out, "--epochs", 2, "--nproc", 2, "--log-every", 1, *TINY)
    listed = [json.loads(line)["index"] for line in (out / "bad_images.jsonl").read_text().splitlines()]
    assert len(listed) == len(set(listed)) == 6
    counts = [m["bad_images"] for m in metrics(out) if "bad_images" in m]
    assert counts[-1] == 6
    assert counts == sorted(counts)
