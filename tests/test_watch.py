"""A stall is noticed and explained; a process that is gone is named."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, command, losses

from ssl_pretrain.distributed import World, collectives
from ssl_pretrain.loop import watch
from ssl_pretrain.loop.watch import Watch

HERE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BEAT", 0.05)
    monkeypatch.setattr(watch, "SILENT", 0.25)


def until(there: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not there and time.monotonic() < end:
        time.sleep(0.02)


def hang(said: list[str]) -> None:
    until(said)


def test_a_stall_is_told_once_with_the_stack_and_again_after_progress(tmp_path: Path) -> None:
    said: list[str] = []
    with Watch(tmp_path, HERE, 0.3, said.append) as watched:
        watched.at(7, "waiting for images")
        hang(said)
        time.sleep(0.5)
        assert len(said) == 1
        watched.at(8, "the step")
        time.sleep(0.2)  # progress
        until(said[1:])
    assert "after step 7. This process: waiting for images" in said[0]
    assert "after step 8. This process: the step" in said[1]
    stack = (tmp_path / "stalls" / "rank-00000.txt").read_text()
    assert "step 8, the step" in stack
    assert "until" in stack  # where the main thread was


def test_a_stall_on_a_full_disk_is_told_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "stalls").write_text("a file in the folder's place: nothing can be written there")
    (tmp_path / "heartbeats").write_text("nor there")
    said: list[str] = []
    with pytest.raises(OSError, match="exists"), Watch(tmp_path, World(0, 2, 0, 1, HERE.device), 0.3, said.append):
        pytest.fail("it began where nothing can be written")
    (tmp_path / "heartbeats").unlink()
    with Watch(tmp_path, World(0, 2, 0, 1, HERE.device), 0.3, said.append) as watched:
        shutil.rmtree(tmp_path / "heartbeats")
        (tmp_path / "heartbeats").write_text("and now no more")
        watched.at(7, "the step")
        until(said)
        (tmp_path / "heartbeats").unlink()
    assert "no progress for" in said[0]
    assert "Its stacks cannot be written" in said[0]


def test_progress_is_no_stall(tmp_path: Path) -> None:
    said: list[str] = []
    with Watch(tmp_path, HERE, 0.4, said.append) as watched:
        for step in range(12):
            watched.at(step, "the step")
            time.sleep(0.1)
    assert said == []
    assert list(tmp_path.iterdir()) == []


def beat(folder: Path, rank: int, step: int, doing: str, waits: int) -> None:
    folder.mkdir(exist_ok=True)
    text = {"host": f"n{rank}", "pid": 1, "step": step, "doing": doing, "waits": waits}
    aside = folder / f"{rank}.aside"
    aside.write_text(json.dumps(text))
    aside.replace(folder / f"rank-{rank:05d}.json")  # whole, as a process does it


@pytest.mark.parametrize(
    ("others", "late"),
    [
        ({1: (9, "the step", 2), 2: (8, "the step", 0)}, "Late: rank 2 on n2: step 8, the step."),
        ({1: (9, "waiting for images", 0), 2: (9, "the step", 2)}, "Late: rank 1 on n1: step 9, waiting for images."),
        ({1: (9, "the step", 1), 2: (9, "the step", 2)}, "Late: rank 1 on n1: step 9, the step."),
        ({1: (9, "the step", 2), 2: (9, "the step", 2)}, "Late: nobody, all wait for one another."),
        ({1: (9, "the step", 2)}, "Late: rank 2 on an unknown host: not heard of"),
    ],
)
def test_who_is_late(others: dict, late: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_waits", lambda: watch.EXCHANGE)
    said: list[str] = []
    with Watch(tmp_path, World(0, 3, 0, 1, torch.device("cpu")), 0.3, said.append) as watched:
        watched.at(9, "the step")
        end = time.monotonic() + 10
        while not said and time.monotonic() < end:
            for rank, there in others.items():
                beat(tmp_path / "heartbeats", rank, *there)
            time.sleep(0.02)
    assert late in said[0]


@pytest.mark.parametrize("first_is_heard", [False, True])
def test_a_first_process_that_is_not_heard_of_is_named_by_the_next(first_is_heard: bool, tmp_path: Path) -> None:
    said: list[str] = []
    beat(tmp_path / "heartbeats", 0, 7, "the step", 0)
    with Watch(tmp_path, World(1, 3, 0, 1, HERE.device), 0.5, said.append) as watched:
        watched.at(8, "waiting for images")
        end = time.monotonic() + (2.5 if first_is_heard else 10)
        while not said and time.monotonic() < end:
            if first_is_heard:
                beat(tmp_path / "heartbeats", 0, 7, "the step", 0)
            beat(tmp_path / "heartbeats", 2, 8, "the step", 2)
            time.sleep(0.02)
    if first_is_heard:
        assert said == []  # it says so itself
    else:
        (text,) = said
        assert "no progress for" in text
        assert "after step 8. Late: rank 0 on n0: not heard of for" in text
        assert "the last time at step 7, the step." in text


@pytest.mark.slow
def test_a_stopped_first_process_of_a_run_is_named_by_the_second(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = command("pretrain", "--method", "mae", "--data", photos, "--out", out, "--steps", 100_000, "--log-every", 1,
                   "--nproc", 2, "--stall-after", 2, "--workers", 0, *TINY)  # fmt: skip
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
            assert time.monotonic() < end
            time.sleep(0.1)
        ranks = {}
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks |= {int(e[5:]): int(child) for e in environment if e.startswith(b"RANK=")}
        os.kill(ranks[0], signal.SIGSTOP)
        try:
            assert process.stderr is not None
            told = next((line for line in process.stderr if "no progress" in line), "")
        finally:
            for pid in ranks.values():
                os.kill(pid, signal.SIGKILL)
    assert re.search(r"Late: rank 0 on \S+: not heard of for \d+ s, the last time at step \d+, ", told), told
    assert told.split("warning: ")[1].strip() in (out / "warnings.log").read_text()


def test_progress_while_the_stacks_are_written_is_no_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with Watch(tmp_path, HERE, 0.3, said.append) as watched:
        monkeypatch.setattr(watched, "_dump", lambda: watched.at(9, "the step"))  # it comes just then
        watched.at(8, "the step")
        time.sleep(0.5)
        watched.at(10, "the step")
        assert said == []


def test_a_lost_process_is_named_without_the_words_of_a_library(tmp_path: Path) -> None:
    beat(tmp_path / "heartbeats", 1, 40, "the step", 0)

    def lose() -> None:
        with Watch(tmp_path, World(0, 2, 0, 1, HERE.device), 0, print) as watched:
            watched.at(43, "the step")
            raise RuntimeError("[gloo/pair.cc:534] Connection closed by peer. GLHF! Please file an issue")

    with pytest.raises(watch.LostProcess) as found:
        lose()
    text = str(found.value)
    assert re.search(r"^rank 1 on n1 is gone \(not heard of for \d+ s, the last time at step 40, the step\)", text)
    assert "noticed in step 43; the same command continues" in text
    assert not re.search("gloo|GLHF|issue", text)


SLEEPS = {
    "in a reduction": "distributed.all_reduce_(torch.ones(3))",
    "in the agreement": "distributed.any_of(True)",
    "in a method's gathering": "distributed.gather(torch.ones(2, 3, requires_grad=True)).sum().backward()",
    "in backward": "loss.backward()",
    "in a barrier": "distributed.barrier()",
}


@pytest.mark.slow
@pytest.mark.parametrize("place", SLEEPS)
def test_of_two_processes_the_one_that_sleeps_is_late(place: str, tmp_path: Path) -> None:
    code = f"""
import os, time, torch
from pathlib import Path
from torch.nn.parallel import DistributedDataParallel
from ssl_pretrain import distributed
from ssl_pretrain.loop import watch
watch.BEAT, watch.SILENT = 0.1, 5.0
said = []
with distributed.world() as here:
    model = DistributedDataParallel(torch.nn.Linear(3, 1))
    loss = model(torch.ones(2, 3)).sum()
    with watch.Watch(Path({str(tmp_path)!r}), here, 1.0, said.append) as watched:
        watched.at(7, "the step")
        if here.rank == 1:
            time.sleep(2.5)
        {SLEEPS[place]}
print(here.rank, said)
"""
    place_of = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SSL_PRETRAIN_RENDEZVOUS": (tmp_path / "meet").as_uri()}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **place_of, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert "no progress for" in said[0]
    assert "Late: rank 1 on" in said[0]
    assert "rank 0 on" not in said[0]
    assert sorted(path.name for path in (tmp_path / "stalls").iterdir()) == ["rank-00000.txt", "rank-00001.txt"]


@pytest.mark.slow
def test_two_processes_one_stopped_then_killed(photos: Path, tmp_path: Path) -> None:
    """As on two machines: each started by itself, so that nobody but the run can tell."""
    out = tmp_path / "run"
    argv = command("pretrain", "--method", "mae", "--data", photos, "--out", out, "--steps", 100_000, "--log-every", 1,
                   "--stall-after", 4, "--workers", 0, *TINY)  # fmt: skip
    place = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(20_000 + os.getpid() % 10_000), "OMP_NUM_THREADS": "1"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            argv, env={**place, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        while ranks[0].poll() is None and not ((out / "metrics.jsonl").exists() and len(losses(out)) > 4):
            time.sleep(0.05)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        end = time.monotonic() + 60
        while not (out / "stalls" / "rank-00000.txt").exists() and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(15)  # what a silence takes to be one, and the message
        os.kill(ranks[1].pid, signal.SIGCONT)
        stopped_at = max(losses(out))
        while ranks[0].poll() is None and max(losses(out)) < stopped_at + 5:
            time.sleep(0.05)
        os.kill(ranks[1].pid, signal.SIGKILL)
        said, _ = ranks[0].communicate(timeout=120)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert ranks[0].returncode == 1, said
    assert "no progress for" in said
    assert "Late: rank 1 on" in said  # while it was stopped
    assert "rank 1 on" in said.splitlines()[-1]
    assert "is gone" in said.splitlines()[-1]
    assert "the same command continues" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_waiting_inside_our_collectives_counts_as_an_exchange() -> None:
    """On a GPU the host waits for an all-reduce where it reads the result, which is in our own file."""
    for file, expected in ((collectives.__file__, watch.EXCHANGE), (__file__, watch.COMPUTES)):
        names = {"waits": watch._waits}
        exec(compile("found = waits()", file, "exec"), names)
        assert names["found"] == expected


def test_an_error_of_its_own_is_not_called_a_lost_process(tmp_path: Path) -> None:
    code = f"""
import torch
from pathlib import Path
from ssl_pretrain.loop import watch
from ssl_pretrain.distributed import World
watch.BEAT, watch.SILENT = 0.1, 2.0
out = Path({str(tmp_path)!r})
one, two = (watch.Watch(out, World(rank, 2, rank, 2, torch.device("cpu")), 0, print) for rank in range(2))
two.__enter__()
try:
    with one:
        raise RuntimeError("its own fault")
except RuntimeError as problem:
    print(type(problem).__name__, problem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "RuntimeError its own fault"
