"""`ssl-eval robust`: calibration against formulas, each condition against images corrupted by hand, the command."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from pixel_tasks import split_task
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from small_encoders import small_encoder
from ssl_pretrain.eval import robust
from ssl_pretrain.eval._calibration import best_temperature, calibration, log_softmax, reliability
from ssl_pretrain.eval._intervals import wilson
from ssl_pretrain.eval._task import Helped, Task
from ssl_pretrain.eval.linear import hold_out
from ssl_pretrain.launch.evaluate import main
from synthetic_data import ArraySource, noisy_classes

from ssl_pretrain import encoder as exported
from ssl_pretrain.data.corruptions import FAMILIES, NAMES, corrupt
from ssl_pretrain.data.source import Source
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.data.views import resize_and_crop
from ssl_pretrain.errors import UserError
from ssl_pretrain.randomness import numpy_generator

Evaluate = Callable[..., subprocess.CompletedProcess]
FEW = robust.Config(corruptions=("contrast", "impulse_noise"), severities=(2, 5), c=(1e-3, 0.1, 10.0))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def task() -> Task:
    return split_task(noisy_classes(300, 1, noise=220), noisy_classes(150, 2, noise=220))


def pixels(images: np.ndarray) -> np.ndarray:
    """What the pixel encoder makes of uint8 images 8 x 8."""
    return ((images / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2).reshape(len(images), -1)


def fitted(task: Task, c: float) -> tuple[LogisticRegression, np.ndarray]:
    """scikit-learn's classifier on the training images that are not held out, and those that are."""
    train = task.data.train
    fit, held = hold_out(train.labels, 0.1, task.seed)
    solver = LogisticRegression(C=c, max_iter=10_000, tol=1e-8)
    return solver.fit(pixels(train.source.images)[fit], train.labels[fit]), held


# ---- Calibration.


def sample(n: int = 3000, classes: int = 6, sharpness: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and labels drawn from softmax(scores / sharpness)."""
    rng = np.random.default_rng(seed)
    true = 2 * rng.standard_normal((n, classes))
    p = np.exp(true) / np.exp(true).sum(1, keepdims=True)
    labels = np.array([rng.choice(classes, p=row) for row in p])
    return sharpness * true + rng.standard_normal((n, 1)), labels


def test_calibration_is_what_the_formulas_say() -> None:
    scores, labels = sample(sharpness=2.5)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    sure, right = p.max(1), p.argmax(1) == labels
    ece = 0.0
    for b in range(15):
        chosen = (sure > b / 15) & (sure <= (b + 1) / 15)
        if chosen.any():
            ece += chosen.mean() * abs(right[chosen].mean() - sure[chosen].mean())
    brier = np.mean([sum((p[i, k] - (k == labels[i])) ** 2 for k in range(6)) for i in range(len(p))])
    found = calibration(log_softmax(scores), labels)
    assert found == pytest.approx({"ece": 100 * ece, "nll": log_loss(labels, p), "brier": brier})
    assert found["ece"] > 5


def test_the_reliability_table_holds_every_image_in_its_bin() -> None:
    scores, labels = sample()
    p = np.exp(log_softmax(scores))
    rows = reliability(log_softmax(scores), labels)
    assert sum(row["n"] for row in rows) == len(labels)
    for row in rows:
        inside = (100 * p.max(1) > row["low"]) & (100 * p.max(1) <= row["high"])
        right = int((p.argmax(1) == labels)[inside].sum())
        assert row["n"] == inside.sum()
        assert row["low"] < row["confidence"] <= row["high"]
        assert row["accuracy"] == pytest.approx(100 * right / row["n"])
        assert row["accuracy_interval"] == wilson(right, row["n"])
    assert all(abs(row["accuracy"] - row["confidence"]) < 12 for row in rows if row["n"] > 50)  # drawn from these p
    edges = np.log([[1 / 3, 1 / 3, 1 / 3], [1.0, 1e-300, 1e-300]])  # bins are closed on the right
    assert [row["high"] for row in reliability(edges, np.array([0, 0]))] == pytest.approx([100 / 3, 100])


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_the_temperature_is_the_best_one(sharpness: float) -> None:
    scores, labels = sample(sharpness=sharpness)

    def nll(log_t: float) -> float:
        return log_loss(labels, np.exp(log_softmax(scores / np.exp(log_t))))

    found = best_temperature(scores, labels)
    assert found == pytest.approx(np.exp(minimize_scalar(nll, bounds=(-3, 3), method="bounded").x), rel=1e-3)
    assert found == pytest.approx(sharpness, rel=0.1)
    before, after = (calibration(log_softmax(scores / t), labels) for t in (1, found))
    assert after["nll"] <= before["nll"]
    if sharpness == 4:
        assert after["nll"] < 0.6 * before["nll"]
        assert after["ece"] < 0.3 * before["ece"]
        assert after["brier"] < before["brier"]
    np.testing.assert_array_equal((scores / found).argmax(1), scores.argmax(1))


def test_a_temperature_stays_in_bounds() -> None:
    labels = np.arange(4)
    assert best_temperature(np.eye(4), labels) == 1  # all right: no bound would be cold enough
    nearly = np.concatenate([1e-3 * np.eye(4), [[1e-3, 0, 0, 0]]])
    assert best_temperature(nearly, np.append(labels, 1)) == pytest.approx(0.01)
    assert best_temperature(-np.eye(4), labels) == pytest.approx(100)  # all wrong


# ---- The classifier and the conditions.


def test_every_condition_scores_what_images_corrupted_by_hand_do(task: Task) -> None:
    outcome = robust.evaluate(task, FEW)
    metrics, protocol = outcome.metrics, outcome.protocol
    classifier, held = fitted(task, protocol["C"])
    test, labels = task.data.test.source.images, task.data.test.labels
    assert metrics["top1"] == pytest.approx(100 * classifier.score(pixels(test), labels), abs=0.7)
    assert 50 < metrics["top1"] < 100
    hits = []
    for row in metrics["conditions"]:
        match row["kind"]:
            case "corruption":
                keys = [("corruption", row["corruption"], row["severity"], i) for i in range(150)]
                rngs = [numpy_generator(task.seed, *one) for one in keys]
                changed = [corrupt(x, row["corruption"], row["severity"], g) for x, g in zip(test, rngs, strict=True)]
            case "crop":
                changed = [resize_and_crop(x, round(8 / row["share"]), (8, 8)) for x in test]
            case "resolution":
                side = round(8 * row["share"])
                changed = [resize_and_crop(resize_and_crop(x, side, (side, side)), 8, (8, 8)) for x in test]
        p = classifier.predict_proba(pixels(np.stack(changed)))
        right = p.argmax(1) == labels
        if row["kind"] == "corruption":
            hits.append(right)
        assert row["top1"] == pytest.approx(100 * right.mean(), abs=0.7)
        assert row["top1_interval"] == wilson(round(row["top1"] * 1.5), 150)
        assert row["nll"] == pytest.approx(log_loss(labels, p, labels=range(7)), rel=0.02)
        scaled = np.exp(log_softmax(np.log(p) / metrics["temperature"]))
        assert row["nll_scaled"] == pytest.approx(log_loss(labels, scaled, labels=range(7)), rel=0.05)
    assert [row["kind"] for row in metrics["conditions"]] == ["corruption"] * 4 + ["resolution"] * 3 + ["crop"] * 3
    assert metrics["corrupted_top1"] == pytest.approx(100 * np.mean(hits), abs=0.7)
    low, high = metrics["corrupted_top1_interval"]
    assert low < metrics["corrupted_top1"] < high
    assert high - low == pytest.approx(2 * 196 * np.mean(hits, axis=0).std() / np.sqrt(150), rel=0.15)
    assert metrics["relative_drop"] == pytest.approx(100 - 100 * metrics["corrupted_top1"] / metrics["top1"])
    assert metrics["relative_drop"] > 3
    # the temperature is fitted on images held out of the fit
    train = task.data.train
    logits = np.log(classifier.predict_proba(pixels(train.source.images)[held]))
    assert metrics["temperature"] == pytest.approx(best_temperature(logits, train.labels[held]), rel=0.05)


def test_c_is_the_best_on_held_out_images(task: Task) -> None:
    outcome = robust.evaluate(task, FEW)
    for entry in outcome.all:
        classifier, held = fitted(task, entry["C"])
        p = classifier.predict_proba(pixels(task.data.train.source.images)[held])
        labels = task.data.train.labels[held]
        assert entry["top1"] == pytest.approx(100 * (p.argmax(1) == labels).mean(), abs=4)
        assert entry["loss"] == pytest.approx(log_loss(labels, p, labels=range(7)), rel=0.02)
    best = max(outcome.all, key=lambda entry: (entry["top1"], -entry["loss"]))
    assert (outcome.protocol["C"], len(outcome.all)) == (best["C"], 3)


def test_neighbours_vote_as_scikit_learns_do(task: Task) -> None:
    metrics = robust.evaluate(task, replace(FEW, classifier="knn", k=9)).metrics
    train, test = task.data.train, task.data.test
    fit, _ = hold_out(train.labels, 0.1, task.seed)
    oracle = KNeighborsClassifier(
        9, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(pixels(train.source.images)[fit], train.labels[fit])
    p = oracle.predict_proba(pixels(test.source.images))
    assert metrics["top1"] == pytest.approx(100 * (p.argmax(1) == test.labels).mean())
    five = np.argsort(-p, axis=1, kind="stable")[:, :5]
    hits = (five == test.labels[:, None]) & (np.take_along_axis(p, five, 1) > 0)  # a class without a vote is none
    assert metrics["top5"] == pytest.approx(100 * hits.any(1).mean())
    assert hits.any(1).mean() < (five == test.labels[:, None]).any(1).mean()
    p = p.clip(1e-6)
    assert metrics["nll"] == pytest.approx(log_loss(test.labels, p / p.sum(1, keepdims=True)), rel=1e-3)
    tempered = p ** (1 / metrics["temperature"])
    wanted = log_loss(test.labels, tempered / tempered.sum(1, keepdims=True))
    assert metrics["nll_scaled"] == pytest.approx(wanted, rel=1e-3)
    assert metrics["temperature"] != 1


def test_what_changes_nothing_scores_as_clean(task: Task) -> None:
    metrics = robust.evaluate(task, replace(FEW, resolutions=(1.0,), crops=(1.0,))).metrics
    for row in (*metrics["resolutions"], *metrics["crops"]):
        for name in ("top1", "top1_interval", "ece", "nll", "brier", "ece_scaled"):
            assert row[name] == metrics[name]


def test_means_of_families_and_corruptions(task: Task) -> None:
    metrics = robust.evaluate(task, replace(FEW, corruptions=("noise", "contrast", "shot_noise"))).metrics
    rows = [row for row in metrics["conditions"] if row["kind"] == "corruption"]
    assert len(rows) == (4 + 1) * 2  # shot noise is one of the noises, and comes once
    assert set(metrics["families"]) == {"noise", "digital"}
    for family, found in metrics["families"].items():
        assert found["top1"] == pytest.approx(
            np.mean([row["top1"] for row in rows if row["corruption"] in FAMILIES[family]])
        )
    for name, found in metrics["corruptions"].items():
        own = [row for row in rows if row["corruption"] == name]
        assert found["top1"] == pytest.approx(np.mean([row["top1"] for row in own]))
        assert found["by_severity"] == {str(row["severity"]): row["top1"] for row in own}
        assert found["top1_interval"][0] <= found["top1"] <= found["top1_interval"][1]
    assert metrics["corrupted_top1"] == pytest.approx(np.mean([row["top1"] for row in rows]))
    assert metrics["corrupted_ece"] == pytest.approx(np.mean([row["ece"] for row in rows]))


def test_test_images_are_drawn_from_all_classes_and_corrupted_as_they_are_among_all(task: Task) -> None:
    images, chosen = robust._drawn(task, 40)
    labels = task.data.test.labels
    np.testing.assert_array_equal(images.labels, labels[chosen])
    shares = np.bincount(labels[chosen], minlength=7) - 40 * np.bincount(labels) / 150
    assert np.abs(shares).max() <= 1
    np.testing.assert_array_equal(robust._drawn(task, 40)[1], chosen)
    assert not np.array_equal(robust._drawn(replace(task, seed=1), 40)[1], chosen)
    assert robust._drawn(task, 150)[0] is task.data.test

    how, change = task.encoder.preprocessing, robust.Corrupted("gaussian_noise", 3, 0)
    part, whole = robust._altered(images.source, how, change), robust._altered(task.data.test.source, how, change)
    for i, number in enumerate(chosen):
        np.testing.assert_array_equal(part[i], whole[number])
    assert not np.array_equal(part[0], task.data.test.source[chosen[0]])
    metrics = robust.evaluate(task, replace(FEW, test_images=40)).metrics
    assert metrics["n"] == 40
    known = {robust._altered(images.source, how, one).fingerprint for one in (
        change, replace(change, severity=4), replace(change, name="fog"), replace(change, seed=1), robust.Coarsened(0.5)
    )}  # fmt: skip
    known.add(robust._altered(images.source, replace(how, resize=9), change).fingerprint)
    known.add(images.source.fingerprint)
    assert len(known) == 7


def test_the_cache_tells_conditions_apart(task: Task) -> None:
    kept = replace(task, cache=True)
    wanted = robust.evaluate(task, FEW).metrics
    assert robust.evaluate(kept, FEW).metrics == wanted
    assert robust.evaluate(kept, FEW).metrics == wanted
    harder = robust.evaluate(kept, replace(FEW, severities=(5,))).metrics
    assert harder["conditions"][:1] == wanted["conditions"][1:2]
    other = robust._altered(task.data.test.source, task.encoder.preprocessing, robust.Corrupted("impulse_noise", 2, 1))
    uncut = robust._prepared(task.encoder, 8, (8, 8))
    found = robust._features(kept, robust.Condition("", "", 2, uncut, other), "pooled").features["pooled"]
    np.testing.assert_allclose(found, pixels(np.stack([other[i] for i in range(150)])), atol=1e-5)


def larger(count: int, seed: int) -> ArraySource:
    small = noisy_classes(count, seed, classes=3, noise=100)
    return ArraySource(small.images.repeat(3, 1).repeat(3, 2), small.labels)


def test_inputs_of_other_sizes_where_the_encoder_takes_them(task: Task) -> None:
    vit = replace(split_task(larger(60, 1), larger(40, 2), classes=3), encoder=small_encoder())  # 16 x 16, patches of 8
    config = replace(FEW, severities=(1,), input_sizes=(0.5, 1.0, 1.4, 2.0))
    outcome = robust.evaluate(vit, config)
    sizes = outcome.metrics["input_sizes"]
    assert [row["size"] for row in sizes] == [(8, 8), (24, 24), (32, 32)]
    assert outcome.protocol["sizes_refused"] == {}
    images = [resize_and_crop(image, 24, (24, 24)) for image in vit.data.test.source.images]
    with torch.inference_mode():
        wanted = vit.encoder(vit.encoder.normalise(torch.from_numpy(np.stack(images)))).pooled.numpy()
    conditions = robust._conditions(vit, config, vit.data.test.source, (), [(24, 24)])
    found = robust._features(vit, list(conditions)[-1], "pooled").features["pooled"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)

    raw = robust.evaluate(task, FEW)
    assert raw.metrics["input_sizes"] == []
    assert raw.protocol["sizes_refused"] == {"16 x 16": "the feature has 768 floats there, not 192"}


def test_a_crop_of_the_input_out_of_a_larger_image_is_corrupted_after_it(task: Task) -> None:
    wide = replace(split_task(larger(60, 1), larger(40, 2), classes=3), encoder=small_encoder())
    how = replace(wide.encoder.preprocessing, resize=20)  # 24 x 24 images to 20 x 20, and of them 16 x 16
    wide.encoder.preprocessing = how
    config = replace(FEW, severities=(2,))
    condition = next(iter(robust._conditions(wide, config, wide.data.test.source, ("jpeg_compression",), [])))
    seen = []
    hook = wide.encoder.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    robust._features(wide, condition, "pooled")
    hook.remove()
    images = [resize_and_crop(image, 20, (16, 16)) for image in wide.data.test.source.images]
    rng = np.random.default_rng(0)  # a JPEG takes nothing of it
    changed = np.stack([corrupt(image, "jpeg_compression", 2, rng) for image in images])
    torch.testing.assert_close(seen[-1], wide.encoder.normalise(torch.from_numpy(changed)))


def test_images_of_other_channels() -> None:
    def of(count: int, seed: int, channels: int) -> ArraySource:
        source = noisy_classes(count, seed, noise=100)
        return ArraySource(
            np.concatenate([source.images, source.images[:, :, :, :1]], 3)[..., :channels], source.labels
        )

    for channels, absent in ((1, {"saturate"}), (4, {"saturate", "jpeg_compression"})):
        task = split_task(of(100, 1, channels), of(40, 2, channels))
        task = replace(task, encoder=small_encoder(in_chans=channels))
        config = replace(FEW, corruptions=None, severities=(1,))
        assert set(robust._check(task, config)[1]) == set(NAMES) - absent
        with pytest.raises(UserError, match=f"saturate needs images of 3 channels, and these have {channels}"):
            robust.evaluate(task, replace(FEW, corruptions=("saturate",)))
    assert set(robust._check(task, replace(FEW, corruptions=("digital",)))[1]) == set(FAMILIES["digital"]) - absent


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"corruptions": ("motion_blr",)}, "unknown corruption 'motion_blr'; did you mean motion_blur"),
        ({"corruptions": ()}, "--corruptions and --severities: at least one"),
        ({"severities": ()}, "--corruptions and --severities: at least one"),
        ({"severities": (1, 6)}, "severity 6 of contrast"),
        ({"severities": (0,)}, "severity 0 of contrast"),
        ({"c": (0.0,)}, "--c 0.0"),
        ({"c": ()}, "--c : at least one"),
        ({"held_out": 1.0}, "--held-out is 1.0"),
        ({"test_images": 0}, "--test-images is 0"),
        ({"k": 0}, "--k 0"),
        ({"classifier": "knn", "k": 271}, "--k is 271, but there are only 270 training images beside those held out"),
        ({"resolutions": (1.2,)}, r"--resolutions 1.2: shares"),
        ({"crops": (0.5, 0.0)}, r"--crops 0.5 0.0: shares"),
        ({"input_sizes": (9.0,)}, r"--input-sizes 9.0"),
        ({"feature": "poled"}, "did you mean pooled"),
    ],
)
def test_knobs_out_of_range(task: Task, config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        robust.evaluate(task, replace(FEW, **config))


def test_one_image_of_each_class_leaves_none_to_hold_out() -> None:
    train = ArraySource(noisy_classes(7, 1).images, np.arange(7))
    with pytest.raises(UserError, match="none can be held out"):
        robust.evaluate(split_task(train, noisy_classes(10, 2)), FEW)


def test_images_that_vanish_meanwhile(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    read = robust.decode

    def broken(item: np.ndarray, channels: int) -> np.ndarray:
        if np.array_equal(item, task.data.test.source.images[3]):
            raise OSError("stale file handle")
        return read(item, channels)

    monkeypatch.setattr(robust, "decode", broken)
    with pytest.raises(UserError, match="other images could be read a moment ago"):
        robust.evaluate(task, FEW)


def test_a_part_of_the_test_images_keeps_its_numbers_where_some_are_unlabelled(task: Task) -> None:
    whole = task.data.test.source
    labelled = Subset(whole, np.arange(1, 150))
    images = replace(task.data.test, source=labelled, labels=labelled.labels, unlabelled=1)
    some = replace(task, data=replace(task.data, test=images))
    drawn, chosen = robust._drawn(some, 30)
    how, change = task.encoder.preprocessing, robust.Corrupted("shot_noise", 2, 0)
    np.testing.assert_array_equal(
        robust._altered(drawn.source, how, change)[4], robust._altered(whole, how, change)[chosen[4] + 1]
    )
    assert robust.evaluate(some, replace(FEW, test_images=30)).protocol["test"]["unlabelled"] == 1


def test_a_process_that_helps_leaves_nothing_to_extract(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = robust.evaluate(task, FEW)
    kept = replace(task, cache=True)
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("LOCAL_RANK", 1)):
        monkeypatch.setenv(name, str(value))
    asked: list[str] = []
    real = robust.extract

    def extract(encoder: object, source: Source, *rest: object, **more: object) -> object:
        asked.append(source.description)
        return real(encoder, source, *rest, **more)

    monkeypatch.setattr(robust, "extract", extract)
    with pytest.raises(Helped):
        robust.evaluate(replace(kept, helps=True), FEW)
    helped = list(asked)
    asked.clear()
    passes: list[int] = []
    hook = task.encoder.backbone.register_forward_pre_hook(lambda module, given: passes.append(len(given[0])))
    found = robust.evaluate(kept, FEW)
    hook.remove()
    assert helped == asked[5:] + asked[:5]  # the second of two begins half way
    assert set(passes) == {1}  # blank images, to learn what sizes the encoder takes
    assert (found.metrics, found.all) == (alone.metrics, alone.all)


# ---- The command.


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Three classes of noisy colour fields, 14 to train and 8 to test of each; a test file is no image."""
    for number, name in enumerate(("ant", "bee", "cow")):
        for split, count in (("train", 14), ("val", 8)):
            folder = tmp_path / "animals" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                field = np.asarray(picture(number, (16, 20))).astype(int)
                noise = np.random.default_rng([number, i, count]).integers(-60, 60, field.shape)
                Image.fromarray((field + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "animals" / "val" / "bee" / "broken.png").write_bytes(b"no image at all")
    return tmp_path / "animals"


def test_the_command(evaluate: Evaluate, animals: Path, tmp_path: Path) -> None:
    exported.save(tmp_path / "untrained", small_encoder())
    flags = ("--encoder", tmp_path / "untrained", "--data", animals, "--severities", 4, "--test-images", 20)
    done = evaluate("robust", *flags, "--workers", 1, "--out", tmp_path / "out")
    assert done.stderr == ""
    for word in (
        "robust on",
        "corrupted",
        "headline: feature pooled, logistic regression",
        "- noise",
        "- ECE",
        "- shrunk to 0.75, 0.5, 0.25 of the side: ",
    ):
        assert word in done.stdout
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    metrics, protocol = found["metrics"], found["protocol"]
    assert set(metrics["corruptions"]) == set(NAMES)
    assert set(metrics["families"]) == set(FAMILIES)
    assert [row["share"] for row in metrics["resolutions"]] == [0.75, 0.5, 0.25]
    assert [row["share"] for row in metrics["crops"]] == [1.0, 0.75, 0.5]
    assert [row["size"] for row in metrics["input_sizes"]] == [[8, 8], [24, 24], [32, 32]]
    assert len(metrics["conditions"]) == 17 + 3 + 3 + 3
    for row in (*metrics["conditions"], *metrics["families"].values(), *metrics["corruptions"].values()):
        low, high = row["top1_interval"]
        assert 0 <= low <= row["top1"] <= high <= 100
    for name in ("ece", "nll", "brier", "temperature", "ece_scaled", "nll_scaled", "brier_scaled", "relative_drop"):
        assert isinstance(metrics[name], float)
    assert sum(row["n"] for row in metrics["reliability"]) == metrics["n"]
    assert protocol["test"]["images"] == metrics["n"] in (19, 20)  # perhaps the broken one is drawn
    assert protocol["test_images"] == "20 of 25, drawn by the seed"
    assert all(Path(bad["name"]).name == "broken.png" for bad in protocol["test"]["bad"])
    assert set(protocol["corruptions"]) == set(NAMES)
    assert set(found["baselines"]) == {"majority"}
    assert len(found["all"]) == 10
    # the same without processes that read, from nothing kept
    argv = ["robust", *map(str, flags), "--workers", "0", "--no-cache", "--out", str(tmp_path / "again")]
    assert main(argv) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert (again["metrics"], again["protocol"], again["all"]) == (metrics, protocol, found["all"])


@pytest.mark.slow
def test_two_processes_find_what_one_does(evaluate: Evaluate, animals: Path, tmp_path: Path) -> None:
    exported.save(tmp_path / "untrained", small_encoder())
    same = ("robust", "--encoder", tmp_path / "untrained", "--data", animals, "--severities", 4, "--workers", 0)
    evaluate(*same, "--no-cache", "--out", tmp_path / "one")
    done = evaluate(*same, "--nproc", 2, "--out", tmp_path / "two")
    assert done.stdout.count("headline:") == 1
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    for part in ("metrics", "protocol", "all", "baselines"):
        assert one[part] == two[part]


def test_all_images_and_the_broken_one(animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--corruptions", "weather", "--severities", "3", "--classifier", "knn", "--k", "5", "--workers", "0"]
    assert main(["robust", "--encoder", "pixels", "--data", str(animals), "--out", str(tmp_path), *flags]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    (bad,) = found["protocol"]["test"]["bad"]
    assert Path(bad["name"]).name == "broken.png"
    assert found["metrics"]["n"] == 24
    assert set(found["metrics"]["corruptions"]) == set(FAMILIES["weather"])
    assert found["baselines"]["majority"]["top1"] == pytest.approx(100 / 3)
    assert found["all"] == []
    assert "1 images could not be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--corruptions", "fogg"], "unknown corruption 'fogg'; did you mean fog?"),
        (["--severities", "6"], "severity 6 of gaussian_noise: severities are 1 (mild) to 5"),
        (["--classifier", "knn", "--k", "100"], "--k is 100, but there are only 39 training images"),
        (["--classifier", "svm"], "--classifier"),
        (["--crops", "2"], "--crops 2.0: shares of the side"),
    ],
)
def test_mistakes(animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list, message: str) -> None:
    argv = ["robust", "--encoder", "pixels", "--data", str(animals), "--out", str(tmp_path), "--workers", "0"]
    assert main([*argv, *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "results.json").exists()


def test_images_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split in ("train", "val"):
        (tmp_path / "plain" / split).mkdir(parents=True)
        for i in range(3):
            picture(i).save(tmp_path / "plain" / split / f"{i}.png")
    assert main(["robust", "--encoder", "pixels", "--data", str(tmp_path / "plain"), "--workers", "0"]) == 2
    said = capsys.readouterr().err
    assert "have no labels, and this evaluator needs them" in said
    assert said.count("\n") == 1
