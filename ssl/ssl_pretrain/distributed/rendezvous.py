"""Rendezvous of a run's processes. If processes are missing, the error names them.

All waiting is done in Python in short intervals, so signals are handled meanwhile.
"""

import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlparse

import torch.distributed as dist

from ..errors import UserError
from .environment import Place

RENDEZVOUS = "SSL_PRETRAIN_RENDEZVOUS"  # set by `--nproc`: a file:// address, because a port could be in use
PAUSE = 0.05  # seconds between checks


class MissingProcess(Exception):
    """Not all processes of the run connected; the message names the missing ones."""


def meet(place: Place, timeout: timedelta) -> dist.Store:
    """The store that all processes of the run share, once all have connected.

    Raises MissingProcess on every connected process if others do not connect within `timeout`; UserError if the
    environment has no address or the port is in use.
    """
    until = time.monotonic() + timeout.total_seconds()
    store = dist.PrefixStore(
        f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", _open(place, timeout, until)
    )
    store.set(f"host of {place.rank}", socket.gethostname())
    store.add("came", 1)
    if place.rank == 0:
        while store.add("came", 0) < place.size and time.monotonic() < until:
            time.sleep(PAUSE)
        missing = [rank for rank in range(place.size) if not store.check([f"host of {rank}"])]
        store.set("missing", " ".join(map(str, missing)))
        if missing:
            time.sleep(20 * PAUSE)  # the others must read it before the store ends with this process
    else:
        while not store.check(["missing"]):
            if time.monotonic() > until + timeout.total_seconds() / 2:
                raise MissingProcess(_text([0], place, timeout))
            time.sleep(PAUSE)
        missing = [int(word) for word in store.get("missing").decode().split()]
    if missing:
        raise MissingProcess(_text(missing, place, timeout))
    return store


def _open(place: Place, timeout: timedelta, until: float) -> dist.Store:
    if RENDEZVOUS in os.environ:
        return dist.FileStore(str(Path(urlparse(os.environ[RENDEZVOUS]).path)), place.size)
    if place.address is None or place.port is None:
        raise UserError("the environment sets RANK but not MASTER_ADDR and MASTER_PORT: start with --nproc or torchrun")
    # torchrun may host the store itself; then all processes are clients.
    serve = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serve:
        _wait_for_listener(place, timeout, until)
    try:
        return dist.TCPStore(
            place.address, place.port, place.size, is_master=serve, timeout=timeout, wait_for_workers=False
        )
    except (dist.DistNetworkError, dist.DistStoreError) as problem:
        if serve:
            why = "is taken" if "in use" in str(problem) else f"cannot be opened ({str(problem).splitlines()[0]})"
            raise UserError(f"port {place.port} of {place.address} {why}: set MASTER_PORT to a free one") from None
        raise MissingProcess(_text([0], place, timeout)) from None


def _wait_for_listener(place: Place, timeout: timedelta, until: float) -> None:
    while True:
        try:
            socket.create_connection((place.address or "", place.port or 0), timeout=5).close()
            return
        except OSError as problem:
            if time.monotonic() > until:
                raise MissingProcess(_text([0], place, timeout) + f" ({problem})") from None
            time.sleep(PAUSE)


def _text(missing: list[int], place: Place, timeout: timedelta) -> str:
    named = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
    where = f", which listens on {place.address}:{place.port}," if missing == [0] and place.address else ""
    return (
        f"rank {named} of {place.size}{where} did not come within {timeout.total_seconds():.0f} s (nodes: {place.nodes}). "
        f"See its log; if its node is broken, exclude it with --exclude"
    )
