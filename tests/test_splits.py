"""Splits by their usual spellings and places, and pretraining that never takes test images for lack of a name."""

import tarfile
from pathlib import Path

import pytest
from source_files import fill, pack, png, structs, write_parquet

from ssl_pretrain.data import names
from ssl_pretrain.data.source import evaluation_splits, open_source, pretraining_split, splits
from ssl_pretrain.data.training import open_training
from ssl_pretrain.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))


SPELLINGS = [
    ("training", "testing", ("train", "test")),
    ("Train", "Test", ("train", "test")),
    ("TRAIN", "VALIDATION", ("train", "validation")),
    ("train", "valid", ("train", "valid")),
    ("seg_train", "seg_test", ("train", "test")),
    ("train2017", "val2017", ("train", "val")),
    ("train_images", "test_images", ("train", "test")),
    ("images_train", "images_val", ("train", "val")),
    ("trainset", "testset", ("train", "test")),
    ("train-set", "test-set", ("train", "test")),
    ("trainval", "test", ("train", "test")),
    ("train1", "test1", ("train", "test")),
    ("split=train", "split=test", ("train", "test")),
    ("asl_alphabet_train", "asl_alphabet_test", ("train", "test")),
    ("my-photos-training", "my-photos-validation", ("train", "validation")),
    ("trainA", "testA", ("train", "test")),
    ("PublicTraining", "PublicTest", ("train", "test")),
    ("seg_train/seg_train", "seg_test/seg_test", ("train", "test")),
    ("training_set/training_set", "test_set/test_set", ("train", "test")),
]
PLACES = ["", "chest/", "images/", "Data/CLS-LOC/", "ILSVRC/Data/CLS-LOC/"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("train", "test", "found"), SPELLINGS)
def test_spellings_and_places(tmp_path: Path, place: str, train: str, test: str, found: tuple[str, str]) -> None:
    files = {f"{place}{train}/{c}/{i}.png": i + 10 * n for n, c in enumerate("cd") for i in range(2)}
    files |= {f"{place}{test}/{c}/9.png": 90 + n for n, c in enumerate("cd")}
    root = str(fill(tmp_path, files))
    assert splits(root) == list(found)
    source, held = open_training(root), open_source(root, found[1])
    assert sorted(source[i] for i in range(len(source))) == sorted(png(i) for i in (0, 1, 10, 11))
    assert source.classes == held.classes == ("c", "d")
    assert held.labels is not None
    assert held.labels.tolist() == [0, 1]
    assert evaluation_splits(root) == found
    assert len(open_source(root, train.partition("/")[0])) == 4  # the user's spelling is understood


@pytest.mark.parametrize("place", ["", "ds/"])
def test_the_same_inside_a_tar(tmp_path: Path, place: str) -> None:
    members = {
        f"{place}{s}/{c}/1.png": n for n, (s, c) in enumerate((s, c) for s in ("training", "testing") for c in "cd")
    }
    root = str(pack(tmp_path / "x.tar", members))
    assert splits(root) == ["train", "test"]
    source = open_training(root)
    assert [source[i] for i in range(2)] == [png(0), png(1)]
    assert source.classes == ("c", "d")


def test_a_split_within_each_class(tmp_path: Path) -> None:
    root = str(fill(tmp_path, {f"{c}/{s}/{c}.png": 1 for c in ("cat", "dog") for s in ("train", "test")}))
    assert splits(root) == ["train", "test"]
    assert open_training(root).classes == ("cat", "dog")


def test_classes_within_repeated_split_folders_beside_images_of_neither(tmp_path: Path) -> None:
    """The Intel images: seg_train/seg_train/CLASS, seg_test/seg_test/CLASS, and images to predict in seg_pred."""
    files = {f"seg_{s}/seg_{s}/{c}/{i}.png": i for s in ("train", "test") for c in ("sea", "street") for i in range(3)}
    root = str(fill(tmp_path, files | {f"seg_pred/seg_pred/{i}.png": i for i in range(6)}))
    assert open_training(root).classes == open_source(root, "test").classes == ("sea", "street")
    assert len(open_training(root)) == 6


@pytest.mark.parametrize(
    "names_", [("Training", "PublicTest", "PrivateTest"), ("imagesTr", "imagesTs"), ("trn", "tst")]
)
def test_shortened_and_joined_words_are_asked_about(tmp_path: Path, names_: tuple[str, ...]) -> None:
    root = str(fill(tmp_path, {f"{name}/{i}.png": i for name in names_ for i in range(2)}))
    if splits(root):
        assert len(open_training(root)) == 2
    else:
        with pytest.raises(UserError, match="--train-split"):
            open_training(root)


def test_class_names_are_no_splits(tmp_path: Path) -> None:
    """Classes with a word of a split in their names stay classes."""
    animals = {f"{c}/1.png": 1 for c in ("bullet_train", "test_tube", "dog", "cat", "ant", "bee")}
    root = str(fill(tmp_path / "a", animals))
    assert splits(root) == []
    assert open_training(root).classes == tuple(sorted(c.split("/")[0] for c in animals))
    deep = {f"{c}/1.png": 1 for c in "abcdefgh"} | {"sports/training/1.png": 1, "sports/testing/1.png": 2}
    assert splits(str(fill(tmp_path / "b", deep))) == []


SUSPECTS = [
    ({"train/1.png": 1, "holdout/2.png": 2}, "train"),
    ({"bus/1.png": 1, "train/2.png": 2}, "train"),
    ({"a/1.png": 1, "b/2.png": 2, "testing/3.png": 3}, "testing"),
    ({"dev/1.png": 1, "rest/2.png": 2}, "dev"),
    ({"x/a_training/1.png": 1, "x/more/2.png": 2}, "x/a_training"),
]


@pytest.mark.parametrize(("files", "name"), SUSPECTS)
def test_names_like_splits_among_classes_end_the_run(tmp_path: Path, files: dict, name: str) -> None:
    root = str(fill(tmp_path, files))
    with pytest.raises(UserError, match=rf"{name}.*--train-split NAME.*--train-split all") as caught:
        open_training(root)
    assert "\n" not in str(caught.value)
    assert len(open_training(root, "all")) == len(files)
    flag = str(caught.value).partition("(e.g. --train-split ")[2].partition(")")[0]
    assert len(open_training(root, flag)) == 1
    shard = str(pack(tmp_path / "shard" / "x.tar", files))
    with pytest.raises(UserError, match=rf"e\.g\. --train-split {flag}"):
        open_training(shard)
    assert len(open_training(shard, flag)) == 1


def test_train_split_takes_a_folder_or_a_split(tmp_path: Path) -> None:
    root = str(fill(tmp_path, {"train/1.png": 1, "holdout/2.png": 2}))
    assert [open_training(root, name)[0] for name in ("train", "holdout")] == [png(1), png(2)]
    with pytest.raises(UserError, match=r"no split and no folder 'hldout'.*did you mean holdout"):
        open_training(root, "hldout")
    split = str(fill(tmp_path / "s", {"train/1.png": 1, "val/2.png": 2}))
    assert open_training(split, "val")[0] == png(2)
    assert len(open_training(split, "all")) == 2


def test_only_test_images_are_not_trained_on(tmp_path: Path) -> None:
    root = str(fill(tmp_path, {"testing/1.png": 1, "val/2.png": 2}))
    with pytest.raises(UserError, match=r"val, test, and none to train on.*--train-split"):
        pretraining_split(root)


def test_shards_named_like_splits(tmp_path: Path) -> None:
    for name in ("eval-000.tar", "rest-000.tar"):
        pack(tmp_path / "a" / name, {"1.png": 1})
    with pytest.raises(UserError, match=r"eval-000.*--train-split"):
        open_training(str(tmp_path / "a"))
    assert len(open_training(str(tmp_path / "a"), "rest-000")) == 1
    pack(tmp_path / "b" / "training" / "0.tar", {"1.png": 1})
    pack(tmp_path / "b" / "testset_0.tar", {"2.png": 2})
    pack(tmp_path / "b" / "other.tar", {"3.png": 3})
    source = open_training(str(tmp_path / "b"))
    assert [source[i] for i in range(len(source))] == [png(1)]
    assert "1 x image outside of the splits" in source.left_out.sentence()
    write_parquet(tmp_path / "c" / "holdout.parquet", {"image": structs([1])})
    write_parquet(tmp_path / "c" / "rest.parquet", {"image": structs([2])})
    with pytest.raises(UserError, match=r"holdout.*--train-split"):
        open_training(str(tmp_path / "c"))


def test_flat_validation_sets_have_no_labels_and_take_none_away(tmp_path: Path) -> None:
    """Tiny-ImageNet keeps its validation images in val/images, ImageNet in val/ itself."""
    train = {f"train/n{c}/images/{i}.png": i for c in range(3) for i in range(2)}
    unlabelled = {"tiny": ["val/images/"], "with test": ["val/images/", "test/images/"], "large": ["val/"]}
    for name, folders in unlabelled.items():
        flat = {f"{folder}{i}.png": 9 for folder in folders for i in range(3)}
        root = str(fill(tmp_path / name, {**train, **flat, "val/val_annotations.txt": b""}))
        source, held = open_source(root, "train"), open_source(root, "val")
        assert source.classes == ("n0", "n1", "n2")
        assert held.labels is None
        assert open_source(root, None).labels.tolist().count(-1) == 3 * len(folders)


def test_spelling_by_itself() -> None:
    known = {"train": 1, "Training": 1, "val2017": 2, "validation": 3, "seg_test": 5, "test-images": 5, "tests": 5}
    assert {name: names.split_of_name(name) for name in known} == known
    for name in ("trainer", "testament", "latest", "contest", "strain", "values", "train_station", "protest"):
        assert names.split_of_name(name) == 0, name


def test_order_and_names_of_split_shards_in_folders(tmp_path: Path) -> None:
    """The layouts of the hub: a folder for the configuration, for the split, or both in the name."""
    for root, train, test in (
        ("plain", "plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"),
        ("default", "default/train/0000.parquet", "default/test/0000.parquet"),
        ("hive", "split=train/part-0.parquet", "split=test/part-0.parquet"),
        ("deep", "a/b/train/0.parquet", "a/b/test/0.parquet"),
    ):
        write_parquet(tmp_path / root / train, {"img": structs([1]), "label": [0]})
        write_parquet(tmp_path / root / test, {"img": structs([2]), "label": [1]})
        assert splits(str(tmp_path / root)) == ["train", "test"]
        assert open_training(str(tmp_path / root))[0] == png(1)


def test_a_pax_header_does_not_hide_a_split(tmp_path: Path) -> None:
    long = "train/" + "d" * 120 + "/1.png"
    with tarfile.open(pack(tmp_path / "x.tar", {"test/a/1.png": 2}), "a", format=tarfile.PAX_FORMAT) as archive:
        file = tmp_path / "1.png"
        file.write_bytes(png(1))
        archive.add(file, long)
    assert splits(str(tmp_path / "x.tar")) == ["train", "test"]
