"""Checkpoints are whole or absent; damage is found, named and stepped over."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader

from ssl_pretrain import checkpoint, files


def state(value: float) -> dict:
    return {"method": {"w": torch.full((64, 64), value)}, "optimizer": {}, "skipped": 0}


def test_round_trip_and_pruning(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        checkpoint.save(tmp_path, step, state(step))
    assert checkpoint.newest(tmp_path) == 40
    assert torch.equal(checkpoint.load(tmp_path, 20)["method"]["w"], torch.full((64, 64), 20.0))
    checkpoint.prune(tmp_path, keep_last=1, keep_every=20)
    assert checkpoint.steps(tmp_path) == [20, 40]


def tensors(path: Path) -> Path:
    (file,) = path.glob("*.safetensors")
    return file


def cut(path: Path) -> None:
    tensors(path).write_bytes(tensors(path).read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(tensors(path).read_bytes())
    data[len(data) // 2] ^= 1
    tensors(path).write_bytes(data)


def lose(path: Path) -> None:
    tensors(path).unlink()


def unlist(path: Path) -> None:
    (path / "checkpoint.json").write_text('{"step": 2')


def forget(path: Path) -> None:
    (path / "checkpoint.json").write_text(json.dumps({"step": 20}))


@pytest.mark.parametrize("harm", [cut, flip, lose, unlist, forget])
def test_a_damaged_newest_one_is_named_and_the_one_before_used(harm, tmp_path: Path, capsys) -> None:
    checkpoint.save(tmp_path, 10, state(1))
    checkpoint.save(tmp_path, 20, state(2))
    harm(tmp_path / "step-00000020")
    assert checkpoint.newest(tmp_path) == 10
    said = capsys.readouterr().out
    assert "step-00000020 is damaged" in said
    assert "trying step 10" in said
    assert checkpoint.newest(tmp_path) == 10  # and it is out of the way
    assert capsys.readouterr().out == ""
    checkpoint.save(tmp_path, 20, state(3))
    assert checkpoint.newest(tmp_path) == 20


def test_without_any(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none") is None


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    names = {file.suffix for file in (tmp_path / "step-00000001").iterdir()}
    assert names == {".json", ".safetensors"}  # formats that hold no code


def test_another_model_is_refused_with_the_difference(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    with pytest.raises(ValueError, match="method/v"):
        checkpoint.Reader(tmp_path, 1).read({"method": {"v": torch.zeros(64, 64)}})


def test_training_may_go_on_while_it_is_written(tmp_path: Path) -> None:
    writer = checkpoint.Writer(tmp_path)
    w = torch.ones(64, 64)
    writer.begin(1, {"method": {"w": w}, "skipped": 3})
    w.zero_()
    assert checkpoint.newest(tmp_path) is None  # not before it is whole
    writer.publish()
    assert checkpoint.newest(tmp_path) == 1
    read = checkpoint.load(tmp_path, 1)
    assert torch.equal(read["method"]["w"], torch.ones(64, 64))
    assert read["skipped"] == 3


READ = """
import json, sys, threading
from pathlib import Path
import torch
from ssl_pretrain import checkpoint
folder = Path(sys.argv[1])
state = {part: {f"{i}": torch.ones(1 << 19) for i in range(50)} for part in ("method", "avg", "square")}
checkpoint.save(folder, 1, state)
(file,) = (folder / "step-00000001").glob("*.safetensors")

def anonymous():  # kB of this process that no file stands behind
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])

def grown(work):
    for tensors in state.values():
        for tensor in tensors.values():
            tensor.zero_()
    over, seen = threading.Event(), []
    def look():
        while not over.wait(0.002):
            seen.append(anonymous())
    before = anonymous()
    thread = threading.Thread(target=look)
    thread.start()
    work()
    over.set()
    thread.join()
    assert len(seen) > 10
    assert all(bool((tensor == 1).all()) for tensors in state.values() for tensor in tensors.values())
    return max(seen) - before

def read():
    checkpoint.Reader(folder, 1).read(state)

def read_beside_the_file():
    held = file.read_bytes()
    read()

read()  # what it imports is no part of what it holds
print(json.dumps([file.stat().st_size / 1024, grown(read), grown(read_beside_the_file)]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read as Linux tells it")
def test_reading_one_does_not_hold_the_state_twice(tmp_path: Path) -> None:
    # Memory that is let go goes back to the system at once: holes in glibc's heap would hide what is taken.
    place = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", READ, str(tmp_path)]
    size, grown, beside = json.loads(subprocess.run(argv, stdout=subprocess.PIPE, check=True, env=place).stdout)
    assert grown < size / 4
    assert beside > 0.9 * size  # what is measured is what would be held


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from ssl_pretrain import checkpoint
folder = Path(sys.argv[1])
checkpoint.save(folder, 1, {"method": {"w": torch.zeros(1000)}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    checkpoint.save(folder, 2, {"method": {"w": torch.zeros(1_000_000)}})
except OSError as problem:
    print("errno", problem.errno)
print(checkpoint.newest(folder), sorted(p.name for p in folder.iterdir()))
"""


@pytest.mark.parametrize("limit", [0, 100, 100_000, 3_999_000])
def test_a_write_that_fails_part_way_leaves_the_ones_before(limit: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), str(limit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"errno {errno.EFBIG}" in done.stdout
    assert "1 ['step-00000001']" in done.stdout


def test_killed_while_writing(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
import torch
from ssl_pretrain import checkpoint
folder = Path(sys.argv[1])
checkpoint.save(folder, 1, {"method": {"w": torch.zeros(1000)}})
real = os.fsync
calls = [0]
def fsync(f):
    calls[0] += 1
    if calls[0] == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    real(f)
os.fsync = fsync
checkpoint.save(folder, 2, {"method": {"w": torch.ones(1000)}})
"""
    for at in (1, 2, 3, 4):
        folder = tmp_path / str(at)
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(at)], capture_output=True, text=True, check=False
        )
        assert done.returncode == -9
        expected = 1 if at < 4 else 2  # the fourth sync comes after the rename
        assert checkpoint.newest(folder) == expected
        checkpoint.save(folder, 3, state(0))
        checkpoint.prune(folder, keep_last=1, keep_every=None)
        assert [p.name for p in folder.iterdir()] == ["step-00000003"]


SHARDED = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from ssl_pretrain import checkpoint, distributed
folder, fault, at, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(os.environ["RANK"])
struck = int(sys.argv[5])
dist.init_process_group("gloo", init_method="file://" + sys.argv[4], rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
def state(value):
    w = distribute_tensor(torch.full((5, 1000), value), mesh, [Shard(0)])
    return {"method": {"w": w, "queue": torch.full((7,), value)}, "skipped": 0}
writer = checkpoint.Writer(folder, sharded=True)
def save(step, value):
    writer.begin(step, state(value))
    writer.wait()
    failed = torch.tensor([float(writer.problem is not None)])
    dist.all_reduce(failed)
    if not failed:
        writer.publish()
    return writer.problem
assert save(1, 1.0) is None
distributed.sharded_like = None  # made once: to make sharded tensors for every save would hold up training
real, calls = os.fsync, [0]
def fsync(file):
    calls[0] += 1
    if rank == struck and calls[0] == at:
        if fault == "kill":
            os.kill(os.getpid(), 9)
        raise OSError(28, "No space left on device")
    real(file)
os.fsync = fsync
print("problem", save(2, 2.0), flush=True)
dist.barrier()
dist.destroy_process_group()
# The writer and the mesh of this script still hold gloo's threads, which may abort an interpreter that ends; in a run they
# are gone by then.
os._exit(0)
"""


def two_that_write(folder: Path, fault: str, at: int, struck: int) -> list[subprocess.Popen]:
    """Two processes that save step 1, then step 2, at whose `at`th sync the fault befalls the process `struck`."""
    folder.parent.mkdir(exist_ok=True)
    return [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(folder), fault, str(at), str(folder.parent / "meet"), str(struck)],
            env={**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def wait_for_the_killed(ranks: list[subprocess.Popen], struck: int) -> None:
    ranks[struck].communicate()
    assert ranks[struck].returncode == -9
    try:
        ranks[1 - struck].communicate(timeout=30)
    except subprocess.TimeoutExpired:  # waits for the other, as it should
        ranks[1 - struck].kill()
        ranks[1 - struck].communicate()


def assert_whole(folder: Path, step: int) -> None:
    """The newest checkpoint of `folder` is that of `step`, and holds in one process what two wrote."""
    assert checkpoint.newest(folder) == step
    read = checkpoint.load(folder, step)
    assert torch.equal(read["method"]["w"], torch.full((5, 1000), float(step)))
    assert torch.equal(read["method"]["queue"], torch.full((7,), float(step)))


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "at"), [("full", 1), ("kill", 1), ("none", 99)])
def test_a_process_that_fails_while_all_write_their_parts_leaves_the_one_before(
    fault: str, at: int, tmp_path: Path
) -> None:
    ranks = two_that_write(tmp_path / "checkpoints", fault, at, struck=1)
    if fault == "kill":
        wait_for_the_killed(ranks, 1)
    else:
        said = [process.communicate()[0] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], said
        assert ("No space left" in said[1]) == (fault == "full")
    assert_whole(tmp_path / "checkpoints", 2 if fault == "none" else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (1, 1),  # its part
        (2, 1),  # the list of all parts
        (3, 1),  # the folder, before the rename
        (4, 2),  # after it
    ],
)
def test_the_first_process_killed_while_all_write_leaves_the_one_before_or_the_new_one(
    at: int, expected: int, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    wait_for_the_killed(two_that_write(folder, "kill", at, struck=0), 0)
    assert_whole(folder, expected)
    checkpoint.save(
        folder, 3, {**state(0), "method": {"w": torch.full((5, 1000), 3.0), "queue": torch.full((7,), 3.0)}}
    )
    checkpoint.prune(folder, keep_last=1, keep_every=None)
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]  # nothing of the broken one is left
    assert_whole(folder, 3)


COPIES = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from ssl_pretrain import checkpoint
folder, rank, apart = Path(sys.argv[1]), int(os.environ["RANK"]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=4)
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
def sharded(*shape, seed):
    whole = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return distribute_tensor(whole, mesh, [Replicate(), Shard(0)])
state = {f"w{i}": sharded(40, 10, seed=i) for i in range(10)}
state |= {"one row": sharded(1, 10, seed=10), "odd": sharded(5, 3, seed=11), "whole": torch.full((3,), 7.0)}
writer = checkpoint.Writer(folder if rank != 3 or not apart.name else apart, sharded=True)
writer.begin(1, {"method": state, "skipped": 4})
writer.wait()
dist.barrier()
writer.publish()
print("problem", writer.problem, flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # see SHARDED
"""


def four_that_write(folder: Path, apart: str = "") -> list[str]:
    """Two copies of a state, each shared by two processes, are saved; what each of the four says. The last one writes to
    the folder `apart`."""
    argv = [sys.executable, "-c", COPIES, str(folder), str(folder.parent / "meet"), apart]
    ranks = [
        subprocess.Popen(
            argv, env={**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(4)
    ]
    said = [process.communicate()[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * 4
    return said


@pytest.mark.slow
def test_copies_share_the_writing_and_write_every_part_once(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert all("problem None" in each for each in four_that_write(folder))
    read = checkpoint.load(folder, 1)
    assert read["skipped"] == 4
    expected = {f"w{i}": (40, 10, i) for i in range(10)} | {"one row": (1, 10, 10), "odd": (5, 3, 11)}
    assert set(read["method"]) == {*expected, "whole"}
    for name, (rows, columns, seed) in expected.items():
        whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(read["method"][name], whole), name
    assert torch.equal(read["method"]["whole"], torch.full((3,), 7.0))
    parts: dict[tuple, int] = {}
    sizes = []
    for file in sorted((folder / "step-00000001").glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            offsets = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for name in tensors:
            part = (name, *offsets[name]["saved_offsets"])
            parts[part] = parts.get(part, 0) + 1
        sizes.append(sum(tensor.numel() for tensor in tensors.values()))
    assert set(parts.values()) == {1}
    assert len(sizes) == 4
    assert max(sizes) < 1.2 * min(sizes)


@pytest.mark.slow
def test_parts_that_the_first_process_cannot_see_make_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    said = four_that_write(folder, str(tmp_path / "another disk"))
    assert "file system that all machines share" in said[0]
    assert checkpoint.newest(folder) is None


def test_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    reads = []
    real = HuggingFaceStorageReader.read_metadata
    monkeypatch.setattr(HuggingFaceStorageReader, "read_metadata", lambda self: (reads.append(1), real(self))[1])
    reader = checkpoint.Reader(tmp_path, 1)
    into: dict[str, dict[str, torch.Tensor]] = {}
    for (part, name), shape, dtype in reader.entries():
        into.setdefault(part, {})[name] = torch.empty(shape, dtype=dtype)
    reader.read(into)
    assert torch.equal(into["method"]["w"], torch.full((64, 64), 1.0))
    assert len(reads) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")
def test_a_file_system_that_turns_read_only_leaves_the_ones_before(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        checkpoint.save(tmp_path, 1, state(1))
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            checkpoint.save(tmp_path, 2, state(2))
        assert checkpoint.newest(tmp_path) == 1
        assert float(checkpoint.load(tmp_path, 1)["method"]["w"][0, 0]) == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_write_text_is_whole_or_absent(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "one")
    files.write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_one_whose_writing_was_broken_off_is_named_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(tmp_path, 20, {"method": {"w": torch.ones(3)}})
    (tmp_path / ".writing-00000025").mkdir()
    (tmp_path / ".writing-00000025" / "shard.safetensors").write_bytes(b"half")
    checkpoint.clear(tmp_path)
    assert checkpoint.newest(tmp_path) == 20
    assert "the checkpoint of step 25 is incomplete; it is removed" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]
