"""A model of timm as an encoder: `--encoder timm:NAME`. timm is imported when one is built.

Any model gives pooled vectors and patches, and maps if it has a grid of patches. A plain ViT (timm's class
`VisionTransformer`) also takes masks and gives its attention. What differs from timm in training: batch norms have the
statistics of the global batch, drop path follows the run's noise, dropout is off. The weights have timm's names.

Shapes: B images, C channels, H x W pixels, N patches on an (h, w) grid, P prefix tokens, L = P + N, D width of the
pooled vector and of the patches, n drop path layers.
"""

import ast
import contextlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from .. import plugins
from ..distributed.batch_norm import BatchNorm2d, globalize
from ..errors import UserError, nearest
from ..flags import FROM_0_BELOW_1, within
from . import pyramid
from .attention import prefix_mask
from .backbone import Backbone, Features
from .drop_path import drop_factors, given
from .timm_attention import give_attention
from .timm_maps import Levels, levels, with_stages
from .wrapping import dropouts, of_tokens, use_inner_names

# Arguments that models get if they take them: other image sizes than the configured one, and drop path layers, whose
# rates are read as shares of this one.
FLEXIBLE = {"dynamic_img_size": True, "strict_img_size": False}
REFERENCE_RATE = 0.5
PROBED = 256  # side in pixels of the image that shows the stride; models of a fixed size get their own size
ARGUMENT = re.compile(r"(unexpected keyword argument|multiple values for keyword argument) '(\w+)'")
RESERVED = re.compile(
    r"pretrained|checkpoint|cache|script|export|jit|drop|^num_classes$|^in_chans$|img_size|^features_only$"
)
VALUE = re.compile(r"\w*")  # a string as the value of an argument: the name of a layer or a rule


class _BatchNormAct2d(BatchNorm2d):
    """timm's batch norm with an activation behind it, and the statistics of the global batch."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to the same shape; `visible` as the batch norm takes it."""
        return self.act(self.drop(super().forward(x, visible)))


class _DropPath(nn.Module):
    """In the place of timm's DropPath. `factors` (B,) on each sample's branch are set before a forward pass; None: nothing
    is dropped."""

    def __init__(self, share: float, scaled: bool) -> None:
        """share: the layer's rate as a share of the highest one. scaled: whether kept branches are scaled up."""
        super().__init__()
        self.share, self.scaled = share, scaled
        self.factors: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same shape."""
        if self.factors is None:
            return x
        return x * self.factors.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


@final
class TimmModel(Backbone):
    """A model of timm without its classifier. `pooled` is the input of the classifier; `patches` are what the model's head
    makes of each position, so they have the same width. `depth` counts timm's layer groups after the stem.

    Raises UserError without timm, for an unknown model, and for a model or an argument that does not fit.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The encoder (timm)."""

        timm_model: str
        """Name of the model, given by --encoder timm:NAME."""
        timm_args: tuple[str, ...] = ()
        """More arguments of the model, each 'NAME=VALUE', for example 'patch_size=8'."""
        drop_path: float = 0.0
        """Drop path rate (stochastic depth) of the last block; those of the others follow from it by timm's rule."""

        def __post_init__(self) -> None:
            within(self, FROM_0_BELOW_1, "drop_path")
            _arguments(self.timm_args)

    supports = frozenset()  # of any model; each has its own

    def __init__(self, image_size: tuple[int, int], in_chans: int, config: Config) -> None:
        super().__init__()
        if in_chans <= 0:
            raise UserError(f"--in-chans is {in_chans}; it must be above 0")
        height, width = image_size
        self.config, self.image_size, self.in_chans = config, (height, width), in_chans
        timm = _timm(config.timm_model)
        self.check_name(config.timm_model)
        needed: dict[str, Any] = {"num_classes": 0, "in_chans": in_chans, **_arguments(config.timm_args)}
        self._given = self._accepted(
            needed, {"img_size": (height, width), **FLEXIBLE, "drop_path_rate": REFERENCE_RATE}
        )
        model: Any = timm.create_model(config.timm_model, pretrained=False, **self._given)
        globalize(model, {timm.layers.BatchNormAct2d: _BatchNormAct2d})
        for part in dropouts(model).values():
            part.p = 0.0
        self._drop_paths = _replace_drop_paths(model, timm)
        self.model = model
        use_inner_names(self)
        self._norms = [part for part in model.modules() if isinstance(part, BatchNorm2d)]
        plain = type(model) is timm.models.vision_transformer.VisionTransformer
        # With another stem (a small ResNet), patches are not those of the patch size that timm states.
        self._is_vit = plain and model.attn_pool is None and type(model.patch_embed) is timm.layers.PatchEmbed
        has_cls = getattr(model, "cls_token", None) is not None
        self._prefix = int(getattr(model, "num_prefix_tokens", has_cls))
        self._layers = self._layer_groups(timm)
        self.depth = max([1, *self._layers.values()])
        self._patches: Literal["head", "map", "pooled"] = "head"  # what the patches of a map are
        self._levels: Levels | None = None  # None: maps are resampled from the patches
        self._taken: set[tuple[int, int]] = set()  # image sizes that were encoded
        self.dim, self.stride = self._probe(timm)
        words = {"pooled_only"} if not self._is_vit else {"keep", "replace", "attention", "blocks"}
        if self._patches == "pooled" and self._levels is None:
            self.no_maps = f"timm's {config.timm_model} gives one vector of an image, and no map"
        else:
            words.add("maps")
            self.map_strides = pyramid.strides(self.stride) if self._levels is None else self._levels.strides
            self.map_channels = (self.dim,) * len(pyramid.SCALES) if self._levels is None else self._levels.channels
        if self._is_vit and give_attention(model, timm):
            words.add("attention_maps")
        if 0 < len(self._drop_paths) <= 2 * self.depth:
            words.add("drop_path")
        elif config.drop_path > 0:
            raise UserError(
                f"--drop-path {config.drop_path}: timm's {config.timm_model} has {len(self._drop_paths)} drop path layers "
                f"in {self.depth} blocks, and one or two a block can be used: give --drop-path 0"
            )
        self.supports = frozenset(words)

    @property
    def drops_by_state(self) -> bool:
        """Whether blocks read drop path factors that are set only during a forward pass: they cannot be computed again
        later."""
        return self.config.drop_path > 0

    @staticmethod
    def check_name(name: str) -> None:
        """Raise UserError unless timm is installed and has that model; a name may end with a tag of pretrained weights."""
        timm = _timm(name)
        if not re.fullmatch(r"[\w.-]+", name) or not timm.is_model(name):
            hint = nearest(name.partition(".")[0], timm.list_models())
            hint = (
                hint if hint.startswith("; did") else "; python -c 'import timm; print(timm.list_models())' lists them"
            )
            raise UserError(f"timm {timm.__version__} has no model {name!r}{hint}")

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
        pooled_only: bool = False,
        maps: bool = False,
        attention_of: tuple[int, ...] = (),
        attention_logits: bool = False,
    ) -> Features:
        """See `Backbone.forward`. Drop path layer i uses column i of `drop`. In training, `patches` do not change the
        running statistics of a head with batch norm. Maps are the outputs of the last four stages of different strides,
        before the final norm; those of a model whose stages do not get coarser are resampled from `patches`
        (pyramid.py).

        Raises UserError for images with another number of channels, for sizes that the model does not take and for maps
        with `keep`, UnsupportedByBackbone for an option that the model does not support, RuntimeError if the noise of
        drop path is missing.
        """
        self.refuse_options(keep, replace, attention, prefix_length, blocks)
        if maps:
            self.require("the option maps", "maps")
        if attention_of:
            self.require("the option attention_of", "attention_maps")
        if maps and keep is not None:
            raise UserError("maps are of whole images: ask for them without keep, which leaves patches out")
        if images.shape[1] != self.in_chans:
            raise UserError(f"the encoder takes images of {self.in_chans} channels, not {images.shape[1]}")
        size = images.shape[2], images.shape[3]
        if self._is_vit:
            self._check_patches(*size)
        with self._dropping(drop), self._refusing(size):
            if self._is_vit:
                kind = "logits" if attention_logits else "weights"
                found = self._tokens(images, keep, replace, attention, prefix_length, blocks, attention_of, kind)
            elif maps and self._levels is not None:
                x, stages = with_stages(self.model, images, self._levels)
                found = self._plain(self.model, x, images, pooled_only)
                found.maps = tuple(_precise(each, self.model) for each in stages)
            else:
                x = self.model.forward_features(images)
                found = self._plain(self.model, x, images, pooled_only and not maps)
            if maps and self._levels is None:
                found.maps = pyramid.simple_pyramid(found.patches.mT.unflatten(2, found.grid))
        return found

    def layer_of(self, parameter: str) -> int:
        """See `Backbone.layer_of`: timm's layer groups (`group_matcher`), which layer decay in timm uses. What timm
        attaches to the last block although it follows the blocks (the final norm of a ViT) is depth + 1. An update of a
        weight is in the weight's layer. Raises KeyError for an unknown parameter."""
        layer = self._layers[re.sub(r"parametrizations\.(\w+)\..*", r"\1", parameter)]
        return self.depth + 1 if layer < 0 else layer

    def adapt(self, weights: dict[str, Tensor], image_size: tuple[int, int]) -> dict[str, Tensor]:
        """See `Backbone.adapt`: a plain ViT's position table is resized, other models' tables as timm does."""
        own = self.state_dict()
        if image_size == self.image_size or all(own[k].shape == v.shape for k, v in weights.items() if k in own):
            return weights
        timm = _timm(self.config.timm_model)
        if self._is_vit:
            old, new = ((h // self.stride[0], w // self.stride[1]) for h, w in (image_size, self.image_size))
            table = timm.layers.resample_abs_pos_embed(
                weights["pos_embed"], new, old, 0 if self.model.no_embed_class else self._prefix
            )
            return {**weights, "pos_embed": table}
        translate = getattr(inspect.getmodule(type(self.model)), "checkpoint_filter_fn", None)
        # Some of these functions take weights without a classifier for those of an older version.
        heads = self.model.pretrained_cfg.get("classifier") or ()
        empty = {f"{head}.weight": torch.zeros(0) for head in ((heads,) if isinstance(heads, str) else heads)}
        found = weights if translate is None else translate({**weights, **empty}, self.model)
        return {name: value for name, value in found.items() if name not in empty}

    def timm_config(self, how: Any) -> dict[str, Any]:
        """The keys of config.json by which timm builds the same model from the folder of an export (`local-dir:`). how: the
        export's `encoder.Preprocessing`."""
        pretrained = {
            "num_classes": 0,
            "input_size": [self.in_chans, *how.crop],
            "mean": list(how.mean),
            "std": list(how.std),
            "interpolation": how.interpolation,
            "crop_pct": min(how.crop) / how.resize,
            "fixed_input_size": "img_size" in self._given,
        }
        arguments = {
            name: value for name, value in self._given.items() if name not in ("num_classes", "drop_path_rate")
        }
        return {
            "architecture": self.config.timm_model.partition(".")[0],
            "num_classes": 0,
            "num_features": self.dim,
            "model_args": arguments,
            "pretrained_cfg": pretrained,
        }

    # ---- Building.

    def _accepted(self, needed: dict[str, Any], optional: dict[str, Any]) -> dict[str, Any]:
        """The needed arguments and those of `optional` that the model takes. Found by building it without memory."""
        timm, name = _timm(self.config.timm_model), self.config.timm_model
        optional = {key: value for key, value in optional.items() if key not in needed}
        device = "meta"
        while True:
            try:
                _twin(timm, name, {**needed, **optional}, device)
                return {**needed, **optional}
            except Exception as problem:  # whatever a model raises for arguments that it does not take
                found = ARGUMENT.search(str(problem))
                if found is not None and found[2] in optional:
                    del optional[found[2]]
                elif device == "meta":
                    device = "cpu"
                else:
                    text = " ".join(str(problem).split())
                    raise UserError(
                        f"timm's {name} cannot be built for images of {self.image_size[0]} x {self.image_size[1]} pixels "
                        f"and {self.in_chans} channels: {text}"
                    ) from None

    def _layer_groups(self, timm: Any) -> dict[str, int]:
        """The layer of each parameter; -1 for what follows the blocks."""
        names = [name for name, _ in self.model.named_parameters()]
        matcher = getattr(self.model, "group_matcher", None)
        if matcher is None:
            layers = dict.fromkeys(names, 1)
        else:
            # A name that no pattern matches is in the last group, with the parts that follow the blocks.
            rest = "?"
            listed = SimpleNamespace(named_parameters=lambda: [(name, None) for name in (*names, rest)])
            found = timm.models.group_parameters(listed, matcher(coarse=False), reverse=True)
            layers = {name: -1 if found[name] == found[rest] else found[name] for name in names}
        if self._is_vit:
            layers |= {name: -1 for name in names if name.startswith(("norm.", "fc_norm."))}
            layers |= {name: 0 for name in names if name.startswith("norm_pre.")}
        return {f"model.{name}": layer for name, layer in layers.items()}

    def _probe(self, timm: Any) -> tuple[int, tuple[int, int]]:
        """The width of the features, and the stride. A copy without memory encodes one image for that. Also finds out
        what the patches are."""
        if self._is_vit:
            self.stride = tuple(self.model.patch_embed.patch_size)
            self._check_patches(*self.image_size)
            return self.model.num_features, self.stride
        problem: Exception | None = None
        for device in ("meta", "cpu"):
            try:
                twin = _twin(timm, self.config.timm_model, self._given, device)
                h, w = self._tried(twin, self.image_size, device).grid
                size = self.image_size
                with contextlib.suppress(Exception):  # a model of one size
                    h, w = self._tried(twin, (PROBED, PROBED), device).grid
                    size = (PROBED, PROBED)
                self._levels = self._staged(twin, size, device)
                return self._tried(twin, self.image_size, device).pooled.shape[1], (
                    max(size[0] // h, 1),
                    max(size[1] // w, 1),
                )
            except Exception as error:  # whatever a model raises for images that it does not take, or without memory
                problem = error
        raise UserError(
            f"timm's {self.config.timm_model} cannot be used for images of {self.image_size[0]} x {self.image_size[1]} "
            f"pixels: {' '.join(str(problem).split())}"
        )

    def _tried(self, twin: Any, size: tuple[int, int], device: str) -> Features:
        """The features that a twin gives of images of a size, with the first kind of patches that is as wide as the pooled
        vector. Raises what the model raises, ValueError if none is."""
        problem: Exception = ValueError("its patches and its pooled vector have other widths")
        with torch.device(device), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for self._patches in ("head", "map", "pooled"):
                try:
                    images = torch.zeros(2, self.in_chans, *size)
                    found = self._plain(twin, twin.forward_features(images), images, False)
                except Exception as error:
                    problem = error
                    continue
                if found.patches.shape[-1] == found.pooled.shape[-1]:
                    return found
        raise problem

    def _staged(self, twin: Any, size: tuple[int, int], device: str) -> Levels | None:
        """The stages of a twin that are the maps, found with images of a size."""
        with torch.device(device), torch.no_grad(), torch.random.fork_rng(devices=[]):
            return levels(twin, torch.zeros(2, self.in_chans, *size))

    def _check_patches(self, height: int, width: int) -> None:
        """Raise UserError for images that the patches of a plain ViT do not divide."""
        p, q = self.stride
        if height % p or width % q or height < p or width < q:
            fits = [
                max(side, round(pixels / side) * side) for pixels, side in zip((height, width), (p, q), strict=True)
            ]
            raise UserError(
                f"images of {height} x {width} pixels (height x width) do not divide into patches of {p} x {q}: use "
                f"--image-size {fits[0]} {fits[1]} or another patch size (--timm-args patch_size=N)"
            )

    # ---- Encoding.

    @contextlib.contextmanager
    def _dropping(self, drop: Tensor | None) -> Iterator[None]:
        """Within it, the drop path layers follow the noise `drop` (B, 2 * depth)."""
        if not self.training or self.config.drop_path == 0 or not self._drop_paths:
            yield
            return
        noise = given(drop, self.depth)[:, : len(self._drop_paths)]
        rates = torch.tensor([self.config.drop_path * part.share for part in self._drop_paths], device=noise.device)
        factors = drop_factors(noise, rates)
        for i, (part, rate) in enumerate(zip(self._drop_paths, rates, strict=True)):
            part.factors = factors[:, i] if part.scaled else factors[:, i] * (1 - rate)
        try:
            yield
        finally:
            for part in self._drop_paths:
                part.factors = None

    @contextlib.contextmanager
    def _refusing(self, size: tuple[int, int]) -> Iterator[None]:
        """An error for images of a size that was not encoded before, and is not the configured one, is a UserError."""
        try:
            yield
            self._taken.add(size)
        except (RuntimeError, AssertionError, ValueError) as problem:
            known = size == self.image_size or size in self._taken
            if known or isinstance(problem, torch.OutOfMemoryError):
                raise
            text = " ".join(str(problem).split())
            raise UserError(
                f"timm's {self.config.timm_model} does not take images of {size[0]} x {size[1]} pixels: {text}"
            ) from problem

    def _plain(self, model: Any, x: Tensor, images: Tensor, pooled_only: bool) -> Features:
        """The features of any model of timm, from what its `forward_features` gives of the images."""
        pooled = _precise(model.forward_head(x, pre_logits=True).flatten(1), model)
        if x.ndim == 3:
            has_cls = getattr(model, "cls_token", None) is not None
            return of_tokens(_precise(x, model), images, self._prefix, has_cls, pooled)
        if x.ndim != 4 or self._patches == "pooled":
            return Features(cls=None, patches=pooled[:, None], grid=(1, 1), pooled=pooled)
        last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        patches = x.flatten(1, 2) if last else x.flatten(2).mT  # (B, N, channels of the map)
        if self._patches == "head" and not pooled_only:
            one = patches.flatten(0, 1)  # every position as a map of one
            one = one[:, None, None] if last else one[:, :, None, None]
            with self._kept_statistics():
                patches = model.forward_head(one, pre_logits=True).reshape(*patches.shape[:2], -1)
        grid = (x.shape[1], x.shape[2]) if last else (x.shape[2], x.shape[3])
        return Features(cls=None, patches=_precise(patches, model), grid=grid, pooled=pooled)

    def _tokens(
        self,
        images: Tensor,
        keep: Tensor | None,
        replace: tuple[Tensor, Tensor] | None,
        attention: str | Tensor,
        prefix_length: Tensor | None,
        blocks: tuple[int, ...],
        attention_of: tuple[int, ...],
        kind: str,
    ) -> Features:
        """The features of a plain ViT: timm's `forward_features`, with the options between its steps. kind: "weights" or
        "logits", of the attention of blocks."""
        model, prefix = self.model, self._prefix
        indices, of_attention = [self._block(i) for i in blocks], [self._block(i) for i in attention_of]
        looks: dict[int, Tensor] = {}
        x = model.patch_embed(images)  # (B, h, w, D), or (B, N, D) for a model of one size
        if replace is not None:
            masked, token = replace
            x = torch.where(masked.view(*x.shape[:-1], 1), token.to(x.dtype), x)
        x = _precise(model._pos_embed(x), model)
        if keep is not None:
            kept = torch.gather(x[:, prefix:], 1, keep[:, :, None].expand(-1, -1, x.shape[2]))
            x = torch.cat([x[:, :prefix], kept], dim=1)
        x = model.norm_pre(x)
        mask = _mask(attention, prefix_length, x.shape[1], prefix)
        outputs: dict[int, Tensor] = {}
        for i, block in enumerate(model.blocks):
            masked_by = {} if mask is None else {"attn_mask": mask.to(x.device)}
            if i in of_attention:
                x, looks[i] = block(x, **masked_by, attention=kind)
            else:
                x = block(x, **masked_by)
            if i in indices:
                outputs[i] = x
        x = model.norm(x)
        pooled = _precise(model.forward_head(x, pre_logits=True), model)
        x = _precise(model.fc_norm(x), model)  # the final norm of models that pool before it
        return Features(
            cls=x[:, 0] if model.cls_token is not None else None,
            patches=x[:, prefix:],
            grid=(images.shape[2] // self.stride[0], images.shape[3] // self.stride[1]),
            pooled=pooled,
            prefix=x[:, :prefix] if prefix else None,
            blocks=tuple(outputs[i] for i in indices),
            tokens=x if prefix else None,
            attention=tuple(looks[i] for i in of_attention),
        )

    def _block(self, i: int) -> int:
        """The index of block `i`, which may count from the end."""
        if not -self.depth <= i < self.depth:
            raise UserError(f"the encoder has blocks 0 to {self.depth - 1} (or -{self.depth} to -1), not {i}")
        return i % self.depth

    @contextlib.contextmanager
    def _kept_statistics(self) -> Iterator[None]:
        """Within it, batch norms keep their running statistics."""
        momenta = [part.momentum for part in self._norms]
        for part in self._norms:
            part.momentum = 0.0
        try:
            yield
        finally:
            for part, momentum in zip(self._norms, momenta, strict=True):
                part.momentum = momentum


def _timm(name: str) -> Any:
    """The library. Raises UserError if it cannot be imported."""
    return plugins.optional("timm", f"--encoder timm:{name}", "'ssl-pretrain[timm]'")


def _twin(timm: Any, name: str, arguments: dict[str, Any], device: str) -> nn.Module:
    """The model in eval mode on "cpu", or on "meta", that is without memory. The process's random state is left as it is.
    Raises what the model raises for arguments that it does not take, or because values are read in its constructor."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        return timm.create_model(name, pretrained=False, **arguments).eval()


def _arguments(texts: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of a model from 'NAME=VALUE' each. Raises UserError for one that is none, or that the run decides."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            read = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            read = value
        numbers = read if isinstance(read, tuple) else (read,)
        plain = all(isinstance(each, int | float) for each in numbers) or (
            isinstance(read, str) and VALUE.fullmatch(read)
        )
        if not equals or not name.isidentifier() or not plain:
            raise UserError(
                f"--timm-args {text!r}: write NAME=VALUE, the value a number, True, False, (1, 2) or a word"
            )
        if RESERVED.search(name):
            raise UserError(
                f"--timm-args {text!r}: {name} is not a choice here (the run decides on images, weights, classes and drop "
                f"path)"
            )
        found[name] = read
    return found


def _replace_drop_paths(model: nn.Module, timm: Any) -> list[_DropPath]:
    """Put ours in the place of timm's drop path layers, and return them in the model's order."""
    found = []
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, timm.layers.DropPath):
                ours = _DropPath((part.drop_prob or 0.0) / REFERENCE_RATE, part.scale_by_keep)
                parent.register_module(name, ours)
    for part in model.modules():
        if isinstance(part, _DropPath) and part.share > 0:
            found.append(part)
    return found


def _mask(attention: str | Tensor, prefix_length: Tensor | None, length: int, prefix: int) -> Tensor | None:
    """The mask (B or 1, 1, L, L) of an `attention` of `Backbone.forward`, None for full attention."""
    if isinstance(attention, Tensor):
        if attention.ndim != 3 or attention.shape[1:] != (length, length):
            raise ValueError(f"the attention mask must be (B or 1, {length}, {length}), not {(*attention.shape,)}")
        return attention[:, None]
    if attention == "prefix":
        if prefix_length is None:
            raise ValueError('attention="prefix" needs prefix_length')
        return prefix_mask(prefix_length, length - prefix, prefix)
    if attention not in ("full", "causal"):
        raise ValueError(f"attention is {attention!r}; it must be full, causal, prefix or a bool mask")
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril() if attention == "causal" else None


def _precise(x: Tensor, model: nn.Module) -> Tensor:
    """Features of the precision of the parameters, also under autocast."""
    return x.to(next(model.parameters()).dtype)
