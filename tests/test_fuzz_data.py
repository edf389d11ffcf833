"""Damaged data files: each is read right, counts as a bad image, or ends in one line that names it. See fuzz.py."""

import io
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from fuzz import damage
from PIL import Image

from ssl_pretrain.data.decode import BadImage, decode
from ssl_pretrain.data.names import as_item
from ssl_pretrain.data.source import open_source, splits
from ssl_pretrain.errors import UserError
from ssl_pretrain.files import cache_folder

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))


def smooth(side: int = 24, seed: int = 0) -> Image.Image:
    field = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return field.resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def one_line(reason: str) -> str:
    assert reason.strip()
    assert "\n" not in reason
    return "bad image"


def read_image(data: bytes) -> str:
    """An image is pixels or a BadImage with a reason of one line; nothing else, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            pixels = decode(data, 3)
        except BadImage as bad:
            return one_line(bad.reason)
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
    return "read"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_fuzz_images(kind: str) -> None:
    ends = damage(encoded(smooth(), kind), 0, read_image)
    assert ends["bad image"] > 0
    assert ends["error"] == 0


def test_fuzz_npy() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(smooth()))

    def read(data: bytes) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                decode(as_item(b"x.npy", data), 3)
            except (BadImage, ValueError) as problem:
                return one_line(str(problem))
        assert read_image(data) == "read"
        return "read"

    ends = damage(buffer.getvalue(), 0, read)
    assert ends["bad image"] > 0


def replace_file(file: Path, content: bytes) -> None:
    """Write a file, and forget what the cache says of it (two writes in one tick of the clock look the same)."""
    for stored in cache_folder().glob("*.index"):
        stored.unlink()
    file.write_bytes(content)


def whole_tar() -> tuple[bytes, list[bytes]]:
    """A shard of six images with labels, and the images."""
    images = [encoded(smooth(8, i), "PNG") for i in range(6)]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for i, image in enumerate(images):
            for name, content in ((f"{i}.png", image), (f"{i}.cls", b"%d" % (i % 3))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue(), images


def test_fuzz_tar(tmp_path: Path) -> None:
    data, images = whole_tar()
    shard = tmp_path / "x.tar"

    def read(mutant: bytes) -> str:
        """Fewer images than six are told; never a traceback."""
        replace_file(shard, mutant)
        source = open_source(str(shard), None)
        items = [source[i] for i in range(len(source))]
        assert splits(str(shard)) in ([], ["train"], ["test"], ["val"])
        if len(items) < len(images):
            assert source.left_out.out, f"{len(items)} of {len(images)} images, and nothing said"
            return "part, told"
        return "read"

    ends = damage(data, 0, read)
    assert min(ends["part, told"], ends["error"]) > 0


def whole_parquet(path: Path, arrow: bool = False) -> bytes:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": encoded(smooth(8, i), "PNG"), "path": f"{i}.png"} for i in range(12)]
    table = pa.table({"image": pa.array(images), "label": pa.array([i % 3 for i in range(12)]), "name": ["ä"] * 12})
    table = table.replace_schema_metadata(
        {"huggingface": '{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}}}'}
    )
    if arrow:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path, row_group_size=5, write_page_checksum=False)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_fuzz_parquet(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"x.{kind}"
    data = whole_parquet(file, kind == "arrow")

    def read(mutant: bytes) -> str:
        replace_file(file, mutant)
        source = open_source(str(file), None)
        for i in range(len(source)):
            assert isinstance(source[i], bytes)
        assert source.labels is None or len(source.labels) == len(source)
        return "read"

    ends = damage(data, 0, read)
    assert min(ends["read"], ends["error"]) > 0


def test_fuzz_index_cache(tmp_path: Path) -> None:
    """A damaged index is built again; what it says is right whatever the damage."""
    for i in range(6):
        (tmp_path / "d" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / "ab"[i % 2] / f"{i}.png").write_bytes(encoded(smooth(8, i), "PNG"))
    (tmp_path / "d" / "notes.txt").write_text("x")
    first = open_source(str(tmp_path / "d"), None)
    expected = [first.name(i) for i in range(6)], first.labels, first.left_out.as_json()
    (file,) = cache_folder().glob("*.index")

    def read(mutant: bytes) -> str:
        file.write_bytes(mutant)
        source = open_source(str(tmp_path / "d"), None)
        assert [source.name(i) for i in range(len(source))] == expected[0]
        assert source.labels is not None
        assert source.labels.tolist() == expected[1].tolist()
        assert source.left_out.as_json() == expected[2]
        return "read"

    assert damage(file.read_bytes(), 0, read)["error"] == 0


def test_fuzz_finds_what_it_must() -> None:
    """The machinery fails for a traceback, an empty message and one of two lines."""

    def traceback(_: bytes) -> str:
        raise KeyError("x")

    def empty(_: bytes) -> str:
        raise UserError("")

    def two_lines(_: bytes) -> str:
        raise UserError("a\nb")

    for wrong, said in ((traceback, "KeyError"), (empty, "no message"), (two_lines, "more than one line")):
        with pytest.raises(AssertionError, match=said):
            damage(b"some data", 0, wrong, count=3)
    assert damage(b"some data", 0, lambda _: "read", count=7) == {"read": 7}
