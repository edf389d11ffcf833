"""Features written for other tools are those of the encoder, in the order of their names."""

import csv
import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from pyarrow import parquet
from small_encoders import small_encoder
from ssl_pretrain.eval import embed
from ssl_pretrain.eval._task import Data, Task

from ssl_pretrain.errors import UserError


@pytest.fixture
def task(tmp_path: Path) -> Task:
    for split, name, i in (("train", "ant", 0), ("train", "bee", 1), ("val", "ant", 2), ("val", "bee", 3)):
        folder = tmp_path / "photos" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        picture(i, (16, 20)).save(folder / f"{i}.png")
    (tmp_path / "photos" / "train" / "ant" / "broken.png").write_bytes(b"no image")
    (tmp_path / "out").mkdir()
    data = Data.single(str(tmp_path / "photos"), None, everything=True)
    return Task(
        encoder=small_encoder(), data=data, device=torch.device("cpu"), cache=False, batch_size=3, out=tmp_path / "out"
    )


def wanted(task: Task, rows: list[dict[str, str]]) -> dict[str, np.ndarray]:
    root = Path(task.data.name)
    pictures = [next(root.rglob(Path(row["name"]).name)).read_bytes() for row in rows]
    with torch.inference_mode():
        features = task.encoder(task.encoder.preprocess(pictures))
    return {"cls": features.cls.numpy(), "pooled": features.pooled.numpy(), "patches": features.patches.numpy()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arrays(task: Task, dtype: str) -> None:
    outcome = embed.evaluate(task, embed.Config(patches=True, dtype=dtype))
    assert task.out is not None
    assert sorted(path.name for path in task.out.iterdir()) == sorted(outcome.metrics["files"])
    with open(task.out / "images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == outcome.metrics["n"] == 4
    assert sorted(Path(row["name"]).stem for row in rows) == ["0", "1", "2", "3"]
    assert all(row["class"] == Path(row["name"]).parent.name == ("ant", "bee")[int(row["label"])] for row in rows)
    for name, values in wanted(task, rows).items():
        found = np.load(task.out / f"{name}.npy", allow_pickle=False)
        assert found.dtype == dtype
        assert list(found.shape) == outcome.metrics["shapes"][name]
        np.testing.assert_allclose(found, values, atol=1e-5 if dtype == "float32" else 5e-3)


def test_a_parquet_table(task: Task) -> None:
    outcome = embed.evaluate(task, embed.Config(format="parquet", features=("mean", "cls@-2")))
    assert task.out is not None
    assert outcome.metrics["files"] == ["features.parquet"] == [path.name for path in task.out.iterdir()]
    table = parquet.read_table(task.out / "features.parquet")
    assert table.column_names == ["name", "label", "class", "mean", "cls@-2"]
    rows = table.select(["name", "label", "class"]).to_pylist()
    assert {row["class"]: row["label"] for row in rows} == {"ant": 0, "bee": 1}
    tokens = wanted(task, rows)["patches"]
    np.testing.assert_allclose(np.array(table["mean"].to_pylist()), tokens.mean(1), atol=1e-5)


def test_images_without_labels(task: Task) -> None:
    source = task.data.test.source
    source.labels, source.classes = None, None
    images = dataclasses.replace(task.data.test, labels=np.full(len(source), -1))
    bare = dataclasses.replace(task, data=Data("photos", images, images, ()))
    embed.evaluate(bare, embed.Config())
    assert task.out is not None
    lines = (task.out / "images.csv").read_text().splitlines()
    assert lines[0] == "name,label,class"
    assert all(line.endswith(",-1,") for line in lines[1:])


def test_what_cannot_be_written(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="npy only"):
        embed.evaluate(task, embed.Config(format="parquet", patches=True))
    with pytest.raises(UserError, match="did you mean pooled"):
        embed.evaluate(task, embed.Config(features=("poled",)))
    with pytest.raises(UserError, match="choose another folder with --out"):
        embed.evaluate(dataclasses.replace(task, out=tmp_path / "gone"), embed.Config())
    with torch.no_grad():
        task.encoder.backbone.norm.weight.mul_(1e6)
    with pytest.raises(UserError, match="values beyond 65504"):
        embed.evaluate(task, embed.Config(dtype="float16"))

    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="pyarrow")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match="needs pyarrow"):
        embed.evaluate(task, embed.Config(format="parquet"))
    assert task.out is not None
    assert not list(task.out.iterdir())
