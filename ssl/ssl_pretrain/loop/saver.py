"""Checkpoints and exports of a run. Training waits only while the state is copied; files are written in the background."""

import json
import time
from pathlib import Path
from typing import Any, final

import torch
from torch.optim import Optimizer

from .. import backbones, checkpoint, distributed, encoder, model_card, optim, tokenizer
from ..backbones.quantizer import Quantizer
from ..config import Resolved
from ..distributed import World
from ..encoder import Encoder, Preprocessing
from ..files import write_text
from ..pretext import Method
from ..tokenizer import Tokenizer
from . import parallel, start_state, start_weights, updates
from .guard import BEST, Guard


@final
class Saver:
    """Saves the run: `save` begins a checkpoint and an export, `settle` finishes what was begun. All processes call both
    at the same steps."""

    def __init__(
        self,
        run: Resolved,
        method: Method,
        optimizer: Optimizer,
        shards: parallel.Shards,
        world: World,
        start: int,
        lineage: dict[str, Any],
        guard: Guard,
    ) -> None:
        """start: the step that the run continues from, the newest one that is saved (0: none). lineage: what every export
        says of where its weights come from, beside the run's own facts. guard: knows the best step."""
        self.run, self.method, self.optimizer, self.shards, self.world = run, method, optimizer, shards, world
        self.guard = guard
        self.saved_step = start
        self.seconds_blocked = 0.0  # that training waited for saving, since the last log; the log sets it back
        self._writer = checkpoint.Writer(folder(run), sharded=parallel.is_sharded(method))
        exported = method.exported()
        self._name = exported.name or backbones.plain_name(run.encoder)
        self._preprocessing = Preprocessing.for_size(exported.image_size, run.mean, run.std)
        self._writing = self._exporting = (
            False  # a checkpoint, or an export from one, is on its way; same on all processes
        )
        self._prefix = parallel.name_of(exported, method)  # of the exported encoder's names in the checkpoint
        self._export_from_files = False  # the export of the checkpoint that is on its way is read from its files
        self._sources = model_card.with_origins(lineage, run.init_from)
        self._lineage = {**self._sources}
        self._exported: Encoder | None = None  # of the checkpoint that is on its way, unless it is read from the files
        self._best: dict[str, Any] | None = None  # of that checkpoint where it is the best one: what best.json says
        self._kept: set[int] = set()  # the step of the best checkpoint that is published
        self._copy: Encoder | None = None
        self._quantizer: Quantizer | None = None  # of the checkpoint that is on its way
        if world.first and start:
            self._restore_best()

    @property
    def sharded(self) -> bool:
        """Whether each process saves its own part of the parameters."""
        return self._writer.sharded

    @property
    def busy(self) -> bool:
        """Whether this process is still writing."""
        return self._writer.busy

    def wait(self) -> None:
        """Wait until this process has written what was begun."""
        self._writer.wait()

    def copy_encoder(self) -> Encoder | None:
        """A copy of the exported encoder as it is now, whole and in host memory, on the first process; None on the others,
        which must call this too. The next call overwrites it."""
        copy = self._host_encoder()
        parallel.copy_whole(self.method.exported(), None if copy is None else copy.backbone)
        return copy

    def save(self, step: int, skipped: int, *, best: bool = False, last: bool = False) -> None:
        """Begin to write a checkpoint and the export of the state after `step` steps, of which `skipped` were not finite.

        best: it is the best so far (--keep-best), so it is also exported to best/. last: nothing changes the state any
        more, so it is not copied, and this returns when all is written.
        Raises OSError on all processes where one could not write.
        """
        self.settle(wait=True)
        began = time.perf_counter()
        # Gathering a sharded encoder would block all processes for longer than copying their parts does.
        self._export_from_files = self.sharded and not last and self._prefix is not None
        exported = None
        if last and not self.sharded:
            exported = self._as_export() if self.world.first else None
        elif not self._export_from_files:
            exported = self.copy_encoder()
        self._exported, self._best = exported, self._best_facts(step) if best else None
        self._quantizer = self._copy_quantizer()
        self._lineage = lineage = self._origin(step)

        def export() -> None:
            if exported is not None:
                exported.lineage = lineage
                self._write_exports(exported)

        state = {
            "method": self.method.state_dict(),
            "optimizer": self.shards.entries(optim.state_by_name(self.optimizer), self.method),
            "skipped": skipped,
            **({"scores": self.guard.record} if self.guard.record else {}),
        }
        self._writer.begin(step, state, export, copy=not last)
        self._writing, self.saved_step = True, step
        self.seconds_blocked += time.perf_counter() - began
        if last:
            self.settle(wait=True)

    def settle(self, *, wait: bool = False) -> None:
        """Publish the checkpoint that was begun, and begin its export where that is read from the files. With `wait` until
        both are done. Raises OSError on all processes where one could not write."""
        while self._writing or self._exporting:
            began = time.perf_counter()
            self._writer.wait()
            (failed,) = distributed.any_of(self._writer.problem is not None)
            if self._writing and not failed:
                kept = self._kept if self._best is None else {self._lineage["step"]}
                self._writer.publish(keep_last=self.run.keep_last, keep_every=self.run.keep_every, keep=kept)
                self._kept = kept
                (failed,) = distributed.any_of(self._writer.problem is not None)
            self._exporting = self._writing and (self._export_from_files or self._best is not None) and not failed
            self._writing = False
            if failed:
                self._writer.abandon()
                problems = distributed.from_all(self._writer.problem)
                problem = next(each for each in problems if each)
                problem.reported_elsewhere = not self.world.first
                raise problem
            if self._exporting and self.world.first:
                self._writer.follow(self._export_published)
            self.seconds_blocked += time.perf_counter() - began
            if not wait:
                return

    def _origin(self, step: int) -> dict[str, Any]:
        """Where the weights after `step` steps come from."""
        return {
            "method": self.run.method, "data": self.run.data, "step": step, "images_seen": step * self.run.batch_size,
            "seed": self.run.seed, **start_weights.facts(self.run), **self._sources,
        }  # fmt: skip

    def _write_exports(self, exported: Encoder) -> None:
        """Write tokenizer/ where the method has one, then encoder/. So a run with an encoder also has its tokenizer."""
        whole = updates.merged(self.run, exported)
        if self._quantizer is not None:
            tokenizer.save(self.run.out / "tokenizer", Tokenizer(whole, self._quantizer))
        encoder.save(self.run.out / "encoder", whole)

    def _copy_quantizer(self) -> Quantizer | None:
        """A copy of the method's quantizer, whole and in host memory, on the first process; None on the others, which must
        call this too, and where the method has none."""
        own = self.method.exported_tokenizer()
        if own is None:
            return None
        twin = own.another() if self.world.first else None
        parallel.copy_whole(own, twin)
        return twin

    def _as_export(self) -> Encoder:
        return Encoder(self.method.exported(), self._name, self._preprocessing, {})

    def _host_encoder(self) -> Encoder | None:
        """Memory of the first process for a whole copy of the encoder; made once."""
        if self.world.first and self._copy is None:
            twin = encoder.another(self._name, self.method.exported())
            updates.add(self.run, twin)
            self._copy = Encoder(twin, self._name, self._preprocessing, {})
        return self._copy

    def _export_published(self) -> None:
        """Export the encoder of the checkpoint that was published: that of a sharded run, and the best one."""
        if self._export_from_files:
            self._exported = self._read_encoder(self._lineage["step"])
            self._exported.lineage = self._lineage
            self._write_exports(self._exported)
        if self._best is not None:
            assert self._exported is not None
            self._export_best(self._exported, self._best)

    def _read_encoder(self, step: int) -> Encoder:
        """The encoder of a published checkpoint, from its files."""
        read = self._host_encoder()
        assert read is not None
        tensors = {f"method/{self._prefix}{name}": t for name, t in read.backbone.state_dict().items()}
        checkpoint.Reader(folder(self.run), step).read_some(tensors)
        return read

    def _best_facts(self, step: int) -> dict[str, Any]:
        """What is recorded of the best step, which is this one."""
        best = self.guard.best  # None on the processes that get no scores and write nothing
        score = None if best is None else best.best
        at = f"{folder(self.run).name}/step-{step:08d}"
        return {"by": self.run.keep_best, "score": score, "step": step, "checkpoint": at}

    def _export_best(self, exported: Encoder, facts: dict[str, Any]) -> None:
        """Export to best/, and write best.json when that is done. The checkpoint of the step is there before. So a killed
        process leaves the best step before whole, or all that the next process needs to export this one."""
        place = self.run.out / BEST
        exported.lineage = {**self._origin(facts["step"]), "best_by": facts["by"], "score": facts["score"]}
        encoder.save(place / "encoder", updates.merged(self.run, exported))
        write_text(place / "best.json", json.dumps(facts, indent=1) + "\n")

    def _restore_best(self) -> None:
        """Bring best/ to what the checkpoint that the run continues from says, where a killed process did not come to it.
        The best step is forgotten where nothing of it was kept, because the run did not keep it so far."""
        best, there = self.guard.best, read_best(self.run.out)
        if best is None:
            return
        facts = self._best_facts(best.best_step)
        if there != facts:
            if self._prefix is not None and checkpoint.damage(self.run.out / facts["checkpoint"]) is None:
                self._export_best(self._read_encoder(best.best_step), facts)
            elif there.get("by") != facts["by"]:
                self.guard.forget_best()
                return
        self._kept = {best.best_step}


def read_best(out: Path) -> dict[str, Any]:
    """What best/ of a run folder holds: "by" (knn or val), "score", "step", "checkpoint"; empty where there is none."""
    try:
        found = json.loads((out / BEST / "best.json").read_bytes())
        return found if isinstance(found, dict) and (out / BEST / "encoder" / "config.json").exists() else {}
    except (OSError, ValueError, RecursionError):
        return {}


def folder(run: Resolved) -> Path:
    """Where the run's checkpoints are."""
    return run.out / "checkpoints"


def restore(run: Resolved, step: int, method: Method, optimizer: Optimizer, shards: parallel.Shards) -> int:
    """Read the checkpoint of `step` into the method and its optimiser; returns how many steps were skipped before it. A
    branch that has none of its own yet reads that of --init-state."""
    branches_off = run.branch and step not in checkpoint.steps(folder(run))
    reader = start_state.branch_reader(run, method, optimizer) if branches_off else checkpoint.Reader(folder(run), step)
    entries: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        name: (shape, dtype) for (part, name), shape, dtype in reader.entries() if part == "optimizer"
    }
    state = optim.empty_state(optimizer, entries, method)
    skipped = reader.read({"method": method.state_dict(), "optimizer": shards.entries(state, method)})["skipped"]
    optim.load_state_by_name(optimizer, state)
    return skipped
