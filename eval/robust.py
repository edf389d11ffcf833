"""Accuracy under common corruptions, at lower resolutions, other crops and input sizes, and calibration (Hendrycks &
Dietterich, ICLR 2019; Guo et al., ICML 2017). One classifier, trained on clean features, is scored on all of them.

Shapes: n training, m test images, F floats a feature, C classes; h x w pixels that the encoder takes.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from ssl_pretrain.eval._logistic_regression import Rotation, path

from ssl_pretrain.data import corruptions
from ssl_pretrain.data.decode import decode
from ssl_pretrain.data.source import Source
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.data.views import resize_and_crop
from ssl_pretrain.distributed import environment
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Extracted, Progress, Tap, extract, vectors
from ssl_pretrain.features.neighbours import nearest, vote
from ssl_pretrain.randomness import numpy_generator

from ._calibration import BINS, best_temperature, calibration, log_softmax, reliability
from ._intervals import bootstrap, wilson
from ._results import NO_CLASS, Outcome, classification
from ._task import Images, Side, Task
from .linear import hold_out

SHARED = True
CHUNK = 4096  # rows scored at a time
CALIBRATED_ON = 10_000  # held-out images at most that the temperature is fitted on
VOTE_TEMPERATURE = 0.07  # of the neighbours' weights, as in `ssl-eval knn`
NO_VOTE = 1e-6  # the share of a class without a vote, and the least of one with votes: its logarithm is finite
LEAST_VOTE = NO_VOTE * (1 + 1e-9)  # what a class with votes has at least, so that a ranking tells it from one without
KINDS = {"resolution": "resolutions", "crop": "crops", "input_size": "input_sizes"}  # sweeps, and their metrics
Score = Callable[
    [np.ndarray], np.ndarray
]  # features (m, F) -> scores (m, C) float64, log-probabilities but for a constant


@dataclass(frozen=True, kw_only=True)
class Config:
    """Robustness."""

    classifier: Literal["logistic", "knn"] = "logistic"
    """What is trained on the clean training images: logistic regression, or the vote of the nearest neighbours."""
    feature: str = "pooled"
    """The feature it sees: pooled, cls, mean, or of an earlier block cls@-4, mean@-4."""
    c: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
    """C of the logistic regression to choose among, as in scikit-learn: the smaller, the stronger the penalty."""
    k: int = 20
    """Neighbours that vote, weighing exp(cosine / 0.07)."""
    held_out: float = 0.1
    """Share of the training images, of each class, that C is chosen and the temperature is fitted on."""
    test_images: int = 2000
    """Test images at most, drawn by the seed, the same share of each class: each comes through the encoder about a hundred
    times."""
    corruptions: tuple[str, ...] | None = None
    """Corruptions to try, or families of them: noise, blur, weather, digital (default: all that the channels allow)."""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Severities of each, 1 (mild) to 5."""
    resolutions: tuple[float, ...] = (0.75, 0.5, 0.25)
    """Shares of its side that an image is shrunk to, and enlarged again to the encoder's input."""
    crops: tuple[float, ...] = (1.0, 0.75, 0.5)
    """Shares of an image's shorter side that the central crop takes."""
    input_sizes: tuple[float, ...] = (0.5, 0.75, 1.5, 2.0)
    """Shares of its own input's side that the encoder is given images at, in whole patches, where it takes other sizes."""


@dataclass(frozen=True)
class Corrupted:
    """A corruption of the image of a number, always the same one."""

    name: str
    severity: int
    seed: int

    def __call__(self, image: np.ndarray, number: int) -> np.ndarray:
        """uint8 (h, w, channels) to the same."""
        rng = numpy_generator(self.seed, "corruption", self.name, self.severity, number)
        return corruptions.corrupt(image, self.name, self.severity, rng)


@dataclass(frozen=True)
class Coarsened:
    """An image shrunk and enlarged again, both bicubic with antialiasing."""

    share: float

    def __call__(self, image: np.ndarray, number: int) -> np.ndarray:
        """uint8 (h, w, channels) to the same; the number does not matter."""
        height, width = image.shape[:2]
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        for size in ((max(1, round(height * self.share)), max(1, round(width * self.share))), (height, width)):
            pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
        return pixels[0].permute(1, 2, 0).numpy()


@final
class Altered(Source):
    """The images of another source as the encoder sees them, cut to its input and then changed."""

    def __init__(self, source: Source, how: Preprocessing, change: Corrupted | Coarsened) -> None:
        self.source, self.how, self.change = source, how, change
        self.labels, self.classes = source.labels, source.classes
        cut = (how.resize, how.crop, how.interpolation, how.channels)
        identity = f"{source.fingerprint} {len(source)} {cut} {corruptions.VERSION} {change}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        self.description = f"{source.description} ({change})"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        pixels = decode(self.source[index], self.how.channels)
        pixels = resize_and_crop(pixels, self.how.resize, self.how.crop, self.how.interpolation)
        return self.change(pixels, int(index))  # of NumPy's integers a key would be another one

    def name(self, index: int) -> str:
        """The image's name in the source."""
        return self.source.name(index)


@dataclass(frozen=True)
class Condition:
    """One way in which the test images come to the encoder."""

    kind: str  # "corruption", or one of KINDS
    name: str  # of the corruption, else ""
    level: float | tuple[int, int]  # severity, share of the side, or the input's height and width
    encoder: Encoder
    source: Source


def example(data: Path) -> list[str]:
    """Flags of a run of seconds, for the conformance check."""
    return [
        "--corruptions",
        "contrast",
        "--severities",
        "3",
        "--resolutions",
        "0.5",
        "--crops",
        "0.75",
        "--input-sizes",
        "1.5",
    ]


def evaluate(task: Task, config: Config) -> Outcome:
    """Train a classifier on clean features of the training images, choose C and fit the temperature on those held out,
    and score it on the test images: clean, and under every condition.

    Raises UserError for knobs out of range, where no training image can be held out, and as `Task.features`.
    """
    tap, wanted = _check(task, config)
    test_images, chosen = _drawn(task, config.test_images)
    drawn = dataclasses.replace(task, data=dataclasses.replace(task.data, test=test_images))
    sizes, refused = _sizes(task, config, tap)
    conditions = list(_conditions(task, config, test_images.source, wanted, sizes))
    if task.helps:
        _help(task, conditions, tap)
    train, test = drawn.features([tap])
    fit, held_out = _hold_out(train.labels, config, task.seed)
    how: dict[str, Any]
    if config.classifier == "knn":
        score, how, tried = _neighbours(task, config, train, tap, fit)
    else:
        score, how, tried = _logistic(task, config, train, tap, fit, held_out)
    few = np.sort(numpy_generator(task.seed, "calibration").permutation(held_out)[:CALIBRATED_ON])
    temperature = best_temperature(score(train.features[tap][few]), train.labels[few])

    clean = score(test.features[tap])
    shares, order = torch.from_numpy(clean).sort(dim=1, descending=True, stable=True)
    if config.classifier == "knn":
        order = order.masked_fill(shares < math.log(NO_VOTE * (1 + 0.5e-9)), NO_CLASS)
    ranked = order[:, :5].numpy()
    right, rows = [], []
    for number, condition in enumerate(conditions):
        progress = partial(_tell, task, number, len(conditions))
        found = _features(task, condition, tap, progress)
        if not np.array_equal(found.index, test.index):
            raise UserError(
                f"{task.data.name}: other images could be read a moment ago: see that they stay, and start again"
            )
        scores = score(found.features[tap])
        right.append(scores.argmax(1) == test.labels)
        rows.append({
            "kind": condition.kind,
            **({"corruption": condition.name} if condition.name else {}),
            ("severity" if condition.name else "size" if condition.kind == "input_size" else "share"): condition.level,
            "top1": 100 * float(right[-1].mean()),
            "top1_interval": wilson(int(right[-1].sum()), len(test.labels)),
            **_calibrations(scores, test.labels, temperature),
        })  # fmt: skip

    metrics = classification(ranked, test.labels, task.data.classes)
    metrics |= {"temperature": temperature, **_calibrations(clean, test.labels, temperature)}
    metrics |= _summary(metrics["top1"], conditions, rows, np.array(right), task.seed)
    metrics["reliability"] = reliability(log_softmax(clean), test.labels)
    metrics["reliability_scaled"] = reliability(log_softmax(clean / temperature), test.labels)
    metrics["conditions"] = rows
    metrics["findings"] = _words(metrics)
    # rows of the drawn images, numbered as in the whole split
    bad = [dataclasses.replace(item, index=int(chosen[item.index])) for item in test.bad]
    whole = dataclasses.replace(test, index=chosen[test.index], bad=bad)
    return Outcome(
        metrics,
        {
            "headline": f"feature {tap}, {how['classifier']}; {len(wanted)} corruptions at severities "
            f"{' '.join(map(str, dict.fromkeys(config.severities)))}",
            "feature": tap,
            **how,
            "selection": f"trained on {len(fit)} training images; of the {len(held_out)} held out ({config.held_out:g} of "
            f"each class) {'C is chosen on all and ' if tried else ''}the temperature fitted on {len(few)}; test images "
            f"were not looked at",
            "all_scored_on": "held-out training images",
            "test_images": f"{len(chosen)} of {len(task.data.test.labels)}, drawn by the seed",
            "corruptions": {name: corruptions.STRENGTHS[name] for name in wanted},
            "corruptions_version": corruptions.VERSION,
            "corrupted": "uint8 images cut to the encoder's input, before they are normalised",
            "corrupted_top1": "unweighted mean over corruptions and severities; not ImageNet-C's images, nor its mCE",
            "intervals": "Wilson; of means over conditions a bootstrap over images",
            "bins": f"{BINS} of equal width (Guo et al., 2017)",
            "sizes_refused": refused,
            **task.protocol(train, whole),
        },
        tried,
    )


def _check(task: Task, config: Config) -> tuple[str, tuple[str, ...]]:
    """The tap and the corruptions wanted."""
    tap = str(Tap.parse(config.feature))
    if not config.c or not all(np.isfinite(c) and c > 0 for c in config.c):
        raise UserError(f"--c {' '.join(map(str, config.c))}: at least one number, all above 0")
    if not 0 < config.held_out < 1:
        raise UserError(f"--held-out is {config.held_out}; it must lie between 0 and 1")
    if config.test_images < 1 or config.k < 1:
        raise UserError(f"--test-images is {config.test_images} and --k {config.k}; both must be at least 1")
    for flag, shares in (("resolutions", config.resolutions), ("crops", config.crops)):
        if not all(0 < share <= 1 for share in shares):
            raise UserError(f"--{flag} {' '.join(map(str, shares))}: shares of the side, above 0 and at most 1")
    if not all(0 < share <= 8 for share in config.input_sizes):
        raise UserError(f"--input-sizes {' '.join(map(str, config.input_sizes))}: above 0 and at most 8 times the side")
    channels = task.encoder.preprocessing.channels
    named: list[str] = []
    for word in config.corruptions if config.corruptions is not None else corruptions.FAMILIES:
        family = corruptions.FAMILIES.get(word)
        named += [name for name in family if name in corruptions.usable(channels)] if family else [word]
    wanted = tuple(dict.fromkeys(named))
    if not wanted or not config.severities:
        raise UserError("--corruptions and --severities: at least one of each")
    for name in wanted:
        for severity in config.severities:
            corruptions.check(name, severity, channels)
    return tap, wanted


def _drawn(task: Task, most: int) -> tuple[Images, np.ndarray]:
    """At most so many of the test images, of each class the same share, and their numbers (sorted) among all."""
    test = task.data.test
    count = len(test.labels)
    if count <= most:
        return test, np.arange(count)
    turn = np.empty(count)  # of an image of its class, as a share of the class: the earliest turns are drawn
    for label in np.unique(test.labels):
        members = np.flatnonzero(test.labels == label)
        order = numpy_generator(task.seed, "test images", int(label)).permutation(members)
        turn[order] = (np.arange(len(members)) + 0.5) / len(members)
    chosen = np.sort(np.argsort(turn, kind="stable")[:most])
    return dataclasses.replace(test, source=Subset(test.source, chosen), labels=test.labels[chosen]), chosen


# ---- The classifier.


def _hold_out(labels: np.ndarray, config: Config, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images to train on and of those held out. Raises UserError where there are too few of either."""
    if np.bincount(labels).max() < 2:
        raise UserError("every class has a single training image, so none can be held out to fit the temperature on")
    fit, held_out = hold_out(labels, config.held_out, seed)
    if config.classifier == "knn" and config.k > len(fit):
        raise UserError(f"--k is {config.k}, but there are only {len(fit)} training images beside those held out")
    return fit, held_out


def _neighbours(
    task: Task, config: Config, train: Side, tap: str, fit: np.ndarray
) -> tuple[Score, dict[str, Any], list[dict[str, Any]]]:
    """The vote of the nearest images of `fit`, as logarithms of shares; the facts, and what was tried (nothing)."""
    bank, labels = train.features[tap][fit], torch.from_numpy(train.labels[fit])

    def score(features: np.ndarray) -> np.ndarray:
        similarity, index = nearest(features, bank, config.k, device=task.device)
        votes = vote(similarity.cpu(), index.cpu(), labels, len(task.data.classes), VOTE_TEMPERATURE).double()
        shares = (votes / votes.sum(1, keepdim=True)).clamp_min(LEAST_VOTE)
        return shares.masked_fill(votes <= 0, NO_VOTE).log().numpy()

    facts = {"classifier": f"{config.k} nearest neighbours", "vote_temperature": VOTE_TEMPERATURE, "no_vote": NO_VOTE}
    return score, facts, []


def _logistic(
    task: Task, config: Config, train: Side, tap: str, fit: np.ndarray, held_out: np.ndarray
) -> tuple[Score, dict[str, Any], list[dict[str, Any]]]:
    """Logistic regression on `fit` with the C that scores highest on `held`, of equal ones the one of lower loss; the
    facts, and what was tried."""
    rows = train.features[tap]
    rotation = Rotation(rows, fit, task.device)
    turned, labels = rotation(rows, fit), torch.from_numpy(train.labels[fit]).to(task.device)

    def scorer(weight: torch.Tensor, bias: torch.Tensor) -> Score:
        def score(features: np.ndarray) -> np.ndarray:
            parts = [rotation(features[start : start + CHUNK]) for start in range(0, len(features), CHUNK)]
            return torch.cat([(part.double() @ weight.T + bias).cpu() for part in parts]).numpy()

        return score

    by_penalty = {1 / (c * len(fit)): c for c in config.c}
    tried: list[dict[str, Any]] = []
    best: tuple[tuple[float, float], Score, float] | None = None
    for found in path(turned, labels, len(task.data.classes), list(by_penalty), rotation.variance):
        score, c = scorer(found.weight, found.bias), by_penalty[found.penalty]
        right, loss = 0, 0.0
        for start in range(0, len(held_out), CHUNK):
            part = held_out[start : start + CHUNK]
            log_p = log_softmax(score(rows[part]))
            right += int((log_p.argmax(1) == train.labels[part]).sum())
            loss -= float(log_p[np.arange(len(part)), train.labels[part]].sum())
        tried.append({"C": c, "top1": 100 * right / len(held_out), "loss": loss / len(held_out)})
        if best is None or (right, -loss) > best[0]:
            best = (right, -loss), score, c
        task.report("C", len(tried), len(by_penalty))
    assert best is not None
    edge = len(by_penalty) > 1 and best[2] in (min(config.c), max(config.c))
    name = f"logistic regression, C {best[2]:.3g}" + (" (at the edge of --c)" if edge else "")
    return best[1], {"classifier": name, "C": best[2]}, tried


# ---- The conditions.


def _conditions(
    task: Task, config: Config, source: Source, wanted: tuple[str, ...], sizes: list[tuple[int, int]]
) -> Iterator[Condition]:
    how, short = task.encoder.preprocessing, min(task.encoder.preprocessing.crop)
    # cut already: to the side that they have, which leaves every pixel as it is
    uncut = _prepared(task.encoder, short, how.crop)
    for name in wanted:
        for severity in dict.fromkeys(config.severities):
            altered = _altered(source, how, Corrupted(name, severity, task.seed))
            yield Condition("corruption", name, severity, uncut, altered)
    for share in dict.fromkeys(config.resolutions):
        yield Condition("resolution", "", share, uncut, _altered(source, how, Coarsened(share)))
    for share in dict.fromkeys(config.crops):
        yield Condition("crop", "", share, _prepared(task.encoder, round(short / share), how.crop), source)
    for size in sizes:
        resize = round(how.resize * min(size) / short)  # as much of the image as at the encoder's own size
        yield Condition("input_size", "", size, _prepared(task.encoder, resize, size), source)


def _altered(source: Source, how: Preprocessing, change: Corrupted | Coarsened) -> Source:
    """Each image changed as the number says that it has in the whole source, whatever the part of it."""
    if isinstance(source, Subset):
        return Subset(_altered(source.source, how, change), source.indices)
    return Altered(source, how, change)


def _prepared(encoder: Encoder, resize: int, crop: tuple[int, int]) -> Encoder:
    """The same encoder, for images prepared in another way."""
    how = dataclasses.replace(encoder.preprocessing, resize=resize, crop=crop)
    return Encoder(encoder.backbone, encoder.name, how, encoder.lineage)


@torch.inference_mode()
def _sizes(task: Task, config: Config, tap: str) -> tuple[list[tuple[int, int]], dict[str, str]]:
    """The input sizes that the encoder takes, and of those it does not, why."""
    crop, stride = task.encoder.preprocessing.crop, task.encoder.backbone.stride
    task.encoder.to(task.device).eval()

    def floats(size: tuple[int, ...]) -> int:
        blank = torch.zeros(1, task.encoder.preprocessing.channels, *size, device=task.device)
        return vectors(task.encoder, blank, [Tap.parse(tap)])[tap].shape[1]

    width, taken, refused = floats(crop), [], {}
    for share in config.input_sizes:
        height, breadth = (
            max(step, round(side * share / step) * step) for side, step in zip(crop, stride, strict=True)
        )
        size = height, breadth
        if size in taken or size == tuple(crop):
            continue
        try:
            found = floats(size)
        except (UserError, RuntimeError, ValueError, TypeError, AssertionError) as problem:
            refused[f"{height} x {breadth}"] = str(problem).split("\n")[0]
            continue
        if found == width:
            taken.append(size)
        else:
            refused[f"{height} x {breadth}"] = f"the feature has {found} floats there, not {width}"
    return taken, refused


def _features(task: Task, condition: Condition, tap: str, progress: Progress | None = None) -> Extracted:
    """The feature (m, F) of the test images under a condition."""
    return extract(
        condition.encoder,
        condition.source,
        [tap],
        batch_size=task.batch_size,
        workers=task.workers,
        device=task.device,
        precision=task.precision,
        cache=task.cache,
        progress=progress,
    )


def _tell(task: Task, number: int, count: int, done: int, total: int) -> None:
    task.report("corrupted and resized images", number * total + done, count * total)


def _help(task: Task, conditions: list[Condition], tap: str) -> None:
    """Extract for the process that evaluates. Each of the others begins at another condition and comes past all: what is
    there already costs nothing, and what somebody is at is shared."""
    place = environment.find()
    first = len(conditions) * place.rank // place.size
    for condition in conditions[first:] + conditions[:first]:
        _features(task, condition, tap)


# ---- What was found out.


def _calibrations(scores: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, float]:
    """`ece`, `nll` and `brier` as they are, and after the temperature (`ece_scaled`, ...)."""
    scaled = calibration(log_softmax(scores / temperature), labels)
    return calibration(log_softmax(scores), labels) | {f"{name}_scaled": value for name, value in scaled.items()}


def _summary(
    clean: float, conditions: list[Condition], rows: list[dict[str, Any]], right: np.ndarray, seed: int
) -> dict[str, Any]:
    """Means over corruptions, families and severities, with intervals, and the sweeps. right: (conditions, m) bool;
    clean: top-1 in percent."""

    def mean(chosen: list[int]) -> dict[str, Any]:
        each = 100 * right[chosen].mean(0)  # of each image the share of the conditions that it is recognised under
        return {"top1": float(each.mean()), "top1_interval": bootstrap(each, seed)}

    corrupted = [i for i, condition in enumerate(conditions) if condition.kind == "corruption"]
    overall = mean(corrupted)
    families, single = {}, {}
    for family, names in corruptions.FAMILIES.items():
        if members := [i for i in corrupted if conditions[i].name in names]:
            families[family] = mean(members)
            for name in dict.fromkeys(conditions[i].name for i in members):
                own = [i for i in members if conditions[i].name == name]
                single[name] = {
                    "family": family,
                    **mean(own),
                    "ece": float(np.mean([rows[i]["ece"] for i in own])),
                    "by_severity": {str(conditions[i].level): rows[i]["top1"] for i in own},
                }
    return {
        "corrupted_top1": overall["top1"],
        "corrupted_top1_interval": overall["top1_interval"],
        "relative_drop": 100 * (1 - overall["top1"] / clean) if clean else None,
        "corrupted_ece": float(np.mean([rows[i]["ece"] for i in corrupted])),
        "corrupted_ece_scaled": float(np.mean([rows[i]["ece_scaled"] for i in corrupted])),
        "families": families,
        "corruptions": single,
        **{name: [row for row in rows if row["kind"] == kind] for kind, name in KINDS.items()},
    }


def _words(metrics: dict[str, Any]) -> list[str]:
    sentences = [
        f"clean {metrics['top1']:.2f} %, corrupted {metrics['corrupted_top1']:.2f} % "
        + "({:.2f} to {:.2f})".format(*metrics["corrupted_top1_interval"])
    ]
    for family, found in metrics["families"].items():
        members = [
            f"{name} {one['top1']:.1f}" for name, one in metrics["corruptions"].items() if one["family"] == family
        ]
        sentences.append(
            f"{family} {found['top1']:.1f} % "
            + "({:.1f} to {:.1f}): ".format(*found["top1_interval"])
            + ", ".join(members)
        )
    for sweep, what in (
        ("resolutions", "shrunk to {} of the side"),
        ("crops", "central crop of {} of the side"),
        ("input_sizes", "input of {} pixels"),
    ):
        if rows := metrics[sweep]:
            levels = ["{} x {}".format(*row["size"]) if "size" in row else f"{row['share']:g}" for row in rows]
            shares = [f"{row['top1']:.1f}" for row in rows]
            sentences.append(f"{what.format(', '.join(levels))}: {', '.join(shares)} %")
    sentences.append(
        f"ECE {metrics['ece']:.2f} % clean and {metrics['corrupted_ece']:.2f} % corrupted; at temperature "
        f"{metrics['temperature']:.3g} {metrics['ece_scaled']:.2f} and {metrics['corrupted_ece_scaled']:.2f} %"
    )
    return sentences
