"""Folders, tar shards and parquet as sources: what is found, in which order, with which labels; the index cache."""

import importlib
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source_files import IMAGE_TYPE, fill, pack, png, structs, write_parquet

from ssl_pretrain.data import folder, index, names, parquet, tar
from ssl_pretrain.data.source import evaluation_splits, open_source, pretraining_split, splits
from ssl_pretrain.errors import UserError
from ssl_pretrain.files import cache_folder

REAL = Path(__file__).parents[1].parent / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images at {REAL}")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(path))
    return path


def settle() -> None:
    """Let the clock move on, so that what was written is older than what is built from it."""
    time.sleep(folder.CLOCK_TICK_NS / 1e9 + 0.02)


def everything(source) -> list[bytes]:
    return [source[i] for i in range(len(source))]


# ---- folders


def test_flat_folder_has_no_labels_and_is_ordered_by_stem(tmp_path):
    files = {"b.png": 1, "a.PNG": 2, "a-1.jpg": 3, "c.tar.jpeg": 4, "ab.webp": 5, "long" * 20 + "1.png": 6}
    files["long" * 20 + "0.png"] = 7
    root = fill(
        tmp_path / "d", {**files, "notes.txt": b"", "Thumbs.db": b"", ".hidden.png": 8, ".git/x.png": 9, "x": b""}
    )
    source = open_source(str(root), None)
    assert (source.labels, source.classes) == (None, None)
    assert splits(str(root)) == []
    ordered = sorted(files, key=lambda name: (name.split(".")[0].encode(), name.encode()))
    assert [source.name(i) for i in range(len(source))] == [str(root / name) for name in ordered]
    assert everything(source) == [png(files[name]) for name in ordered]
    assert source.description == "folder of 7 images"
    for wrong in (-1, 7):
        with pytest.raises(IndexError):
            source[wrong]


def test_order_of_many_names_is_that_of_python(tmp_path):
    rng = np.random.default_rng(0)
    alphabet = list("ab0_-é z")
    made = {"".join(rng.choice(alphabet, rng.integers(1, 20))).strip() + "y" for _ in range(1500)}
    made |= {"shared-prefix-of-more-than-sixteen" + str(i) for i in range(300)}
    files = {f"{rng.choice(['q', 'q.r', 'p'])}/{stem}{rng.choice(['.png', '.jpg', '.x.png'])}": b"" for stem in made}
    files |= {path.replace("p/", "q/", 1): b"" for path in files}
    files |= {path.replace("q/", "p/", 1).replace(".png", ".webp"): b"" for path in files}
    root = fill(tmp_path, files)
    source = open_source(str(root), None)

    def key(path: str):
        folder_, file = os.path.split(path)
        return file.split(".")[0].encode(), folder_.encode(), file.encode()

    expected = sorted(files, key=key)
    found = [os.fsdecode(source._listing.path(i)) for i in range(len(source))]
    assert found == expected


def test_labels_are_the_first_folders_that_differ_and_agree_between_splits(tmp_path):
    root = fill(
        tmp_path,
        {
            "Train/photos/dog/1.png": 1,
            "Train/photos/cat/deep/2.png": 2,
            "Train/photos/ant/3.png": 3,
            "val/photos/dog/4.png": 4,
            "val/photos/emu/5.png": 5,
        },
    )
    assert splits(str(root)) == ["train", "val"]
    train, val = open_source(str(root), "train"), open_source(str(root), "VAL")
    assert train.classes == val.classes == ("ant", "cat", "dog", "emu")
    assert train.labels.tolist() == [2, 1, 0]  # order 1, 2, 3
    assert val.labels.tolist() == [2, 3]
    assert everything(train) == [png(1), png(2), png(3)]
    assert everything(open_source(str(root), None)) == [png(i) for i in (1, 2, 3, 4, 5)]
    assert (pretraining_split(str(root)), evaluation_splits(str(root))) == ("train", ("train", "val"))
    assert train.labels.dtype == np.int64
    assert train.labels.flags.writeable  # torch warns of arrays that are not


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["a/1.png", "b/2.png"], [0, 1]),
        (["a/1.png", "a/2.png"], None),  # one folder is no distinction
        (["a/1.png", "b/2.png", "3.png"], None),  # mixed with loose images
        (["all/a/1.png", "all/b/2.png", "all/3.png"], None),
        (["all/a/1.png", "all/b/x/2.png"], [0, 1]),
    ],
)
def test_which_folders_are_classes(tmp_path, paths, labels):
    source = open_source(str(fill(tmp_path, dict.fromkeys(paths, b""))), None)
    assert (None if source.labels is None else source.labels.tolist()) == labels


def test_a_flat_split_has_no_labels_and_leaves_the_others_theirs(tmp_path):
    root = fill(tmp_path, {"train/a/1.png": 1, "train/b/2.png": 2, "test/3.png": 3, "extra/4.png": 4})
    assert open_source(str(root), "train").labels.tolist() == [0, 1]
    assert open_source(str(root), "test").labels is None
    both = open_source(str(root), None)
    assert everything(both) == [png(i) for i in (4, 1, 2, 3)]
    assert both.labels.tolist() == [-1, 0, 1, -1]


def test_a_class_of_trains_is_no_split(tmp_path):
    source = fill(tmp_path, {"bus/1.png": 1, "car/2.png": 2, "train/3.png": 3})
    assert splits(str(source)) == []
    assert open_source(str(source), None).classes == ("bus", "car", "train")


def test_awkward_names(tmp_path):
    files = {
        "with space.png": 1,
        "quo'te\".png": 2,
        "new\nline.png": 3,
        b"latin\xe9.png": 4,
        "ünï.png": 5,
        "-rf.png": 6,
    }
    root = fill(os.fsdecode(bytes(tmp_path) + b"/d\xff"), files)
    source = open_source(str(root), None)
    assert sorted(everything(source)) == sorted(map(png, range(1, 7)))
    for i in range(6):
        assert source.name(i).isprintable()
        source.name(i).encode()
    assert sorted(everything(pickle.loads(pickle.dumps(source)))) == sorted(map(png, range(1, 7)))


def test_class_names_that_are_no_unicode(tmp_path):
    root = fill(tmp_path, {b"a\xff/1.png": 1, "b/2.png": 2})
    for _ in range(2):  # built, then from the cache
        assert open_source(str(root), None).classes == (os.fsdecode(b"a\xff"), "b")


def test_links_are_followed_but_not_in_circles(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", {"x/1.png": 1, "2.png": 2})
    root = fill(tmp_path / "d", {"own/3.png": 3})
    (root / "linked").symlink_to(elsewhere / "x")
    (root / "own" / "file.png").symlink_to(elsewhere / "2.png")
    (root / "own" / "up").symlink_to(root)
    (elsewhere / "x" / "back").symlink_to(root)
    (root / "own" / "dangling.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(root / "own" / "pipe.png")
    source = open_source(str(root), None)
    stems = [Path(source.name(i)).stem for i in range(len(source))]
    assert set(stems) == {"1", "3", "file", "dangling"}
    assert len(source) < 20
    assert source[stems.index("file")] == png(2)
    with pytest.raises(FileNotFoundError):
        source[stems.index("dangling")]
    assert stems.count("3") >= 1


def test_broken_and_decoded_files(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    made = {}
    for name, array in {"a": pixels, "b": pixels[..., 0], "c": pixels.astype(np.float32)}.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        made[f"{name}.npy"] = buffer.getvalue()
    objects = io.BytesIO()
    np.save(objects, np.array([{}], object), allow_pickle=True)
    source = open_source(
        str(fill(tmp_path, {**made, "d.npy": objects.getvalue(), "e.jpg": b"no image", "f.jpg": b""})), None
    )
    np.testing.assert_array_equal(source[0], pixels)
    np.testing.assert_array_equal(source[1], pixels[..., :1])
    for wrong in (2, 3):
        with pytest.raises(ValueError, match=r"\.npy of float32 .*save images as uint8|allow_pickle"):
            source[wrong]
    assert (source[4], source[5]) == (b"no image", b"")


def test_messages_for_what_is_not_there(tmp_path):
    fill(
        tmp_path, {"pictures/a.png": 1, "texts/a.txt": b"", "texts/b.txt": b"", "texts/c": b"", "split/train/a.png": 1}
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no .*picturse: did you mean .*pictures\?"):
        open_source(str(tmp_path / "picturse"), None)
    with pytest.raises(UserError, match=r"did you mean .*/split/train\?"):  # two folders up, and what follows it
        open_source(str(tmp_path / "spilt" / "train"), None)
    with pytest.raises(UserError, match=r"did you mean .*/split\?"):
        open_source(str(tmp_path / "spilt" / "test"), None)
    with pytest.raises(UserError, match=r"there is no fractal:classes=3: did you mean fractals:classes=3\?"):
        open_source("fractal:classes=3", None)
    with pytest.raises(UserError, match="exists, and holds no qqqq"):
        open_source(str(tmp_path / "qqqq" / "deeper"), None)
    with pytest.raises(UserError, match=r"holds no image; it holds 2 \.txt, 1 no extension"):
        open_source(str(tmp_path / "texts"), None)
    with pytest.raises(UserError, match="holds no files at all"):
        splits(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"neither \.tar nor \.parquet"):
        open_source(str(tmp_path / "texts" / "a.txt"), None)
    with pytest.raises(UserError, match="no split 'tain'; it has train; did you mean train"):
        open_source(str(tmp_path / "split"), "tain")
    with pytest.raises(UserError, match="not split at all"):
        open_source(str(tmp_path / "pictures"), "train")
    with pytest.raises(UserError, match="--train-split and --test-split"):
        evaluation_splits(str(tmp_path / "split"))
    with pytest.raises(UserError, match="not split into training and test"):
        evaluation_splits(str(tmp_path / "pictures"))


def test_fingerprint_follows_the_data_and_not_its_place(tmp_path):
    files = {"train/a/1.png": 1, "train/b/2.png": 2, "val/a/3.png": 3}
    root = fill(tmp_path / "here", files)
    first = open_source(str(root), "train").fingerprint
    int(first, 16)
    shutil.copytree(root, tmp_path / "there")
    assert open_source(str(tmp_path / "there"), "train").fingerprint == first
    assert open_source(str(tmp_path / "there" / "train"), None).fingerprint == first
    assert open_source(str(root), "val").fingerprint != first

    seen = {first, open_source(str(root), None).fingerprint}
    for change in (
        lambda: fill(root, {"train/b/4.png": 4}),
        lambda: (root / "train/b/4.png").rename(root / "train/b/5.png"),
        lambda: (root / "train/b/5.png").rename(root / "train/a/5.png"),
        lambda: (root / "train/a/5.png").write_bytes(b"resized"),  # leaves no trace in the folder's time
        (root / "train/a/1.png").unlink,
    ):
        settle()
        change()
        now = open_source(str(root), "train").fingerprint
        assert now not in seen
        seen.add(now)


def test_the_fingerprint_of_a_large_folder_knows_all_names_and_some_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "FINGERPRINT_FILES", 2)  # the first and the last
    root = fill(tmp_path, {f"{i}.png": i for i in range(5)})
    seen = [open_source(str(root), None).fingerprint]
    (root / "2.png").write_bytes(b"resized")
    assert open_source(str(root), None).fingerprint == seen[0]
    for change in (lambda: (root / "4.png").write_bytes(b"resized"), lambda: (root / "2.png").rename(root / "25.png")):
        settle()
        change()
        seen.append(open_source(str(root), None).fingerprint)
    assert len(set(seen)) == 3


def test_a_folder_that_may_not_be_read_is_told_each_time(tmp_path, monkeypatch):
    root = fill(tmp_path, {"a/1.png": 1, "b/2.png": 2})
    settle()
    scandir = os.scandir

    def guarded(path):
        if os.path.basename(os.fsencode(path)) == b"b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    for _ in range(2):
        source = open_source(str(root), None)
        assert everything(source) == [png(1)]
        assert source.left_out.sentence() == (
            "left out of the data: 1 x folder that may not be read (Permission denied) (b)"
        )
    monkeypatch.undo()


# ---- the cache of indexes


def test_a_known_folder_is_not_listed_again(tmp_path, monkeypatch):
    root = fill(tmp_path, {"train/a/1.png": 1, "train/b/2.png": 2, "val/a/3.png": 3})
    settle()
    before = open_source(str(root), "train")

    def refuse(*_):
        raise AssertionError("listed again")

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    after = open_source(str(root), "train")
    assert splits(str(root)) == ["train", "val"]
    assert everything(after) == everything(before)
    assert (after.labels.tolist(), after.fingerprint) == (before.labels.tolist(), before.fingerprint)


def test_a_changed_folder_is_indexed_again(tmp_path):
    root = fill(tmp_path, {"a/1.png": 1, "b/deep/2.png": 2})
    settle()
    assert len(open_source(str(root), None)) == 2
    fill(root, {"b/deep/3.png": 3})
    assert everything(open_source(str(root), None)) == [png(1), png(2), png(3)]
    (root / "a/1.png").unlink()
    assert everything(open_source(str(root), None)) == [png(2), png(3)]


def test_a_change_right_after_indexing_is_seen(tmp_path):
    """Within one tick of the file system's clock the folder's time does not change."""
    root = fill(tmp_path, {"1.png": 1})
    stamp = os.stat(root).st_mtime_ns
    open_source(str(root), None)
    fill(root, {"2.png": 2})
    os.utime(root, ns=(stamp, stamp))
    assert len(open_source(str(root), None)) == 2


def test_damaged_caches_are_built_again(tmp_path, cache):
    root = fill(tmp_path, {"a/1.png": 1, "b/2.png": 2, "b/3.png": 3})
    settle()
    expected = everything(open_source(str(root), None))
    (file,) = cache.glob("*.index")
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:n] for n in (0, 1, 7, 40, len(whole) // 2, len(whole) - 1)] + [whole + b"x", b"\0" * len(whole)]
    for at in rng.integers(0, len(whole), 40).tolist():
        damaged.append(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
    for content in damaged:
        file.write_bytes(content)
        source = open_source(str(root), None)
        assert everything(source) == expected
        assert source.labels.tolist() == [0, 1, 1]
    file.write_bytes(damaged[3])
    open_source(str(root), None)
    assert index.Index(file).meta["classes"] == ["a", "b"]


def test_an_unwritable_cache_costs_a_warning(tmp_path, monkeypatch):
    root = fill(tmp_path / "d", {"a/1.png": 1, "b/2.png": 2})
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot be used.*set SSL_PRETRAIN_CACHE") as caught:
        source = open_source(str(root), None)
    assert len(caught) == 1
    assert everything(pickle.loads(pickle.dumps(source))) == [png(1), png(2)]


def test_a_full_disk_costs_a_warning_and_leaves_nothing(tmp_path, cache):
    root = fill(tmp_path, {f"{i}.png": b"" for i in range(500)})
    program = (
        "import resource, signal, sys, warnings\n"
        "from ssl_pretrain.data.source import open_source\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    print(len(open_source(sys.argv[1], None)), len(caught), caught[0].message)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, root], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("500 1 the cache of indexes")
    assert [file.suffix for file in cache.iterdir()] == [".lock"]


def _open_and_report(path: str, start, queue) -> None:
    start.wait()
    source = open_source(path, None)
    queue.put((len(source), source.fingerprint, source[0]))


def test_processes_that_index_at_once_agree(tmp_path, cache):
    root = fill(tmp_path, {f"{i % 7}/{i}.png": b"%d" % i for i in range(3000)})
    settle()
    context = multiprocessing.get_context("fork")
    start, queue = context.Event(), context.Queue()
    workers = [context.Process(target=_open_and_report, args=(str(root), start, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(set(results)) == 1
    assert results[0][0] == 3000
    assert sorted(file.suffix for file in cache.iterdir()) == [".index", ".lock"]


def test_a_killed_builder_leaves_no_index_and_its_rest_is_cleared(tmp_path, cache):
    root = fill(tmp_path, {"1.png": 1})
    program = (
        "import os, signal, sys\n"
        "from ssl_pretrain.data import index, source\n"
        "finish = index.Writer.finish\n"
        "def killed(self, meta):\n"
        "    self._file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "index.Writer.finish = killed\n"
        "source.open_source(sys.argv[1], None)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, root], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(file.suffix for file in cache.iterdir()) == [".lock", ".tmp"]
    assert everything(open_source(str(root), None)) == [png(1)]
    assert sorted(file.suffix for file in cache.iterdir()) == [".index", ".lock"]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", "/somewhere/own")
    assert cache_folder() == Path("/somewhere/own")
    monkeypatch.delenv("SSL_PRETRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ssl-pretrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/ssl-pretrain")


def test_a_pickled_source_notices_that_its_index_changed(tmp_path):
    root = fill(tmp_path, {"1.png": 1})
    settle()
    frozen = pickle.dumps(open_source(str(root), None))
    assert len(frozen) < 2000  # the index travels as its path
    fill(root, {"0.png": 0})
    open_source(str(root), None)
    with pytest.raises(RuntimeError, match="the data changed"):
        pickle.loads(frozen)


def test_an_error_of_the_data_is_not_taken_for_one_of_the_cache(tmp_path):
    def build(writer):
        (tmp_path / "missing").read_bytes()

    with pytest.raises(FileNotFoundError, match="missing"):
        index.cached("kind", str(tmp_path), lambda known: True, build)


# ---- tar


def shard_members(numbers, classes="abc") -> dict:
    return {k: v for i in numbers for k, v in ((f"{i:03d}.png", i), (f"{i:03d}.cls", b"%d\n" % (i % len(classes))))}


def test_shards_and_a_tree_of_the_same_images_are_the_same_source(tmp_path):
    rng = np.random.default_rng(1)
    stems = [f"n{c}__x{rng.integers(1000):04d}_{i}" for i, c in enumerate(rng.integers(0, 3, 40))]
    tree = fill(tmp_path / "tree", {f"train/{s.split('__')[0]}/{s}.png": i for i, s in enumerate(stems)})
    for shard in range(4):
        members = {}
        for i in range(shard, 40, 4):
            members |= {f"{stems[i]}.cls": stems[i][1].encode(), f"{stems[i]}.png": i}
        pack(tmp_path / "shards" / f"set-train-{shard:03d}.tar", members)
    (tmp_path / "shards" / "info.json").write_text(
        json.dumps({"classes": [{"index": i, "name": f"n{i}"} for i in range(3)]})
    )
    by_tree, by_tar = open_source(str(tree), "train"), open_source(str(tmp_path / "shards"), "train")
    assert everything(by_tree) == everything(by_tar)
    assert by_tree.labels.tolist() == by_tar.labels.tolist()
    assert by_tree.classes == by_tar.classes == ("n0", "n1", "n2")
    assert by_tar.description == "4 tar shards of 40 images in 3 classes"
    assert by_tar.name(0).endswith(f".tar:{min(stems)}.png")


def test_tar_splits_labels_and_class_numbers(tmp_path):
    pack(tmp_path / "x-train-000.tar", shard_members(range(4)))
    pack(tmp_path / "x_val.tar", {"a.png": 1, "b.png": 2, "b.cls": b"7"})
    pack(tmp_path / "trainer.tar", {"z.png": 9})  # not a whole token
    assert splits(str(tmp_path)) == ["train", "val"]
    train, val = open_source(str(tmp_path), "train"), open_source(str(tmp_path), "val")
    assert train.labels.tolist() == [0, 1, 2, 0]
    assert val.labels.tolist() == [-1, 7]
    assert train.classes == val.classes == tuple(str(i) for i in range(8))
    assert len(open_source(str(tmp_path), None)) == 7
    assert everything(open_source(str(tmp_path / "x-train-000.tar"), None)) == everything(train)


def test_shards_in_folders_named_as_splits(tmp_path):
    pack(tmp_path / "Train" / "0.tar", {"a.png": 1})
    pack(tmp_path / "valid" / "0.tar", {"a.png": 2})
    assert splits(str(tmp_path)) == ["train", "valid"]
    assert everything(open_source(str(tmp_path), "valid")) == [png(2)]
    assert evaluation_splits(str(tmp_path)) == ("train", "valid")


def test_tar_of_folders(tmp_path):
    root = pack(
        tmp_path / "one.tar", {"./top/dog/1.png": 1, "./top/cat/x/2.png": 2, "./top/cat/._2.png": b"", "r.txt": b""}
    )
    source = open_source(str(root), None)
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [1, 0])
    assert source.name(1) == f"{root}:top/cat/x/2.png"

    inside = pack(tmp_path / "two.tar", {"train/a/1.png": 1, "train/b/2.png": 2, "val/b/3.png": 3})
    assert splits(str(inside)) == ["train", "val"]
    val = open_source(str(inside), "val")
    assert (everything(val), val.labels.tolist(), val.classes) == ([png(3)], [1], ("a", "b"))


def test_which_member_is_the_image(tmp_path):
    root = pack(
        tmp_path / "x.tar",
        {
            "a.seg.png": b"map",
            "a.jpg": b"image",
            "b.png": b"mask",
            "b.jpg": b"photo",
            "c.1.jpg": b"c1",
            "c.2.jpg": b"c2",
            "k.image.jpg": b"k",
            "k.Mask.png": b"map",
            "l.mask.png": b"l",  # a mask without its image
            "photo.edited.jpg": b"p2",
            "photo.jpg": b"p3",
            "q.image.jpg": b"q1",
            "q.rgb.jpg": b"q2",
        },
    )
    source = open_source(str(root), None)
    assert everything(source) == [b"image", b"photo", b"mask", b"c1", b"c2", b"k", b"l", b"p2", b"p3", b"q1", b"q2"]
    assert source.left_out.out == {"map of another image": (2, ["x.tar:a.seg.png", "x.tar:k.Mask.png"])}


def test_words_in_cls_are_class_names(tmp_path):
    root = pack(tmp_path / "x.tar", {"a.png": 1, "a.cls": b"zebra", "b.png": 2, "b.cls": b"ape", "c.png": 3})
    source = open_source(str(root), None)
    assert (source.classes, source.labels.tolist()) == (("ape", "zebra"), [1, 0, -1])
    huge = pack(tmp_path / "y.tar", {"a.png": 1, "a.cls": b"99999999999"})
    with pytest.raises(UserError, match="label 99999999999"):
        open_source(str(huge), None)


def test_links_and_long_or_odd_names_in_tar(tmp_path):
    (tmp_path / "x.tar").parent.mkdir(exist_ok=True)
    long, odd = "p/" * 120 + "long.png", os.fsdecode(b"p/odd\xe9 \n.png")
    with tarfile.open(pack(tmp_path / "x.tar", {"p/first.png": 1, long: 2, odd: 3}), "a") as archive:
        for kind, name in ((tarfile.LNKTYPE, "q/second.png"), (tarfile.SYMTYPE, "q/third.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "p/first.png"
            archive.addfile(link)
    source = open_source(str(tmp_path / "x.tar"), None)
    assert everything(source) == [png(1), png(2), png(3), png(1)]  # first, long, odd, second
    assert source.name(2).isprintable()


@pytest.mark.parametrize("cut", ["in the data", "in the header"])
def test_a_cut_shard_is_used_as_far_as_it_is_whole(tmp_path, cut):
    root = pack(tmp_path / "d" / "good.tar", {"a.png": 1})
    bad = pack(tmp_path / "d" / "bad.tar", {"b.png": 2, "c.png": 3, "d.png": bytes(5000)})
    with tarfile.open(bad) as archive:
        last = archive.getmember("d.png")
    length = last.offset_data + 700 if cut == "in the data" else last.offset + 100
    bad.write_bytes(bad.read_bytes()[:length])
    for _ in range(2):  # built, and from the cache
        source = open_source(str(root.parent), None)
        assert re.search(r"1 x truncated shard, .*\(bad\.tar\)", source.left_out.sentence())
        assert everything(source) == [png(1), png(2), png(3)]


def test_a_header_damaged_in_the_middle_is_told(tmp_path):
    root = pack(tmp_path / "x.tar", {"a.png": 1, "b.png": 2, "c.png": 3})
    with tarfile.open(root) as archive:
        at = archive.getmember("b.png").offset
    content = bytearray(root.read_bytes())
    content[at + 148 : at + 156] = b"\xff" * 8  # the checksum
    root.write_bytes(content)
    source = open_source(str(root), None)
    assert everything(source) == [png(1)]
    assert "1 x damaged shard" in source.left_out.sentence()


@pytest.mark.parametrize("end", [0, 512])
def test_a_shard_without_its_end_is_truncated(tmp_path, end):
    """The archive ends with two blocks of zeros; without both, members may be missing."""
    root = pack(tmp_path / "x.tar", {"a.png": 1})
    root.write_bytes(root.read_bytes()[: 1024 + end])
    source = open_source(str(root), None)
    assert everything(source) == [png(1)]
    assert "1 x truncated shard" in source.left_out.sentence()
    root.write_bytes(pack(tmp_path / "x.tar", {"a.png": 1}).read_bytes()[:2048])
    assert not open_source(str(root), None).left_out


def test_an_archive_behind_the_end_of_another_is_told(tmp_path):
    one, two = pack(tmp_path / "x.tar", {"a.png": 1}), pack(tmp_path / "y" / "y.tar", {"b.png": 2})
    one.write_bytes(one.read_bytes() + two.read_bytes())
    source = open_source(str(one), None)
    assert everything(source) == [png(1)]
    assert "1 x shard with more behind its end" in source.left_out.sentence()


def test_archives_that_cannot_be_read_in_place(tmp_path):
    plain = pack(tmp_path / "plain.tar", {"a.png": 1})
    for mode, name in (("w:gz", "d/x.tar.gz"), ("w:xz", "e/x.tar"), ("w:bz2", "f/x.tbz2")):
        path = tmp_path / name
        path.parent.mkdir()
        with tarfile.open(path, mode) as archive:
            archive.add(plain, "a.png")
        with pytest.raises(UserError, match=r"is compressed.*unpack it once"):
            open_source(str(path), None)
        with pytest.raises(UserError, match=r"is compressed.*unpack it once"):
            open_source(str(path.parent), None)
    for content, message in (
        (b"hello" * 500, "is not a tar archive"),
        (b"", "is empty"),
        (bytes(1024), "holds no image"),
    ):
        (tmp_path / "g.tar").write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path / "g.tar"), None)


def _open_files(below: Path) -> int:
    links = [f"/proc/self/fd/{entry}" for entry in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(str(below)) for link in links if os.path.lexists(link))


def test_open_shards_are_few_and_closed(tmp_path, monkeypatch):
    for shard in range(8):
        pack(tmp_path / f"{shard}.tar", {f"{shard}.png": shard})
    monkeypatch.setattr(tar, "OPEN_SHARDS", 3)
    source = open_source(str(tmp_path), None)
    before = _open_files(tmp_path)
    assert everything(source) == [png(i) for i in range(8)]
    assert _open_files(tmp_path) - before == 3
    del source
    assert _open_files(tmp_path) == 0


def _read_often(source, seed: int, queue) -> None:
    order = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(source)), 20)).tolist()
    queue.put(all(source[i] == png(i) for i in order))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_source(tmp_path, method):
    pack(tmp_path / "0.tar", {f"{i:02d}.png": i for i in range(0, 20)})
    pack(tmp_path / "1.tar", {f"{i:02d}.png": i for i in range(20, 40)})
    source = open_source(str(tmp_path), None)
    assert source[0] == png(0)  # its descriptor is inherited
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_read_often, args=(source, seed, queue)) for seed in range(2)]
    for worker in workers:
        worker.start()
    assert all(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()


def test_a_changed_shard_is_indexed_again_and_never_misread(tmp_path):
    root = pack(tmp_path / "x.tar", {"a.png": 1, "b.png": 2})
    old = open_source(str(root), None)
    pack(root, {"b.png": 2, "a.png": 1, "c.png": 3})
    assert everything(open_source(str(root), None)) == [png(1), png(2), png(3)]
    with pytest.raises(OSError, match="changed since it was indexed"):
        old[0]
    fingerprint = open_source(str(root), None).fingerprint
    assert fingerprint != old.fingerprint
    moved = pack(tmp_path / "elsewhere.tar", {"b.png": 2, "c.png": 3, "a.png": 1})
    assert open_source(str(moved), None).fingerprint == fingerprint


# ---- parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def test_parquet_of_the_hub(tmp_path):
    features = {"picture": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}
    for part, numbers in enumerate(([5, 1, 3], [0, 2])):
        columns = {"thumb": structs([9] * len(numbers)), "picture": structs(numbers), "kind": [n % 3 for n in numbers]}
        write_parquet(tmp_path / f"data/train-0000{part}-of-00002.parquet", columns, features, row_group_size=2)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", {"picture": structs([7]), "kind": [1]}, features)
    assert splits(str(tmp_path)) == ["train", "test"]
    train, test = open_source(str(tmp_path), "train"), open_source(str(tmp_path), "test")
    assert everything(train) == [png(i) for i in (5, 1, 3, 0, 2)]  # the order of the files and rows
    assert train.labels.tolist() == [2, 1, 0, 0, 2]
    assert train.classes == test.classes == ("a", "b", "c")
    assert train.name(3).endswith("train-00001-of-00002.parquet:0")
    assert train.description == "2 parquet files of 5 images in 3 classes"
    assert everything(pickle.loads(pickle.dumps(train))) == everything(train)
    with pytest.raises(IndexError):
        train[5]


def test_parquet_without_metadata(tmp_path):
    columns = {
        "id": [1, 2, 3],
        "img": pa.array([png(1), b"", None], pa.large_binary()),
        "label": pa.array([4, None, 0]),
    }
    source = open_source(str(write_parquet(tmp_path / "x.parquet", columns)), None)
    assert everything(source) == [png(1), b"", b""]
    assert (source.labels.tolist(), source.classes) == ([4, -1, 0], ("0", "1", "2", "3", "4"))

    nulls = write_parquet(tmp_path / "y.parquet", {"some": structs([None, 3, None, 4])}, row_group_size=2)
    source = open_source(str(nulls), None)
    assert everything(source) == [b"", png(3), b"", png(4)]
    assert source.labels is None


def test_parquet_with_words_as_labels(tmp_path):
    write_parquet(tmp_path / "train.parquet", {"image": structs([1, 2]), "label": ["cat", None]})
    write_parquet(tmp_path / "test.parquet", {"image": structs([3, 4]), "label": ["ape", "cat"]})
    train, test = open_source(str(tmp_path), "train"), open_source(str(tmp_path), "test")
    assert train.classes == test.classes == ("ape", "cat")
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, -1], [0, 1])


def test_parquet_is_unpacked_once_and_again_when_changed(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", {"image": structs([1, 2])})
    first = open_source(str(path), None)
    calls = []
    unpack = parquet._image_bytes
    monkeypatch.setattr(parquet, "_image_bytes", lambda *a: calls.append(a) or unpack(*a))
    assert open_source(str(path), None).fingerprint == first.fingerprint
    assert calls == []
    write_parquet(path, {"image": structs([3, 4, 5])})
    again = open_source(str(path), None)
    assert everything(again) == [png(3), png(4), png(5)]
    assert len(calls) == 1
    assert again.fingerprint != first.fingerprint


def test_unpacked_files_kept_open_are_few(tmp_path, cache, monkeypatch):
    for part in range(6):
        write_parquet(tmp_path / f"{part}.parquet", {"image": structs([part, part + 10])})
    monkeypatch.setattr(parquet, "OPEN_FILES", 2)
    source = open_source(str(tmp_path), None)
    assert _open_files(cache) == 0
    assert everything(source) == [png(i) for part in range(6) for i in (part, part + 10)]
    assert _open_files(cache) == 2
    copy = pickle.loads(pickle.dumps(source))
    assert copy[11] == png(15)
    del copy
    assert _open_files(cache) == 2
    write_parquet(tmp_path / "0.parquet", {"image": structs([7])})
    open_source(str(tmp_path), None)
    with pytest.raises(RuntimeError, match="the data changed"):
        source[0]


def test_parquet_messages(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no column of images.*it has x \(int64\)"):
        open_source(str(write_parquet(tmp_path / "a.parquet", {"x": [1]})), None)
    paths = pa.array([{"bytes": None, "path": "a.png"}], IMAGE_TYPE)
    with pytest.raises(UserError, match="not in its column 'image'"):
        open_source(str(write_parquet(tmp_path / "b.parquet", {"image": paths})), None)
    with pytest.raises(UserError, match="holds no rows"):
        open_source(str(write_parquet(tmp_path / "c.parquet", {"image": structs([])})), None)
    whole = write_parquet(tmp_path / "d.parquet", {"image": structs(range(50))})
    (tmp_path / "e.parquet").write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole parquet file"):
        open_source(str(tmp_path / "e.parquet"), None)

    monkeypatch.setattr(parquet, "_unpacked_size", lambda *_: 1 << 60)
    with pytest.raises(UserError, match="set SSL_PRETRAIN_CACHE to a directory on a disk with room"):
        open_source(str(whole), None)
    monkeypatch.setattr(parquet, "pa", None)

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="pyarrow")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"pip install 'ssl-pretrain\[parquet\]'"):
        open_source(str(whole), None)


def test_unpacking_takes_little_memory(tmp_path):
    """128 MB of images in 16 row groups, unpacked within the room of a few of them."""
    images = [np.random.default_rng(i).bytes(1 << 18) for i in range(512)]
    path = write_parquet(tmp_path / "x.parquet", {"image": images}, row_group_size=32)
    program = (
        "import sys\n"
        "import pyarrow.parquet\n"
        "from ssl_pretrain.data.source import open_source\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "assert len(open_source(sys.argv[1], None)) == 512\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 110_000  # KiB


def test_pyarrow_is_not_imported_for_other_data(tmp_path):
    root = fill(tmp_path, {"a.png": 1})
    program = (
        "import sys\nfrom ssl_pretrain.data.source import open_source\nopen_source(sys.argv[1], None)\n"
        "assert not any(name.split('.')[0] in ('pyarrow', 'torch') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, root], check=True)


# ---- real data


@needs_real
def test_real_imagenette():
    data = str(REAL / "imagenette160")
    assert evaluation_splits(data) == ("train", "val")
    train, val = open_source(data, "train"), open_source(data, "val")
    assert (len(train), len(val)) == (9469, 3925)
    assert train.classes == val.classes
    assert train.classes[0] == "tench"
    info = json.loads((REAL / "imagenette160" / "info.json").read_text())
    wnids = {entry["wnid"]: entry["index"] for entry in info["classes"]}
    stems = [train.name(i).rpartition(":")[2].partition(".")[0] for i in range(len(train))]
    assert train.labels.tolist() == [wnids[stem.split("__")[0]] for stem in stems]
    assert stems == sorted(stems)
    for i in (0, 4000, 9468):
        assert Image.open(io.BytesIO(train[i])).size == (160, 160)


@needs_real
def test_real_cifar10():
    train, test = (open_source(str(REAL / "cifar10"), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.classes[:2] == ("airplane", "automobile")
    assert np.bincount(train.labels).tolist() == [5000] * 10
    column = pq.read_table(REAL / "cifar10" / "test-00000-of-00001.parquet")
    for i in (0, 255, 256, 9999):
        assert test[i] == column["img"][i].as_py()["bytes"]
        assert test.labels[i] == column["label"][i].as_py()


@needs_real
def test_real_photographs_and_splits_inside_a_tar():
    natural = open_source(str(REAL / "natural"), None)
    assert (len(natural), natural.labels) == (132, None)
    with tarfile.open(next((REAL / "natural").glob("*.tar"))) as archive:
        member = min(archive.getmembers(), key=lambda m: m.name.partition(".")[0])
        assert natural[0] == archive.extractfile(member).read()
    counts = {split: len(open_source(str(REAL / "camvid320"), split)) for split in splits(str(REAL / "camvid320"))}
    assert counts == {"train": 367, "val": 101, "test": 233}


def test_split_words():
    assert [names.split_of_token(n) for n in ("x-train-000.tar", "TEST_1.tar", "a.val.tar", "trainer.tar")] == [
        1,
        5,
        2,
        0,
    ]
