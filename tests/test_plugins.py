"""Every backbone, evaluator, source and logger of ours keeps its contract; and the checks find what does not: each fault
is put into a plugin that is right, and the check that it is for must name it."""

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import acme
import pytest
import torch
from distributions import install

from ssl_pretrain import backbones, plugins
from ssl_pretrain.backbones.vit import ViT
from ssl_pretrain.conformance import Fault
from ssl_pretrain.data import source
from ssl_pretrain.loop.logger_thread import LoggerThread
from ssl_pretrain.loop.report import Report

SIZES = (
    "vit_tiny",
    "resnet18",
    "resnet50",
    "convnext_micro",
    "convnextv2_micro",
    "octic_micro",
    "grouper_micro",
    "jumbo_micro",
    "swin_micro",
    "hiera_micro",
)
OTHERS = [name for name in backbones.own() if name not in SIZES]
OURS = [
    *(("backbones", name) for name in SIZES),
    *(("evaluators", name) for name in plugins.own("ssl_pretrain.eval")),
    *(("sources", name) for name in source.kinds()),
    *(("loggers", name) for name in plugins.own("ssl_pretrain.loggers")),
]


def checks(kind: str, name: str) -> dict[str, Callable[[], None]]:
    module = importlib.import_module(f"ssl_pretrain.conformance.{kind}")
    assert name in module.names()
    return {check.__name__: check for check in module.checks(name)}


def conform(kind: str, name: str) -> None:
    for library in {"parquet": ["pyarrow"], "wandb": ["wandb"], "mlflow": ["mlflow", "sqlalchemy"]}.get(name, []):
        pytest.importorskip(library)
    for check in checks(kind, name).values():
        check()


@pytest.mark.parametrize(("kind", "name"), OURS)
def test_ours_conforms(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")  # it needs no login then
    conform(kind, name)


# What can differ between sizes of one file. Of wide sizes the other checks take minutes and see the same code.
OF_SIZES = ("options_are_explained_and_read", "sizes_are_options", "attributes_are_set", "features_have_their_shapes",
            "every_parameter_has_a_layer")  # fmt: skip
WIDE = 256  # channels


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_size_conforms(name: str) -> None:
    with torch.device("meta"):
        wide = backbones.build(name, image_size=(224, 224)).dim > WIDE
    for check, run in checks("backbones", name).items():
        if not wide or check in OF_SIZES:
            run()


def test_every_file_of_backbones_is_checked() -> None:
    assert {type(small(name)) for name in SIZES} == {type(small(name)) for name in backbones.own()}


def small(name: str) -> Any:
    fields = backbones.config_class(name).__dataclass_fields__
    few = {"depths": (1,) * len(backbones.defaults(name).get("depths", ()))}
    options: dict[str, Any] = {"depth": 1} if "depth" in fields else few
    return backbones.build(name, image_size=(64, 64), **options)


KINDS = {
    "backbones": ("backbones", acme.BACKBONE, "acme_small", "{}:Acme"),
    "units": ("backbones", acme.UNITS, "cells_small", "{}:Cells"),
    "evaluators": ("eval", acme.EVALUATOR, "means", "{}"),
    "sources": ("sources", acme.SOURCE, "bands", "{}:Bands"),
    "loggers": ("loggers", acme.LOGGER, "diary", "{}:Diary"),
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Callable[[], None]]]:
    """Install the plugin of another package, with text of it replaced, where this process and its children find it;
    returns its checks."""

    def make(kind: str, *changes: tuple[str, str]) -> dict[str, Callable[[], None]]:
        group, text, name, what = KINDS[kind]
        for old, new in changes:
            assert old in text, f"{old!r} is not in the plugin"
            text = text.replace(old, new)
        module, site = f"acme_{kind}", tmp_path / "site"
        install(site, module, text, {f"ssl_pretrain.{group}": {name: what.format(module)}})
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, module, raising=False)
        return checks("backbones" if kind == "units" else kind, name)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_plugins_without_a_fault_pass(kind: str, installed: Callable) -> None:
    for check in installed(kind).values():
        check()


FAULTS: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    # ---- Backbones: check, what it says, replacements.
    ("backbones", "class_is_final", "must be @final", [("@final\n", "")]),
    (
        "backbones",
        "class_is_final",
        "must derive from Backbone",
        [("class Acme(Backbone)", "class Acme(Between)"), ("@final", "class Between(Backbone):\n    pass\n\n\n@final")],
    ),
    (
        "backbones",
        "options_are_explained_and_read",
        "side has no help",
        [('        """Side of a patch, pixels."""\n', "")],
    ),
    ("backbones", "options_are_explained_and_read", "must be frozen", [("frozen=True, ", "")]),
    (
        "backbones",
        "options_are_explained_and_read",
        "nothing in .* reads config.spare",
        [("    supports", '        spare: int = 1\n        """Nothing."""\n\n    supports')],
    ),
    (
        "backbones",
        "options_are_explained_and_read",
        "steps has the name of another flag",
        [("side: int = 8", "steps: int = 8"), ("config.side", "config.steps")],
    ),
    ("backbones", "sizes_are_options", "width: '24' is not a whole number", [('{"width": 24}', '{"width": "24"}')]),
    ("backbones", "sizes_are_options", "'wide', which is no field", [('{"width": 48}', '{"wide": 48}')]),
    ("backbones", "sizes_are_options", "width has no default", [('"acme_small": {"width": 24}', '"acme_small": {}')]),
    (
        "backbones",
        "attributes_are_set",
        "image_size is",
        [("config, image_size, in_chans\n", "config, image_size[::-1], in_chans\n")],
    ),
    ("backbones", "attributes_are_set", "words must be among", [("frozenset()", 'frozenset({"keeps"})')]),
    (
        "backbones",
        "features_have_their_shapes",
        "the grid .* not",
        [("tuple(x.shape[2:])", "tuple(x.shape[2:])[::-1]")],
    ),
    (
        "backbones",
        "features_have_their_shapes",
        "pooled .* has the shape",
        [("pooled=patches.mean(1)", "pooled=patches.mean((1, 2))")],
    ),
    (
        "backbones",
        "features_have_their_shapes",
        "two different images are the same",
        [("pooled=patches.mean(1)", "pooled=0 * patches.mean(1)")],
    ),
    (
        "backbones",
        "features_have_their_shapes",
        "is not finite",
        [("pooled=patches.mean(1)", "pooled=(patches.mean(1) - 1e9).log()")],
    ),
    (
        "backbones",
        "images_of_another_size_are_taken_or_refused",
        "not finite",
        [("pooled=patches.mean(1)", "pooled=patches.mean(1) / (images.shape[2] % 8 == 0)")],
    ),
    (
        "backbones",
        "channels_may_be_other_than_three",
        "the last one does not matter",
        [("self.embed(images)", "self.embed(torch.cat([images[:, :-1], images[:, :1]], 1))")],
    ),
    (
        "backbones",
        "channels_may_be_other_than_three",
        "raises RuntimeError",
        [("if images.shape[1] != self.in_chans:", "if False:")],
    ),
    (
        "backbones",
        "weights_are_a_function_of_the_seed",
        "another seed gives the same",
        [
            (
                "    def forward",
                "        for weight in self.parameters():\n"
                "            nn.init.constant_(weight, 0.1)\n"
                "\n"
                "    def forward",
            )
        ],
    ),
    (
        "backbones",
        "weights_are_a_function_of_the_seed",
        "built twice .* differ",
        [
            (
                "    def forward",
                "        nn.init.normal_(self.embed.bias, generator=torch.Generator().manual_seed(id(self)))\n"
                "\n"
                "    def forward",
            )
        ],
    ),
    (
        "backbones",
        "evaluation_is_deterministic",
        "differ from call to call",
        [("pooled=patches.mean(1)", "pooled=patches.mean(1) + torch.rand(())")],
    ),
    (
        "backbones",
        "evaluation_is_deterministic",
        "changed calls",
        [
            ("        x = self.embed(images)", "        self.calls += 1\n        x = self.embed(images)"),
            ("        self.layers =", '        self.register_buffer("calls", torch.zeros(()))\n        self.layers ='),
        ],
    ),
    (
        "backbones",
        "images_do_not_affect_each_other",
        "depend on the others",
        [("pooled=patches.mean(1)", "pooled=patches.mean(1) - patches.mean((0, 1))")],
    ),
    (
        "backbones",
        "gradients_reach_every_parameter",
        "no gradient reaches idle",
        [("        self.layers =", "        self.idle = nn.Parameter(torch.zeros(3))\n        self.layers =")],
    ),
    (
        "backbones",
        "gradients_reach_every_parameter",
        "no gradient reaches embed.weight",
        [("self.layers(x.", "self.layers(x.detach().")],
    ),
    ("backbones", "every_parameter_has_a_layer", "raised KeyError", [('"layers": 1}', '"layer": 1}')]),
    ("backbones", "every_parameter_has_a_layer", "is 3; it must be 0 to depth", [('"layers": 1}', '"layers": 3}')]),
    ("backbones", "every_parameter_has_a_layer", "no parameter the layer", [('"layers": 1}', '"layers": 0}')]),
    (
        "backbones",
        "unsupported_options_are_refused",
        "is not refused",
        [("        self.refuse_options(keep, replace, attention, prefix_length, blocks)\n", "")],
    ),
    (
        "backbones",
        "crops_together_equal_one_after_another",
        "forward_crops gives",
        [
            (
                "    def layer_of",
                "    def forward_crops(self, batches):\n"
                "        return [self(images) for images, _ in reversed(batches)]\n"
                "\n"
                "    def layer_of",
            )
        ],
    ),
    ("backbones", "autocast_features_are_finite", "bfloat16, not float32", [(".to(self.embed.weight.dtype)", "")]),
    (
        "backbones",
        "weights_of_another_image_size_fit",
        "do not fit: place",
        [
            (
                "        self.layers =",
                "        self.place = nn.Parameter(torch.zeros(image_size[0] * image_size[1]))\n        self.layers =",
            )
        ],
    ),
    (
        "backbones",
        "export_is_bit_identical",
        "something is not in the state_dict",
        [
            ("        self.layers =", "        self.factor = torch.rand(())\n        self.layers ="),
            ("pooled=patches.mean(1)", "pooled=patches.mean(1) * self.factor"),
        ],
    ),
    # ---- Backbones whose mask units are several patches.
    (
        "units",
        "attributes_are_set",
        "no whole number of patches",
        [("2 * self.stride[0], 2 *", "3 * self.stride[0] // 2, 2 *")],
    ),
    ("units", "attributes_are_set", "token_dim is", [("return self.config.inner", "return None")]),
    (
        "units",
        "kept_patches_are_all_that_is_seen",
        "patches with keep of 3 units are",
        [
            (
                "index = patches_of(units, self, grid)",
                "index = patches_of(units, self, grid)[:, : -4 if keep is not None and keep.shape[1] < 6 else None]",
            )
        ],
    ),
    (
        "units",
        "kept_patches_are_all_that_is_seen",
        "gives other patches",
        [("units = every if keep is None else keep", "units = every if keep is None else keep.sort(1).values")],
    ),
    (
        "units",
        "replaced_patches_are_not_seen",
        "depend on pixels of masked patches",
        [("mask_of_patches(mask, self, grid)", "mask_of_patches(mask.roll(1, 1), self, grid)")],
    ),
    (
        "units",
        "invisible_units_have_no_influence",
        "with every unit visible",
        [("visible.to(x.dtype)", "visible.to(x.dtype) / 2")],
    ),
    (
        "units",
        "invisible_units_have_no_influence",
        "depend on pixels of units that are not visible",
        [("x = self.within(x) * there[:, :, None, None]", "x = self.within(x)")],
    ),
    (
        "units",
        "invisible_units_have_no_influence",
        "are not 0",
        [("self.across(seen).tanh()) * there[:, :, None, None]", "self.across(seen).tanh())")],
    ),
    (
        "units",
        "maps_are_a_pyramid",
        "with keep a map has the shape",
        [("unflatten(2, (-1, 2))", "unflatten(2, (2, -1))")],
    ),
    # ---- Evaluators.
    (
        "evaluators",
        "module_has_its_parts",
        "it must take task, config",
        [("def evaluate(task, config)", "def evaluate(task, config, more=None)")],
    ),
    ("evaluators", "module_has_its_parts", "BASELINES is", [('("random", "pixels")', '("random", "pixel")')]),
    (
        "evaluators",
        "knobs_are_explained_and_read",
        "images has no help",
        [('    """Training images of each class that its mean is of; drawn by the seed."""\n', "")],
    ),
    (
        "evaluators",
        "knobs_are_explained_and_read",
        "seed has the name of another flag",
        [("images: int", "seed: int"), ("config.images", "config.seed")],
    ),
    (
        "evaluators",
        "run_writes_a_result",
        "raises ValueError: Out of range float",
        [("float(distance.min(1).mean())", 'float("nan")')],
    ),
    (
        "evaluators",
        "numbers_are_finite",
        "metrics has no n",
        [('    metrics["distance"]', '    metrics["n"] = 0\n    metrics["distance"]')],
    ),
    (
        "evaluators",
        "protocol_says_what_was_measured",
        "does not say 'precision'",
        [("    return Outcome", '    del protocol["precision"]\n    return Outcome')],
    ),
    (
        "evaluators",
        "protocol_says_what_was_measured",
        "the protocol's seed is 0",
        [("**task.protocol(train, test),", '**task.protocol(train, test), "seed": 0,')],
    ),
    (
        "evaluators",
        "unreadable_images_are_listed",
        "the protocol lists",
        [("    return Outcome", '    protocol["test"]["bad"] = []\n    return Outcome')],
    ),
    (
        "evaluators",
        "weights_are_not_changed",
        "changed the weights",
        [("    train, test =", "    next(task.encoder.parameters()).data += 1\n    train, test =")],
    ),
    (
        "evaluators",
        "same_seed_gives_the_same_numbers",
        "gave another metrics: distance",
        [("default_rng(task.seed)", "default_rng()"), ("images: int = 6", "images: int = 2")],
    ),
    (
        "evaluators",
        "protocol_tells_runs_apart",
        "--images 7 changes the metrics .distance",
        [
            ('        "images": config.images,\n', ""),
            ('"headline": f"nearest mean of {config.images} images"', '"headline": "nearest mean"'),
        ],
    ),
    (
        "evaluators",
        "helping_process_leaves",
        "evaluates to the end",
        [("task.features((", "dataclasses.replace(task, helps=False).features((")],
    ),
    # ---- Sources.
    ("sources", "class_is_final", "must be @final", [("@final\n", "")]),
    (
        "sources",
        "example_can_be_opened",
        "has no example",
        [("    def example(cls, folder):", "    def an_example(cls, folder):")],
    ),
    ("sources", "example_can_be_opened", "not one line", [('f"{len(self)} bands"', '""')]),
    (
        "sources",
        "splits_are_parts_of_the_whole",
        "words in lower case",
        [('return ["train", "val"]', 'return ["Train", "val"]')],
    ),
    ("sources", "splits_are_parts_of_the_whole", "has other bytes", [("default_rng([number,", "default_rng([index,")]),
    (
        "sources",
        "splits_are_parts_of_the_whole",
        "has another label",
        [("np.arange(len(self)) % self.count % 2", "np.arange(len(self)) // 3 % 2")],
    ),
    ("sources", "names_are_unique", "have the same name", [('return f"{split}:{number}"', 'return f"{number}"')]),
    ("sources", "items_are_images", "not uint8", [(".astype(np.uint8)", ".astype(np.float32)")]),
    (
        "sources",
        "items_are_images",
        "is no image",
        [("        return (pixels", "        return bytes(64)\n        return (pixels")],
    ),
    ("sources", "labels_are_classes", "not int64", [("% self.count % 2,", "% self.count % 2.0,")]),
    ("sources", "labels_are_classes", "there are 1 class names", [('("dark", "bright")', '("dark",)')]),
    ("sources", "labels_are_classes", "same name", [('("dark", "bright")', '("dark", "dark")')]),
    (
        "sources",
        "index_outside_is_refused",
        "sample -1 of 8 is given",
        [("if not 0 <= index <", "if not -1 <= index <")],
    ),
    (
        "sources",
        "index_outside_is_refused",
        "raises ValueError",
        [("raise IndexError(index)", "raise ValueError(index)")],
    ),
    (
        "sources",
        "items_do_not_depend_on_the_order",
        "when it is read again",
        [('default_rng([number, split == "val"])', "default_rng()")],
    ),
    (
        "sources",
        "items_do_not_depend_on_the_order",
        "give a copy",
        [
            (
                "        return (pixels + 150 * (number % 2)).astype(np.uint8)",
                '        self.kept = getattr(self, "kept", {})\n'
                "        return self.kept.setdefault(index, (pixels + 150 * (number % 2)).astype(np.uint8))",
            )
        ],
    ),
    (
        "sources",
        "pickled_copy_is_the_same",
        "cannot be pickled",
        [('f"{len(self)} bands"', 'f"{len(self)} bands"\n        self.opened = lambda: None')],
    ),
    (
        "sources",
        "pickled_copy_is_the_same",
        "of a pickled copy is another one",
        [
            ("self.split, self.count =", "self.salt = id(self)\n        self.split, self.count ="),
            ("default_rng([number,", "default_rng([id(self) == self.salt, number,"),
        ],
    ),
    (
        "sources",
        "fingerprint_is_stable",
        "another fingerprint",
        [('self.fingerprint = f"', 'self.fingerprint = f"{hash(str(split)) & 0xFFFF:x}')],
    ),
    ("sources", "fingerprint_is_stable", "two splits have the same", [("{None: 0, 'train': 1, 'val': 2}[split]", "0")]),
    (
        "sources",
        "fingerprint_is_stable",
        "other names, labels or items",
        [("default_rng([number,", "default_rng([hash('a') & 0xFFFF, number,")],
    ),
    (
        "sources",
        "threads_read_the_same",
        "reading at once .* items are wrong",
        [
            (
                "        split, number = self._place(index)\n        pixels",
                "        self.at = index\n"
                "        time.sleep(1e-4)\n"
                "        split, number = self._place(self.at)\n"
                "        pixels",
            )
        ],
    ),
    (
        "sources",
        "forked_processes_read_the_same",
        "other bytes",
        [
            (
                "        split, number = self._place(index)\n        pixels",
                "        index = self._through_file(index)\n        split, number = self._place(index)\n        pixels",
            ),
            (
                "    def name",
                "    def _through_file(self, index):\n"
                '        if not hasattr(self, "file"):\n'
                '            self.file = os.memfd_create("numbers")\n'
                "            os.write(self.file, bytes(range(64)))\n"
                "        os.lseek(self.file, index, 0)\n"
                "        time.sleep(1e-4)\n"
                "        return os.read(self.file, 1)[0]\n"
                "\n"
                "    def name",
            ),
        ],
    ),
    (
        "sources",
        "loader_workers_give_the_same",
        "other batches",
        [("default_rng([number,", "default_rng([multiprocessing.parent_process() is None, number,")],
    ),
    # ---- Loggers.
    ("loggers", "class_is_final", "must be @final", [("@final\nclass Diary", "class Diary")]),
    (
        "loggers",
        "class_is_final",
        "needs server",
        [
            (
                "class Diary(Logger):",
                "class Diary(Logger):\n    def __init__(self, server):\n        self.server = server\n",
            )
        ],
    ),
    (
        "loggers",
        "calls_have_their_arguments",
        "picture takes self, name, image, step",
        [("def picture(self, name, pixels, step)", "def picture(self, name, image, step)")],
    ),
    (
        "loggers",
        "every_call_is_taken",
        "a number that is None, raises TypeError",
        [
            (
                '        self._write("metrics", line)',
                '        self._write("metrics", {k: v + 0 for k, v in line.items()})',
            )
        ],
    ),
    (
        "loggers",
        "continued_run_is_taken",
        "begin raises FileExistsError",
        [('        self._write("begin", config, step)', '        (out / "diary").mkdir()')],
    ),
    (
        "loggers",
        "run_that_fails_at_once_is_taken",
        "end raises AttributeError",
        [
            ('        self._write("end", state)', '        self._write("end", state, self.last)'),
            (
                '        self._write("metrics", line)',
                '        self.last = line\n        self._write("metrics", dict(line))',
            ),
        ],
    ),
    (
        "loggers",
        "no_thread_is_left_behind",
        "still at work",
        [('        self._write("begin", config, step)', "        threading.Timer(3, print).start()")],
    ),
    (
        "loggers",
        "run_is_not_changed",
        "metrics.jsonl is another one",
        [
            (
                '        self._write("metrics", line)',
                '        with open(self.out / "metrics.jsonl", "a") as file:\n'
                '            file.write(json.dumps({"step": line["step"], "mine": 1}) + "\\n'
                '")',
            )
        ],
    ),
]


@pytest.mark.parametrize(
    ("kind", "check", "said", "changes"),
    FAULTS,
    ids=[f"{kind}-{check}-{i}" for i, (kind, check, _, _) in enumerate(FAULTS)],
)
def test_a_fault_is_found_and_named(
    kind: str, check: str, said: str, changes: list[tuple[str, str]], installed: Callable
) -> None:
    with pytest.raises(Fault, match=said):
        installed(kind, *changes)[check]()


def patched(name: str, wrap: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Puts another method of ViT in the place of its own."""
    return lambda patch: patch.setattr(ViT, name, wrap(getattr(ViT, name)))


def without(option: str) -> Callable[[Any], Any]:
    """A forward that takes an option and does nothing about it."""
    return lambda own: lambda self, images, **options: own(self, images, **{**options, option: DEFAULTS[option]})


DEFAULTS: dict[str, Any] = {"keep": None, "replace": None, "attention": "full", "blocks": (), "prefix_length": None}


def blocks_sorted(own: Any) -> Any:
    """Blocks in their own order, whatever was asked for."""

    def forward(self: Any, images: Any, blocks: Any = (), **options: Any) -> Any:
        return own(self, images, blocks=tuple(sorted(block % self.depth for block in blocks)), **options)

    return forward


def kept_as_if_the_first(own: Any) -> Any:
    """Positions of the first K patches for whichever are kept."""

    def positioned(self: Any, x: Any, grid: Any, keep: Any) -> Any:
        return own(self, x, grid, None if keep is None else torch.arange(keep.shape[1]).expand_as(keep))

    return positioned


def mask_not_gathered(own: Any) -> Any:
    """With keep, the mask of replace is not the one of the kept patches."""

    def embedded(self: Any, images: Any, keep: Any, replace: Any) -> Any:
        if keep is not None and replace is not None:
            replace = None
        return own(self, images, keep, replace)

    return embedded


def one_later(own: Any) -> Any:
    return lambda self, parameter: min(own(self, parameter) + (parameter.startswith("blocks")), self.depth + 1)


def dropping_in_eval(own: Any) -> Any:
    def drop_path(self: Any, drops: Any, packed: Any = None) -> Any:
        if self.training:
            return own(self, drops, packed)
        self.training = True
        try:
            return own(self, [torch.ones(1, 2 * self.depth) if drop is None else drop for drop in drops], packed)
        finally:
            self.training = False

    return drop_path


def pooled_of_the_first(own: Any) -> Any:
    def forward(self: Any, images: Any, pooled_only: bool = False, **options: Any) -> Any:
        found = own(self, images, pooled_only=pooled_only, **options)
        found.pooled = found.patches[:, 0] if pooled_only and found.patches.shape[1] else found.pooled
        return found

    return forward


def causal_one_too_far(own: Any) -> Any:
    def mask(self: Any, attention: Any, prefix_length: Any, length: int) -> Any:
        if isinstance(attention, str) and attention == "causal":
            return torch.ones(1, 1, length, length, dtype=torch.bool).tril(1), False
        return own(self, attention, prefix_length, length)

    return mask


def not_copied(own: Any) -> Any:
    """A table that is no part of the state."""

    def forward(self: Any, images: Any, **options: Any) -> Any:
        found = own(self, images, **options)
        if not hasattr(self, "drift"):
            self.drift = torch.rand(())
        found.pooled = found.pooled + self.drift
        return found

    return forward


def maps_of_kept_patches(own: Any) -> Any:
    return lambda self, images, keep=None, maps=False, **options: own(
        self, images, keep=None if maps else keep, maps=maps, **options
    )


def of_maps(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A forward that changes every map."""

    def wrap(own: Any) -> Any:
        def forward(self: Any, images: Any, **options: Any) -> Any:
            found = own(self, images, **options)
            return dataclasses.replace(found, maps=tuple(map(change, found.maps)))

        return forward

    return wrap


maps_upside_down = of_maps(lambda x: x.flip(2, 3))
maps_transposed = of_maps(lambda x: x.mT)


def maps_always(own: Any) -> Any:
    return lambda self, images, **options: own(self, images, **{**options, "maps": options.get("keep") is None})


def of_attention(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A forward that changes the attention of every block."""

    def wrap(own: Any) -> Any:
        def forward(self: Any, images: Any, **options: Any) -> Any:
            found = own(self, images, **options)
            return dataclasses.replace(found, attention=tuple(map(change, found.attention)))

        return forward

    return wrap


def attention_sorted(own: Any) -> Any:
    return lambda self, images, attention_of=(), **options: own(
        self, images, attention_of=tuple(sorted(i % self.depth for i in attention_of)), **options
    )


def attention_of_no_mask(own: Any) -> Any:
    """The attention of a block as if nothing were masked."""
    return lambda self, images, attention_of=(), attention="full", **options: own(
        self, images, attention_of=attention_of, attention="full" if attention_of else attention, **options
    )


OF_OPTIONS = [
    ("kept_patches_are_all_that_is_seen", "keep", patched("forward", without("keep"))),
    ("kept_patches_are_all_that_is_seen", "in another order", patched("_positioned", kept_as_if_the_first)),
    ("replaced_patches_are_not_seen", "pixels of masked patches", patched("forward", without("replace"))),
    ("replaced_patches_are_not_seen", "the mask of replace .* is not used", patched("_embedded", mask_not_gathered)),
    ("attention_is_what_was_asked_for", "a later one", patched("forward", without("attention"))),
    ("attention_is_what_was_asked_for", "'causal' gives other", patched("_mask", causal_one_too_far)),
    ("blocks_are_those_asked_for", "0 outputs of 2", patched("forward", without("blocks"))),
    ("blocks_are_those_asked_for", "in another order", patched("forward", blocks_sorted)),
    ("attention_maps_are_those_asked_for", "no distribution", patched("forward", of_attention(lambda x: x.mT))),
    ("attention_maps_are_those_asked_for", "the shape", patched("forward", of_attention(lambda x: x.mean(1)))),
    ("attention_maps_are_those_asked_for", "in another order", patched("forward", attention_sorted)),
    ("attention_maps_are_those_asked_for", "on a later key", patched("forward", attention_of_no_mask)),
    ("layers_are_in_order", "changes the output of block 0", patched("layer_of", one_later)),
    ("drop_path_follows_its_noise", "is not refused", patched("_drop_path", lambda own: lambda *given: ([], []))),
    ("drop_path_follows_its_noise", "in eval mode drop path drops", patched("_drop_path", dropping_in_eval)),
    ("pooled_only_changes_nothing_pooled", "changes the pooled", patched("forward", pooled_of_the_first)),
    ("maps_are_a_pyramid", "with keep a map has the shape", patched("forward", maps_of_kept_patches)),
    ("maps_are_a_pyramid", "changes elsewhere", patched("forward", maps_upside_down)),
    ("maps_are_a_pyramid", "has the shape", patched("forward", maps_transposed)),
    ("maps_are_a_pyramid", "maps without the option", patched("forward", maps_always)),
    ("export_is_bit_identical", "not in the state_dict", patched("forward", not_copied)),
]


@pytest.mark.parametrize(("check", "said", "fault"), OF_OPTIONS, ids=[check for check, _, _ in OF_OPTIONS])
def test_a_fault_of_an_option_is_found(
    check: str, said: str, fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checks("backbones", "vit_tiny")[check]
    fault(monkeypatch)
    with pytest.raises(Fault, match=said):
        found()


def test_a_loop_that_gives_no_plain_data_or_keeps_a_broken_logger_is_found(
    installed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = installed("loggers")
    with monkeypatch.context() as patch:
        own = Report.scores
        patch.setattr(Report, "scores", lambda self, group, values, step: own(self, group, {"x": float("nan")}, step))
        with pytest.raises(Fault, match="no plain data"):
            found["run_calls_it_in_order_with_plain_data"]()
    with monkeypatch.context() as patch:
        make = LoggerThread.call

        def keep(self: LoggerThread, call: Any, size: int = 0) -> None:
            def without_errors(logger: Any) -> None:
                with contextlib.suppress(RuntimeError):
                    call(logger)

            make(self, without_errors, size)

        patch.setattr(LoggerThread, "call", keep)
        with pytest.raises(Fault, match="a logger that raised was called 3 times"):
            found["run_survives_its_failure"]()
