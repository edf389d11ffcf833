"""Distillation of labels in fine-tuning: losses against NumPy, the teacher's pixels, the second classifier, the command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy_oracles import numpy_softmax
from pixel_tasks import split_task
from safetensors.torch import save_file
from small_encoders import small_encoder
from ssl_pretrain.eval import finetune
from ssl_pretrain.eval._label_teacher import LabelTeacher
from ssl_pretrain.eval._task import Task
from ssl_pretrain.launch.evaluate import main
from synthetic_data import noisy_classes
from torch import Tensor

from ssl_pretrain import backbones
from ssl_pretrain import encoder as exported
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError

CPU = torch.device("cpu")
CONFIG = finetune.Config(epochs=2, lrs=(2e-3,), train_batch_size=32)
CLASSES = tuple(f"class {i}" for i in range(7))


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    made = split_task(noisy_classes(96, 1, noise=60), noisy_classes(40, 2, noise=60))
    assert made.data.classes == CLASSES
    return replace(made, encoder=small_encoder(), batch_size=64)


def classifier(folder: Path, classes: tuple[str, ...] = CLASSES, feature: str = "cls", channels: int = 3) -> Path:
    """A saved fine-tuning: images of 8 x 8 pixels with patches of 4, and another normalisation than the students'."""
    torch.manual_seed(4)
    backbone = backbones.build(
        "vit_micro", image_size=(8, 8), in_chans=channels, patch_size=4, dim=32, heads=2, depth=1
    )
    how = Preprocessing(8, (8, 8), "bicubic", (0.1, 0.2, 0.3)[:channels], (0.5, 0.6, 0.7)[:channels])
    exported.save(folder / "encoder", Encoder(backbone, "vit_micro", how, {}))
    head = {"weight": torch.randn(len(classes), 32), "bias": torch.randn(len(classes))}
    header = json.dumps({"feature": feature, "classes": classes})
    save_file(head, folder / "head.safetensors", metadata={"head": header})
    return folder


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("feature", ["cls", "mean"])
@pytest.mark.parametrize(("kind", "temperature"), [("hard", 1.0), ("soft", 1.0), ("soft", 3.0)])
def test_the_loss_and_its_gradient_against_numpy(tmp_path: Path, kind: Any, temperature: float, feature: str) -> None:
    student = small_encoder()
    folder = classifier(tmp_path / "t", feature=feature)
    teacher = LabelTeacher(str(folder), student, CLASSES, kind, temperature, CPU)
    logits = torch.randn(6, 7, generator=torch.Generator().manual_seed(5)).requires_grad_()
    loss = teacher.loss(logits, images())
    loss.backward()

    made, own = exported.load(folder), student.preprocessing
    small = torch.nn.functional.interpolate(images(), size=(8, 8), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(value)[:, None, None] for value in (own.mean, own.std))
    theirs = [torch.tensor(value)[:, None, None] for value in (made.preprocessing.mean, made.preprocessing.std)]
    with torch.no_grad():
        found = made.backbone((small * std + mean - theirs[0]) / theirs[1])
    x = (found.cls if feature == "cls" else found.patches.mean(1)).double().numpy()
    wanted = x @ teacher.head.weight.double().numpy().T + teacher.head.bias.double().numpy()
    ours = logits.detach().double().numpy()
    if kind == "hard":
        p, q = np.eye(7)[wanted.argmax(1)], numpy_softmax(ours)
        value, gradient = -(p * np.log(q)).sum(1).mean(), (q - p) / 6
    else:
        p, q = numpy_softmax(wanted / temperature), numpy_softmax(ours / temperature)
        value = temperature**2 * (p * (np.log(p) - np.log(q))).sum(1).mean()
        gradient = temperature * (q - p) / 6
    assert loss.item() == pytest.approx(value, rel=1e-4)
    np.testing.assert_allclose(logits.grad, gradient, rtol=1e-3, atol=1e-5)


def test_two_classifiers_are_tested_as_their_mean() -> None:
    encoder = small_encoder().backbone
    model = finetune.Classifier(encoder, 32, 7, "pooled", torch.Generator().manual_seed(0), second=True).eval()
    with torch.no_grad():
        for i, parameter in enumerate([*model.head.parameters(), *model.second.parameters()]):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        x = encoder(images()).pooled
        expected = (model.head(x) + model.second(x)) / 2
        torch.testing.assert_close(model(images(), torch.Generator()), expected)
        torch.testing.assert_close(model.merged()(x), expected)
    plain = finetune.Classifier(encoder, 32, 7, "pooled", torch.Generator().manual_seed(0))
    assert torch.equal(plain.merged().weight, plain.head.weight)


def test_the_student_learns_what_the_teacher_says(task: Task, tmp_path: Path) -> None:
    """A teacher whose answer is always class 3: the second classifier learns that beside the labels."""
    folder = classifier(tmp_path / "t")
    bias = torch.zeros(7)
    bias[3] = 100
    header = json.dumps({"feature": "cls", "classes": CLASSES})
    save_file({"weight": torch.zeros(7, 32), "bias": bias}, folder / "head.safetensors", metadata={"head": header})
    teacher = LabelTeacher(str(folder), task.encoder, CLASSES, "hard", 1.0, CPU)
    heads = [finetune._train(task, CONFIG, np.arange(96), 2e-2, "", labeller=each).head for each in (None, teacher)]
    assert heads[1].bias.argmax() == 3
    assert heads[1].bias[3] > heads[0].bias[3] + 1e-4
    assert heads[0].weight.shape == heads[1].weight.shape == (7, 32)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_results_name_the_teacher(task: Task, tmp_path: Path, kind: Any) -> None:
    folder = classifier(tmp_path / "t")
    outcome = finetune.evaluate(task, replace(CONFIG, teacher=str(folder), teacher_loss=kind, ema=0.5))
    said = outcome.protocol["teacher"]
    assert said.pop("fingerprint") == exported.load(folder).fingerprint
    assert said == {"folder": str(folder), "loss": kind, **({"temperature": 1.0} if kind == "soft" else {})}
    assert f"{kind} labels of a teacher" in outcome.protocol["headline"]


def test_the_folder_that_save_wrote_is_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    exported.save(tmp_path / "run", small_encoder())
    flags = ["--data", "fractals:classes=3,images=24", "--epochs", "1", "--train-batch-size", "8", "--workers", "0"]
    assert main(["finetune", "--encoder", "run", *flags, "--save", "--no-baselines", "--out", "tuned"]) == 0
    words = ["--encoder", "run", "--teacher", "tuned", "--no-baselines", "--save", "--out", "student"]
    assert main(["finetune", *words, *flags]) == 0
    found = json.loads((tmp_path / "student" / "results.json").read_text())
    assert found["protocol"]["teacher"]["folder"] == "tuned"
    assert (tmp_path / "student" / "head.safetensors").exists()


def test_teachers_that_do_not_fit_are_named(tmp_path: Path, task: Task) -> None:
    student = small_encoder()

    def opened(folder: Path) -> None:
        LabelTeacher(str(folder), student, CLASSES, "hard", 1.0, CPU)

    with pytest.raises(
        UserError, match=r"tells 2 classes \(ant, bee\) apart and the data has 7 classes \(class 0, .*, ...\)"
    ):
        opened(classifier(tmp_path / "a", ("ant", "bee")))
    with pytest.raises(UserError, match="takes images of 1 channels, and the encoder of 3"):
        opened(classifier(tmp_path / "b", channels=1))
    exported.save(tmp_path / "c", student)
    with pytest.raises(UserError, match=r"c has no classifier \(head.safetensors\): give the folder that"):
        opened(tmp_path / "c")
    (tmp_path / "c" / "head.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        opened(tmp_path / "c")
    with pytest.raises(UserError, match="--teacher-temperature is 0"):
        finetune.evaluate(task, replace(CONFIG, teacher_temperature=0.0))
