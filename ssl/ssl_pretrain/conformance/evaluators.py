"""What every evaluator keeps to: a module of `ssl_pretrain.eval`, or another package's, run by the real command on a few
small pictures in three classes (or, where its IMAGES are "masks", on pictures with masks), a vit_micro of random weights.

An evaluator that needs more flags than its defaults, or minutes with them, has a function `example(data: Path) ->
list[str]`: the flags of a run of seconds on the pictures in `data`, beside which it may write files.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import io
import json
import math
import sys
import typing
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from .. import backbones, encoder, plugins
from ..data.source import open_source
from ..encoder import Encoder, Preprocessing
from ..errors import UserError
from . import Fault
from ._common import check_config, expect, own_folder, picture, with_cache

GROUP = "ssl_pretrain.eval"
BASELINES = ("random", "pixels")
IMAGES = (None, "test", "everything", "pair", "masks")
TRAIN, TEST = 8, 4  # pictures of each class
SEED = 3
PROTOCOL = ("headline", "data", "test", "classes", "preprocessing", "encoder_fingerprint", "precision", "seed")


def names() -> list[str]:
    """The evaluators: ours and those of other packages."""
    return plugins.names(GROUP)


def checks(name: str) -> list[Callable[[], None]]:
    """The checks of the evaluator `name`."""
    one = _Checks(name)
    every = [
        one.module_has_its_parts,
        one.knobs_are_explained_and_read,
        one.run_writes_a_result,
        one.numbers_are_finite,
        one.protocol_says_what_was_measured,
        one.unreadable_images_are_listed,
        one.baselines_are_those_declared,
        one.weights_are_not_changed,
        one.same_seed_gives_the_same_numbers,
        one.protocol_tells_runs_apart,
        one.helping_process_leaves,
    ]
    return with_cache(lambda: one.folder, every)


class _Checks:
    """The checks, and what several of them need."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._seen: list[tuple[Any, Any, str, str]] = []  # task, config, its encoder's fingerprint before and after

    # ---- What is checked, and on what.

    @cached_property
    def evaluator(self) -> Any:
        """The module."""
        return plugins.load(GROUP, self.name, "evaluator")

    @cached_property
    def folder(self) -> Path:
        """A place for everything; gone with the checks."""
        return own_folder(self)

    @cached_property
    def data(self) -> Path:
        """The images: train/ and val/, with a folder a class, or with a mask beside each."""
        data, masks = self.folder / "pictures", getattr(self.evaluator, "IMAGES", None) == "masks"
        for split, count in (("train", TRAIN), ("val", TEST)):
            for label in range(3):
                folder = data / split if masks else data / split / f"class{label}"
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    made = picture(label, i + (100 if split == "val" else 0), (32, 48))
                    made.save(folder / (f"{label}-{i}.jpg" if masks else f"{i}.png"))
                    if masks:
                        regions = np.random.default_rng([label, i]).integers(0, 3, (2, 3)).astype(np.uint8)
                        Image.fromarray(regions.repeat(16, 0).repeat(16, 1)).save(folder / f"{label}-{i}.png")
            if not masks:
                (data / split / "class0" / "broken.png").write_bytes(b"no image at all")
        return data

    @cached_property
    def encoder(self) -> Path:
        """The folder of the encoder."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = {"dim": 32, "heads": 2, "depth": 4, "patch_size": 8}
            backbone = backbones.build("vit_micro", image_size=(32, 32), **small)
        preprocessing = Preprocessing.for_size((32, 32), (0.5,) * 3, (0.25,) * 3)
        path = self.folder / "encoder"
        encoder.save(path, Encoder(backbone, "vit_micro", preprocessing, {"method": "conformance"}))
        return path

    @cached_property
    def example(self) -> list[str]:
        """The flags that the evaluator asks for."""
        make = getattr(self.evaluator, "example", None)
        return [] if make is None else [str(word) for word in make(self.data)]

    def run(self, out: str, *flags: str) -> dict[str, Any]:
        """Run the command in this process; what it wrote."""
        command = importlib.import_module("ssl_pretrain.launch.evaluate")
        folder, said = self.folder / out, io.StringIO()
        paths = {"--encoder": self.encoder, "--data": self.data, "--out": folder}
        argv = [self.name, *(str(word) for pair in paths.items() for word in pair), "--workers", "0", "--device", "cpu"]
        argv += ["--seed", str(SEED), *self.example, *flags]
        with self._watched(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                code = command.main(argv, placed=True)
            except Exception as problem:
                raise Fault(f"ssl-eval {' '.join(argv)} raises {type(problem).__name__}: {problem}") from problem
        if code == 2 and flags:
            raise UserError(said.getvalue())
        expect(code == 0, f"ssl-eval {' '.join(argv)} ends with {code}: {said.getvalue().strip()}")
        path = folder / "results.json"
        expect(path.is_file(), f"ssl-eval {self.name} wrote no results.json")
        return json.loads(path.read_text(), parse_constant=_no_json)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """With note of what the evaluator was given and left behind."""
        original = self.evaluator.evaluate

        def evaluate(task: Any, config: Any) -> Any:
            before = task.encoder.fingerprint
            try:
                return original(task, config)
            finally:
                self._seen.append((task, config, before, task.encoder.fingerprint))

        self.evaluator.evaluate = evaluate
        try:
            yield
        finally:
            self.evaluator.evaluate = original

    @cached_property
    def first(self) -> dict[str, Any]:
        """What the first run wrote."""
        return self.run("first")

    # ---- The checks.

    def module_has_its_parts(self) -> None:
        """`Config`, `evaluate(task, config)`, and what it says of itself."""
        module = self.evaluator
        expect(bool(getattr(module, "__doc__", None)), "it has no docstring, whose first paragraph is its --help")
        for part in ("Config", "evaluate"):
            expect(hasattr(module, part), f"it has no {part}")
        parameters = list(inspect.signature(module.evaluate).parameters)
        expect(parameters == ["task", "config"], f"evaluate takes {', '.join(parameters)}; it must take task, config")
        kinds = getattr(module, "BASELINES", ())
        expect(set(kinds) <= set(BASELINES), f"BASELINES is {kinds!r}; they must be among {', '.join(BASELINES)}")
        images = getattr(module, "IMAGES", None)
        expect(images in IMAGES, f"IMAGES is {images!r}; it must be one of {', '.join(map(str, IMAGES))}")
        if images == "masks":
            expect(hasattr(module, "open_data"), 'its IMAGES are "masks", and it has no open_data to open them')
        for protocol, knobs in getattr(module, "PROTOCOLS", {}).items():
            unknown = set(knobs) - {field.name for field in dataclasses.fields(module.Config)}
            expect(not unknown, f"PROTOCOLS[{protocol!r}] sets {', '.join(sorted(unknown))}, which its Config lacks")

    def knobs_are_explained_and_read(self) -> None:
        """Each knob is a flag with help, and changes something."""
        parts = ("ssl_pretrain.eval._evaluation", "Options"), ("ssl_pretrain.launch.options", "Launch")
        kinds = [getattr(importlib.import_module(module), kind) for module, kind in parts]
        taken = {field.name for kind in kinds for field in dataclasses.fields(kind)}
        module = self.evaluator
        module = module if isinstance(module, ModuleType) else sys.modules[module.__module__]
        check_config(self.evaluator.Config, f"{self.name}'s Config", module, taken)

    def run_writes_a_result(self) -> None:
        """The command ends well and writes strict JSON with all its parts."""
        keys = {"evaluator", "metrics", "protocol", "baselines", "encoder", "seconds", "all"}
        expect(set(self.first) == keys, f"results.json has the keys {sorted(self.first)}, not {sorted(keys)}")
        expect(self.first["evaluator"] == self.name, f"results.json is of the evaluator {self.first['evaluator']!r}")

    def numbers_are_finite(self) -> None:
        """The metrics hold numbers, all finite, and how many images they are of."""
        metrics = self.first["metrics"]
        expect(isinstance(metrics.get("n"), int) and metrics["n"] > 0, "metrics has no n, the number of images")
        for path, value in _leaves(metrics):
            if isinstance(value, float):
                expect(math.isfinite(value), f"metrics: {path} is {value}")
        for i, entry in enumerate(self.first["all"]):
            expect(isinstance(entry, dict), f"all[{i}] is no mapping of settings and scores")

    def protocol_says_what_was_measured(self) -> None:
        """The data, the encoder, the seed, and how the headline was chosen."""
        protocol = self.first["protocol"]
        for key in PROTOCOL:
            expect(key in protocol, f"the protocol does not say {key!r}; Task.protocol gives most of it")
        expect(protocol["data"] == str(self.data), f"the protocol's data is {protocol['data']!r}")
        expect(protocol["seed"] == SEED, f"the protocol's seed is {protocol['seed']}, the flag's {SEED}")
        loaded = encoder.load(self.encoder).fingerprint
        expect(protocol["encoder_fingerprint"] == loaded, "the protocol's encoder_fingerprint is not the encoder's")
        expect(bool(protocol["headline"]), "the protocol's headline is empty")
        if len(self.first["all"]) > 1:
            expect("all_scored_on" in protocol, "several settings were tried: the protocol must say all_scored_on")
        if getattr(self.evaluator, "IMAGES", None) == "masks":
            return
        for side in ("train", "test"):
            if side in protocol and (split := protocol[side]["split"]) in ("train", "val"):
                source = open_source(str(self.data), split)
                expect(
                    protocol[side]["fingerprint"] == source.fingerprint,
                    f"the protocol's {side} data is not split {split}",
                )

    def unreadable_images_are_listed(self) -> None:
        """One broken file in each split ends nothing, and is in the protocol."""
        if getattr(self.evaluator, "IMAGES", None) == "masks":
            return
        for side in ("train", "test"):
            if side in self.first["protocol"]:
                found = [Path(bad["name"]).name for bad in self.first["protocol"][side]["bad"]]
                whole = self.first["protocol"][side]["split"] not in ("train", "val")
                expect(
                    found == ["broken.png"] * (2 if whole else 1),
                    f"the {side} images hold one broken file a split; the protocol lists {found}",
                )

    def baselines_are_those_declared(self) -> None:
        """Each of BASELINES is measured as the encoder is."""
        found, declared = set(self.first["baselines"]) - {"majority"}, set(getattr(self.evaluator, "BASELINES", ()))
        expect(found == declared, f"results.json has the baselines {sorted(found)}, BASELINES are {sorted(declared)}")
        for baseline in declared:
            expect("headline" in self.first["baselines"][baseline], f"the baseline {baseline} has no headline")

    def weights_are_not_changed(self) -> None:
        """The encoder has the same weights behind it, in memory and on the disk."""
        hashes = [_hash(self.encoder)]
        self.run("weights", "--no-baselines", "--no-cache")
        hashes.append(_hash(self.encoder))
        _, _, before, after = self._seen[-1]
        expect(before == after, "evaluate changed the weights of task.encoder: work on a copy")
        expect(hashes[0] == hashes[1], "the evaluator changed the files of the encoder")

    def same_seed_gives_the_same_numbers(self) -> None:
        """Twice the same command, with and without kept features, gives the same result."""
        again = self.run("again", "--no-cache")
        for part in ("metrics", "protocol", "baselines", "all"):
            path = _difference(self.first[part], again[part])
            expect(path is None, f"the same command gave another {part}: {path}")

    def protocol_tells_runs_apart(self) -> None:
        """Two results of the same protocol have the same numbers: every knob that changes them is in the protocol."""
        plain = self.run("plain", "--no-baselines")
        hints = typing.get_type_hints(self.evaluator.Config)
        config = self._seen[-1][1]
        said = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        named = {key for key, value in _keys(plain["protocol"]) if key in said and value == said[key]}
        for field in dataclasses.fields(self.evaluator.Config):
            if field.name in named:
                continue
            for words in _others(getattr(config, field.name), hints[field.name]):
                flag = "--" + field.name.replace("_", "-")
                argv = [flag, *words.split()]
                if words in ("true", "false"):
                    argv = [flag if words == "true" else f"--no-{flag[2:]}"]
                try:
                    other = self.run("other", "--no-baselines", *argv)
                except UserError:
                    continue
                same = _difference(plain["protocol"], other["protocol"]) is None
                path = _difference(*(_headline(found["metrics"]) for found in (plain, other)), both=True)
                expect(
                    not same or path is None,
                    f"{' '.join(argv)} changes the metrics ({path}), and the protocol says nothing of it",
                )
                break

    def helping_process_leaves(self) -> None:
        """One that says SHARED leaves by `Helped` where it only helps, and has written nothing."""
        if not getattr(self.evaluator, "SHARED", False):
            return
        assert self.first
        helped = importlib.import_module("ssl_pretrain.eval._task").Helped
        task, config, *_ = self._seen[0]
        folder = self.folder / "helped"
        folder.mkdir(exist_ok=True)
        with self._watched():
            try:
                self.evaluator.evaluate(dataclasses.replace(task, helps=True, out=folder, progress=None), config)
            except helped:
                pass
            else:
                raise Fault(
                    "it says SHARED, and evaluates to the end where task.helps: ask for features by Task.features"
                )
        expect(not any(folder.iterdir()), "a process that only helps wrote files")


def _no_json(word: str) -> None:
    raise Fault(f"results.json holds {word}, which is no JSON: null stands for what is not finite")


def _headline(metrics: dict[str, Any]) -> dict[str, Any]:
    """The numbers at the top of the metrics; lists below say themselves what each is of."""
    return {key: value for key, value in metrics.items() if isinstance(value, float | int)}


def _hash(folder: Path) -> str:
    """Of the files of an export."""
    digest = hashlib.blake2b()
    for name in ("config.json", "model.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each number, string, ... of JSON data, with where it is."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{i}]")
    else:
        yield path, value


def _keys(value: Any) -> Iterator[tuple[str, Any]]:
    """Each key of JSON data, at any depth, with its value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


def _difference(one: Any, other: Any, *, both: bool = False) -> str | None:
    """Where two pieces of JSON data differ first, and how; None where they do not. both: by more than rounding, in what
    both have."""
    a, b = dict(_leaves(one)), dict(_leaves(other))
    for path in [path for path in a if path in b] if both else [*a, *(path for path in b if path not in a)]:
        in_one, in_other = a.get(path, "missing"), b.get(path, "missing")
        numbers = isinstance(in_one, float) and isinstance(in_other, float)
        rounding = both and numbers and math.isclose(in_one, in_other, rel_tol=1e-6, abs_tol=1e-9)
        if in_one != in_other and not rounding:
            return f"{path}: {in_one} and {in_other}"
    return None


def _others(value: Any, hint: Any) -> Iterator[str]:
    """Other values that a knob may have, as words of a command line; "true" and "false" of a bool."""
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    origin = typing.get_origin(hint)
    if hint is bool:
        yield "false" if value else "true"
    elif origin is Literal:
        yield from (str(option) for option in kinds if option != value)
    elif origin is tuple and value:
        inner = kinds[0]
        if len(value) > 1 and kinds[-1] is Ellipsis:
            yield " ".join(map(str, value[1:]))
        for other in _others(value[0], inner):
            yield " ".join([other, *map(str, value[1:])])
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int):
        yield from (str(other) for other in (value + 1, value - 1, value // 2) if other > 0)
    elif isinstance(value, float):
        yield from (str(other) for other in (value / 2, value * 2, value + 0.1))
