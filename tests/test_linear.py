"""The linear probe: heads side by side against torch's own and NumPy's softmax regression, and the protocol."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pixel_tasks import pooled_features, split_task
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from small_encoders import ImageCounter, small_encoder
from ssl_pretrain.eval import linear
from ssl_pretrain.eval._task import Side, Task
from ssl_pretrain.eval.linear import LinearProbes, hold_out
from synthetic_data import ArraySource, noisy_classes

from ssl_pretrain.errors import UserError

FEW = linear.Config(lrs=(0.01, 0.1), steps=60, probe_batch_size=64)


def heads(lrs: list[float], width: int = 6, classes: int = 4, weight_decay: float = 0.0) -> LinearProbes:
    generator = torch.Generator().manual_seed(5)
    return LinearProbes(width, classes, lrs, weight_decay=weight_decay, generator=generator, device=torch.device("cpu"))


def batch(rows: int = 33, width: int = 6, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator), torch.randint(0, classes, (rows,), generator=generator)


def cross_entropy(weight: np.ndarray, bias: np.ndarray, x: np.ndarray, labels: np.ndarray) -> float:
    logits = x @ weight + bias
    return float(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(x)), labels]))


def test_the_gradient_is_that_of_the_mean_cross_entropy() -> None:
    group = heads([0.1, 0.2, 0.3])
    x, labels = batch()
    with torch.no_grad():  # three heads at different places
        group.weight.add_(torch.randn(group.weight.shape, generator=torch.Generator().manual_seed(1)))
        group.bias.add_(torch.randn(group.bias.shape, generator=torch.Generator().manual_seed(2)))
    by_weight, by_bias = (g.double().numpy() for g in group.gradient(x, labels))
    for head in range(3):
        columns = slice(4 * head, 4 * head + 4)
        weight, bias = group.weight[:, columns].double().numpy(), group.bias[columns].double().numpy()
        for parameter, gradient in ((weight, by_weight[:, columns]), (bias, by_bias[columns])):
            for place in np.ndindex(parameter.shape):
                before, e = parameter[place], 1e-6
                losses = []
                for parameter[place] in (before + e, before - e):
                    losses.append(cross_entropy(weight, bias, x.double().numpy(), labels.numpy()))
                parameter[place] = before
                assert gradient[place] == pytest.approx((losses[0] - losses[1]) / (2 * e), abs=1e-6)


class WrittenOutLars:
    """You et al. (2017) for one matrix and its bias, which is left to plain SGD, in float64 NumPy."""

    def __init__(self, groups: list[dict], lr: float) -> None:
        self.param_groups = [{**groups[0], "lr": lr}, {**groups[1], "lr": lr}]
        self.velocity = [np.zeros(group["params"][0].shape) for group in groups]

    def zero_grad(self) -> None:
        for group in self.param_groups:
            group["params"][0].grad = None

    def step(self) -> None:
        for i, group in enumerate(self.param_groups):
            (parameter,) = group["params"]
            w, g = (each.detach().double().numpy() for each in (parameter, parameter.grad))
            if i == 0:
                g = g + group["weight_decay"] * w
                g = g * 0.001 * np.sqrt((w**2).sum()) / np.sqrt((g**2).sum())
            self.velocity[i] = 0.9 * self.velocity[i] + g
            with torch.no_grad():
                parameter.sub_(torch.from_numpy(group["lr"] * self.velocity[i]).float())


WAYS = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9),
    "nesterov": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, weight_decay=0.0),
    "lars": WrittenOutLars,
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("way", WAYS)
def test_heads_together_go_the_way_each_goes_alone(way: str, weight_decay: float) -> None:
    steps = 12
    lrs = {"lars": [5.0, 1.0, 20.0], "adamw": [0.1, 0.01, 0.3]}.get(way, [0.5, 0.01, 3.0])
    group = LinearProbes(
        6, 4, lrs,
        weight_decay=weight_decay, generator=torch.Generator().manual_seed(5), device=torch.device("cpu"),
        optimizer="sgd" if way == "nesterov" else way, nesterov=way == "nesterov",
    )  # fmt: skip
    start = group.weight[:, :4].clone()
    assert torch.equal(start, group.weight[:, 8:])
    for step in range(steps):
        group.step(*batch(seed=step), scale=1 - step / steps)
    for head, lr in enumerate(lrs):
        alone = torch.nn.Linear(6, 4)
        with torch.no_grad():
            alone.weight.copy_(start.T)
            alone.bias.zero_()
        groups = [{"params": [alone.weight], "weight_decay": weight_decay}, {"params": [alone.bias]}]
        optimizer = WAYS[way](groups, lr)
        for step in range(steps):
            for each in optimizer.param_groups:
                each["lr"] = lr * (1 - step / steps)
            x, labels = batch(seed=step)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(alone(x), labels).backward()
            optimizer.step()
        x, _ = batch(seed=99)
        assert float((alone.weight.detach() - start.T).norm() / start.norm()) > 5e-3
        torch.testing.assert_close(group.logits(x)[:, head], alone(x).detach(), rtol=1e-3, atol=1e-4)


def test_a_head_that_diverges_leaves_the_others_alone() -> None:
    together, calm = heads([0.1, float("inf"), 0.2]), heads([0.1, 0.2])
    for step in range(10):
        together.step(*batch(seed=step), scale=1.0)
        calm.step(*batch(seed=step), scale=1.0)
    x, _ = batch(seed=99)
    assert not together.logits(x)[:, 1].isfinite().all()
    torch.testing.assert_close(together.logits(x)[:, [0, 2]], calm.logits(x), rtol=1e-5, atol=1e-6)

    outcome = linear.evaluate(split_task(noisy_classes(300, 1), noisy_classes(50, 2)), replace(FEW, lrs=(0.1, 1e39)))
    assert {(entry["lr"], entry["top1"] is None) for entry in outcome.all} == {(0.1, False), (1e39, True)}
    with pytest.raises(UserError, match="every head diverged"):
        linear.evaluate(split_task(noisy_classes(300, 1), noisy_classes(50, 2)), replace(FEW, lrs=(1e39,)))


def test_held_out_images() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 30, 2, 1])
    np.random.default_rng(0).shuffle(labels)
    fit, held = hold_out(labels, 0.1, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([fit, held])), np.arange(133))
    assert np.bincount(labels[held], minlength=4).tolist() == [10, 3, 1, 0]
    again, other = hold_out(labels, 0.1, seed=0)[1], hold_out(labels, 0.1, seed=1)[1]
    np.testing.assert_array_equal(held, again)
    assert not np.array_equal(held, other)
    with pytest.raises(UserError, match="single training image"):
        hold_out(np.arange(5), 0.1, seed=0)


def test_standardising_uses_the_training_rows_only() -> None:
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((5000, 9)) * rng.uniform(0.1, 9, 9) + rng.uniform(-90, 90, 9)).astype(np.float32)
    rows = np.sort(rng.permutation(5000)[:4500])
    side = Side({"mean": features}, np.zeros(5000, np.int64), np.arange(5000), [])
    scaling = linear._Scaling(side, ["mean"], rows, "batch")
    fit = features[rows].astype(np.float64)
    wanted = (features - fit.mean(0)) / np.sqrt(fit.var(0) + 1e-6)
    found = scaling({"mean": torch.from_numpy(features)})["mean"].numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    off = linear._Scaling(side, ["mean"], rows, "none")({"mean": torch.from_numpy(features)})["mean"]
    np.testing.assert_array_equal(off.numpy(), features)


def test_layer_norm_and_length_one_are_of_the_whole_input() -> None:
    rng = np.random.default_rng(0)
    features = {
        "cls": rng.normal(3, 2, (7, 5)).astype(np.float32),
        "cls@-2": rng.normal(0, 9, (7, 4)).astype(np.float32),
    }
    side = Side(features, np.zeros(7, np.int64), np.arange(7), [])
    one = linear.Input(2, "cls")
    tensors = {tap: torch.from_numpy(x) for tap, x in features.items()}
    whole = np.concatenate([features["cls"], features["cls@-2"]], axis=1).astype(np.float64)
    layer = (whole - whole.mean(1, keepdims=True)) / np.sqrt(whole.var(1, keepdims=True) + 1e-5)
    for norm, wanted in (
        ("layer", layer),
        ("l2", layer / np.linalg.norm(layer, axis=1, keepdims=True)),
        ("none", whole),
    ):
        scaling = linear._Scaling(side, one.taps, np.arange(7), norm)
        np.testing.assert_allclose(scaling.of(one, scaling(tensors)).numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_the_rate_rises_and_falls() -> None:
    config = replace(FEW, warmup=0.1)
    rates = [linear._rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10:] == pytest.approx((1 + np.cos(np.pi * np.arange(90) / 90)) / 2)
    rates = [linear._rate(replace(FEW, schedule="step"), step, 28) for step in range(28)]
    assert rates == pytest.approx([1.0] * 8 + [0.1] * 8 + [0.01] * 8 + [0.001] * 4)
    assert linear._steps(replace(FEW, steps=None, epochs=3), 1000, 64) == 47


def test_a_single_head_is_trained_once_and_a_choice_on_test_images_says_so() -> None:
    task = split_task(noisy_classes(300, 1), noisy_classes(150, 2))
    single = linear.evaluate(task, replace(FEW, lrs=(0.1,), poolings=("mean",), layers=(1,)))
    assert single.protocol["selection"].startswith("a single head")
    assert single.all[0]["top1"] == pytest.approx(single.metrics["top1"])
    flattered = linear.evaluate(task, replace(FEW, lrs=(1e-4, 0.1), poolings=("mean",), layers=(1,), select="test"))
    assert flattered.metrics["top1"] == pytest.approx(max(entry["top1"] for entry in flattered.all))
    assert "chosen on the test images" in flattered.protocol["headline"]
    # the same head, trained on the same images, whether alone or in a grid
    assert flattered.all[1]["top1"] == single.all[0]["top1"]


def test_the_protocol_of_mae_has_each_sizes_length() -> None:
    """He et al.'s release: 90 epochs for ViT-B, 50 for ViT-L and H, 10 of them warm-up."""
    base, large, huge = (linear.PROTOCOLS[name] for name in ("mae", "mae-large", "mae-huge"))
    for protocol, epochs in ((base, 90), (large, 50), (huge, 50)):
        assert protocol["epochs"] == epochs
        assert protocol["warmup"] * epochs == pytest.approx(10)
    length = ("epochs", "warmup")
    assert [{k: v for k, v in p.items() if k not in length} for p in (large, huge)] == [
        {k: v for k, v in base.items() if k not in length}
    ] * 2


@pytest.mark.parametrize("name", linear.PROTOCOLS)
def test_published_protocols_run(name: str) -> None:
    task = split_task(noisy_classes(300, 1), noisy_classes(150, 2))
    values = linear.PROTOCOLS[name] | {"augment": False, "poolings": ("mean",), "layers": (1,)}
    values |= {"steps": 5} if "steps" in values else {"epochs": 2.0}
    outcome = linear.evaluate(task, linear.Config(**values))
    assert 0 <= outcome.metrics["top1"] <= 100
    assert ("test images" in outcome.protocol["selection"]) == (
        values.get("select") == "test" and len(values["lrs"]) > 1
    )


def test_it_reaches_what_logistic_regression_reaches() -> None:
    task = split_task(noisy_classes(1500, 1), noisy_classes(600, 2))
    outcome = linear.evaluate(task, linear.Config(steps=400, probe_batch_size=256))
    train, test = pooled_features(task)
    scaler = StandardScaler().fit(train)
    best = max(
        LogisticRegression(C=c, max_iter=300)
        .fit(scaler.transform(train), task.data.train.labels)
        .score(scaler.transform(test), task.data.test.labels)
        for c in (1e-4, 1e-3, 1e-2)
    )
    assert 40 < 100 * best < 95
    assert outcome.metrics["top1"] > 100 * best - 3.5


def test_the_test_labels_choose_nothing() -> None:
    train, test = noisy_classes(400, 1), noisy_classes(150, 2)
    outcome = linear.evaluate(split_task(train, test), FEW)
    poisoned = linear.evaluate(split_task(train, ArraySource(test.images, (test.labels + 1) % 7)), FEW)
    assert poisoned.all == outcome.all
    assert poisoned.protocol["selected"] == outcome.protocol["selected"]
    assert poisoned.metrics["top1"] < outcome.metrics["top1"]
    scored = [entry for entry in outcome.all if entry["top1"] is not None]
    assert outcome.protocol["selected"]["top1"] == max(entry["top1"] for entry in scored)
    assert "41 held-out" in outcome.protocol["selection"]


def test_the_same_seed_gives_the_same_and_another_seed_another() -> None:
    def run(seed: int) -> tuple:
        outcome = linear.evaluate(split_task(noisy_classes(400, 1), noisy_classes(150, 2), seed=seed), FEW)
        return outcome.metrics, outcome.all

    assert run(0) == run(0)
    assert run(0)[1] != run(1)[1]


def encoder_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[Task, ImageCounter]:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path))
    encoder = small_encoder(**options)
    task = split_task(noisy_classes(200, 1), noisy_classes(60, 2))
    return replace(task, encoder=encoder, cache=True), ImageCounter(encoder)


def test_which_inputs_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, passes = encoder_task(tmp_path, monkeypatch, depth=4)
    outcome = linear.evaluate(task, FEW)
    # one pass for all taps; a blank image to see whether there is a CLS token, and one a split for the taps' widths
    assert passes.images == 260 + 1 + 2
    tried = {(entry["layers"], entry["pooling"]) for entry in outcome.all}
    assert tried == {(n, p) for n in (1, 4) for p in ("cls", "mean", "cls+mean")}
    assert len(outcome.all) == 12
    assert linear.Input(4, "cls+mean").taps == ("cls", "cls@-2", "cls@-3", "cls@-4", "mean")
    assert linear.Input(2, "mean").taps == ("mean", "mean@-2")
    again = linear.evaluate(task, FEW)
    assert passes.images == 260 + 1 + 2 + 1
    assert again.metrics == outcome.metrics

    shallow, _ = encoder_task(tmp_path, monkeypatch, depth=2, cls=False, pool="mean")
    assert {(e["layers"], e["pooling"]) for e in linear.evaluate(shallow, FEW).all} == {(1, "mean")}
    with pytest.raises(UserError, match="no CLS token"):
        linear.evaluate(shallow, replace(FEW, poolings=("cls",)))
    with pytest.raises(UserError, match="last 2 block"):
        linear.evaluate(shallow, replace(FEW, layers=(3,)))


def test_augmented_training_goes_through_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, passes = encoder_task(tmp_path, monkeypatch)
    config = replace(FEW, augment=True, steps=10)
    outcome = linear.evaluate(task, config)
    # two trainings of 10 steps of 64 crops beside the 260 images seen once and the three blank ones
    assert passes.images == 260 + 3 + 2 * 10 * 64
    assert outcome.protocol["sweep"]["augment"] is True
    again = linear.evaluate(replace(task, workers=2), config)
    assert (again.metrics, again.all) == (outcome.metrics, outcome.all)
    plain = linear.evaluate(task, replace(config, augment=False))
    assert plain.all != outcome.all


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"lrs": (0.1, -1.0)}, "--lrs 0.1 -1.0"),
        ({"lrs": ()}, "--lrs"),
        ({"layers": (0,)}, "--layers 0"),
        ({"steps": 0}, "--steps is 0"),
        ({"probe_batch_size": 0}, "--probe-batch-size 0"),
        ({"held_out": 1.0}, "--held-out is 1.0"),
        ({"weight_decay": -0.1}, "--weight-decay is -0.1"),
    ],
)
def test_knobs_out_of_range(knobs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        linear.evaluate(split_task(noisy_classes(20, 1), noisy_classes(5, 2)), replace(FEW, **knobs))
