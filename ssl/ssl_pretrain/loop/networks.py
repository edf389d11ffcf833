"""Opens the frozen networks that a method reads: `--teacher`, `--tokenizer`, or the start weights of the run.

Their names are those of `Method.frozen`. "teacher_run" and "teacher_heads" are the network of --teacher where the method
of a run is read, and files and messages call it "teacher", too (`word`). "teacher2" and so on are those of
`Method.more_teachers`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import encoder, model_card, tokenizer
from ..backbones.quantizer import Quantizer
from ..backbones.stored import StoredOutputs
from ..config import Resolved, Run
from ..data.views import Sight, ViewSpec
from ..distributed import World
from ..encoder import Encoder
from ..errors import UserError
from ..foreign import libraries
from ..foreign.specs import Spec
from ..frozen import Frozen, is_further_teacher, teacher_names
from ..pretext import Method
from . import manifest, start_state, start_weights, teacher_cache, teacher_run


def open_networks(run: Resolved, method: type[Method], knobs: Any, world: World) -> dict[str, Frozen]:
    """The frozen networks of a run by name, on this process's device.

    Raises UserError where a network is missing or not read, has other channels than the run, or cannot be loaded.
    """
    wanted = method.frozen(knobs)
    specs = {"teacher": run.teacher, "anchor": run.teacher or (str(run.init_from) if run.init_from else None)}
    specs |= dict.fromkeys(("teacher_run", "teacher_heads"), run.teacher)
    if run.teacher is not None and not {"teacher", "anchor", "teacher_run", "teacher_heads"} & set(wanted):
        raise UserError(
            f"--teacher is given, and --method {run.method} with these flags reads no teacher: leave it out"
        )
    if run.tokenizer is not None and "tokenizer" not in wanted:
        raise UserError(f"--tokenizer is given, and --method {run.method} with these flags reads none: leave it out")
    specs["tokenizer"] = run.tokenizer
    more = method.more_teachers(knobs)
    specs |= zip(teacher_names(1 + len(more))[1:], more, strict=True)
    teacher_cache.check_read(run, method, knobs)
    found = {}
    for name in wanted:
        spec = specs[name]
        if (folder := teacher_cache.folder(run, name)) is not None:
            found[name] = teacher_cache.opened(run, name, folder, spec)
            continue
        if spec is None:
            flags = "--init-from (or --teacher)" if name == "anchor" else f"--{word(name)}"
            if name == "anchor" and run.init_state:  # which --init-from would contradict
                flags = f"--teacher, for example --teacher {run.init_state.partition('@')[0]}"
            if name in ("teacher_run", "teacher_heads"):
                flags += f" ({teacher_run.GIVE if name == 'teacher_run' else teacher_run.GIVE_HEADS})"
            raise UserError(f"--method {run.method} with these flags reads a frozen network: name it with {flags}")
        if name in ("teacher_run", "teacher_heads"):
            theirs = teacher_run.open_run(spec, run.method, run.encoder, heads=name == "teacher_heads")
            found[name] = _frozen(theirs.encoder, theirs.fingerprint, spec, run, world, method=theirs.method)
            continue
        if name == "tokenizer":
            tokens = tokenizer.load(spec)
            found[name] = _frozen(tokens.encoder, tokens.fingerprint, spec, run, world, tokens.quantizer)
            continue
        # Start weights of another library are the encoder of ours that the run begins with.
        begins = name == "anchor" and run.teacher is None and start_weights.is_spec(spec)
        opened = (
            start_weights.converted(spec, run.image_size, run.partial) if begins else open_encoder(spec, run.encoder)
        )
        found[name] = _frozen(opened, opened.fingerprint, spec, run, world)
    return found


def word(name: str) -> str:
    """What files and messages call the network of that name."""
    return "teacher" if name in ("teacher_run", "teacher_heads") else name


def _flag(name: str) -> str:
    """The flag, without dashes, that names the network of that name."""
    return "more-teachers" if is_further_teacher(name) else word(name)


def open_encoder(spec: str, own: str) -> Encoder:
    """The encoder that a user names: an export, a run, or another library's (see `foreign.specs`). own: the run's encoder:
    an export of the user's own code loads if the command names the same code with --encoder. Raises UserError."""
    return libraries.load(spec) if Spec.parse(spec) else encoder.load(spec, code=own)


def check_sizes(networks: Mapping[str, Frozen], specs: tuple[ViewSpec, ...], teacher: str | None) -> None:
    """Raise UserError for a view that its network cannot see. teacher: what --teacher names."""
    for spec in specs:
        if spec.network is not None and not networks[spec.network].cached:
            network = networks[spec.network]
            anchored = "teacher" if network.spec == teacher else "init-from"
            network.check(anchored if spec.network == "anchor" else _flag(spec.network), spec.size, spec.network_pixels)


def check_unchanged(run: Resolved, networks: Mapping[str, Frozen]) -> None:
    """Raise UserError where the run in the folder was trained with another network of that name."""
    before = manifest.read(run.out).get("networks")
    if not isinstance(before, dict):
        return
    for name, network in networks.items():
        name = word(name)
        entry = before.get(name)
        entry = entry if isinstance(entry, dict) else {}
        known, kind = entry.get("fingerprint"), entry.get("rounded")
        if known == network.fingerprint and kind != _rounded(network):
            raise UserError(
                f"the run in {run.out} began with outputs of the {name} in {kind or 'float32'}, and now they are in "
                f"{_rounded(network) or 'float32'}: use the cache that it began with, or choose another --out"
            )
        if known not in (None, network.fingerprint):
            raise UserError(
                f"the run in {run.out} began with another {name}: {network.spec} has the fingerprint "
                f"{network.fingerprint[:8]}, it was {known[:8]}. Put the old file back, or choose another --out"
            )


def teachers_of(run: Run, out: Path) -> dict[str, str]:
    """What the teachers that the run in the folder `out` learns from are, by name; empty without a teacher."""
    networks = manifest.read(out).get("networks")
    if run.teacher is None or not isinstance(networks, dict):
        return {}
    names = (name for name in networks if name == "teacher" or is_further_teacher(name))
    return {name: run.teacher if name == "teacher" else str(networks[name]["spec"]) for name in names}


def open_teacher(run: Run, out: Path, name: str) -> Encoder:
    """One of `teachers_of`, opened with its own preprocessing, to be scored as the trained encoder is. On a GPU if there is
    one. Raises UserError where it cannot be opened."""
    spec = teachers_of(run, out)[name]
    part = manifest.read(out)["networks"][name].get("part")
    if part in ("method", "heads"):
        opened = teacher_run.open_run(spec, run.method, run.encoder, heads=part == "heads").encoder.eval()
    else:
        opened = open_encoder(spec, run.encoder).eval()
    return opened.to("cuda") if torch.cuda.is_available() else opened


def facts(networks: Mapping[str, Frozen]) -> dict[str, dict[str, Any]]:
    """What the manifest and the lineage say of the networks."""
    found: dict[str, dict[str, Any]] = {}
    for key, network in networks.items():
        name = word(key)
        found[name] = {"spec": network.spec, "fingerprint": network.fingerprint}
        if network.method is not None:  # read whole; what its run says of source and licence
            part = "heads" if key == "teacher_heads" else "method"
            found[name] |= {"part": part, **model_card.origin(str(start_state.folder_of(network.spec)))}
        if isinstance(network.backbone, StoredOutputs):  # the network itself may be gone
            found[name] |= network.backbone.origin
        if (kind := _rounded(network)) is not None:
            found[name]["rounded"] = kind
    return found


def _rounded(network: Frozen) -> str | None:
    """The type of number that its outputs were rounded to for a cache; None where they are those of the network."""
    kind = network.backbone.kind if isinstance(network.backbone, StoredOutputs) else None
    return kind if kind in ("float16", "bfloat16") else None


def _frozen(
    opened: Encoder,
    fingerprint: str,
    spec: str,
    run: Resolved,
    world: World,
    quantizer: Quantizer | None = None,
    method: Method | None = None,
) -> Frozen:
    how = opened.preprocessing
    if how.channels != run.in_chans:
        raise UserError(
            f"{spec} takes images of {how.channels} channels, and the run has --in-chans {run.in_chans}: choose a network "
            f"for the same images"
        )
    return Frozen(
        opened.backbone.to(world.device),
        spec=spec,
        fingerprint=fingerprint,
        sight=Sight(opened.backbone.stride, how.interpolation, opened.backbone.unit),
        own=(how.mean, how.std),
        run=(run.mean, run.std),
        quantizer=None if quantizer is None else quantizer.to(world.device),
        method=None if method is None else method.to(world.device),
    )
