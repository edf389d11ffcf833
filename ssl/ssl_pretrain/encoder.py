"""Exported encoders: written by the training loop, read by evaluators and by other programs.

An export is a folder with `model.safetensors` (weights), `config.json` (architecture, preprocessing, lineage, a hash of
the weights; and what timm and transformers look for, where they have such a model) and a model card.
Shapes: B images, C channels, H x W pixels.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import backbones, model_card
from .backbones import forms
from .backbones.backbone import Backbone, Features
from .errors import UserError
from .files import export_folder, sync, write_text
from .randomness import key

FORMAT = 2  # of config.json; a reader refuses a newer one. 1: the weights have our names
SHOWN = 10  # largest number of names that a message lists for each kind of mismatch
# Options that may differ between an export and the encoder that starts from its weights (--init-from), because they do
# not change the meaning of weights. All others must agree, for instance heads, whose number no weight's shape shows.
FREE = frozenset({"drop_path", "drop_path_uniform", "drop_rows", "pool", "q_pool", "window"})


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of the encoder's training images: resize the shorter side to `resize` pixels, take the central
    `crop` (height, width), scale to [0, 1], subtract `mean`, divide by `std`."""

    resize: int
    crop: tuple[int, int]
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return len(self.mean)

    @classmethod
    def for_size(cls, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> "Preprocessing":
        """The usual evaluation crop: 224 of 256 pixels, or in that proportion; up to 112 pixels the whole image, as for
        data sets of small images."""
        short = min(size)
        return cls(round(short * 256 / 224) if short > 112 else short, size, "bicubic", mean, std)

    def __call__(self, image: Image.Image | np.ndarray | bytes) -> Tensor:
        """One picture (see `Encoder.preprocess`) as (C, H, W) float32: a transform for a torch data set. It holds no
        weights, so it is cheap to send to a loader's processes. Raises UserError for one that cannot be read."""
        from .data.decode import BadImage

        try:
            return self.normalise(torch.from_numpy(self.pixels(image)))
        except BadImage as problem:
            raise UserError(f"image to encode: {problem}") from None

    def pixels(self, image: Image.Image | np.ndarray | bytes) -> np.ndarray:
        """The crop of one picture (see `Encoder.preprocess`), (H, W, C) uint8. Raises BadImage."""
        from .data.decode import decode, eight_bits
        from .data.views import resize_and_crop

        if isinstance(image, Image.Image) and self.channels in (1, 3):
            pixels = eight_bits(ImageOps.exif_transpose(image), self.channels)
        else:
            pixels = decode(np.asarray(image) if isinstance(image, Image.Image) else image, self.channels)
        return resize_and_crop(pixels, self.resize, self.crop, self.interpolation)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Crops (..., H, W, C) uint8, on any device, to (..., C, H, W) float32."""
        mean, std = (torch.tensor(v, device=pixels.device) for v in (self.mean, self.std))
        return ((pixels.float() / 255 - mean) / std).movedim(-1, -3)


@final
class Encoder(nn.Module):
    """A backbone with its preprocessing. Call it with images (B, C, H, W) from `preprocess`; it returns Features.

    Attributes: `backbone`; `name`, the encoder's name in `backbones.names()`; `preprocessing`; `lineage`, the origin of
    the weights (method, data, step, ...) as JSON data.
    """

    def __init__(self, backbone: Backbone, name: str, preprocessing: Preprocessing, lineage: Mapping[str, Any]) -> None:
        super().__init__()
        self.backbone, self.name, self.preprocessing = backbone, name, preprocessing
        self.lineage = dict(lineage)

    def preprocess(self, images: Sequence[Image.Image | np.ndarray | bytes]) -> Tensor:
        """Convert pictures to (B, C, H, W) float32 on the encoder's device. They are PIL images of any mode, arrays
        (H, W, C) uint8, or the bytes of image files; they are rotated as their EXIF orientation says.

        Raises UserError for one that cannot be read or whose number of channels the encoder does not accept.
        """
        from .data.decode import BadImage

        crops = []
        for i, image in enumerate(images):
            try:
                crops.append(self.preprocessing.pixels(image))
            except BadImage as problem:
                raise UserError(f"image {i} of the {len(images)} to encode: {problem}") from None
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        return self.normalise(torch.from_numpy(np.stack(crops)).to(device))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Crops (B, H, W, C) uint8, on any device, to (B, C, H, W) float32."""
        return self.preprocessing.normalise(pixels)

    def forward(
        self, images: Tensor, *, maps: bool = False, attention_of: tuple[int, ...] = (), **options: Any
    ) -> Features:
        """See `Backbone.forward`. With `maps` or `attention_of`, raises UnsupportedByBackbone where the backbone has
        none."""
        if maps:
            self.backbone.require("the option maps", "maps")
            options["maps"] = True
        if attention_of:
            self.backbone.require("the option attention_of", "attention_maps")
            options["attention_of"] = attention_of
        return self.backbone(images, **options)

    @property
    def fingerprint(self) -> str:
        """Hex text, equal for equal weights (in their current state), architecture and preprocessing."""
        text = json.dumps(described(self), sort_keys=True) + weights_hash(self.backbone.state_dict())
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def save(path: Path, encoder: Encoder) -> None:
    """Write an export to the folder `path`; an older one is replaced.

    Files are written under temporary names, synced and renamed. The weights contain config.json in their header, so a
    process that is killed between two renames (or a disk that becomes full there) leaves the old export or the new one.
    Raises OSError if it cannot be written.
    """
    own = {name: value.detach().cpu().contiguous() for name, value in encoder.backbone.state_dict().items()}
    form = forms.of_export(encoder.backbone)
    weights = own if form is None else form.theirs(own)
    config = {"format": 1, **described(encoder), "lineage": encoder.lineage, "weights": weights_hash(weights)}
    if form is not None and (weights.keys() != own.keys() or form.rows[1]):
        config |= {"format": FORMAT, "names": form.library}
    if form is not None:
        config |= library_config(encoder, form)
    if timm_config := getattr(encoder.backbone, "timm_config", None):  # a model of timm
        config |= timm_config(encoder.preprocessing)
    write_export(path, weights, config)
    write_card(path, encoder)
    sync(path)


def write_export(path: Path, weights: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write model.safetensors, with `config` in its header, and config.json to the folder `path`, as `save` says. The
    caller syncs the folder. Raises OSError if it cannot be written."""
    path.mkdir(parents=True, exist_ok=True)
    aside = path / f".model.safetensors.{os.getpid()}"
    text = json.dumps(config, indent=1) + "\n"
    try:
        save_weights(weights, aside, {"format": "pt", "config": text})
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path / "model.safetensors")
    except (OSError, SafetensorError) as problem:
        aside.unlink(missing_ok=True)
        raise problem if isinstance(problem, OSError) else _system_error(problem, path) from None
    write_text(path / "config.json", text)


def save_weights(weights: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file. The library writes metadata in a random order, so it is put in order afterwards: equal
    exports are equal bytes."""
    save_file(weights, file, metadata=metadata)
    with open(file, "r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = metadata
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the header became longer"
        opened.seek(8)
        opened.write(text.ljust(length))


def _system_error(problem: SafetensorError, path: Path) -> OSError:
    """An error of the safetensors library as the system's, of which it gives the number in words."""
    number = re.search(r"os error (\d+)", str(problem))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else OSError(f"{path}: {problem}")


def load(path: str | Path, device: str | torch.device = "cpu", *, code: str | None = None) -> Encoder:
    """Load the encoder in a folder, or in the `encoder/` of a run folder; in eval mode on `device`, all weights
    trainable.

    code: "module:PACKAGE:FUNCTION" for an encoder of your own code. Such an encoder is loaded only if `code` is the name
    in its config.json: nothing is imported because a file names it.

    Raises UserError if there is none, if a newer version wrote it, if its weights do not match its architecture key for
    key, if they are not the ones that were saved, and for code that was not given.
    """
    folder = export_folder(Path(path))
    config, weights = read_export(folder)
    if "quantizer" in config:
        raise UserError(f"{folder} is a tokenizer, not an encoder: give the run, or the encoder/ beside it")
    opened = from_description(config, folder, code)
    renamed = _our_names(config, opened.backbone, weights, folder)
    check_names(opened.backbone, renamed, folder)
    opened.backbone.load_state_dict(renamed)
    check_hash(config, weights, folder)
    return opened.to(device).eval()


def from_description(config: Mapping[str, Any], folder: Path, code: str | None = None) -> Encoder:
    """The encoder that the config.json of an export describes, with random weights. Raises UserError as `load` does."""
    described, wanted = config["backbone"], config["preprocessing"]
    try:
        crop, mean, std = (tuple(wanted[name]) for name in ("crop", "mean", "std"))
        preprocessing = Preprocessing(wanted["resize"], crop, wanted["interpolation"], mean, std)
        _check_code(described["name"], code, folder)
        backbone = _build(described["name"], described["image_size"], described["in_chans"], described["options"])
        lineage, _ = config["lineage"], config["weights"]
    except (KeyError, TypeError, ValueError) as problem:
        raise UserError(f"{folder / 'config.json'} does not describe an encoder: {problem!r}") from None
    except UserError as problem:
        hint = (
            "" if backbones.known(described["name"]) else ". An encoder of another package needs that package installed"
        )
        raise UserError(f"{folder / 'config.json'}: {problem}{hint}") from None
    return Encoder(backbone, described["name"], preprocessing, lineage)


def check_hash(config: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raise UserError unless these are the weights that config.json was written with."""
    if weights_hash(weights) != config["weights"]:
        raise UserError(
            f"{folder / 'model.safetensors'} is damaged or was replaced: its weights are not those that config.json "
            f"belongs to; copy or export it again"
        )


def load_weights(path: str | Path, backbone: Backbone) -> None:
    """Load an export's weights into a backbone of the same architecture, which may have another image size.

    Raises UserError that lists the differences for another architecture, and as `load` does.
    """
    source = load(path, code=getattr(backbone, "code", None))
    load_from(source, backbone, str(export_folder(Path(path))))


def load_from(source: Encoder, backbone: Backbone, where: str, *, partial: bool = False) -> str:
    """Load an encoder's weights into a backbone of the same architecture, which may have another image size. `where` names
    the source in messages.

    partial: the architecture may differ; weights of other names or shapes are left out. Returns which these are, in words;
    empty without any. Raises UserError that lists the differences for another architecture, unless `partial`.
    """
    other = source.backbone
    own, theirs = ({**b.describe(), "in_chans": b.in_chans} for b in (backbone, other))
    unlike = [
        f"--{name.replace('_', '-')} {own.get(name)} instead of {theirs.get(name)}"
        for name in sorted({*own, *theirs} - FREE)
        if own.get(name) != theirs.get(name)
    ]
    if unlike and not partial:
        raise UserError(f"the encoder in {where} differs from the one to initialise: {', '.join(unlike)}")
    lacking = set(source.lineage.get("missing", ()))  # of a file that was read in part
    there = {name: value for name, value in other.state_dict().items() if name not in lacking}
    if not partial:
        weights = backbone.adapt(there, other.image_size)
        check_names(backbone, weights, where)
        backbone.load_state_dict(weights)
        return ""
    # The image size at which this encoder has the grid of the other one, whose patches may have another size.
    height, width = (
        side // theirs * ours
        for side, theirs, ours in zip(other.image_size, other.stride, backbone.stride, strict=True)
    )
    with contextlib.suppress(RuntimeError, ValueError, UserError):  # tables of another form are listed below
        there = backbone.adapt(there, (height, width))
    state = backbone.state_dict()
    fitting = {name: value for name, value in there.items() if name in state and value.shape == state[name].shape}
    backbone.load_state_dict(state | fitting)
    return "; ".join(differences(_shapes(state), _shapes(there)))


def random_like(encoder: Encoder | str | Path, seed: int = 0) -> Encoder:
    """An untrained encoder of the same architecture and preprocessing, in eval mode on the same device. Its weights are
    a function of the seed. `encoder` may also be a path as for `load`."""
    if not isinstance(encoder, Encoder):
        encoder = load(encoder)
    backbone = another(encoder.name, encoder.backbone, seed)
    device = next(encoder.parameters()).device
    return Encoder(backbone, encoder.name, encoder.preprocessing, {"method": "random", "seed": seed}).to(device).eval()


def resized(encoder: Encoder, image_size: tuple[int, int], *, window: int | None = None) -> Encoder:
    """The same weights in an encoder for images of `image_size` (height, width), in eval mode: position tables are resized,
    and the resizing and cropping of images keep their proportion. window: another side of the windows of attention, for an
    encoder that has them; its biases stay functions of the offsets with which it was trained.

    Raises UserError for an encoder without windows, and for weights that do not fit another size.
    """
    backbone, how = encoder.backbone, encoder.preprocessing
    options = backbone.describe()
    if window is not None:
        if "window" not in options:
            raise UserError(f"the encoder {encoder.name} has no windows of attention: leave out the window")
        options["window"] = window
    made = _build(encoder.name, image_size, backbone.in_chans, options)
    weights = made.adapt(backbone.state_dict(), backbone.image_size)
    check_names(made, weights, f"the encoder of {backbone.image_size[0]} x {backbone.image_size[1]} pixels")
    made.load_state_dict(weights)
    share = min(image_size) / min(how.crop)
    prepared = dataclasses.replace(how, resize=round(how.resize * share), crop=image_size)
    lineage = {**encoder.lineage, "resized_from": list(backbone.image_size)}
    device = next(encoder.parameters()).device
    return Encoder(made, encoder.name, prepared, lineage).to(device).eval()


def another(name: str, like: Backbone, seed: int = 0) -> Backbone:
    """A new backbone of the same architecture as `like`, which has this name; its weights are a function of the
    seed."""
    return _build(name, like.image_size, like.in_chans, like.describe(), seed)


def _build(name: str, image_size: Sequence[int], in_chans: int, options: Mapping[str, Any], seed: int = 0) -> Backbone:
    """A new backbone, without touching the process's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key(seed, "random encoder"))
        height, width = image_size
        return backbones.build(name, image_size=(height, width), in_chans=in_chans, **options)


def description(folder: Path) -> dict[str, Any]:
    """The config.json of an export, without reading the weights: that of the weights' header where they have one. It has
    "backbone" and "preprocessing" (mappings) and "weights" (their hash). Raises UserError for any other content."""
    try:
        with safe_open(folder / "model.safetensors", "pt") as opened:
            config = json.loads((opened.metadata() or {}).get("config", "{}"))
        config = config or json.loads((folder / "config.json").read_text(encoding="utf-8"))
        described, wanted = config["backbone"], config["preprocessing"]
        fits = [described[name] is not None for name in ("name", "image_size", "in_chans", "options")]
        fits += [wanted[name] is not None for name in ("mean", "std")]
        if config["format"] > FORMAT or not isinstance(described["options"], dict) or not all(fits):
            load(folder)  # says what is wrong
        return {**config, "weights": config["weights"]}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as problem:
        load(folder)
        raise UserError(f"{folder} does not describe an encoder: {problem!r}") from None


def _check_code(name: str, code: str | None, folder: Path) -> None:
    """Raise UserError for an encoder of somebody's own code (`module:`), unless the user gave the same name."""
    if backbones.prefix(name) == "module" and code != name:
        given = "" if code is None else f" You gave {code}."
        raise UserError(
            f"the encoder in {folder} is made by the code {name!r}, and nothing is imported because a file names it.{given}"
            f" If you know that code and trust it, give the same name: --code, or encoder.load(path, code=...)"
        )


def read_export(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the weights by name."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        newer = config["format"] > FORMAT
        parts = [config["backbone"], config["preprocessing"]]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{file} does not describe an encoder: {problem!r}") from None
    if newer:
        raise UserError(f"{file} has format {config['format']}, newer than {FORMAT}: upgrade ssl-pretrain to read it")
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{file} does not describe an encoder: its parts are not objects")
    try:
        weights = load_file(folder / "model.safetensors")
        with safe_open(folder / "model.safetensors", "pt") as opened:
            header = json.loads((opened.metadata() or {}).get("config", "{}"))
    except (OSError, SafetensorError, ValueError) as problem:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read: {problem}") from None
    if header.get("weights") not in (None, config.get("weights")) and header["weights"] == weights_hash(weights):
        config = header  # `save` was interrupted between its two renames: the weights are new, config.json is old
    return config, weights


def _our_names(
    config: Mapping[str, Any], backbone: Backbone, weights: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """The weights of a file under our names."""
    library = config.get("names")
    if library is None:
        return weights
    form = forms.of_export(backbone)
    if form is None or form.library != library:
        raise UserError(
            f"{folder / 'config.json'} says that the weights have the names of {library!r}, which this version does not "
            f"use for the encoder {config['backbone']['name']}: read it with the version that wrote it"
        )
    return form.ours(weights)


def check_names(backbone: nn.Module, weights: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise UserError that lists the differences, unless the weights have the backbone's names and shapes."""
    if found := differences(_shapes(backbone.state_dict()), _shapes(weights)):
        kind = type(backbone).__name__
        raise UserError(f"the weights in {where} do not fit the {kind} of its config: {'; '.join(found)}")


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def differences(own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> list[str]:
    """How given shapes by name differ from a model's own: how many names of each kind, and the first ones."""
    problems = {
        "missing": sorted(own.keys() - given.keys()),
        "unexpected": sorted(given.keys() - own.keys()),
        "of another shape": [
            f"{name} {given[name]} instead of {own[name]}"
            for name in sorted(own.keys() & given.keys())
            if own[name] != given[name]
        ],
    }
    return [
        f"{len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for what, names in problems.items()
        if names
    ]


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """Hex hash of tensors by name: names, types, shapes and bytes. It is "weights" in an export's config.json."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def described(encoder: Encoder) -> dict[str, Any]:
    """The architecture and the preprocessing for config.json."""
    return {
        "backbone": {
            "name": encoder.name,
            "image_size": list(encoder.backbone.image_size),
            "in_chans": encoder.backbone.in_chans,
            "options": encoder.backbone.describe(),
        },
        "preprocessing": dataclasses.asdict(encoder.preprocessing),
    }


def library_config(encoder: Encoder, form: forms.Form) -> dict[str, Any]:
    """What timm and transformers look for in config.json."""
    how, backbone = encoder.preprocessing, encoder.backbone
    if form.library == "transformers":
        return {**form.arguments, "architectures": [form.architecture]}
    short = min(how.crop)
    share = short / how.resize
    wrapper = {"model_type": "timm_wrapper", "architectures": ["TimmWrapperModel"]}
    if int(short / share) != how.resize:  # timm divides and rounds down
        share = short / (how.resize + 0.01)
    return {
        "architecture": form.architecture,
        "num_classes": 0,
        "num_features": backbone.dim,
        "global_pool": form.arguments.get("global_pool", ""),
        "model_args": form.arguments,
        "pretrained_cfg": {
            "input_size": [backbone.in_chans, *how.crop],
            "interpolation": how.interpolation,
            "crop_pct": share,
            "crop_mode": "center",
            "mean": list(how.mean),
            "std": list(how.std),
            "num_classes": 0,
            "pool_size": None,
            # With other than three channels timm would take the weights for those of three.
            "first_conv": form.first_conv if backbone.in_chans == 3 else None,
            "classifier": form.classifier,
        },
        **(wrapper if form.wrapped else {}),
    }


def write_card(path: Path, encoder: Encoder, scores: Sequence[model_card.Score] = ()) -> None:
    """Write the model card of the export in the folder `path`. Raises OSError if it cannot be written."""
    backbone, form = encoder.backbone, forms.of_export(encoder.backbone)
    of_timm = hasattr(backbone, "timm_config")  # a model of timm itself
    library = "timm" if of_timm else "ssl-pretrain" if form is None else form.library
    by_timm = forms.timm_form(backbone)
    wrapped = 'transformers.AutoModel.from_pretrained("this folder")'
    card = model_card.Card(
        encoder.name,
        library,
        (backbone.in_chans, *backbone.image_size),
        backbone.dim,
        {
            "timm": f"no, {by_timm}"
            if isinstance(by_timm, str) and not of_timm
            else '`timm.create_model("local-dir:this folder", pretrained=True)`',
            "transformers": "no: neither its classes nor timm's, which it wraps, fit"
            if library == "ssl-pretrain"
            else f"`{wrapped}`"
            if form is None or form.wrapped
            else "a folder of `ssl-export to transformers`",
        },
        getattr(backbone, "code", None),
    )
    write_text(path / "README.md", model_card.text(card, encoder.lineage, scores))
