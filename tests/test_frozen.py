"""Frozen networks: the right pixels, no trace in checkpoints, a changed one is refused; the anchor as first user."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small_encoders import export
from ssl_pretrain.methods.dino import DINO
from ssl_pretrain.methods.dinov2 import DINOv2
from ssl_pretrain.methods.mae import MAE

from ssl_pretrain import backbones, encoder
from ssl_pretrain.backbones import adapters
from ssl_pretrain.conformance import one_step
from ssl_pretrain.data.views import Sight, fitted
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.frozen import Frozen
from ssl_pretrain.parts.anchor import Anchor

RUN = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
SHORT = ["--batch-size", "16", "--no-score", "--image-size", "32", "--patch-size", "8", "--encoder", "vit_micro"]


def frozen(path: Path, run=RUN) -> Frozen:
    opened = encoder.load(path)
    how = opened.preprocessing
    sight = Sight(opened.backbone.stride, how.interpolation)
    return Frozen(opened.backbone, spec=str(path), fingerprint="x", sight=sight, own=(how.mean, how.std), run=run)


def test_a_teacher_of_another_patch_and_normalisation_sees_the_same_pixels(tmp_path: Path):
    """Against its own preprocessing of the same pixels by hand."""
    teacher = frozen(export(tmp_path / "t", patch=16, mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7)))
    pixels = np.random.default_rng(0).random((2, 3, 64, 64))
    seen = torch.from_numpy((pixels - np.reshape(RUN[0], (3, 1, 1))) / np.reshape(RUN[1], (3, 1, 1))).float()
    by_hand = (pixels - np.reshape((0.1, 0.2, 0.3), (3, 1, 1))) / np.reshape((0.9, 0.8, 0.7), (3, 1, 1))
    found = teacher(seen)
    with torch.no_grad():
        expected = encoder.load(tmp_path / "t")(torch.from_numpy(by_hand).float())
    torch.testing.assert_close(found.patches, expected.patches, rtol=1e-5, atol=1e-5)
    assert found.grid == (4, 4)
    assert not found.patches.requires_grad
    with torch.no_grad():  # the check would see a normalisation that is left out
        assert (encoder.load(tmp_path / "t")(seen).patches - expected.patches).abs().max() > 1e-2


def test_it_is_no_part_of_the_method(tmp_path: Path):
    start = frozen(export(tmp_path / "s"))
    for method_class in (MAE, DINO, DINOv2):
        method = one_step.build(method_class.__module__.rsplit(".", 1)[-1])
        before = sorted(method.state_dict())
        config = replace(method.config, anchor="gram")
        method.config = config
        method.prepare(16, {"anchor": start})
        method.train()
        assert sorted(method.state_dict()) == before
        assert not start.backbone.training
        assert not any(p.requires_grad for p in start.backbone.parameters())
        inside = {id(p) for p in method.parameters()}
        assert not any(id(p) in inside for p in start.backbone.parameters())


def gram_oracle(own: np.ndarray, target: np.ndarray) -> np.ndarray:
    out = []
    for s, t in zip(own.astype(np.float64), target.astype(np.float64), strict=True):
        s, t = (x / np.sqrt((x**2).sum(-1, keepdims=True)) for x in (s, t))
        total = 0.0
        for i in range(len(s)):
            for j in range(len(s)):
                total += (s[i] @ s[j] - t[i] @ t[j]) ** 2
        out.append(total / len(s) ** 2)
    return np.array(out)


def features_oracle(own, target, cls, target_cls) -> np.ndarray:
    def away(a, b):
        return 1 - (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))

    own, target, cls, target_cls = (x.astype(np.float64) for x in (own, target, cls, target_cls))
    return (away(own, target).mean(1) + away(cls, target_cls)) / 2


@pytest.mark.parametrize("kind", ["gram", "features"])
def test_losses_against_numpy(kind: str, tmp_path: Path):
    student = encoder.load(export(tmp_path / "a", seed=2)).backbone
    start = frozen(export(tmp_path / "b", seed=3))
    images = torch.randn(3, 3, 32, 32)
    own, there = student(images), start(images)
    found = Anchor(kind, student, start)(own, images)
    arrays = [x.detach().numpy() for x in (own.patches, there.patches)]
    vectors = [x.detach().numpy() for x in (own.cls, there.cls)]
    expected = gram_oracle(*arrays) if kind == "gram" else features_oracle(*arrays, *vectors)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4, atol=1e-6)
    assert found.min() > 1e-4
    # the gradient of a step against the difference quotient in float64
    patches = own.patches.detach()[0, 0]
    direction = torch.randn(patches.shape, generator=torch.Generator().manual_seed(0))
    moved = own.patches.detach().clone().requires_grad_()
    Anchor(kind, student, start)(replace(own, patches=moved, cls=own.cls.detach()), images).sum().backward()
    h = 1e-4
    quotient = 0.0
    for sign in (1, -1):
        shifted = arrays[0].astype(np.float64)
        shifted[0, 0] += sign * h * direction.numpy()
        value = gram_oracle(shifted, arrays[1]) if kind == "gram" else features_oracle(shifted, arrays[1], *vectors)
        quotient += sign * value.sum() / (2 * h)
    assert float((moved.grad[0, 0] * direction).sum()) == pytest.approx(quotient, rel=2e-3, abs=1e-6)


def test_distance_of_the_weights(tmp_path: Path):
    student = encoder.load(export(tmp_path / "a", seed=2)).backbone
    start = frozen(export(tmp_path / "b", seed=3))
    expected = sum(
        0.5 * ((p.detach().numpy().astype(np.float64) - dict(start.backbone.named_parameters())[n].numpy()) ** 2).sum()
        for n, p in student.named_parameters()
    )
    assert float(Anchor("weights", student, start).distance().detach()) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match=r"has no blocks\.2.*use --anchor gram or features"):
        Anchor("weights", encoder.load(export(tmp_path / "c", depth=3)).backbone, start)


def test_an_anchor_that_would_hold_nothing_is_refused(tmp_path: Path):
    """One patch is always as similar to itself as it was. Updates of the weights are no weights of the start."""
    start = frozen(export(tmp_path / "a"))
    student = encoder.load(export(tmp_path / "b", patch=32)).backbone
    with pytest.raises(UserError, match=r"one patch an image.*use --anchor features"):
        Anchor("gram", student, start)
    adapted = encoder.load(tmp_path / "a").backbone
    adapters.train_updates(adapted, 4, 4.0, 0, torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=r"--adapters lora.*use --anchor gram or features"):
        Anchor("weights", adapted, start)


def test_features_of_another_width_are_refused(tmp_path: Path):
    start = frozen(export(tmp_path / "b", dim=96, heads=3))
    with pytest.raises(UserError, match="96 channels and the encoder 128"):
        Anchor("features", one_step.build("mae").encoder, start)


@pytest.mark.parametrize("kind", ["gram", "features", "weights"])
@pytest.mark.parametrize("name", ["mae", "dino", "dinov2"])
def test_zero_at_the_start_and_pulls_back(name: str, kind: str, tmp_path: Path):
    """The anchor's term is 0 while the encoder is the start, and its gradient leads back when the encoder has moved."""
    method = one_step.build(name)
    described = {"patch": 8, **{k: v for k, v in method.encoder.describe().items() if k not in ("patch_size", "depth")}}
    path = export(tmp_path / "s", mean=RUN[0], std=RUN[1], **described)
    start = frozen(path)
    method.encoder.load_state_dict(start.backbone.state_dict())
    method.config = replace(method.config, anchor=kind, **({"mask_probability": 0.01} if name == "dinov2" else {}))
    method.prepare(16, {"anchor": start})
    sights = {"anchor": start.sight}
    specs = fitted(type(method).views(method.config, one_step.SIZE), one_step.SIZE, method.encoder.stride, sights)
    assert any(spec.network for spec in specs) == (kind != "weights")
    batch = one_step.batch(method)
    for spec in specs:
        if spec.of:
            batch.views[spec.name] = batch.views[spec.of]  # views without colour
    method.eval()
    assert float(method(batch, one_step.step()).terms["anchor"]) < 1e-5
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    before = method(batch, one_step.step())
    assert before.terms["anchor"] > 1e-4
    weighted = replace(method.config, anchor_weight=1e4)
    method.config = weighted
    method(batch, one_step.step()).total.backward()
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-3 * parameter.grad / (parameter.grad.norm() + 1e-12))
    assert method(batch, one_step.step()).terms["anchor"] < before.terms["anchor"]


def start_run(pretrain, out: Path) -> Path:
    pretrain("--method", "mae", *SHORT, "--steps", "2", "--out", out)
    return out


def test_run_with_an_anchor(pretrain, tmp_path: Path):
    """Nothing of the frozen network is in the checkpoint; it is named in manifest and lineage; a changed one is refused."""
    start = start_run(pretrain, tmp_path / "start")
    flags = ["--method", "mae", *SHORT, "--init-from", start, "--anchor", "gram", "--steps", "4"]
    pretrain(*flags, "--out", tmp_path / "run")
    pretrain("--method", "mae", *SHORT, "--init-from", start, "--steps", "4", "--out", tmp_path / "plain")

    def names(run: Path) -> set[str]:
        files = (run / "checkpoints").rglob("*.safetensors")
        return {name for file in files for name in safe_open(file, "pt").keys()}  # noqa: SIM118 (no mapping)

    assert names(tmp_path / "run") == names(tmp_path / "plain")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    known = manifest["networks"]["anchor"]
    assert known == {"spec": str(start), "fingerprint": encoder.load(start).fingerprint}
    assert encoder.load(tmp_path / "run").lineage["anchor"].items() >= known.items()
    # another file in its place
    export(start / "encoder", depth=4)
    said = pretrain(*flags[:-1], "8", "--extend", "--out", tmp_path / "run", code=2).stderr
    assert "began with another anchor" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "mae", "--anchor", "gram"], "name it with --init-from (or --teacher)"),
        (["--method", "mae", "--teacher", "nowhere"], "reads no teacher"),
        (
            ["--method", "mae", "--anchor", "gram", "--teacher", "module:os:getpgid"],
            "module:os:getpgid: the function needs other arguments than it gets (none)",
        ),
        (["--method", "mae", "--anchor", "gram", "--teacher", "nowhere"], "nowhere does not exist"),
    ],
)
def test_mistakes(flags, message, pretrain, tmp_path: Path):
    assert message in pretrain(*flags, *SHORT, "--steps", "2", "--out", tmp_path / "run", code=2).stderr


def test_a_network_of_other_channels_is_refused(pretrain, tmp_path: Path):
    torch.manual_seed(0)
    backbone = backbones.build("vit_micro", image_size=(32, 32), in_chans=1, patch_size=8)
    how = Preprocessing.for_size((32, 32), (0.5,), (0.5,))
    encoder.save(tmp_path / "grey", Encoder(backbone, "vit_micro", how, {}))
    flags = ["--method", "mae", "--anchor", "gram", "--teacher", tmp_path / "grey", *SHORT, "--steps", "2"]
    said = pretrain(*flags, "--out", tmp_path / "run", code=2).stderr
    assert "takes images of 1 channels, and the run has --in-chans 3" in said


def test_an_anchor_of_a_run_from_a_state_is_named_with_teacher(pretrain, tmp_path: Path):
    start = start_run(pretrain, tmp_path / "start")
    flags = ["--method", "mae", "--anchor", "gram", "--init-state", start, "--no-score", "--steps", "2"]
    said = pretrain(*flags, "--out", tmp_path / "run", code=2).stderr
    assert f"name it with --teacher, for example --teacher {start}" in said
