"""Encoders of other libraries as encoders of this package, which can be trained and exported.

Shapes: B images, C channels, H x W pixels.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .. import backbones, plugins
from ..backbones import forms
from ..encoder import Encoder
from ..errors import UserError
from . import libraries, published, published_swin
from .libraries import Foreign
from .specs import Spec
from .weights import difference

TOLERANCE = 1e-4  # largest difference from the library's own features, over their largest value
HF_FILES = ("model.safetensors", "pytorch_model.bin")  # the weights in a folder of transformers


def weights_file(spec: Spec) -> Path:
    """The file with the weights of a spec. Raises UserError where there is none, or if several files share them."""
    if spec.kind == "torch":
        return Path(spec.name)
    if spec.kind == "hf":
        for name in HF_FILES:
            if (Path(spec.name) / name).is_file():
                return Path(spec.name) / name
        raise UserError(
            f"{spec}: {spec.name} has no {' or '.join(HF_FILES)}; weights in several files: save them as one with "
            f"transformers (model.save_pretrained(FOLDER, max_shard_size='100GB'))"
        )
    if spec.kind == "timm":
        if "checkpoint" in spec.options:
            return Path(spec.options["checkpoint"])
        timm = plugins.optional("timm", str(spec))
        return libraries.cached_weights(timm.create_model(spec.name, pretrained=False).pretrained_cfg, spec)
    raise UserError(
        f"{spec}: code of your own cannot be converted to an encoder of this package: give an export, a run, or timm:, "
        f"hf: or torch:"
    )


def convert(spec: Spec, image_size: tuple[int, int] | None = None, *, partial: bool = False) -> Encoder:
    """The encoder that a spec names (kinds timm, hf and torch) as one of this package, in eval mode on the CPU.

    image_size: (height, width) to resize position tables for; by default that of the spec, else that of the weights
    (DINOv2: 224). partial: see `published.read`.
    Raises UserError as `libraries.load`, and for an architecture that no encoder of this package has.
    """
    file, size = weights_file(spec), image_size or spec.image_size()
    if spec.kind == "timm":
        return _timm(spec, file, size)
    heads = spec.integers("heads") if spec.kind == "torch" else None
    encoder = published.read(
        file,
        layout=spec.options.get("layout"),
        heads=heads[0] if heads else None,
        part=spec.options.get("part"),
        image_size=size,
        partial=partial,
    )
    options = {name: value for name, value in spec.options.items() if name != "image-size"}
    encoder.preprocessing = libraries.prepared(
        Spec(spec.kind, spec.name, options), encoder.preprocessing, firm="preprocessing" in encoder.lineage
    )
    return encoder


def _timm(spec: Spec, file: Path, image_size: tuple[int, int] | None) -> Encoder:
    """A model of timm. That the two are the same is checked on an image of noise."""
    options = {name: value for name, value in spec.options.items() if name != "image-size"}
    theirs = libraries.load(str(Spec(spec.kind, spec.name, options | {"checkpoint": str(file)})))
    module, how = cast(Any, cast(Foreign, theirs.backbone).module), theirs.preprocessing
    if published.COMMON in module.state_dict():
        if published_swin.is_swin(module.state_dict()):
            facts = published_swin.timm_facts(module)
        else:
            first = module.blocks[0]
            facts = {"num_attention_heads": first.attn.num_heads}
            facts |= {"layer_norm_eps": first.norm1.eps, "rms_norm_eps": first.norm1.eps}

        def read(size: tuple[int, int] | None) -> Encoder:
            return published.read(file, weights=module.state_dict(), facts=facts, image_size=size)

        ours = read(how.crop)
        _compare(spec, theirs, ours, how.crop)
        ours = ours if image_size in (None, how.crop) else read(image_size)
    else:
        ours = _of_the_same_name(spec, module, theirs, image_size or how.crop)
        _compare(spec, theirs, ours, how.crop, "pooled")  # timm's map of a ConvNeXt is that before the final norm
    ours.preprocessing = how
    ours.lineage = {"method": f"timm:{spec.name}", "weights": str(file)}
    return ours


def _of_the_same_name(spec: Spec, module: nn.Module, theirs: Encoder, size: tuple[int, int]) -> Encoder:
    """A convnet of timm whose name and weights an encoder of this package has too."""
    name = spec.name.split(".")[0]
    weights = {key: value for key, value in module.state_dict().items() if not key.endswith("num_batches_tracked")}
    if name in backbones.own():
        with torch.random.fork_rng(devices=[]):
            backbone = backbones.build(name, image_size=size, in_chans=theirs.backbone.in_chans)
        own = {key: value for key, value in backbone.state_dict().items() if not key.endswith("num_batches_tracked")}
        form = forms.timm_form(backbone)
        if isinstance(form, forms.Form):
            weights = form.ours(weights)
        # timm has the linear layers of smaller ConvNeXts as convolutions.
        weights = {
            key: value.flatten(1) if key in own and own[key].ndim == 2 and value.shape[2:] == (1, 1) else value
            for key, value in weights.items()
        }
        if not difference(own, weights):
            backbone.load_state_dict(weights, strict=False)
            return Encoder(backbone, name, theirs.preprocessing, {}).eval()
    raise UserError(f"{spec}: no encoder of this package has this architecture, so its weights cannot be converted")


@torch.inference_mode()
def _compare(spec: Spec, theirs: Encoder, ours: Encoder, size: tuple[int, int], part: str = "patches") -> None:
    """Raise UserError unless both encoders give the same `part` of Features for an image of noise."""
    noise = torch.randn(1, theirs.backbone.in_chans, *size, generator=torch.Generator().manual_seed(0))
    expected, found = (getattr(each.eval()(noise), part) for each in (theirs, ours))
    off = (
        float((found - expected).abs().max() / expected.abs().max()) if found.shape == expected.shape else float("inf")
    )
    if not off <= TOLERANCE:
        raise UserError(
            f"{spec}: timm's model has parts that no encoder of this package has (its features differ by {off:.1g} of "
            f"the largest), so its weights cannot be converted"
        )
