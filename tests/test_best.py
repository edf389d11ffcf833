"""--keep-best, as real runs: the folder best/, its checkpoint, kills at every stage of writing it, several processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, assert_same_bits, metrics
from safetensors.torch import load_file

from ssl_pretrain import checkpoint, encoder
from ssl_pretrain.loop.report import Report
from ssl_pretrain.loop.saver import read_best

RUN = (
    "--method", "mae", "--data", "fractals:classes=4,images=120", "--steps", 12, "--checkpoint-every", 5, "--log-every", 1,
    "--keep-last", 1, "--knn-every", 2, "--workers", 0, "--no-score", *TINY,
)  # fmt: skip
# kNN accuracy after 2, 4, ... steps, made up so that the best step is known and lies between checkpoints
SCORES = {0: 30.0, 2: 40.0, 4: 60.0, 6: 50.0, 8: 70.0, 10: 70.0, 12: 65.0}
WITH_SCORES = f"""
import os
from ssl_pretrain.loop.guard import Guard
from ssl_pretrain.loop.saver import Saver
own = Guard.judge
scores = {SCORES}
Guard.judge = lambda self, group, score, step: own(self, group, scores[step], step)
"""


def run(out: Path, *more: object, patch: str = "", code: int = 0) -> str:
    """A run in a process of its own, in which the kNN accuracy is that of SCORES."""
    program = f"{WITH_SCORES}\n{patch}\nimport sys\nfrom ssl_pretrain.launch.pretrain import main\nsys.exit(main())"
    argv = [sys.executable, "-c", program, *map(str, RUN), "--keep-best", "knn", "--out", str(out), *map(str, more)]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "kept"
    run(out)
    return out


def of_best(out: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """best.json, where the export comes from, and its weights."""
    place = out / "best"
    lineage = json.loads((place / "encoder" / "config.json").read_text())["lineage"]
    return json.loads((place / "best.json").read_text()), lineage, (place / "encoder/model.safetensors").read_bytes()


def test_the_best_step_is_kept_beside_the_last(kept: Path) -> None:
    facts, lineage, _ = of_best(kept)
    assert facts == {"by": "knn", "score": 70.0, "step": 8, "checkpoint": "checkpoints/step-00000008"}
    assert (lineage["step"], lineage["best_by"], lineage["score"], lineage["images_seen"]) == (8, "knn", 70.0, 8 * 16)
    assert checkpoint.steps(kept / "checkpoints") == [8, 12]
    assert checkpoint.damage(kept / facts["checkpoint"]) is None
    state = checkpoint.load(kept / "checkpoints", 8)["method"]
    for name, value in load_file(kept / "best" / "encoder" / "model.safetensors").items():
        assert torch.equal(value, state[f"encoder.{name}"]), name
    last = encoder.load(kept)
    assert last.lineage["step"] == 12
    assert last.fingerprint != encoder.load(kept / "best").fingerprint
    known = json.loads((kept / "manifest.json").read_text())["scores"]["knn"]
    assert (known["best"], known["best_step"], known["last"]) == (70.0, 8, 65.0)


@pytest.mark.slow
def test_training_is_the_same_without_it(kept: Path, tmp_path: Path, pretrain_here: Callable[..., None]) -> None:
    pretrain_here(*RUN, "--out", tmp_path / "run", "--knn-every", 0)
    assert not (tmp_path / "run" / "best").exists()
    assert_same_bits(*(checkpoint.load(each / "checkpoints", 12) for each in (kept, tmp_path / "run")))


@pytest.mark.slow
def test_evaluators_take_the_folder(kept: Path, evaluate: Callable[..., Any], tmp_path: Path) -> None:
    data = "fractals:classes=2,images=40"
    done = evaluate("diagnose", "--encoder", kept / "best", "--data", data, "--out", tmp_path, "--workers", 0)
    assert done.returncode == 0


DEATHS = {
    "before_the_checkpoint_is_published": (
        "from ssl_pretrain.checkpoint import Writer\nown_publish = Writer.publish\n"
        "Writer.publish = lambda self, **how: os._exit(9) if self.step == 8 else own_publish(self, **how)"
    ),
    "before_the_export": (
        "own_export = Saver._export_best\n"
        "Saver._export_best = lambda self, exported, facts: os._exit(9) if facts['step'] == 8 "
        "else own_export(self, exported, facts)"
    ),
    "in_the_export": (
        "from ssl_pretrain import encoder\nown_text = encoder.write_text\n"
        "def text(path, text):\n"
        "    if 'best/encoder' in str(path) and path.name == 'config.json' and '\"step\": 8' in text: os._exit(9)\n"
        "    own_text(path, text)\n"
        "encoder.write_text = text"
    ),
    "after_the_export": (
        "from ssl_pretrain.loop import saver\nown_text = saver.write_text\n"
        "def text(path, text):\n"
        "    if path.name == 'best.json' and '\"step\": 8' in text: os._exit(9)\n"
        "    own_text(path, text)\n"
        "saver.write_text = text"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("death", DEATHS)
def test_a_run_killed_while_the_best_is_written_ends_with_the_same(death: str, kept: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, patch=DEATHS[death], code=9)
    assert read_best(out)["step"] == 4  # the step before, as long as the new one is not whole
    there = encoder.load(out / "best").lineage["step"]
    assert there == (8 if death in ("in_the_export", "after_the_export") else 4)
    if death != "before_the_checkpoint_is_published":
        assert checkpoint.steps(out / "checkpoints") == [8]
    run(out)
    assert of_best(out) == of_best(kept)
    assert checkpoint.steps(out / "checkpoints") == [8, 12]
    assert_same_bits(*(checkpoint.load(each / "checkpoints", 12) for each in (kept, out)))


@pytest.mark.slow
def test_it_begins_to_keep_the_best_when_the_flag_is_added_later(tmp_path: Path) -> None:
    """The best step so far was not kept, and its checkpoint is gone: the best of those that follow is."""
    out = tmp_path / "run"
    program = f"{WITH_SCORES}\nscores[4] = 90.0\nimport sys\nfrom ssl_pretrain.launch.pretrain import main\n"
    program += "from ssl_pretrain.loop.log import Log\nown_add = Log.add\n"
    program += (
        "def add(self, step, *rest):\n    if step == 6: os.kill(os.getpid(), 15)\n    own_add(self, step, *rest)\n"
    )
    program += "Log.add = add\nsys.exit(main())"
    argv = [sys.executable, "-c", program, *map(str, RUN), "--out", str(out)]
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 75
    assert not (out / "best").exists()
    assert checkpoint.steps(out / "checkpoints") == [7]
    run(out)
    assert of_best(out)[0]["step"] == 8


def test_a_run_that_begins_again_logs_the_score_of_step_0_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "knn/top1": 40.0}\n')
    report = Report(tmp_path, step=0, steps=2, names=())
    report.scores("knn", {"top1": 41.0}, 0)
    report.close("finished")
    assert metrics(tmp_path) == [{"step": 0, "knn/top1": 41.0}]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_keep_the_same_step(how: str, tmp_path: Path, kept: Path) -> None:
    """Workers of --nproc are processes of their own, so the scores are their own: what is kept is what they say."""
    out = tmp_path / how
    argv = [
        sys.executable,
        "-m",
        "ssl_pretrain.launch.pretrain",
        *map(str, RUN),
        "--keep-best",
        "knn",
        "--out",
        str(out),
    ]
    done = subprocess.run([*argv, "--nproc", "2", "--parallel", how], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scores = {line["step"]: line["knn/top1"] for line in metrics(out) if "knn/top1" in line}
    best = max(scores, key=lambda step: (scores[step], -step))
    facts, lineage, _ = of_best(out)
    assert (facts["step"], facts["score"], lineage["step"]) == (best, scores[best], best)
    assert checkpoint.steps(out / "checkpoints") == sorted({best, 12})
    state = checkpoint.load(out / "checkpoints", best)["method"]
    for name, value in load_file(out / "best" / "encoder" / "model.safetensors").items():
        assert torch.equal(value, state[f"encoder.{name}"]), name


@pytest.mark.slow
def test_the_least_validation_loss_is_kept(tmp_path: Path, pretrain_here: Callable[..., None]) -> None:
    out = tmp_path / "run"
    pretrain_here(*RUN, "--knn-every", 0, "--val-images", 16, "--val-every", 3, "--keep-best", "val", "--out", out)
    losses = {line["step"]: line["val/loss"] for line in metrics(out) if "val/loss" in line}
    best = min(losses, key=lambda step: (losses[step], step))
    assert of_best(out)[0] == {
        "by": "val", "score": losses[best], "step": best, "checkpoint": f"checkpoints/step-{best:08d}"
    }  # fmt: skip


# ---- Runs that start from weights.


@pytest.mark.slow
def test_the_start_weights_are_scored_and_may_stay_the_best(kept: Path, tmp_path: Path) -> None:
    """Killed between checkpoints and resumed, too: the same is said once, and the score of step 0 is not forgotten."""
    flags = ("--init-from", kept, "--warmup-steps", 2, "--knn-original", "fractals:classes=3,images=60")
    patch = "scores.update({0: 80.0, 2: 60.0, 4: 79.0, 6: 50.0, 8: 80.0, 10: 40.0, 12: 30.0})"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, *flags, patch=patch)
    die = "\nfrom ssl_pretrain.loop.log import Log\nown_add = Log.add\n"
    die += "Log.add = lambda self, step, *rest: os._exit(9) if step == 6 else own_add(self, step, *rest)\n"
    run(cut, *flags, patch=patch + die, code=9)
    run(cut, *flags, patch=patch)
    for out in (whole, cut):
        lines = [line for line in metrics(out) if "knn/top1" in line or "knn_original/top1" in line]
        assert [line["step"] for line in lines] == [step for step in range(0, 13, 2) for _ in range(2)]
        # What is computed again after a kill is said again.
        said = list(dict.fromkeys(line[20:] for line in (out / "warnings.log").read_text().splitlines()))
        below = [line for line in said if line.startswith("the kNN accuracy is ")]
        assert [line.split(" %")[0][-4:] for line in below] == ["79.0", "40.0"]
        assert all("The best was 80.0 % at step 0, the start weights" in line for line in below)
        forgot = [line for line in said if "--knn-original fell from 80.0 %" in line]
        assert [line.split(" %, by")[0][-4:] for line in forgot] == ["60.0", "50.0", "40.0"]
        assert of_best(out)[0] == {
            "by": "knn", "score": 80.0, "step": 0, "checkpoint": "checkpoints/step-00000000"
        }  # fmt: skip
        start, best = encoder.load(kept).backbone.state_dict(), encoder.load(out / "best").backbone.state_dict()
        assert all(torch.equal(start[name], best[name]) for name in start)
        known = json.loads((out / "manifest.json").read_text())["scores"]
        assert known["knn"]["start"] == known["knn_original"]["start"] == 80.0
    assert_same_bits(*(checkpoint.load(each / "checkpoints", 12) for each in (whole, cut)))


def test_a_record_is_plain_data(kept: Path) -> None:
    facts = checkpoint.description(kept / "checkpoints" / "step-00000012")
    assert json.loads(json.dumps(facts["scores"])) == facts["scores"]
