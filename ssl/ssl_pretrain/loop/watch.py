"""Looks after a run from a thread of each process: notices a stall, shows where everybody stands, names who is late.

Every process leaves a heartbeat in the run folder: its step, what it is doing, how long. Nothing here goes through the
collectives, for they are what hangs when one process is late.
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

from ..distributed import World

BEAT = 2.0  # seconds between heartbeats
SILENT = 5 * BEAT  # a process that has not been heard of for so long is gone, or its machine is
NAMED = 8  # late processes that a message names


class LostProcess(RuntimeError):
    """A process of the run is gone; the message names it and says what the others saw."""


@final
class Watch:
    """While entered: `at` says where this process is; where that does not change for `patience` seconds, its stacks are
    written to stalls/rank-00000.txt of the run folder, and the first process says which are late. Where the first process
    itself is not heard of any more, the next one that is says it.

    say: what takes the message (a line), on every process. patience: 0 for never. An exchange that fails inside because a
    process is gone becomes a LostProcess.
    """

    def __init__(self, out: Path, world: World, patience: float, say: Any) -> None:
        self.beats, self.stalls = out / "heartbeats", out / "stalls"
        self.world, self.patience, self.say = world, patience, say
        self._where: tuple[int, str] = (0, "starting")
        self._since = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def at(self, step: int, doing: str) -> None:
        """This process is at `step`, doing that (a few words)."""
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
        """The processes that are not heard of any more, in words; waits as long as a silence takes to be one."""
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
            # A disk that is full stops the loop, with a message, when it writes; a stall is told all the same.
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
            # Whoever is first among those that are heard of: that may change while the stall lasts.
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
        """Everybody's last heartbeat. Ages are taken from the newest one, on the clock of the file system they share."""
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
        # Whoever waits in an exchange waits for somebody who is not there: for one that is gone; else for those that do
        # something else, the furthest behind of them; else for those that are in backward, which may be either.
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


COMPUTES, BACKWARD, EXCHANGE = range(3)  # what the main thread may be in


def _waits() -> int:
    """Whether the main thread is in an exchange with others, in a backward pass, which holds some, or in neither."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    found = COMPUTES
    while frame is not None:
        place = frame.f_code.co_filename.replace(os.sep, "/")
        if "torch/distributed/" in place or place.endswith("ssl_pretrain/distributed.py"):
            return EXCHANGE
        if frame.f_code.co_name == "_engine_run_backward":
            found = BACKWARD
        frame = frame.f_back
    return found


def _silence(beat: dict[str, Any]) -> str:
    if not beat["at"]:
        return "not heard of at all"
    return f"not heard of for {beat['age']:.0f} s, the last time at step {beat['step']}, {beat['doing']}"
