"""What every logger keeps to (`loggers.Logger`): on its own, and in a run of six steps that it must not change.

A logger that talks to a server does so here, too: set what makes it stay offline.
"""

import contextlib
import copy
import importlib
import inspect
import io
import json
import threading
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .. import loggers, plugins
from ..checkpoint import newest
from ..files import read_lines
from ..loggers import Logger
from . import Fault
from ._common import expect, own_folder, with_cache

STEPS = 6
# What says how fast a run was, and where it is: it differs from run to run.
TIMED = frozenset({"time", "images_per_s", "data_wait", "checkpoint_wait"})
PLACED = frozenset({"out", "loggers"})
RUN = (
    f"--method mae --data fractals:classes=3,images=24,size=16 --steps {STEPS} --log-every 2 --monitor-every 3 "
    "--picture-every 4 --val-images 4 --val-every 3 --workers 0 --no-score --precision fp32 --encoder vit_micro --dim 32 "
    "--heads 2 --depth 2 --image-size 16 --patch-size 8 --batch-size 8 --decoder-dim 16 --decoder-depth 1 "
    "--decoder-heads 2"
).split()
CALLS = ("begin", "metrics", "scores", "picture", "warning", "end")


def names() -> list[str]:
    """The loggers: ours and those of other packages."""
    return plugins.names(loggers.GROUP)


def checks(name: str) -> list[Callable[[], None]]:
    """The checks of the logger `name`."""
    one = _Checks(name)
    every = [
        one.class_is_final,
        one.calls_have_their_arguments,
        one.every_call_is_taken,
        one.continued_run_is_taken,
        one.run_that_fails_at_once_is_taken,
        one.no_thread_is_left_behind,
        one.run_calls_it_in_order_with_plain_data,
        one.run_is_not_changed,
        one.run_survives_its_failure,
    ]
    return with_cache(lambda: one.folder, every)


class _Checks:
    """The checks, and what several of them need."""

    def __init__(self, name: str) -> None:
        self.name = name

    # ---- What is checked.

    @cached_property
    def kind(self) -> Any:
        """The class."""
        return loggers.load(self.name)

    @cached_property
    def folder(self) -> Path:
        """A place for run folders; gone with the checks."""
        return own_folder(self)

    def run(self, out: str, *names: str) -> Path:
        """A run that logs to these; its folder."""
        command = importlib.import_module("ssl_pretrain.launch.pretrain")
        said = io.StringIO()
        argv = [*RUN, "--out", str(self.folder / out), "--logger", *names]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = command.main(argv, placed=True)
        expect(code == 0, f"a run that logs to {', '.join(names)} ends with {code}: {said.getvalue().strip()[-1000:]}")
        return self.folder / out

    # ---- The checks.

    def class_is_final(self) -> None:
        """One final subclass of Logger, made without arguments."""
        expect(self.kind.__mro__[1] is Logger, f"{self.kind.__name__} must derive from Logger and nothing else")
        expect(getattr(self.kind, "__final__", False), f"{self.kind.__name__} must be @final")
        arguments = inspect.signature(self.kind).parameters.values()
        free = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        needed = [each.name for each in arguments if each.default is each.empty and each.kind not in free]
        expect(not needed, f"{self.kind.__name__}() needs {', '.join(needed)}; it is made without arguments")

    def calls_have_their_arguments(self) -> None:
        """Every method takes what Logger says, under the same names."""
        for call in CALLS:
            own, wanted = (list(inspect.signature(getattr(kind, call)).parameters) for kind in (self.kind, Logger))
            expect(own == wanted, f"{call} takes {', '.join(own)}; it must take {', '.join(wanted)}")

    def every_call_is_taken(self) -> None:
        """All calls, with what may be in them: numbers that are None, names with a slash, a picture of one pixel."""
        with self._told("calls", 0) as logger:
            line = {"step": 2, "loss": 0.5, "grad_norm": None, "skipped": 0, "time": 1e9}
            _call("metrics, with a number that is None,", lambda: logger.metrics(line))
            _call("scores", lambda: logger.scores("features", {"feature_rank": 3.5, "müon": 1.0}, 2))
            for size in ((1, 1), (6, 16)):
                pixels = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size, 3)
                _call(f"picture of {size[0]} x {size[1]}", partial(logger.picture, "a | b", pixels, 2))
            _call("warning", lambda: logger.warning('step 2: "not finite"\nin two lines, 100 %'))
            _call("metrics after a warning", lambda: logger.metrics({"step": 4, "loss": None}))

    def continued_run_is_taken(self) -> None:
        """Another start in the same folder, before what the first one logged."""
        for step in (0, 4):
            with self._told("continued", step) as logger:
                for later in (step + 2, step + 4, step + 6):
                    line = {"step": later, "loss": 1.0}
                    _call(f"metrics of a start at step {step}", partial(logger.metrics, line))

    def run_that_fails_at_once_is_taken(self) -> None:
        """`end` right behind `begin`."""
        with self._told("failed", 0, state="failed: the disk is full"):
            pass

    def no_thread_is_left_behind(self) -> None:
        """Behind `end` nothing is at work that would keep the process from ending."""
        before = set(threading.enumerate())
        with self._told("threads", 0) as logger:
            logger.metrics({"step": 2, "loss": 1.0})
        left = [thread.name for thread in set(threading.enumerate()) - before if not thread.daemon]
        expect(not left, f"behind end its threads are still at work: {', '.join(left)}")

    @contextlib.contextmanager
    def _told(self, folder: str, step: int, state: str = "finished") -> Iterator[Logger]:
        """A logger between `begin` and `end` in a run folder."""
        out = self.folder / folder
        out.mkdir(exist_ok=True)
        logger = self.kind()
        config = {
            "method": "mae",
            "data": "photos",
            "lr": 1e-3,
            "image_size": [32, 32],
            "init_from": None,
            "score": True,
        }
        _call("begin", lambda: logger.begin(out, config, step))
        yield logger
        _call("end", lambda: logger.end(state))

    def run_calls_it_in_order_with_plain_data(self) -> None:
        """A real run: `begin`, then the rest by rising step, then `end`; numbers and words, no tensors."""
        calls = self._recorded
        order = [call for call, _ in calls if call != "warning"]
        expect(order[:1] == ["begin"] and order[-1:] == ["end"], f"the calls of a run are {', '.join(order)}")
        expect(order.count("begin") == 1 == order.count("end"), f"the calls of a run are {', '.join(order)}")
        expect(order.count("metrics") == STEPS // 2, f"{order.count('metrics')} lines of {STEPS} steps, one every 2")
        expect({"scores", "picture"} <= set(order), f"a run called nothing but {', '.join(sorted(set(order)))}")
        steps = [_step(call, given) for call, given in calls if call in ("metrics", "scores", "picture")]
        expect(steps == sorted(steps), f"the steps of a run's calls are {steps}")
        for call, given in calls:
            if call == "picture":
                pixels = given["pixels"]
                fits = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[2:] == (3,)
                expect(fits, "a picture is no array (H, W, 3) uint8")
                continue
            plain = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
            try:
                same = json.loads(json.dumps(plain, allow_nan=False)) == plain
            except (TypeError, ValueError) as problem:
                raise Fault(f"{call} gets what is no plain data: {problem}") from problem
            expect(same, f"{call} gets what is no plain data: {plain}")
        state = calls[-1][1]["state"]
        expect(state == "finished", f"end of a run that came to its end gets {state!r}")

    @cached_property
    def _recorded(self) -> list[tuple[str, dict[str, Any]]]:
        """The calls of a run that logs to it."""
        calls: list[tuple[str, dict[str, Any]]] = []

        def recorded(call: str, original: Any) -> Any:
            def method(*given: Any, **named: Any) -> None:
                bound = inspect.signature(original).bind(*given, **named).arguments
                calls.append((call, copy.deepcopy({name: value for name, value in bound.items() if name != "self"})))
                original(*given, **named)

            return method

        with _patched(self.kind, {call: recorded(call, getattr(self.kind, call)) for call in CALLS}):
            self.run("with", self.name)
        return calls

    def run_is_not_changed(self) -> None:
        """metrics.jsonl, weights and flags are those of a run that logs to nothing."""
        assert self._recorded
        with _patched(self.kind, dict.fromkeys(CALLS, _nothing)):
            plain = self.run("plain", self.name)
        told = self.folder / "with"
        one, other = (
            [
                {key: value for key, value in line.items() if key not in TIMED}
                for line in read_lines(out / "metrics.jsonl")
            ]
            for out in (plain, told)
        )
        expect(one == other, "metrics.jsonl is another one with the logger than without, times apart")
        configs = [yaml.safe_load((out / "config.yaml").read_text()) for out in (plain, told)]
        changed = [key for key in configs[0] if configs[0][key] != configs[1].get(key) and key not in PLACED]
        expect(not changed, f"config.yaml is another one with the logger: {', '.join(changed)}")
        for out in (plain, told):
            expect(newest(out / "checkpoints") == STEPS, f"the run ended at step {newest(out / 'checkpoints')}")
        for path in sorted(plain.rglob("*.safetensors")):
            same = path.read_bytes() == (told / path.relative_to(plain)).read_bytes()
            expect(same, f"{path.name} is another one with the logger than without")
        expect(not (told / "warnings.log").exists() or self.name not in (told / "warnings.log").read_text(),
               f"it failed in a run: {_read(told / 'warnings.log')}")  # fmt: skip

    def run_survives_its_failure(self) -> None:
        """Where it raises, the run goes on, says so once, and calls it no more."""
        calls = 0

        def broken(self: Any, line: dict[str, Any]) -> None:
            nonlocal calls
            calls += 1
            raise RuntimeError("no answer from the server")

        with _patched(self.kind, {"metrics": broken}):
            out = self.run("broken", self.name)
        said = _read(out / "warnings.log")
        expect(calls == 1, f"a logger that raised was called {calls} times")
        expect(said.count("no answer from the server") == 1, f"the warnings of a run whose logger raised: {said}")
        expect(
            len(read_lines(out / "metrics.jsonl")) > STEPS // 2, "a run whose logger raised lost lines of metrics.jsonl"
        )


def _call(what: str, call: Callable[[], None]) -> None:
    try:
        call()
    except Exception as problem:
        raise Fault(f"{what} raises {type(problem).__name__}: {problem}") from problem


def _step(call: str, given: dict[str, Any]) -> int:
    return given["line"]["step"] if call == "metrics" else given["step"]


def _nothing(*given: Any, **named: Any) -> None:
    """What a logger does that does nothing."""


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def _patched(kind: Any, methods: dict[str, Any]) -> Iterator[None]:
    """With other methods of a class."""
    own = {name: vars(kind)[name] for name in methods if name in vars(kind)}
    for name, method in methods.items():
        setattr(kind, name, method)
    try:
        yield
    finally:
        for name in methods:
            if name in own:
                setattr(kind, name, own[name])
            else:
                delattr(kind, name)
