"""Several processes of one command on this machine (`--nproc N`)."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from ssl_pretrain.distributed.rendezvous import RENDEZVOUS
from ssl_pretrain.loop.signals import stopping

GRACE = 20.0  # seconds in which the others can detect which process has ended, and report it
PR_SET_PDEATHSIG = 1


def run_local(module: str, argv: list[str], count: int) -> int:
    """Run `python -m module *argv` in `count` processes that find one another; return their exit code.

    Signals that stop a run are forwarded. If one process fails, the others are ended and its exit code is returned.
    """
    with tempfile.TemporaryDirectory(prefix="ssl-pretrain-") as folder:
        place = {
            RENDEZVOUS: (Path(folder) / "rendezvous").as_uri(),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
        }
        children = [
            subprocess.Popen(
                [sys.executable, "-m", module, *argv],
                env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                # This process has no other threads that could hold a lock.
                preexec_fn=partial(_end_with, os.getpid()) if sys.platform == "linux" else None,  # noqa: PLW1509
            )
            for rank in range(count)
        ]

        def forward(number: int, _: object) -> None:
            for child in children:
                # The terminal sends a Ctrl-C to the children, too.
                if child.poll() is None and not (number == signal.SIGINT and sys.stdin.isatty()):
                    child.send_signal(number)

        before = {number: signal.signal(number, forward) for number in stopping()}
        try:
            return _wait(children)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _end_with(parent: int) -> None:
    """In a child: let the kernel send SIGTERM when the parent has ended. So the processes of a killed command save and
    end instead of training on."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        os._exit(1)


def _wait(children: list[subprocess.Popen]) -> int:
    """Wait for all processes. If one fails, give the others time to report it themselves, then end them."""
    while True:
        codes = [child.poll() for child in children]
        failed = [(rank, code) for rank, code in enumerate(codes) if code not in (None, 0, 75)]
        if failed:
            deadline = time.monotonic() + GRACE
            while time.monotonic() < deadline and any(child.poll() is None for child in children):
                time.sleep(0.1)
            for child in children:
                if child.poll() is None:
                    child.kill()
                child.wait()
            rank, code = failed[0]
            if code is not None and code < 0:
                name = signal.Signals(-code).name
                print(
                    f"process {rank} of {len(children)} was killed ({name}); the same command resumes", file=sys.stderr
                )
                return 1
            return code or 1
        if all(code is not None for code in codes):
            return max(code or 0 for code in codes)
        time.sleep(0.1)
