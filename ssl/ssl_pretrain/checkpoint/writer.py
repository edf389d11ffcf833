"""Writes checkpoints in the background during training."""

import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from .. import distributed
from ..files import sync, write_text
from .folder import described, prune
from .shard_file import ShardWriter
from .shard_plan import OwnPlan, mine


class Writer:
    """Writes the checkpoints of `folder` in the background.

    `begin` copies the state (training waits only for this copy) and starts a thread that writes it to a temporary
    folder. `publish` waits until every process's thread is done and renames the folder. All processes call both. With
    `sharded` every process writes its parts of sharded tensors, else the first process writes everything.
    """

    def __init__(self, folder: Path, *, sharded: bool = False) -> None:
        self.folder, self.sharded, self.rank = folder, sharded, distributed.rank()
        # Host memory that every checkpoint reuses: this process's part of each tensor, plain and as a sharded tensor
        self._copies: dict[str, tuple[Tensor, Tensor]] = {}
        self._thread: threading.Thread | None = None
        self.step: int | None = None  # of the checkpoint that is begun but not published
        self.problem: OSError | None = None  # why this process could not write it
        self._facts: dict[str, Any] = {}
        self._written: dict[str, tuple[int, int]] = {}  # bytes and CRC-32 of this process's files

    @property
    def busy(self) -> bool:
        """Whether this process is still writing."""
        return self._thread is not None and self._thread.is_alive()

    @torch.no_grad()
    def begin(
        self, step: int, state: Mapping[str, Any], then: Callable[[], None] | None = None, *, copy: bool = True
    ) -> None:
        """Write the state after `step` steps in a thread, then call `then` there. The previous one must be published.

        state: mappings of names to tensors, and plain data. It may change as soon as this method returns. Without
        `copy` (the copy needs the same memory again) it may change only after `wait`.
        """
        if self.rank != 0 and not self.sharded:
            return
        assert self.step is None
        tensors = {f"{part}/{name}": t for part, each in state.items() if _is_part(each) for name, t in each.items()}
        facts = {name: value for name, value in state.items() if not _is_part(value)}
        copies = {name: self._copy(name, t) if copy else t.detach() for name, t in tensors.items()}
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        self.step, self.problem, self._facts, self._written = step, None, facts, {}
        if not self.sharded:  # with `sharded` another process may have begun to write; `clear` has removed old ones
            shutil.rmtree(self._aside(step), ignore_errors=True)
        self._thread = threading.Thread(target=self._work, args=(step, copies, then), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until this process's thread is done."""
        if self._thread is not None:
            self._thread.join()

    def follow(self, work: Callable[[], None]) -> None:
        """Run `work` in the background after the checkpoint is published. `wait` waits for it; `problem` has the error
        if it fails."""
        self._thread = threading.Thread(target=self._try, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def publish(
        self, *, keep_last: int | None = None, keep_every: int | None = None, keep: Collection[int] = ()
    ) -> None:
        """Rename the checkpoint to its final name if every process has written its part; then prune older ones.

        After an error (a full disk, no permission) `problem` is set, and the incomplete checkpoint is removed.
        """
        self.wait()
        step, self.step = self.step, None
        # Exchanged, not listed: on NFS a file that another machine has just written may be invisible for a minute
        written = distributed.from_all(self._written) if self.sharded else [self._written]
        if step is None or self.rank != 0:
            return
        aside, final = self._aside(step), self._final(step)
        try:
            if self.problem:
                raise self.problem
            files = {name: facts for part in written for name, facts in part.items()}
            for name, (size, _) in files.items():
                if _size(aside / name) != size:
                    shared = "is --out on a file system that all machines share?"
                    raise OSError(f"{aside / name} is missing or does not have its {size} bytes: {shared}")
            write_text(aside / "checkpoint.json", described({"step": step, **self._facts, "files": files}))
            sync(aside)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
            os.rename(aside, final)
            sync(self.folder)
        except OSError as problem:
            self.problem = _with_name(problem, final)
            shutil.rmtree(aside, ignore_errors=True)
            return
        if keep_last is not None:
            prune(self.folder, keep_last=keep_last, keep_every=keep_every, keep=keep)

    def abandon(self) -> None:
        """Remove what was begun and cannot be finished: what is half there would take the room of a full disk. Once every
        process's thread is done."""
        self.wait()
        step, self.step = self.step, None
        if step is not None and self.rank == 0:
            shutil.rmtree(self._aside(step), ignore_errors=True)

    def _aside(self, step: int) -> Path:
        return self.folder / f".writing-{step:08d}"

    def _final(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of `tensor`, with the same sharding, in host memory that is reused by the next checkpoint."""
        mine = distributed.local(tensor)
        copy, stored = self._copies.get(name, (None, None))
        if copy is None or stored is None or copy.shape != mine.shape or copy.dtype != mine.dtype:
            copy = torch.empty(mine.shape, dtype=mine.dtype, pin_memory=mine.is_cuda)
            stored = distributed.sharded_like(copy, tensor) if hasattr(tensor, "to_local") else copy
            self._copies[name] = copy, stored
        copy.copy_(mine, non_blocking=True)
        return stored

    def _work(self, step: int, copies: dict[str, Tensor], then: Callable[[], None] | None) -> None:
        self._try(lambda: self._write(self._aside(step), copies))
        if self.problem is not None:
            self.problem = _with_name(self.problem, self._final(step))
        if then is not None and self.problem is None:
            self._try(then)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as problem:  # reported by the thread that can end the run
            self.problem = problem
        except Exception as problem:  # as text, because it may be sent to other processes
            self.problem = OSError(f"{type(problem).__name__}: {problem}")

    def _write(self, aside: Path, copies: dict[str, Tensor]) -> None:
        writer = ShardWriter(aside, self.rank)
        try:
            aside.mkdir(parents=True, exist_ok=True)
            dcp.save(mine(copies, first=self.rank == 0), storage_writer=writer, planner=OwnPlan(), no_dist=True)
        except dcp.api.CheckpointException as failed:
            cause, _ = next(iter(failed.failures.values()))
            raise cause if isinstance(cause, OSError) else OSError(f"{aside}: {cause!r}") from None
        self._written = writer.written


def _is_part(value: Any) -> bool:
    """Whether this entry of a state holds tensors by name; else it is plain data."""
    return isinstance(value, Mapping) and all(isinstance(each, Tensor) for each in value.values())


def _with_name(problem: OSError, path: Path) -> OSError:
    """The same error with the path: an error while writing (a full disk) does not name the file."""
    if problem.errno is not None and problem.filename is None:
        return OSError(problem.errno, problem.strerror or str(problem), str(path))
    return problem


def _size(file: Path) -> int | None:
    with suppress(FileNotFoundError):
        return file.stat().st_size
    return None


def save(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write the state after `step` steps as a checkpoint of `folder`, with this process alone; it is complete on
    return. Raises OSError if it cannot be written."""
    writer = Writer(folder)
    writer.begin(step, state, copy=False)
    writer.publish()
    if writer.problem:
        raise writer.problem
