"""`ssl-eval` as a user runs it: results, defaults, and what is said of mistakes."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, picture
from PIL import Image
from small_encoders import small_encoder
from ssl_pretrain.launch.evaluate import main

from ssl_pretrain import encoder as exported
from ssl_pretrain.data import decode as decoding
from ssl_pretrain.encoder import Encoder

Evaluate = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of colour fields, 14 to train and 6 to test of each; one test file is no image."""
    for number, name in enumerate(("ant", "bee", "cow")):
        for split, count in (("train", 14), ("val", 6)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.asarray(picture(number, (16, 20))).astype(int)
                noise = np.random.default_rng([number, i, count]).integers(-60, 60, pixels.shape)
                image = Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
                image.save(folder / f"{i}.png")
    (tmp_path / "photos" / "val" / "bee" / "broken.png").write_bytes(b"no image at all")
    return tmp_path / "photos"


@pytest.fixture
def run_folder(tmp_path: Path, photos: Path) -> Path:
    """A run that exported an encoder which was trained on the photos."""
    made = small_encoder(depth=4)
    lineage = {"method": "mae", "data": str(photos), "step": 7}
    exported.save(tmp_path / "run" / "encoder", Encoder(made.backbone, made.name, made.preprocessing, lineage))
    return tmp_path / "run"


def result(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_knn_of_a_run(evaluate: Evaluate, run_folder: Path, photos: Path) -> None:
    done = evaluate("knn", "--encoder", run_folder, "--data", photos, "--workers", 1, "--k", 3, 5)
    assert f"written: {run_folder / 'eval' / 'knn-photos' / 'results.json'}" in done.stdout
    assert done.stderr == ""
    found = result(run_folder / "eval" / "knn-photos")
    assert set(found) == {"evaluator", "metrics", "protocol", "baselines", "encoder", "seconds", "all"}
    assert found["evaluator"] == "knn"
    metrics = found["metrics"]
    assert {"top1", "top1_interval", "top5", "macro_f1", "per_class", "per_class_f1", "n"} <= set(metrics)
    assert set(metrics["per_class"]) == {"ant", "bee", "cow"}
    assert metrics["n"] == 18
    assert metrics["top1"] == pytest.approx(sum(metrics["per_class"].values()) / 3)
    assert set(found["baselines"]) == {"random", "pixels", "majority"}
    assert found["baselines"]["majority"]["top1"] == pytest.approx(100 / 3)
    protocol = found["protocol"]
    assert (protocol["train"]["split"], protocol["test"]["split"], protocol["seed"]) == ("train", "val", 0)
    assert (protocol["train"]["images"], protocol["test"]["images"]) == (42, 18)
    assert [Path(bad["name"]).name for bad in protocol["test"]["bad"]] == ["broken.png"]
    assert protocol["preprocessing"]["crop"] == [16, 16]
    assert protocol["encoder_fingerprint"] == exported.load(run_folder).fingerprint
    assert len({protocol["train"]["fingerprint"], protocol["test"]["fingerprint"]}) == 2
    assert {"headline", "features", "selection", "temperature", "precision"} <= set(protocol)
    assert found["encoder"]["path"] == str(run_folder)
    assert (found["encoder"]["method"], found["encoder"]["step"], found["encoder"]["depth"]) == ("mae", 7, 4)
    assert len(found["all"]) == 6
    for shown in (
        f"{metrics['top1']:.2f}",
        "raw pixels",
        "the same, untrained",
        "most frequent class",
        "1 images could",
    ):
        assert shown in done.stdout


def test_a_published_protocol_by_name(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    same = ["knn", "--encoder", str(run_folder), "--no-baselines", "--workers", "0"]
    assert main([*same, "--protocol", "npid", "--out", str(tmp_path / "as-published")]) == 0
    found = result(tmp_path / "as-published")["protocol"]
    assert (found["published"], found["changed"], found["k"], found["features"]) == ("npid", {}, [42], ["pooled"])
    assert found["headline"].endswith("; protocol npid")
    assert main([*same, "--protocol", "npid", "--k", "3", "--out", str(tmp_path / "changed")]) == 0
    found = result(tmp_path / "changed")["protocol"]
    assert (found["changed"], found["k"]) == ({"k": [3]}, [3])
    assert found["headline"].endswith("; protocol npid with changes")
    capsys.readouterr()
    assert main([*same, "--protocol", "dinno"]) == 2
    assert capsys.readouterr().err == ("ssl-eval: knn has no protocol 'dinno'; did you mean dino?\n")
    assert main(["cluster", *same[1:], "--protocol", "dino"]) == 2
    assert "cluster has no protocol 'dino'" in capsys.readouterr().err


@pytest.mark.slow
def test_max_pixels_allows_large_images_and_is_no_matter_of_the_cache(
    run_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", decoding.MAX_PIXELS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    picture(0, (40, 50)).save(photos / "val" / "ant" / "0.png")
    bad = {}
    for most in (400, 2000):
        out = tmp_path / str(most)
        assert main(["knn", "--encoder", str(run_folder), "--workers", "0", "--out", str(out), "--no-baselines",
                     "--max-pixels", str(most)]) == 0  # fmt: skip
        bad[most] = [Path(item["name"]).name for item in result(out)["protocol"]["test"]["bad"]]
    assert bad == {400: ["0.png", "broken.png"], 2000: ["broken.png"]}


def test_a_flat_validation_folder_gets_its_remedy(
    run_folder: Path, photos: Path, capsys: pytest.CaptureFixture
) -> None:
    for image in sorted((photos / "val").rglob("*.png")):
        image.rename(photos / "val" / f"{image.parent.name}{image.name}")
    assert main(["knn", "--encoder", str(run_folder), "--workers", "0"]) == 2
    said = capsys.readouterr().err
    assert "'val' lie in no class folders, those of split 'train' do" in said
    assert "val_annotations.txt" in said
    assert said.count("\n") == 1


def test_several_processes_share_the_extraction(evaluate: Evaluate, run_folder: Path, tmp_path: Path) -> None:
    same = ("knn", "--encoder", run_folder, "--workers", 0, "--k", 3)
    evaluate(*same, "--out", tmp_path / "alone")
    shutil.rmtree(tmp_path / "cache")
    done = evaluate(*same, "--out", tmp_path / "two", "--nproc", 2)
    assert done.stdout.count("headline:") == 1
    one, two = result(tmp_path / "alone"), result(tmp_path / "two")
    for part in ("metrics", "protocol", "all"):
        assert one[part] == two[part]
    assert one["baselines"] == two["baselines"]
    for words, said in (
        (("finetune", *same[1:5]), "finetune runs in one process: leave --nproc"),
        ((*same, "--no-cache"), "do not use --no-cache"),
    ):
        done = evaluate(*words, "--nproc", 2, code=2)
        assert done.stderr.count("ssl-eval: ") == 1
        assert said in done.stderr


def test_linear_with_everything_left_to_the_defaults(evaluate: Evaluate, run_folder: Path) -> None:
    evaluate("linear", "--encoder", run_folder / "encoder", "--steps", 30)
    found = result(run_folder / "encoder" / "eval" / "linear-photos")
    assert set(found["baselines"]) == {"random", "majority"}
    assert len(found["all"]) == 13 * 6
    assert found["protocol"]["sweep"]["steps"] == 30
    assert found["metrics"]["top1"] > 60
    assert exported.load(run_folder / "encoder").lineage["step"] == 7  # the results in its folder do not disturb it


def test_the_same_command_twice_writes_the_same(run_folder: Path) -> None:
    kept = []
    for _ in range(2):
        assert main(["linear", "--encoder", str(run_folder), "--steps", "10", "--no-baselines"]) == 0
        kept.append(result(run_folder / "eval" / "linear-photos") | {"seconds": 0})
    assert kept[0] == kept[1]
    assert kept[0]["baselines"] == {}


def test_the_baselines_by_name(
    run_folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["knn", "--encoder", "pixels", "--data", str(photos)]) == 0
    pixels = result(tmp_path / "eval-pixels-knn-photos")
    assert set(pixels["baselines"]) == {"majority"}
    assert pixels["metrics"]["top1"] == 100  # noisy copies of three pictures
    assert main(["knn", "--encoder", "random", "--data", str(photos)]) == 0
    untrained = result(tmp_path / "eval-random-knn-photos")
    assert set(untrained["baselines"]) == {"pixels", "majority"}
    assert untrained["baselines"]["pixels"]["top1"] == pixels["metrics"]["top1"]
    assert (untrained["encoder"]["name"], untrained["encoder"]["image_size"]) == ("vit_tiny", [16, 16])
    assert "random (vit_tiny, 16 x 16)" in capsys.readouterr().out
    # of the shape of a run it is the baseline that the run is shown beside
    assert main(["knn", "--encoder", "random", "--like", str(run_folder), "--seed", "3", "--out", "like"]) == 0
    assert main(["knn", "--encoder", str(run_folder), "--seed", "3"]) == 0
    like = result(tmp_path / "like")
    assert like["encoder"]["dim"] == 32
    assert like["metrics"]["top1"] == result(run_folder / "eval" / "knn-photos")["baselines"]["random"]["top1"]


def test_fractals_need_no_files(run_folder: Path, tmp_path: Path) -> None:
    data = "fractals:classes=3,images=60,size=16"
    assert main(["knn", "--encoder", str(run_folder), "--data", data, "--no-baselines", "--no-cache"]) == 0
    assert result(run_folder / "eval" / "knn-fractals")["metrics"]["n"] == 15
    assert not (tmp_path / "cache" / "features").exists()


def test_help_needs_no_torch_and_no_time() -> None:
    began = time.perf_counter()
    done = subprocess.run(command("evaluate", "--help"), capture_output=True, text=True, check=True)
    assert time.perf_counter() - began < 2  # 0.3 s on an idle machine
    assert "knn" in done.stdout
    assert "linear" in done.stdout
    code = (
        "import sys; from ssl_pretrain.launch.evaluate import main\n"
        "lines = '--help', 'kn', 'knn --encoder x', 'knn --encoder pixels --data x'\n"
        "print([main(line.split()) for line in lines], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 2, 2, 2] False"


def test_the_help_of_an_evaluator_lists_its_knobs(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        main(["linear", "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--encoder", "--test-split", "--lrs", "--norm", "--augment", "--no-baselines"):
        assert flag in shown


def test_a_mistake_is_one_line_and_exit_code_2(evaluate: Evaluate, run_folder: Path, photos: Path) -> None:
    done = evaluate("knn", "--encoder", run_folder, "--data", photos, "--temprature", 0.1, code=2)
    assert done.stderr == "ssl-eval knn: unknown flag --temprature; did you mean --temperature?\n"
    assert done.stdout == ""


MISTAKES: list[tuple[list[str], str]] = [
    ([], "usage: ssl-eval EVALUATOR"),
    (["kmn", "--encoder", "RUN"], "unknown evaluator 'kmn'; did you mean knn?"),
    (["--encoder", "RUN"], "the evaluator comes first: ssl-eval knn --encoder RUN"),
    (["knn", "--data", "PHOTOS"], "--encoder is needed"),
    (["knn", "--encoder", "RUM"], "RUM does not exist; did you mean RUN?"),
    (["knn", "--encoder", "rndom", "--data", "PHOTOS"], "did you mean random?"),
    (["knn", "--encoder", "PHOTOS"], "has no encoder"),
    (["knn", "--encoder", "RUN", "--data", "PHOTOZ"], "did you mean PHOTOS?"),
    (["knn", "--encoder", "RUN", "--like", "RUN"], "goes with --encoder random only"),
    (["knn", "--encoder", "pixels"], "needs --data"),
    (["knn", "--encoder", "random"], "needs --data"),
    (["knn", "--encoder", "RUN", "--data", "PHOTOS/val"], "is not split"),
    (["knn", "--encoder", "RUN", "--test-split", "tset"], "no split 'tset'"),
    (["knn", "--encoder", "RUN", "--test-split", "train"], "both 'train'"),
    (["knn", "--encoder", "RUN", "--k", "0"], "--k is 0"),
    (["knn", "--encoder", "RUN", "--batch-size", "0"], "--batch-size must be at least 1"),
    (["knn", "--encoder", "RUN", "--features", "klass"], "unknown feature 'klass'"),
    (["linear", "--encoder", "RUN", "--layers", "9"], "last 4 block"),
    (["linear", "--encoder", "RUN", "--held-out", "2"], "--held-out is 2"),
    (["knn", "--encoder", "RUN", "--out", "PHOTOS/train/ant/0.png"], "choose another folder with --out"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES)
def test_what_is_said_of_a_mistake(
    argv: list[str], message: str, run_folder: Path, photos: Path, capsys: pytest.CaptureFixture
) -> None:
    def filled(text: str) -> str:
        for word, path in (("RUN", run_folder), ("RUM", run_folder.parent / "rum"), ("PHOTOZ", f"{photos}s")):
            text = text.replace(word, str(path))
        return text.replace("PHOTOS", str(photos))

    assert main([filled(word) for word in argv]) == 2
    shown = capsys.readouterr()
    assert filled(message) in shown.err
    assert shown.out == ""
    assert argv == [] or shown.err.count("\n") == 1


def prepare_no_labels(run: Path, photos: Path) -> None:
    for path in list(photos.rglob("*.png")):
        split = photos / path.relative_to(photos).parts[0]
        path.rename(split / f"{path.parent.name}-{path.name}")
    for folder in list(photos.glob("*/*")):
        if folder.is_dir():
            folder.rmdir()


def prepare_strange_class(run: Path, photos: Path) -> None:
    (photos / "val" / "dog").mkdir()
    picture(9, (16, 16)).save(photos / "val" / "dog" / "1.png")


def prepare_one_class(run: Path, photos: Path) -> None:
    for name in ("bee", "cow"):
        shutil.rmtree(photos / "train" / name)


def prepare_nan(run: Path, photos: Path) -> None:
    spoilt = exported.load(run)
    with torch.no_grad():
        spoilt.backbone.norm.weight[0] = torch.nan
    exported.save(run / "encoder", spoilt)


def prepare_channels(run: Path, photos: Path) -> None:
    exported.save(run / "encoder", small_encoder(in_chans=5))


def prepare_data_gone(run: Path, photos: Path) -> None:
    photos.rename(photos.with_name("moved"))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (prepare_no_labels, "have no labels, and this evaluator needs them"),
        (prepare_strange_class, "1 images of split 'val' are of 1 class(es) that no image of split 'train' has: dog\n"),
        (prepare_one_class, "all training images of"),
        (prepare_nan, "gives NaN or infinity"),
        (prepare_channels, "5 are read from .npy files only"),
        (prepare_data_gone, "the encoder's training data; name other data with --data"),
    ],
)
def test_what_is_said_of_data_and_encoders_that_do_not_fit(
    prepare: Callable[[Path, Path], None], message: str, run_folder: Path, photos: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [] if prepare is prepare_data_gone else ["--data", str(photos)]
    prepare(run_folder, photos)
    for name in ("knn", "linear", "logistic"):
        assert main([name, "--encoder", str(run_folder), *arguments]) == 2
        shown = capsys.readouterr()
        assert message in shown.err
        assert shown.err.count("\n") == 1


def test_an_encoder_that_does_not_say_its_data(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    exported.save(tmp_path / "bare", small_encoder())
    assert main(["knn", "--encoder", str(tmp_path / "bare")]) == 2
    assert "name labelled images with --data" in capsys.readouterr().err


def test_encoders_of_the_same_shape_and_place_share_no_features(run_folder: Path, tmp_path: Path) -> None:
    assert main(["knn", "--encoder", str(run_folder), "--no-baselines", "--out", str(tmp_path / "one")]) == 0
    other = small_encoder(seed=5, depth=4)
    lineage = exported.load(run_folder).lineage
    exported.save(run_folder / "encoder", Encoder(other.backbone, other.name, other.preprocessing, lineage))
    assert main(["knn", "--encoder", str(run_folder), "--no-baselines", "--out", str(tmp_path / "two")]) == 0
    assert (
        main(["knn", "--encoder", str(run_folder), "--no-baselines", "--no-cache", "--out", str(tmp_path / "3")]) == 0
    )
    one, two, fresh = (result(tmp_path / name) for name in ("one", "two", "3"))
    assert one["protocol"]["encoder_fingerprint"] != two["protocol"]["encoder_fingerprint"]
    assert two["all"] == fresh["all"]
