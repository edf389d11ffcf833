"""A thread in each process that detects a stall of the run, writes the stacks of all processes and names the late ones.

Each process writes a heartbeat file to the run folder: its step, what it is doing, and whether it waits for others. The
thread uses no collectives, because these hang if one process is late.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from ..distributed import World, collectives

BEAT = 2.0  # seconds between heartbeats
SILENT = 5 * BEAT  # a process whose heartbeat is older than this has ended, or its machine has
NAMED = 8  # late processes that a message names


class LostProcess(RuntimeError):
    """A process of the run has ended. The message names it and its last heartbeat."""


@final
class Watch:
    """A context that watches a run. `at` records what this process does. If that does not change for `patience` seconds,
    the stacks are written to stalls/rank-00000.txt of the run folder, and the first process reports which processes are
    late. If the first process has no recent heartbeat, the next one that has reports it.

    say: prints a message (one line), on every process. patience: 0 means never. If an exchange inside the context fails
    because another process has ended, the error becomes a LostProcess.
    """

    def __init__(self, out: Path, world: World, patience: float, say: Any) -> None:
        self.beats, self.stalls = out / "heartbeats", out / "stalls"
        self.world, self.patience, self.say = world, patience, say
        self._where: tuple[int, str] = (0, "starting")
        self._since = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def at(self, step: int, doing: str) -> None:
        """Record that this process is at `step`, and what it is doing (a few words)."""
        self._where, self._since = (step, doing), time.monotonic()

    def __enter__(self) -> "Watch":
        if self.patience > 0 or self.world.size > 1:
            self._beat()
            self._thread.start()
        return self

    def __exit__(self, kind: Any, problem: Any, _: object) -> None:
        gone = self._gone() if isinstance(problem, RuntimeError) and self.world.size > 1 else []
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if kind is None and self.world.size > 1:
            self._file(self.world.rank).unlink(missing_ok=True)
            with suppress(OSError):
                self.beats.rmdir()  # the last one can
        if gone:
            raise LostProcess(
                f"{', '.join(gone)}, noticed in step {self._where[0]}; the same command continues from the last checkpoint"
            ) from problem

    def _gone(self) -> list[str]:
        """The processes without a recent heartbeat, in words. Waits until a missing heartbeat is old enough to count."""
        time.sleep(SILENT + BEAT)
        return [
            f"rank {r} on {beat['host']} is gone ({_silence(beat)})"
            for r, beat in self._all().items()
            if beat["silent"]
        ]

    def _look(self) -> None:
        stacks, said = "", False  # of the stall that there is
        while not self._over.wait(BEAT):
            where, stuck = self._where, time.monotonic() - self._since
            # On a full disk the loop stops with a message when it writes. A stall is reported nevertheless.
            with suppress(OSError):
                self._beat()
            if stuck <= BEAT:
                stacks, said = "", False
            if not 0 < self.patience < stuck or said:
                continue
            if not stacks:
                try:
                    self._dump()
                    stacks = f"Stacks of all processes: {self.stalls}"
                except OSError as problem:
                    stacks = f"Its stacks cannot be written: {problem}"
                self._over.wait(2 * BEAT)  # for the others' heartbeats and stacks
                with suppress(OSError):
                    self._beat()
            beats = self._all() if self.world.size > 1 else {}
            # The first process with a recent heartbeat reports; this may change during the stall.
            speaks = next((rank for rank, beat in beats.items() if not beat["silent"]), self.world.rank)
            if self._where == where and speaks == self.world.rank:
                with suppress(OSError):
                    self.say(f"{self._text(where, stuck, beats)} {stacks}")
                said = True

    def _file(self, rank: int) -> Path:
        return self.beats / f"rank-{rank:05d}.json"

    def _beat(self) -> None:
        if self.world.size == 1:
            return
        self.beats.mkdir(parents=True, exist_ok=True)
        step, doing = self._where
        text = {"host": socket.gethostname(), "pid": os.getpid(), "step": step, "doing": doing, "waits": _waits()}
        aside = self._file(self.world.rank).with_suffix(".tmp")
        aside.write_text(json.dumps(text))
        os.replace(aside, self._file(self.world.rank))

    def _all(self) -> dict[int, dict[str, Any]]:
        """The last heartbeat of each process. Ages are relative to the newest one (clock of the shared file system)."""
        found: dict[int, dict[str, Any]] = {}
        for rank in range(self.world.size):
            try:
                file = self._file(rank)
                found[rank] = {**json.loads(file.read_text()), "at": file.stat().st_mtime}
            except (OSError, ValueError):
                found[rank] = {"host": "an unknown host", "step": -1, "doing": "nothing", "waits": 0, "at": 0.0}
        now = max(beat["at"] for beat in found.values())
        return {
            rank: {**beat, "age": now - beat["at"], "silent": now - beat["at"] > SILENT} for rank, beat in found.items()
        }

    def _dump(self) -> None:
        self.stalls.mkdir(parents=True, exist_ok=True)
        step, doing = self._where
        with open(self.stalls / f"rank-{self.world.rank:05d}.txt", "w") as file:
            file.write(f"rank {self.world.rank} on {socket.gethostname()}, pid {os.getpid()}: step {step}, {doing}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)

    def _text(self, where: tuple[int, str], stuck: float, heartbeats: dict[int, dict[str, Any]]) -> str:
        heard = {rank: beat for rank, beat in heartbeats.items() if not beat["silent"]}
        # A process in an exchange waits for another one: for one that has ended; else for those that do something else, the
        # one furthest behind; else for those in a backward pass, which may compute or wait.
        least = min((beat["waits"] for beat in heard.values()), default=EXCHANGE)
        busy = {rank: beat for rank, beat in heard.items() if beat["waits"] == least < EXCHANGE}
        behind = min((beat["step"] for beat in busy.values()), default=0)
        late = {rank: beat for rank, beat in heartbeats.items() if beat["silent"]} or {
            rank: beat for rank, beat in busy.items() if beat["step"] == behind
        }
        who = "; ".join(
            f"rank {rank} on {beat['host']}: "
            + (_silence(beat) if beat["silent"] else f"step {beat['step']}, {beat['doing']}")
            for rank, beat in list(late.items())[:NAMED]
        ) + (f"; ... ({len(late)} in all)" if len(late) > NAMED else "")
        step, doing = where
        late_text = f" Late: {who or 'nobody, all wait for one another'}." if heartbeats else f" This process: {doing}."
        return f"no progress for {stuck:.0f} s after step {step}.{late_text}"


COMPUTES, BACKWARD, EXCHANGE = range(3)  # states of the main thread


def _waits() -> int:
    """The state of the main thread: in an exchange with other processes, in a backward pass, or in neither."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    found = COMPUTES
    while frame is not None:
        place = frame.f_code.co_filename.replace(os.sep, "/")
        if "torch/distributed/" in place or frame.f_code.co_filename == collectives.__file__:
            return EXCHANGE
        if frame.f_code.co_name == "_engine_run_backward":
            found = BACKWARD
        frame = frame.f_back
    return found


def _silence(beat: dict[str, Any]) -> str:
    if not beat["at"]:
        return "not heard of at all"
    return f"not heard of for {beat['age']:.0f} s, the last time at step {beat['step']}, {beat['doing']}"
