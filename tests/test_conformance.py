"""The conformance checks of methods, on another package's: a healthy one passes, each fault alone is found and named."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from pages import SECTIONS, missing_in_page, missing_in_tests
from torch import Tensor, nn

from ssl_pretrain import backbones, conformance
from ssl_pretrain.conformance.__main__ import main
from ssl_pretrain.conformance.precision import NarrowLosses

HEALTHY = '''
"""A teacher's soft assignment of one view is predicted from another."""
import math
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from ssl_pretrain import distributed
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.parts.ema_teacher import EncoderWithHeads, ema_copy, ema_update_
from ssl_pretrain.parts.views import encode_pooled
from ssl_pretrain.pretext import Losses, Method, Recipe


@final
class Example(Method):
    recipe = Recipe(tiny={"outputs": 12})

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Example."""

        outputs: int = 4096
        """Outputs of the head."""
        momentum: float = 0.99
        """The teacher's momentum."""
        centred: bool = True
        """Take the centre from the teacher's outputs."""

    def __init__(self, encoder, config):
        super().__init__(encoder, config)
        self.head = nn.Linear(encoder.dim, config.outputs)
        self.register_buffer("centre", torch.zeros(config.outputs))

    def prepare(self, images, networks):
        self.teacher = ema_copy(EncoderWithHeads({"encoder": self.encoder, "head": self.head}))

    @classmethod
    def views(cls, config, image_size):
        return (ViewSpec(name="seen", size=image_size), ViewSpec(name="other", size=image_size, hflip=1.0))

    def forward(self, batch, step):
        (vectors,) = encode_pooled(self.encoder, [batch.views["seen"]], step)
        scores = self.head(vectors).float()
        with torch.no_grad():
            (vectors,) = encode_pooled(self.teacher.backbone, [batch.views["other"]], step)
            wanted = self.teacher["head"](vectors).float()
        centre = self.centre if self.config.centred else 0 * self.centre
        target = torch.softmax((wanted - centre) / 0.1, -1)
        each = -(target * torch.log_softmax(scores, -1)).sum(-1)
        return Losses(
            total=each.mean(),
            terms={"target_entropy": torch.special.entr(target).sum(-1).mean()},
            per_sample=each.detach(),
            carry={"wanted": wanted},
        )

    @torch.no_grad()
    def after_step(self, step):
        student = EncoderWithHeads({"encoder": self.encoder, "head": self.head})
        ema_update_(self.teacher, student, self.config.momentum, step.ok)
        moved = self.centre.lerp(distributed.mean(step.carried["wanted"].mean(0)), 0.1)
        self.centre.copy_(torch.where(step.ok, moved, self.centre))

    def collapsed(self, batch_size):
        return {"loss": (math.log(self.config.outputs), "all outputs are alike")}

    def pictures(self, batch, step):
        return {"seen": batch.views["seen"]}
'''


class Broken(NamedTuple):
    """A fault: what is replaced in the healthy method, the check that finds it, and what its message says."""

    edits: dict[str, str]
    check: str
    says: tuple[str, ...]


FAULTS = {
    "not_final": Broken({"@final\n": ""}, "class_is_final", ("@final",)),
    "ignores_ok": Broken(
        {"torch.where(step.ok, moved, self.centre)": "moved"},
        "skipped_step_changes_no_state",
        ("centre", "step.ok is false"),
    ),
    "teacher_ignores_ok": Broken(
        {"self.config.momentum, step.ok)": "self.config.momentum, step.ok | True)"},
        "skipped_step_changes_no_state",
        ("teacher.", "step.ok is false"),
    ),
    "ignores_ok_for_a_choice": Broken(
        {"torch.where(step.ok, moved": "torch.where(step.ok | (not self.config.centred), moved"},
        "skipped_step_changes_no_state",
        ("centre", "step.ok is false", "with centred=False"),
    ),
    "stands_still_for_a_choice": Broken(
        {
            '        self.register_buffer': '        if not config.centred:\n'
            '            self.register_buffer("mean", torch.zeros(()))\n        self.register_buffer'
        },
        "all_state_moves_in_three_steps",
        ("mean", "never changes", "with centred=False"),
    ),
    "multiplies_by_ok": Broken(
        {"torch.where(step.ok, moved, self.centre)": "self.centre + step.ok * (moved - self.centre)"},
        "skipped_step_changes_no_state",
        ("centre", "step.ok is false", "not finite"),
    ),
    "teacher_stands_still": Broken(
        {"ema_update_(self.teacher, student": "ema_update_(student, student"},
        "all_state_moves_in_three_steps",
        ("teacher.", "never changes"),
    ),
    "collapse_of_no_term": Broken(
        {'{"loss": (math': '{"agreement": (math'},
        "collapsed_names_logged_terms",
        ("'agreement'", "target_entropy"),
    ),
    "narrow_loss": Broken(
        {"scores = self.head(vectors).float()": "scores = self.head(vectors)"},
        "losses_take_float32_under_autocast",
        ("log_softmax takes torch.bfloat16", "narrow_loss:", "in forward"),
    ),
    "narrow_total": Broken(
        {"each.mean(),": "each.mean().to(torch.bfloat16 if torch.is_autocast_enabled('cpu') else torch.float32),"},
        "losses_take_float32_under_autocast",
        ("Losses.total is torch.bfloat16",),
    ),
    "narrow_by_a_switch": Broken(
        {"            wanted = self.teacher": "            exp = torch.abs if self.config.centred else torch.exp\n"
         "            wanted = exp(self.teacher", '["head"](vectors).float()': '["head"](vectors)).float()'},
        "losses_take_float32_under_autocast",
        ("with centred=False", "exp takes torch.bfloat16"),
    ),
    "flat_picture": Broken(
        {'{"seen": batch.views["seen"]}': '{"seen": batch.views["seen"][0]}'},
        "pictures_have_the_shape_of_images",
        ("'seen'", "(3, 32, 32)"),
    ),
    "picture_of_nan": Broken(
        {'{"seen": batch.views["seen"]}': '{"seen": batch.views["seen"] / 0 * 0}'},
        "pictures_have_the_shape_of_images",
        ("'seen'", "finite"),
    ),
    "raises": Broken(
        {'        return {"seen": batch': '        raise ArithmeticError("no")\n        return {"seen": batch'},
        "pictures_have_the_shape_of_images",
        ("ArithmeticError: no", "raises:", "in pictures"),
    ),
    "sums_per_sample": Broken(
        {"per_sample=each.detach()": "per_sample=2 * each.detach()"},
        "per_sample_averages_to_total",
        ("per_sample", "total"),
    ),
    "dead_parameter": Broken(
        {"        self.register_buffer": "        self.spare = nn.Linear(2, 2)\n        self.register_buffer"},
        "no_parameter_is_dead",
        ("spare.bias", "dead"),
    ),
    "unread_knob": Broken(
        {"        centred: bool": '        extra: int = 3\n        """Nothing."""\n        centred: bool'},
        "knobs_are_explained_and_read",
        ("extra", "nothing reads"),
    ),
    "unexplained_knob": Broken(
        {'        """Outputs of the head."""\n': ""},
        "knobs_are_explained_and_read",
        ("outputs", "no help"),
    ),
    "unknown_flag": Broken(
        {'tiny={"outputs": 12}': 'tiny={"outputs": 12}, small={"stepz": 5}'},
        "recipe_names_known_flags",
        ("small", "stepz"),
    ),
    "size_that_no_rule_gives": Broken(
        {"outputs: int = 4096": "outputs: int | None = None"},
        "open_knobs_are_sized",
        ("outputs is None by default", "sizes() gives no value"),
    ),
    "larger_beside_a_smaller_encoder": Broken(
        {
            "outputs: int = 4096": "outputs: int | None = None",
            "    def prepare(self": "    @classmethod\n    def sizes(cls, config, encoder, images):\n"
            "        return {'outputs': 4096 // encoder.depth}\n\n    def prepare(self",
        },
        "open_knobs_are_sized",
        ("outputs=1024 for a vit_micro", "341 for a vit_base", "102 for a vit_giant"),
    ),
    "size_of_no_knob": Broken(
        {
            "    def prepare(self": "    @classmethod\n    def sizes(cls, config, encoder, images):\n"
            "        return {'outputs': 4096}\n\n    def prepare(self",
        },
        "open_knobs_are_sized",
        ("sizes() names outputs",),
    ),
    "square_views": Broken(
        {"size=image_size)": "size=image_size[:1] * 2)", "size=image_size,": "size=image_size[:1] * 2,"},
        "views_are_declared",
        ("(48, 32)", "seen (48, 48)"),
    ),
    "unread_view": Broken(
        {'batch.views["other"]': 'batch.views["seen"]'},
        "declared_views_are_read",
        ("other", "never reads"),
    ),
    "undeclared_view": Broken(
        {'batch.views["other"]': 'batch.views["third"]'},
        "declared_views_are_read",
        ("'third'", "does not declare"),
    ),
    "forward_moves_the_centre": Broken(
        {"        target = ": "        self.centre.add_(1e-3)\n        target = "},
        "forward_changes_no_state",
        ("centre", "in evaluation"),
    ),
    "free_noise": Broken(
        {"scores = self.head(vectors).float()": "scores = self.head(vectors).float() * torch.rand(())"},
        "forward_is_a_function_of_the_step",
        ("step.rand",),
    ),
    "unsaved_state": Broken(
        {"torch.zeros(config.outputs))": "torch.zeros(config.outputs), persistent=False)"},
        "all_state_moves_in_three_steps",
        ("centre", "not in state_dict()"),
    ),
    "constant_that_moves": Broken(
        {"    recipe = ": '    constant = frozenset({"centre"})\n    recipe = '},
        "all_state_moves_in_three_steps",
        ("centre", "which changes"),
    ),
    "unknown_constant": Broken(
        {"    recipe = ": '    constant = frozenset({"center"})\n    recipe = '},
        "all_state_moves_in_three_steps",
        ("center", "not in state_dict()"),
    ),
    "attached_term": Broken(
        {'"target_entropy": torch': '"own": each.mean(), "target_entropy": torch'},
        "losses_are_finite_and_float32",
        ("own", "detached"),
    ),
    "leaves_out_micro_batches": Broken(
        {"total=each.mean(),": "total=each.mean() * len(each),"},
        "two_micro_batches_equal_one",
        ("loss of two micro-batches",),
    ),
    "knows_its_rank": Broken(
        {"total=each.mean(),": "total=each.mean() * (1 + distributed.rank()),"},
        "two_processes_equal_one",
        ("loss of two processes",),
    ),
    "mean_of_its_own": Broken(
        {'distributed.mean(step.carried["wanted"].mean(0))': 'step.carried["wanted"].mean(0)'},
        "two_processes_equal_one",
        ("two processes", "the state centre"),
    ),
    "fails_beside_others": Broken(
        {"total=each.mean(),": "total=1 / 0 if distributed.rank() else each.mean(),"},
        "two_processes_equal_one",
        ("process 1 of two", "ZeroDivisionError"),
    ),
    "counts_in_python": Broken(
        {
            "        student = EncoderWithHeads": "        self.count = getattr(self, 'count', 0) + 1\n"
            "        student = EncoderWithHeads",
            "        each = -(target": "        scores = scores * (1 + getattr(self, 'count', 0))\n        each = -(target",
        },
        "resumed_run_is_bit_identical_and_exports",
        ("resumed after 3 of 6 steps",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed package with a healthy method, one with each fault, and a name that two kinds have."""
    site = tmp_path_factory.mktemp("site")
    info = site / "example-1.0.dist-info"
    info.mkdir()
    sources = {"healthy": HEALTHY}
    for name, fault in FAULTS.items():
        sources[name] = HEALTHY
        for old, new in fault.edits.items():
            assert sources[name].count(old) == 1, (name, old)
            sources[name] = sources[name].replace(old, new)
    for name, source in sources.items():
        (site / f"example_{name}.py").write_text(source)
    methods = "\n".join(f"{name} = example_{name}:Example" for name in sources)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[ssl_pretrain.methods]\n{methods}\ntwice = example_healthy:Example\n\n"
        "[ssl_pretrain.eval]\ntwice = example_healthy:Example\n"
    )
    return site


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(site))
    return site


def test_a_healthy_method_of_another_package_passes_everything(installed: Path) -> None:
    assert conformance.find("healthy") == "methods"
    told: list[conformance.Result] = []
    results = conformance.run("methods", "healthy", told.append)
    assert [result.fault for result in results] == [None] * len(results)
    assert told == results
    assert {fault.check for fault in FAULTS.values()} <= {result.check for result in results}
    assert all(result.seconds >= 0 for result in results)
    assert sum(result.seconds for result in results) > 0.1


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_alone_is_found_and_named(name: str, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (wanted,) = (check for check in conformance.checks("methods", name) if check.__name__ == FAULTS[name].check)
    monkeypatch.setattr(conformance, "checks", lambda kind, name: [wanted])
    (result,) = conformance.run("methods", name)
    assert isinstance(result.fault, conformance.Fault)
    for words in FAULTS[name].says:
        assert words in str(result.fault)


@pytest.mark.slow
def test_the_command_checks_ours() -> None:
    argv = [sys.executable, "-m", "ssl_pretrain.conformance", "mae"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "no faults"
    names = [check.__name__ for check in conformance.checks("methods", "mae")]
    assert [line.rsplit(" (", 1)[0] for line in lines] == [f"ok     methods:mae {name}" for name in names]


def test_the_command_finds_a_fault_of_another_package(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = conformance.checks
    monkeypatch.setattr(conformance, "checks", lambda kind, name: every(kind, name)[:-3])  # the rest takes seconds
    assert main(["methods:ignores_ok"]) == 1
    said = capsys.readouterr().out
    (fault,) = (line for line in said.splitlines() if line.startswith("FAULT"))
    assert fault.startswith("FAULT  methods:ignores_ok skipped_step_changes_no_state: after_step changes centre though")
    assert said.endswith("1 fault\n")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("heelthy", "did you mean healthy?"),
        ("twice", "write methods:twice or eval:twice"),
        ("method:healthy", "did you mean methods?"),
        ("methods:heelthy", "did you mean healthy?"),
    ],
)
def test_a_name_that_does_not_tell(name: str, says: str, installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["healthy", name]) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.out == ""  # no check was run


def test_the_checks_need_no_pytest(installed: Path) -> None:
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "from ssl_pretrain import conformance\n"
        "cheap = conformance.checks('methods', 'healthy')[:8]\n"
        "[check() for check in cheap]\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


class BFloatBackward(torch.autograd.Function):
    """Takes the exp of bfloat16 in backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.bfloat16().exp().float()


@pytest.mark.parametrize(
    ("operation", "found"),
    [
        (lambda x: torch.softmax(x, -1), "softmax"),
        (lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.long)), "log_softmax"),
        (lambda x: x.logsumexp(0), "logsumexp"),
        (lambda x: x.clone().exp_(), "exp"),
        (lambda x: x.abs().log(), "log"),
        (lambda x: x.norm(dim=0), "linalg_vector_norm"),
        (lambda x: F.normalize(x, dim=0), "linalg_vector_norm"),
        (lambda x: F.layer_norm(x, (6,)), "native_layer_norm"),
        (lambda x: F.batch_norm(x, None, None, training=True), "native_batch_norm"),
        (lambda x: x.mean(), "mean"),
        (lambda x: x.sum((0, 1)), "sum"),
        (lambda x: F.mse_loss(x, 2 * x, reduction="none"), "mse_loss"),
        (lambda x: BFloatBackward.apply(x.float()).sum().backward(), "exp"),
        # What is no loss, or no fault:
        (lambda x: x.mean(0), None),
        (lambda x: x.sum(dtype=torch.float32), None),
        (lambda x: torch.softmax(x.float(), -1).log().mean(), None),
        (lambda x: x @ x.T, None),
        (nn.LayerNorm(6, dtype=torch.bfloat16), None),
        (lambda x: backbones.build("vit_micro", image_size=(8, 8), patch_size=8)(torch.zeros(1, 3, 8, 8)), None),
    ],
)  # fmt: skip
def test_operations_on_narrow_numbers(operation: object, found: str | None) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    with NarrowLosses() as narrow, torch.autocast("cpu", torch.bfloat16, enabled=found is None):
        operation(x)  # type: ignore[operator]
    if found is None:
        assert narrow.found == []
    else:
        assert f"{found} takes torch.bfloat16 at test_conformance:" in narrow.found[0]


PAGE = "\n".join(
    ["# Example", "", "    ssl-pretrain --method example", "", "| | |", "| --- | --- |"]
    + [f"| {row} | what |" for row in ("family", "needs", "exports")]
    + [line for title in SECTIONS for line in ("", f"## {title}", "", "Text.")]
)
TESTS = """
import pytest
from ssl_pretrain.methods.example import Example

def holds(x):
    assert x

def test_one():
    assert Example

def test_two():
    with pytest.raises(ValueError):
        int("x")

def test_three():
    holds(Example)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "methods").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    (tmp_path / "docs" / "methods" / "example.md").write_text(PAGE)
    (tmp_path / "tests" / "test_example.py").write_text(TESTS)
    return tmp_path


def test_a_whole_page_and_test_file(root: Path) -> None:
    assert missing_in_page(root, "example") == []
    assert missing_in_tests(root, "example") == []


@pytest.mark.parametrize(
    ("page", "missing"),
    [
        ("\n".join(["# Example", "    ssl-pretrain --method example", *["Words."] * 10]), "the sections"),
        (PAGE.replace("| needs | what |\n", ""), "'needs'"),
        (PAGE.replace("--method example", "--method other"), "--method example"),
        (PAGE.replace("## Deviations\n\nText.", "## Deviations\n"), "text in the section 'Deviations'"),
        (PAGE.replace("## Idea", "## Ideas"), "the sections"),
    ],
)
def test_a_page_that_lacks_something(page: str, missing: str, root: Path) -> None:
    (root / "docs" / "methods" / "example.md").write_text(page)
    assert sum(missing in line for line in missing_in_page(root, "example")) == 1


def test_a_stated_collapse_needs_a_test(root: Path) -> None:
    (root / "methods").mkdir()
    (root / "methods" / "example.py").write_text("class Example:\n    def collapsed(self):\n        return {}\n")
    (missing,) = missing_in_tests(root, "example")
    assert "collapsed state" in missing
    test = "def test_collapsed_state_has_the_stated_loss():\n    check_stated(Example, {})\n"
    (root / "tests" / "test_example.py").write_text(TESTS + test)
    assert missing_in_tests(root, "example") == []


@pytest.mark.parametrize(
    ("tests", "missing"),
    [
        ("", "an import of ssl_pretrain.methods.example"),
        ("", "3 tests"),
        (TESTS.replace("    holds(Example)", "    print(Example)"), "3 tests that check something (it has 2)"),
        (TESTS.replace("methods.example", "methods.other"), "an import"),
    ],
)
def test_a_test_file_that_tests_nothing(tests: str, missing: str, root: Path) -> None:
    (root / "tests" / "test_example.py").write_text(tests)
    assert sum(missing in line for line in missing_in_tests(root, "example")) == 1
