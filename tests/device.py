"""A training step as an accelerator would get it, followed on a machine that has none.

    python tests/device.py [METHOD ...]        prints what `tests/test_METHOD.py` must say, and every fault
    python tests/device.py --write             writes it there, and the table of docs/contributing/device.md

Tensors are simulated (FakeTensorMode): they have shapes and the device `DEVICE`, and no values. Operations on tensors of
the CPU are computed, as on the host of an accelerator. `OnDevice` counts kernels and finds what the host would wait for.
"""

import contextlib
import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_pretrain import backbones, optim, plugins, pretext
from ssl_pretrain.backbones import attention
from ssl_pretrain.conformance import one_step
from ssl_pretrain.data.views import ViewSpec, draw
from ssl_pretrain.frozen import Frozen
from ssl_pretrain.loop.probes import exported_features
from ssl_pretrain.pretext import Batch, Method, Step
from ssl_pretrain.randomness import key

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from counted import FREE, INDEXED, WAITS

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda", 0)
LR, WEIGHT_DECAY = 1e-3, 0.05  # of the step; no count depends on them


class Simulation(FakeTensorMode):
    """C++ sees a simulated tensor on the device "meta", and makes others like it there: they are for `DEVICE`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = DEVICE
        return super().__torch_dispatch__(func, types, args, kwargs)


_fake: list[FakeTensorMode] = []  # one of a process: tensors of two cannot be in one operation


class Stopped(Exception):
    """The step cannot be followed further: what comes next depends on values."""


def _is_on(tensor: Any, kind: str) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == kind


class OnDevice(TorchDispatchMode):
    """Counts the kernels of simulated tensors in `kernels`, and lists in `faults` what is wrong with an operation, each
    with the function that asked for it. Faults of an operation whose result depends on values raise Stopped."""

    def __init__(self, *, setting_up: bool = False) -> None:
        """setting_up: a first step may ask whether something is set up already; the answer is yes."""
        super().__init__()
        self.setting_up = setting_up
        self.kernels: Counter[str] = Counter()
        self.faults: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        to = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        to = DEVICE if to is not None and to.type == "meta" else to  # see `Simulation`
        if not any(isinstance(each, FakeTensor) for each in tensors) and (to is None or to.type == "cpu"):
            with unset_fake_temporarily():  # the host's own work
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if "generator" in kwargs:
            kwargs["generator"] = None  # a CPU build has none for the device
        on_device = [each for each in tensors if _is_on(each, DEVICE.type)]
        before = len(self.faults)
        self._look_at(name, args, kwargs, tensors, on_device, to)
        if (on_device or (to is not None and to.type == DEVICE.type)) and not func.is_view and name not in FREE:
            self.kernels[name] += 1
        if name == "_fused_sgd_":
            return None  # has no simulation; changes its arguments only
        if name == "_local_scalar_dense" and self.setting_up:
            return 1
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as problem:
            if len(self.faults) == before:
                self._add("waits", name)
            raise Stopped(self.faults[-1]) from problem
        except RuntimeError as problem:
            if "device" not in str(problem):
                raise
            self._add("two devices", name)
            raise Stopped(self.faults[-1]) from problem

    def _look_at(
        self,
        name: str,
        args: Any,
        kwargs: Mapping[str, Any],
        tensors: list[Tensor],
        on_device: list[Tensor],
        to: torch.device | None,
    ) -> None:
        """Add the faults of an operation that can be followed further."""
        non_blocking = bool(kwargs.get("non_blocking"))
        if name == "_to_copy" and to is not None:
            source = tensors[0].device.type
            if source == "cpu" and to.type == DEVICE.type and not non_blocking:
                self._add("blocking copy to the device", name)
            if source == DEVICE.type and to.type == "cpu":
                self._add("waits", "copy to the host")
        elif name == "copy_":
            target, source_tensor = args[:2]
            blocking = not (non_blocking or (len(args) > 2 and args[2]))
            if _is_on(target, DEVICE.type) and _is_on(source_tensor, "cpu") and blocking:
                self._add("blocking copy to the device", name)
            if _is_on(target, "cpu") and _is_on(source_tensor, DEVICE.type):
                self._add("waits", "copy to the host")
        elif name in INDEXED and on_device and _is_on(args[0], DEVICE.type):
            for index in args[1]:
                # A Python list becomes a tensor on what C++ sees as the device, "meta"; on a real one it is copied there.
                if _is_on(index, "cpu") or _is_on(index, "meta"):
                    self._add("index on the host", name)
                elif index is not None and index.dtype in (torch.bool, torch.uint8):
                    self._add("waits", f"{name} with a boolean index")
        elif name in WAITS and on_device:
            self._add("waits", name)
        elif name == "repeat_interleave" and on_device and not kwargs.get("output_size"):
            self._add("waits", f"{name} without output_size")
        elif name.startswith("_foreach"):
            lists = [each for each in (*args, *kwargs.values()) if isinstance(each, (list, tuple)) and each]
            lists = [each for each in lists if isinstance(each[0], Tensor) and len(each) == len(lists[0])]
            if any(len({(t.shape, t.dtype, t.stride()) for t in row}) > 1 for row in zip(*lists, strict=True)):
                self._add("foreach of unlike tensors", f"{name} of {len(lists[0])}")
                self.kernels[name] += len(lists[0]) - 1

    def _add(self, kind: str, what: str) -> None:
        fault = f"{kind}: {what.removesuffix('.default')} at {_place(sys._getframe(2))}"
        if fault not in self.faults:
            self.faults.append(fault)


def _place(frame: FrameType | None) -> str:
    """The innermost line outside torch and this file, "package.module in function"; without the line's number, which
    other changes move."""
    torch_folder = Path(torch.__file__).parent
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file != Path(__file__) and torch_folder not in file.parents and file.exists():
            return f"{frame.f_globals.get('__name__', '?')} in {frame.f_code.co_name}"
        if file == Path(__file__) and frame.f_code.co_name == "_backward":
            return "the backward pass"
        frame = frame.f_back
    return "?"


@contextmanager
def simulated() -> Iterator[FakeTensorMode]:
    """Tensors made for `DEVICE` in here are simulated."""
    if not _fake:
        with contextlib.suppress(ImportError):
            _fake.append(Simulation(allow_non_fake_inputs=True))
    made, kernel = torch.Tensor._make_subclass, attention.F.scaled_dot_product_attention

    def make(cls: type, data: Tensor, requires_grad: bool = False, **more: Any) -> Any:
        # With it, C++ asks for the device, and autograd for its stream, which a CPU build does not have.
        more["dispatch_device"] = False
        return made(cls, data, requires_grad, **more)

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """One kernel, as on an accelerator."""
        if q.device.type != DEVICE.type:
            return kernel(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        if attn_mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
        bias = attn_mask if attn_mask.dtype != torch.bool else torch.zeros_like(attn_mask, dtype=q.dtype)
        bias = bias.expand(*q.shape[:3], k.shape[2])
        needs = any(each.requires_grad for each in (q, k, v))
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, needs, 0.0, is_causal)[0]

    _forget()
    with _fake[0]:
        torch.Tensor._make_subclass = staticmethod(make)  # type: ignore[method-assign,assignment]
        attention.F.scaled_dot_product_attention = attend  # type: ignore[assignment]
        try:
            yield _fake[0]
        finally:
            torch.Tensor._make_subclass = made  # type: ignore[method-assign]
            attention.F.scaled_dot_product_attention = kernel
            _forget()


def _forget() -> None:
    """Empty the caches of functions, so that no simulated tensor gets among those of a real device, or the reverse."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ssl_pretrain"):
            for cached in list(vars(module).values()):
                if isinstance(cached, functools._lru_cache_wrapper):
                    cached.cache_clear()


def moved(module: nn.Module, known: dict[int, Tensor]) -> nn.Module:
    """`module.to(DEVICE)`, in place; `known` has the tensors that were moved before, which modules may share."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    known[id(parameter)] = nn.Parameter(_sent(parameter), requires_grad=parameter.requires_grad)
                    known[-id(parameter)] = parameter  # so that the id stays taken
                part._parameters[name] = known[id(parameter)]  # type: ignore[assignment]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                known.setdefault(-id(buffer), buffer)
                part._buffers[name] = known.setdefault(id(buffer), _sent(buffer))
    return module


def _sent(tensor: Tensor) -> Tensor:
    return _fake[0].from_tensor(tensor.detach()).to(DEVICE, non_blocking=True)


class DeviceStep(Step):
    """A step whose noise is drawn on `DEVICE`. Its generators are those of the CPU, because a CPU build has no others."""

    def generator(self) -> torch.Generator:
        self._draws += 1
        return torch.Generator("cpu").manual_seed(key(self._noise, self._draws))


def device_step(number: int) -> DeviceStep:
    return DeviceStep(
        step=number, total=one_step.STEPS, noise=7, rows=slice(0, one_step.BATCH), batch_size=one_step.BATCH, device=DEVICE
    )  # fmt: skip


def built(name: str, encoder: str | None = None) -> Method:
    """The small instance of the conformance checks, with its frozen networks, on `DEVICE`.

    encoder: another one, with one block a stage where it has stages.
    """
    kind = pretext.load(name)
    with unset_fake_temporarily():
        networks = one_step.networks(kind.frozen(kind.Config(**one_step.tiny_knobs(kind))))
        if encoder is None:
            method = one_step.build_reading(name, networks, {})
        else:
            options = backbones.defaults(encoder)
            options |= {"depths": (1, 1, 1, 1)} if "depths" in options else {}
            method = one_step.build_on(name, encoder, one_step.SIZE, options, networks, {})
    known: dict[int, Tensor] = {}
    for network in networks.values():
        for part in _parts(network):
            moved(part, known)
    return moved(method, known)  # type: ignore[return-value]


def _parts(network: Frozen) -> list[nn.Module]:
    found = (network.backbone, network.quantizer, network.method)
    return [each for each in found if isinstance(each, nn.Module)]


def device_batch(method: Method) -> Batch:
    with unset_fake_temporarily():
        host = one_step.batch(method)
    views = one_step.Views({name: _sent(view) for name, view in host.views.items()})
    assert host.labels is not None
    return Batch(views=views, index=_sent(host.index), labels=_sent(host.labels))


def _backward(total: Tensor) -> None:
    total.backward()


class Loop:
    """What `train.train` does with a method in a step, on `DEVICE`."""

    def __init__(self, method: Method, optimizer: Any = None) -> None:
        """optimizer: its name, where it is not the recipe's."""
        recipe = type(method).recipe
        self.method = method
        kind = optimizer or recipe.optimizer
        muon = kind == "muon"
        groups = optim.parameter_groups(method, method.encoder, rule=recipe.decay, rates=method.rates(), matrices=muon)
        self.optimizer = optim.build(kind, groups, recipe.betas)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, batch: Batch, step: Step) -> None:
        """Forward, backward, clipping, the optimiser and `after_step`."""
        recipe = type(self.method).recipe
        optim.set_rates(self.optimizer, LR, WEIGHT_DECAY, step.progress)
        losses = self.method(batch, step)
        _backward(losses.total)
        norms = optim.gradient_norms(self.parameters, lambda norms: norms)
        bad = ((losses.total.detach() + torch.linalg.vector_norm(norms)) * 0 != 0).float()
        if recipe.clip_grad is not None:
            optim.clip_(self.parameters, recipe.clip_grad, norms, each=recipe.clip_each)
        optim.step_unless(bad, self.optimizer)
        step.ok = bad == 0
        step.carried = losses.carry
        self.method.after_step(step)
        for parameter in self.parameters:
            parameter.grad = None


@dataclass(frozen=True)
class Followed:
    """What a method did on the device."""

    step: OnDevice
    monitor: OnDevice  # the features that are looked at for collapse
    pictures: OnDevice


def followed(name: str, encoder: str | None = None, optimizer: str | None = None) -> Followed:
    """The second step of a method; the first may set things up. Then what is measured beside training. encoder, optimizer:
    others than those of the small instance and of the recipe."""
    with simulated():
        loop = Loop(built(name, encoder), optimizer)
        method, batch = loop.method, device_batch(loop.method)
        method.train()
        with contextlib.suppress(Stopped), OnDevice(setting_up=True):
            loop.step(batch, device_step(one_step.STEP))
        with contextlib.suppress(Stopped), OnDevice() as step:
            loop.step(batch, device_step(one_step.STEP + 1))
        spec = type(method).views(method.config, method.encoder.image_size)[0]
        images = batch.views[spec.name]
        with contextlib.suppress(Stopped), OnDevice() as monitor:
            exported_features(method, images[0] if spec.count > 1 else images, contextlib.nullcontext())
        method.eval()
        with contextlib.suppress(Stopped), torch.no_grad(), OnDevice() as pictures:
            method.pictures(batch, device_step(one_step.STEP))
    return Followed(step, monitor, pictures)


def finishing(finish: Callable[..., Tensor], spec: ViewSpec, count: int) -> OnDevice:
    """Colours and normalisation of `count` views of a spec, `colour.finish` or `composed.finish`; the second time."""
    rows = np.stack([draw(spec, np.random.default_rng(i), *spec.size).colour for i in range(count)])
    with simulated():
        raw = _sent(torch.zeros(count, *spec.size, 3, dtype=torch.uint8))
        for _ in range(2):
            with contextlib.suppress(Stopped), OnDevice() as found:
                finish(raw, rows, spec, (0.5,) * 3, (0.25,) * 3)
    return found


def stated(name: str) -> int:
    """DEVICE_KERNELS of `tests/test_<name>.py`. Raises KeyError where there is none."""
    found = STATED.search(_test_of(name).read_text())
    if found is None:
        raise KeyError(f"tests/test_{name}.py does not state DEVICE_KERNELS: python tests/device.py {name} prints it")
    return int(found[1])


STATED = re.compile(r"^DEVICE_KERNELS = (\d+).*$", re.MULTILINE)
LINE = "DEVICE_KERNELS = {}  # with the optimiser, on an accelerator: python tests/device.py {}"
PAGE = ROOT / "docs" / "contributing" / "device.md"
BEGIN, END = "<!-- table: python tests/device.py --write -->\n", "<!-- end of the table -->"


def _test_of(name: str) -> Path:
    return ROOT / "tests" / f"test_{name}.py"


def write(counts: Mapping[str, OnDevice]) -> None:
    """State the counts in the methods' tests, below KERNELS, and in the table of the page."""
    lines = []
    for name, found in counts.items():
        total, test = sum(found.kernels.values()), _test_of(name)
        text, line = test.read_text(), LINE.format(total, name)
        if STATED.search(text):
            text = STATED.sub(line, text)
        else:
            first, kernels, rest = re.split(r"^(KERNELS = .*\n)", text, maxsplit=1, flags=re.MULTILINE)
            text = f"{first}{kernels}{line}\n{rest}"
        test.write_text(text)
        most = ", ".join(f"{kernel.strip('_')} {count}" for kernel, count in found.kernels.most_common(4))
        lines.append(f"| `{name}` | {total} | {most} |\n")
    head = f"Counted on {date.today()}, torch {torch.__version__}.\n\n| method | kernels | most often |\n"
    head += "| --- | --- | --- |\n"
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + head + "".join(lines) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    names = [each for each in sys.argv[1:] if each != "--write"] or plugins.own("ssl_pretrain.methods")
    counts = {}
    for each in names:
        counts[each] = followed(each).step
        print(LINE.format(sum(counts[each].kernels.values()), each), flush=True)
        for fault in counts[each].faults:
            print("   ", fault, flush=True)
    if "--write" in sys.argv:
        write(counts)
