"""The loader: the same bytes for any number of workers, any start and any sharing; bad files; workers that end as
they should."""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_data import BIG_VIEW, NumberedFiles

from ssl_pretrain.data.decode import decode
from ssl_pretrain.data.loader import RawBatch, Share, _Restarted, batches, fixed_batches, to_batch
from ssl_pretrain.data.sampler import samples
from ssl_pretrain.data.source import Source
from ssl_pretrain.data.views import ViewSpec, cut
from ssl_pretrain.errors import UserError
from ssl_pretrain.randomness import numpy_generator

SMALL_VIEW = ViewSpec(name="small", size=(12, 12), count=3, scale=(0.05, 0.3), vflip=0.5, interpolation="bilinear")


def picture(number: int) -> np.ndarray:
    """An image of its own for every number, of a size of its own."""
    y, x = np.mgrid[: 30 + number % 7, : 28 + number % 5]
    planes = [127 + 120 * np.sin(x / (3 + number % 11) + c + number) * np.cos(y / (4 + c)) for c in range(3)]
    return np.stack(planes, -1).astype(np.uint8)


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> NumberedFiles:
    folder = tmp_path_factory.mktemp("good")
    for number in range(50):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    return NumberedFiles(folder, 50)


def run(
    source: Source,
    share: Share,
    *,
    start: int = 0,
    stop: int = 4,
    workers: int = 0,
    policy: str = "replace",
    specs: tuple[ViewSpec, ...] = (BIG_VIEW, SMALL_VIEW),
    seed: int = 5,
) -> list[RawBatch]:
    return list(
        batches(
            source,
            specs,
            share,
            seed=seed,
            channels=3,
            start_step=start,
            stop_step=stop,
            workers=workers,
            policy=policy,  # type: ignore[arg-type]
        )
    )


def contents(raw: RawBatch) -> tuple:
    """Everything in a batch, comparable."""
    return (
        raw.step,
        raw.micro,
        raw.index.tolist(),
        None if raw.labels is None else raw.labels.tolist(),
        {name: (tuple(view.shape), view.numpy().tobytes()) for name, view in raw.views.items()},
        {name: (rows.shape, rows.tobytes()) for name, rows in raw.geometry.items()},
        {name: (rows.shape, rows.tobytes()) for name, rows in raw.colour.items()},
        raw.failures,
    )


# ---- what a batch holds


def test_a_batch_is_the_sampled_images_cut_by_their_own_keys(good: NumberedFiles):
    """Each row against `decode` and `cut`, one view at a time, with a fresh generator of the documented key."""
    epochs, index = samples(0, 4 * 16, 50, seed=5)
    assert epochs.max() == 1
    for raw in run(good, Share(16)):
        rows = slice(raw.step * 16, raw.step * 16 + 16)
        assert raw.index.tolist() == index[rows].tolist()
        assert raw.labels is not None
        assert raw.labels.tolist() == (index[rows] * 10).tolist()
        assert raw.views["big"].shape == (16, 24, 20, 3)
        assert raw.views["small"].shape == (3, 16, 12, 12, 3)
        for row, (epoch, sample) in enumerate(zip(epochs[rows].tolist(), index[rows].tolist(), strict=True)):
            image = decode(jpeg(sample), 3)
            for spec in (BIG_VIEW, SMALL_VIEW):
                for copy in range(spec.count):
                    expected = cut(image, spec, numpy_generator(5, "view", epoch, sample, spec.name, copy))
                    at = (row,) if spec.count == 1 else (copy, row)
                    assert np.array_equal(raw.views[spec.name][at].numpy(), expected.image)
                    assert np.array_equal(raw.geometry[spec.name][at], expected.geometry)
                    assert np.array_equal(raw.colour[spec.name][at], expected.colour)


def test_the_restarted_generator_is_a_new_one_every_time():
    restarted = _Restarted()
    for parts in ((1, "view", 2, 3, "a", 0), (1, "view", 2, 3, "a", 1), (2**40, "x")):
        generator, fresh = restarted(*parts), numpy_generator(*parts)
        for draw in (lambda g: g.random(37), lambda g: g.integers(7, size=5, dtype=np.uint32), lambda g: g.random(3)):
            assert np.array_equal(draw(generator), draw(fresh))


def test_views_change_with_epoch_seed_and_copy(good: NumberedFiles):
    raws = run(good, Share(50), stop=2)
    first, second = (raw.views["big"].numpy()[np.argsort(raw.index)] for raw in raws)
    assert (first != second).any((1, 2, 3)).mean() > 0.9
    other = run(good, Share(50), stop=1, seed=6)[0]
    assert (other.views["big"].numpy()[np.argsort(other.index)] != first).any((1, 2, 3)).mean() > 0.9
    copies = raws[0].views["small"].numpy()
    assert (copies[0] != copies[1]).any((1, 2, 3)).mean() > 0.9


def test_to_batch_normalises_and_keeps_the_rest(good: NumberedFiles):
    raw = run(good, Share(8), stop=1, specs=(SMALL_VIEW,))[0]
    batch = to_batch(raw, (SMALL_VIEW,), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), torch.device("cpu"))
    expected = (raw.views["small"].numpy() / 255.0 - (0.5, 0.4, 0.3)) / (0.2, 0.3, 0.4)
    assert batch.views["small"].shape == (3, 8, 3, 12, 12)
    assert np.abs(batch.views["small"].numpy() - np.moveaxis(expected, -1, -3)).max() < 1e-5
    assert batch.index.tolist() == raw.index.tolist()
    assert batch.index.dtype == torch.int64
    assert batch.labels is not None
    assert batch.labels.tolist() == [10 * i for i in raw.index]
    assert batch.geometry["small"].shape == (3, 8, 6)
    unlabelled = run(NumberedFiles(good.folder, 50, labelled=False), Share(8), stop=1, specs=(SMALL_VIEW,))[0]
    assert to_batch(unlabelled, (SMALL_VIEW,), (0.5,) * 3, (0.2,) * 3, torch.device("cpu")).labels is None


# ---- the same bytes


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(good: NumberedFiles, workers: int):
    share = Share(12, accumulate=2)
    alone = [contents(raw) for raw in run(good, share)]
    assert [contents(raw) for raw in run(good, share, workers=workers)] == alone
    assert [(c[0], c[1]) for c in alone] == [(s, m) for s in range(4) for m in range(2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_start_is_the_tail_of_the_whole(good: NumberedFiles, workers: int):
    share = Share(12, accumulate=2)
    whole = [contents(raw) for raw in run(good, share, stop=6)]
    assert [contents(raw) for raw in run(good, share, start=4, stop=6, workers=workers)] == whole[8:]
    assert run(good, share, start=6, stop=6, workers=workers) == []


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (4, 1), (2, 3)])
def test_however_it_is_shared_the_global_batch_is_the_same(good: NumberedFiles, world: int, accumulate: int):
    whole = run(good, Share(24), stop=3)
    parts = {rank: run(good, Share(24, accumulate, rank, world), stop=3) for rank in range(world)}
    for step, batch in enumerate(whole):
        in_order = [parts[r][step * accumulate + m] for m in range(accumulate) for r in range(world)]
        assert np.concatenate([raw.index for raw in in_order]).tolist() == batch.index.tolist()
        assert torch.equal(torch.cat([raw.views["big"] for raw in in_order]), batch.views["big"])
        assert torch.equal(torch.cat([raw.views["small"] for raw in in_order], dim=1), batch.views["small"])
        for rank in range(world):
            for micro in range(accumulate):
                rows = Share(24, accumulate, rank, world).rows(micro)
                raw = parts[rank][step * accumulate + micro]
                assert torch.equal(batch.views["big"][rows], raw.views["big"])


def test_the_global_generators_are_left_alone(good: NumberedFiles):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore[index]  # noqa: NPY002
    run(good, Share(8), stop=1)
    run(good, Share(8), stop=1, workers=1)
    after = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_fixed_batches_are_the_same_every_time_in_order(good: NumberedFiles):
    def made(share: Share, workers: int = 0) -> list[RawBatch]:
        return list(fixed_batches(good, (BIG_VIEW,), share, seed=5, channels=3, policy="replace", workers=workers))

    once = made(Share(16))
    assert np.concatenate([raw.index for raw in once]).tolist() == list(range(48))
    assert [contents(raw) for raw in made(Share(16), workers=2)] == [contents(raw) for raw in once]
    halves = [made(Share(16, 1, rank, 2)) for rank in range(2)]
    for step, raw in enumerate(once):
        assert torch.equal(torch.cat([half[step].views["big"] for half in halves]), raw.views["big"])


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ((100, 3, 0, 2), "100 does not divide into 2 process.* 3 micro-batch.*: 96 and 102"),
        ((3, 1, 0, 4), "nearest that do: 4$"),
        ((0, 1, 0, 1), "nearest that do: 1$"),
        ((8, 0, 0, 1), "accumulate must be at least 1"),
        ((8, 1, 2, 2), "rank 2 of 2"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(share: tuple[int, int, int, int], message: str):
    with pytest.raises(UserError, match=message):
        Share(*share)


# ---- bad files


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[NumberedFiles, dict[int, str]]:
    """300 files of which 1 % are bad, each in its own way, and one is an odd but good 16-bit PNG."""
    folder = tmp_path_factory.mktemp("spoilt")
    for number in range(300):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)).save(file, "PNG")
    (folder / "7.jpg").write_bytes(file.getvalue())
    (folder / "20.jpg").write_bytes(jpeg(20)[:500])
    (folder / "111.jpg").write_bytes(b"")
    (folder / "250.jpg").write_text("not a picture")
    (folder / "251.jpg").unlink()
    return NumberedFiles(folder, 300), {20: "", 111: "empty", 250: "not an image", 251: "FileNotFoundError"}


@pytest.mark.parametrize("policy", ["replace", "skip"])
def test_bad_files_are_replaced_and_listed(spoilt: tuple[NumberedFiles, dict[int, str]], policy: str):
    source, bad = spoilt
    alone = run(source, Share(30), stop=20, policy=policy, specs=(BIG_VIEW,))
    failures = [failure for raw in alone for failure in raw.failures]
    assert sorted(index for index, _, _ in failures if index != 251) == sorted([20, 111, 250] * 2)  # once an epoch
    for index, name, reason in failures:
        assert name == f"{index}.jpg"
        assert bad[index] in reason
        assert reason
    _, wanted = samples(0, 600, 300, seed=5)
    used = np.concatenate([raw.index for raw in alone])
    assert np.flatnonzero(used != wanted).tolist() == np.flatnonzero(np.isin(wanted, list(bad))).tolist()
    assert not np.isin(used, list(bad)).any()
    for raw in alone:
        assert raw.labels is not None
        assert raw.labels.tolist() == [10 * i for i in raw.index]
    # the row holds the image that it names
    raw = next(raw for raw in alone if raw.failures)
    row = int(np.flatnonzero(raw.index != wanted[raw.step * 30 : raw.step * 30 + 30])[0])
    rng = numpy_generator(5, "view", raw.step // 10, int(raw.index[row]), "big", 0)
    expected = cut(decode(source[int(raw.index[row])], 3), BIG_VIEW, rng)
    assert np.array_equal(raw.views["big"][row].numpy(), expected.image)
    again = run(source, Share(30), stop=20, policy=policy, specs=(BIG_VIEW,), workers=2)
    assert [contents(raw) for raw in again] == [contents(raw) for raw in alone]


def test_skip_takes_the_next_of_the_epochs_order(spoilt: tuple[NumberedFiles, dict[int, str]]):
    source, bad = spoilt
    used = np.concatenate([raw.index for raw in run(source, Share(30), stop=10, policy="skip", specs=(BIG_VIEW,))])
    order = samples(0, 300, 300, seed=5)[1]
    for place in np.flatnonzero(np.isin(order, list(bad))):
        following = np.roll(order, -int(place) - 1)
        assert used[place] == following[~np.isin(following, list(bad))][0]


@pytest.mark.parametrize("workers", [0, 2])
def test_fail_names_the_file_and_the_reason(spoilt: tuple[NumberedFiles, dict[int, str]], workers: int):
    source, _ = spoilt
    with pytest.raises(UserError, match=r"^(20|111|250|251)\.jpg cannot be used: .+--bad-images replace$"):
        run(source, Share(30), stop=10, policy="fail", workers=workers, specs=(BIG_VIEW,))


@pytest.mark.parametrize("policy", ["replace", "skip"])
@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_is_all_bad_ends_with_one_message(tmp_path: Path, policy: str, workers: int):
    for number in range(150):
        (tmp_path / f"{number}.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"^nearly all images are unreadable: 100 in a row .*\d+\.jpg: not an image"):
        run(NumberedFiles(tmp_path, 150), Share(4), policy=policy, workers=workers)
    with pytest.raises(UserError, match=r"^the data is not where it was.*No such file"):
        run(NumberedFiles(tmp_path / "gone", 150), Share(4), policy=policy, workers=workers)


class Broken(NumberedFiles):
    def __getitem__(self, index: int) -> bytes | np.ndarray:
        raise ZeroDivisionError("a bug, not a bad file")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_is_not_taken_for_a_bad_file(good: NumberedFiles, workers: int):
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(Broken(good.folder, 50), Share(4), workers=workers)


# ---- processes


class Bus(NumberedFiles):
    """What the kernel does to a worker that writes where /dev/shm has no room left."""

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        os.kill(os.getpid(), signal.SIGBUS)
        return b""


def test_a_bus_error_in_a_worker_is_explained(good: NumberedFiles, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match=r"ran out of shared memory.*--workers 0"):
        run(Bus(good.folder, 50), Share(4), workers=1)
    assert capfd.readouterr().err == ""


def test_too_little_shared_memory_is_said_before_the_start(good: NumberedFiles, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"free": 64 * 2**20})
    monkeypatch.setattr("ssl_pretrain.data.loader.shutil.disk_usage", lambda path: usage)
    large = ViewSpec(name="v", size=(224, 224))
    with pytest.raises(UserError, match=r"4 workers need 239 MiB of shared memory.*64 MiB free.*--workers 0"):
        run(good, Share(128), stop=100, workers=4, specs=(large,))
    run(good, Share(128), stop=1, workers=0, specs=(large,))


@pytest.mark.parametrize("checked", [True, False])
def test_a_machine_with_little_shared_memory(good: NumberedFiles, checked: bool):
    """A real one of 1 MiB, in a mount namespace; also where it fills up only after the start, as others use it."""
    script = f"""
        import sys, types
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from synthetic_data import NumberedFiles
        from ssl_pretrain.data import loader
        from ssl_pretrain.data.loader import Share, batches
        from ssl_pretrain.data.views import ViewSpec
        from ssl_pretrain.errors import UserError
        if not {checked}:
            plenty = types.SimpleNamespace(free=2**40)
            loader.shutil = types.SimpleNamespace(disk_usage=lambda path: plenty)
        source = NumberedFiles(Path({str(good.folder)!r}), 50)
        try:
            for raw in batches(source, [ViewSpec(name="v", size=(224, 224))], Share(16), seed=0, channels=3,
                               start_step=0, stop_step=9, workers=2, policy="fail"):
                pass
        except UserError as error:
            print(error)
    """
    little = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$0" "$@"'
    command = ["unshare", "--mount", "sh", "-c", little]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, "true"], check=False, stderr=subprocess.DEVNULL).returncode
    ):
        pytest.skip("mounting in a namespace of one's own is not permitted here")
    done = subprocess.run(
        [*command, sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        check=False, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stderr == ""
    assert ("2 workers need" if checked else "the loader's workers ran out of shared memory") in done.stdout
    assert "--workers 0" in done.stdout


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def until(condition: object, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


SCRIPT = """
    import signal, sys, time
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from synthetic_data import BIG_VIEW, NumberedFiles
    from ssl_pretrain.data.loader import Share, batches

    def stop(number, frame):
        print("main got", signal.Signals(number).name, flush=True)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, stop)
    source = NumberedFiles(Path({folder!r}), 50)
    made = batches(source, (BIG_VIEW,), Share(8), seed=0, channels=3, start_step=0, stop_step=1000, workers=2,
                   policy="fail")
    next(made)
    print("ready", flush=True)
    time.sleep({sleep})
    for _ in range(50):
        next(made)
    print("still fed", flush=True)
    made.close()
    print("closed", flush=True)
"""


@pytest.fixture
def started(good: NumberedFiles, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen]:
    """A process that holds two workers, in a process group of its own."""
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(good.folder), sleep=request.param)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("started", [600], indirect=True)
def test_workers_end_when_their_parent_is_killed(started: subprocess.Popen):
    workers = children(started.pid)
    assert len(workers) == 2
    started.kill()
    assert started.wait() == -signal.SIGKILL
    assert until(lambda: not any(alive(pid) for pid in workers))
    assert started.stderr is not None
    assert started.stderr.read() == ""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_workers_that_start_after_their_parent_was_killed_end_too(good: NumberedFiles):
    """On a busy machine a worker may come to its first line after that; torch's own watch takes the new parent, which
    never ends, for the old one."""
    script = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from synthetic_data import BIG_VIEW, NumberedFiles
        from ssl_pretrain.data.loader import Share, batches
        from torch.utils.data._utils import signal_handling

        before = signal_handling._set_worker_signal_handlers

        def late():
            print("started", flush=True)
            time.sleep(3)
            before()

        signal_handling._set_worker_signal_handlers = late
        source = NumberedFiles(Path({str(good.folder)!r}), 50)
        next(batches(source, (BIG_VIEW,), Share(8), seed=0, channels=3, start_step=0, stop_step=1000, workers=2,
                     policy="fail"))
    """
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == [b"started\n"] * 2
        workers = children(process.pid)
        assert len(workers) == 2
        process.kill()
        process.wait()
        assert until(lambda: not any(alive(pid) for pid in workers))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("started", [1], indirect=True)
def test_signals_to_the_whole_job_are_the_main_processes_business(started: subprocess.Popen):
    workers = children(started.pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(started.pid, number)
        time.sleep(0.1)
    out, err = started.communicate(timeout=60)
    assert err == ""
    assert re.findall("main got (SIG\\w+)", out) == ["SIGINT", "SIGTERM", "SIGUSR1"]  # and no worker printed the like
    assert out.endswith("still fed\nclosed\n")
    assert started.returncode == 0
    assert not any(alive(pid) for pid in workers)


def test_closing_early_leaves_no_worker(good: NumberedFiles):
    before = children(os.getpid())
    made = batches(
        good, (BIG_VIEW,), Share(8), seed=0, channels=3, start_step=0, stop_step=1000, workers=2, policy="fail"
    )
    next(made)
    workers = [pid for pid in children(os.getpid()) if pid not in before]
    assert len(workers) == 2
    made.close()  # type: ignore[attr-defined]
    assert until(lambda: not any(alive(pid) for pid in workers), seconds=10)
