"""Whatever is left out of the data is counted and said: by every kind of source, from the cache as at first, by the
commands; which of several kinds of data counts; labels of all types; pictures that must not be scrambled."""

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, picture
from PIL import Image
from source_files import fill, pack, png, structs, write_parquet
from ssl_pretrain.launch.data import main

from ssl_pretrain.data import decode as decoding
from ssl_pretrain.data import names
from ssl_pretrain.data.decode import BadImage, decode
from ssl_pretrain.data.source import evaluation_splits, open_source, splits
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))


def counts(source: Any) -> dict[str, int]:
    """How many of each reason, by the reason's first words."""
    return {reason.split(",")[0]: count for reason, (count, _) in source.left_out.out.items()}


def twice(path: Path, split: str | None = None) -> Any:
    """The source, opened from the files and again from the cache, which must say the same."""
    first, second = (open_source(str(path), split) for _ in range(2))
    assert first.left_out.as_json() == second.left_out.as_json()
    assert pickle.loads(pickle.dumps(second)).left_out.as_json() == first.left_out.as_json()
    assert "\n" not in first.left_out.sentence()
    return second


# ---- What is left out.


def test_a_folder_counts_what_it_leaves_out(tmp_path: Path) -> None:
    root = fill(tmp_path / "d", {
        "a/1.png": 1, "b/2.png": 2, "a/.hidden.png": 3, ".git/4.png": 4, "a/notes.txt": b"", "b/more.TXT": b"",
        "README": b"", "x.cr2": b"", "old.tar.gz": b"\x1f\x8b", "all.zip": b"PK",
    })  # fmt: skip
    (root / "loop").symlink_to("loop")
    (root / "gone").symlink_to("nowhere")
    (root / "a" / "up").symlink_to(root)
    os.mkfifo(root / "b" / "pipe.png")
    source = twice(root)
    assert len(source) == 2
    assert counts(source) == {
        "hidden": 2, ".txt": 2, "without an extension": 1, ".cr2": 1, "compressed archive": 1, ".zip": 1,
        "link that leads nowhere": 2, "link back to a folder that it lies in": 1, "neither file nor folder": 1,
    }  # fmt: skip
    assert source.left_out.total == 12
    assert "2 x .txt (a/notes.txt, b/more.TXT)" in source.left_out.sentence()
    assert Subset(source, np.array([0])).left_out is source.left_out


def test_nothing_left_out_says_nothing(tmp_path: Path) -> None:
    source = twice(fill(tmp_path, {"a/1.png": 1, "b/2.png": 2}))
    assert not source.left_out
    assert source.left_out.sentence() == ""


@pytest.mark.parametrize("extension", "avif jp2 j2k j2c jpe mpo pbm pnm apng".split())
def test_readable_extensions_are_not_skipped(tmp_path: Path, extension: str) -> None:
    files = {f"1.{extension}": 1, f"2.{extension.upper()}": 2, "3.png": 3}
    assert len(twice(fill(tmp_path / "d", files))) == 3
    assert len(twice(pack(tmp_path / "x.tar", files))) == 3


@pytest.mark.parametrize("extension", ["heic", "HEIF", "jxl"])
def test_formats_of_a_plugin_are_named_with_the_remedy_until_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str
) -> None:
    files = {"1.png": 1, f"2.{extension}": b"\0\0\0\x18ftypheic"}
    folder, shard = fill(tmp_path / "d", files), pack(tmp_path / "x.tar", files)
    for there in (False, True, False):
        found = frozenset({extension.lower().encode()}) if there else frozenset()
        monkeypatch.setattr(names, "readable_plugins", lambda found=found: found)
        for path in (folder, shard):
            source = twice(path)
            assert len(source) == 1 + there
            assert ("pip install 'ssl-pretrain[formats]'" in source.left_out.sentence()) is not there


def test_a_tar_counts_what_it_leaves_out(tmp_path: Path) -> None:
    pack(tmp_path / "d" / "a.tar", {
        "1.png": 1, "1.cls": b"0", "1.json": b"{}", "2.png": 2, "2.CLS": b"1", "3.png": 3, "3.cls": b"\xff\xfe",
        ".ipynb_checkpoints/1-checkpoint.png": 4, "._1.png": 5, "x.bin": b"", "4.png": 4, "4.cls": b"",
    })  # fmt: skip
    (tmp_path / "d" / "b.tar").symlink_to("nowhere.tar")
    fill(tmp_path / "d", {"c.tar.zst": b"\x28\xb5", "preview.png": 9, ".x": b""})
    source = twice(tmp_path / "d")
    assert len(source) == 4
    assert source.labels.tolist() == [0, 1, -1, -1]
    assert counts(source) == {
        "link that leads nowhere": 1, "compressed archive": 1, "loose image beside the shards": 1, "hidden": 3,
        "sidecar .json": 1, ".bin": 1,
    }  # fmt: skip
    assert {reason: count for reason, (count, _) in source.left_out.noted.items()} == {
        "with a label that cannot be read, used without one": 2,
        "without a label": 2,
    }


def test_members_of_one_name_are_told(tmp_path: Path) -> None:
    import tarfile

    shard = pack(tmp_path / "x.tar", {"1.png": 1})
    with tarfile.open(shard, "a") as archive:
        info = tarfile.TarInfo("1.png")
        info.size = len(png(2))
        archive.addfile(info, io.BytesIO(png(2)))
    source = twice(shard)
    assert [source[i] for i in range(len(source))] == [png(2)]
    assert "1 x member of a name that comes again" in source.left_out.sentence()


def test_images_outside_of_the_splits_are_told(tmp_path: Path) -> None:
    root = fill(tmp_path, {"train/1.png": 1, "val/2.png": 2, "extra/3.png": 3})
    assert "1 x image outside of the splits (extra/3.png)" in twice(root, "train").left_out.sentence()
    assert not twice(root).left_out


# ---- Which data.


def _files(kind: str) -> dict[str, Any]:
    if kind == "classes":
        return {f"{c}/{i}.png": i for c in "abc" for i in range(4)}
    return {f"{s}/{c}/{i}.png": i for s in ("train", "val") for c in "abc" for i in range(2)}


@pytest.mark.parametrize("kind", ["classes", "splits"])
@pytest.mark.parametrize("where", ["", "a/", "extra/"])
@pytest.mark.parametrize(
    "beside", ["x.tar", "x.tar.gz", "x.tgz", "annotations.parquet", "table.parquet", "damaged.tar"]
)
def test_what_lies_beside_class_folders_does_not_decide(tmp_path: Path, kind: str, where: str, beside: str) -> None:
    where = where.replace("a/", "train/" if kind == "splits" else "a/")
    root = fill(tmp_path, _files(kind))
    file = root / where / beside
    file.parent.mkdir(exist_ok=True)
    if beside == "x.tar":
        pack(file, {"1.png": 1})
    elif beside == "table.parquet":
        write_parquet(file, {"image": structs([1, 2])})
    elif beside == "annotations.parquet":
        write_parquet(file, {"box": [1, 2]})
    else:
        file.write_bytes(b"\x1f\x8b" + bytes(20))
    source = twice(root)
    assert source.classes == ("a", "b", "c")
    assert len(source) == 12
    assert splits(str(root)) == (["train", "val"] if kind == "splits" else [])
    assert source.left_out.total == 1
    assert beside in source.left_out.sentence()


def test_shards_with_pictures_for_people_beside_them(tmp_path: Path) -> None:
    pack(tmp_path / "d" / "shards" / "a" / "0.tar", {f"{i}.png": i for i in range(5)})
    fill(tmp_path / "d", {"preview.png": 1, "README.md": b""})
    source = twice(tmp_path / "d")
    assert len(source) == 5
    assert counts(source) == {"loose image beside the shards": 1, ".md": 1}


def test_brace_patterns(tmp_path: Path) -> None:
    for i in range(5):
        pack(tmp_path / f"{i:03d}.tar", {f"{i}.png": i})
        write_parquet(tmp_path / f"p{i}.parquet", {"image": structs([i])})
    for pattern in ("{000..003}.tar", "{000,001,002,003}.tar", "p{0..3}.parquet", "00{0..3}.tar"):
        source = twice(tmp_path / pattern)
        assert [source[i] for i in range(len(source))] == [png(i) for i in range(4)]
    with pytest.raises(UserError, match=r"1 of the 6 files of .* are not there, the first: .*005\.tar"):
        open_source(str(tmp_path / "{000..005}.tar"), None)
    odd = pack(tmp_path / "{000..001}.tar", {"x.png": 7})  # a file of that very name is that file
    assert open_source(str(odd), None)[0] == png(7)


@pytest.mark.parametrize("data", ["s3://bucket/x", "gs://b/x", "hf://datasets/a/b", "https://a.org/x.tar", "S3://b/x"])
def test_remote_data_gets_one_line(data: str) -> None:
    for ask in (splits, lambda d: open_source(d, None), evaluation_splits):
        with pytest.raises(UserError, match=r"not on this machine.*download it first"):
            ask(data)


@pytest.mark.parametrize("data", ["", "  "])
def test_empty_data_is_refused(data: str) -> None:
    with pytest.raises(UserError, match="empty"):
        open_source(data, None)
    assert main(["check", data]) == 2


def test_arrow_folders_of_datasets(tmp_path: Path) -> None:
    """What `datasets.save_to_disk` writes: a folder for each split, in it Arrow streams and JSON files."""
    pa = pytest.importorskip("pyarrow")
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "image": {"_type": "Image"}}
    for split, numbers in (("train", [1, 2, 3]), ("test", [4])):
        folder = fill(tmp_path / "d" / split, {"dataset_info.json": b"{}", "state.json": b"{}"})
        table = pa.table({"image": structs(numbers), "label": [n % 2 for n in numbers]})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    fill(tmp_path / "d", {"dataset_dict.json": b"{}"})
    assert splits(str(tmp_path / "d")) == ["train", "test"]
    source = twice(tmp_path / "d", "train")
    assert [source[i] for i in range(3)] == [png(1), png(2), png(3)]
    assert (source.labels.tolist(), source.classes) == ([1, 0, 1], ("cat", "dog"))
    assert not source.left_out
    assert open_source(str(tmp_path / "d" / "test"), None)[0] == png(4)


# ---- Labels.


def label_types() -> list:
    pa = pytest.importorskip("pyarrow")
    ints = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
    numbers = [(str(kind), pa.array([0, 1, 2], kind), ("0", "1", "2"), [0, 1, 2]) for kind in ints]
    words = pa.array(["r", "g", "b"])
    return [
        *numbers,
        ("bool", pa.array([True, False, True]), ("False", "True"), [1, 0, 1]),
        ("string", words, ("b", "g", "r"), [2, 1, 0]),
        ("large_string", words.cast(pa.large_string()), ("b", "g", "r"), [2, 1, 0]),
        ("dictionary", words.dictionary_encode(), ("b", "g", "r"), [2, 1, 0]),
        ("dictionary of numbers", pa.array([2, 0, 1]).dictionary_encode(), ("0", "1", "2"), [2, 0, 1]),
        ("float", pa.array([0.0, 2.0, None]), ("0", "1", "2"), [0, 2, -1]),
        ("negative", pa.array([0, -100, 1]), ("0", "1"), [0, -1, 1]),
        ("null", pa.array([1, None, 0]), ("0", "1"), [1, -1, 0]),
    ]


@pytest.mark.parametrize("number", range(16))
def test_label_types(tmp_path: Path, number: int) -> None:
    name, column, classes, labels = label_types()[number]
    source = twice(write_parquet(tmp_path / "x.parquet", {"image": structs([1, 2, 3]), "label": column}))
    assert (source.classes, source.labels.tolist()) == (classes, labels), name
    assert source.labels.dtype == np.int64
    unlabelled = labels.count(-1)
    assert source.left_out.noted.get("without a label", (0,))[0] == unlabelled
    assert source.labels_from == "the column 'label'"


@pytest.mark.parametrize("kind", ["list", "bytes", "struct"])
def test_a_label_column_of_a_type_that_is_none_is_named(tmp_path: Path, kind: str) -> None:
    column = {"list": [[0], [1], [2, 3]], "bytes": [b"x", b"y", b"z"], "struct": [{"a": 1}] * 3}[kind]
    write_parquet(tmp_path / "train.parquet", {"image": structs(range(3)), "label": column})
    source = open_source(str(tmp_path), "train")
    assert source.labels is None
    assert "file whose column 'label'" in source.left_out.sentence()
    assert "train.parquet" in source.left_out.sentence()


def test_an_empty_word_is_no_label(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", {"image": structs(range(3)), "label": ["a", "", "b"]})
    source = open_source(str(tmp_path), None)
    assert source.classes == ("a", "b")
    assert source.labels is not None
    assert source.labels.tolist() == [0, -1, 1]


def test_a_negative_number_among_words_in_cls_is_unlabelled(tmp_path: Path) -> None:
    pack(tmp_path / "x.tar", {"0.png": 0, "0.cls": b"cat", "1.png": 1, "1.cls": b"-1", "2.png": 2, "2.cls": b"7"})
    source = open_source(str(tmp_path), None)
    assert source.classes == ("7", "cat")
    assert source.labels is not None
    assert source.labels.tolist() == [1, -1, 0]


def test_stats_counts_images_without_a_label_apart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_parquet(tmp_path / "x.parquet", {"image": structs(range(5)), "label": [-1, 0, 0, 1, 1]})
    assert main(["stats", str(tmp_path), "--out", str(tmp_path / "found.json")]) == 0
    assert "2 classes of 2 to 2 images, 1 without a label" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["classes"] == {"0": 2, "1": 2}


def test_a_folder_of_hidden_files_only_says_so(tmp_path: Path) -> None:
    fill(tmp_path / "d", {".cache/1.png": 1, ".2.png": 2})
    with pytest.raises(UserError, match=r"holds no image; it holds 2 hidden"):
        open_source(str(tmp_path / "d"), None)


def test_one_class_is_told_from_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = fill(tmp_path / "d", {f"{s}/only/{i}.png": i for s in ("train", "test") for i in range(2)})
    for verb in ("check", "stats"):
        assert main([verb, str(root)]) == 0
        assert "one class only, from the names of the folders: only" in capsys.readouterr().out
    flat = fill(tmp_path / "flat", {f"{i}.png": i for i in range(2)})
    for verb in ("check", "stats"):
        assert main([verb, str(flat)]) == 0
        assert "no labels" in capsys.readouterr().out


def test_a_dangling_image_is_named_without_the_systems_words(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = fill(tmp_path / "d", {"1.png": 1})
    (root / "gone.png").symlink_to("nowhere.png")
    assert main(["check", str(root)]) == 1
    said = capsys.readouterr().out
    assert "gone.png: No such file or directory" in said
    assert "Errno" not in said


def test_class_names_are_matched_by_name(tmp_path: Path) -> None:
    for split, order in (("train", ["c", "b", "a"]), ("test", ["a", "b", "c"]), ("val", ["a", "d"])):
        features = {"label": {"_type": "ClassLabel", "names": order}}
        write_parquet(tmp_path / f"{split}.parquet", {"image": structs([1, 2]), "label": [0, 1]}, features)
    found = {}
    for split in ("train", "val", "test"):
        source = open_source(str(tmp_path), split)
        found[split] = [source.classes[label] for label in source.labels]
    assert found == {"train": ["c", "b"], "test": ["a", "b"], "val": ["a", "d"]}


def test_a_missing_column_in_one_split_leaves_the_other_its_labels(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", {"image": structs([1, 2]), "label": [0, 1]})
    write_parquet(tmp_path / "test.parquet", {"image": structs([3])})
    assert open_source(str(tmp_path), "train").labels.tolist() == [0, 1]
    assert open_source(str(tmp_path), "test").labels is None
    assert open_source(str(tmp_path), None).labels.tolist() == [-1, 0, 1]


@pytest.mark.parametrize("value", [10**12, 2**63 + 5, 0.5])
def test_numbers_that_are_no_labels_are_named(tmp_path: Path, value: float) -> None:
    pa = pytest.importorskip("pyarrow")
    column = pa.array([0, value], pa.float64() if value == 0.5 else pa.uint64())
    path = write_parquet(tmp_path / "x.parquet", {"image": structs([1, 2]), "label": column})
    with pytest.raises(UserError, match=r"x\.parquet: the value .* of column 'label' is no class number"):
        open_source(str(path), None)


def test_numbers_in_cls_sort_as_numbers_and_negative_ones_are_unlabelled(tmp_path: Path) -> None:
    members = {k: v for i, word in enumerate(["0", "1", "2", "10", "-1", "-100"])
               for k, v in ((f"{i}.png", i), (f"{i}.cls", word.encode()))}  # fmt: skip
    source = twice(pack(tmp_path / "x.tar", members))
    assert source.labels.tolist() == [0, 1, 2, 10, -1, -1]
    assert source.classes == tuple(map(str, range(11)))
    huge = pack(tmp_path / "y.tar", {"a/0.png": 1, "a/0.cls": b"9" * 20})
    with pytest.raises(UserError, match=r"0\.png: the label 9{20} is no class number"):
        open_source(str(huge), None)


def test_keys_with_dots_keep_their_labels(tmp_path: Path) -> None:
    members = {"a.v1.png": 1, "a.v1.cls": b"1", "a.v2.png": 2, "a.v2.cls": b"0", "b.png": 3, "b.cls": b"2",
               "c.rgb.png": 4, "c.cls": b"3"}  # fmt: skip
    source = twice(pack(tmp_path / "x.tar", members))
    assert source.labels.tolist() == [1, 0, 2, 3]


def test_one_stray_image_does_not_take_the_labels(tmp_path: Path) -> None:
    files = {f"train/{c}/{i}.png": i for c in "abc" for i in range(4)} | {"train/preview.png": 9}
    for source in (twice(fill(tmp_path / "d", files), "train"), twice(pack(tmp_path / "x.tar", files), "train")):
        assert source.classes == ("a", "b", "c")
        assert source.labels.tolist().count(-1) == 1
        assert "train/preview.png" in source.left_out.sentence()
    album = {f"{i}.png": i for i in range(9)} | {"a/1.png": 1, "b/2.png": 2}
    assert open_source(str(fill(tmp_path / "album", album)), None).labels is None


# ---- Pixels.


def ramps() -> np.ndarray:
    y, x = np.mgrid[0:64, 0:96]
    return np.stack([x * 682, y * 1023, 65535 - x * 600], -1).astype(np.uint16)


def test_deep_tiffs_are_right_or_refused_by_name() -> None:
    tifffile = pytest.importorskip("tifffile")
    rgb = ramps()

    def tif(array: np.ndarray, **options: Any) -> bytes:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, array, **options)
        return buffer.getvalue()

    planes = rgb.transpose(2, 0, 1)
    for item in (tif(planes, photometric="rgb", planarconfig="separate"),
                 tif(planes, photometric="rgb", planarconfig="separate", tile=(32, 32))):  # fmt: skip
        with pytest.raises(BadImage, match=r"TIFF of 16 bits with each colour in a plane"):
            decode(item, 3)
    right = {
        "chunky": (tif(rgb, photometric="rgb"), rgb >> 8),
        "planes of 8 bits": (tif((planes >> 8).astype(np.uint8), photometric="rgb", planarconfig="separate"), rgb >> 8),
        "negative": (tif(rgb[..., 0], photometric="miniswhite"), (65535 - rgb[..., :1]) >> 8),
        "grey": (tif(rgb[..., 0], photometric="minisblack"), rgb[..., :1] >> 8),
    }
    for name, (item, expected) in right.items():
        np.testing.assert_array_equal(decode(item, expected.shape[2]), expected, name)
    bands = tif(np.repeat(rgb[..., :1], 5, 2), photometric="minisblack", planarconfig="contig")
    with pytest.raises(BadImage, match=r"TIFF of 5 bands of 16 bits .*save it as \.npy"):
        decode(bands, 3)
    with pytest.raises(BadImage, match=r"1 band of 64 bits .float"):
        decode(tif(rgb[..., 0] / 65535), 1)


def test_deep_jpeg2000_in_colour_is_refused_by_name() -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    rgb = ramps()
    with pytest.raises(BadImage, match=r"JPEG 2000 of 16 bits in 3 channels"):
        decode(imagecodecs.jpeg2k_encode(rgb, level=0), 3)
    grey = decode(imagecodecs.jpeg2k_encode(rgb[..., 0], level=0), 1)
    np.testing.assert_array_equal(grey, rgb[..., :1] >> 8)


def test_jpeg2000_depth_from_the_header() -> None:
    """Written by hand after ISO/IEC 15444-1 A.5.1, so that it needs no library."""
    siz = bytes(34) + b"\0\3" + b"\x0f\1\1" * 3  # Rsiz .. YTOsiz, Csiz, then Ssiz, XRsiz, YRsiz
    header = b"\xff\x4f\xff\x51" + (38 + 9).to_bytes(2, "big") + siz
    assert decoding._jpeg2000_bits(header) == [16, 16, 16]
    assert decoding.stored_bits(header) == 16


def test_check_and_stats_tell_12_bits_in_16(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "d").mkdir()
    for i in range(3):
        grey = np.random.default_rng(i).integers(0, 4096, (8, 8)).astype(np.uint16)
        Image.fromarray(grey).save(tmp_path / "d" / f"{i}.png")
        np.save(tmp_path / "d" / f"{i}.npy", np.repeat(grey[..., None], 3, 2))
    for verb in ("check", "stats"):
        assert main([verb, str(tmp_path / "d")]) == 0
        assert "6 images of 16 bits use at most 12" in capsys.readouterr().out
    np.save(tmp_path / "d" / "bright.npy", np.full((8, 8, 3), 60_000, np.uint16))
    main(["check", str(tmp_path / "d")])
    assert "bits use" not in capsys.readouterr().out


def test_a_very_large_image_names_the_flag_that_allows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    buffer = io.BytesIO()
    picture(0, (12, 10)).save(buffer, "PNG")
    for item in (buffer.getvalue(), np.zeros((12, 10, 3), np.uint8)):
        with pytest.raises(BadImage, match=r"10 x 12 pixels, more than 100 .*--max-pixels 120 allows it"):
            decode(item, 3)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.png").write_bytes(buffer.getvalue())
    assert main(["check", str(tmp_path / "d")]) == 1
    assert main(["check", str(tmp_path / "d"), "--max-pixels", "120"]) == 0


# ---- The commands.


def test_check_lists_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = fill(tmp_path / "d", {**_files("splits"), "train/notes.txt": b"", "train/x.heix": b""})
    assert main(["check", str(root), "--out", str(tmp_path / "found.json")]) == 0
    said = capsys.readouterr().out
    assert "left out of the data: 1 x .heix (train/x.heix), 1 x .txt (train/notes.txt)" in said
    assert "splits: train 6, val 6" in said
    assert "classes: 3, from the names of the folders: a 4, b 4, c 4" in said
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["left_out"]["out"][".txt"] == [1, ["train/notes.txt"]]
    assert (found["splits"], found["classes"]) == ({"train": 6, "val": 6}, {"a": 4, "b": 4, "c": 4})


def test_packed_pixels_know_what_was_left_out(tmp_path: Path) -> None:
    files = {**_files("splits"), "notes.txt": b"", "test/1.png": 1, "train/a/bad.png": b"no image"}
    assert main(["pack", str(fill(tmp_path / "d", files)), "--out", str(tmp_path / "packed")]) == 0
    source = twice(tmp_path / "packed")
    assert counts(source) == {".txt": 1, "image that cannot be read": 1}
    assert source.labels.tolist().count(-1) == 1  # the flat test split has none, and takes none
    assert len(source) == 13


def test_evaluation_takes_the_split_with_labels(tmp_path: Path) -> None:
    root = str(fill(tmp_path, {**_files("splits"), "test/images/1.png": 1, "test/images/2.png": 2}))
    assert evaluation_splits(root) == ("train", "val")


@pytest.mark.slow
def test_a_run_says_it_once_and_takes_a_train_split(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    for folder in ("train", "holdout"):
        (tmp_path / "d" / folder).mkdir(parents=True)
    for i, photo in enumerate(sorted(photos.iterdir())[:40]):
        (tmp_path / "d" / ("holdout" if i % 5 == 0 else "train") / photo.name).write_bytes(photo.read_bytes())
    (tmp_path / "d" / "train" / "list.csv").write_text("")
    argv = ["--method", "mae", "--data", tmp_path / "d", "--out", tmp_path / "run", "--steps", 2, "--workers", 0,
            "--no-score", *TINY]  # fmt: skip
    refused = pretrain(*argv, code=2).stderr
    assert "--train-split train" in refused
    assert "--train-split all" in refused
    said = pretrain(*argv, "--train-split", "train").stderr
    assert "folder of 32 images" in said
    assert said.count("left out of the data: 1 x .csv") == 1
    assert "--train-split: train -> all" in pretrain(*argv, "--train-split", "all", code=2).stderr


def test_heic_is_read_where_its_package_is_there(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    heif = pillow_heif.from_pillow(Image.new("RGB", (32, 32), (200, 20, 20)))
    (tmp_path / "d").mkdir()
    heif.save(str(tmp_path / "d" / "x.heic"))
    source = twice(tmp_path / "d")
    assert np.abs(decode(source[0], 3).mean((0, 1)) - (200, 20, 20)).max() < 5
