"""What every method keeps to (`pretext.Method`), on a small instance: `one_step.build` says how it is made."""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import json
import math
import shutil
import tempfile
import typing
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .. import backbones, checkpoint, encoder, flags, pretext
from ..backbones.backbone import Backbone
from ..config import Run
from ..data.views import ViewSpec
from ..encoder import Encoder, Preprocessing
from ..errors import UserError
from ..parts.sizes import IMAGENET
from ..pretext import Losses, Method, WholeBatchMethod
from . import Fault
from ._common import own_folder, with_cache
from .one_step import (
    BATCH,
    OWN,
    SIZE,
    STEP,
    Views,
    after_step,
    batch,
    build,
    build_reading,
    network_flags,
    one_step,
    small_encoder,
    step,
    stored,
    tiny_knobs,
    two_processes,
)
from .precision import NarrowLosses

NOT_SQUARE = (48, 32)
CLASSES, IMAGES = 3, 48  # of the run that is resumed
LR = 1e-2  # of AdamW, in three steps: teachers whose momentum is next to 1 move by more than float32 rounds away


def checks(name: str) -> list[Callable[[], None]]:
    """The checks of the method `name`."""
    method = _Checks(name)
    return [
        method.class_is_final,
        method.knobs_are_explained_and_read,
        method.recipe_names_known_flags,
        method.open_knobs_are_sized,
        method.views_are_declared,
        method.declared_views_are_read,
        method.losses_are_finite_and_float32,
        method.per_sample_averages_to_total,
        method.no_parameter_is_dead,
        method.forward_changes_no_state,
        method.forward_is_a_function_of_the_step,
        method.skipped_step_changes_no_state,
        method.all_state_moves_in_three_steps,
        method.collapsed_names_logged_terms,
        method.losses_take_float32_under_autocast,
        method.pictures_have_the_shape_of_images,
        method.export_gives_the_methods_features,
        method.stored_outputs_give_the_same_loss,
        method.two_micro_batches_equal_one,
        method.two_processes_equal_one,
        *with_cache(lambda: own_folder(method), [method.resumed_run_is_bit_identical_and_exports]),
    ]


class _Checks:
    """The checks, and what several of them need."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def method_class(self) -> type[Method]:
        return pretext.load(self.name)

    @cached_property
    def alone(self) -> dict[str, Any]:
        """One step of one process with one micro-batch."""
        return one_step(self.name)

    @cached_property
    def choices(self) -> list[tuple[str, dict[str, Any], Method]]:
        """The small instance ("", no knobs), and one for each other value of each knob that is a choice or a switch, where
        the method takes it (" with name=value"). They are shared: a check of state builds its own from the knobs."""
        found: list[tuple[str, dict[str, Any], Method]] = [("", {}, build(self.name))]
        config = found[0][2].config
        for name, hint in typing.get_type_hints(type(config)).items():
            values = [False, True] if hint is bool else typing.get_args(hint) if _is_literal(hint) else []
            for value in values:
                if value != getattr(config, name):
                    with contextlib.suppress(UserError):
                        found.append((f" with {name}={value!r}", {name: value}, build(self.name, **{name: value})))
        return found

    @cached_property
    def variants(self) -> list[tuple[str, Method]]:
        """The instances of `choices`, for checks that change no state."""
        return [(how, method) for how, _, method in self.choices]

    @cached_property
    def losses(self) -> list[tuple[str, Method, Losses]]:
        """Of a training forward of each variant."""
        return [(how, method, method(batch(method), step())) for how, method in self.variants]

    def class_is_final(self) -> None:
        cls = self.method_class
        if not getattr(cls, "__final__", False):
            raise Fault(f"{cls.__name__} is not @final: methods share code by calling ssl_pretrain.parts")
        if cls.__mro__[1] not in (Method, WholeBatchMethod):
            raise Fault(f"{cls.__name__} derives from {cls.__mro__[1].__name__}, not from Method or WholeBatchMethod")

    def knobs_are_explained_and_read(self) -> None:
        config = self.method_class.Config
        if not dataclasses.is_dataclass(config) or not config.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise Fault(f"{self.method_class.__name__}.Config is not a frozen dataclass")
        explained, of_run = flags.docs(config), {field.name for field in dataclasses.fields(Run)}
        read = {name for file in _source_files(self.method_class) for name in _reads_of_config(file)}
        for field in dataclasses.fields(config):
            if not explained.get(field.name):
                raise Fault(f"the knob {field.name} has no help: write a string below it")
            if field.name in of_run:
                raise Fault(f"the knob {field.name} is a flag of the run, too")
            if field.name not in read:
                raise Fault(f"nothing reads the knob {field.name}: there is no `config.{field.name}` in the source")

    def recipe_names_known_flags(self) -> None:
        recipe = self.method_class.recipe
        knobs = {field.name for field in dataclasses.fields(self.method_class.Config)}
        architecture, _ = small_encoder(self.method_class)
        options = {field.name for field in dataclasses.fields(backbones.config_class(architecture))}
        known = {field.name for field in dataclasses.fields(Run)} | knobs | options
        for name, given, allowed in (("small", recipe.small, known), ("tiny", recipe.tiny, knobs)):
            if unknown := sorted(set(given) - allowed):
                raise Fault(f"recipe.{name} names {', '.join(unknown)}, which no flag is called")

    def open_knobs_are_sized(self) -> None:
        cls = self.method_class
        hints = typing.get_type_hints(cls.Config)
        left_open = [field.name for field in dataclasses.fields(cls.Config) if field.default is None]
        left_open = [name for name in left_open if hints[name] == int | None]
        size = {name: _sizes_of(cls, name) for name in ("vit_micro", "vit_base", "vit_giant")}
        for name in left_open:
            small, paper, large = (int(values.get(name, 0)) for values in size.values())
            if small < 1:
                raise Fault(f"the knob {name} is None by default, and sizes() gives no value for it")
            if not small <= paper == large:
                raise Fault(
                    f"sizes() gives {name}={small} for a vit_micro and 100 images, {paper} for a vit_base, {large} for a "
                    f"vit_giant and ImageNet-1k: the paper's size is for both, and no smaller encoder has a larger one"
                )
        if unknown := sorted({name for values in size.values() for name in values} - set(left_open)):
            raise Fault(
                f"sizes() names {', '.join(unknown)}, which is no knob with the type int | None and the default None"
            )

    def views_are_declared(self) -> None:
        cls = self.method_class
        specs = cls.views(cls.Config(), NOT_SQUARE)
        if not specs or not all(isinstance(spec, ViewSpec) for spec in specs):
            raise Fault(f"views() does not give ViewSpecs: {specs!r}")
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            raise Fault(f"views() gives two views of one name: {', '.join(names)}")
        if NOT_SQUARE not in [spec.size for spec in specs]:
            sizes = ", ".join(f"{spec.name} {spec.size}" for spec in specs)
            raise Fault(f"no view has the size of the image, {NOT_SQUARE} (height, width): {sizes}")

    def declared_views_are_read(self) -> None:
        method = build(self.name)
        given = batch(method)
        method(given, step())  # which raises for one that is not declared
        assert isinstance(given.views, Views)
        if unread := [name for name in given.views if name not in given.views.read]:
            raise Fault(f"forward never reads the view {', '.join(unread)} that views() declares")

    def losses_are_finite_and_float32(self) -> None:
        for how, _, losses in self.losses:
            if losses.total.shape != () or not losses.total.requires_grad:
                raise Fault(f"Losses.total must be () with a gradient, not {tuple(losses.total.shape)}{how}")
            for name, value in _loss_tensors(losses).items():
                if value.dtype != torch.float32:
                    raise Fault(f"{name} is {value.dtype}, not torch.float32{how}")
                if not bool(torch.isfinite(value).all()):
                    raise Fault(f"{name} is not finite{how}: {value.detach()}")
            for name, value in losses.terms.items():
                if value.shape != () or value.requires_grad:
                    raise Fault(f"the term {name} must be () and detached, not {tuple(value.shape)}{how}")
            if attached := [name for name, value in losses.carry.items() if value.requires_grad]:
                raise Fault(f"Losses.carry holds {', '.join(attached)} with a gradient{how}: detach it")
        for name, gradient in self.alone["gradients"].items():
            if not bool(torch.isfinite(gradient).all()):
                raise Fault(f"the gradient of {name} is not finite")

    def per_sample_averages_to_total(self) -> None:
        for how, _, losses in self.losses:
            each, total = losses.per_sample, float(losses.total.detach())
            if each is None:
                continue
            if each.shape != (BATCH,) or each.requires_grad:
                raise Fault(f"Losses.per_sample must be ({BATCH},) and detached, not {tuple(each.shape)}{how}")
            mean = float(each.double().mean())
            if not math.isclose(mean, total, rel_tol=1e-5, abs_tol=1e-5):
                raise Fault(f"the mean of Losses.per_sample is {mean:.6g}, Losses.total is {total:.6g}{how}")

    def no_parameter_is_dead(self) -> None:
        gradients = self.alone["gradients"]
        dead = [n for n in self.alone["trainable"] if n not in gradients or not bool(gradients[n].any())]
        if dead:
            raise Fault(f"no gradient reaches the parameter {_some(dead)}: it is dead")

    def forward_changes_no_state(self) -> None:
        for training in (False, True):
            method = build(self.name).train(training)
            before = _state(method)
            with torch.no_grad():
                method(batch(method), step())
            changed = _changed(before, _state(method)) - (_batch_norm_statistics(method) if training else set())
            if changed:
                mode = "in training" if training else "in evaluation"
                raise Fault(f"forward changes {_some(changed)} {mode}: only after_step may change state")

    def forward_is_a_function_of_the_step(self) -> None:
        method = build(self.name).eval()

        def loss(noise: int) -> float:
            with torch.no_grad():
                return float(method(batch(method), step(noise=noise)).total)

        first, again = loss(1), loss(1)
        if first != again:
            raise Fault(
                f"two forwards of one step give {first!r} and {again!r}: draw all noise from step.rand and the like"
            )

    def skipped_step_changes_no_state(self) -> None:
        for choice, knobs, _ in self.choices:
            for finite in (True, False):
                method = build(self.name, **knobs)
                skipped = step()
                losses = method(batch(method), skipped)
                losses.total.backward()
                # A teacher begins as a copy of the student, and an update from equal weights would change nothing.
                torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=LR).step()
                before = _state(method)
                skipped.ok = torch.zeros((), dtype=torch.bool)
                # What a step carries that was skipped is often not finite, and 0 * NaN is NaN.
                spoiled = {
                    n: torch.full_like(v, torch.nan) if v.is_floating_point() else v for n, v in losses.carry.items()
                }
                after_step(method, skipped, losses.carry if finite else spoiled)
                if changed := _changed(before, _state(method)):
                    how = "" if finite else " where what forward carried is not finite"
                    raise Fault(f"after_step changes {_some(changed)} though step.ok is false{how}{choice}")

    def all_state_moves_in_three_steps(self) -> None:
        checked: set[str] = set()
        for choice, knobs, _ in self.choices:
            method = build(self.name, **knobs)
            before, kept = _state(method), set(method.state_dict())
            # A choice may leave unused what the small instance uses. Only state that it adds is checked for it.
            new, checked = kept - checked, checked | kept
            if not new:
                continue
            changed = _changed(before, _state_after_three_steps(method))
            constant = type(method).constant
            if lost := changed - kept:
                raise Fault(
                    f"{_some(lost)} changes{choice} and is not in state_dict(): a resumed run would not have it"
                )
            if not choice and (unknown := constant - kept):
                raise Fault(f"`constant` lists {_some(unknown)}, which is not in state_dict()")
            if moving := constant & changed & new:
                raise Fault(f"`constant` lists {_some(moving)}, which changes{choice}")
            trained = {n for n, p in method.named_parameters() if p.requires_grad}
            still = new - changed - trained - constant - _constants_of_backbones(method)
            # torch's batch norm has a counter; ours counts nothing
            if still := {n for n in still if not n.endswith(".num_batches_tracked")}:
                raise Fault(
                    f"{_some(still)} never changes{choice}, though three steps were taken: update it in after_step, or "
                    f"list it in `constant` with the reason"
                )

    def collapsed_names_logged_terms(self) -> None:
        for how, method, losses in self.losses:
            logged = ["loss", *losses.terms]
            for name, (value, meaning) in method.collapsed(BATCH).items():
                if name not in logged:
                    raise Fault(f"collapsed() names {name!r}, which is not logged{how}; logged are {', '.join(logged)}")
                if not math.isfinite(value) or not meaning.strip():
                    raise Fault(
                        f"collapsed()[{name!r}] must be a finite value and its meaning, not {(value, meaning)!r}{how}"
                    )

    def losses_take_float32_under_autocast(self) -> None:
        for how, method in self.variants:
            with NarrowLosses() as narrow:
                with torch.autocast("cpu", torch.bfloat16):
                    losses = method(batch(method), step())
                losses.total.backward()
            if narrow.found:
                raise Fault(f"under bfloat16 autocast{how}, {'; '.join(dict.fromkeys(narrow.found))}")
            for name, value in _loss_tensors(losses).items():
                if value.dtype != torch.float32:
                    raise Fault(f"under bfloat16 autocast{how}, {name} is {value.dtype}, not torch.float32")

    def pictures_have_the_shape_of_images(self) -> None:
        method = build(self.name)
        given = batch(method, slice(0, 8))
        before = _state(method)
        method.eval()
        with torch.no_grad():
            pictures = method.pictures(given, step(slice(0, 8)))
        for name, images in pictures.items():
            if images.ndim != 4 or images.shape[:2] != (8, 3):
                raise Fault(f"the picture {name!r} has the shape {tuple(images.shape)}, not (8, 3, height, width)")
            if not images.is_floating_point() or not bool(torch.isfinite(images).all()):
                raise Fault(f"the picture {name!r} is not floating point and finite ({images.dtype})")
        if changed := _changed(before, _state(method)):
            raise Fault(f"pictures() changes {_some(changed)}")

    def export_gives_the_methods_features(self) -> None:
        method = build(self.name).eval()
        exported = method.exported().eval()
        how = Preprocessing.for_size(exported.image_size, *OWN)
        images = torch.randn(2, 3, *exported.image_size, generator=torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory(prefix="conformance-") as folder, torch.no_grad():
            encoder.save(Path(folder), Encoder(exported, exported.name, how, {}))
            read = encoder.load(folder)
            if not torch.equal(read(images).pooled, exported(images).pooled):
                raise Fault("the encoder that is read from an export gives other features than exported()")

    def stored_outputs_give_the_same_loss(self) -> None:
        for how, knobs, method in self.choices:
            found = stored(method, batch(method))
            if found is None:
                continue
            cached = build_reading(self.name, found[0], knobs)
            with torch.no_grad():
                expected = float(method.eval()(batch(method), step()).total)
                try:
                    loss = float(cached.eval()(found[1], step()).total)
                except Exception as problem:
                    raise Fault(
                        f"with stored outputs of its frozen networks, forward fails{how}: {problem}"
                    ) from problem
            method.train()
            if not math.isclose(loss, expected, rel_tol=1e-5):
                raise Fault(
                    f"with stored outputs of its frozen networks the loss is {loss:.6g}, else {expected:.6g}{how}: say in "
                    f"ViewSpec.reads what forward reads, or leave `reads` out"
                )

    def two_micro_batches_equal_one(self) -> None:
        self._compare(one_step(self.name, 2), "two micro-batches")

    def two_processes_equal_one(self) -> None:
        self._compare(two_processes().one_step(self.name), "two processes")
        self._compare(two_processes().one_step(self.name, 2), "two processes of two micro-batches each")

    def _compare(self, other: dict[str, Any], what: str) -> None:
        """Loss, gradients and state with those of one process and one batch."""
        one = self.alone
        if not torch.allclose(other["loss"], one["loss"], rtol=1e-5, atol=1e-6):
            raise Fault(f"the loss of {what} is {float(other['loss']):.7g}, that of one is {float(one['loss']):.7g}")
        if differ := other["gradients"].keys() ^ one["gradients"].keys():
            raise Fault(f"with {what}, other parameters have a gradient: {_some(differ)}")
        for n, gradient in one["gradients"].items():
            # A sum of large terms that cancel carries their rounding: measured by the tensor's largest, too.
            rounding = 1e-6 + 1e-5 * float(gradient.abs().max())
            if not torch.allclose(other["gradients"][n], gradient, rtol=1e-3, atol=rounding):
                difference = float((other["gradients"][n] - gradient).abs().max())
                raise Fault(
                    f"with {what}, the gradient of {n} differs by up to {difference:.3g} ({rounding:.3g} is allowed)"
                )
        for n, value in one["state"].items():
            if not torch.allclose(other["state"][n], value, rtol=1e-4, atol=1e-6):
                raise Fault(f"with {what}, the state {n} after the step is another one")

    def resumed_run_is_bit_identical_and_exports(self) -> None:
        with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
            out = Path(folder) / "run"
            argv = self._command(_labelled_images(Path(folder) / "images"), out)
            argv += network_flags(self.method_class, tiny_knobs(self.method_class), Path(folder))
            _pretrain(argv)
            whole, losses = _copied(checkpoint.load(out / "checkpoints", 6)), _logged_losses(out)
            shutil.rmtree(out / "checkpoints" / "step-00000006")
            _pretrain(argv)
            resumed = _copied(checkpoint.load(out / "checkpoints", 6))
            if changed := _changed(whole, resumed):
                raise Fault(f"a run resumed after 3 of 6 steps ends with other bits in {_some(changed)}")
            if _logged_losses(out) != losses:
                raise Fault(f"a run resumed after 3 of 6 steps logs the losses {_logged_losses(out)}, not {losses}")
            exported = encoder.load(out)
            pooled = exported(torch.zeros(1, 3, *SIZE)).pooled
            if pooled.shape != (1, exported.backbone.pooled_dim):
                raise Fault(f"the exported encoder gives pooled features of the shape {tuple(pooled.shape)}")

    def _command(self, images: Path, out: Path) -> list[str]:
        """`ssl-pretrain` for six steps of the small instance."""
        architecture, options = small_encoder(self.method_class)
        given = {
            **{"method": self.name, "data": images, "out": out, "steps": 6, "log_every": 1, "checkpoint_every": 3},
            **{
                "encoder": architecture,
                "image_size": SIZE,
                "batch_size": BATCH,
                "lr": 1e-3,
                "workers": 0,
                "score": False,
            },
            **{option: value for option, value in options.items() if value is not None},
            **tiny_knobs(self.method_class),
        }
        argv = []
        for name, value in given.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                argv.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                argv += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
        return argv


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _loss_tensors(losses: Losses) -> dict[str, Tensor]:
    """What a forward reports, by the name that messages use."""
    named = {"Losses.total": losses.total, **{f"the term {name}": value for name, value in losses.terms.items()}}
    return named if losses.per_sample is None else {**named, "Losses.per_sample": losses.per_sample}


def _state(method: Method) -> dict[str, Tensor]:
    """Copies of everything that a method keeps: its state_dict() and the buffers outside it."""
    return {n: v.detach().clone() for n, v in {**dict(method.named_buffers()), **method.state_dict()}.items()}


def _copied(state: dict[str, Any]) -> dict[str, Tensor]:
    """A checkpoint's tensors in one dict; copies, for they belong to a file that will be deleted."""
    parts = ("method", "optimizer")
    return {f"{part} {name}": value.clone() for part in parts for name, value in state[part].items()}


def _state_after_three_steps(method: Method) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=LR)
    for number in range(STEP, STEP + 3):
        taken = step(number=number, noise=number)
        losses = method(batch(method), taken)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(method, taken, losses.carry)
    return _state(method)


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The names whose bits differ (so that NaN equals NaN, and 0 is not -0)."""

    def bits(tensor: Tensor) -> bytes:
        return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    shared = before.keys() & after.keys()
    differ = {n for n in shared if before[n].dtype != after[n].dtype or bits(before[n]) != bits(after[n])}
    return differ | (before.keys() ^ after.keys())


def _batch_norm_statistics(method: Method) -> set[str]:
    """The buffers of batch norms, the one state that forward may change."""
    norms = [(name, module) for name, module in method.named_modules() if isinstance(module, _BatchNorm)]
    return {f"{name}.{buffer}" for name, module in norms for buffer, _ in module.named_buffers(recurse=False)}


def _constants_of_backbones(method: Method) -> set[str]:
    """What the encoder itself never changes (a table of positions), in the encoder and in copies of it."""
    architecture, options = small_encoder(type(method))
    plain = backbones.build(architecture, image_size=SIZE, **options)
    trained = {n for n, p in plain.named_parameters() if p.requires_grad}
    constant = set(plain.state_dict()) - trained
    places = [name for name, module in method.named_modules() if isinstance(module, Backbone)]
    return {f"{place}.{name}" for place in places for name in constant}


def _source_files(method_class: type[Method]) -> Iterator[Path]:
    """The method's own file; of another package's method, every file of that package."""
    own = Path(inspect.getfile(method_class))
    yield own
    top = method_class.__module__.split(".")[0]
    if top != __name__.split(".")[0]:
        spec = importlib.util.find_spec(top)
        for folder in (spec.submodule_search_locations if spec else None) or []:
            yield from Path(folder).rglob("*.py")


def _reads_of_config(file: Path) -> Iterator[str]:
    """Every `name` that a file reads as `config.name` or `<anything>.config.name`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name == "config":
                yield node.attr


def _sizes_of(cls: type[Method], encoder: str) -> dict[str, int]:
    """What the rule gives for an encoder: a vit_micro with 100 images, else one of the paper's with ImageNet-1k."""
    images = 100 if encoder == "vit_micro" else IMAGENET
    with torch.device("meta"):
        return cls.sizes(cls.Config(), backbones.build(encoder, image_size=SIZE, patch_size=8), images)


def _labelled_images(folder: Path) -> Path:
    """A folder of small images in three classes."""
    for i in range(IMAGES):
        place = folder / "train" / f"class{i % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        colours = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((48, 40), Image.Resampling.BICUBIC).save(place / f"{i:02d}.png")
    return folder


def _pretrain(argv: list[str]) -> None:
    """`ssl-pretrain` in this process, silent. Raises Fault where it does not end with 0."""
    main = importlib.import_module("ssl_pretrain.launch.pretrain").main
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(argv)
    if code != 0:
        raise Fault(f"ssl-pretrain {' '.join(argv)} ends with {code}: {said.getvalue().strip()[-500:]}")


def _logged_losses(out: Path) -> dict[int, float]:
    """The loss of every step, of metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def _some(names: Any) -> str:
    """The first few of many names."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
