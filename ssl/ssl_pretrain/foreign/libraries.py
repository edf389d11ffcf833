"""Wraps encoders of other libraries and of your own code, so that every evaluator accepts them.

Shapes: B images, C channels, H x W pixels, D channels of the features, N patches on an (h, w) grid, P prefix tokens
(CLS, registers), L = P + N tokens.

No network: weights are local files, or (timm) in the cache of an earlier download. Nothing from a file is executed or
unpickled: files are safetensors, or torch files read with `weights_only`. So TorchScript and torch.export archives are
refused: both are programs, and reading the latter evaluates expressions. You can load a program that you trust in a
function named by `module:PACKAGE:FUNCTION`: importing what the user names on the command line is the user's decision.
"""

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from .. import backbones, plugins
from ..backbones import pyramid
from ..backbones.backbone import Backbone, Features
from ..backbones.module_encoder import made, read_output
from ..backbones.timm_maps import Levels, levels, with_stages
from ..backbones.timm_model import TimmModel
from ..backbones.wrapping import of_map, of_tokens
from ..encoder import Encoder, Preprocessing
from ..errors import UserError, nearest
from ..randomness import key
from .published import read as read_official
from .published import transformers_preprocessing
from .specs import Spec
from .weights import difference, flat, read_file

Read = Callable[[nn.Module, Tensor], Features]  # from a library's module and normalised images (B, C, H, W) to Features
ReadStages = Callable[[nn.Module, Tensor, Levels], Features]  # the same, with maps


@final
class Foreign(Backbone):
    """A module of another library. `patches` is its grid of tokens or its last map; `pooled` is the input of the
    library's classifier (its width may differ from the patches'). A module that gives one vector per image has one
    patch, and no maps. Maps are the outputs of stages, where they are known, else the last map resampled (pyramid.py)."""

    supports = frozenset()  # of any module; each has its own

    @dataclass(frozen=True)
    class Config:
        """Origin of the module."""

        spec: str
        """The spec, as given to --encoder."""

    def __init__(
        self,
        module: nn.Module,
        read: Read,
        spec: str,
        image_size: tuple[int, int],
        in_chans: int,
        stages: tuple[Levels, ReadStages] | None = None,
    ) -> None:
        """stages: which outputs of stages are the maps, and how to read them with the features."""
        super().__init__()
        self.module, self.read, self.stages = module.eval(), read, stages
        self.config, self.image_size, self.in_chans = self.Config(spec), image_size, in_chans
        try:
            with torch.inference_mode():
                features = read(module, torch.zeros(1, in_chans, *image_size))
        except (RuntimeError, ValueError, TypeError, AssertionError) as problem:
            raise UserError(
                f"{spec} does not take an image of {in_chans} channels and {image_size[0]} x {image_size[1]} pixels: "
                f"{problem}; give another size with ,image-size="
            ) from None
        h, w = features.grid
        self.dim, self.depth = features.pooled.shape[1], 1
        self.stride = (max(image_size[0] // h, 1), max(image_size[1] // w, 1))
        if stages is None and h == w == 1:
            self.no_maps = f"{spec} gives one vector of an image, and no map"
            return
        self.supports = frozenset({"maps"})
        width = features.patches.shape[2]
        self.map_strides = pyramid.strides(self.stride) if stages is None else stages[0].strides
        self.map_channels = (width,) * len(pyramid.SCALES) if stages is None else stages[0].channels

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        replace: tuple[Tensor, Tensor] | None = None,
        attention: str | Tensor = "full",
        prefix_length: Tensor | None = None,
        blocks: tuple[int, ...] = (),
        drop: Tensor | None = None,
        maps: bool = False,
    ) -> Features:
        """See `Backbone.forward`; all options but `maps` are refused."""
        self.refuse_options(keep, replace, attention, prefix_length, blocks)
        if not maps:
            return self.read(self.module, images)
        self.require("the option maps", "maps")
        if self.stages is not None:
            wanted, read = self.stages
            return read(self.module, images, wanted)
        found = self.read(self.module, images)
        found.maps = pyramid.simple_pyramid(found.patches.mT.unflatten(2, found.grid))
        return found

    def layer_of(self, parameter: str) -> int:
        """All parameters belong to one block, because the structure of another library's module is not known."""
        return 1


def load(text: str) -> Encoder:
    """The encoder that a spec names (see `specs`), in eval mode on the CPU.

    Raises UserError for an invalid spec, a library that is not installed, files that do not exist or cannot be read
    without executing them, weights that do not fit key for key, and a preprocessing option that contradicts what the
    library states for the model.
    """
    spec = Spec.parse(text)
    if spec is None:
        raise UserError(f"{text} names no encoder of another library: timm:NAME, hf:FOLDER, torch:FILE, module:P:F")
    return {"timm": _timm, "hf": _transformers, "torch": _torch, "module": _module}[spec.kind](spec)


def untrained(encoder: Encoder, seed: int) -> Encoder:
    """An untrained copy of another library's encoder. Every layer is initialised by its class (`reset_parameters`);
    parameters outside such layers (tokens, positions, scales) are normal with standard deviation 0.02. The result is a
    function of the seed."""
    twin = copy.deepcopy(encoder.backbone)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(key(seed, "random encoder"))
        for part in twin.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
            else:
                for parameter in part.parameters(recurse=False):
                    parameter.normal_(std=0.02)
    return Encoder(twin, encoder.name, encoder.preprocessing, {"method": "random", "seed": seed}).eval()


def prepared(spec: Spec, stated: Preprocessing, *, firm: bool) -> Preprocessing:
    """The stated preprocessing, with the image size and the options of the spec.

    firm: the library states it for this model, so an option that contradicts it is an error (UserError); else it is
    only the layout's usual preprocessing. Another image size keeps the proportion of resize and crop.
    """
    crop = spec.image_size() or stated.crop
    requested: dict[str, Any] = {
        "resize": (spec.integers("resize") or (None,))[0],
        "interpolation": spec.options.get("interpolation"),
        "mean": spec.numbers("mean"),
        "std": spec.numbers("std"),
    }
    usual: dict[str, Any] = {
        "resize": round(stated.resize * min(crop) / min(stated.crop)),
        "interpolation": stated.interpolation,
        "mean": stated.mean,
        "std": stated.std,
    }
    for option, value in requested.items():
        if firm and value is not None and value != usual[option]:
            raise UserError(f"{spec}: {option} is {usual[option]} for this model; leave out {option}=")
    if requested["interpolation"] not in (None, "bicubic", "bilinear"):
        raise UserError(f"{spec}: interpolation must be bicubic or bilinear")
    merged = {option: usual[option] if value is None else value for option, value in requested.items()}
    if len(merged["mean"]) != len(merged["std"]):
        raise UserError(f"{spec}: mean and std need one number for each channel")
    return Preprocessing(crop=crop, **merged)


# ---- Published checkpoints, read into our ViT.


def _torch(spec: Spec) -> Encoder:
    file, heads = Path(spec.name), spec.integers("heads")
    encoder = read_official(
        file,
        layout=spec.options.get("layout"),
        heads=heads[0] if heads else None,
        part=spec.options.get("part"),
        image_size=spec.image_size(),
    )
    encoder.preprocessing = prepared(spec, encoder.preprocessing, firm="preprocessing" in encoder.lineage)
    return encoder


# ---- timm.


def _timm(spec: Spec) -> Encoder:
    timm = plugins.optional("timm", str(spec))
    if not timm.is_model(spec.name):
        raise UserError(f"{spec}: timm {timm.__version__} has no such model{_near(spec.name, timm.list_models())}")
    model = timm.create_model(spec.name, pretrained=False, num_classes=0)
    cfg = model.pretrained_cfg
    file = Path(spec.options["checkpoint"]) if "checkpoint" in spec.options else cached_weights(cfg, spec)
    _load_timm(model, file, spec)

    data = timm.data.resolve_data_config(pretrained_cfg=cfg)
    if data["interpolation"] not in ("bicubic", "bilinear"):
        raise UserError(f"{spec}: timm states {data['interpolation']} resizing; only bicubic and bilinear work")
    channels, height, width = data["input_size"]
    if len(data["mean"]) != channels or len(data["std"]) != channels:
        raise UserError(f"{spec}: timm states a mean and std that do not fit images of {channels} channels")
    resize = int(min(height, width) / data["crop_pct"])
    stated = Preprocessing(
        resize, (height, width), data["interpolation"], tuple(map(float, data["mean"])), tuple(map(float, data["std"]))
    )
    how = prepared(spec, stated, firm=True)
    if how.crop != stated.crop and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=how.crop)
    lineage = {"library": f"timm {timm.__version__}", "weights": str(file)}
    found = None
    with torch.inference_mode(), contextlib.suppress(Exception):  # an image that it does not take is refused below
        found = levels(model.eval(), torch.zeros(1, channels, *how.crop))
    return _encoder(spec, model, _read_timm, how, lineage, None if found is None else (found, _read_timm_stages))


def load_checkpoint(name: str, backbone: Backbone) -> str | None:
    """Load the file in an encoder's name, timm:NAME,checkpoint=FILE, and return its path; None for a name without one.

    Raises UserError for weights that do not exist or do not fit (a file may have a classifier more).
    """
    file = backbones.checkpoint(name)
    if file is not None and isinstance(backbone, TimmModel):
        spec = Spec.parse(name)
        assert spec is not None
        _load_timm(backbone.model, Path(file), spec)
    return file


def cached_weights(cfg: Mapping[str, Any], spec: Spec) -> Path:
    """The weights of an earlier download. Raises UserError if there are none."""
    if cfg.get("hf_hub_id"):
        hub = plugins.optional("huggingface_hub", str(spec))
        found = hub.try_to_load_from_cache(repo_id=cfg["hf_hub_id"], filename="model.safetensors")
        if isinstance(found, str):
            return Path(found)
    raise UserError(
        f"{spec}: its pretrained weights would have to be downloaded, and nothing is fetched here: give a local file, "
        f"timm:{spec.name},checkpoint=FILE"
    )


def _load_timm(model: Any, file: Path, spec: Spec) -> None:
    """Load weights from a file in timm's layout, or in a published layout that timm itself converts; strict except for
    the classifier."""
    content = read_file(file)
    for place in ("state_dict_ema", "model_ema", "state_dict", "model"):
        content = content[place] if isinstance(content.get(place), Mapping) else content
    weights = {name.removeprefix("module."): value for name, value in flat(content).items()}
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if translate is not None:
        # For a file of another model, timm's conversion may fail in any way; the check below reports what does not fit.
        with contextlib.suppress(LookupError, AttributeError, ValueError, RuntimeError, AssertionError):
            weights = translate(dict(weights), model)
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    weights = {k: v for k, v in weights.items() if not any(k.startswith(f"{head}.") for head in heads)}
    own = model.state_dict()
    if problem := difference(own, weights):
        raise UserError(f"{file} does not fit {spec.kind}:{spec.name}: {problem}")
    model.load_state_dict(weights)


def _read_timm(module: Any, images: Tensor) -> Features:
    return _timm_features(module, module.forward_features(images), images)


def _read_timm_stages(module: Any, images: Tensor, wanted: Levels) -> Features:
    x, maps = with_stages(module, images, wanted)
    found = _timm_features(module, x, images)
    found.maps = maps
    return found


def _timm_features(module: Any, x: Tensor, images: Tensor) -> Features:
    pooled = module.forward_head(x, pre_logits=True).flatten(1)
    if x.ndim == 4:
        return of_map(x.permute(0, 3, 1, 2) if getattr(module, "output_fmt", "NCHW") == "NHWC" else x, pooled)
    prefix = getattr(module, "num_prefix_tokens", 0)
    return of_tokens(x, images, prefix, getattr(module, "cls_token", None) is not None, pooled)


# ---- transformers.


def _transformers(spec: Spec) -> Encoder:
    library, folder = plugins.optional("transformers", str(spec)), Path(spec.name)
    if not (folder / "config.json").is_file():
        raise UserError(f"{spec}: {folder} has no config.json: give a folder that save_pretrained wrote")
    stated = transformers_preprocessing(folder)
    if stated is None:
        raise UserError(f"{spec}: {folder} has no preprocessor_config.json, which states the preprocessing")
    auto = plugins.part(library, "AutoModel", str(spec))
    try:
        model = auto.from_pretrained(folder, local_files_only=True, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as problem:
        reason = " ".join(str(problem).split())
        raise UserError(
            f"{spec}: transformers {library.__version__} cannot read it without executing it: {reason}"
        ) from None
    if model.config.model_type == "vit_mae":
        raise UserError(
            f"{spec}: as an encoder, transformers' ViTMAE drops most patches and shuffles the rest; read its weights into "
            f"our ViT instead: torch:{folder / 'model.safetensors'}"
        )
    how = prepared(spec, stated, firm=True)
    lineage = {"library": f"transformers {library.__version__}", "weights": str(folder)}
    return _encoder(spec, model, _read_transformers, how, lineage)


def _read_transformers(module: Any, images: Tensor) -> Features:
    parameters = inspect.signature(module.forward).parameters
    options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
    output = module(pixel_values=images, **options)
    x = output.last_hidden_state
    if x.ndim == 4:
        pooled = getattr(output, "pooler_output", None)
        return of_map(x, x.mean((2, 3)) if pooled is None else pooled.flatten(1))
    size = getattr(module.config, "patch_size", None)
    if size is None:
        raise ValueError(f"{type(module).__name__} gives tokens and no patch size to lay them out by")
    merged = 2 ** (len(module.config.depths) - 1) if module.config.model_type in ("swin", "swinv2") else 1
    p, q = (side * merged for side in ((size, size) if isinstance(size, int) else size))
    prefix = x.shape[1] - (images.shape[2] // p) * (images.shape[3] // q)
    has_cls = prefix > getattr(module.config, "num_register_tokens", 0)
    return of_tokens(x, images, prefix, has_cls, None)


# ---- Your own code.


def _module(spec: Spec) -> Encoder:
    module = made(spec.name)
    stated = getattr(module, "preprocessing", None)
    if stated is not None and not isinstance(stated, Preprocessing):
        raise UserError(f"{spec}: its `preprocessing` must be a ssl_pretrain.encoder.Preprocessing")
    if stated is not None:
        how = prepared(spec, stated, firm=True)
    else:
        size, mean, std = spec.image_size(), spec.numbers("mean"), spec.numbers("std")
        if size is None or mean is None or std is None:
            raise UserError(
                f"{spec}: state the preprocessing: ,image-size=224,mean=imagenet,std=imagenet (or numbers, "
                f"mean=0.5/0.5/0.5), or give the module an attribute `preprocessing`"
            )
        how = prepared(spec, Preprocessing.for_size(size, mean, std), firm=False)
    return _encoder(spec, module, _read_module, how, {"library": spec.name.partition(":")[0]})


def _read_module(module: nn.Module, images: Tensor) -> Features:
    return read_output(module(images), images)


# ---- Common functions.


def _encoder(
    spec: Spec,
    module: nn.Module,
    read: Read,
    how: Preprocessing,
    lineage: dict[str, Any],
    stages: tuple[Levels, ReadStages] | None = None,
) -> Encoder:
    backbone = Foreign(module, read, str(spec), how.crop, how.channels, stages)
    return Encoder(backbone, f"{spec.kind}:{spec.name}", how, lineage).eval()


def _near(name: str, known: list[str]) -> str:
    """The nearest known name; empty if none is near, because the whole list is too long."""
    hint = nearest(name, known)
    return hint if hint.startswith("; did") else ""
