"""`ssl-eval suite`: each encoder with each data set and evaluator in one table; faults are named and the rest goes on."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from ssl_pretrain.launch.evaluate import main
from ssl_pretrain.launch.table import Cell, Table, as_csv, as_json, cells_of, merge

from ssl_pretrain import backbones
from ssl_pretrain import encoder as exported
from ssl_pretrain.encoder import Encoder, Preprocessing, random_like


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """Two data sets of two classes, and two encoders that take images of different sizes."""
    for data, classes in (("fields", ("ant", "bee")), ("stripes", ("cow", "dog"))):
        for split, count in (("train", 10), ("val", 5)):
            for number, name in enumerate(classes):
                folder = tmp_path / data / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    rng = np.random.default_rng([number, i, count])
                    pixels = rng.integers(0, 120, (20, 20, 3)) + 100 * number
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    for name, size, dim in (("small", 16, 32), ("large", 24, 48)):
        backbone = backbones.build(
            "vit_micro", image_size=(size, size), in_chans=3, patch_size=8, dim=dim, depth=2, heads=2
        )
        how = Preprocessing.for_size((size, size), (0.5,) * 3, (0.25,) * 3)
        made = random_like(Encoder(backbone, "vit_micro", how, {"method": "mae"}), 0)
        exported.save(tmp_path / name / "encoder", made)
    return tmp_path


def suite(desk: Path, **text: object) -> Path:
    path = desk / "list.yaml"
    path.write_text(yaml.safe_dump(text))
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


def test_each_with_each(desk: Path, capsys: pytest.CaptureFixture) -> None:
    path = suite(
        desk,
        encoders={"A": "small", "B": "large"},
        data={"fields": "fields", "stripes": {"data": "stripes", "test-split": "val"}},
        evaluators={"knn": {"k": [3]}, "lin": {"evaluator": "linear", "lrs": [0.1], "steps": 20, "metric": "macro_f1"}},
        options={"workers": 0},
    )
    assert main(["suite", "--list", str(path), "--out", "all"]) == 0
    printed = capsys.readouterr().out
    found = rows(desk / "all" / "suite.csv")
    asked = [row for row in found if row["control"] == "0"]
    assert [(r["encoder"], r["data"], r["evaluator"]) for r in asked] == [
        (e, d, k) for e in "AB" for d in ("fields", "stripes") for k in ("knn", "lin")
    ]
    for row in asked:  # the numbers are those of each result
        result = json.loads(Path(row["result"]).read_text())
        assert row["metric"] == ("top1" if row["evaluator"] == "knn" else "macro_f1")
        assert float(row["value"]) == result["metrics"][row["metric"]]
        assert Path(row["result"]).parts[:4] == ("all", row["encoder"], row["data"], row["evaluator"])
    assert result["protocol"]["preprocessing"]["crop"] == [24, 24]
    assert float(asked[0]["low"]) <= float(asked[0]["value"]) <= float(asked[0]["high"])
    controls = {row["encoder"] for row in found if row["control"] == "1"}
    assert {"most frequent class", "raw pixels", "untrained (A)"} <= controls
    table = (desk / "all" / "suite.md").read_text()
    assert table in printed
    head = table.splitlines()[0]
    assert head == (
        "| encoder | knn top1, fields | knn top1, stripes | knn top1, mean "
        "| lin macro_f1, fields | lin macro_f1, stripes | lin macro_f1, mean |"
    )
    cells = json.loads((desk / "all" / "suite.json").read_text())
    by_data = [cell["value"] for cell in cells["cells"] if (cell["encoder"], cell["evaluator"]) == ("B", "lin")]
    mean = next(each["mean"] for each in cells["means"] if (each["encoder"], each["evaluator"]) == ("B", "lin"))
    assert mean == pytest.approx(sum(by_data) / 2)
    page = (desk / "all" / "suite.html").read_text()
    assert page.count("<tr>") == 1 + len(table.splitlines()) - 2
    assert "<td>A</td>" in page


def test_what_is_there_is_not_done_again(desk: Path, capsys: pytest.CaptureFixture) -> None:
    path = suite(
        desk, encoders=["small"], data=["fields"], evaluators=["knn"], options={"baselines": False, "workers": 0}
    )
    run = ["suite", "--list", str(path), "--out", "all"]
    assert main(run) == 0
    result = desk / "all" / "small" / "fields" / "knn" / "results.json"

    def again(*flags: str) -> bool:
        before = result.stat().st_mtime_ns
        assert main([*run, *flags]) == 0
        return result.stat().st_mtime_ns != before

    assert not again()
    assert again("--again")
    suite(desk, encoders=["small"], data=["fields"], evaluators={"knn": {"k": [2]}}, options={"baselines": False})
    assert again()
    assert not again()
    Image.new("RGB", (20, 20)).save(desk / "fields" / "val" / "ant" / "new.png")
    assert again()
    exported.save(desk / "small" / "encoder", random_like(exported.load(desk / "small"), 5))
    assert again()


def test_a_failure_is_named_and_the_rest_goes_on(desk: Path, capsys: pytest.CaptureFixture) -> None:
    for i in range(4):
        (desk / "plain").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (i, 0, 0)).save(desk / "plain" / f"{i}.png")
    path = suite(
        desk,
        encoders=["small"],
        data=["plain", "fields"],
        evaluators=["knn"],
        options={"baselines": False, "workers": 0},
    )
    assert main(["suite", "--list", str(path), "--out", "all"]) == 1
    said = capsys.readouterr()
    assert "1 of 2: small, plain, knn" in said.out
    assert "failed: " in said.err
    table = (desk / "all" / "suite.md").read_text()
    assert "| failed |" in table
    assert "- small, plain, knn: plain" in table
    plain, fields = rows(desk / "all" / "suite.csv")
    assert (plain["value"], bool(plain["failed"])) == ("", True)
    assert float(fields["value"]) > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({}, "encoders is missing"),
        ({"encoder": ["small"]}, "unknown key 'encoder'; did you mean encoders?"),
        (
            {"encoders": ["small"], "data": ["fields"], "evaluators": ["knnn"]},
            "unknown evaluator 'knnn'; did you mean knn?",
        ),
        ({"encoders": ["small"], "data": ["fields"], "evaluators": {"knn": {"kk": 3}}}, "unknown flag --kk"),
        ({"encoders": ["smal"], "data": ["fields"], "evaluators": ["knn"]}, "--encoder smal does not exist"),
        ({"encoders": ["small"], "data": ["feelds"], "evaluators": ["knn"]}, "feelds"),
        (
            {"encoders": ["small", "x/small"], "data": ["fields"], "evaluators": ["knn"]},
            "two encoders have the same name",
        ),
        ({"encoders": ["small"], "data": ["fields"], "evaluators": {"knn": {"out": "x"}}}, "out is set by the suite"),
        ({"encoders": ["small"], "data": ["fields"], "evaluators": {"knn": 3}}, "knn takes flags"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    text: dict, said: str, desk: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["suite", "--list", str(suite(desk, **text)), "--out", "all"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (desk / "all").exists()


def test_no_list(desk: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["suite", "--list", "nowhere.yaml"]) == 2
    assert "--list nowhere.yaml cannot be read" in capsys.readouterr().err
    (desk / "broken.yaml").write_text("encoders: [")
    assert main(["suite", "--list", "broken.yaml"]) == 2
    assert "is not YAML" in capsys.readouterr().err
    assert main(["suite"]) == 2
    assert "--list is needed" in capsys.readouterr().err


def cell(encoder: str, value: float | None, data: str = "d", control: bool = False) -> Cell:
    return Cell(
        encoder, data, "knn", "top1", value, (1.0, 2.0), control, None, "", "" if value is not None else "broken|x"
    )


def test_controls_that_say_the_same_are_one_row() -> None:
    cells = []
    for name, value, untrained in (("a", 5.0, 3.0), ("b", 5.0, 3.0), ("c", 4.0, 2.0)):
        cells += [cell(name, value), cell(f"untrained ({name})", untrained, control=True)]
    assert [each.encoder for each in merge(cells)] == ["a", "untrained (a)", "b", "c", "untrained (c)"]
    assert [name for name, _ in Table.of(cells).rows] == ["a", "b", "c", "untrained (a)", "untrained (c)"]


def test_a_table_by_hand() -> None:
    cells = [cell("a|b", 5.0), cell("a|b", None, "e")]
    assert Table.of(cells).markdown() == (
        "| encoder | knn top1, d | knn top1, e | knn top1, mean |\n| --- | --- | --- | --- |\n"
        "| a\\|b | 5.00 (1.00 to 2.00) | failed |  |\n\n- a\\|b, e, knn: broken\\|x\n"
    )
    assert json.loads(as_json(cells))["means"] == []  # a number is missing
    assert as_csv(cells).splitlines()[1] == "a|b,d,knn,top1,5.0,1.0,2.0,0,,,"
    result = {"metrics": {"n": 3, "nmi": 0.5, "silhouette": 0.1}, "baselines": {}, "seconds": 1.0}
    (found,) = cells_of("a", "d", "cluster", result, "r", None)
    assert (found.metric, found.value) == ("nmi", 0.5)
    with pytest.raises(KeyError):
        cells_of("a", "d", "cluster", result, "r", "top1")
