"""tests/mutations.py stays usable: each text is found once, each test exists, and it tells what survives."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation, check, replaced

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_its_text_is_found_once_and_its_tests_exist(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text()
    assert replaced(mutation, text) != text
    for test in mutation.tests:
        file, _, function = test.partition("::")
        defined = re.escape(function.partition("[")[0])
        assert re.search(rf"^def {defined}", (ROOT / "tests" / file).read_text(), re.MULTILINE), test


def test_a_text_that_is_missing_or_there_twice_is_refused() -> None:
    for text in ("", "left = 1\nleft = 2\n"):
        with pytest.raises(ValueError, match="not once"):
            replaced(Mutation("m", "f", "left", "right", ()), text)


def test_names_are_unique_and_unknown_ones_are_refused() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    done = subprocess.run(
        [sys.executable, "tests/mutations.py", "nothing of the kind"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert MUTATIONS[0].name in done.stdout


@pytest.mark.slow
def test_three_are_caught() -> None:
    names = ["learning rate one step late", "kNN temperature inverted", "DINO: centre added"]
    done = subprocess.run(
        [sys.executable, "tests/mutations.py", *names], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("CAUGHT") == 3


@pytest.mark.slow
def test_a_harmless_change_survives() -> None:
    harmless = Mutation(
        "harmless", "ssl/ssl_pretrain/optim/schedules.py", "left = steps - step\n", "left = -(step - steps)\n",
        ("test_schedules.py",),
    )  # fmt: skip
    (row,) = check([harmless])
    assert row.caught_by is None
