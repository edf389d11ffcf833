"""What every encoder keeps to (`backbones.backbone.Backbone`). It is built small: `depth` at most 2, `depths` of 1.

Shapes: B images, N patches on an (h, w) grid, P prefix tokens, L = P + N, D width, U mask units, E width of the patch
embeddings.
"""

import copy
import dataclasses
import importlib
import itertools
import json
import math
import tempfile
import typing
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backbones, encoder, flags
from ..backbones.backbone import Backbone, Features, UnsupportedByBackbone
from ..distributed.batch_norm import couples_samples
from ..encoder import Encoder, Preprocessing
from ..errors import UserError
from . import Fault
from ._common import check_config, expect, run_flags

WORDS = frozenset(
    {"keep", "replace", "visible", "attention", "blocks", "drop_path", "pooled_only", "maps", "attention_maps"}
)  # of `Backbone.supports`
SIDES = (224, 64, 32, 128, 256)  # of images to build with, until its stride is known
BATCH = 3
RATE = 0.5  # of drop path
# Of two ways to the same float32 number: other sizes of matrices add up in another order.
TOLERANCE = 1e-4


def names() -> list[str]:
    """The encoders: ours and those of other packages."""
    return backbones.names()


def known(name: str) -> bool:
    """Whether there is an encoder of that name: also timm:NAME and module:PACKAGE:FUNCTION, which `names` cannot list."""
    return backbones.known(name)


def checks(name: str) -> list[Callable[[], None]]:
    """The checks of the encoder `name`."""
    one = _Checks(name)
    return [
        one.class_is_final,
        one.options_are_explained_and_read,
        one.sizes_are_options,
        one.attributes_are_set,
        one.features_have_their_shapes,
        one.images_of_another_size_are_taken_or_refused,
        one.channels_may_be_other_than_three,
        one.weights_are_a_function_of_the_seed,
        one.evaluation_is_deterministic,
        one.images_do_not_affect_each_other,
        one.gradients_reach_every_parameter,
        one.every_parameter_has_a_layer,
        one.layers_are_in_order,
        one.unsupported_options_are_refused,
        one.kept_patches_are_all_that_is_seen,
        one.replaced_patches_are_not_seen,
        one.invisible_units_have_no_influence,
        one.attention_is_what_was_asked_for,
        one.blocks_are_those_asked_for,
        one.attention_maps_are_those_asked_for,
        one.drop_path_follows_its_noise,
        one.pooled_only_changes_nothing_pooled,
        one.maps_are_a_pyramid,
        one.crops_together_equal_one_after_another,
        one.autocast_features_are_finite,
        one.weights_of_another_image_size_fit,
        one.copy_is_the_same_encoder,
        one.export_is_bit_identical,
    ]


class _Checks:
    """The checks, and what several of them need."""

    def __init__(self, name: str) -> None:
        self.name = name

    # ---- What is checked, and on what.

    @cached_property
    def kind(self) -> Any:
        """The class."""
        return backbones._architecture(self.name)

    @cached_property
    def small(self) -> dict[str, Any]:
        """Options that make it small and keep its width."""
        options = backbones.defaults(self.name)
        known = {field.name: options.get(field.name, field.default) for field in dataclasses.fields(self.kind.Config)}
        small: dict[str, Any] = {}
        if isinstance(known.get("depth"), int):
            small["depth"] = min(known["depth"], 2)
        if isinstance(known.get("depths"), tuple | list):
            small["depths"] = tuple(min(depth, 1) for depth in known["depths"])
        return small

    def build(self, size: tuple[int, int] | None = None, *, seed: int = 0, chans: int = 3, **options: Any) -> Any:
        """The small encoder in eval mode, of images of `size` (by default 2 x 3 mask units)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built = backbones.build(
                self.name, image_size=size or self.size, in_chans=chans, **{**self.small, **options}
            )
        return built.eval()

    @cached_property
    def stride(self) -> tuple[int, int]:
        """Pixels a side (h, w) of a mask unit: one patch or several."""
        problems = []
        for side in SIDES:
            try:
                return self.build((side, side)).unit
            except UserError as problem:
                problems.append(str(problem))
        raise Fault(f"it takes square images of none of the sides {SIDES}: {problems[0]}")

    @property
    def size(self) -> tuple[int, int]:
        """Pixels (H, W) of 2 x 3 mask units."""
        return 2 * self.stride[0], 3 * self.stride[1]

    @cached_property
    def model(self) -> Any:
        """The small encoder, its weights moved away from where they begin: a layer scale or a table that begins at zero
        would hide what is behind it. No check changes it."""
        return self.moved(self.build())

    @staticmethod
    def moved(model: Any) -> Any:
        """The same encoder, with other weights in the place of those that begin at zero, for instance."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        return model

    def images(self, count: int = BATCH, *, seed: int = 0, size: tuple[int, int] | None = None) -> Tensor:
        """Images (count, 3, H, W) of normal noise."""
        return torch.randn(count, 3, *(size or self.size), generator=torch.Generator().manual_seed(seed))

    def units(self, images: Tensor) -> int:
        """Mask units of an image."""
        return (images.shape[2] // self.stride[0]) * (images.shape[3] // self.stride[1])

    def patches_in(self, units: Tensor, images: Tensor) -> Tensor:
        """Indices (B, n) of the patches in units (B, K), unit after unit, in raster order within a unit. Written without
        the package's own function, which methods use."""
        down, right = (unit // side for unit, side in zip(self.model.unit, self.model.stride, strict=True))
        columns = images.shape[3] // self.model.stride[1]
        across = images.shape[3] // self.model.unit[1]
        rows = [
            [(int(u) // across * down + i) * columns + int(u) % across * right + j for u in row
             for i in range(down) for j in range(right)] for row in units]  # fmt: skip
        return torch.tensor(rows)

    def repainted(self, images: Tensor, units: Tensor) -> Tensor:
        """The images with other pixels in the mask units that a mask (B, U) says."""
        height, width = self.stride
        grid = images.shape[2] // height, images.shape[3] // width
        pixels = units.unflatten(1, grid).repeat_interleave(height, 1).repeat_interleave(width, 2)
        return torch.where(pixels[:, None], -2 * images + 1, images)

    @cached_property
    def plain(self) -> Features:
        """The features of `images()`."""
        return self.features(self.images())

    def features(self, images: Tensor, **options: Any) -> Features:
        """Features without gradients, in eval mode."""
        with torch.no_grad():
            return self.model(images, **options)

    def supports(self, word: str) -> bool:
        """Whether the encoder says that it can do that."""
        return word in self.model.supports

    # ---- The class.

    def class_is_final(self) -> None:
        """One final subclass of Backbone."""
        expect(self.kind.__mro__[1] is Backbone, f"{self.kind.__name__} must derive from Backbone and nothing else")
        expect(getattr(self.kind, "__final__", False), f"{self.kind.__name__} must be @final")

    def options_are_explained_and_read(self) -> None:
        """Each option is a flag with help, and changes something."""
        module = importlib.import_module(self.kind.__module__)
        check_config(self.kind.Config, f"{self.kind.__name__}.Config", module, run_flags())

    def sizes_are_options(self) -> None:
        """`SIZES` holds options of the Config, of their types, and is enough to build with."""
        module = importlib.import_module(self.kind.__module__)
        sizes = getattr(module, "SIZES", {self.name: {}})
        expect(self.name in sizes, f"{module.__name__}.SIZES has no {self.name!r}")
        hints = typing.get_type_hints(self.kind.Config)
        for size, options in sizes.items():
            for option, value in options.items():
                expect(option in hints, f"SIZES[{size!r}] has {option!r}, which is no field of the Config")
                try:
                    flags.check(value, hints[option])
                except ValueError as problem:
                    raise Fault(f"SIZES[{size!r}]: {option}: {problem}") from None
        for field in dataclasses.fields(self.kind.Config):
            needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            given = field.name in backbones.defaults(self.name)
            expect(given or not needed, f"{field.name} has no default, and SIZES[{self.name!r}] does not give it")

    def attributes_are_set(self) -> None:
        """What every backbone says of itself, and that it says what it is made of."""
        model = self.model
        expect(model.image_size == self.size, f"image_size is {model.image_size}, built for {self.size}")
        expect(model.in_chans == 3, f"in_chans is {model.in_chans}, built for 3")
        for attribute in ("dim", "depth"):
            value = getattr(model, attribute)
            expect(isinstance(value, int) and value > 0, f"{attribute} is {value!r}, it must be a whole number above 0")
        expect(
            isinstance(model.supports, frozenset) and model.supports <= WORDS,
            f"supports is {model.supports!r}; its words must be among {', '.join(sorted(WORDS))}",
        )
        whole = all(unit > 0 and unit % side == 0 for unit, side in zip(model.unit, model.stride, strict=True))
        expect(whole, f"a mask unit of {model.unit} pixels is no whole number of patches of {model.stride}")
        expect(isinstance(model.token_dim, int) and model.token_dim > 0, f"token_dim is {model.token_dim!r}")
        expect(isinstance(model.config, self.kind.Config), "config is not the Config that it was built with")
        described = json.loads(json.dumps(model.describe()))
        again = backbones.build(self.name, image_size=self.size, in_chans=3, **described)
        expect(
            again.describe() == model.describe() and again.depth == model.depth,
            "backbones.build with describe() makes another encoder",
        )
        expect(len(model.state_dict()) > 0, "its state_dict is empty")

    # ---- Features.

    def features_have_their_shapes(self) -> None:
        """Shapes, types and finiteness, of images that are not square."""
        down, right = self.stride
        for size in (self.size, (3 * down, 2 * right), (4 * down, 2 * right)):
            self._check_shapes(self.features(self.images(size=size)), size)
        one, other = (self.features(self.images(seed=seed)).pooled for seed in (0, 1))
        expect(not torch.allclose(one, other), "the pooled features of two different images are the same")

    def _check_shapes(self, found: Features, size: tuple[int, int], batch: int = BATCH) -> None:
        model, where = self.model, f"of images of {size[0]} x {size[1]} pixels"
        grid = size[0] // model.stride[0], size[1] // model.stride[1]
        count = grid[0] * grid[1]
        expect(tuple(found.grid) == grid, f"the grid {where} is {found.grid}, not {grid} (height, width)")
        wanted: dict[str, tuple[int, ...]] = {"patches": (batch, count, model.dim), "pooled": (batch, model.pooled_dim)}
        if found.cls is not None:
            wanted["cls"] = (batch, model.dim)
        prefix = 0 if found.prefix is None else found.prefix.shape[1]
        if found.prefix is not None:
            wanted |= {"prefix": (batch, prefix, model.dim), "tokens": (batch, prefix + count, model.dim)}
        for part, shape in wanted.items():
            value = getattr(found, part)
            expect(value is not None, f"{part} {where} is None")
            expect(tuple(value.shape) == shape, f"{part} {where} has the shape {tuple(value.shape)}, not {shape}")
            expect(value.dtype == torch.float32, f"{part} is {value.dtype}, not float32")
            expect(bool(value.isfinite().all()), f"{part} {where} is not finite")
        if found.prefix is not None:
            assert found.tokens is not None
            row = torch.cat([found.prefix, found.patches], 1)
            expect(torch.equal(found.tokens, row), "tokens is not the prefix and then the patches")
            if found.cls is not None:
                expect(torch.equal(found.cls, found.prefix[:, 0]), "cls is not the first of the prefix tokens")
        else:
            expect(found.cls is None, "there is a cls, but no prefix")

    def images_of_another_size_are_taken_or_refused(self) -> None:
        """Images that the stride does not divide are encoded, or refused in words."""
        for height, width in ((self.size[0] + 1, self.size[1]), (self.size[0], self.size[1] + 3), (1, 1)):
            try:
                found = self.features(self.images(size=(height, width)))
            except UserError:
                continue
            expect(bool(found.pooled.isfinite().all()), f"features of {height} x {width} pixels are not finite")

    def channels_may_be_other_than_three(self) -> None:
        """1 and 4 channels; other images than it was built for are refused in words."""
        for channels in (1, 4):
            model = self.build(chans=channels)
            images = torch.randn(BATCH, channels, *self.size, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                found = model(images)
                expect(
                    found.pooled.shape == (BATCH, model.pooled_dim),
                    f"pooled of {channels} channels is {found.pooled.shape}",
                )
                last = images.clone()
                last[:, -1] += 1
                expect(
                    not torch.equal(model(last).pooled, found.pooled),
                    f"of {channels} channels the last one does not matter",
                )
        _refused(lambda: self.model(torch.zeros(1, 4, *self.size)), UserError, "images of 4 channels instead of 3", "4")

    def weights_are_a_function_of_the_seed(self) -> None:
        """Weights come from torch's global generator alone."""
        one, same, other = (self.build(seed=seed).state_dict() for seed in (0, 0, 1))
        different = [name for name in one if not torch.equal(one[name], same[name])]
        expect(not different, f"built twice with the same seed, {', '.join(different[:5])} differ")
        expect(
            any(not torch.equal(one[name], other[name]) for name in one),
            "another seed gives the same weights everywhere",
        )

    def evaluation_is_deterministic(self) -> None:
        """Twice the same images give the same bits, and change no state."""
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        again = self.features(self.images())
        for part, one, other in _both(self.plain, again):
            expect(torch.equal(one, other), f"in eval mode {part} of the same images differ from call to call")
        changed = [name for name, value in self.model.state_dict().items() if not torch.equal(value, before[name])]
        expect(not changed, f"a forward in eval mode changed {', '.join(changed[:5])}")

    def images_do_not_affect_each_other(self) -> None:
        """In eval mode an image's features do not depend on what else is in the batch."""
        for row in range(BATCH):
            alone = self.features(self.images()[row : row + 1])
            for part, one, batch in _both(alone, self.plain):
                expect(_close(one[0], batch[row]), f"in eval mode {part} of an image depend on the others of its batch")

    def gradients_reach_every_parameter(self) -> None:
        """A loss of all features has a gradient for each trained parameter; one of a single kind, too, unless the encoder
        says so (`Backbone.partly_used`)."""
        model = self.moved(self.build()).train()  # nothing reaches what is behind a gain that begins at zero
        found = model(self.images(), **self._noise(model))
        total = torch.stack([self._weighed(value) for _, value, _ in _both(found, found)]).sum()
        total.backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        expect(bool(trained), "it has no parameter to train")
        dead = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
        expect(not dead, f"no gradient reaches {', '.join(dead[:5])}")
        broken = [name for name, p in trained.items() if not p.grad.isfinite().all()]
        expect(not broken, f"the gradient of {', '.join(broken[:5])} is not finite")
        if model.partly_used:
            return
        for part in ("pooled", "patches"):
            model.zero_grad(set_to_none=True)
            self._weighed(getattr(model(self.images(), **self._noise(model)), part)).backward()
            unused = [name for name, p in trained.items() if p.grad is None]
            expect(
                not unused,
                f"{', '.join(unused[:5])} get no gradient from {part} alone, which several processes wait for: set "
                f"partly_used to True",
            )

    @staticmethod
    def _weighed(value: Tensor) -> Tensor:
        """A sum in which every number has another weight: a plain one is 0 or constant behind a norm."""
        return (value * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))).sum()

    def _noise(self, model: Backbone, seed: int = 0, batch: int = BATCH) -> dict[str, Tensor]:
        """The option `drop` where the encoder takes it."""
        if not self.supports("drop_path"):
            return {}
        return {"drop": torch.rand(batch, 2 * model.depth, generator=torch.Generator().manual_seed(seed))}

    # ---- Layers.

    def every_parameter_has_a_layer(self) -> None:
        """`layer_of` says for each parameter 0 (stem) to depth + 1, and no block is without one."""
        model = self.model
        layers: dict[int, list[str]] = {}
        for parameter, _ in model.named_parameters():
            try:
                layer = model.layer_of(parameter)
            except Exception as problem:
                raise Fault(f"layer_of({parameter!r}) raised {type(problem).__name__}: {problem}") from problem
            expect(
                isinstance(layer, int) and 0 <= layer <= model.depth + 1,
                f"layer_of({parameter!r}) is {layer!r}; it must be 0 to depth + 1, which is {model.depth + 1}",
            )
            layers.setdefault(layer, []).append(parameter)
        missing = sorted(set(range(model.depth + 1)) - layers.keys())
        expect(not missing, f"layer_of gives no parameter the layer {missing[:5]}; depth is {model.depth}")

    def layers_are_in_order(self) -> None:
        """A block's parameters do not change what comes before that block. Seen where it gives its blocks."""
        if not self.supports("blocks"):
            return
        every = tuple(range(self.model.depth))
        before = self.features(self.images(), blocks=every).blocks
        for parameter, value in self.model.named_parameters():
            layer, kept = self.model.layer_of(parameter), value.detach().clone()
            with torch.no_grad():
                value += 0.1 * (1 + value.abs())
                after = self.model(self.images(), blocks=every).blocks
                value.copy_(kept)
            for block in every:
                if block + 1 < layer:
                    expect(
                        torch.equal(before[block], after[block]),
                        f"layer_of({parameter!r}) is {layer}, but it changes the output of block {block}",
                    )
                elif block + 1 == layer:
                    expect(
                        not torch.equal(before[block], after[block]),
                        f"layer_of({parameter!r}) is {layer}, but it does not change the output of block {block}",
                    )

    # ---- Options.

    def unsupported_options_are_refused(self) -> None:
        """What is not in `supports` is refused with a message that names the option and the encoder."""
        mask = torch.zeros(BATCH, self.units(self.images()), dtype=torch.bool)
        unsupported: dict[str, dict[str, Any]] = {
            "keep": {"keep": torch.zeros(BATCH, 1, dtype=torch.int64)},
            "replace": {"replace": (mask, torch.zeros(self.model.token_dim))},
            "attention": {"attention": "causal"},
            "blocks": {"blocks": (0,)},
        }
        for word, options in unsupported.items():
            if not self.supports(word):
                call, what = (
                    partial(self.features, self.images(), **options),
                    f"a forward with {word}, not in supports,",
                )
                _refused(call, UnsupportedByBackbone, what, word, self.kind.__name__)
        for word in sorted(WORDS - self.model.supports):
            call, what = partial(self.model.require, "a method", word), f"require({word!r})"
            _refused(call, UnsupportedByBackbone, what, word, self.kind.__name__, "a method")

    def kept_patches_are_all_that_is_seen(self) -> None:
        """`keep`: all units' patches are as without it, in the order asked for; those left out do not matter."""
        if not self.supports("keep"):
            return
        images = self.images()
        count = self.units(images)
        every = torch.arange(count).expand(BATCH, -1)
        order = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(i)) for i in range(BATCH)])
        for what, keep in (("all units in order", every), ("all units in another order", order)):
            found = self.features(images, keep=keep)
            index = self.patches_in(keep, images)[:, :, None].expand(-1, -1, self.model.dim)
            expected = torch.gather(self.plain.patches, 1, index)
            expect(_close(found.patches, expected), f"keep of {what} gives other patches than without keep")
            expect(_close(found.pooled, self.plain.pooled), f"keep of {what} gives other pooled features than without")
        keep = order[:, : count // 2]
        found = self.features(images, keep=keep)
        wanted = (BATCH, self.patches_in(keep, images).shape[1], self.model.dim)
        expect(
            tuple(found.patches.shape) == wanted,
            f"patches with keep of {count // 2} units are {tuple(found.patches.shape)}, not {wanted}",
        )
        expect(tuple(found.grid) == tuple(self.plain.grid), "with keep the grid must be that of the whole image")
        gone = torch.ones(BATCH, count, dtype=torch.bool).scatter(1, keep, False)
        other = self.features(self.repainted(images, gone), keep=keep)
        for part, one, two in _both(found, other):
            expect(_close(one, two), f"with keep {part} depend on pixels of patches that were left out")
        other = self.features(self.repainted(images, ~gone), keep=keep)
        expect(not _close(found.patches, other.patches), "with keep the pixels of kept patches do not matter")

    def replaced_patches_are_not_seen(self) -> None:
        """`replace`: masked units are the token, and where nothing is masked nothing changes."""
        if not self.supports("replace"):
            return
        count = self.units(self.images())
        token = torch.randn(self.model.token_dim, generator=torch.Generator().manual_seed(2))
        nothing = torch.zeros(BATCH, count, dtype=torch.bool)
        found = self.features(self.images(), replace=(nothing, token))
        for part, one, two in _both(found, self.plain):
            expect(_close(one, two), f"replace with an empty mask changes {part}")
        some = nothing.clone()
        some[0, 0] = some[1, 1:3] = some[2, ::2] = True
        found = self.features(self.images(), replace=(some, token))
        other = self.features(self.repainted(self.images(), some), replace=(some, token))
        for part, one, two in _both(found, other):
            expect(_close(one, two), f"with replace {part} depend on pixels of masked patches")
        other = self.features(self.images(), replace=(some, -token))
        expect(not _close(found.patches, other.patches), "with replace the token does not matter")
        model = self.build()
        token.requires_grad_()
        self._weighed(model(self.images(), replace=(some, token)).patches).backward()
        expect(token.grad is not None and bool(token.grad.abs().sum() > 0), "no gradient reaches the token of replace")
        if self.supports("keep"):
            keep = torch.arange(count).flip(0)[: count // 2].expand(BATCH, -1)
            found, other = (self.features(self.images(), keep=keep, replace=(mask, token)) for mask in (some, nothing))
            expect(
                not _close(found.patches, other.patches),
                "with keep, the mask of replace (of all units) is not used",
            )

    def invisible_units_have_no_influence(self) -> None:
        """`visible`: pixels of the units that do not exist change nothing, exactly; with all visible, nothing changes.
        Also in training, where a batch norm computes statistics."""
        if not self.supports("visible"):
            return
        images = self.images()
        count = self.units(images)
        every = torch.ones(BATCH, count, dtype=torch.bool)
        found = self.features(images, visible=every)
        for part, one, two in _both(found, self.plain):
            expect(_close(one, two), f"with every unit visible {part} change")
        visible = every.clone()
        visible[0, 0] = visible[1, 1:3] = visible[2, ::2] = False
        maps = {"maps": True} if self.supports("maps") else {}
        for training in (False, True):
            model = self.moved(self.build()).train(training)
            noise = self._noise(model) if training else {}
            results, states = [], []
            for seen in (images, self.repainted(images, ~visible)):
                each = copy.deepcopy(model)
                with torch.no_grad():
                    results.append(each(seen, visible=visible, **noise, **maps))
                states.append(each.state_dict())
            what = "in training" if training else "in eval mode"
            for part, one, two in _both(*results):
                expect(torch.equal(one, two), f"{what} {part} depend on pixels of units that are not visible")
            for one, two in zip(results[0].maps, results[1].maps, strict=True):
                expect(torch.equal(one, two), f"{what} maps depend on pixels of units that are not visible")
            changed = [key for key, value in states[0].items() if not torch.equal(value, states[1][key])]
            expect(not changed, f"{what} {', '.join(changed[:3])} depend on pixels of units that are not visible")
        found = self.features(images, visible=visible)
        for row in range(BATCH):
            away = self.patches_in((~visible[row]).nonzero().T, images)[0]
            expect(bool((found.patches[row, away] == 0).all()), "patches of units that are not visible are not 0")
        pixels = images.clone().requires_grad_()
        self._weighed(self.model(pixels, visible=visible).patches).backward()
        assert pixels.grad is not None
        outside = self.repainted(torch.ones_like(images), visible) == 1  # the pixels of invisible units
        expect(bool((pixels.grad[outside] == 0).all()), "a gradient reaches pixels of units that are not visible")
        expect(bool((pixels.grad[~outside] != 0).any()), "no gradient reaches pixels of visible units")
        other = self.features(self.repainted(images, visible), visible=visible)
        expect(not _close(found.patches, other.patches), "the pixels of visible units do not matter")

    def attention_is_what_was_asked_for(self) -> None:
        """`attention`: each word is what the mask says that it stands for, and a mask hides."""
        if not self.supports("attention"):
            return
        images, prefix = self.images(), 0 if self.plain.prefix is None else self.plain.prefix.shape[1]
        count = self.plain.patches.shape[1]
        length = prefix + count
        rows, columns = torch.arange(length)[:, None], torch.arange(length)[None]
        lengths = torch.arange(BATCH) + 1
        first = columns < prefix + lengths[:, None, None]  # a prefix token, or one of the first patches
        both = first & (rows < prefix + lengths[:, None, None])
        masks: list[tuple[str, dict[str, Any], Tensor]] = [
            ("full", {"attention": "full"}, torch.ones(1, length, length, dtype=torch.bool)),
            ("causal", {"attention": "causal"}, (columns <= rows)[None]),
            ("prefix", {"attention": "prefix", "prefix_length": lengths}, (columns <= rows) | both),
        ]
        for word, options, mask in masks:
            found, other = self.features(images, **options), self.features(images, attention=mask)
            for part, one, two in _both(found, other):
                expect(_close(one, two), f"attention={word!r} gives other {part} than the mask that it stands for")
        last = torch.zeros(BATCH, self.units(images), dtype=torch.bool)
        last[:, -1] = True
        found, other = (self.features(each, attention="causal") for each in (images, self.repainted(images, last)))
        expect(_close(found.patches[:, :-1], other.patches[:, :-1]), "with causal attention a patch sees a later one")
        expect(
            not _close(found.patches[:, -1], other.patches[:, -1]), "with causal attention a patch does not see itself"
        )
        alone = torch.eye(length, dtype=torch.bool)[None]
        found, other = (self.features(each, attention=alone) for each in (images, self.repainted(images, last)))
        expect(_close(found.patches[:, :-1], other.patches[:, :-1]), "a patch sees another one that its mask hides")

    def blocks_are_those_asked_for(self) -> None:
        """`blocks`: their outputs in the order asked for; a block there is not is refused in words."""
        if not self.supports("blocks"):
            return
        last, prefix = self.model.depth - 1, 0 if self.plain.prefix is None else self.plain.prefix.shape[1]
        found = self.features(self.images(), blocks=(-1, 0))
        expect(len(found.blocks) == 2, f"{len(found.blocks)} outputs of 2 blocks asked for")
        shape = BATCH, prefix + self.plain.patches.shape[1], self.model.dim
        for output in found.blocks:
            expect(tuple(output.shape) == shape, f"a block's output has the shape {tuple(output.shape)}, not {shape}")
        for part, one, two in _both(dataclasses.replace(found, blocks=()), self.plain):
            expect(_close(one, two), f"asked for blocks, {part} change")
        other = self.features(self.images(), blocks=(0, last))
        expect(
            _close(found.blocks[0], other.blocks[1]) and _close(found.blocks[1], other.blocks[0]),
            "blocks come in another order than asked for, or -1 is not the last one",
        )
        if last > 0:
            expect(not _close(*found.blocks), "the first and the last block have the same output")
        for block in (last + 1, -last - 2):
            call = partial(self.features, self.images(), blocks=(block,))
            _refused(call, UserError, f"block {block}", str(block))

    def attention_maps_are_those_asked_for(self) -> None:
        """`attention_of`: weights of the blocks asked for, in that order, that mean what the options say; nothing else
        changes."""
        if not self.supports("attention_maps"):
            return
        images, last, plain = self.images(), self.model.depth - 1, self.plain
        expect(plain.attention == (), "there is attention without the option attention_of")
        prefix, count = 0 if plain.prefix is None else plain.prefix.shape[1], plain.patches.shape[1]
        length = prefix + count
        found = self.features(images, attention_of=(-1, 0))
        expect(len(found.attention) == 2, f"attention of {len(found.attention)} blocks, asked for 2")
        for weights in found.attention:
            fits = weights.ndim == 4 and weights.shape[0] == BATCH and weights.shape[2:] == (length, length)
            expect(fits, f"attention has the shape {tuple(weights.shape)}, not {(BATCH, 'heads', length, length)}")
            expect(weights.dtype == torch.float32, f"attention is {weights.dtype}, not float32")
            expect(bool((weights >= 0).all()) and _close(weights.sum(-1), torch.ones_like(weights[..., 0])),
                   "the attention of a query (a row) is no distribution over the keys")  # fmt: skip
        for part, one, two in _both(dataclasses.replace(found, attention=()), plain):
            expect(torch.equal(one, two), f"asked for attention, {part} change")
        other = self.features(images, attention_of=(0, last), attention_logits=True)
        softmax = [logits.softmax(-1) for logits in other.attention]
        expect(
            _close(found.attention[0], softmax[1]) and _close(found.attention[1], softmax[0]),
            "the attention of blocks comes in another order than asked for, -1 is not the last one, or attention_logits "
            "are not the logits of the weights",
        )
        if last > 0:
            expect(not _close(*found.attention), "the first and the last block have the same attention")
        for block in (last + 1, -last - 2):
            _refused(partial(self.features, images, attention_of=(block,)), UserError, f"block {block}", str(block))
        if self.supports("attention"):
            causal = self.features(images, attention="causal", attention_of=(0,)).attention[0]
            seen = torch.ones(length, length, dtype=torch.bool).tril()
            expect(bool((causal[..., ~seen] == 0).all()), "with causal attention a query has weight on a later key")
            expect(bool((causal[..., seen] > 0).all()), "with causal attention a query has no weight on an earlier key")
        if self.supports("keep"):
            keep = torch.arange(count).flip(0)[: count - 1].expand(BATCH, -1)
            kept, whole = (self.features(images, keep=k, attention_of=(0,)).attention[0] for k in (keep, None))
            expect(kept.shape[2:] == (length - 1, length - 1), "with keep, attention is not of the kept patches")
            # The first block: among the kept ones, the weights of all patches in their proportion.
            rows = torch.cat([torch.arange(prefix), prefix + keep[0]])
            among = whole[:, :, rows][..., rows]
            expect(
                _close(kept, among / among.sum(-1, keepdim=True)), "with keep, the first block's attention is of others"
            )

    def drop_path_follows_its_noise(self) -> None:
        """Drop path: a function of the noise given, sample by sample, in training only."""
        if not self.supports("drop_path"):
            return
        expect("drop_path" in _fields(self.kind.Config), "it supports drop_path, and its Config has no field drop_path")
        model = self.moved(self.build(drop_path=RATE)).train()
        images, kept = self.images(), torch.full((BATCH, 2 * model.depth), 1 - 1e-6)
        with torch.no_grad():
            try:
                model(images)
            except Exception:
                pass
            else:
                raise Fault("in training with drop path, a forward without noise (drop) is not refused")
            whole = model(images, drop=kept).patches
            expect(torch.equal(whole, model(images, drop=kept).patches), "the same noise gives other features")
            dropped = kept.clone()
            dropped[0] = 0
            some = model(images, drop=dropped).patches
            expect(not torch.equal(some[0], whole[0]), "noise of 0, below the rate, drops nothing")
            expect(
                couples_samples(model) or torch.equal(some[1:], whole[1:]) or _close(some[1:], whole[1:]),
                "the noise of one sample changes the features of another",
            )
            model.eval()
            expect(_close(model(images).patches, model(images, drop=dropped).patches), "in eval mode drop path drops")
        expect(not any(model.state_dict()[k].shape != v.shape for k, v in self.model.state_dict().items()),
               "drop path changes the shape of weights")  # fmt: skip

    def pooled_only_changes_nothing_pooled(self) -> None:
        """`pooled_only`: the same pooled vector."""
        if not self.supports("pooled_only"):
            return
        fields = _fields(self.kind.Config)
        for pool in ("mean", "cls") if "pool" in fields else (None,):
            options: dict[str, Any] = {} if pool is None else {"pool": pool}
            model = self.build(**options)
            with torch.no_grad():
                one, two = (model(self.images(), pooled_only=only).pooled for only in (True, False))
            expect(_close(one, two), "pooled_only=True changes the pooled features")

    def maps_are_a_pyramid(self) -> None:
        """`maps`: of the strides and channels that the encoder says, of the whole image; nothing else changes."""
        strides, channels = self.model.map_strides, self.model.map_channels
        if not self.supports("maps"):
            expect(not strides and not channels, "map_strides or map_channels is set, and supports lacks maps")
            return
        expect(
            len(strides) == len(channels) > 0, f"map_strides is of {len(strides)} maps, map_channels of {len(channels)}"
        )
        rising = all(fine < coarse for fine, coarse in itertools.pairwise(strides))
        expect(rising, f"map_strides is {strides}; the finest map must be the first")
        expect(self.plain.maps == (), "there are maps without the option maps")
        down, right = self.stride
        for size in (self.size, (3 * down, 4 * right)):
            found, plain = self.features(self.images(size=size), maps=True), self.features(self.images(size=size))
            self._check_maps(found.maps, size)
            for part, one, two in _both(found, plain):
                expect(torch.equal(one, two), f"asked for maps, {part} change")
        with torch.autocast("cpu", torch.bfloat16):
            self._check_maps(self.features(self.images(), maps=True).maps, self.size)
        # Rows go down and columns to the right: the top left corner changes with the first patch.
        first = torch.zeros(BATCH, self.units(self.images()), dtype=torch.bool)
        first[:, 0] = True
        pairs = [self.features(each, maps=True).maps for each in (self.images(), self.repainted(self.images(), first))]
        for one, two, stride in zip(*pairs, strides, strict=True):
            change = (one - two).abs().sum((0, 1))
            corner = change[: max(1, change.shape[0] // 2), : max(1, change.shape[1] // 3)]
            expect(bool(corner.mean() >= change.mean()), f"the map of stride {stride} changes elsewhere than the image")
        if self.supports("keep"):
            self._check_maps_of_kept()
        if self.supports("pooled_only"):
            self._check_maps(self.features(self.images(), maps=True, pooled_only=True).maps, self.size)

    def _check_maps_of_kept(self) -> None:
        """Maps with `keep`: refused in words, or those of the kept units below each other."""
        keep = torch.tensor([[3, 0]] * BATCH)
        call = partial(self.features, self.images(), keep=keep, maps=True)
        try:
            maps = call().maps
        except UserError:
            _refused(call, UserError, "maps with keep", "keep", "maps")
            return
        for x, stride, width in zip(maps, self.model.map_strides, self.model.map_channels, strict=True):
            down, right = (int(unit // each) for unit, each in zip(self.model.unit, stride, strict=True))
            shape = (BATCH, width, 2 * down, right)
            expect(tuple(x.shape) == shape, f"with keep a map has the shape {tuple(x.shape)}, not {shape}")

    def _check_maps(self, maps: tuple[Tensor, ...], size: tuple[int, int]) -> None:
        strides, channels = self.model.map_strides, self.model.map_channels
        expect(len(maps) == len(strides), f"there are {len(maps)} maps, and map_strides is of {len(strides)}")
        for x, stride, width in zip(maps, strides, channels, strict=True):
            what = f"the map of stride {stride} of images of {size[0]} x {size[1]} pixels"
            # A side that the stride does not divide is rounded down or up.
            down, right = ({int(side // each), math.ceil(side / each)} for side, each in zip(size, stride, strict=True))
            fits = x.ndim == 4 and x.shape[:2] == (BATCH, width) and x.shape[2] in down and x.shape[3] in right
            expect(fits, f"{what} has the shape {tuple(x.shape)}, not (B, {width}, height / stride, width / stride)")
            expect(x.dtype == torch.float32 and bool(x.isfinite().all()), f"{what} is not finite float32")

    def crops_together_equal_one_after_another(self) -> None:
        """`forward_crops`: what a forward of each batch gives."""
        down, right = self.stride
        sizes = [self.size, (2 * down, 2 * right), (down, 2 * right)]
        options: list[dict[str, Any]] = [{}, {}, {}]
        self._check_crops(sizes, options)
        if self.supports("keep"):
            self._check_crops(sizes[:2], [{"keep": torch.tensor([[3, 0]] * BATCH)}, {}])
        if self.supports("pooled_only"):
            self._check_crops(sizes, [{"pooled_only": True}] * 3)

    def _check_crops(self, sizes: list[tuple[int, int]], options: list[dict[str, Any]]) -> None:
        batches = [
            (self.images(size=size, seed=i), each) for i, (size, each) in enumerate(zip(sizes, options, strict=True))
        ]
        with torch.no_grad():
            together = self.model.forward_crops(batches)
        expect(len(together) == len(batches), f"forward_crops of {len(batches)} batches gives {len(together)} Features")
        for found, (images, each) in zip(together, batches, strict=True):
            alone = self.features(images, **each)
            expect(
                tuple(found.grid) == tuple(alone.grid), f"forward_crops gives the grid {found.grid}, not {alone.grid}"
            )
            if each.get("pooled_only"):
                expect(_close(found.pooled, alone.pooled), "forward_crops gives other pooled features than a forward")
                continue
            for part, one, two in _both(found, alone):
                expect(_close(one, two), f"forward_crops gives other {part} than a forward of each batch")

    # ---- Precision, copies, files.

    def autocast_features_are_finite(self) -> None:
        """Under bfloat16 autocast: finite, about the same, and of the parameters' precision."""
        with torch.autocast("cpu", torch.bfloat16):
            found = self.features(self.images())
        for part, low, full in _both(found, self.plain):
            expect(bool(low.isfinite().all()), f"under bfloat16 autocast {part} are not finite")
            expect(low.dtype == torch.float32, f"under bfloat16 autocast {part} are {low.dtype}, not float32")
            cosine = torch.nn.functional.cosine_similarity(low.flatten(1), full.flatten(1)).min()
            expect(
                float(cosine) > 0.9, f"under bfloat16 autocast {part} are others than in float32 (cosine {cosine:.2f})"
            )

    def weights_of_another_image_size_fit(self) -> None:
        """`adapt`: weights of an encoder for another image size can be loaded."""
        down, right = self.stride
        for size in (self.size, (3 * down, 4 * right)):
            other = self.build(size, seed=3)
            adapted = self.model.adapt(other.state_dict(), size)
            shapes, own = ({n: v.shape for n, v in each.items()} for each in (adapted, self.model.state_dict()))
            wrong = [name for name in sorted({*shapes, *own}) if shapes.get(name) != own.get(name)]
            what = f"adapt from {size[0]} x {size[1]} pixels gives weights that do not fit: {', '.join(wrong[:5])}"
            expect(not wrong, what)
            if size == self.size:
                same = all(torch.equal(adapted[name], value) for name, value in other.state_dict().items())
                expect(same, "adapt changes weights of the same image size")
            copy.deepcopy(self.model).load_state_dict(adapted)

    def copy_is_the_same_encoder(self) -> None:
        """Teachers are copies: they give the same features."""
        copied = copy.deepcopy(self.model)
        with torch.no_grad():
            for part, one, two in _both(copied(self.images()), self.plain):
                expect(torch.equal(one, two), f"a copy gives other {part}")

    def export_is_bit_identical(self) -> None:
        """An export read again has the same weights, options and features: all that a forward uses is in it."""
        preprocessing = Preprocessing.for_size(self.size, (0.5,) * 3, (0.25,) * 3)
        with tempfile.TemporaryDirectory() as folder:
            encoder.save(Path(folder), Encoder(self.model, self.name, preprocessing, {"method": "conformance"}))
            loaded = encoder.load(folder, code=self.name)
        expect(loaded.name == self.name, f"the export's name is {loaded.name!r}")
        expect(loaded.backbone.describe() == self.model.describe(), "the export has other options")
        own, read = self.model.state_dict(), loaded.backbone.state_dict()
        different = [name for name in own if not torch.equal(own[name], read[name])]
        expect(not different, f"the export has other weights: {', '.join(different[:5])}")
        with torch.no_grad():
            for part, one, two in _both(loaded(self.images()), self.plain):
                expect(
                    torch.equal(one, two), f"the loaded export gives other {part}: something is not in the state_dict"
                )


def _both(one: Features, other: Features) -> list[tuple[str, Tensor, Tensor]]:
    """The parts that both have, by name; each (B, ...)."""
    parts = ("cls", "patches", "pooled", "prefix", "tokens")
    found = [(part, getattr(one, part), getattr(other, part)) for part in parts]
    for part, a, b in found:
        expect((a is None) == (b is None), f"{part} is there in one forward and not in another")
    return [(part, a, b) for part, a, b in found if a is not None]


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding: numbers that are not normalised are compared with the largest of them."""
    if one.shape != other.shape:
        return False
    return torch.allclose(one, other, TOLERANCE, TOLERANCE * max(1.0, float(other.abs().max())))


def _fields(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def _refused(call: Callable[[], Any], kind: type[Exception], what: str, *words: str) -> None:
    """Raise Fault unless the call raises that, with these words in its message."""
    try:
        call()
    except kind as refusal:
        for word in words:
            expect(word in str(refusal), f"the message that refuses {what} does not name {word!r}: {refusal}")
    except Exception as problem:
        raise Fault(f"{what} raises {type(problem).__name__} ({problem}), not {kind.__name__}") from problem
    else:
        raise Fault(f"{what} is not refused")
