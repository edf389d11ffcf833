"""--init-from: exports, runs and other libraries' files as start weights, which also set the architecture."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from oracles import import_timm, import_transformers
from published_layouts import saved, timm_vit
from safetensors.torch import load_file, save_file
from ssl_pretrain.launch.paths import absolute_words
from ssl_pretrain.launch.pretrain import main, read_command

from ssl_pretrain import encoder, train
from ssl_pretrain.backbones.positions import resize_table
from ssl_pretrain.encoder import Encoder
from ssl_pretrain.errors import UserError
from ssl_pretrain.foreign import conversion, libraries, published
from ssl_pretrain.foreign.libraries import Foreign
from ssl_pretrain.foreign.specs import Spec

SMALL = (
    "--method mae --batch-size 16 --decoder-dim 32 --decoder-depth 1 --decoder-heads 2 --monitor-every 0 "
    "--picture-every 0 --precision fp32 --no-score --workers 0"
).split()
# An architecture that is neither the method's nor the built-in run's.
ARCHITECTURE = (
    "--encoder vit_micro --dim 64 --patch-size 8 --depth 2 --heads 2 --registers 2 --layer-scale 0.1 --positions rope "
    "--pool cls --image-size 40 --mean 0.4 0.5 0.6 --std 0.2 0.2 0.3"
).split()
NO_LEARNING = ("--steps", "1", "--lr", "0", "--final-lr", "0")


@pytest.fixture(scope="module")
def source(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with ARCHITECTURE."""
    out = tmp_path_factory.mktemp("source") / "run"
    assert main([*SMALL, *ARCHITECTURE, "--data", str(photos), "--out", str(out), "--steps", "1"]) == 0
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    return encoder.load(run).backbone.state_dict()


@pytest.mark.parametrize("place", ["", "encoder"])
def test_a_run_or_an_export_sets_the_architecture(place: str, source: Path, photos: Path, tmp_path: Path) -> None:
    run, _, options = read_command([*SMALL, "--data", str(photos), "--init-from", str(source / place)])
    assert (run.encoder, run.image_size, run.in_chans) == ("vit_micro", (40, 40), 3)
    assert (run.mean, run.std) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
    assert (options.dim, options.patch_size, options.registers, options.positions) == (64, 8, 2, "rope")
    assert (options.depth, options.heads, options.layer_scale, options.pool) == (2, 2, 0.1, "cls")
    assert run.init_fingerprint == json.loads((source / "encoder" / "config.json").read_text())["weights"]


def test_the_run_begins_with_these_weights(
    source: Path, photos: Path, tmp_path: Path, pretrain: Callable[..., Any]
) -> None:
    # A path with a slash at its end is the same path.
    done = pretrain(
        *SMALL, "--data", photos, "--out", tmp_path / "run", "--init-from", f"{source}/", "--seed", 3, *NO_LEARNING
    )
    before, after = weights(source), weights(tmp_path / "run")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    fingerprint = json.loads((source / "encoder" / "config.json").read_text())["weights"]
    assert (config["init_from"], config["init_fingerprint"]) == (str(source), fingerprint)
    lineage = encoder.load(tmp_path / "run").lineage
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["init_from"], manifest["init_fingerprint"]) == (str(source), fingerprint)
    assert (lineage["init_from"]["spec"], lineage["init_fingerprint"]) == (str(source), fingerprint)
    assert f"starting from the weights of {source} (fingerprint {fingerprint})" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--patch-size 4 --registers 0", "--patch-size 4 instead of 8, --registers 0 instead of 2"),
        ("--encoder vit_tiny", "--encoder vit_tiny instead of vit_micro"),
        ("--encoder resnet18", "--encoder resnet18 instead of vit_micro"),
        ("--in-chans 1 --mean 0.5 --std 0.5", "--in-chans 1 instead of 3, --mean 0.5 instead of 0.4 0.5 0.6"),
        ("--layer-scale none", "--layer-scale None instead of 0.1"),
        ("--init-fingerprint 0123", "--init-fingerprint 0123 instead of"),
    ],
)
def test_a_flag_that_contradicts_is_refused_with_the_difference(
    flags: str, message: str, source: Path, photos: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        read_command([*SMALL, "--data", str(photos), "--init-from", str(source), *flags.split()])
    assert "leave these flags out, or add --partial" in str(raised.value)


def test_flags_that_agree_or_do_not_concern_the_weights_are_accepted(source: Path, photos: Path) -> None:
    more = ["--drop-path", "0.3", "--pool", "mean", "--image-size", "24", "32"]
    run, _, options = read_command([*SMALL, *ARCHITECTURE, "--data", str(photos), "--init-from", str(source), *more])
    assert (options.drop_path, options.pool, run.image_size) == (0.3, "mean", (24, 32))
    _, _, options = read_command([*SMALL, "--data", str(photos), "--init-from", str(source), "--init-from", "none"])
    assert options.dim == 384


def test_a_yaml_file_may_name_them(
    source: Path, photos: Path, tmp_path: Path, pretrain_here: Callable[..., None]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"method: mae\ninit_from: {source}\ndata: {photos}\n")
    run, _, options = read_command(["--config", str(file)])
    assert (run.init_from, options.dim) == (str(source), 64)
    file.write_text(f"method: mae\ninit_from: {source}\ndata: {photos}\ndepth: 3\n")
    with pytest.raises(UserError, match="--depth 3 instead of 2"):
        read_command(["--config", str(file)])
    file.write_text("method: mae\ninit_from: 3\n")
    with pytest.raises(UserError, match="init_from: 3 is not text"):
        read_command(["--config", str(file)])
    # The config of a run is a YAML file too, and has every setting.
    again = [*SMALL, "--data", str(photos), "--init-from", str(source), "--out", str(tmp_path / "run"), *NO_LEARNING]
    pretrain_here(*again)
    run, _, options = read_command(["--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "b")])
    assert (run.init_from, options.dim) == (str(source), 64)


def test_the_run_resumes_when_the_weights_are_gone(
    source: Path, photos: Path, tmp_path: Path, pretrain: Callable[..., Any]
) -> None:
    shutil.copytree(source, tmp_path / "start")
    argv = [*SMALL, "--data", photos, "--init-from", tmp_path / "start", "--checkpoint-every", 2, "--log-every", 1]
    pretrain(*argv, "--out", tmp_path / "cut", "--steps", 2, "--warmup-steps", 0)
    shutil.rmtree(tmp_path / "start")
    longer = ("--steps", 4, "--extend")
    pretrain(*argv, "--out", tmp_path / "cut", *longer)
    done = pretrain(*argv, "--out", tmp_path / "cut", *longer, "--registers", 4, code=2)
    assert "--registers 4 instead of 2" in done.stderr
    done = pretrain(*argv, "--out", tmp_path / "other", "--steps", 1, code=2)
    assert f"{tmp_path / 'start'} does not exist" in done.stderr


def test_resumed_it_is_the_same_run(
    source: Path, photos: Path, tmp_path: Path, pretrain_here: Callable[..., None]
) -> None:
    argv = [*SMALL, "--data", photos, "--init-from", source, "--checkpoint-every", 2, "--log-every", 1, "--steps", 4]
    pretrain_here(*argv, "--out", tmp_path / "whole", "--keep-every", 2)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    pretrain_here(*argv, "--out", tmp_path / "cut", "--keep-every", 2)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_two_processes_begin_with_the_weights(
    source: Path, photos: Path, tmp_path: Path, pretrain: Callable[..., Any]
) -> None:
    argv = [*SMALL, "--data", photos, "--init-from", source, "--steps", 2, "--log-every", 1]
    pretrain(*argv, "--out", tmp_path / "one")
    pretrain(*argv, "--out", tmp_path / "two", "--nproc", 2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)


def test_settings_are_checked_without_the_weights(source: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, knobs, options = read_command([*SMALL, "--data", str(photos), "--init-from", str(source)])
    monkeypatch.setattr(encoder, "load", lambda *_: pytest.fail("weights were read"))
    train.check_settings(run, knobs, options)


def test_a_grid_of_start_weights(source: Path, photos: Path, tmp_path: Path, pretrain: Callable[..., Any]) -> None:
    done = pretrain(
        *SMALL, "--data", photos, "--out", tmp_path / "grid", *NO_LEARNING, "--patch-size", 8, "--image-size", 40,
        "--grid", f"init-from={source},none",
    )  # fmt: skip
    assert "2" in done.stdout
    configs = [yaml.safe_load(file.read_text()) for file in sorted((tmp_path / "grid").glob("*/config.yaml"))]
    assert sorted(config["dim"] for config in configs) == [64, 384]


# ---- Weights that fit in part.


def test_partial_loads_what_fits_and_lists_the_rest(
    source: Path, photos: Path, tmp_path: Path, pretrain: Callable[..., Any]
) -> None:
    done = pretrain(
        *SMALL, "--data", photos, "--out", tmp_path / "run", "--init-from", source, "--partial", "--depth", 3,
        "--registers", 0, "--patch-size", 4, *NO_LEARNING,
    )  # fmt: skip
    said = " ".join(done.stderr.split())
    assert "the weights fit the encoder in part: 14 missing: blocks.2.attn.proj.bias, " in said
    assert "1 unexpected: reg_tokens;" in said
    assert "1 of another shape: patch_embed.proj.weight (64, 3, 8, 8) instead of (64, 3, 4, 4)" in said
    before, after = weights(source), weights(tmp_path / "run")
    same = [name for name in after if name in before and torch.equal(before[name], after[name])]
    assert sorted(after.keys() - set(same)) == sorted(
        [name for name in after if name.startswith("blocks.2.")] + ["patch_embed.proj.weight"]
    )


def test_partial_with_another_patch_resizes_positions_to_its_grid() -> None:
    how = encoder.Preprocessing.for_size((32, 32), (0.5,) * 3, (0.5,) * 3)
    sizes = {"dim": 32, "depth": 1, "heads": 2, "patch_size": 8}
    source = encoder.Encoder(encoder._build("vit_micro", (32, 32), 3, sizes), "vit_micro", how, {})
    target = encoder._build("vit_micro", (32, 32), 3, {**sizes, "patch_size": 16}, seed=4)
    text = encoder.load_from(source, target, "there", partial=True)
    assert text == "1 of another shape: patch_embed.proj.weight (32, 3, 8, 8) instead of (32, 3, 16, 16)"
    table = source.backbone.state_dict()["pos_embed"]
    grid = table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(2, 2), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(target.state_dict()["pos_embed"][:, 1:], expected, atol=1e-6, rtol=1e-5)


def test_tables_are_smoothed_along_the_axes_that_shrink_only() -> None:
    table = torch.randn(1, 48, 5, generator=torch.Generator().manual_seed(0))
    grid = table.reshape(1, 6, 8, 5).permute(0, 3, 1, 2)
    smaller = F.interpolate(grid, size=(3, 5), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(resize_table(table, (6, 8), (3, 5), antialias=True), smaller, atol=1e-5, rtol=1e-5)
    larger = F.interpolate(grid, size=(12, 9), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(resize_table(table, (6, 8), (12, 9), antialias=True), larger, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(resize_table(table, (6, 8), (3, 5)), smaller, atol=1e-3)


# ---- Other libraries.


@pytest.fixture
def timm_file(tmp_path: Path) -> Iterator[Path]:
    """Weights of timm's vit_tiny_patch16_224, at random."""
    torch.manual_seed(0)
    model = import_timm().create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_a_vit_of_timm(timm_file: Path, photos: Path, tmp_path: Path) -> None:
    spec = f"timm:vit_tiny_patch16_224,checkpoint={timm_file}"
    argv = [*SMALL, "--data", str(photos), "--init-from", spec, *NO_LEARNING]
    run, knobs, options = read_command([*argv, "--image-size", "32", "--out", str(tmp_path / "run")])
    assert (run.encoder, options.patch_size, options.heads, options.norm_eps) == ("vit_tiny", 16, 3, None)
    assert run.mean == (0.5, 0.5, 0.5)  # as timm states
    train.train(run, knobs, options)
    theirs, after = load_file(timm_file), weights(tmp_path / "run")
    assert theirs.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in theirs.items() if name != "pos_embed")
    assert after["pos_embed"].shape == (1, 5, 192)


def test_a_convnet_of_timm_whose_architecture_is_ours(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = import_timm().create_model("resnet18", num_classes=0).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer += 0.1 * torch.rand_like(buffer)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "r.safetensors")
    ours = conversion.convert(Spec.parse(f"timm:resnet18,checkpoint={tmp_path / 'r.safetensors'}"), (64, 64))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).pooled, model.forward_features(x).mean((2, 3)), atol=1e-4, rtol=1e-4)


def test_a_model_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    model = import_timm().create_model("mobilenetv3_small_050", num_classes=0)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="no encoder of this package has this architecture"):
        conversion.convert(Spec.parse(f"timm:mobilenetv3_small_050,checkpoint={tmp_path / 'w.safetensors'}"))


def test_a_difference_that_no_weight_shows_is_found(tmp_path: Path) -> None:
    quick = timm_vit(act_layer="quick_gelu")
    ours = published.read(saved(quick.state_dict(), tmp_path), heads=4)
    spec = Spec("timm", "vit", {})
    plain = timm_vit()
    plain.load_state_dict(quick.state_dict())
    for module, same in ((quick, False), (plain, True)):
        theirs = Encoder(Foreign(module, libraries._read_timm, "timm:vit", (48, 48), 3), "", ours.preprocessing, {})
        with nullcontext() if same else pytest.raises(UserError, match="its features differ by"):
            conversion._compare(spec, theirs, ours, (48, 48))


def test_a_folder_of_transformers(photos: Path, tmp_path: Path) -> None:
    """The library is not needed: its file and its settings are."""
    transformers = import_transformers()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 4}
    config = transformers.Dinov2WithRegistersConfig(**sizes, image_size=64, patch_size=8, num_register_tokens=2)
    torch.manual_seed(0)
    model = transformers.Dinov2WithRegistersModel(config).eval()
    model.save_pretrained(tmp_path / "there")
    states = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "size": {"shortest_edge": 64}, "resample": 3}
    (tmp_path / "there" / "preprocessor_config.json").write_text(json.dumps(states))
    argv = [*SMALL, "--data", str(photos), "--init-from", f"hf:{tmp_path / 'there'}", *NO_LEARNING]
    run, knobs, options = read_command([*argv, "--out", str(tmp_path / "run")])
    assert (run.mean, run.image_size) == ((0.5, 0.4, 0.3), (64, 64))
    assert (options.heads, options.registers, options.layer_scale is None) == (2, 2, False)
    train.train(run, knobs, options)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values=images).last_hidden_state
        torch.testing.assert_close(encoder.load(tmp_path / "run")(images).cls, expected[:, 0], atol=1e-4, rtol=1e-4)
    (tmp_path / "there" / "model.safetensors").rename(tmp_path / "there" / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="weights in several files: save them as one"):
        read_command([*argv, "--out", str(tmp_path / "other")])


def test_a_job_gets_absolute_paths_and_unchanged_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    words = ["--init-from", "runs/gone", "--init-state=runs/a@3", "--init-from", "torch:a.pth,heads=4"]
    found = absolute_words(words, encoder_is_a_path=False)
    assert found == [
        "--init-from", f"{tmp_path}/runs/gone", f"--init-state={tmp_path}/runs/a@3", "--init-from", "torch:a.pth,heads=4",
    ]  # fmt: skip


def test_code_of_ones_own_is_refused(photos: Path) -> None:
    with pytest.raises(UserError, match="code of your own cannot be converted"):
        read_command([*SMALL, "--data", str(photos), "--init-from", "module:os:system"])


def test_a_file_with_names_that_do_not_fit(photos: Path, tmp_path: Path, pretrain: Callable[..., Any]) -> None:
    content = timm_vit().state_dict() | {"odd.weight": torch.zeros(3)}
    del content["norm.weight"]
    spec = f"torch:{saved(content, tmp_path)},heads=4"
    argv = [*SMALL, "--data", photos, "--init-from", spec, *NO_LEARNING, "--out", tmp_path / "run"]
    assert "1 missing: norm.weight; 1 unknown: odd.weight" in pretrain(*argv, code=2).stderr
    said = " ".join(pretrain(*argv, "--partial").stderr.split())
    assert "1 missing: norm.weight" in said
    assert "odd.weight" in said
    assert torch.equal(weights(tmp_path / "run")["norm.weight"], torch.ones(64))
