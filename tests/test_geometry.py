"""Batch.geometry: where each pixel of a view lies in the image, for every combination of flips and every way to read it.

The image says it itself: its red value is the row, its green value the column, one level a pixel.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pretrain.data import decode
from ssl_pretrain.data.loader import Share, batches, to_batch
from ssl_pretrain.data.source import Source
from ssl_pretrain.data.views import ViewSpec, to_image

HEIGHT, WIDTH = 240, 200
VIEW = (16, 20)
MEAN, STD = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # batches in levels


def coordinates() -> np.ndarray:
    """The image: uint8 (HEIGHT, WIDTH, 3), red the row, green the column."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([rows, columns, np.full_like(rows, 128)], -1).astype(np.uint8)


def encoded(kind: str, orientation: int = 1, **options: object) -> bytes:
    """The image as a file that is shown upright, however it is stored."""
    undo = {1: None, 3: 3, 6: 2, 7: 6}[orientation]  # EXIF 2.32, table 4: the inverse, as Image.Transpose
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(coordinates())
    file = io.BytesIO()
    (image if undo is None else image.transpose(Image.Transpose(undo))).save(file, kind, exif=exif, **options)
    return file.getvalue()


def jpeg(orientation: int = 1) -> bytes:
    return encoded("JPEG", orientation, quality=100, subsampling="4:4:4")


class Same(Source):
    """One item, several times."""

    def __init__(self, item: bytes | np.ndarray) -> None:
        self.item = item
        self.labels, self.classes, self.fingerprint, self.description = None, None, "", ""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        return self.item

    def name(self, index: int) -> str:
        return str(index)


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, coordinates())
    return file.getvalue()


ITEMS = {
    "array": coordinates,
    "npy": npy,
    "png": lambda: encoded("PNG"),
    "jpeg": jpeg,
    "jpeg, turned by 180 degrees": lambda: jpeg(3),
    "jpeg, turned by 90 degrees": lambda: jpeg(6),
    "jpeg, transposed": lambda: jpeg(7),
}


def errors(item: bytes | np.ndarray, spec: ViewSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For 32 views: how far each pixel is from where `to_image` says, in pixels of the image, (32, h * w, 2); the size of a
    view's pixel in the same unit, (32, 1, 2); and the geometry, (32, 6)."""
    (raw,) = batches(
        Same(item), [spec], Share(16), seed=3, channels=3, start_step=0, stop_step=1, workers=0, policy="fail"
    )
    batch = to_batch(raw, [spec], MEAN, STD, torch.device("cpu"))
    geometry = batch.geometry["v"]  # (2, 16, 6)
    h, w = spec.size
    centres = torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w)
    shares = to_image(centres, geometry)
    assert shares.shape == (2, 16, h * w, 2)
    expected = (
        shares * torch.tensor([HEIGHT, WIDTH]) - 0.5
    )  # the level of a pixel is its number, half a pixel from its centre
    found = batch.views["v"][:, :, :2].flatten(3).transpose(2, 3)
    size = geometry[:, :, None, 2:4] * torch.tensor([HEIGHT / h, WIDTH / w])
    return (found - expected).abs().flatten(0, 1), size.flatten(0, 1), geometry.flatten(0, 1)


@pytest.mark.parametrize("how", ["exact", "fast", "without simplejpeg"])
@pytest.mark.parametrize("kind", ITEMS)
def test_a_views_pixels_lie_where_its_geometry_says(kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a tenth of a pixel of the view, and a level. A JPEG that is decoded smaller has its crop's edges on pixels of the
    smaller image: half a pixel of the view."""
    if how == "without simplejpeg":
        monkeypatch.setattr(decode, "simplejpeg", None)
    asked: list[int] = []
    crop = decode.Picture.crop
    monkeypatch.setattr(decode.Picture, "crop", lambda *a, by=1, **k: asked.append(by) or crop(*a, by=by, **k))
    spec = ViewSpec(
        name="v",
        count=2,
        size=VIEW,
        scale=(0.3, 1.0),
        hflip=0.5,
        vflip=0.5,
        interpolation="bilinear",
        fast=how == "fast",
    )
    found, size, geometry = errors(ITEMS[kind](), spec)
    smaller = how == "fast" and "jpeg" in kind and decode.simplejpeg is not None
    assert (min(asked) > 1) == smaller
    assert {tuple(flips) for flips in geometry[:, 4:].tolist()} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert bool((found <= (0.5 if smaller else 0.1) * size + 1).all())


def test_a_point_of_a_view_by_hand() -> None:
    """A quarter from the top and an eighth from the left of a crop of (0.4, 0.2) at (0.1, 0.5)."""
    point = torch.tensor([[0.25, 0.125]])
    for hflip, vflip, expected in [
        (0, 0, (0.2, 0.525)),
        (1, 0, (0.2, 0.675)),
        (0, 1, (0.4, 0.525)),
        (1, 1, (0.4, 0.675)),
    ]:
        found = to_image(point, torch.tensor([0.1, 0.5, 0.4, 0.2, hflip, vflip]))
        torch.testing.assert_close(found, torch.tensor([expected]))


def test_a_flip_changes_no_other_draw() -> None:
    """Views without flips are drawn from the same numbers as views with both."""
    never, always = (
        errors(coordinates(), ViewSpec(name="v", count=2, size=VIEW, hflip=p, vflip=p))[2] for p in (0.0, 1.0)
    )
    assert torch.equal(never[:, :4], always[:, :4])
    assert torch.equal(never[:, 4:] + 1, always[:, 4:])
