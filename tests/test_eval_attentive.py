"""The attentive probe: its pooling against NumPy and torch, what is trained and what is not, and the protocol."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from pixel_tasks import split_task
from small_encoders import small_encoder
from ssl_pretrain.eval import attentive
from ssl_pretrain.eval._task import Data, Task
from ssl_pretrain.launch.evaluate import main
from synthetic_data import ArraySource, noisy_classes

from ssl_pretrain.encoder import Encoder
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import pixel_encoder
from ssl_pretrain.parts.attentive_pool import AttentivePool, TokenNorm

FEW = attentive.Config(lrs=(1e-3, 1e-2), weight_decays=(0.0,), epochs=2, probe_batch_size=64, heads=2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pool(variant: str, dim: int = 12, heads: int = 3) -> AttentivePool:
    """A pool in which nothing is at its initial value."""
    made = AttentivePool(dim, heads, variant, generator())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator(parameter.numel())) * 0.3)
    return made


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def norm(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-6)


def pooled(raw: np.ndarray, made: AttentivePool, variant: str, heads: int) -> np.ndarray:
    """What the papers write, token by token: keys and values of every token, with a bias on the keys."""
    p = {name: value.detach().double().numpy() for name, value in made.named_parameters()}
    dim = raw.shape[2]
    x, query = {"aim": norm(raw, (0, 1)), "capi": raw, "vjepa": norm(raw, (2,))}[variant], p["query"]
    if variant == "vjepa":
        x = x * p["gain"] + p["shift"]
        query = p["query_map"] @ query + p["query_bias"]
    keys = x @ p["key"].T + np.linspace(-3, 3, dim)
    values = x @ p["value"].T + p.get("value_bias", 0)
    out, d = np.zeros((len(x), dim)), dim // heads
    for b in range(len(x)):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            scores = np.exp(keys[b, :, part] @ query[part] / math.sqrt(d))
            out[b, part] = scores / scores.sum() @ values[b, :, part]
    if variant != "vjepa":
        return out
    out = out + p["query"]
    hidden = gelu((norm(out, (1,)) * p["norm.weight"] + p["norm.bias"]) @ p["fc1"].T + p["fc1_bias"])
    return out + hidden @ p["fc2"].T + p["fc2_bias"]


@pytest.mark.parametrize("variant", ["aim", "capi", "vjepa"])
def test_the_pooling_is_attention_over_keys_and_values_of_all_tokens(variant: str) -> None:
    raw = np.random.default_rng(0).standard_normal((4, 7, 12)) * np.linspace(0.2, 3, 12) + 0.5
    made = pool(variant)
    found = made(TokenNorm(12, variant)(torch.from_numpy(raw).float()))
    np.testing.assert_allclose(found.detach().numpy(), pooled(raw, made, variant, 3), atol=2e-5)
    found.square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    place = (3, 5)
    for name in ("key", "value"):  # the gradient of the sum of squares, by differences of the oracle
        parameter, losses = getattr(made, name), []
        for e in (1e-3, -2e-3):
            with torch.no_grad():
                parameter[place] += e
            losses.append((pooled(raw, made, variant, 3) ** 2).sum())
        assert parameter.grad[place].item() == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=1e-2, abs=1e-3)


def test_batch_norm_of_tokens_keeps_statistics_for_the_test() -> None:
    tokens = 3 * torch.randn(50, 6, 4, generator=generator()) + 2
    normed = TokenNorm(4, "aim").train()
    for _ in range(80):
        out = normed(tokens)
    assert out.mean((0, 1)).abs().max() < 1e-5
    one = normed.eval()(tokens[:1])
    torch.testing.assert_close(one, out[:1], rtol=0.01, atol=0.01)


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="5 heads"):
        AttentivePool(12, 5, "aim", generator())


def test_it_finds_the_token_that_tells() -> None:
    """One token of 16 carries the class, in directions in which the others carry noise: a mean says little."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 600)
    tokens = rng.standard_normal((600, 16, 16))
    at = rng.integers(0, 16, 600)
    tokens[np.arange(600), at] = 0
    tokens[np.arange(600), at, labels] = 3
    tokens[:, :, 15] = 0
    tokens[np.arange(600), at, 15] = 4  # "look here"
    x, y = torch.from_numpy(tokens).float(), torch.from_numpy(labels)
    for variant in ("aim", "capi", "vjepa"):
        bank = attentive._Bank(16, 4, 1, replace(FEW, variant=variant), 0).train()
        optimizer = torch.optim.AdamW(bank.parameters(), lr=1e-2)
        for _ in range(150):
            torch.nn.functional.cross_entropy(next(bank(x[:400])), y[:400]).backward()
            optimizer.step()
            optimizer.zero_grad()
        right = (next(bank.eval()(x[400:])).argmax(1) == y[400:]).float().mean()
        assert right > 0.95, variant


# ---- The evaluator.


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    made = split_task(noisy_classes(200, 1, noise=60), noisy_classes(60, 2, noise=60))
    return replace(made, encoder=small_encoder(depth=4, patch_size=4), batch_size=40)


def test_the_protocol(task: Task) -> None:
    before = {name: value.clone() for name, value in task.encoder.state_dict().items()}
    outcome = attentive.evaluate(task, FEW)
    assert all(torch.equal(value, before[name]) for name, value in task.encoder.state_dict().items())
    assert [(e["block"], e["lr"]) for e in outcome.all] == [(b, lr) for b in (1, 2, 3) for lr in (1e-3, 1e-2)]
    protocol = outcome.protocol
    assert protocol["selected"] == max(outcome.all, key=lambda e: (e["top1"], -e["loss"]))
    assert protocol["best_of_block"] == {
        str(b): max(e["top1"] for e in outcome.all if e["block"] == b) for b in (1, 2, 3)
    }
    assert f"of block {protocol['selected']['block']} from the end" in protocol["headline"]
    assert protocol["sweep"]["steps"] == round(2 * 200 / 64)
    assert (protocol["train"]["images"], protocol["test"]["images"]) == (200, 60)
    assert {"top1_interval", "macro_f1", "per_class_f1"} <= set(outcome.metrics)
    json.dumps([outcome.metrics, protocol, outcome.all], allow_nan=False)

    again = attentive.evaluate(replace(task, workers=2), FEW)
    assert (again.metrics, again.all) == (outcome.metrics, outcome.all)
    other = attentive.evaluate(replace(task, seed=1), FEW)
    assert other.all != outcome.all


def test_it_learns(task: Task) -> None:
    outcome = attentive.evaluate(task, replace(FEW, lrs=(1e-2,), epochs=20, blocks=(1,)))
    assert outcome.metrics["top1"] > 60  # of 7 classes


def test_the_test_labels_choose_nothing(task: Task) -> None:
    few = replace(FEW, blocks=(1, 2))
    outcome = attentive.evaluate(task, few)
    test = task.data.test.source
    poisoned = split_task(task.data.train.source, ArraySource(test.images, (test.labels + 1) % 7)).data
    other = attentive.evaluate(replace(task, data=poisoned), few)
    assert other.all == outcome.all
    assert other.metrics["top1"] < outcome.metrics["top1"]


def test_probes_together_go_the_way_each_goes_alone(task: Task) -> None:
    rows, settings = np.arange(150), [(1e-3, 0.0), (1e-2, 0.5), (1e9, 0.0)]
    together, _ = attentive._train(task, FEW, rows, [1, 3], settings, "")
    tokens = torch.randn(5, 16, 32, generator=generator())
    for number, setting in enumerate(settings[:2]):
        alone, _ = attentive._train(task, FEW, rows, [3], [setting], "")
        torch.testing.assert_close(list(together[3](tokens))[number], next(alone[3](tokens)))
    first, second, _ = together[3](tokens)
    assert (first - second).abs().max() > 0.1


def test_a_probe_that_diverges_leaves_the_others_alone(task: Task) -> None:
    outcome = attentive.evaluate(task, replace(FEW, lrs=(1e-2, 1e38), blocks=(1,)))
    assert [(e["lr"], e["top1"] is None) for e in outcome.all] == [(1e-2, False), (1e38, True)]
    with pytest.raises(UserError, match="every probe diverged at --lrs 1e\\+38"):
        attentive.evaluate(task, replace(FEW, lrs=(1e38,), blocks=(1,)))


def test_tokens_are_those_of_the_blocks_after_the_final_norm(task: Task) -> None:
    images = torch.randn(90, 3, 16, 16, generator=generator())
    found = attentive._tokens(task, images, [1, 3])
    with torch.no_grad():
        features = task.encoder(images, blocks=(1,))  # of 4: the third from the end
        torch.testing.assert_close(found[1], features.patches)
        torch.testing.assert_close(found[3], task.encoder.backbone.norm(features.blocks[0])[:, 1:])
    assert found[3].shape == (90, 16, 32)
    half = attentive._tokens(replace(task, precision="bf16"), images, [1, 3])
    assert half[3].dtype == torch.float32
    assert not torch.equal(half[3], found[3])
    torch.testing.assert_close(half[3], found[3], rtol=0.1, atol=0.1)


def test_without_augmentation_it_trains_on_the_crops_of_the_test(task: Task) -> None:
    wide = [np.asarray(picture(i, (20, 33))) for i in range(12)]
    source = ArraySource(np.stack(wide), np.arange(12) % 3)
    encoder = task.encoder
    how = replace(encoder.preprocessing, resize=18)
    small = replace(split_task(source, source, 3), encoder=Encoder(encoder.backbone, encoder.name, how, {}))
    supply = attentive._supply(small, replace(FEW, augment=False, probe_batch_size=6), np.arange(12), 2, {})
    for images, index in supply:
        torch.testing.assert_close(images, small.encoder.preprocess([wide[i] for i in index]))
    augmented = attentive._supply(small, replace(FEW, probe_batch_size=6), np.arange(12), 1, {})
    images, index = next(augmented)
    assert not torch.allclose(images, small.encoder.preprocess([wide[i] for i in index]))


def test_which_blocks_are_probed_unless_told() -> None:
    for depth, wanted in ((12, [1, 3, 5, 7]), (24, [1, 5, 9, 13]), (4, [1, 2, 3]), (1, [1])):
        assert attentive._blocks(small_encoder(depth=depth), FEW) == wanted
    assert attentive._blocks(pixel_encoder((8, 8), 3), FEW) == [1]
    assert attentive._blocks(small_encoder(depth=4), replace(FEW, blocks=(2, 4, 2))) == [2, 4]


def test_encoders_without_blocks_and_other_tokens(task: Task) -> None:
    outcome = attentive.evaluate(
        split_task(noisy_classes(60, 1), noisy_classes(20, 2)), replace(FEW, heads=None)
    )  # pixels
    assert {e["block"] for e in outcome.all} == {1}
    no_cls = replace(task, encoder=small_encoder(cls=False, pool="mean"))
    assert attentive._tokens(no_cls, torch.zeros(1, 3, 16, 16), [2])[2].shape == (1, 4, 32)


def folder(tmp_path: Path, classes: int = 2) -> Path:
    for split, count in (("train", 8), ("val", 4)):
        for c in range(classes):
            place = tmp_path / "photos" / split / f"class{c}"
            place.mkdir(parents=True)
            for i in range(count):
                noise = np.random.default_rng([c, i]).integers(-30, 30, (16, 16, 3))
                pixels = (np.asarray(picture(c, (16, 16))).astype(int) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "photos"


def test_images_that_cannot_be_read_are_left_out_and_listed(tmp_path: Path, task: Task) -> None:
    photos = folder(tmp_path)
    (photos / "train" / "class0" / "2.png").write_bytes(b"no image")
    (photos / "val" / "class1" / "0.png").write_bytes(b"no image")
    outcome = attentive.evaluate(replace(task, data=Data.open(str(photos))), replace(FEW, epochs=4, blocks=(1,)))
    for side, place, images in (("train", "class0/2.png", 15), ("test", "class1/0.png", 7)):
        assert outcome.protocol[side]["images"] == images
        assert [Path(bad["name"]).parts[-2:] for bad in outcome.protocol[side]["bad"]] == [tuple(place.split("/"))]
    assert outcome.metrics["per_class_n"] == {"class0": 4, "class1": 3}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--blocks", "13"], "--blocks 13: this encoder gives tokens of its last 12"),
        (["--heads", "5"], "--heads 5 must divide the 192 channels of the tokens; 4 does"),
        (["--lrs", "0"], "--lrs 0.0"),
        (["--weight-decays", "-1"], "--weight-decays -1.0"),
        (["--epochs", "0"], "--epochs is 0.0"),
        (["--held-out", "1"], "--held-out is 1.0"),
        (["--variant", "cappi"], "did you mean capi?"),
    ],
)
def test_mistakes_are_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["attentive", "--encoder", "random", "--data", str(folder(tmp_path)), *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_images_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split in ("train", "val"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        for i in range(3):
            picture(i, (16, 16)).save(tmp_path / "flat" / split / f"{i}.png")
    assert main(["attentive", "--encoder", "random", "--data", str(tmp_path / "flat")]) == 2
    said = capsys.readouterr().err
    assert "have no labels" in said
    assert said.count("\n") == 1
