"""A small instance of a method and one step of it, in this process or as one of several.

python -m ssl_pretrain.conformance.one_step        (what TwoProcesses starts)
"""

import atexit
import dataclasses
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .. import backbones, checkpoint, distributed, encoder, pretext, tokenizer
from ..backbones.backbone import Backbone
from ..backbones.quantizer import Quantizer
from ..backbones.stored import StoredCodes, StoredOutputs
from ..data.loader import Share
from ..data.views import Sight, ViewSpec, fitted
from ..encoder import Encoder, Preprocessing
from ..frozen import Frozen, is_further_teacher
from ..loop import grad_cache
from ..loop.teacher_cache import outputs_of
from ..pretext import Batch, Method, Step, WholeBatchMethod
from ..randomness import key
from ..tokenizer import Tokenizer
from . import Fault

BATCH, SIZE = 16, (32, 32)
ENCODER: dict[str, Any] = {"patch_size": 8, "depth": 2}  # beside what makes a vit_micro
OWN: tuple[tuple[float, ...], tuple[float, ...]] = ((0.5,) * 3, (0.25,) * 3)  # mean and std of frozen networks
STEP, STEPS = 3, 10  # where in a run the step is taken
PATIENCE = 300.0  # seconds for two processes to start and take a step


def tiny_knobs(method_class: type[Method]) -> dict[str, Any]:
    """The knobs of the small instance: `Recipe.tiny`, or, where it is empty, the knobs in `Recipe.small`."""
    recipe, known = method_class.recipe, {field.name for field in fields(method_class.Config)}
    return recipe.tiny or {name: value for name, value in recipe.small.items() if name in known}


def small_encoder(method_class: type[Method]) -> tuple[str, dict[str, Any]]:
    """The encoder of the small instance, and its options: a vit_micro of two blocks, or that of the method's built-in run
    (`Recipe.small`) with one block a stage."""
    recipe = method_class.recipe
    name = recipe.small.get("encoder", "vit_micro")
    if name == "vit_micro":
        return name, {**backbones.defaults(name), **ENCODER, **recipe.encoder}
    known = {field.name for field in fields(backbones.config_class(name))}
    given = {option: value for option, value in recipe.small.items() if option in known}
    few = {"depths": (1, 1, 1, 1)} if "depths" in known else {}
    return name, {**backbones.defaults(name), **few, **given, **recipe.encoder}


def build(name: str, **knobs: Any) -> Method:
    """A small instance of the method on `small_encoder`, prepared; its weights are a function of its name.

    knobs: over `tiny_knobs`.
    """
    return build_reading(name, None, knobs)


def build_reading(name: str, opened: Mapping[str, Frozen] | None, knobs: Mapping[str, Any]) -> Method:
    """`build` with these frozen networks (None: `networks`)."""
    encoder, options = small_encoder(pretext.load(name))
    return build_on(name, encoder, SIZE, options, opened, knobs)


def build_on(
    name: str,
    encoder: str,
    size: tuple[int, int],
    options: Mapping[str, Any],
    opened: Mapping[str, Frozen] | None,
    knobs: Mapping[str, Any],
) -> Method:
    """`build` on another encoder, of images of `size`, with these options over its own."""
    method_class = pretext.load(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key("one step", name))
        backbone = backbones.build(encoder, image_size=size, **options)
        config = method_class.Config(**{**tiny_knobs(method_class), **knobs})
        method = method_class(backbone, config)
        method.prepare(BATCH, networks(method_class.frozen(config)) if opened is None else opened)
    return method


def networks(names: Sequence[str]) -> dict[str, Frozen]:
    """Small frozen networks of these names, with patches, width and normalisation that are not the encoder's."""
    found = {}
    for name in names:
        teacher = _teacher_run() if name == "teacher_run" else None
        backbone, quantizer = _network(name) if teacher is None else (teacher.encoder, None)
        scales = OWN, ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
        sight = Sight(backbone.stride, unit=backbone.unit)
        found[name] = Frozen(
            backbone,
            spec=name,
            fingerprint=name,
            sight=sight,
            own=scales[0],
            run=scales[1],
            quantizer=quantizer,
            method=teacher,
        )
    return found


def stored(method: Method, given: Batch) -> tuple[dict[str, Frozen], Batch] | None:
    """What stands in for the frozen networks of a method whose outputs can be stored, and the batch with these outputs in
    place of their views; None for a method without such networks."""
    opened = networks(type(method).frozen(method.config))
    sights = {name: network.sight for name, network in opened.items()}
    specs = [s for s in _fitted(method, SIZE, sights) if s.network]
    if not specs or any(spec.reads is None for spec in specs):
        return None
    views, stand_ins = Views({**given.views}), dict(opened)
    for name, network in opened.items():
        seen = [spec for spec in specs if spec.network == name]
        grids = {}
        for spec in seen:
            found, outputs, grid = outputs_of(network, spec, given.views[spec.name])
            rows = found.transpose(0, 1).unsqueeze(2)
            views[spec.name] = rows if spec.count > 1 else rows[0]
            grids[grid[0] * grid[1] if "patches" in outputs else 0] = grid
        if not seen or seen[0].reads is None:
            continue
        backbone = StoredOutputs(
            dim=network.dim, depth=network.backbone.depth, stride=network.sight.stride, image_size=SIZE, in_chans=3,
            block=seen[0].reads.block % network.backbone.depth, outputs=outputs, kind="float32", grids=grids,
        )  # fmt: skip
        codes = None if network.quantizer is None else StoredCodes(network.quantizer.vectors())
        stand_ins[name] = Frozen(
            backbone, spec=name, fingerprint=name, sight=network.sight, own=OWN, run=OWN, quantizer=codes
        )
    return stand_ins, dataclasses.replace(given, views=views)


def network_flags(method_class: type[Method], knobs: dict[str, Any], folder: Path) -> list[str]:
    """The flags of a run that name the frozen networks of the method with these knobs: those of `networks`, exported below
    the folder, or as a run with a checkpoint."""
    flags: list[str] = []
    more = []
    for name in method_class.frozen(method_class.Config(**knobs)):
        if name == "teacher_run":
            _save_run(folder / name, _teacher_run())
            flags += ["--teacher", str(folder / name)]
            continue
        backbone, quantizer = _network(name)
        exported = Encoder(backbone, "vit_micro", Preprocessing.for_size(SIZE, *OWN), {})
        if quantizer is None:
            encoder.save(folder / name, exported)
        else:
            tokenizer.save(folder / name, Tokenizer(exported, quantizer))
        if is_further_teacher(name):
            more.append(str(folder / name))
            continue
        flags += ["--teacher" if name == "anchor" else f"--{name}", str(folder / name)]
    return flags + (["--more-teachers", *more] if more else [])


def _fitted(method: Method, size: tuple[int, int], sights: Mapping[str, Sight]) -> tuple[ViewSpec, ...]:
    """The views of a method for images of `size` (height, width), as they are rendered."""
    encoder = method.encoder
    return fitted(type(method).views(method.config, size), size, encoder.stride, sights, unit=encoder.unit)


def _network(name: str) -> tuple[Backbone, Quantizer | None]:
    """A frozen network of random weights, which are a function of its name; a tokenizer has 8 codes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key("network", name))
        backbone = backbones.build("vit_micro", image_size=SIZE, patch_size=16, depth=2, dim=96, heads=3)
        return backbone, Quantizer(backbone.dim, 8, 4) if name == "tokenizer" else None


def _teacher_run() -> Method:
    """A small `mae` with random weights, as the method of a run that is a teacher. It is not prepared."""
    method_class = pretext.load("mae")
    knobs = {"decoder_dim": 48, "decoder_depth": 2, "decoder_heads": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key("network", "teacher_run"))
        encoder = backbones.build(
            "vit_micro", image_size=SIZE, patch_size=16, depth=2, dim=96, heads=3, positions="sincos"
        )
        return method_class(encoder, method_class.Config(**knobs))


def _save_run(folder: Path, method: Method) -> None:
    """Write what a run with this method leaves and `--teacher RUN` reads: config.yaml and a checkpoint."""
    images = {"image_size": SIZE, "in_chans": 3, "mean": OWN[0], "std": OWN[1]}
    settings = {"method": "mae", "encoder": "vit_micro", **images, **method.encoder.describe()}
    settings |= dataclasses.asdict(method.config)
    folder.mkdir(parents=True)
    plain = json.loads(json.dumps(settings))  # lists for tuples
    (folder / "config.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    checkpoint.save(folder / "checkpoints", 1, {"method": method.state_dict()})


class Views(dict[str, Tensor]):
    """The views of a batch. Remembers which of them were read, and raises Fault for one that is not there."""

    def __init__(self, views: dict[str, Tensor]) -> None:
        super().__init__(views)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def __missing__(self, name: str) -> Tensor:
        raise Fault(f"batch.views[{name!r}] is read, and views() does not declare it (there are: {', '.join(self)})")

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def values(self) -> Any:
        self.read.update(self)
        return super().values()

    def items(self) -> Any:
        self.read.update(self)
        return super().items()


def batch(method: Method, rows: slice = slice(0, BATCH)) -> Batch:
    """Rows of a global batch of noise images, with the views that the method declares and labels below 4."""
    views = {}
    opened = networks(type(method).frozen(method.config))
    sights = {name: network.sight for name, network in opened.items()}
    for spec in _fitted(method, method.encoder.image_size, sights):
        generator = torch.Generator().manual_seed(key("view", spec.name))
        images = torch.randn(spec.count, BATCH, 3, *spec.size, generator=generator)[:, rows]
        views[spec.name] = images if spec.count > 1 else images[0]
    return Batch(views=Views(views), index=torch.arange(BATCH)[rows], labels=torch.arange(BATCH)[rows] % 4)


def step(rows: slice = slice(0, BATCH), *, number: int = STEP, noise: int = 7) -> Step:
    """Step `number` of a run of ten."""
    return Step(step=number, total=STEPS, noise=noise, rows=rows, batch_size=BATCH, device=torch.device("cpu"))


def after_step(method: Method, step: Step, carried: dict[str, Tensor]) -> None:
    """The method's, as the loop calls it, with what its forwards gave in `Losses.carry`."""
    step.carried = carried
    method.after_step(step)


def one_step(name: str, micro_batches: int = 1) -> dict[str, Any]:
    """One step on this process's share of the batch, without an optimiser: "loss" (the global one), "gradients" by name,
    "trainable" names, and "state" after `after_step`."""
    method = build(name)
    rank, size = distributed.rank(), distributed.size()
    share = Share(BATCH, micro_batches, rank, size)
    wrapped = DistributedDataParallel(method) if size > 1 else method
    parts = [(batch(method, share.rows(micro)), step(share.rows(micro))) for micro in range(micro_batches)]
    results = []
    if isinstance(method, WholeBatchMethod) and micro_batches > 1:
        results.append(grad_cache.backward(method, parts, nullcontext(), list(method.parameters())))
    else:
        for micro, part in enumerate(parts):
            last = micro == micro_batches - 1
            with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext():
                results.append(wrapped(*part))
                (results[-1].total / micro_batches).backward()
    carried = {name: torch.cat([each.carry[name] for each in results]) for name in results[0].carry}
    after_step(method, parts[-1][1], carried)
    loss = torch.stack([each.total.detach() for each in results]).mean()
    return {
        "loss": distributed.all_reduce_(loss) / size,
        "gradients": {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None},
        "trainable": [n for n, p in method.named_parameters() if p.requires_grad],
        "state": {n: v.clone() for n, v in method.state_dict().items()},
    }


class TwoProcesses:
    """Two processes with gloo that take one step after another, of any method, so that torch is imported once."""

    def __init__(self) -> None:
        self.path = list(sys.path)  # where they find plugins
        self._folder = tempfile.TemporaryDirectory(prefix="conformance-")
        folder = Path(self._folder.name)
        place = {
            "SSL_PRETRAIN_RENDEZVOUS": (folder / "rendezvous").as_uri(),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(self.path),
        }
        self._errors = [folder / f"errors-{rank}" for rank in (0, 1)]
        self._processes = []
        for rank, errors in enumerate(self._errors):
            with errors.open("w") as file:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", __name__],
                        env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=file,
                    )
                )

    def one_step(self, name: str, micro_batches: int = 1) -> dict[str, Any]:
        """`one_step` of a method in both, as the first has it. Raises Fault where one of them fails, and ends both."""
        result = Path(self._folder.name) / "result.pt"
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(json.dumps([name, micro_batches, str(result)]).encode() + b"\n")
                process.stdin.flush()
            self._wait(name)
        except BrokenPipeError:
            self._fail(name)
        return torch.load(result)

    def _wait(self, name: str) -> None:
        """Until both have answered; one that fails leaves the other waiting in an exchange."""
        end = time.monotonic() + PATIENCE
        with selectors.DefaultSelector() as selector:
            for process in self._processes:
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(max(0.0, end - time.monotonic()))
                if not ready:
                    self._fail(name, f"no answer in {PATIENCE:.0f} s")
                for key, _ in ready:
                    if key.fileobj.readline() != b"done\n":  # type: ignore[union-attr]
                        self._fail(name)
                    selector.unregister(key.fileobj)

    def _fail(self, name: str, why: str = "") -> None:
        """End both, and raise Fault with the last words of the one at fault. The other may have failed after it, because
        its exchange was cut off."""
        if not why:
            deadline = time.monotonic() + 5
            while all(process.poll() is None for process in self._processes) and time.monotonic() < deadline:
                time.sleep(0.05)
        failed = [rank for rank, process in enumerate(self._processes) if process.poll() not in (None, 0)] or [0]
        last_words = {
            rank: (self._errors[rank].read_text().strip().splitlines() or ["it ended"])[-1] for rank in failed
        }
        at_fault = min(failed, key=lambda rank: "gloo" in last_words[rank])
        self.close()
        raise Fault(f"process {at_fault} of two fails in a step of {name}: {why or last_words[at_fault]}")

    @property
    def alive(self) -> bool:
        """Whether both can take another step."""
        return all(process.poll() is None for process in self._processes)

    def close(self) -> None:
        """End both."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    if pipe is not None:
                        pipe.close()
        self._folder.cleanup()


_shared: list[TwoProcesses] = []  # one at most


def two_processes() -> TwoProcesses:
    """The two processes that all checks share; new ones where they have ended, or where plugins are found elsewhere."""
    if _shared and (not _shared[0].alive or _shared[0].path != sys.path):
        _shared.pop().close()
    if not _shared:
        _shared.append(TwoProcesses())
        atexit.register(_shared[0].close)
    return _shared[0]


def _orders(answers: IO[str]) -> Iterator[tuple[str, int, Path]]:
    """The lines of standard input, each answered when its step is done."""
    for line in sys.stdin:
        name, micro_batches, result = json.loads(line)
        yield name, micro_batches, Path(result)
        print("done", file=answers, flush=True)


def _serve() -> None:
    """What each of the two processes does until its standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a method prints is no answer
    with distributed.world() as world:
        for name, micro_batches, result in _orders(answers):
            try:
                found = one_step(name, micro_batches)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)  # the other process may never come to the exchange that leaving the world is
            if world.first:
                torch.save(found, result)
            distributed.barrier()  # the file is there when both have answered


if __name__ == "__main__":
    _serve()
