"""Fractal images, made and not read: a class is an iterated function system, an image is one view of its attractor.

After Anderson & Farrell, "Improving Fractal Pre-training" (WACV 2022), section 3: the affine maps of a system are
sampled through their singular values, so that nearly every system has an attractor with structure. The images of a
class differ by small changes of the maps, rotation, mirror, scale, place, colours and background. Each class has a
palette of its own, varied a little; with palettes=0 colours are drawn anew for each image, as in the paper, and the
ground is as bright as the fractal: much harder. An image is a function of (seed, split, index) alone. K maps a system,
P points, S x S pixels.

The data string is 'fractals', or with options in any order
'fractals:classes=20,images=4096,size=40,instances=1,palettes=1,seed=0'.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from typing import final

import numpy as np

from ..errors import UserError, nearest
from ..randomness import numpy_generator
from .source import Source

MAPS = (2, 4)  # maps a system, both included
MINIMAL_WEIGHT = 0.02  # of a map, in the sum of |det A|: also maps that squash everything to a line are applied
COVERAGE = (0.12, 0.65)  # share of its bounding square, on a grid of CHECK_SIZE, that an attractor must hit
CHECK_SIZE = 24
TURN = 0.12  # radians; how far a map is turned from image to image, at most, either way
SHRINK = 0.06  # how much of its size a map loses from image to image, at most; never a gain: it stays contractive
SHIFT = 0.06  # standard deviation of a map's translation from image to image
ROTATION = np.pi / 6  # of the whole fractal from image to image, at most, either way
SHARES = (0.65, 1.0)  # of the image's side that a fractal takes, alone
SHARES_OF_SEVERAL = (0.6, 0.85), (0.3, 0.5)  # the largest, and each of the others
POINTS_A_PIXEL = 2.0  # of the square that the fractal takes
MINIMAL_POINTS = 1536
STUCK = 0.005  # share of the points that may not have left the point where the orbit begins
COLOUR_DOUBLINGS = 3  # a colour coordinate is that of the last 2^3 maps
HALF_OPAQUE = 0.5  # hits of a pixel that let half of the background through
BACKGROUND_CELLS = 4  # of the smooth noise, each way
COLOUR_STEPS = np.linspace(0, 1, 64)
VARIED_COLOUR = 0.1  # of the palette's turn and phases from image to image, as a share of a whole turn
GROUND = 0.2  # brightest ground behind fractals with palettes
LIMITS = {
    "classes": (2, 1_000_000),
    "images": (1, 1 << 40),
    "size": (8, 2048),
    "instances": (1, 16),
    "palettes": (0, 1),
    "seed": (0, 1 << 62),
}
VERSION = 2  # of the pictures; part of the fingerprint


@dataclass(frozen=True)
class Options:
    """What the data string may set."""

    classes: int = 20
    images: int = 4096  # of the training split; the test split has a quarter of that
    size: int = 40  # pixels, height and width
    instances: int = 1  # fractals on one image, at most, each of another class
    palettes: int = 1  # 1: each class has its colours; 0: each image has
    seed: int = 0


@dataclass(frozen=True)
class System:
    """An iterated function system: K contractive affine maps x -> A x + b, applied with probabilities p."""

    a: np.ndarray  # (K, 2, 2) float64
    b: np.ndarray  # (K, 2) float64
    p: np.ndarray  # (K,) float64, sums to 1


@final
class FractalSource(Source):
    """Images (S, S, 3) uint8 of a split, or with None of both.

    With one instance an image, its class is the label, and the classes are balanced. With several, the label is the
    class of the largest, and `multi_labels` has them all.
    """

    labels: np.ndarray
    classes: tuple[str, ...]

    def __init__(self, data: str, split: str | None) -> None:
        self.options = _parse(data)
        counts = {"train": self.options.images, "test": max(1, self.options.images // 4)}
        self._counts = {word: count for word, count in counts.items() if split in (None, word)}
        self.classes = tuple(f"fractal {i}" for i in range(self.options.classes))
        self.labels = self._present[:, 0].copy()
        facts = f"{VERSION} {sorted(asdict(self.options).items())} {sorted(self._counts)}"
        self.fingerprint = hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()
        self.description = f"{len(self):,} fractal images in {self.options.classes:,} classes, made as they are read"

    @cached_property
    def _present(self) -> np.ndarray:
        """The classes on each image, (N, instances) int64, the largest fractal's first; -1 where there are fewer."""
        return np.concatenate([_draw_classes(self.options, word, count) for word, count in self._counts.items()])

    @property
    def multi_labels(self) -> np.ndarray:
        """Which classes are on each image, (N, classes) bool."""
        marks = np.zeros((len(self), self.options.classes + 1), bool)
        np.put_along_axis(marks, self._present, True, axis=1)  # -1 marks the last column, which is cut off
        return marks[:, :-1]

    def __len__(self) -> int:
        return sum(self._counts.values())

    def _place(self, index: int) -> tuple[str, int]:
        """The split, and the number of the image in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        for word, count in self._counts.items():
            if index < count:
                return word, index
            index -= count
        raise AssertionError

    def __getitem__(self, index: int) -> np.ndarray:
        word, number = self._place(index)
        rng = numpy_generator(self.options.seed, "fractal", word, number)
        present = self._present[index]
        classes = [int(c) for c in present[present >= 0]]
        systems = [system_of_class(self.options.seed, c) for c in classes]
        palettes = [palette_of_class(self.options.seed, c) for c in classes] if self.options.palettes else None
        return render(systems, self.options.size, rng, palettes)

    def name(self, index: int) -> str:
        """fractals:split:number."""
        return "fractals:{}:{}".format(*self._place(index))


def splits(data: str) -> list[str]:
    """["train", "test"]: the same classes, other images."""
    _parse(data)
    return ["train", "test"]


def _parse(data: str) -> Options:
    """The options in a data string. Raises UserError."""
    known = [field.name for field in fields(Options)]
    values: dict[str, int] = {}
    for part in filter(None, data.partition(":")[2].split(",")):
        name, _, text = (piece.strip() for piece in part.partition("="))
        if name not in known:
            raise UserError(f"{data!r}: fractals have no option {name!r}{nearest(name, known)}")
        low, high = LIMITS[name]
        if not text.isdecimal() or not low <= int(text) <= high:
            raise UserError(
                f"{data!r}: {name} must be a whole number from {low} to {high}, as in fractals:{name}={low}"
            )
        values[name] = int(text)
    options = Options(**values)
    if options.instances > options.classes:
        raise UserError(f"{data!r}: {options.instances} instances of different classes need at least as many classes")
    return options


def _draw_classes(options: Options, word: str, count: int) -> np.ndarray:
    """(N, instances) int64 classes without repetition in a row, the first balanced over the rows; -1 past the number of
    instances of an image, which is uniform in 1..instances."""
    rng = numpy_generator(options.seed, "fractal classes", word)
    present = np.arange(count)[:, None] % options.classes
    for taken in range(1, options.instances):
        drawn = rng.integers(0, options.classes - taken, count)
        for other in np.sort(present, axis=1).T:  # the drawn-th class of those not yet taken
            drawn += drawn >= other
        present = np.concatenate([present, drawn[:, None]], axis=1)
    instances = rng.integers(1, options.instances, count, endpoint=True)
    present[np.arange(options.instances) >= instances[:, None]] = -1
    return present


@lru_cache(4096)
def system_of_class(seed: int, number: int) -> System:
    """The system of a class: the first of its candidates whose attractor is neither dust nor a line nor a blot."""
    attempt = 0
    while True:
        rng = numpy_generator(seed, "fractal class", number, attempt)
        system = sample_system(rng)
        xy = _chaos_game(system, CHECK_SIZE**2 * 2, rng)[:2]
        extent = np.ptp(xy, axis=1)
        if extent.min() > 0.2 * extent.max() > 1e-3:
            cells = ((xy - xy.min(axis=1)[:, None]) / extent.max() * (CHECK_SIZE - 1e-3)).astype(np.int64)
            covered = len(np.unique(cells[0] * CHECK_SIZE + cells[1])) / CHECK_SIZE**2
            if COVERAGE[0] <= covered <= COVERAGE[1]:
                return system
        attempt += 1


def sample_system(rng: np.random.Generator) -> System:
    """A random system (section 3.2): A = R(t) diag(s) R(u) D with uniform angles t and u, s from
    `sample_singular_values`, and D random signs; b uniform in [-1, 1]; p in proportion to |det A|, but not below
    MINIMAL_WEIGHT of the sum."""
    maps = int(rng.integers(MAPS[0], MAPS[1], endpoint=True))
    values = sample_singular_values(maps, rng)
    left, right = rng.uniform(0, 2 * np.pi, (2, maps))
    signs = rng.choice([-1.0, 1.0], (maps, 2))
    a = (_rotation(left) * values[:, None, :]) @ (_rotation(right) * signs[:, None, :])
    weights = values.prod(axis=1)
    weights = np.maximum(weights, MINIMAL_WEIGHT * weights.sum())
    return System(a, rng.uniform(-1, 1, (maps, 2)), weights / weights.sum())


def sample_singular_values(maps: int, rng: np.random.Generator) -> np.ndarray:
    """Singular values (K, 2), 1 >= first >= second >= 0. Their weighted sum over the maps, of first + 2 * second, is
    uniform in [(5 + K) / 2, (6 + K) / 2]: there most attractors have structure (section 3.2).

    Each value is drawn uniformly from what the sum leaves possible to the values still to come.
    """
    rest = rng.uniform((5 + maps) / 2, (6 + maps) / 2)
    values = np.empty((maps, 2))
    for k in range(maps):
        least = max(0.0, rest - 3 * (maps - 1 - k))  # what this map must add: each later one adds 3 at most
        first = rng.uniform(least / 3, min(1.0, rest))
        second = rng.uniform(max(0.0, (least - first) / 2), min(first, (rest - first) / 2))
        values[k] = first, second
        rest -= first + 2 * second
    return values


def _rotation(angle: np.ndarray) -> np.ndarray:
    """(K,) radians -> (K, 2, 2)."""
    matrix = np.empty((*np.shape(angle), 2, 2))
    matrix[..., 0, 0] = matrix[..., 1, 1] = np.cos(angle)
    matrix[..., 1, 0] = np.sin(angle)
    matrix[..., 0, 1] = -matrix[..., 1, 0]
    return matrix


def _vary(system: System, rng: np.random.Generator) -> System:
    """The same class on another image: each map a little turned, shrunk and shifted."""
    maps = len(system.p)
    turn, shrink = rng.random((2, maps))
    a = _rotation(TURN * (2 * turn - 1)) @ system.a * (1 - SHRINK * shrink)[:, None, None]
    return System(a, system.b + SHIFT * rng.standard_normal((maps, 2)), system.p)


def _chaos_game(system: System, points: int, rng: np.random.Generator) -> np.ndarray:
    """The orbit of one point under random maps, (3, P) float32: x, y, and a colour coordinate in [0, 1].

    All places of the orbit at once: maps compose, so products of 2, 4, 8, ... neighbours in the random sequence (taken
    as a ring) come by doubling, and each place is where the maps before it lead from a point of the attractor. The
    colour coordinate moves half-way to that of each map applied: it tells which maps led to a place (as in flame
    fractals).
    """
    largest = int(np.argmax(system.p))
    start = np.linalg.solve(np.eye(2) - system.a[largest], system.b[largest]).astype(np.float32)  # its fixed point
    memory = math.log(STUCK) / math.log(system.p[largest])  # maps until all but that share have been through another
    doublings = max(0, math.ceil(math.log2(memory / 2)))

    draws = rng.random(points, dtype=np.float32)
    which = np.zeros(points, np.int8)
    for edge in np.cumsum(system.p)[:-1].tolist():
        which += (draws >= edge).view(np.int8)
    maps = np.concatenate([system.a, system.b[:, :, None]], axis=2).astype(np.float32)
    word = maps.transpose(1, 2, 0).take(which, axis=2)  # (2, 3, P): A and b of the maps that lead to each place
    for doubling in range(doublings):
        word = _apply(word, _earlier(word, 1 << doubling))
    orbit = np.empty((3, points), np.float32)
    middle = _apply(word, start[:, None, None])
    orbit[:2] = _apply(word, _earlier(middle, 1 << doublings))[:, 0]

    colour = which * np.float32(0.5 / (len(system.p) - 1))
    for doubling in range(COLOUR_DOUBLINGS):
        colour = colour + _earlier(colour, 1 << doubling) * np.float32(0.5 ** (1 << doubling))
    orbit[2] = colour
    return orbit


def _earlier(ring: np.ndarray, steps: int) -> np.ndarray:
    """(..., P): at each place, what is that many places before."""
    return np.concatenate([ring[..., -steps:], ring[..., :-steps]], axis=-1)


def _apply(word: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Affine maps (2, 3, P) after other maps (2, 3, P), or applied to points (2, 1, P)."""
    after = word[:, :1] * to[0]
    after += word[:, 1:2] * to[1]
    after[:, -1] += word[:, 2]
    return after


@lru_cache(4096)
def palette_of_class(seed: int, number: int) -> np.ndarray:
    """The colours of a class: how far its palette goes round, and the phases of red, green and blue, (4,) in [0, 1)."""
    return numpy_generator(seed, "fractal palette", number).random(4)


def render(
    systems: list[System], size: int, rng: np.random.Generator, palettes: list[np.ndarray] | None = None
) -> np.ndarray:
    """An image (S, S, 3) uint8 of the systems on one background; the first is the largest. With `palettes`, each (4,),
    they have these colours, nearly, on a dark ground."""
    # Without palettes, dark fractals on light ground, or the other way.
    dark = bool(rng.random() < 0.5) and palettes is None
    canvas = _smooth_noise(size, rng) * (0.55 if palettes is None else GROUND) + (0.45 if dark else 0.0)
    for i, system in enumerate(systems):
        low, high = SHARES if len(systems) == 1 else SHARES_OF_SEVERAL[min(i, 1)]
        palette = None if palettes is None else palettes[i]
        _paint(canvas, _vary(system, rng), low + (high - low) * rng.random(), dark, rng, palette)
    return np.ascontiguousarray((canvas * 255).astype(np.uint8).transpose(1, 2, 0))


def _paint(
    canvas: np.ndarray,
    system: System,
    share: float,
    dark: bool,
    rng: np.random.Generator,
    own: np.ndarray | None = None,
) -> None:
    """Draw a fractal on the canvas (3, S, S) float32 in [0, 1]; its longer side takes that share of the canvas."""
    size = canvas.shape[1]
    points = _chaos_game(system, max(MINIMAL_POINTS, int(POINTS_A_PIXEL * (size * share) ** 2)), rng)
    mirror, turn, right, down, *colours = rng.random(8).tolist()
    if own is not None:
        colours = (own + VARIED_COLOUR * (np.array(colours) - 0.5)).tolist()
    turns, *phase = colours
    view = _rotation(np.array(ROTATION * (2 * turn - 1))).astype(np.float32)
    view[:, 0] *= 1 if mirror < 0.5 else -1
    x, y = view @ points[:2]
    x -= x.min()
    y -= y.min()
    wide, high = float(x.max()), float(y.max())
    scale = share * (size - 1) / max(wide, high, 1e-6)
    x *= scale
    y *= scale
    x += right * (size - 1 - wide * scale)
    y += down * (size - 1 - high * scale)
    side = size + 2  # with a margin
    at = (y.astype(np.int32) + 1) * side + (x.astype(np.int32) + 1)
    hits = _smooth(np.bincount(at, minlength=side * side), side)
    colour = _smooth(np.bincount(at, points[2], minlength=side * side), side)
    colour /= np.maximum(hits, 1e-6)

    tone = np.log1p(hits)
    tone /= tone.max()
    waves = (0.3 + turns) * COLOUR_STEPS + np.array(phase)[:, None]
    palette = (0.5 + 0.5 * np.cos(2 * np.pi * waves)).astype(np.float32)
    paint = palette.take((colour * (COLOUR_STEPS.size - 1)).astype(np.int32), axis=1)
    if dark:
        paint *= 0.5 - 0.4 * tone
    else:
        tone *= 0.5
        tone += 0.5
        paint *= 0.85
        paint += 0.15
        paint *= tone
    paint -= canvas
    paint *= hits / (hits + HALF_OPAQUE)
    canvas += paint


def _smooth(field: np.ndarray, side: int) -> np.ndarray:
    """(side * side,) with an empty margin of one pixel -> (side - 2, side - 2) float32, smoothed by weights 1, 2, 1
    along each axis: less jagged, less dusty."""
    field = field.astype(np.float32)
    wide = field * 2
    wide[1:] += field[:-1]
    wide[:-1] += field[1:]
    both = wide * 2
    both[side:] += wide[:-side]
    both[:-side] += wide[side:]
    return both.reshape(side, side)[1:-1, 1:-1] * np.float32(1 / 16)


def _smooth_noise(size: int, rng: np.random.Generator) -> np.ndarray:
    """A background (3, S, S) float32 in [0, 1]: a colour, varied smoothly."""
    cells = rng.random((3, BACKGROUND_CELLS, BACKGROUND_CELLS), dtype=np.float32)
    cells = rng.random((3, 1, 1), dtype=np.float32) * 0.6 + cells * 0.4
    weights = _interpolation(size)
    return weights @ cells @ weights.T


@lru_cache(8)
def _interpolation(size: int) -> np.ndarray:
    """(S, BACKGROUND_CELLS) float32: linear interpolation between values at evenly spaced places."""
    at = np.linspace(0, BACKGROUND_CELLS - 1, size)[:, None]
    return np.clip(1 - np.abs(at - np.arange(BACKGROUND_CELLS)), 0, None).astype(np.float32)
