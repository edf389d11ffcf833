"""docs/exports.md: its table is what benchmarks/exports.py measures, its code and commands run."""

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from export_cases import vit
from oracles import import_timm, import_transformers
from ssl_pretrain.launch import export

from ssl_pretrain import encoder

sys.path.insert(0, str(ROOT / "benchmarks"))
import exports

PAGE = (ROOT / "docs" / "exports.md").read_text()
FEW = ["ViT, `--registers 4`", "ViT, `--norms post` (data2vec 2.0)", "ViT, `--norm-eps 1e-4`", "convnext_micro"]


def table(text: str) -> dict[str, list[str]]:
    """The cells of each row, by the row's name."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    return {name: cells for name, *cells in rows if name in exports.ROWS}


def number(cell: str) -> float | None:
    found = re.match(r"\d\S*", cell)
    return float(found[0]) if found else None


def test_the_table_has_every_row_and_small_differences() -> None:
    rows = table(PAGE)
    assert rows.keys() == exports.ROWS.keys()
    for name, cells in rows.items():
        assert len(cells) == len(exports.COLUMNS), name
        for cell in cells:
            value = number(cell)
            assert cell.startswith("no: ") if value is None else value <= 1e-5, (name, cell)


def test_a_few_rows_are_measured_again(capsys: pytest.CaptureFixture) -> None:
    import_timm()
    import_transformers()
    exports.main(["--rows", *FEW, "--columns", "timm", "AutoModel"])
    found, stated = table(capsys.readouterr().out), table(PAGE)
    assert found.keys() == set(FEW)
    for name, cells in found.items():
        for new, old in zip(cells, stated[name], strict=False):
            value = number(new)
            assert (value is None) == (number(old) is None), (name, new)
            assert new == old if value is None else value <= 1e-5, (name, new)


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_timm()
    import_transformers()
    written = vit(image_size=(32, 32))
    encoder.save(tmp_path / "runs" / "mae" / "encoder", written)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\nimport timm\n(.*?)```", PAGE, re.S)
    names: dict = {}
    exec("import timm\n" + code, names)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(names["model"](images).pooler_output, written(images).pooled, atol=1e-5)


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_timm()
    import_transformers()
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: nothing runs ONNX files")
    encoder.save(tmp_path / "runs" / "mae" / "encoder", vit(image_size=(32, 32)))
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^    ssl-export (to .*)$", PAGE, re.M)
    assert [line.split()[1] for line in lines] == ["onnx", "torch-export", "timm", "transformers"]
    for line in lines:
        assert export.main(line.split()) == 0
    (code,) = re.findall(r"```python\nimport onnxruntime\n(.*?)```", PAGE, re.S)
    names = {"images": torch.zeros(2, 3, 32, 32), "onnxruntime": onnxruntime}
    exec(code, names)
    assert names["pooled"].shape == (2, 64)
