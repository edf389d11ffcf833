"""Model cards: the hub's own reader finds in them what an export says, whatever the names are."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import picture
from small_encoders import small_export
from ssl_pretrain.launch import evaluate, export, pretrain

from ssl_pretrain import encoder, model_card

HOSTILE = "a: [b\n---\n# x\n</script><b>`c` \"d\" 'e' {f: *g}\t\u2028 ü \x07 #h |\\"


def header(folder: Path) -> dict[str, Any]:
    """The YAML at the top, found as the hub finds it."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    found = re.match(r"\s*---[ \t]*\n(.*?)\n---[ \t]*\n", text, re.S)
    assert found is not None
    return yaml.safe_load(found[1])


def body(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)[1]


def test_the_header_says_library_task_and_tags(tmp_path: Path) -> None:
    encoder.save(tmp_path, small_export())
    assert header(tmp_path) == {
        "library_name": "timm",
        "license": "unknown",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["image-feature-extraction", "self-supervised", "ssl-pretrain", "timm", "mae"],
    }
    text = body(tmp_path)
    assert "# vit_micro, pretrained with mae" in text
    assert "- timm: `timm.create_model(" in text
    assert "- transformers: `transformers.AutoModel.from_pretrained(" in text


def test_an_encoder_that_no_library_has(tmp_path: Path) -> None:
    encoder.save(tmp_path, small_export(norms="post"))
    assert header(tmp_path)["library_name"] == "ssl-pretrain"
    assert "- timm: no, timm's ViTs have no norm after each branch" in body(tmp_path)
    assert "- transformers: no: " in body(tmp_path)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    lineage = {"method": HOSTILE, "data": HOSTILE, "license": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}}
    lineage["init_from"] = {"spec": HOSTILE, "source": HOSTILE, "license": HOSTILE}
    written = small_export(lineage=lineage)
    encoder.save(tmp_path, written)
    scores = [model_card.Score(HOSTILE, HOSTILE, HOSTILE, 50.0)]
    encoder.write_card(tmp_path, written, scores)
    said = header(tmp_path)
    assert said["license"] == HOSTILE
    assert said["tags"][-1] == HOSTILE
    assert said["model-index"][0]["results"][0]["dataset"]["name"] == HOSTILE
    text = body(tmp_path)
    assert "<" not in text.replace("&lt;", "")
    assert text.count("\n# ") == 1
    assert text.count("\n---") == 0
    assert text.count("```") == 2
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: the hub's own reader")
    card = hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.license == HOSTILE
    assert card.data.eval_results[0].metric_value == 50.0


def test_names_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    """A folder's name may hold any bytes."""
    encoder.save(tmp_path, small_export(lineage={"method": "mae", "data": "\udcff"}))
    assert header(tmp_path)["library_name"] == "timm"
    encoder.save(tmp_path, small_export(lineage={"method": "\udcff", "data": "x"}))
    assert "library_name" in header(tmp_path)


def test_start_weights_are_named_with_source_and_licence(tmp_path: Path) -> None:
    first = {"method": "dinov2", "source": "facebook/dinov2-small", "license": "apache-2.0"}
    encoder.save(tmp_path / "start", small_export(lineage=first))
    assert header(tmp_path / "start")["license"] == "apache-2.0"
    assert header(tmp_path / "start")["base_model"] == "facebook/dinov2-small"
    second = {"method": "mae", **model_card.with_origins({}, tmp_path / "start")}
    encoder.save(tmp_path / "run" / "encoder", small_export(lineage=second))
    third = {"method": "dino", **model_card.with_origins({"teacher": {"spec": "timm:resnet18"}}, tmp_path / "run")}
    encoder.save(tmp_path / "last", small_export(lineage=third))
    said = header(tmp_path / "last")
    assert said["license"] == "unknown"  # of the new weights: its maker says it
    assert said["base_model"] == "facebook/dinov2-small"
    text = body(tmp_path / "last")
    assert (
        f"- init_from: {tmp_path / 'run'} (source: unknown; licence: unknown); its init_from: {tmp_path / 'start'}"
        in text
    )
    assert "(source: facebook/dinov2-small; licence: apache-2.0)" in text
    assert "- teacher: timm:resnet18 (source: timm:resnet18; licence: unknown)" in text


def test_a_run_and_its_scores(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By the commands: a run that starts from an export, scored, and its card."""
    photos = tmp_path / "photos"
    for i in range(24):
        place = photos / ("train" if i < 16 else "val") / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture(i).save(place / f"{i}.png")
    start = {"method": "dinov2", "source": "facebook/dinov2-small", "license": "apache-2.0"}
    encoder.save(tmp_path / "start", small_export(lineage=start, size=(16, 16)))
    run = tmp_path / "run"
    words = f"--method simclr --data {photos} --out {run} --encoder vit_micro --image-size 16 --patch-size 8 --steps 1"
    words += f" --depth 2 --batch-size 4 --workers 0 --init-from {tmp_path / 'start'}"
    assert pretrain.main(words.split()) == 0
    assert header(run / "encoder")["base_model"] == "facebook/dinov2-small"
    assert "model-index" not in header(run / "encoder")
    assert evaluate.main(["knn", "--encoder", str(run), "--data", str(photos), "--workers", "0", "--no-baselines"]) == 0
    (result,) = run.rglob("results.json")
    top1 = json.loads(result.read_text())["metrics"]["top1"]
    other = json.loads(result.read_text())
    other["protocol"]["encoder_fingerprint"] = "0"
    for name, content in (("other", json.dumps(other)), ("broken", "{"), ("odd", "[]")):
        (run / name).mkdir()
        (run / name / "results.json").write_text(content)
    capsys.readouterr()
    assert export.main(["card", str(run)]) == 0
    assert "with 1 scores" in capsys.readouterr().out
    (entry,) = header(run / "encoder")["model-index"]
    assert entry["results"][0]["metrics"][0]["value"] == pytest.approx(top1, abs=1e-3)
    assert encoder.load(run).name == "vit_micro"


def test_mistakes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert export.main(["card"]) == 2
    assert export.main(["card", str(tmp_path / "no")]) == 2
    assert "does not exist" in capsys.readouterr().err
