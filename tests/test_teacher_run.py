"""A run as teacher: its method is read from a checkpoint, whole and frozen; what has no decoder is refused in one line."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY
from ssl_pretrain.launch.pretrain import main, read_command
from ssl_pretrain.methods.mae import MAE

from ssl_pretrain import checkpoint, config
from ssl_pretrain.distributed import World
from ssl_pretrain.errors import UserError
from ssl_pretrain.loop import networks, start_state
from ssl_pretrain.loop.teacher_run import open_run
from ssl_pretrain.pretext import load

COMMON = ["--no-score", "--workers", "0", "--log-every", "1", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def teacher(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of mae of 4 steps, with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    argv = ["--method", "mae", *TINY, *COMMON, "--data", str(photos), "--out", str(out), "--mean", "0.1", "0.2", "0.3"]
    assert main([*argv, "--std", "0.3", "0.4", "0.5", "--steps", "4", "--checkpoint-every", "2"]) == 0
    return out


class Reader(MAE):  # type: ignore[misc]  # a method that reads a teacher's decoder
    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        return ("teacher_run",)


def opened(spec: str | None, *words: str) -> networks.Frozen:
    """The teacher of a run of `Reader`."""
    given = [] if spec is None else ["--teacher", spec]
    flags, knobs, _ = read_command(["--method", "mae", "--image-size", "32", *given, *words])
    run = config.resolve(flags, MAE.recipe, 96, "fp32")
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    return networks.open_networks(run, Reader, knobs, world)["teacher_run"]


@pytest.mark.parametrize("step", [2, 4, None])
def test_it_has_the_weights_of_the_checkpoint_and_is_frozen(teacher: Path, step: int | None) -> None:
    before = torch.get_rng_state()
    network = opened(str(teacher) if step is None else f"{teacher}@{step}")
    assert torch.equal(torch.get_rng_state(), before)
    method = network.method
    assert isinstance(method, MAE)
    there = checkpoint.load(teacher / "checkpoints", step or 4)["method"]
    other = checkpoint.load(teacher / "checkpoints", 4 if step == 2 else 2)["method"]
    assert method.state_dict().keys() == there.keys()
    assert all(torch.equal(value, there[name]) for name, value in method.state_dict().items())
    assert not torch.equal(method.decoder_blocks[0].mlp.fc1.weight, other["decoder_blocks.0.mlp.fc1.weight"])
    assert method.encoder is network.backbone
    assert not any(parameter.requires_grad for parameter in method.parameters())
    assert not any(module.training for module in method.modules())
    assert network.own == ((0.1, 0.2, 0.3), (0.3, 0.4, 0.5))
    assert network.fingerprint == start_state.fingerprint(teacher, step or 4)
    assert network.fingerprint != start_state.fingerprint(teacher, 4 if step == 2 else 2)


def test_files_name_it_as_the_teacher_and_a_changed_one_is_refused(teacher: Path, tmp_path: Path) -> None:
    facts = networks.facts({"teacher_run": opened(f"{teacher}@2")})
    assert list(facts) == ["teacher"]
    assert facts["teacher"]["part"] == "method"
    assert facts["teacher"]["method"] == "mae"  # from the lineage of the run's export
    (tmp_path / "manifest.json").write_text(json.dumps({"networks": facts}))
    flags, _, _ = read_command(["--method", "mae", "--image-size", "32", "--out", str(tmp_path)])
    run = config.resolve(flags, MAE.recipe, 96, "fp32")
    networks.check_unchanged(run, {"teacher_run": opened(f"{teacher}@2")})
    with pytest.raises(UserError, match="began with another teacher"):
        networks.check_unchanged(run, {"teacher_run": opened(f"{teacher}@4")})


def copied(teacher: Path, to: Path, settings: Mapping[str, Any]) -> str:
    """A copy of the run with other settings in its config.yaml; those that are None are left out."""
    shutil.copytree(teacher, to)
    recorded = yaml.safe_load((to / "config.yaml").read_text()) | settings
    kept = {name: value for name, value in recorded.items() if value is not None or name not in settings}
    (to / "config.yaml").write_text(yaml.safe_dump(kept))
    return str(to)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "dino", "prototypes": 16, "hidden_dim": 16},
            "is a run of dino, which has no decoder of masked patches",
        ),
        ({"method": "nothing"}, "cannot be built .unknown method 'nothing'"),
        ({"encoder": "vit_none"}, "names the encoder 'vit_none', which is not known"),
        ({"encoder": "module:evil:make"}, "is your own code, which no file may name"),
        ({"decoder_dim": "wide"}, "cannot be built .decoder_dim: 'wide' is not"),
        ({"decoder_dim": 64}, r"checkpoint of step 4 has not the weights .*attn.proj.bias \(32,\) instead of \(64,\)"),
        ({"decoder_depth": 2}, "13 missing: decoder_blocks.1.attn.proj.bias|missing: decoder_blocks.1"),
        ({"image_size": "x"}, "cannot be built .image_size: 'x' is not"),
        ({"image_size": None}, "cannot be built .*image-size is needed"),
        ({"mean": [0.5]}, "image_size, in_chans, mean and std do not fit together"),
        ({"adapters": "lora"}, "was trained with --adapters"),
        ({"in_chans": 1, "mean": [0.5], "std": [0.5]}, "of another shape: decoder_pred.bias"),
    ],
)
def test_a_run_that_is_not_what_its_files_say_is_refused(
    teacher: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    changed = copied(teacher, tmp_path / "changed", settings)
    with pytest.raises(UserError, match=message) as refused:
        opened(changed)
    assert "\n" not in str(refused.value)
    assert f"--teacher {changed}" in str(refused.value)


def test_what_is_no_run_with_a_checkpoint_is_refused(teacher: Path, tmp_path: Path) -> None:
    give = "and --method mae reads the teacher's decoder: give a run of mae with its checkpoints, RUN or RUN@STEP"
    for spec, message in {
        str(teacher / "encoder"): f"is an export, which holds an encoder alone, {give}",
        "timm:resnet18": f"is an encoder of another library, {give}",
        str(tmp_path): "is no run folder: give RUN@STEP",
        f"{teacher}@3": "has no checkpoint of step 3; it has those of 2, 4",
    }.items():
        with pytest.raises(UserError, match=f"--teacher {spec}.*{message}"):
            opened(spec)
    with pytest.raises(UserError, match=r"name it with --teacher \(give a run of mae with its checkpoints"):
        opened(None)
    with pytest.raises(UserError, match="takes images of 3 channels, and the run has --in-chans 1"):
        opened(str(teacher), "--in-chans", "1")
    without = copied(teacher, tmp_path / "without", {})
    shutil.rmtree(Path(without) / "checkpoints")
    with pytest.raises(UserError, match=f"--teacher {without}: .* has no checkpoint"):
        opened(without)


def test_a_damaged_checkpoint_is_refused(teacher: Path, tmp_path: Path) -> None:
    damaged = copied(teacher, tmp_path / "damaged", {})
    (file,) = (Path(damaged) / "checkpoints" / "step-00000004").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="the checkpoint of step 4 is damaged"):
        opened(damaged)
    opened(f"{damaged}@2")


def test_what_prepare_adds_is_left_out(photos: Path, tmp_path: Path, pretrain_here: Callable) -> None:
    """mrmae has a layer for its target, which is made when the target is known."""
    argv = ["--method", "mrmae", "--target", "hog", *TINY, *COMMON, "--data", photos, "--out", tmp_path / "run"]
    pretrain_here(*argv, "--steps", 1)
    there = checkpoint.load(tmp_path / "run" / "checkpoints", 1)["method"]
    method = open_run(str(tmp_path / "run"), "x", "vit_micro").method
    assert there.keys() - method.state_dict().keys() == {"mimic.weight", "mimic.bias"}
    assert torch.equal(method.decoder_pred.weight, there["decoder_pred.weight"])
    assert isinstance(method, load("mrmae"))
