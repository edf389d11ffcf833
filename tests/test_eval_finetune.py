"""Fine-tuning: what each scope trains, the recipe against plain torch, low-rank changes, the export, the protocol."""

import copy
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
from safetensors import safe_open
from safetensors.torch import load_file
from small_encoders import small_encoder
from ssl_pretrain.eval import finetune, linear
from ssl_pretrain.eval._task import Data, Images, Task
from ssl_pretrain.launch.evaluate import main
from synthetic_data import ArraySource, noisy_classes
from torch import nn

from ssl_pretrain import backbones, optim
from ssl_pretrain import encoder as exported
from ssl_pretrain.backbones import adapters
from ssl_pretrain.backbones.backbone import Features
from ssl_pretrain.data import randaugment
from ssl_pretrain.data.loader import Share, batches, to_batch
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.encoder import Encoder, Preprocessing, random_like
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import extract
from ssl_pretrain.foreign.libraries import Foreign
from ssl_pretrain.randomness import key

PLAIN = {"randaugment": 0.0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}
FEW = finetune.Config(epochs=2, lrs=(2e-3,), train_batch_size=32)


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    made = split_task(noisy_classes(96, 1, noise=60), noisy_classes(40, 2, noise=60))
    return replace(made, encoder=small_encoder(), batch_size=64)


def tuned(task: Task, config: finetune.Config, lr: float = 2e-3) -> finetune._Tuned:
    return finetune._train(task, config, np.arange(96), lr, "")


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    theirs = after.state_dict()
    assert theirs.keys() == before.state_dict().keys()
    return {name for name, value in before.state_dict().items() if not torch.equal(value, theirs[name])}


# ---- What is trained.


NORMS = {f"blocks.{i}.norm{j}" for i in range(3) for j in (1, 2)} | {"norm"}
MATRICES = {f"blocks.{i}.{part}" for i in range(3) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
WEIGHTS = {f"{part}.weight" for part in (*NORMS, *MATRICES, "patch_embed.proj")}
BIASES = {f"{part}.bias" for part in (*NORMS, *MATRICES, "patch_embed.proj")}
ATTENTION = {name for name in WEIGHTS | BIASES if ".attn." in name}
LAST = {name for name in WEIGHTS | BIASES if name.startswith(("blocks.1", "blocks.2", "norm."))}


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("full", WEIGHTS | BIASES | {"cls_token", "pos_embed"}),
        ("attention", ATTENTION),
        ("bias", BIASES),
        ("lora", {name for name in ATTENTION if name.endswith(".weight")}),
        ("last-2", LAST),
        ("last-3", {name for name in WEIGHTS | BIASES if not name.startswith("patch_embed")}),
    ],
)
def test_a_scope_changes_what_it_names_and_leaves_the_rest_bit_for_bit(task: Task, scope: str, names: set) -> None:
    before = copy.deepcopy(task.encoder)
    found = tuned(task, replace(FEW, scope=scope))
    assert changed(task.encoder.backbone, found.encoder.backbone) == names
    assert changed(before, task.encoder) == set()  # the one asked about stays as it is
    head = 7 * 32 + 7
    own = dict(task.encoder.backbone.named_parameters())
    if scope == "lora":
        assert found.trained == head + sum(8 * sum(own[name].shape) for name in names)
    else:
        assert found.trained == head + sum(own[name].numel() for name in names)


def test_batch_norms_that_are_not_trained_keep_their_statistics() -> None:
    backbone = backbones.build("resnet18", image_size=(16, 16), in_chans=3, stem="small")
    encoder = random_like(
        Encoder(backbone, "resnet18", Preprocessing(16, (16, 16), "bicubic", (0.5,) * 3, (0.2,) * 3), {})
    )
    task = replace(split_task(noisy_classes(16, 1), noisy_classes(4, 2)), encoder=encoder)
    config = replace(FEW, epochs=1, train_batch_size=8)
    found = finetune._train(task, replace(config, scope="last-1"), np.arange(16), 1e-3, "")
    assert {name.split(".")[0] + name.split(".")[1] for name in changed(encoder.backbone, found.encoder.backbone)} == {
        "layer41"
    }
    assert "layer4.1.bn1.running_mean" in changed(encoder.backbone, found.encoder.backbone)
    found = finetune._train(task, replace(config, scope="bias"), np.arange(16), 1e-3, "")
    assert {name.rsplit(".", 1)[1] for name in changed(encoder.backbone, found.encoder.backbone)} == {"bias"}


def test_low_rank_changes_begin_at_nothing_are_of_low_rank_and_merge_to_the_same_outputs() -> None:
    original = small_encoder().backbone
    changing = copy.deepcopy(original)
    config = replace(FEW, scope="lora", lora_rank=3, lora_alpha=6.0)
    finetune.prepare(changing, config, torch.Generator().manual_seed(0))
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(changing.eval()(images).pooled, original.eval()(images).pooled)
    trained = {name: p for name, p in changing.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 6
    with torch.no_grad():
        for number, parameter in enumerate(trained.values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    low = changing.blocks[1].attn.qkv.parametrizations.weight[0]
    wanted = original.blocks[1].attn.qkv.weight + 2 * low.up @ low.down
    unmerged = changing(images).pooled
    assert (unmerged - original(images).pooled).abs().max() > 0.1
    adapters.merge(changing)
    assert torch.equal(changing(images).pooled, unmerged)
    torch.testing.assert_close(changing.blocks[1].attn.qkv.weight, wanted)
    difference = (changing.blocks[0].attn.proj.weight - original.blocks[0].attn.proj.weight).detach()
    assert torch.linalg.matrix_rank(difference, atol=1e-3) == 3
    assert list(changing.state_dict().keys() ^ original.state_dict().keys()) == []


def test_a_moving_average_of_low_rank_changes_is_merged_too(task: Task) -> None:
    start = task.encoder.backbone.state_dict()
    last, average = (tuned(task, replace(FEW, **PLAIN, scope="lora", ema=ema), lr=0.02).encoder for ema in (0.0, 0.9))
    assert changed(task.encoder.backbone, average.backbone) == {n for n in ATTENTION if n.endswith(".weight")}
    name = "blocks.1.attn.qkv.weight"
    moves = [(one.backbone.state_dict()[name] - start[name]).norm() for one in (last, average)]
    assert 0 < moves[1] < 0.5 * moves[0]


def test_learning_rates_fall_from_block_to_block(task: Task) -> None:
    model = finetune.Classifier(small_encoder().backbone, 32, 7, "pooled", torch.Generator())
    groups = optim.parameter_groups(model, model.encoder, rule="no_1d_tokens", layer_decay=0.5)
    scales = {name: (group["lr_scale"], group["decays"]) for group in groups for name in group["names"]}
    assert scales["head.weight"] == (1.0, True)
    assert scales["head.bias"] == (1.0, False)
    assert scales["encoder.norm.weight"] == (1.0, False)
    assert [scales[f"encoder.blocks.{i}.mlp.fc1.weight"] for i in range(3)] == [
        (0.5 ** (3 - i), True) for i in range(3)
    ]
    assert scales["encoder.patch_embed.proj.weight"] == (0.5**4, True)
    assert scales["encoder.pos_embed"] == scales["encoder.cls_token"] == (0.5**4, False)


# ---- The recipe.


def by_hand(task: Task, config: finetune.Config, lr: float) -> tuple[nn.Module, nn.Module]:
    """The same training in plain torch: AdamW with a rate for each parameter, torch's own loss; the last weights and
    their moving average."""
    how = task.encoder.preprocessing
    generator = torch.Generator().manual_seed(key(task.seed, "finetune", config.scope))
    start = finetune.Classifier(copy.deepcopy(task.encoder.backbone), 32, 7, "pooled", generator)
    model = nn.ModuleDict({"encoder": start.encoder, "head": start.head}).train()
    average = copy.deepcopy(model)
    depth, rates = 3, {}
    for name, _ in model.named_parameters():
        layer = depth + 1
        if name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith("encoder.") and not name.startswith("encoder.norm"):
            layer = 0
        rates[name] = config.layer_decay ** (depth + 1 - layer)
    no_decay = {name for name, p in model.named_parameters() if p.ndim < 2 or "token" in name or "pos_embed" in name}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "scale": rates[name], "weight_decay": 0.0 if name in no_decay else config.weight_decay}
            for name, p in model.named_parameters()
        ],
        betas=(0.9, 0.999),
        foreach=False,
    )
    steps = round(config.epochs * 96 / config.train_batch_size)
    spec = ViewSpec(name="image", size=how.crop, scale=(0.08, 1.0), interpolation=how.interpolation)
    peak, warmup = lr * config.train_batch_size / 256, round(config.warmup * steps)
    stream = batches(
        Subset(task.data.train.source, np.arange(96)), (spec,), Share(config.train_batch_size),
        seed=key(task.seed, "crops"), channels=3, start_step=0, stop_step=steps, workers=0, policy="fail",
    )  # fmt: skip
    for step, raw in enumerate(stream):
        given = to_batch(raw, (spec,), how.mean, how.std, torch.device("cpu"))
        logits = model["head"](model["encoder"](given.views["image"]).pooled)
        labels = torch.from_numpy(task.data.train.labels)[given.index]
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels, label_smoothing=config.label_smoothing).backward()
        if step < warmup:
            rate = peak * (step + 1) / warmup
        else:
            rate = 1e-6 + (peak - 1e-6) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.mul_(config.ema).add_(new, alpha=1 - config.ema)
    return model, average


@pytest.mark.parametrize("passes", [64, 8])  # images a pass of the 32 of a step
@pytest.mark.parametrize("ema", [0.0, 0.7])
def test_the_training_is_that_of_plain_torch(task: Task, passes: int, ema: float) -> None:
    config = replace(FEW, **PLAIN, ema=ema, warmup=0.3, layer_decay=0.6, weight_decay=0.2)
    found = tuned(replace(task, batch_size=passes), config, lr=0.02)
    last, average = by_hand(task, config, lr=0.02)
    wanted = (average if ema else last).state_dict()
    ours = {f"encoder.{name}": value for name, value in found.encoder.backbone.state_dict().items()}
    ours |= {f"head.{name}": value for name, value in found.head.state_dict().items()}
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-5, msg=name)
    start = task.encoder.backbone.state_dict()["blocks.2.mlp.fc1.weight"]
    assert (wanted["encoder.blocks.2.mlp.fc1.weight"] - start).abs().max() > 1e-3


@pytest.mark.parametrize("knob", ["randaugment", "erase", "mixup", "cutmix", "drop_path"])
def test_each_part_of_the_recipe_has_an_effect_of_its_own(task: Task, knob: str) -> None:
    value = {"randaugment": 9.0, "erase": 0.5, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.5}[knob]
    plain = tuned(task, replace(FEW, **PLAIN, epochs=1))
    other = tuned(task, replace(FEW, **{**PLAIN, knob: value}, epochs=1))
    again = tuned(replace(task, workers=1), replace(FEW, **{**PLAIN, knob: value}, epochs=1))
    assert changed(plain.encoder, other.encoder)
    assert not changed(again.encoder, other.encoder)  # and it is a function of the seed
    assert other.encoder.backbone.config == task.encoder.backbone.config


def test_mixed_batches_bring_their_shares_of_both_labels(task: Task) -> None:
    config, labels = replace(FEW, mixup=0.0, label_smoothing=0.0), torch.from_numpy(task.data.train.labels)
    how, share = task.encoder.preprocessing, Share(32)
    spec = ViewSpec(name="image", size=how.crop, interpolation=how.interpolation)
    stream = batches(
        task.data.train.source, (spec,), share, seed=0, channels=3, start_step=0, stop_step=4, workers=0, policy="fail"
    )
    seen = []
    for raw in stream:
        images, targets = finetune._augment(task, config, raw, share, spec, labels)
        assert (images.shape, targets.shape) == ((32, 3, 16, 16), (32, 7))
        own = targets[torch.arange(32), labels[raw.index]]
        other = targets[torch.arange(32), labels[raw.index].flip(0)]
        same = labels[raw.index] == labels[raw.index].flip(0)
        torch.testing.assert_close(torch.where(same, own, own + other), torch.ones(32))
        seen.append(own[~same][0].item())
    assert len(set(seen)) == 4


def test_augmentation_is_drawn_for_an_epoch_and_a_sample(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, draw = [], randaugment.draw

    def noted(seed: int, epochs: np.ndarray, samples: np.ndarray, *rest: object, **knobs: object) -> randaugment.Plan:
        seen.extend(zip(epochs.tolist(), samples.tolist(), strict=True))
        return draw(seed, epochs, samples, *rest, **knobs)

    monkeypatch.setattr(randaugment, "draw", noted)
    tuned(replace(task, batch_size=20), replace(FEW, train_batch_size=40, epochs=2.1))
    assert len(seen) == 5 * 40
    assert sorted(seen[:192]) == [(epoch, sample) for epoch in (0, 1) for sample in range(96)]
    assert {epoch for epoch, _ in seen[192:]} == {2}


# ---- The evaluator.


def stripes(count: int, seed: int) -> ArraySource:
    """Gratings that stand, lie, or cross, of random colours and phases: neither a pixel nor a mean tells the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    y, x = np.mgrid[:16, :16]
    images = []
    for label in labels:
        standing, lying = (np.sin(1.2 * axis + rng.uniform(0, 2 * math.pi)) for axis in (x, y))
        wave = (standing, lying, standing * lying * math.sqrt(2))[label]
        images.append(127 + 100 * wave[..., None] * rng.uniform(-1, 1, 3) + 25 * rng.standard_normal((16, 16, 3)))
    return ArraySource(np.stack(images).clip(0, 255).astype(np.uint8), labels)


def striped_task() -> Task:
    backbone = backbones.build("vit_micro", image_size=(16, 16), in_chans=3, patch_size=4, dim=48, depth=2, heads=4)
    how = Preprocessing.for_size((16, 16), (0.5,) * 3, (0.25,) * 3)
    encoder = random_like(Encoder(backbone, "vit_micro", how, {}))
    return replace(split_task(stripes(300, 1), stripes(150, 2), 3), encoder=encoder)


def test_fine_tuning_learns_what_a_linear_probe_of_the_same_untrained_encoder_does_not() -> None:
    probe = linear.evaluate(
        striped_task(), linear.Config(lrs=(0.01, 0.05, 0.2), steps=200, layers=(1,), poolings=("mean",))
    )
    config = replace(FEW, **PLAIN, lrs=(1e-2,), layer_decay=1.0, epochs=20)
    outcome = finetune.evaluate(striped_task(), config)
    assert outcome.metrics["top1"] > probe.metrics["top1"] + 40
    assert outcome.metrics["top1"] > 85


@pytest.mark.slow
def test_fine_tuning_beats_a_linear_probe_of_the_same_untrained_encoder_on_photographs(shared_data: Path) -> None:
    data = Data.open(str(shared_data / "cifar10_lossless5k"))
    chosen = [data.classes.index(name) for name in ("automobile", "deer", "ship")]

    def part(images: Images) -> Images:
        at = np.flatnonzero(np.isin(images.labels, chosen))
        return Images(images.split, Subset(images.source, at), np.searchsorted(chosen, images.labels[at]), 0)

    some = Data(data.name, part(data.train), part(data.test), ("automobile", "deer", "ship"))
    task = replace(striped_task(), data=some)
    probe = linear.evaluate(task, linear.Config(lrs=(0.01, 0.05, 0.2), steps=300, layers=(1,), poolings=("mean",)))
    recipe = {**PLAIN, "cutmix": 0.5}
    outcome = finetune.evaluate(
        task, finetune.Config(**recipe, lrs=(8e-3,), layer_decay=1.0, epochs=30, train_batch_size=64)
    )
    assert outcome.metrics["top1"] > probe.metrics["top1"] + 4


@pytest.mark.parametrize("scope", ["full", "lora"])
def test_a_curve_looks_on_and_changes_nothing(task: Task, scope: str) -> None:
    config = replace(FEW, scope=scope, lora_rank=4)
    plain, watched = finetune.evaluate(task, config), finetune.evaluate(task, replace(config, curve=3))
    curve = watched.metrics.pop("curve")
    assert watched.metrics == plain.metrics
    assert [point["step"] for point in curve] == [2, 4, 6]  # two epochs of 96 images, 32 a step
    assert [point["epoch"] for point in curve] == pytest.approx([2 / 3, 4 / 3, 2])
    assert curve[-1]["top1"] == pytest.approx(watched.metrics["top1"])


def test_the_protocol(task: Task) -> None:
    outcome = finetune.evaluate(task, replace(FEW, train_batch_size=None))
    protocol = outcome.protocol
    assert protocol["headline"] == "scope full, 2 epochs, lr 0.002"
    assert protocol["training"]["batch_size"] == 16
    assert protocol["training"]["steps"] == 12
    assert {"scope", "trained_parameters", "selection", "preprocessing", "encoder_fingerprint", "seed"} <= set(protocol)
    assert protocol["encoder_fingerprint"] == task.encoder.fingerprint
    assert (protocol["train"]["images"], protocol["test"]["images"]) == (96, 40)
    assert outcome.all == []
    assert {"top1_interval", "macro_f1", "per_class_f1"} <= set(outcome.metrics)
    json.dumps([outcome.metrics, protocol], allow_nan=False)


def test_the_learning_rate_is_chosen_on_held_out_training_images(task: Task) -> None:
    config = replace(FEW, lrs=(1e-5, 2e-2, 1e30), held_out=0.25)
    outcome = finetune.evaluate(task, config)
    assert [(e["lr"], e["top1"] is None) for e in outcome.all] == [(1e-5, False), (2e-2, False), (1e30, True)]
    assert outcome.protocol["selected"] == max(outcome.all[:2], key=lambda e: (e["top1"], -e["loss"]))
    assert "held-out training images (0.25 of each class)" in outcome.protocol["selection"]
    test = task.data.test.source
    poisoned = split_task(task.data.train.source, ArraySource(test.images, (test.labels + 1) % 7)).data
    other = finetune.evaluate(replace(task, data=poisoned), config)
    assert other.all == outcome.all
    assert other.metrics["top1"] != outcome.metrics["top1"]
    for lrs in ((1e30,), (1e30, 1e31)):
        with pytest.raises(UserError, match=r"training diverged at .*--lrs 1e\+30"):
            finetune.evaluate(task, replace(FEW, lrs=lrs))


def test_batches_leave_enough_steps() -> None:
    for images, batch in ((9, 9), (40, 16), (3600, 64), (9469, 256), (50_000, 1024), (1_281_167, 1024)):
        assert finetune._batch(finetune.Config(), images) == batch
    assert finetune._batch(finetune.Config(train_batch_size=512), 100) == 100


@pytest.mark.parametrize("feature", ["cls", "mean"])
def test_the_classifier_sees_the_feature_it_is_told_to(feature: str) -> None:
    encoder = small_encoder()
    model = finetune.Classifier(encoder.backbone, 32, 7, feature, torch.Generator()).eval()
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    features = encoder(images)
    vector = features.cls if feature == "cls" else features.patches.mean(1)
    torch.testing.assert_close(model(images, torch.Generator()), vector @ model.head.weight.T)


@pytest.mark.parametrize("scope", ["full", "lora"])
def test_half_precision_goes_the_same_way(task: Task, scope: str) -> None:
    config = replace(FEW, **PLAIN, scope=scope, lora_alpha=64.0, layer_decay=1.0)
    name = "blocks.1.attn.qkv.weight"
    start = task.encoder.backbone.state_dict()[name]
    ways = [
        tuned(replace(task, precision=precision), config, lr=0.02).encoder.backbone.state_dict()[name] - start
        for precision in ("fp32", "bf16")
    ]
    assert all(way.dtype == torch.float32 for way in ways)
    assert not torch.equal(*ways)
    assert nn.functional.cosine_similarity(*(way.flatten() for way in ways), dim=0) > 0.9


class Net(nn.Module):
    """Another library's: batch norm, and dropout that would draw from the process's random state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.dropout = nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.Dropout(0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.bn(self.conv(images)))


def test_an_encoder_of_another_library(task: Task) -> None:
    with torch.random.fork_rng():
        module = Net()

    def read(module: nn.Module, images: torch.Tensor) -> Features:
        x = module(images)
        return Features(cls=None, patches=x.flatten(2).mT, grid=(2, 2), pooled=x.mean((2, 3)))

    net = Foreign(module, read, "module:net", (16, 16), 3)
    other = replace(task, encoder=Encoder(net, "net", task.encoder.preprocessing, {}))
    before = torch.random.get_rng_state()
    found = tuned(other, FEW)
    assert torch.equal(torch.random.get_rng_state(), before)
    names = {f"module.{part}.{kind}" for part in ("conv", "bn") for kind in ("weight", "bias")}
    assert changed(net, found.encoder.backbone) == names
    for knobs, message in (
        ({"scope": "last-1"}, "is not known"),
        ({"save": True}, "--save"),
        ({"scope": "lora"}, "no such"),
    ):
        with pytest.raises(UserError, match=message):
            finetune.evaluate(other, replace(FEW, **knobs))


# ---- The command.


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for split, count in (("train", 10), ("val", 5)):
        for c, name in enumerate(("ant", "bee")):
            place = tmp_path / "photos" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                noise = np.random.default_rng([c, i, count]).integers(-60, 60, (16, 16, 3))
                pixels = (np.asarray(picture(c, (16, 16))).astype(int) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    (tmp_path / "photos" / "train" / "bee" / "broken.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_results_and_the_export_of_what_was_fine_tuned(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    made = small_encoder()
    lineage = {"method": "mae", "step": 7}
    exported.save(tmp_path / "run" / "encoder", Encoder(made.backbone, made.name, made.preprocessing, lineage))
    flags = ["--epochs", "3", "--lrs", "1e-2", "--train-batch-size", "4", "--scope", "lora", "--save", "--workers", "0"]
    assert main(["finetune", "--encoder", str(tmp_path / "run"), "--data", str(photos), *flags]) == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "run" / "eval" / "finetune-photos"
    found = json.loads((folder / "results.json").read_text())
    assert f"{found['metrics']['top1']:.2f}" in shown
    assert found["evaluator"] == "finetune"
    assert set(found["baselines"]) == {"random", "majority"}
    assert found["protocol"]["training"]["lora_rank"] == 8
    assert [Path(bad["name"]).name for bad in found["protocol"]["train"]["bad"]] == ["broken.png"]
    assert (found["protocol"]["train"]["images"], found["metrics"]["n"]) == (20, 10)

    again = exported.load(folder)
    assert (again.lineage["method"], again.lineage["finetuned"]["scope"]) == ("mae", "lora")
    assert changed(made, again)
    head = load_file(folder / "head.safetensors")
    with safe_open(folder / "head.safetensors", "pt") as file:
        said = json.loads(file.metadata()["head"])
    assert said == {"feature": "pooled", "classes": ["ant", "bee"]}
    side = extract(again, Data.open(str(photos)).test.source, [said["feature"]], cache=False)
    logits = side.features["pooled"] @ head["weight"].numpy().T + head["bias"].numpy()
    assert 100 * (logits.argmax(1) == side.labels).mean() == pytest.approx(found["metrics"]["top1"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scope", "attenton"], "--scope attenton is unknown; did you mean attention?"),
        (["--scope", "last-4"], "--scope last-4: this encoder has 3 block(s)"),
        (["--scope", "last-0"], "--scope last-0"),
        (["--scope", "lora", "--lora-rank", "500"], "--lora-rank is 500, and the attention matrices are"),
        (["--lrs", "-1"], "--lrs -1.0"),
        (["--epochs", "0"], "--epochs is 0.0"),
        (["--train-batch-size", "0"], "--train-batch-size is 0"),
        (["--layer-decay", "0"], "--layer-decay is 0.0"),
        (["--drop-path", "1"], "--drop-path is 1.0"),
        (["--randaugment", "11"], "--randaugment 11.0"),
        (["--mixup", "-0.5"], "--mixup is -0.5"),
        (["--feature", "pool"], "did you mean pooled?"),
    ],
)
def test_mistakes_are_said_in_one_line(
    tmp_path: Path,
    photos: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    exported.save(tmp_path / "run", small_encoder())
    assert main(["finetune", "--encoder", "run", "--data", str(photos), "--workers", "0", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_what_cannot_be_fine_tuned(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", "--encoder", "pixels", "--data", str(photos)]) == 2
    assert "pixels has no weights" in capsys.readouterr().err
    for file in (photos / "train" / "bee").iterdir():
        file.rename(photos / "train" / f"bee-{file.name}")
    for file in (photos / "train" / "ant").iterdir():
        file.rename(photos / "train" / f"ant-{file.name}")
    assert main(["finetune", "--encoder", "random", "--data", str(photos)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    backbone = backbones.build("convnext_micro", image_size=(32, 32), in_chans=3)
    with pytest.raises(UserError, match="--scope lora: ConvNeXt has no such weights"):
        finetune.trained(backbone, "lora")


def test_the_protocols_of_mae_warm_up_for_five_epochs() -> None:
    """He et al. (2022), table 9: 100 epochs for ViT-B, 50 for ViT-L and H, 5 of them warm-up."""
    for name, epochs in (("mae", 100), ("mae-large", 50), ("mae-huge", 50)):
        config = finetune.Config(**finetune.PROTOCOLS[name])
        assert config.epochs == epochs
        assert config.warmup * config.epochs == pytest.approx(5)
