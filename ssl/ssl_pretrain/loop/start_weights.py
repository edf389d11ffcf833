"""The weights that a run starts from (--init-from): the settings that they fix, and loading them.

The settings are read before the flags are parsed, so that no flag of the architecture has to be repeated.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import backbones, config
from ..errors import UserError
from ..files import export_folder
from ..foreign.specs import KINDS, Spec

# Encoder options that the weights do not fix: they change training only. --pool, --q-pool and --window change what is
# exported, so those of the weights are the default.
OF_TRAINING = frozenset({"drop_path", "drop_path_uniform", "drop_rows"})
FREE = OF_TRAINING | {"pool", "q_pool", "window", "image_size"}  # these flags may differ from the weights


def normalised(text: str | None) -> str | None:
    """A value of --init-from or --init-state as config.yaml has it: paths without superfluous dots and slashes; None for
    "none"."""
    if text is None or text.lower() == "none":
        return None
    return text if is_spec(text) else str(Path(text))


def is_spec(text: str) -> bool:
    """Whether it names an encoder of another library (timm:, hf:, torch:, module:) and not a path."""
    kind, colon, _ = text.partition(":")
    return bool(colon) and kind in KINDS


def settings(text: str, out: Path, *, partial: bool = False) -> dict[str, Any]:
    """The run's settings that the start weights fix, by flag: the encoder and its options, `in_chans`, `mean`, `std`,
    `image_size` and `init_fingerprint`, as plain data.

    If the folder `out` has a run that began with these weights, they are taken from its config.yaml, and the weights need
    not exist any more. Raises UserError if there are no such weights, or if no encoder of this package fits them.
    """
    recorded = recorded_settings(out)
    if recorded.get("init_from") == text:
        return of_recorded(recorded, out)
    if not is_spec(text):
        from .. import encoder  # torch: only now

        folder = export_folder(Path(text))
        found = encoder.description(folder)
        name, described = found["backbone"]["name"], found["backbone"]["options"]
        in_chans, size = found["backbone"]["in_chans"], found["backbone"]["image_size"]
        mean, std, fingerprint = found["preprocessing"]["mean"], found["preprocessing"]["std"], found["weights"]
    else:
        loaded = converted(text, None, partial)
        name, described = loaded.name, loaded.backbone.describe()
        in_chans, size = loaded.backbone.in_chans, list(loaded.backbone.image_size)
        mean, std = list(loaded.preprocessing.mean), list(loaded.preprocessing.std)
        fingerprint = _file_hash(text)
    fixed = {name: value for name, value in described.items() if name not in OF_TRAINING}
    beside_options = {"encoder": name, "in_chans": in_chans, "mean": mean, "std": std}
    return {**fixed, **beside_options, "image_size": size, "init_fingerprint": fingerprint}


def recorded_settings(out: Path) -> dict[str, Any]:
    """What the config.yaml of a run folder says; empty if it is no run's folder."""
    return config.read_recorded(out / "config.yaml") if (out / "config.yaml").is_file() else {}


def of_recorded(recorded: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Those of `settings` that the config.yaml of a run in `out` records. Raises UserError if it has no known encoder."""
    name = recorded.get("encoder")
    if not isinstance(name, str) or not backbones.known(name):
        raise UserError(f"{out / 'config.yaml'} names the encoder {name!r}, which is not known")
    options = {field.name for field in dataclasses.fields(backbones.config_class(name))} - OF_TRAINING
    beside = ("encoder", "in_chans", "mean", "std", "image_size", "init_fingerprint")
    return {key: recorded[key] for key in (*sorted(options), *beside) if key in recorded}


def refuse_contradictions(flag: str, text: str, fixed: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise UserError for settings of a run (plain data by flag) that differ from those that its start weights fix."""
    wrong = [
        f"--{name.replace('_', '-')} {_shown(given[name])} instead of {_shown(value)}"
        for name, value in fixed.items()
        if name not in FREE and name in given and given[name] != value
    ]
    if wrong:
        raise UserError(
            f"{flag} {text}: the flags contradict the weights: {', '.join(wrong)}: leave these flags out, or add "
            f"--partial to load the weights that fit"
        )


def load(run: config.Resolved, backbone: Any) -> list[str]:
    """Load the weights of --init-from into the run's encoder; position tables are resized to its grid. Returns what is
    to be said about it, a line each.

    Raises UserError for weights of another architecture (unless `run.partial`), with the differences, and for others than
    `run.init_fingerprint`.
    """
    from .. import encoder
    from ..foreign import libraries

    text, file = run.init_from, backbones.checkpoint(run.encoder)
    if text is not None and file is not None:
        raise UserError(f"--init-from {text} and checkpoint={file} are two starts: give one of them")
    if text is None:
        loaded = libraries.load_checkpoint(run.encoder, backbone)
        return [] if loaded is None else [f"starting from the weights of {loaded}"]
    if is_spec(text):
        source, found = converted(text, run.image_size, run.partial), _file_hash(text)
    else:
        source = encoder.load(text, code=getattr(backbone, "code", None))
        found = encoder.description(export_folder(Path(text)))["weights"]  # `load` has compared it with the weights
    check_fingerprint(run, f"--init-from {text}", found)
    unfit = encoder.load_from(source, backbone, text, partial=run.partial)
    lines = [f"starting from the weights of {text} (fingerprint {found})"]
    if "unfit" in source.lineage:
        lines.append(f"--partial: the file fits in part: {source.lineage['unfit']}")
    if unfit:
        lines.append(f"--partial: the weights fit the encoder in part: {unfit}")
    return lines


def check_fingerprint(run: config.Resolved, source: str, found: str) -> None:
    """Raise UserError for start weights of another fingerprint than --init-fingerprint."""
    if run.init_fingerprint not in (None, found):
        raise UserError(
            f"{source}: the weights have the fingerprint {found}, and --init-fingerprint says {run.init_fingerprint}: they "
            f"are not those that were meant, or have changed"
        )


def facts(run: config.Resolved) -> dict[str, Any]:
    """What the manifest and the lineage of exports say of the start weights; empty without any."""
    names = ("init_from", "init_state")
    found = {name: getattr(run, name) for name in names if getattr(run, name) is not None}
    if run.adapters != "none":
        found["adapters"] = f"{run.adapters} of rank {run.lora_rank}, merged"
    return {**found, "init_fingerprint": run.init_fingerprint} if found else {}


def converted(text: str, image_size: tuple[int, int] | None, partial: bool) -> Any:
    """The encoder of ours that another library's weights (timm:, hf:, torch:) become, for images of `image_size` (None:
    theirs). Raises UserError for weights that fit none; `partial` leaves out what does not fit."""
    from ..foreign import conversion

    return conversion.convert(_spec(text), image_size, partial=partial)


def _spec(text: str) -> Spec:
    spec = Spec.parse(text)
    assert spec is not None
    return spec


def _file_hash(text: str) -> str:
    """Hex hash of a spec's file of weights."""
    from ..foreign import conversion

    with open(conversion.weights_file(_spec(text)), "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
