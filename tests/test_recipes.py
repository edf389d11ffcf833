"""What a recipe's header says are the settings that a run with it has: the figures are read from the text and compared
with the run as it would be on ImageNet-1k's training images."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, losses
from ssl_pretrain.launch.pretrain import read_command

from ssl_pretrain import config, pretext
from ssl_pretrain.config import Resolved

IMAGES = 1_281_167  # of ImageNet-1k's training split
RECIPES = sorted((ROOT / "recipes").glob("*_imagenet1k_*.yaml"))
NUMBER = r"(\d[\d,]*(?:\.\d+)?(?:e-?\d+)?)"
PHRASES = {  # what may stand between the semicolons of a header's "Settings:", without what it has in brackets
    rf"batch {NUMBER}": "batch",
    r"(AdamW|SGD|LARS|LAMB|Muon)": "optimizer",
    rf"learning rate {NUMBER}": "learning rate",
    rf"warm-up {NUMBER} (epochs|steps) from {NUMBER}": "warm-up",
    rf"weight decay {NUMBER}(?: to {NUMBER})?": "weight decay",
    rf"(global crops|local crops|crops) {NUMBER} to {NUMBER}(?:, (bilinear|bicubic))?": "crops",
    rf"{NUMBER} local views": "local views",
    r"(bilinear|bicubic)": "interpolation",
    r"norms (post|patches)": "norms",
    r"positions (relative|sincos|learned)": "positions",
    r"prototypes with a learned length": "prototypes",
}
# The rows that a reader compared with the published commands: each says all that decides the run.
COMPLETE = {
    "dino_imagenet1k_vit_small": {
        "batch",
        "optimizer",
        "learning rate",
        "warm-up",
        "weight decay",
        "crops",
        "local views",
    },
    "simclr_imagenet1k_resnet50": {"batch", "optimizer", "learning rate", "warm-up", "weight decay"},
    "data2vec2_imagenet1k_vit_base": {"batch", "learning rate", "warm-up", "norms"},
    "simmim_imagenet1k_vit_base": {"batch", "learning rate", "warm-up", "positions", "crops"},
    "ibot_imagenet1k_vit_small": {"batch", "learning rate", "warm-up", "crops", "local views", "prototypes"},
    "aim_imagenet1k_vit_large": {"batch", "learning rate", "norms", "crops"},
    "swav_imagenet1k_resnet50": {"batch", "learning rate", "warm-up", "crops", "interpolation"},
    "msn_imagenet1k_vit_small": {"batch", "learning rate", "warm-up", "crops", "interpolation"},
    "npid_imagenet1k_resnet50": {"batch", "learning rate", "interpolation"},
    "ijepa_imagenet1k_vit_huge": {"batch", "learning rate", "warm-up", "weight decay", "crops"},
}


def number(text: str) -> float:
    return float(text.replace(",", ""))


def header(recipe: Path) -> str:
    """The comment at its top as one line, without the command."""
    lines = [line.removeprefix("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    return " ".join(line for line in lines if not line.startswith("Command:"))


def settings(text: str) -> dict[str, list[tuple[str, ...]]]:
    """What a header's "Settings: ...; ... ." says, by kind of phrase. Fails where it holds a phrase nobody reads."""
    found = re.search(r"Settings: (.*?)\.(?: Published| Not run|$)", text)
    said: dict[str, list[tuple[str, ...]]] = {}
    for phrase in re.sub(r" \([^)]*\)", "", found[1]).split("; ") if found else []:
        match = next(((kind, m) for pattern, kind in PHRASES.items() if (m := re.fullmatch(pattern, phrase))), None)
        assert match is not None, f"not understood: {phrase!r}"
        said.setdefault(match[0], []).append(match[1].groups())
    return said


def planned(recipe: Path) -> tuple[Resolved, Any, Any]:
    """The run, the method's knobs and the encoder's options that `ssl-pretrain --config RECIPE` has on ImageNet."""
    run, knobs, options = read_command(["--config", str(recipe), "--data", "."])
    return config.resolve(run, pretext.load(run.method).recipe, IMAGES, "bf16"), knobs, options


def check(said: dict[str, list[tuple[str, ...]]], run: Resolved, knobs: Any, options: Any) -> None:
    epoch = IMAGES / run.batch_size
    for (batch,) in said.get("batch", []):
        assert run.batch_size == number(batch)
    for (name,) in said.get("optimizer", []):
        assert run.optimizer == name.lower()
    for (rate,) in said.get("learning rate", []):
        assert run.lr == pytest.approx(number(rate))
    for length, unit, start in said.get("warm-up", []):
        assert run.warmup_steps == pytest.approx(number(length) * (epoch if unit == "epochs" else 1), rel=0.005)
        assert run.warmup_lr == number(start)
    for first, last in said.get("weight decay", []):
        assert (run.weight_decay, run.final_weight_decay) == (number(first), number(last or first))
    interpolations = [name for (name,) in said.get("interpolation", [])]
    views = type_of(run).views(knobs, run.image_size)
    for which, low, high, name in said.get("crops", []):
        interpolations += [name] if name else []
        crops = [view for view in views if view.name == "local"] if which == "local crops" else views[:1]
        assert [view.scale for view in crops] == [(number(low), number(high))] * len(crops)
        assert crops
    for name in interpolations:
        assert {view.interpolation for view in views} == {name}
    for (count,) in said.get("local views", []):
        assert sum(view.count for view in views if view.name == "local") == number(count)
    for (name,) in said.get("norms", []):
        assert options.norms == name
    for (name,) in said.get("positions", []):
        assert options.positions == name
    if "prototypes" in said:
        assert knobs.norm_last_layer is False


def type_of(run: Resolved) -> type[pretext.Method]:
    return pretext.load(run.method)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_figures_of_a_recipes_header_are_its_settings(recipe: Path) -> None:
    text = header(recipe)
    run, knobs, options = planned(recipe)
    said = settings(text)
    assert COMPLETE.get(recipe.stem, set()) <= said.keys()
    check(said, run, knobs, options)
    title = text.split(" Settings: ")[0].split(" Published: ")[0]
    for batch in re.findall(rf"at batch {NUMBER}", title):
        assert run.batch_size == number(batch)
    epochs = re.search(rf"ImageNet-1k(?: \([^)]*\))?[:,] {NUMBER} epochs(?: of {NUMBER} steps)?", title)
    if epochs and epochs[2]:
        assert run.steps == number(epochs[1]) * number(epochs[2])
    elif epochs:
        assert run.steps == pytest.approx(number(epochs[1]) * IMAGES / run.batch_size, abs=1)
    steps = re.search(rf"ImageNet-1k, {NUMBER} steps of {NUMBER} images", title)
    if steps:
        assert (run.steps, run.batch_size) == (number(steps[1]), number(steps[2]))


def test_a_wrong_figure_in_a_header_is_found() -> None:
    recipe = ROOT / "recipes" / "swav_imagenet1k_resnet50.yaml"
    right, plan = header(recipe), planned(recipe)
    check(settings(right), *plan)
    for old, new in (
        ("batch 4,096", "batch 4,095"), ("LARS", "SGD"), ("rate 4.8", "rate 4.7"), ("10 epochs", "11 epochs"),
        ("from 0.3", "from 0"), ("decay 1e-6", "decay 1e-5"), ("crops 0.14", "crops 0.15"), ("to 0.14", "to 0.2"),
        ("6 local", "7 local"), ("bilinear", "bicubic"),
    ):  # fmt: skip
        assert old in right
        with pytest.raises(AssertionError):
            check(settings(right.replace(old, new)), *plan)
    with pytest.raises(AssertionError, match="not understood"):
        settings(right.replace("bilinear", "with care"))


TINY = "--encoder vit_micro --patch-size 8 --depth 2 --image-size 32 --batch-size 8 --workers 0 --no-score"
SMALL = {
    "data2vec2_imagenet1k_vit_base": "--steps 2 --warmup-steps 0 --masks 2 --decoder-depth 1",
    "simmim_imagenet1k_vit_base": "--epochs 1 --warmup-steps 0",
    "aim_imagenet1k_vit_large": "--steps 2 --head-dim 32 --head-depth 1",
    "ibot_imagenet1k_vit_small": "--epochs 1 --hidden-dim 32 --bottleneck-dim 16 --prototypes 24 --local-views 2",
    "swav_imagenet1k_resnet50": "--epochs 1 --hidden-dim 32 --embedding-dim 16 --prototypes 24 --local-views 2",
}


@pytest.mark.parametrize("name", SMALL)
def test_a_recipes_options_train(name: str, photos: Path, tmp_path: Path, pretrain_here: Callable) -> None:
    recipe, more = ROOT / "recipes" / f"{name}.yaml", [*TINY.split(), *SMALL[name].split()]
    if "resnet50" in name:  # its encoder has neither patches nor a depth
        more = [word for i, word in enumerate(more) if not {"--patch-size", "--depth"} & {word, more[i - 1]}]
        more[more.index("vit_micro")] = "resnet18"
    pretrain_here("--config", recipe, "--data", photos, "--out", tmp_path / "run", "--log-every", 1, *more)
    written, found = yaml.safe_load(recipe.read_text()), yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    kept = {"norms", "positions", "interpolation", "norm_last_layer", "warmup_lr", "global_scale", "local_scale"}
    assert {key: found[key] for key in written.keys() & kept} == {key: written[key] for key in written.keys() & kept}
    assert len(losses(tmp_path / "run")) >= 2
