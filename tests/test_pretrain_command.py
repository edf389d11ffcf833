"""`ssl-pretrain` as a person meets it: help, mistakes, what a run leaves behind, bad images, non-finite losses."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY, command, losses, metrics, picture
from ssl_pretrain.launch import data, evaluate
from ssl_pretrain.launch.pretrain import main, read_command

from ssl_pretrain import encoder, files
from ssl_pretrain.errors import UserError


def test_help_is_quick_and_does_not_import_torch() -> None:
    code = (
        "import sys; from ssl_pretrain.launch.pretrain import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as left: assert left.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    best = min(_seconds([sys.executable, "-c", code]) for _ in range(3))
    assert best < 0.5, f"--help took {best:.2f} CPU-seconds"


def _seconds(argv: list[str]) -> float:
    """CPU time, for others may be at work on this machine."""
    before = os.times()
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    after = os.times()
    assert "--batch-size" in done.stdout
    assert "mae" in done.stdout
    return after.children_user - before.children_user + after.children_system - before.children_system


def test_help_of_a_method_shows_its_knobs_and_the_encoders_with_defaults(pretrain: Callable) -> None:
    said = pretrain("--method", "mae", "--help").stdout
    for flag, default in (("--mask-ratio", "0.75"), ("--decoder-dim", "128"), ("--patch-size", "4"), ("--seed", "0")):
        assert flag in said
        assert f"(default: {default})" in said
    said = pretrain("--method", "mae", "--data", ".", "--help").stdout
    # on anything but the built-in images by the rule, for the encoder of the command
    assert "(default: 256, by the encoder; 512 from ViT-B on)" in " ".join(said.split())


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--method", "mae", "--data", "."], {"--lr": "1.5e-4", "--batch-size": "256", "--betas": "0.9 0.95"}),
        (["--method", "mae", "--data", ".", "--batch-size", "1024"], {"--lr": "6e-4", "--weight-decay": "0.05"}),
        (["--method", "mae", "--data", ".", "--lr", "1e-3"], {"--layer-decay": "1", "--log-every": "10"}),
        (["--method", "mae", "--data", ".", "--steps", "1000"], {"--warmup-steps": "50"}),
        (["--config", "dino_imagenet1k_vit_small", "--data", "."], {"--clip-grad": "3", "--epochs": "100"}),
        (["--method", "mae", "--encoder", "vit_base", "--data", "."], {"--dim": "768", "--depth": "12"}),
        (["--method", "dinov2", "--data", "."], {"--optimizer": "adamw", "--clip-each": "False"}),
        (["--method", "mae"], {"--decoder-dim": "128", "--lr": "0.002", "--clip-grad": "none", "--keep-every": "none"}),
        (["--method", "mae", "--data", ".", "--encoder", "vit_base"], {"--decoder-dim": "512", "--decoder-depth": "8"}),
        (["--method", "mae", "--data", ".", "--encoder", "vit_micro"], {"--decoder-depth": "2"}),
        (
            ["--method", "dino", "--data", "."],
            {"--hidden-dim": "2048", "--prototypes": "by the number of images; 65,536"},
        ),
        (["--method", "mae", "--data", ".", "--steps", "5", "--epochs", "2"], {"--batch-size": "256"}),  # refused later
    ],
)
def test_help_shows_the_defaults_of_this_command(
    argv: list[str], shown: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        main([*argv, "--help"])
    entries = [" ".join(each.split()) for each in re.split(r"\n+  (?=--)", capsys.readouterr().out)]
    own = {re.split("[ ,]", each)[0]: each for each in entries}
    assert all(each.count("(default: ") <= 1 for each in entries)
    for flag, default in shown.items():
        assert re.search(rf"\(default: {re.escape(default)}[,) ]", own[flag]), own[flag]
    order = ["--method", "--data", "--out", "--encoder", "--lr", "--train-split", "--bad-steps"]
    assert [flag for flag in own if flag in order] == order  # what is often used comes first


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--metod", "mae"], ["--metod", "did you mean --method?"]),
        (["--method", "may"], ["'may'", "did you mean mae?"]),
        (["--method", "mae", "--mask-ration", "0.5"], ["--mask-ration", "did you mean --mask-ratio?"]),
        (["--method", "simclr", "--anchor", "gram"], ["--anchor: --method simclr has none", "dino, dinov2, mae have"]),
        (["--config", "mae_cifar10"], ["--config mae_cifar10", "--data DIR", "--data fractals"]),
        (["--method", "mae", "--data", "{photos}/../photoz"], ["--data: there is no {photos}/../photoz"]),
        (["--method", "mae", "--data", "{empty}/../emqty/a/b"], ["--data: there is no", "did you mean {empty}?"]),
        (["--method", "mae", "--data", "fractal"], ["--data: there is no fractal: did you mean fractals?"]),
        (["--method", "mae", "--data", "{empty}"], ["{empty}"]),
        (["--method", "mae", "--encoder", "vit_tinny"], ["vit_tinny", "did you mean vit_tiny?"]),
        (["--method", "mae", "--mask-ratio", "1.5"], ["--mask-ratio", "between 0 and 1"]),
        (["--method", "mae", "--image-size", "33"], ["33", "4"]),
        (["--method", "mae", "--steps", "5", "--epochs", "2"], ["--steps and --epochs"]),
        (["--method", "mae", "--batch-size", "15", "--accumulate", "2"], ["--batch-size", "14", "16"]),
        (["--method", "mae", "--config", "{empty}/no.yaml"], ["no.yaml", "No such file"]),
        (["--method", "mae", "--out", "{photos}"], ["{photos}", "new folder"]),
        (["--method", "mae", "--init-from", "{empty}"], ["{empty}"]),
        ([], ["--method is needed"]),
    ],
)
def test_a_mistake_gets_one_message_and_exit_code_2(
    argv: list[str], words: list[str], photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    names = {"photos": str(photos), "empty": str(empty)}
    out = [] if "--out" in argv else ["--out", tmp_path / "run"]
    done = pretrain(*(a.format(**names) for a in argv), *out, code=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word.format(**names) in lines[0]


def test_a_score_on_the_way_needs_labels(
    photos: Path, photos_in_classes: Path, tmp_path: Path, pretrain: Callable
) -> None:
    same = ("--method", "mae", "--steps", 2, "--knn-every", 1, *TINY)
    done = pretrain(*same, "--data", photos, "--out", tmp_path / "without", code=2)
    assert "--knn-every 1" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    pretrain(*same, "--data", photos_in_classes, "--out", tmp_path / "with")
    assert [line["step"] for line in metrics(tmp_path / "with") if "knn/top1" in line] == [1, 2]


def test_a_run_leaves_what_the_design_says(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    out = tmp_path / "a run's folder"
    done = pretrain(
        "--method", "mae", "--data", photos, "--out", out, "--steps", 12, "--log-every", 4, *TINY,
        "--picture-every", 6, "--monitor-every", 6, "--val-images", 32, "--val-every", 6,
    )  # fmt: skip
    assert str(out / "encoder") in done.stdout
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert (written["method"], written["steps"], written["mask_ratio"], written["patch_size"]) == ("mae", 12, 0.75, 8)
    assert written["lr"] == pytest.approx(1.5e-4 * 16 / 256)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["state"] == "finished"
    assert manifest["data"]["images"] == 64
    assert manifest["launches"][0]["command"][1:3] == ["--method", "mae"]
    assert manifest["launches"][0]["versions"]["torch"] == torch.__version__
    lines = metrics(out)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [4, 8, 12]
    for name in ("step", "loss", "lr", "images_per_s", "data_wait"):
        assert all(isinstance(line[name], int | float) for line in steps)
    assert all(0 <= line["data_wait"] <= 1 for line in steps)
    assert [line["step"] for line in lines if "val/loss" in line] == [6, 12]
    assert [line["step"] for line in lines if "features/feature_rank" in line] == [6, 12]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [e.step for e in board.Scalars("train/loss")] == [4, 8, 12]
    assert [e.step for e in board.Images("input | masked | reconstruction")] == [0, 6, 12]
    model = encoder.load(out)
    assert model.lineage["method"] == "mae"
    assert model.lineage["step"] == 12


def test_yaml_under_flags(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: mae\ndata: {photos}\nlr: 1e-3\nmask-ratio: 0.5\nsteps: 3\n")
    pretrain("--config", recipe, "--lr", "2e-3", "--out", tmp_path / "run", *TINY)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["lr"], written["mask_ratio"]) == (2e-3, 0.5)
    # another length replaces that of the file, whatever flag gives it
    recipe.write_text(f"method: mae\ndata: {photos}\nepochs: 30\n")
    pretrain("--config", recipe, "--steps", "2", "--out", tmp_path / "short", *TINY)
    assert yaml.safe_load((tmp_path / "short" / "config.yaml").read_text())["steps"] == 2
    recipe.write_text("method: mae\nmaskratio: 0.5\n")
    done = pretrain("--config", recipe, code=2)
    assert "'maskratio'" in done.stderr
    assert "mask_ratio" in done.stderr


def test_bad_files_are_replaced_counted_and_listed_once(tmp_path: Path, pretrain: Callable) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(200):
        picture(i).save(folder / f"{i:03d}.jpg")
    whole = (folder / "007.jpg").read_bytes()
    (folder / "007.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "057.jpg").write_bytes(b"")
    (folder / "107.jpg").write_text("this is no image")
    picture(1).convert("I;16").point(lambda v: v * 256).save(folder / "157.png")  # 16 bits a pixel: unusual, but fine
    (folder / "157.jpg").unlink()
    out = tmp_path / "run"
    done = pretrain("--method", "mae", "--data", folder, "--out", out, "--epochs", 3, "--workers", 2, *TINY)
    assert "3 unreadable images" in done.stdout
    listed = [json.loads(line) for line in (out / "bad_images.jsonl").read_text().splitlines()]
    assert sorted(Path(line["name"]).name for line in listed) == ["007.jpg", "057.jpg", "107.jpg"]
    assert all(line["reason"] for line in listed)
    assert metrics(out)[-1]["bad_images"] == 3
    again = tmp_path / "again"
    pretrain("--method", "mae", "--data", folder, "--out", again, "--epochs", 3, "--workers", 0, *TINY)
    assert losses(again) == losses(out)
    done = pretrain(
        "--method", "mae", "--data", folder, "--out", tmp_path / "strict", "--epochs", 3, "--bad-images", "fail", *TINY,
        code=2,
    )  # fmt: skip
    assert ".jpg" in done.stderr


def test_init_from_starts_from_an_export(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    same = ("--method", "mae", "--data", photos, *TINY)
    pretrain(*same, "--out", tmp_path / "first", "--steps", 4)
    # No learning: what comes out is what went in.
    frozen = ("--steps", 1, "--lr", 0, "--final-lr", 0)
    pretrain(*same, "--out", tmp_path / "second", "--init-from", tmp_path / "first", "--seed", 5, *frozen)
    pretrain(*same, "--out", tmp_path / "third", "--seed", 5, *frozen)
    first, second, third = (
        encoder.load(tmp_path / name).backbone.state_dict() for name in ("first", "second", "third")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)
    done = pretrain(
        *same, "--out", tmp_path / "fourth", "--init-from", tmp_path / "first", "--depth", 3, "--steps", 1, code=2
    )
    assert "--depth 3 instead of 2" in done.stderr


PLUGIN = '''
import torch
from dataclasses import dataclass
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.pretext import Losses, Method

class Fragile(Method):
    """Not finite at the steps asked for, on the sample of the lowest id."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Fragile."""
        bad_from: int = 3
        """First bad step."""
        bad_count: int = 2
        """Number of bad steps."""

    def __init__(self, encoder, config):
        super().__init__(encoder, config)
        self.register_buffer("updates", torch.zeros(()))

    @classmethod
    def views(cls, config, image_size):
        return (ViewSpec(name="image", size=image_size),)

    def forward(self, batch, step):
        per_sample = self.encoder(batch.views["image"]).pooled.square().mean(1)
        if self.config.bad_from <= step.step < self.config.bad_from + self.config.bad_count:
            per_sample = torch.where(batch.index == batch.index.min(), float("nan"), per_sample)
        return Losses(total=per_sample.mean(), terms={"square": per_sample.mean().detach()}, per_sample=per_sample.detach())

    def after_step(self, step):
        self.updates += step.ok
'''


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """An installed third-party package with a method, found through its entry point."""
    site = tmp_path / "site"
    info = site / "fragile-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "fragile_method.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ssl_pretrain.methods]\nfragile = fragile_method:Fragile\n")
    return {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}


NO_DECODER = [
    w for i, w in enumerate(TINY) if not w.startswith("--decoder") and not TINY[i - 1].startswith("--decoder")
]


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(
    plugin: dict, photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    out = tmp_path / "run"
    same = ("--method", "fragile", "--data", photos, "--steps", 10, "--log-every", 5, "--lr", "1e-3", *NO_DECODER)
    done = pretrain(*same, "--out", out, **plugin)
    lines = metrics(out)
    assert [line["skipped"] for line in lines] == [2, 2]
    assert all(line["loss"] is not None for line in lines)  # the mean over the good steps
    said = (out / "warnings.log").read_text()
    assert "skipped step 3, 4" in said
    assert "not finite" in said
    assert "square" in said
    assert said.split("sample ids ")[1].count(",") == 1  # one bad sample in each of the two steps, not the whole batch
    assert "Traceback" not in done.stderr
    from ssl_pretrain import checkpoint

    state = checkpoint.load(out / "checkpoints", 10)["method"]
    assert float(state["updates"]) == 8
    assert all(bool(torch.isfinite(v).all()) for v in state.values())


def test_too_many_in_a_row_end_the_run_with_the_state_to_replay_them(
    plugin: dict, photos: Path, tmp_path: Path, pretrain: Callable
) -> None:
    out = tmp_path / "run"
    same = ("--method", "fragile", "--data", photos, "--steps", 50, "--log-every", 2, "--lr", "1e-3", *NO_DECODER)
    done = pretrain(*same, "--bad-count", 40, "--bad-from", 7, "--bad-steps", 6, "--out", out, code=1, **plugin)
    assert "6 steps in a row were not finite" in done.stderr or "7 steps in a row" in done.stderr
    assert "from step 7" in done.stderr
    assert "Traceback" not in done.stderr
    from ssl_pretrain import checkpoint

    assert checkpoint.newest(out / "checkpoints") == 7
    assert float(checkpoint.load(out / "checkpoints", 7)["method"]["updates"]) == 7


def test_the_command_is_installed() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "ssl-pretrain", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert (
        done.stdout == subprocess.run(command("pretrain", "--help"), capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.slow
def test_the_first_command_of_the_readme_ends_by_itself_and_has_learned(tmp_path: Path) -> None:
    """`ssl-pretrain --method mae` in an empty folder, with nothing else said."""
    began = time.monotonic()
    done = subprocess.run(
        command("pretrain", "--method", "mae"), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 480  # 240 s on two free cores; others may be at work on this machine
    found = re.search(r"against [\d,]+\): ([\d.]+) %, untrained encoder ([\d.]+) %", done.stdout)
    assert found, done.stdout
    trained, untrained = map(float, found.groups())
    assert trained > untrained + 5, done.stdout
    assert "ssl-eval linear --encoder runs/mae-fractals" in done.stdout
    assert (tmp_path / "runs" / "mae-fractals" / "encoder" / "model.safetensors").exists()


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_names_only_flags_that_there_are(recipe: Path) -> None:
    run, knobs, options = read_command(["--config", str(recipe), "--data", "."])
    written = yaml.safe_load(recipe.read_text())
    assert written.keys() <= {name for part in (run, knobs, options) for name in vars(part)}
    header = recipe.read_text().split("method:")[0]
    assert re.search(rf"ssl-pretrain --config (recipes/{recipe.name}|{recipe.stem}) ", header)


@pytest.mark.parametrize("below", [".", "deep/er"])
def test_a_symbolic_link_to_nothing_as_out_is_named(
    below: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "gone")
    out = link / below
    argvs: dict[Callable[[list[str]], int], list[object]] = {
        main: ["--method", "simmim", "--data", photos, "--out", out, "--steps", 1, "--workers", 0],
        data.main: ["pack", photos, "--out", out],
        evaluate.main: ["knn", "--encoder", "pixels", "--data", "fractals:images=64,classes=2", "--out", out],
    }
    for command_, argv in argvs.items():
        assert command_(list(map(str, argv))) == 2
        assert f"{link} is a symbolic link to {tmp_path}/gone, which is not there" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists()


def test_what_is_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "file").touch()
    for path, words in (
        (
            tmp_path / "link",
            f"--out {tmp_path}/link cannot be made: {tmp_path}/link is a symbolic link to gone, which is not",
        ),
        (
            tmp_path / "link" / "a" / "b",
            f"--out {tmp_path}/link/a/b cannot be made: {tmp_path}/link is a symbolic link to",
        ),
        (tmp_path / "file", f"{tmp_path}/file is a file"),
        (tmp_path / "file" / "a", f"{tmp_path}/file is a file"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            files.make_folder(path)
    (tmp_path / "gone").mkdir()
    files.make_folder(tmp_path / "link" / "a")
    assert (tmp_path / "gone" / "a").is_dir()
