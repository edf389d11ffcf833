"""Features that several processes compute together, and that a killed one has left half done."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from small_encoders import small_encoder

from ssl_pretrain import encoder as exported
from ssl_pretrain.data.source import open_source
from ssl_pretrain.features import extract, feature_cache
from ssl_pretrain.features.feature_cache import Bad, Pass, join

IMAGES, EACH = 42, 4

# Extracts features in blocks of EACH, slowly; each image that is read is a line of LOG.
SLOW = """
import sys, time
from pathlib import Path
import numpy as np
from ssl_pretrain import encoder
from ssl_pretrain.data.source import Source, open_source
from ssl_pretrain.features import extract, feature_cache

run, data, log, pause = sys.argv[1:5]
feature_cache.BLOCK = 4

class Slow(Source):
    def __init__(self, source):
        self.source, self.labels, self.classes = source, source.labels, source.classes
        self.fingerprint, self.description = source.fingerprint, source.description
    def __len__(self):
        return len(self.source)
    def __getitem__(self, index):
        time.sleep(float(pause))
        with open(log, "a") as file:
            file.write(f"{index}\\n")
        return self.source[index]
    def name(self, index):
        return self.source.name(index)

found = extract(encoder.load(run), Slow(open_source(data, None)), ["cls", "mean"], batch_size=3)
np.savez(log + ".npz", **found.features)
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for i in range(IMAGES):
        picture(i, (16, 16)).save(tmp_path / "images" / f"{i:02d}.png")
    (tmp_path / "images" / "17.png").write_bytes(b"none")
    exported.save(tmp_path / "run" / "encoder", small_encoder())
    return tmp_path


def start(desk: Path, log: str, pause: float) -> subprocess.Popen:
    argv = [sys.executable, "-c", SLOW, desk / "run", desk / "images", desk / log, str(pause)]
    return subprocess.Popen(list(map(str, argv)), env={**os.environ, "OMP_NUM_THREADS": "1"})


def read(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def wanted(desk: Path) -> dict[str, np.ndarray]:
    return extract(
        exported.load(desk / "run"), open_source(str(desk / "images"), None), ["cls", "mean"], cache=False
    ).features


def assert_right(desk: Path, log: str) -> None:
    found = np.load(desk / f"{log}.npz")
    for name, rows in wanted(desk).items():
        np.testing.assert_allclose(found[name], rows[: IMAGES - 1], rtol=1e-4, atol=1e-5)
    (place,) = (desk / "cache" / "features").iterdir()
    assert sorted(path.name.split(".")[0] for path in place.iterdir()) == ["cls", "images", "lock", "mean"]


@pytest.mark.slow
def test_two_processes_share_the_images_between_them(desk: Path) -> None:
    both = [start(desk, log, 0.15) for log in ("a", "b")]
    assert [process.wait(120) for process in both] == [0, 0]
    a, b = read(desk / "a"), read(desk / "b")
    assert sorted(a + b) == list(range(IMAGES))
    assert min(len(a), len(b)) >= EACH
    assert_right(desk, "a")
    assert_right(desk, "b")


@pytest.mark.slow
def test_a_killed_pass_goes_on_where_it_was(desk: Path) -> None:
    first = start(desk, "a", 0.1)
    while len(read(desk / "a")) < 20 and first.poll() is None:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    (part,) = (desk / "cache" / "features").glob(f"*/{feature_cache.PREFIX}*")
    done = list((part / "marks").read_bytes()).count(feature_cache.DONE)
    assert done >= 3
    assert start(desk, "b", 0.0).wait(120) == 0
    assert len(read(desk / "b")) == IMAGES - EACH * done
    assert_right(desk, "b")


def begin(folder: Path, count: int, key: str = "key") -> Pass:
    job = join(folder, key, {"x": 2}, count)
    assert job is not None
    return job


def filled(job: Pass, images: range) -> None:
    job.arrays["x"][images.start : images.stop] = np.arange(images.start, images.stop)[:, None]


def test_blocks_of_the_dead_are_free_and_rows_without_an_image_are_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK", 4)
    one, two = (begin(tmp_path, 14) for _ in range(2))
    assert (one.number, two.number) == (1, 2)
    mine, theirs = one.claim(), two.claim()
    assert [next(mine), next(theirs), next(mine)] == [range(4), range(4, 8), range(8, 12)]
    for images in (range(4), range(8, 12)):
        filled(one, images)
    one.done(range(4), [Bad(2, "c", "broken")])
    one.done(range(8, 12), [])
    assert one.finished == 8
    assert next(mine) == range(12, 14)
    assert next(mine, None) is None  # the other lives
    two.leave()
    assert list(one.claim()) == [range(4, 8)]
    for images in (range(4, 8), range(12, 14)):
        filled(one, images)
    one.done(range(4, 8), [Bad(5, "f", "broken")])
    assert not one.whole
    one.done(range(12, 14), [])
    assert one.whole
    got: list[tuple[np.ndarray, list[Bad]]] = []
    one.finish(lambda files, bad: got.append((np.load(files["x"]).copy(), bad)))
    ((rows, bad),) = got
    assert [each.index for each in bad] == [2, 5]
    np.testing.assert_array_equal(rows[:12, 1], [0, 1, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13])
    assert one.gone
    one.finish(lambda *_: pytest.fail("it was finished already"))
    one.leave()


def test_who_comes_when_the_pass_has_just_been_finished_finds_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK", 4)
    one, late = (begin(tmp_path, 8) for _ in range(2))
    for images in one.claim():
        filled(one, images)
        one.done(images, [])
    assert not late.gone
    one.finish(lambda files, bad: None)
    assert list(late.claim()) == []
    assert late.whole
    late.done(range(4), [Bad(2, "c", "broken")])  # without locks it could have had a block of its own
    assert late.gone
    late.finish(lambda *_: pytest.fail("it was finished already"))
    for job in (one, late):
        job.leave()


def test_a_pass_that_was_left_while_packing_begins_anew_and_old_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK", 4)
    job = begin(tmp_path, 8)
    for images in job.claim():
        job.done(images, [])
    (job.folder / "finishing").touch()
    job.leave()
    again = begin(tmp_path, 8)
    assert again.finished == 0
    other = begin(tmp_path, 8, "other")
    assert again.folder.exists()  # somebody works at it
    again.leave()
    other.leave()
    begin(tmp_path, 8, "third").leave()
    (left,) = tmp_path.glob(f"{feature_cache.PREFIX}*")
    assert left.name.startswith(f"{feature_cache.PREFIX}third-")


def test_who_waits_for_one_that_died_while_packing_puts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK", 4)
    dead, waits = (begin(tmp_path, 8) for _ in range(2))
    for images in dead.claim():
        dead.done(images, [Bad(images.start, "a", "broken")])

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dead.finish(dies)
    dead.leave()
    assert waits.whole
    waits.finish(lambda *_: pytest.fail("rows have moved already"))
    assert waits.gone
    again = begin(tmp_path, 8)
    assert again.finished == 0
    for job in (waits, again):
        job.leave()


def test_who_has_finished_a_pass_leaves_the_next_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise half of a pass, with none of its bad images, is taken for the whole of it."""
    monkeypatch.setattr(feature_cache, "BLOCK", 4)
    one = begin(tmp_path, 8)
    for images in one.claim():
        one.done(images, [])
    one.finish(lambda *_: None)
    other = begin(tmp_path, 8)  # has looked for the features just before they were there
    assert one.gone
    assert not other.gone
    assert list(one.claim()) == []
    one.finish(lambda *_: pytest.fail("that is another pass"))
    assert other.finished == 0
    for job in (one, other):
        job.leave()


def test_who_comes_as_the_features_are_there_begins_nothing(tmp_path: Path) -> None:
    assert join(tmp_path, "key", {"x": 2}, 8, lambda: True) is None
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_number_that_a_dead_process_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK", 4)
    dead = begin(tmp_path, 8)
    next(dead.claim())
    dead.leave()
    heir = begin(tmp_path, 8)
    assert heir.number == dead.number
    assert list(heir.claim()) == [range(4), range(4, 8)]
    heir.leave()
