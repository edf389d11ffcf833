"""Several processes of one command on this machine (`--nproc N`)."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ssl_pretrain.rendezvous import RENDEZVOUS
from ssl_pretrain.signals import STOPPING


def run_local(module: str, argv: list[str], count: int) -> int:
    """Run `python -m module *argv` in `count` processes that find one another; return their exit code.

    Signals that stop a run are passed on. Where one process fails, the others are ended and its code is returned.
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
            )
            for rank in range(count)
        ]

        def pass_on(number: int, _: object) -> None:
            for child in children:
                # A Ctrl-C at a terminal reaches the children by itself.
                if child.poll() is None and not (number == signal.SIGINT and sys.stdin.isatty()):
                    child.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in STOPPING}
        try:
            return _wait(children)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _wait(children: list[subprocess.Popen]) -> int:
    """Wait for all; when one fails, give the others a few seconds to say why themselves, then end them."""
    while True:
        codes = [child.poll() for child in children]
        failed = [(rank, code) for rank, code in enumerate(codes) if code not in (None, 0, 75)]
        if failed:
            deadline = time.monotonic() + 5
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
