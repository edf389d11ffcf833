"""A run as a frozen teacher (--teacher RUN[@STEP]): the weights of its method, with the decoder or the prototype heads,
which no export has."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import backbones, encoder, flags, pretext
from ..backbones.backbone import Backbone
from ..encoder import Encoder, Preprocessing
from ..errors import UserError
from ..parts.masked_autoencoder import HasDecoder
from ..parts.prototype_teacher import HasPrototypeHeads
from ..pretext import Method
from . import start_state, start_weights

GIVE = "give a run of mae with its checkpoints, RUN or RUN@STEP"
GIVE_HEADS = "give a run of dino, ibot or dinov2 with its checkpoints, RUN or RUN@STEP"
_OF_TEACHER = ("encoder", "head", "heads")  # parts of a method that its EMA teacher has under the same names


@dataclass(frozen=True)
class TeacherRun:
    """What --teacher names. `encoder`: the method's, with the preprocessing of the run; `method`: with the weights of the
    checkpoint, but not prepared; `fingerprint`: of the checkpoint."""

    encoder: Encoder
    method: Method
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class _Images:
    """What config.yaml says of the images that the run trained on."""

    image_size: tuple[int, ...]
    """Pixels, one number or height and width."""
    in_chans: int
    """Channels."""
    mean: tuple[float, ...]
    """Of each channel."""
    std: tuple[float, ...]
    """Of each channel."""


def open_run(text: str, asked_by: str, own: str, *, heads: bool = False) -> TeacherRun:
    """Open the method of a run at its newest checkpoint, or at that of STEP (RUN@STEP), on the CPU.

    asked_by: the method that reads it, for messages; own: the run's --encoder, because an encoder of the user's own code is
    built only if the command names the same code; heads: its prototype heads are wanted, and the weights of its EMA
    teacher, not its decoder. Raises UserError for what is no run, a run of a method without these parts, no or a damaged
    checkpoint, and a config.yaml that does not belong to it.
    """
    give, part = (GIVE_HEADS, "prototype heads") if heads else (GIVE, "decoder")
    what, why = f"--teacher {text}", f"and --method {asked_by} reads the teacher's {part}: {give}"
    if start_weights.is_spec(text):
        raise UserError(f"{what} is an encoder of another library, {why}")
    folder = start_state.folder_of(text)
    if not (folder / "config.yaml").is_file() and (folder / "config.json").is_file():
        raise UserError(f"{what} is an export, which holds an encoder alone, {why}")
    path, step = start_state.place(text, "--teacher")
    recorded = start_weights.recorded_settings(path)
    if recorded.get("adapters", "none") != "none":
        raise UserError(f"{what} was trained with --adapters, whose weights are merged in exports only: {give}")
    try:
        kind, images, knobs, backbone = _built(recorded, path, own)
    except UserError as problem:
        raise UserError(f"{what}: the method of {path / 'config.yaml'} cannot be built ({problem})") from None
    with torch.random.fork_rng(devices=[]):
        method = kind(backbone, knobs)
    if heads and not isinstance(method, HasPrototypeHeads):
        raise UserError(f"{what} is a run of {recorded['method']}, which has no prototype heads, {why}")
    if not heads and not isinstance(method, HasDecoder):
        raise UserError(f"{what} is a run of {recorded['method']}, which has no decoder of masked patches, {why}")
    _load(method, what, path, step, give, of_teacher=heads)
    how = Preprocessing.for_size(backbone.image_size, images.mean, images.std)
    lineage = {"method": recorded["method"], "step": step}
    return TeacherRun(
        Encoder(backbone, str(recorded["encoder"]), how, lineage), method, start_state.fingerprint(path, step)
    )


def _built(recorded: dict[str, Any], path: Path, own: str) -> tuple[type[Method], _Images, Any, Backbone]:
    """The class of the method, what is known of its images, its knobs, and the encoder with random weights. Raises
    UserError."""
    kind = pretext.load(str(recorded.get("method")))
    name = str(start_weights.of_recorded(recorded, path)["encoder"])
    if backbones.prefix(name) == "module" and name != own:
        raise UserError(f"its encoder is your own code, which no file may name: give the run --encoder {name}, too")
    parts = [_Images, kind.Config, backbones.config_class(name)]
    known = {flags.stored_name(field) for part in parts for field in dataclasses.fields(part)}
    chosen = {key: recorded[key] for key in recorded if key in known - start_weights.OF_TRAINING}
    images, knobs, options = flags.parse(parts, [], chosen, prog="config.yaml", description="")
    if not len(images.mean) == len(images.std) == images.in_chans or len(images.image_size) not in (1, 2):
        raise UserError("image_size, in_chans, mean and std do not fit together")
    size = (images.image_size[0], images.image_size[-1])
    with torch.random.fork_rng(devices=[]):
        backbone = backbones.build(name, image_size=size, in_chans=images.in_chans, **dataclasses.asdict(options))
    return kind, images, knobs, backbone


def _load(method: Method, what: str, path: Path, step: int, give: str, *, of_teacher: bool) -> None:
    """Read the weights of a method. Those in the checkpoint that `prepare` would add are left out; with `of_teacher` those
    of its EMA teacher take the place of the student's. Raises UserError for a damaged checkpoint, and for one without all
    of them, with the differences."""
    reader, own = start_state.undamaged(what, path, step), method.state_dict()
    kept_as = {name: f"teacher.{name}" if of_teacher and name.split(".")[0] in _OF_TEACHER else name for name in own}
    names = {stored: name for name, stored in kept_as.items()}
    there = {names[name]: shape for (part, name), shape, _ in reader.entries() if part == "method" and name in names}
    if unfit := encoder.differences({name: tuple(value.shape) for name, value in own.items()}, there):
        raise UserError(
            f"{what}: the checkpoint of step {step} has not the weights of the method in {path / 'config.yaml'}: "
            f"{'; '.join(unfit)}: {give}"
        )
    reader.read_some({f"method/{kept_as[name]}": value for name, value in own.items()})
