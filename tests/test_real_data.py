"""The whole way on real photographs: shards, a class-folder tree and a flat folder of the same images."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, losses


@pytest.fixture(scope="module")
def three_forms(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """320 images of imagenette as two tar shards, as a folder a class, and as one flat folder."""
    root = tmp_path_factory.mktemp("imagenette")
    forms = {name: root / name for name in ("shards", "classes", "flat")}
    for folder in forms.values():
        folder.mkdir()
    for number in (0, 3):
        with (
            tarfile.open(shared_data / "imagenette160" / f"imagenette160-train-00{number}.tar") as old,
            tarfile.open(forms["shards"] / f"some-train-00{number}.tar", "w") as new,
        ):
            taken = 0
            for member in old:
                data = old.extractfile(member).read()
                info = tarfile.TarInfo(member.name)
                info.size = len(data)
                new.addfile(info, io.BytesIO(data))
                if member.name.endswith(".jpg"):
                    folder = forms["classes"] / "train" / member.name.split("__")[0]
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / member.name).write_bytes(data)
                    (forms["flat"] / member.name).write_bytes(data)
                else:
                    taken += 1
                    if taken == 160:
                        break
    return forms


@pytest.mark.slow
def test_shards_and_folders_give_the_same_run(three_forms: dict[str, Path], tmp_path: Path, pretrain: Callable) -> None:
    curves = {}
    for name, folder in three_forms.items():
        out = tmp_path / name
        pretrain("--method", "mae", "--data", folder, "--out", out, "--steps", 6, "--log-every", 1, *TINY)
        curves[name] = losses(out)
    assert len(curves["shards"]) == 6
    assert curves["shards"] == curves["classes"] == curves["flat"]


@pytest.mark.slow
def test_shards_are_probed_on_their_labels(
    shared_data: Path, tmp_path: Path, pretrain: Callable, evaluate: Callable
) -> None:
    run = tmp_path / "run"
    pretrain(
        "--method", "mae", "--data", shared_data / "imagenette160", "--out", run, "--steps", 3, *TINY,
        "--image-size", 32, "--workers", 1,
    )  # fmt: skip
    said = evaluate("knn", "--encoder", run, "--data", shared_data / "imagenette160", "--workers", 1).stdout
    assert "tench" in (run / "eval").rglob("results.json").__next__().read_text()
    assert "pixels" in said
