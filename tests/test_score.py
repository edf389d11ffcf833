"""The kNN score at the end of a run: of the images that were trained on, without those that have no label."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from source_files import class_folders, fill, names_of, structs, write_parquet

from ssl_pretrain.loop.score import KnnScore


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))


def score(data: Path, train_split: str | None = None) -> Any:
    run: Any = SimpleNamespace(data=str(data), train_split=train_split, seed=0, knn_every=0, workers=0, max_pixels=None)
    return KnnScore.of(run)


@pytest.mark.parametrize("where", ["train", "test"])
def test_images_without_a_label_are_not_scored(tmp_path: Path, where: str) -> None:
    root = fill(tmp_path / "d", class_folders("train", "test") | {f"{where}/stray.png": 99})
    found = score(root)
    assert (len(found.bank), len(found.queries)) == (8, 8)
    assert all((side.labels >= 0).all() for side in (found.bank, found.queries))


def test_negative_labels_are_not_scored_where_there_is_no_test_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d" / "x.parquet", {"image": structs(range(20)), "label": [-1, 0, 1, 2] * 5})
    found = score(tmp_path / "d")
    labels = np.concatenate([found.bank.labels, found.queries.labels])
    assert sorted(labels.tolist()) == [0] * 5 + [1] * 5 + [2] * 5


def test_the_score_follows_train_split(tmp_path: Path) -> None:
    root = fill(tmp_path / "d", class_folders("train", "val", "test", images=8))
    of = {name: score(root, name) for name in ("val", "test", "all", None)}
    assert {name.partition("/")[0] for name in names_of(of["val"].bank)} == {"val"}
    assert {name.partition("/")[0] for name in names_of(of["val"].queries)} == {"test"}
    assert {name.partition("/")[0] for name in names_of(of[None].bank)} == {"train"}
    # trained on the test images: no other split is known to be for testing; all: neither
    for name, total in (("test", 16), ("all", 48)):
        assert len(of[name].bank) + len(of[name].queries) == total
        assert not names_of(of[name].bank) & names_of(of[name].queries)


def test_the_score_takes_a_folder_that_train_split_names(tmp_path: Path) -> None:
    root = fill(tmp_path / "d", class_folders("train", "holdout_b", images=8))
    found = score(root, "train")
    assert {name.partition("/")[0] for name in names_of(found.bank) | names_of(found.queries)} == {"train"}
    assert found.bank.classes == ("a", "b")


def test_too_few_labelled_images_are_no_score(tmp_path: Path) -> None:
    """Of four images there is no fifth to ask for."""
    for labels in ([0, 1, 0, 1], [0, 1, 0, 1, -1, -1]):
        folder = tmp_path / str(len(labels)) / "d"
        write_parquet(folder / "x.parquet", {"image": structs(range(len(labels))), "label": labels})
        assert score(folder) is None
