"""Models of timm as encoders that are trained: what they give is what timm gives, and their exports open in timm."""

import copy
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, losses
from oracles import import_timm
from torch import nn

from ssl_pretrain import backbones, conformance, encoder
from ssl_pretrain.backbones import adapters
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.data.source import open_source
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.data.views import Sight
from ssl_pretrain.distributed.batch_norm import couples_samples
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import extract
from ssl_pretrain.foreign import libraries
from ssl_pretrain.frozen import Frozen
from ssl_pretrain.parts.anchor import Anchor

NAMES = ("resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv4_conv_small", "efficientnet_lite0")
SIZE = (64, 96)
QUICK = "--workers 0 --precision fp32 --monitor-every 0 --picture-every 0 --no-score --log-every 1".split()


@pytest.fixture(autouse=True)
def timm() -> ModuleType:
    return import_timm()


def build(name: str, size: tuple[int, int] = SIZE, seed: int = 0, **options: Any) -> Any:
    """The encoder, its weights and statistics moved away from where they begin."""
    torch.manual_seed(seed)
    model = backbones.build(f"timm:{name}", image_size=size, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value += 0.02 * torch.randn(value.shape, generator=generator).abs()
    return model.eval()


def images(count: int = 2, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(3))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


# ---- What timm gives.


@pytest.mark.parametrize("name", NAMES)
def test_the_export_opens_in_timm_with_the_same_features(name: str, timm: ModuleType, tmp_path: Path) -> None:
    model = build(name)
    encoder.save(tmp_path, Encoder(model, f"timm:{name}", Preprocessing.for_size(SIZE, (0.5,) * 3, (0.2,) * 3), {}))
    with torch.inference_mode():
        found = encoder.load(tmp_path)(images())
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architecture"] == name
    arguments = {
        key: value for key, value in written["model_args"].items() if not key.startswith(("dynamic", "strict"))
    }
    by_file = timm.create_model(name, num_classes=0, checkpoint_path=tmp_path / "model.safetensors", **arguments)
    by_folder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for theirs in (by_file.eval(), by_folder.eval()):
        with torch.inference_mode():
            assert close(found.pooled, theirs(images()))
            x = theirs.forward_features(images())
        assert found.pooled.shape[1] == model.dim == found.patches.shape[2]
        if name.startswith("vit"):
            assert close(found.tokens, x)
        elif name == "resnet18":
            assert close(found.patches, x.flatten(2).mT)
    assert by_folder.pretrained_cfg["mean"] == (0.5, 0.5, 0.5) or by_folder.pretrained_cfg["mean"] == [0.5] * 3


def test_a_swin_is_trained_at_other_sizes_too(timm: ModuleType) -> None:
    """Its tables of relative positions depend on the image size. timm would take weights without a classifier for those of
    an older version and rename them."""
    model = build("swin_tiny_patch4_window7_224", (64, 64))
    theirs = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=0).eval()
    theirs.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert close(model(images(size=(64, 64))).pooled, theirs(images(size=(64, 64))))


def test_patches_are_what_the_head_makes_of_each_position(timm: ModuleType) -> None:
    model = build("convnext_atto")
    with torch.no_grad():
        found, x = model(images()), model.model.forward_features(images())
    assert close(found.patches, model.model.head.norm(x).flatten(2).mT)  # a norm over the channels
    assert found.grid == (2, 3)


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "resnet18"])
def test_batch_norms_are_global_and_compute_what_timms_do(name: str, timm: ModuleType) -> None:
    """On one process: the same features and running statistics in training; on two: benchmarks/library_backbones.py."""
    model = build(name).train()
    theirs = timm.create_model(name, num_classes=0)
    theirs.load_state_dict(model.state_dict())
    assert all("_GlobalBatchNorm" in str(type(p).__mro__) for p in model.modules() if isinstance(p, nn.BatchNorm2d))
    assert couples_samples(model)
    expected = theirs.train()(images(4))
    assert close(model(images(4), pooled_only=True).pooled, expected, 1e-4)
    for (key, value), (_, other) in zip(model.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert "num_batches" in key or close(value, other, 1e-4), key
    before = copy.deepcopy(model.state_dict())
    model(images(4))  # asked for patches too, the head sees more than the pooled vectors
    twin = build(name).train()
    twin.load_state_dict(before)
    twin(images(4), pooled_only=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key


def test_masks_of_a_plain_vit_are_those_of_our_vit(timm: ModuleType) -> None:
    """Weights of one ViT in timm's class and in ours: the same features with each option."""
    theirs = build("vit_tiny_patch16_224", timm_args=("depth=2",))
    ours = backbones.build("vit_tiny", image_size=SIZE, depth=2, pool="cls").eval()
    ours.load_state_dict(theirs.state_dict())
    keep = torch.tensor([[5, 0, 7], [1, 2, 23]])
    masked = torch.zeros(2, 24, dtype=torch.bool)
    masked[0, 3] = masked[1, 4:9] = True
    token = torch.full((192,), 0.3)
    lengths = torch.tensor([2, 5])
    for options in (
        {"keep": keep},
        {"replace": (masked, token)},
        {"replace": (masked, token), "keep": keep},
        {"attention": "causal"},
        {"attention": "prefix", "prefix_length": lengths},
        {"blocks": (-1, 0)},
    ):
        with torch.inference_mode():
            found, expected = theirs(images(), **options), ours(images(), **options)
        for part in ("tokens", "pooled", "cls", "patches", "prefix"):
            assert close(getattr(found, part), getattr(expected, part)), (options.keys(), part)
        assert all(close(a, b) for a, b in zip(found.blocks, expected.blocks, strict=True))
    with torch.inference_mode():
        small = images(size=(32, 48))
        assert close(theirs(small).patches, ours(small).patches, 0.05)  # two ways to resize a table of positions


# ---- Training.


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_has_timms_layer_groups(name: str, timm: ModuleType) -> None:
    """timm's scales are of a model with a classifier, which is one group above ours."""
    model, decay = build(name), 0.5
    optim = importlib.import_module("timm.optim")
    whole = timm.create_model(name)
    groups = optim.param_groups_layer_decay(whole, layer_decay=decay)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    theirs = {inner: scales[id(parameter)] for inner, parameter in whole.named_parameters()}
    for parameter, _ in model.named_parameters():
        ours, inner = decay ** (model.depth + 1 - model.layer_of(parameter)), parameter.removeprefix("model.")
        if inner.startswith("norm.") and name.startswith("vit"):
            assert ours == 1  # it follows the blocks; timm counts it to the last one
        else:
            assert ours == pytest.approx(theirs[inner]), inner


def test_drop_path_has_timms_rates_and_the_noise_of_the_run(timm: ModuleType) -> None:
    """A branch that is dropped for all samples, in ours by the noise and in timm by a rate of nearly 1."""
    model = build("convnext_atto", drop_path=0.3).train()
    theirs = timm.create_model("convnext_atto", num_classes=0, drop_path_rate=0.3)
    theirs.load_state_dict(model.state_dict())
    parts = [part for part in theirs.modules() if isinstance(part, timm.layers.DropPath)]
    rates = [part.drop_prob for part in parts]
    noise = torch.full((2, 2 * model.depth), 0.999)
    noise[:, 4] = noise[:, 9] = 0.0
    for i, part in enumerate(parts):
        kept = 1 / (1 - rates[i])
        part.forward = partial(torch.mul, torch.tensor(0.0 if i in (4, 9) else kept))
    assert close(model(images(), drop=noise).pooled, theirs.train()(images()))
    with pytest.raises(RuntimeError, match=r"step\.rand\(24\)"):
        model(images())
    model.eval()
    assert torch.equal(model(images()).pooled, model(images(), drop=noise).pooled)


def test_drop_path_is_refused_where_it_cannot_be(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    from ssl_pretrain.launch.pretrain import main

    with pytest.raises(UserError, match="30 drop path layers in 4 blocks"):
        build("maxvit_nano_rw_256", (64, 64), drop_path=0.1)
    words = ["--method", "simclr", "--encoder", "timm:resnet18", "--drop-path", "0.1", "--gradient-checkpointing"]
    assert main([*words, "--image-size", "32", "--steps", "1", "--out", str(tmp_path / "run"), *QUICK]) == 2
    assert "--drop-path 0, or leave out --gradient-checkpointing" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_it_keeps_the_contract_of_encoders(name: str) -> None:
    found = conformance.run("backbones", f"timm:{name}")
    assert len(found) > 20
    assert [result.fault for result in found if result.fault is not None] == []


def test_a_run_resumes_and_two_runs_are_bit_identical(photos: Path, tmp_path: Path, pretrain_here: Callable) -> None:
    """With batch norm and drop path: stopped after 2 of 4 steps by its length, and continued."""
    words = ["--method", "dino", "--data", photos, "--encoder", "timm:mobilenetv4_conv_small", "--image-size", 64]
    words += ["--batch-size", 8, "--prototypes", 32, "--hidden-dim", 32, "--local-views", 1, "--drop-path", 0.2, *QUICK]
    words += ["--schedule", "constant", "--lr", 1e-3, "--warmup-steps", 0, "--cooldown-steps", 0]
    words += ["--checkpoint-every", 2]
    pretrain_here(*words, "--steps", 4, "--out", tmp_path / "whole")
    folder = tmp_path / "whole" / "checkpoints"
    (last,) = [path for path in folder.iterdir() if "4" in path.name]
    curve = losses(tmp_path / "whole")
    state = encoder.load(tmp_path / "whole").fingerprint
    for path in sorted(last.rglob("*"), reverse=True):
        path.unlink()
    last.rmdir()
    pretrain_here(*words, "--steps", 4, "--out", tmp_path / "whole")
    assert losses(tmp_path / "whole")[4] == curve[4]
    assert encoder.load(tmp_path / "whole").fingerprint == state


def test_a_run_starts_from_a_checkpoint_of_timm(
    photos: Path, tmp_path: Path, timm: ModuleType, pretrain_here: Callable, capfd: pytest.CaptureFixture
) -> None:
    from ssl_pretrain.launch.pretrain import main

    torch.manual_seed(9)
    theirs = timm.create_model("resnet18")
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    spec = f"timm:resnet18,checkpoint={tmp_path / 'weights.pth'}"
    words = ["--method", "simclr", "--data", photos, "--image-size", 32, "--batch-size", 8, "--steps", 1, *QUICK]
    words += ["--hidden-dim", 16]
    pretrain_here(*words, "--encoder", spec, "--out", tmp_path / "run", "--lr", 0, "--final-lr", 0)
    assert encoder.load(tmp_path / "run").name == "timm:resnet18"
    found = encoder.load(tmp_path / "run").backbone.state_dict()
    assert torch.equal(found["layer1.0.conv1.weight"], theirs.state_dict()["layer1.0.conv1.weight"])
    for start, said in (
        ("timm:resnet18,checkpoint=nowhere.pth", "does not exist"),
        (spec.replace("resnet18", "resnet34"), "does not fit timm:resnet34"),
    ):
        assert main([*map(str, words), "--encoder", start, "--out", str(tmp_path / said[:4])]) == 2
        assert said in capfd.readouterr().err
    assert main([*map(str, words), "--encoder", spec, "--init-from", str(tmp_path / "run"), "--out", "x"]) == 2
    assert "flags contradict" in capfd.readouterr().err  # --init-from and checkpoint= are two starts


def test_ranks_and_processes_agree(tmp_path: Path) -> None:
    """Two real processes of all five encoders: the loss and the gradients of one process."""
    words = [sys.executable, ROOT / "benchmarks" / "library_backbones.py", "--only", "ranks", "--methods", "simclr"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = re.findall(r"^\| `timm:(\w+)` \| simclr \| (\S+) \| (\S+) \|$", done.stdout, re.MULTILINE)
    assert {name for name, *_ in rows} == set(NAMES)
    assert all(float(loss) < 1e-5 and float(gradient) < 1e-5 for _, loss, gradient in rows), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "more"),
    [
        ("resnet18", "simclr", ["--optimizer", "adamw", "--lr", 1e-3, "--hidden-dim", 512]),
        ("mobilenetv4_conv_small", "vicreg", ["--optimizer", "adamw", "--lr", 1e-3, "--projector-dim", 512]),
    ],
)
def test_it_learns_on_real_images(
    name: str, method: str, more: list, shared_data: Path, tmp_path: Path, pretrain_here: Callable
) -> None:
    """The 20 nearest others of 2,000 test images of CIFAR-10 vote for the right class of clearly more of them than with the
    untrained encoder (two standard errors)."""
    words = [
        "--method",
        method,
        "--encoder",
        f"timm:{name}",
        "--data",
        shared_data / "cifar10_lossless5k",
        *QUICK,
    ]
    words += ["--image-size", 32, "--batch-size", 64, "--steps", 150, "--aug", "fast", "--out", tmp_path / "run"]
    pretrain_here(*words, "--blur", 0, "--crop-scale", 0.2, 1, *more)
    model = encoder.load(tmp_path / "run")
    test = Subset(open_source(str(shared_data / "cifar10"), "test"), np.arange(2000))
    trained, untrained = (neighbours_agree(each, test) for each in (model, encoder.random_like(model, seed=0)))
    more_, fewer = int(np.sum(trained & ~untrained)), int(np.sum(untrained & ~trained))
    print(f"{name} {method}: {100 * trained.mean():.1f} and {100 * untrained.mean():.1f} %")
    assert (more_ - fewer) / (more_ + fewer) ** 0.5 > 2


def neighbours_agree(model: Encoder, test: Subset) -> np.ndarray:
    """Whether the 20 nearest others (cosine) of each image vote for its class."""
    found = extract(model, test, ("pooled",), cache=False)
    x = found.features["pooled"] / np.linalg.norm(found.features["pooled"], axis=1, keepdims=True)
    similar = x @ x.T
    np.fill_diagonal(similar, -1)
    nearest = np.argpartition(-similar, 20, axis=1)[:, :20]
    votes = np.stack([np.bincount(labels, minlength=10) for labels in found.labels[nearest]])
    return votes.argmax(1) == found.labels


# ---- What is refused.


def test_mistakes_have_one_message(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    from ssl_pretrain.launch.pretrain import main

    for words, said in (
        (["--encoder", "timm:resnt18"], "has no model 'resnt18'; did you mean resnet18?"),
        (["--encoder", "timm:../x"], "has no model"),
        (["--encoder", "timm:hf-hub:a/b"], "has no model"),
        (["--encoder", "timm:resnet18,image-size=64"], "'image-size' is no option of an encoder to train"),
        (["--encoder", "timm:resnet18", "--timm-model", "resnet34"], "is not the timm model 'resnet34'"),
        (["--encoder", "timm:resnet18", "--timm-args", "pretrained=True"], "is not a choice here"),
        (["--encoder", "timm:resnet18", "--timm-args", "checkpoint_path=x"], "is not a choice here"),
        (["--encoder", "timm:resnet18", "--timm-args", "act_layer=os.system"], "write NAME=VALUE"),
        (["--encoder", "timm:resnet18", "--timm-args", "wings=2"], "wings"),
        (["--encoder", "timm:vit_small_patch14_dinov2"], "--image-size 28 28"),
        (["--encoder", "tim:resnet18"], "did you mean resnet18?"),
    ):
        out = tmp_path / "run"
        assert main(["--method", "lejepa", *words, "--image-size", "32", "--out", str(out), "--steps", "90"]) == 2, (
            words
        )
        assert said in capfd.readouterr().err, words
    with pytest.raises(UnsupportedByBackbone, match="'keep'"):
        build("resnet18").require("mae", "keep")


@pytest.mark.parametrize("options", [{"timm_model": "resnet34"}, {"timm_args": ["pretrained=True"]}])
def test_an_export_cannot_ask_for_more_than_its_name(options: dict, tmp_path: Path) -> None:
    """Options of a file are those that a user could give, of the architecture that the name says."""
    model = build("resnet18")
    encoder.save(tmp_path, Encoder(model, "timm:resnet18", Preprocessing.for_size(SIZE, (0.5,) * 3, (0.2,) * 3), {}))
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone"]["options"] |= options
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file(load_file(weights), weights)  # without the config in its header
    with pytest.raises(UserError, match=r"is not the timm model|is not a choice"):
        encoder.load(tmp_path)


def test_without_timm_there_is_one_message(tmp_path: Path, pretrain: Callable) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'timm'\", name='timm')\n"
    )
    words = ["--method", "simclr", "--encoder", "timm:resnet18", "--out", tmp_path / "run"]
    said = pretrain(*words, code=2, PYTHONPATH=str(tmp_path)).stderr
    assert "--encoder timm:resnet18 needs timm: pip install 'ssl-pretrain[timm]'" in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_settings_are_checked_without_memory(photos: Path, tmp_path: Path) -> None:
    """As before a job is submitted: the model is built on the meta device."""
    from ssl_pretrain.launch.pretrain import read_command

    from ssl_pretrain.train import check_settings

    words = ["--data", str(photos), "--image-size", "64", "--out", str(tmp_path / "run"), "--batch-size", "8"]
    for name in NAMES:
        check_settings(*read_command(["--method", "simclr", "--encoder", f"timm:{name}", *words]))
    with pytest.raises(UserError, match="would change the result"):
        check_settings(*read_command(["--method", "dino", "--encoder", "timm:resnet18", "--accumulate", "2", *words]))
    with pytest.raises(UserError, match="'keep'"):
        check_settings(*read_command(["--method", "mae", "--encoder", "timm:resnet18", *words]))


def test_finetuning_weights_of_timm_for_evaluation_still_work(timm: ModuleType, tmp_path: Path) -> None:
    """`ssl-eval --encoder timm:NAME,checkpoint=FILE` reads timm's own model."""
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "w.pth")
    found = libraries.load(f"timm:resnet18,checkpoint={tmp_path / 'w.pth'},image-size=64")
    assert found(images(size=(64, 64))).pooled.shape == (2, 512)


def test_low_rank_updates_are_trained_with_layer_decay_and_merged() -> None:
    arguments = ("patch_size=8", "embed_dim=48", "depth=2")
    start, adapted, merged = (build("vit_tiny_patch16_224", (32, 32), timm_args=arguments) for _ in range(3))
    adapters.train_updates(adapted, 4, 4.0, 0, torch.Generator().manual_seed(0))
    updates = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(updates) == 8
    for name in updates:
        assert adapted.layer_of(name) == int(name.split(".")[2]) + 1, name
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name in updates:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    adapters.merge_into(merged, adapted)
    x = images(size=(32, 32))
    assert close(merged(x).patches, adapted(x).patches)
    assert not close(merged(x).patches, start(x).patches, 1e-2)


def test_an_anchor_holds_all_weights() -> None:
    """The distance of the weights is half the squared distance of all parameters, also under timm's names."""
    arguments = ("patch_size=8", "embed_dim=48", "depth=2")
    own, start = (build("vit_tiny_patch16_224", (32, 32), seed, timm_args=arguments) for seed in (0, 5))
    mean, std = (0.5,) * 3, (0.25,) * 3
    network = Frozen(
        start, spec="start", fingerprint="x", sight=Sight((8, 8), "bicubic"), own=(mean, std), run=(mean, std)
    )
    expected = sum(
        0.5 * float((one.detach().double() - two.detach().double()).square().sum())
        for one, two in zip(own.parameters(), start.parameters(), strict=True)
    )
    assert float(Anchor("weights", own, network).distance().detach()) == pytest.approx(expected, rel=1e-5)
    assert expected > 1
