"""Pictures of a run: what they show against NumPy, for every method; training is the same with and without them."""

import copy
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, picture
from PIL import Image
from ssl_pretrain.methods import ijepa, mae
from torch import Tensor, nn

from ssl_pretrain import backbones, encoder, plugins, pretext
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.conformance.one_step import BATCH, SIZE, batch, build, step
from ssl_pretrain.data.folder import FolderSource
from ssl_pretrain.data.source import Source
from ssl_pretrain.distributed import World
from ssl_pretrain.loop import drawing, pictures
from ssl_pretrain.loop.pictures import (
    ATTENTION,
    COMPONENTS,
    NEAREST,
    SIMILARITY,
    VIEWS,
    Pictures,
    fixed_images,
    of_first,
)  # fmt: skip
from ssl_pretrain.loop.report import Report
from ssl_pretrain.parts import masked_autoencoder
from ssl_pretrain.pretext import Batch, Losses, Method

METHODS = plugins.own("ssl_pretrain.methods")
FEATURES = (COMPONENTS, SIMILARITY, ATTENTION, NEAREST)
OWN = {  # what the methods themselves draw
    "aim": "input | prefix | prediction",
    "beit": "view | masked",
    "data2vec2": "input | mask 1 | mask 2",
    "dinov2": "view | masked",
    "distill": "view | mixed",
    "featmim": "view | masked",
    "g2sd": "view | masked",
    "ibot": "view | masked",
    "igpt": "input | palette | prediction",
    "ijepa": "input | context | targets",
    "mae": "input | masked | reconstruction",
    "mage": "view | masked",
    "maelite": "input | masked | reconstruction",
    "mrmae": "input | masked | reconstruction",
    "msn": "anchor | masked",
    "mvmr": "augmented | plain | deviation | scattering",
    "semaim": "input | order | prediction",
    "simmim": "input | masked | reconstruction",
    "spark": "input | masked | reconstruction",
    "vqtok": "input | reconstruction",
}
Shown = dict[tuple[str, int], np.ndarray]


class Heard:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.pictures: dict[str, np.ndarray] = {}
        self.warnings: list[str] = []

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.pictures[name] = pixels

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """The pictures of the runs of this test, by name and step."""
    found: Shown = {}
    original = Report.picture

    def picture(self: Report, name: str, pixels: np.ndarray, step: int) -> None:
        assert (name, step) not in found, f"{name} comes twice at step {step}"
        found[name, step] = pixels.copy()
        original(self, name, pixels, step)

    monkeypatch.setattr(Report, "picture", picture)
    return found


def draw(method: Method, source: Source, given: Batch, **run: Any) -> Heard:
    """The pictures of a method, without a run."""
    heard, encoder = Heard(), method.exported()
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    channels = encoder.in_chans
    settings = SimpleNamespace(**{
        **{"image_size": encoder.image_size, "in_chans": channels, "mean": (0.5,) * channels, "std": (0.25,) * channels},
        **{"batch_size": BATCH, "accumulate": 1, "seed": 3},
        **run,
    })  # fmt: skip
    specs = type(method).views(method.config, encoder.image_size)
    few, rows = of_first(given, slice(0, len(given.index)))
    autocast: Any = torch.autocast("cpu", enabled=False)
    made = Pictures(settings, method, world, heard, source, autocast, sharded=False)  # type: ignore[arg-type]
    made(5, few, specs, step(rows))
    return heard


# ---- What is drawn, against NumPy.


def turned_scores(patches: np.ndarray, colours: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Principal components by a singular value decomposition, and orthogonal Procrustes by another one: (n * N, 3)."""
    x = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    left, values, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    scores = left[:, :3] * np.sqrt(len(x)) * np.minimum(1, values[:3] / (0.05 * values[0]))
    target = colours.reshape(-1, 3).astype(np.float64)
    target = target - target.mean(0)
    y, x_ = np.meshgrid(np.linspace(-1, 1, grid[0]), np.linspace(-1, 1, grid[1]), indexing="ij")
    y, x_ = y.ravel(), x_.ravel()
    place = np.stack([y - (y + x_) / 3, x_ - (y + x_) / 3, -(y + x_) / 3], axis=1)
    target += 0.25 * target.std() * np.tile(place, (len(patches), 1))
    u, _, v = np.linalg.svd(scores.T @ target)
    return scores @ (u @ v)


@pytest.mark.parametrize(("images", "grid", "width"), [(5, (3, 4), 7), (2, (2, 3), 40)])
def test_components_are_those_of_numpy(images: int, grid: tuple[int, int], width: int) -> None:
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((images, grid[0] * grid[1], width)) * np.linspace(3, 0.1, width) + 5
    colours = rng.random((images, grid[0] * grid[1], 3)) * 255
    found = drawing.components(torch.from_numpy(patches), torch.from_numpy(colours), grid)
    scores = turned_scores(patches, colours, grid)
    wanted = np.clip(0.5 + scores / 4, 0, 1) * 255
    np.testing.assert_allclose(found.numpy().reshape(-1, 3), wanted, atol=0.51)
    # No picture depends on the basis of the features.
    basis = torch.linalg.qr(torch.from_numpy(rng.standard_normal((width, width))))[0]
    again = drawing.components(torch.from_numpy(patches) @ basis + 3, torch.from_numpy(colours), grid)
    assert (found.int() - again.int()).abs().max() <= 1


def test_colours_stay_when_components_change_their_sign_and_order() -> None:
    """Two components of nearly equal variance: either may come first."""
    rng = np.random.default_rng(1)
    scores = np.linalg.qr(rng.standard_normal((64, 3)))[0]
    scores -= scores.mean(0)
    colours = torch.from_numpy(rng.random((4, 16, 3)))
    pictures = [
        drawing.components(torch.from_numpy(scores * sizes).view(4, 16, 3), colours, (4, 4)).int()
        for sizes in ([3, 1.001, 1], [3, 1, 1.001], [-3, 1, -1.001])
    ]
    assert (pictures[0] - pictures[1]).abs().max() <= 1
    assert (pictures[0] - pictures[2]).abs().max() <= 1


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 1, 8), (3, 1, 1), (2, 4, 2), (8, 1, 512)])
def test_components_of_few_patches_or_features(shape: tuple[int, int, int]) -> None:
    grid = (shape[1] // 2 or 1, 2 if shape[1] > 1 else 1)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = drawing.components(features, torch.rand(*shape[:2], 3, generator=torch.Generator().manual_seed(1)), grid)
    assert found.shape == (*shape[:2], 3)
    assert bool((found == 128).all()) == (shape[0] * shape[1] == 1)
    assert bool((drawing.components(torch.ones(shape), torch.zeros(*shape[:2], 3), grid) == 128).all())


def test_features_that_are_not_finite_are_refused() -> None:
    features = torch.randn(2, 4, 8)
    features[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        drawing.components(features, torch.rand(2, 4, 3), (2, 2))


def test_images_are_shown_in_their_own_colours() -> None:
    rng = np.random.default_rng(0)
    for channels in (1, 2, 4, 10):
        pixels = rng.integers(0, 256, (2, 6, 8, channels), dtype=np.uint8)
        mean, std = rng.random(channels).tolist(), (rng.random(channels) + 0.1).tolist()
        images = torch.from_numpy((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
        wanted = pixels[..., :3] if channels >= 3 else np.repeat(pixels[..., :1], 3, -1)
        np.testing.assert_array_equal(drawing.shown(images, mean, std), wanted)
        np.testing.assert_array_equal(drawing.as_rgb(torch.from_numpy(pixels)), wanted)


def test_rows_are_aligned_and_large_images_are_reduced() -> None:
    assert (drawing.zoom([(32, 32)]), drawing.zoom([(16, 8), (50, 48)]), drawing.zoom([(112, 80)])) == (3, 2, 1)
    assert drawing.zoom([(96, 96), (224, 448)]) == 112 / 448
    reduced = drawing.scaled(torch.full((1, 224, 448, 3), 77, dtype=torch.uint8), 112 / 448)
    assert reduced.shape == (1, 56, 112, 3)
    assert bool((reduced == 77).all())
    large, small = torch.zeros(4, 6, 3, dtype=torch.uint8), torch.full((2, 2, 3), 9, dtype=torch.uint8)
    found = drawing.arranged([[large, large], [small, small]], lead=5)
    wanted = np.full((4 + 2 + 2, 6 + 5 + 6, 3), 255)
    wanted[:4, :6] = wanted[:4, 11:] = 0
    wanted[6:8, 2:4] = wanted[6:8, 13:15] = 9
    np.testing.assert_array_equal(found, wanted)


def test_the_fixed_images_are_the_middle_of_training_images(tmp_path: Path) -> None:
    for i in range(40):
        picture(i, (60, 100) if i % 2 else (90, 50)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "07.png").write_bytes(b"no picture")
    source = FolderSource(str(tmp_path), None)
    run: Any = SimpleNamespace(image_size=(32, 48), in_chans=3, seed=0, batch_size=1000)
    found = fixed_images(source, run)
    assert found.shape == (39, 32, 48, 3)
    wanted = []
    for i in range(40):
        if i == 7:
            continue
        image = Image.open(tmp_path / f"{i:02d}.png")
        width, height = (60, 40) if i % 2 == 0 else (90, 60)
        width, height = (50, round(50 * 32 / 48)) if i % 2 == 0 else (90, 60)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        whole = image.crop((left, top, left + width, top + height))
        wanted.append(np.asarray(whole.resize((48, 32), Image.Resampling.BICUBIC)).astype(int))
    distances = np.abs(np.stack(wanted)[None] - found.numpy().astype(int)[:, None]).mean((2, 3, 4))
    assert (distances.min(1) < 1.5).all()
    assert len(set(distances.argmin(1))) == 39
    # Chosen by the seed, the first ones independent of how many neighbours are looked for.
    few = fixed_images(source, SimpleNamespace(**{**vars(run), "batch_size": 16}))
    assert torch.equal(few[:8], found[:8])
    other = fixed_images(source, SimpleNamespace(**{**vars(run), "seed": 1}))
    assert not torch.equal(other[:8], found[:8])


# ---- Every method, encoder and kind of image.


@pytest.fixture(scope="module")
def source(photos: Path) -> Source:
    return FolderSource(str(photos), None)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_pictures(name: str, source: Source) -> None:
    method = build(name).train()
    before = {n: t.clone() for n, t in method.state_dict().items()}
    random = torch.get_rng_state()
    heard = draw(method, source, batch(method), image_size=SIZE)
    assert heard.warnings == []
    features = [name for name in FEATURES if name != ATTENTION or "attention_maps" in method.encoder.supports]
    own = set(heard.pictures) - {VIEWS, *features}
    assert {VIEWS, *features} <= set(heard.pictures)
    assert len(own) == (type(method).pictures is not Method.pictures)
    assert name not in OWN or own == {OWN[name]}
    assert torch.equal(torch.get_rng_state(), random)
    assert all(part.training for part in method.modules())
    assert all(torch.equal(before[n], t) for n, t in method.state_dict().items())
    specs = type(method).views(method.config, SIZE)
    rows = sum(spec.count for spec in specs)
    side = 3 * SIZE[0]
    assert SIZE == (32, 32)
    # Beside a larger view of a frozen network the others are enlarged less.
    larger = any(spec.network for spec in specs)
    assert larger or heard.pictures[VIEWS].shape[1] == 8 * (side + 2) - 2
    assert heard.pictures[VIEWS].shape[0] <= rows * (side + 2) - 2
    assert heard.pictures[NEAREST].shape == (8 * (side + 2) - 2, 7 * (side + 2) - 2 + 14, 3)
    for shown in features[: features.index(NEAREST)]:
        assert heard.pictures[shown].shape == (2 * side + 2, 8 * (side + 2) - 2, 3)


def test_views_are_those_that_the_model_sees(source: Source) -> None:
    method = build("dino")
    given = batch(method)
    found = draw(method, source, given).pictures[VIEWS]
    crops = [given.views["global1"], given.views["global2"], *given.views["local"]]
    top = 0
    for each in crops:
        height, width = (3 * side for side in each.shape[-2:])
        for i in range(8):
            left = i * 98 + (96 - width) // 2
            cell = found[top : top + height, left : left + width].reshape(height // 3, 3, width // 3, 3, 3)
            assert (cell == cell[:, :1, :, :1]).all()
            pixels = (each[i] * 0.25 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy() * 255
            np.testing.assert_allclose(cell[:, 0, :, 0], pixels, atol=0.51)
        top += height + 2
    assert top - 2 == found.shape[0]


class Plain(Method):
    """A method that draws nothing itself."""

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> Any:
        return build("mae").views(mae.MAE.Config(), image_size)

    def forward(self, batch: Batch, step: Any) -> Losses:
        raise AssertionError("this test never trains it")


class Channels(Source):
    """Random images of any number of channels."""

    labels, classes, fingerprint, description = None, None, "0", "noise"

    def __init__(self, channels: int, count: int = 40) -> None:
        self.channels, self.count = channels, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (40, 50, self.channels), dtype=np.uint8)

    def name(self, index: int) -> str:
        return str(index)


@pytest.mark.parametrize(
    ("name", "size", "channels", "options"),
    [
        ("vit_micro", (32, 48), 1, {"patch_size": 8, "depth": 1}),
        ("vit_micro", (32, 32), 2, {"patch_size": 8, "depth": 1, "cls": False}),
        ("vit_micro", (16, 16), 4, {"patch_size": 16, "depth": 1}),  # a grid of 1 x 1
        ("vit_micro", (48, 32), 10, {"patch_size": 16, "depth": 1}),
        ("resnet18", (32, 64), 3, {}),
        ("resnet18", (32, 32), 10, {}),
        ("convnext_micro", (32, 48), 1, {}),
    ],
)
def test_other_encoders_and_images(name: str, size: tuple[int, int], channels: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    backbone = backbones.build(name, image_size=size, in_chans=channels, **options)
    method = Plain(backbone, None).train()
    before = {n: t.clone() for n, t in method.state_dict().items()}
    given = Batch(views={"image": torch.randn(3, channels, *size)}, index=torch.arange(3))
    heard = draw(method, Channels(channels), given)
    assert heard.warnings == []
    assert set(heard.pictures) == {VIEWS, *FEATURES} - ({ATTENTION} if name[:3] != "vit" else set())
    assert all(torch.equal(before[n], t) for n, t in method.state_dict().items())
    grey = (heard.pictures[VIEWS] == heard.pictures[VIEWS][..., :1]).all()
    assert grey == (channels < 3)


def test_of_one_image_there_are_no_neighbours() -> None:
    backbone = backbones.build("vit_micro", image_size=(16, 16), in_chans=3, patch_size=8, depth=1)
    given = Batch(views={"image": torch.randn(1, 3, 16, 16)}, index=torch.arange(1))
    heard = draw(Plain(backbone, None), Channels(3, 1), given)
    assert heard.warnings == []
    assert set(heard.pictures) == {VIEWS, COMPONENTS, SIMILARITY, ATTENTION}


@pytest.mark.parametrize("cls", [True, False])
def test_attention_is_the_mean_over_heads_of_the_last_block(cls: bool, source: Source) -> None:
    torch.manual_seed(0)
    backbone = backbones.build("vit_micro", image_size=SIZE, patch_size=8, depth=2, registers=3, cls=cls)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    method = Plain(backbone, None).train()
    given = Batch(views={"image": torch.randn(3, 3, *SIZE)}, index=torch.arange(3))
    heard = draw(method, source, given)
    pixels = fixed_images(source, SimpleNamespace(image_size=SIZE, in_chans=3, seed=3, batch_size=BATCH))[:8]  # type: ignore[arg-type]
    with torch.no_grad():
        images = ((pixels.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)
        weights = backbone.eval()(images, attention_of=(1,)).attention[0].double().numpy()
    to_patches = weights[:, :, :, 3 + cls :].sum(1)  # queries x patches, of all heads
    looks = to_patches[:, 0] if cls else to_patches.sum(1)
    cells = heard.pictures[ATTENTION][98:]
    for i in range(8):
        cell = cells[12::24, 98 * i : 98 * i + 96][:, 12::24].reshape(-1, 3)
        assert cell[looks[i].argmax()].tolist() == [252, 232, 64]  # yellow
        assert cell[looks[i].argmin()].tolist() == [31, 13, 82]  # dark blue


def test_similarity_and_neighbours_are_those_of_numpy(source: Source) -> None:
    method = build("dino")
    heard = draw(method, source, batch(method))
    run: Any = SimpleNamespace(image_size=SIZE, in_chans=3, seed=3, batch_size=BATCH)
    pixels = fixed_images(source, run)
    with torch.no_grad():
        features = method.exported().eval()(((pixels.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2))
    assert features.cls is not None
    unit = features.pooled.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    large = pixels.numpy().repeat(3, 1).repeat(3, 2)
    for i in range(8):
        row = heard.pictures[NEAREST][98 * i : 98 * i + 96]
        lefts = [0, *(98 * k + 14 for k in range(1, 7))]
        for left, wanted in zip(lefts, [i, *np.argsort(-cosines[i])[:6]], strict=True):
            np.testing.assert_array_equal(row[:, left : left + 96], large[wanted])
    patches = features.patches[:8].double().numpy()
    patches /= np.linalg.norm(patches, axis=2, keepdims=True)
    whole = features.cls[:8].double().numpy()
    alike = np.einsum("nkd,nd->nk", patches, whole / np.linalg.norm(whole, axis=1, keepdims=True))
    cells = heard.pictures[SIMILARITY][98:]
    h, w = features.grid
    for i in range(8):
        cell = cells[96 // h // 2 :: 96 // h, 98 * i : 98 * i + 96][:, 96 // w // 2 :: 96 // w].reshape(-1, 3)
        assert cell[alike[i].argmax()].tolist() == [252, 232, 64]  # yellow
        assert cell[alike[i].argmin()].tolist() == [31, 13, 82]  # dark blue


# ---- Masks are those of the loss.


@pytest.mark.parametrize("name", ["data2vec2", "dinov2", "ibot", "ijepa", "msn"])
def test_masks_are_those_that_the_loss_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, where drop path draws noise of the same step, too."""
    method = build(name)
    backbone = method.encoder
    backbone.config = dataclasses.replace(backbone.config, drop_path=0.2)
    drawn: list[Any] = []
    masks = type(method).masks
    monkeypatch.setattr(
        type(method), "masks", lambda self, *args: drawn.append(copy.deepcopy(masks(self, *args))) or drawn[-1]
    )
    given = batch(method)
    method.train()(given, step())
    few, rows = of_first(given, slice(0, BATCH))
    with torch.no_grad():
        method.eval().pictures(few, step(rows))
    loss, shown = drawn
    taken = len(few.index)

    def first(indices: Tensor) -> Tensor:
        if name == "data2vec2":
            return indices.unflatten(0, (method.config.masks, -1))[:, :taken].flatten(0, 1)
        return indices[:taken]

    pairs = [(loss, shown)] if isinstance(loss, Tensor) else list(zip(loss, shown, strict=True))
    for of_loss, of_picture in pairs:
        assert torch.equal(first(of_loss), of_picture) or name == "ijepa"
    if name == "ijepa":  # contexts are cut to the shortest one of the batch
        assert torch.equal(first(loss[1]), shown[1])


def hidden(masked: np.ndarray, beside: np.ndarray, patch: int) -> np.ndarray:
    """Which patches of a row of masked images are hidden: (n, N) bool. Both rows have images of 96 pixels (3 x 32)."""
    found = []
    for i in range((masked.shape[1] + 2) // 98):
        same = (masked == beside)[:, 98 * i : 98 * i + 96].all(-1)
        side = 96 // (32 // patch)
        found.append(~same.reshape(96 // side, side, 96 // side, side).all((1, 3)).ravel())
    return np.stack(found)


SEEN = [*TINY[: TINY.index("--monitor-every")], "--precision", "fp32", "--workers", "0", "--no-score"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_of_mae_shows_the_masks_of_its_loss(
    accumulate: int,
    photos: Path,
    tmp_path: Path,
    shown: Shown,
    pretrain_here: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Tensor] = []
    random_masking = masked_autoencoder.random_masking

    def recorded(noise: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        keep, masked = random_masking(noise, kept)
        if torch.is_grad_enabled():  # the loss
            drawn.append(masked[:8])
        return keep, masked

    monkeypatch.setattr(masked_autoencoder, "random_masking", recorded)
    flags = [*SEEN, "--monitor-every", 0, "--picture-every", 2, "--steps", 3, "--accumulate", accumulate]
    pretrain_here("--method", "mae", "--data", photos, *flags, "--out", tmp_path / "run")
    assert sorted({at for _, at in shown}) == [0, 2, 3]
    of_step = drawn[::accumulate]
    for at, number in ((0, 0), (2, 1), (3, 2)):
        pixels = shown[OWN["mae"], at]
        wanted = np.zeros((len(of_step[number]), 16), bool)
        np.put_along_axis(wanted, of_step[number].numpy(), True, axis=1)
        np.testing.assert_array_equal(hidden(pixels[98:194], pixels[:96], 8), wanted)
        # Beside the views of the same batch
        np.testing.assert_array_equal(shown[VIEWS, at], pixels[:96])


def test_a_run_of_ijepa_shows_the_blocks_of_its_loss(
    photos: Path, tmp_path: Path, shown: Shown, pretrain_here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    masks = ijepa.IJEPA.masks

    def recorded(self: Any, images: Tensor, at: pretext.Step) -> tuple[Tensor, Tensor]:
        found = masks(self, images, at)
        if torch.is_grad_enabled():
            drawn.append(found[1][:8])
        return found

    monkeypatch.setattr(ijepa.IJEPA, "masks", recorded)
    flags = (
        "--encoder vit_micro --patch-size 4 --image-size 32 --depth 1 --batch-size 16 --predictor-dim 32 "
        "--predictor-depth 1 --predictor-heads 2 --monitor-every 0 --precision fp32 --workers 0 --no-score --steps 2 "
        "--picture-every 1"
    ).split()
    pretrain_here("--method", "ijepa", "--data", photos, *flags, "--out", tmp_path / "run")
    for at, number in ((0, 0), (1, 0), (2, 1)):
        pixels = shown[OWN["ijepa"], at]
        wanted = np.ones((8, 64), bool)
        np.put_along_axis(wanted, drawn[number].flatten(1).numpy(), False, axis=1)
        np.testing.assert_array_equal(hidden(pixels[196:292], pixels[:96], 4), wanted)


# ---- The run is the same.


@pytest.mark.parametrize(
    "flags",
    [
        "--method simmim --encoder vit_micro --patch-size 8 --depth 2 --drop-path 0.2",
        # Batch norm in encoder and heads
        "--method byol --encoder resnet18 --batch-size 8 --hidden-dim 64 --embedding-dim 16",
    ],
    ids=["simmim", "byol"],
)
def test_weights_are_the_same_with_and_without_pictures(
    flags: str, photos: Path, tmp_path: Path, shown: Shown, pretrain_here: Callable
) -> None:
    same = ["--batch-size", 16, *flags.split(), "--data", photos, "--image-size", 32, "--steps", 3, "--log-every", 1]
    same += ["--monitor-every", 2, "--precision", "fp32", "--workers", 0, "--no-score"]
    pretrain_here(*same, "--picture-every", 0, "--out", tmp_path / "without")
    assert shown == {}
    pretrain_here(*same, "--picture-every", 1, "--out", tmp_path / "with")
    assert {at for _, at in shown} == {0, 1, 2, 3}
    files = sorted((tmp_path / "with" / "checkpoints" / "step-00000003").glob("*.safetensors"))
    assert files
    for file in files:
        other = tmp_path / "without" / "checkpoints" / "step-00000003" / file.name
        assert file.read_bytes() == other.read_bytes()


def test_a_resumed_run_shows_the_same(
    photos: Path, tmp_path: Path, shown: Shown, pretrain_here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--method", "mae", "--data", photos, *SEEN, "--monitor-every", 0, "--steps", 5, "--picture-every", 2]
    flags += ["--checkpoint-every", 3, "--out", tmp_path / "run"]
    pretrain_here(*flags)
    whole = dict(shown)
    shown.clear()
    newest = tmp_path / "run" / "checkpoints" / "step-00000005"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    pretrain_here(*flags)
    assert {at for _, at in whole} == {0, 2, 4, 5}
    assert {at for _, at in shown} == {4, 5}
    for name, pixels in shown.items():
        np.testing.assert_array_equal(pixels, whole[name])
    # The exported encoder is the one that the last pictures show.
    exported = encoder.load(tmp_path / "run")
    fixed = pictures.fixed_images(
        FolderSource(str(photos), None), SimpleNamespace(image_size=(32, 32), in_chans=3, seed=0, batch_size=16)
    )
    with torch.no_grad():
        features = exported(exported.normalise(fixed))
    means = nn.functional.adaptive_avg_pool2d(fixed[:8].permute(0, 3, 1, 2).float(), features.grid)
    colours = means.flatten(2).transpose(1, 2)
    wanted = turned_scores(features.patches[:8].numpy(), colours.numpy(), features.grid)
    cells = shown[COMPONENTS, 5][98:]
    middles = [12, 36, 60, 84]
    found = np.stack([cells[:, 98 * i : 98 * i + 96][np.ix_(middles, middles)].reshape(-1, 3) for i in range(8)])
    np.testing.assert_allclose(found.reshape(-1, 3), np.clip(0.5 + wanted / 4, 0, 1) * 255, atol=2)


def test_a_picture_that_fails_is_said_once_and_ends_nothing(
    photos: Path, tmp_path: Path, shown: Shown, pretrain_here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Backbone, given: Batch, at: pretext.Step) -> dict[str, Tensor]:
        raise ArithmeticError("no")

    monkeypatch.setattr(mae.MAE, "pictures", broken)
    monkeypatch.setattr(drawing, "heat", lambda values: broken(None, None, None))  # type: ignore[arg-type]
    flags = [*SEEN, "--monitor-every", 0, "--picture-every", 1, "--steps", 2]
    pretrain_here("--method", "mae", "--data", photos, *flags, "--out", tmp_path / "run")
    assert {name for name, _ in shown} == {VIEWS, COMPONENTS, NEAREST}
    said = (tmp_path / "run" / "warnings.log").read_text().splitlines()
    assert len(said) == 3
    assert "pictures of the method: not drawn, and the run goes on: ArithmeticError: no" in said[0]
    assert f"{SIMILARITY}: not drawn" in said[1]
    assert f"{ATTENTION}: not drawn" in said[2]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_several_processes_show_what_one_shows(
    how: str, photos: Path, tmp_path: Path, shown: Shown, pretrain_here: Callable, pretrain: Callable
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    flags = ["--method", "mae", "--data", photos, *SEEN, "--monitor-every", 0, "--picture-every", 1, "--steps", 2]
    pretrain_here(*flags, "--out", tmp_path / "one")
    pretrain(*flags, "--nproc", 2, "--parallel", how, "--out", tmp_path / "two")
    events = EventAccumulator(str(tmp_path / "two" / "tensorboard"), size_guidance={IMAGES: 0})
    events.Reload()
    found = {(tag, each.step): each for tag in events.Tags()[IMAGES] for each in events.Images(tag)}
    assert set(found) == set(shown)
    for name, pixels in shown.items():
        other = np.asarray(Image.open(io.BytesIO(found[name].encoded_image_string))).astype(int)
        assert (np.abs(other - pixels.astype(int)) > 2).mean() < 0.01, name
