"""The state of another run that a run starts from (--init-state): that of its method, or of all of it (--branch)."""

import hashlib
import re
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .. import checkpoint, config, encoder, pretext
from ..errors import UserError
from . import start_weights

ADAPTERS = ("adapters", "lora_rank", "lora_alpha", "adapters_unfreeze")  # flags that give the encoder more parameters
FORM = re.compile(r"(?P<run>.+?)(@(?P<step>\d+))?")


def settings(text: str, out: Path, method: str, *, partial: bool = False) -> dict[str, Any]:
    """The settings that the state of a run (RUN@STEP) fixes, as `start_weights.settings`, and the knobs of its method.

    Raises UserError if there is no such checkpoint, and for a run of another method unless `partial`.
    """
    recorded = start_weights.recorded_settings(out)
    knobs = [] if partial else [*pretext.load(method).Config.__dataclass_fields__, *ADAPTERS]
    if recorded.get("init_state") == text:
        return {**_some(recorded, knobs), **start_weights.of_recorded(recorded, out)}
    run, step = place(text)
    theirs = start_weights.recorded_settings(run)
    if theirs.get("method") != method and not partial:
        raise UserError(
            f"--init-state {text} is the state of --method {theirs.get('method')}, and this is --method {method}: take its "
            f"encoder alone with --init-from {run}, or add --partial to load what has the same name and shape"
        )
    fixed = start_weights.of_recorded(theirs, run)
    return {**_some(theirs, knobs), **fixed, "init_fingerprint": fingerprint(run, step)}


def place(text: str, flag: str = "--init-state") -> tuple[Path, int]:
    """The run folder and the step of RUN@STEP (RUN: its newest checkpoint). flag: that gives it, for messages. Raises
    UserError if there is no such checkpoint."""
    found = FORM.fullmatch(text)
    run, step = folder_of(text), found["step"] if found else None
    if not (run / "config.yaml").is_file():
        raise UserError(f"{flag} {text}: {run} is no run folder: give RUN@STEP")
    there = checkpoint.steps(run / "checkpoints")
    if not there:
        raise UserError(f"{flag} {text}: {run} has no checkpoint")
    chosen = there[-1] if step is None else int(step)
    if chosen not in there:
        kept = ", ".join(map(str, there))
        raise UserError(f"{flag} {text}: {run} has no checkpoint of step {chosen}; it has those of {kept}")
    return run, chosen


def folder_of(text: str) -> Path:
    """The run folder of RUN@STEP or RUN. It need not exist."""
    found = FORM.fullmatch(text)
    return Path(found["run"] if found else text)


def load(run: config.Resolved, method: nn.Module) -> list[str]:
    """Load the state of --init-state into a prepared method; optimiser and step are new. Returns what is to be said about
    it, a line each.

    Raises UserError for a state with other names or shapes (unless `run.partial`), with the differences, and for a damaged
    checkpoint.
    """
    if run.init_state is None:
        return []
    path, step = place(run.init_state)
    reader, own = _reader(run, path, step), method.state_dict()
    there = {name: shape for (part, name), shape, _ in reader.entries() if part == "method"}
    unfit = encoder.differences({name: tuple(value.shape) for name, value in own.items()}, there)
    if unfit and not run.partial:
        raise UserError(
            f"--init-state {run.init_state} does not fit the method of these flags: {'; '.join(unfit)}: give the flags "
            f"of that run ({path / 'config.yaml'}), or add --partial to load what fits"
        )
    reader.read_some({f"method/{name}": value for name, value in own.items() if there.get(name) == tuple(value.shape)})
    lines = [f"starting from the state of {path} at step {step}; optimiser and step are new"]
    return lines + ([f"--partial: the state fits the method in part: {'; '.join(unfit)}"] if unfit else [])


def branch_step(run: config.Resolved) -> int:
    """The step that a new run begins with: that of --init-state with --branch, else 0. Raises UserError if the run ends
    before it, and for a checkpoint that is damaged or not there."""
    if not run.branch or run.init_state is None:
        return 0
    path, step = place(run.init_state)
    if step >= run.steps:
        raise UserError(
            f"--branch: --init-state {run.init_state} has done {step} steps, and this run has {run.steps}: --steps counts "
            f"from the beginning of that run; give more than {step}"
        )
    _reader(run, path, step)
    return step


def branch_reader(run: config.Resolved, method: nn.Module, optimizer: Optimizer) -> checkpoint.Reader:
    """The checkpoint that a branch begins with. Raises UserError unless it is of the same optimiser and parameters."""
    assert run.init_state is not None
    path, step = place(run.init_state)
    kind = start_weights.recorded_settings(path).get("optimizer")
    if kind != run.optimizer:
        raise UserError(f"--branch: {run.init_state} was trained with --optimizer {kind}, and this is {run.optimizer}")
    reader = _reader(run, path, step)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {"method": {}, "optimizer": {}}
    for (part, name), shape, _ in reader.entries():
        shapes[part][name] = shape
    own = {name: tuple(value.shape) for name, value in method.state_dict().items()}
    unfit = encoder.differences(own, shapes["method"])
    trained = {name for group in optimizer.param_groups for name in group["names"]}
    unfit += encoder.differences(dict.fromkeys(trained, ()), {n.rsplit("/", 1)[0]: () for n in shapes["optimizer"]})
    if unfit:
        raise UserError(
            f"--branch: the state of {run.init_state} does not fit these flags: {'; '.join(unfit)}: give the flags of that "
            f"run (--config {path / 'config.yaml'})"
        )
    return reader


def branched(run: config.Resolved, start: int) -> str:
    """What is to be said of a run that starts at the step where it branched off; empty for any other start."""
    if not run.branch or start in checkpoint.steps(run.out / "checkpoints"):
        return ""
    return f"a branch of {run.init_state}: continuing from step {start} of {run.steps}"


def _reader(run: config.Resolved, path: Path, step: int) -> checkpoint.Reader:
    """Raises UserError for a damaged checkpoint, or one of another fingerprint."""
    what = f"--init-state {run.init_state}"
    reader = undamaged(what, path, step)
    start_weights.check_fingerprint(run, what, fingerprint(path, step))
    return reader


def undamaged(what: str, path: Path, step: int) -> checkpoint.Reader:
    """A checkpoint of the run in `path`. what: names it in messages. Raises UserError if it is damaged."""
    folder = path / "checkpoints"
    if problem := checkpoint.damage(folder / f"step-{step:08d}"):
        raise UserError(f"{what}: the checkpoint of step {step} is damaged ({problem})")
    return checkpoint.Reader(folder, step)


def fingerprint(run: Path, step: int) -> str:
    """Hex hash of a checkpoint's description, which has the checksums of its files."""
    text = (run / "checkpoints" / f"step-{step:08d}" / "checkpoint.json").read_bytes()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _some(settings: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: settings[name] for name in names if name in settings}
