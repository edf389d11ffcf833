"""What several test files need: the commands as a user runs them, small image folders, the shared data."""

import json
import os

# Before torch is there. These models are too small for threads, which wait for one another on a machine at work; several
# tests run side by side instead (pytest-xdist).
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
TINY = (
    "--encoder vit_micro --patch-size 8 --image-size 32 --depth 2 --batch-size 16 --decoder-dim 32 --decoder-depth 1 "
    "--decoder-heads 2 --monitor-every 0 --picture-every 0 --precision fp32"
).split()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ.setdefault("SSL_PRETRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not DATA.is_dir():
        pytest.skip("../shared/data is not there: no real images to test with")
    return DATA


def command(name: str, *argv: object, **environment: str) -> list[str]:
    return [sys.executable, "-m", f"ssl_pretrain.launch.{name}", *map(str, argv)]


@pytest.fixture
def pretrain() -> Callable[..., subprocess.CompletedProcess]:
    """`ssl-pretrain` with these flags as a real process; fails unless it ends with `code`."""

    def run(*argv: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command("pretrain", *argv), capture_output=True, text=True, env={**os.environ, **environment}, check=False
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def pretrain_here() -> Callable[..., None]:
    """`ssl-pretrain` with these flags in this process, for tests of many runs that need no process of their own."""
    from ssl_pretrain.launch.pretrain import main

    def run(*argv: object) -> None:
        assert main(list(map(str, argv))) == 0

    return run


@pytest.fixture
def evaluate() -> Callable[..., subprocess.CompletedProcess]:
    """`ssl-eval` with these arguments as a real process; fails unless it ends with `code`."""

    def run(*argv: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command("evaluate", *argv), capture_output=True, text=True, env={**os.environ, **environment}, check=False
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of 96 small images: smooth colour fields, no two alike."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(96):
        picture(i).save(folder / f"{i:03d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def photos_in_classes(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as links in a folder a class."""
    folder = tmp_path_factory.mktemp("classes")
    for i, photo in enumerate(sorted(photos.iterdir())):
        place = folder / "train" / f"class{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / photo.name).symlink_to(photo)
    return folder


def picture(seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    rng = np.random.default_rng(seed)
    field = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return field.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def metrics(run: Path) -> list[dict]:
    """The whole lines of a run's metrics.jsonl. The last one of a run at work may be half there."""
    whole, _, _ = (run / "metrics.jsonl").read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}


def assert_same_bits(a: dict, b: dict) -> None:
    for part in ("method", "optimizer"):
        assert a[part].keys() == b[part].keys()
        for name, value in a[part].items():
            assert value.equal(b[part][name]), name


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user's: photos/, labelled-photos/ with splits, cat.jpg, and the real data where it is there."""
    desk = tmp_path_factory.mktemp("desk") / "project"
    for split, count in (("train", 20), ("val", 6)):
        for label in ("red", "blue"):
            folder = desk / "labelled-photos" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                image = picture(1000 * len(label) + i).convert("RGB", (1, 0, 0, 0) * 3 if label == "red" else None)
                image.save(folder / f"{split}-{label}-{i}.jpg")
    (desk / "photos").mkdir()
    for i in range(40):
        picture(i).save(desk / "photos" / f"{i}.jpg")
    picture(7, (300, 400)).save(desk / "cat.jpg")
    for split, count in (("train", 4), ("val", 2)):
        (desk / "street-scenes" / split).mkdir(parents=True)
        for i in range(count):
            picture(i, (64, 96)).save(desk / "street-scenes" / split / f"{i}.jpg")
            classes = np.random.default_rng(i).integers(0, 3, (4, 6), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
            Image.fromarray(classes).save(desk / "street-scenes" / split / f"{i}.png")
    for tree in ("JPEGImages", "Annotations"):
        (desk / "clips" / tree / "a").mkdir(parents=True)
    for i in range(4):
        picture(i, (64, 96)).save(desk / "clips" / "JPEGImages" / "a" / f"{i:05d}.png")
        where = np.zeros((64, 96), np.uint8)
        where[20:40, 10 + 8 * i : 40 + 8 * i] = 1
        Image.fromarray(where).save(desk / "clips" / "Annotations" / "a" / f"{i:05d}.png")
    for folder in ("benchmarks", "recipes"):
        (desk / folder).symlink_to(ROOT / folder)
    if DATA.is_dir():
        (desk.parent / "shared").symlink_to(DATA.parent)
    return desk
