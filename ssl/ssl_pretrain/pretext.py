"""The contract of a pretext method, and loading a method by its name. Shapes: B images of this micro-batch, C channels,
H x W pixels. The global batch is all images of one optimiser step, over all ranks and micro-batches."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from . import plugins
from .data.batch import Batch
from .frozen import NONE, Frozen
from .randomness import key

if TYPE_CHECKING:
    from .backbones.backbone import Backbone
    from .backbones.quantizer import Quantizer
    from .data.views import ViewSpec
    from .rates import Rate

__all__ = ["Batch", "Losses", "Method", "Recipe", "Step", "WholeBatchMethod", "load"]


class Step:
    """The position of this micro-batch in the run, and its rows of the step's noise.

    Noise is drawn for the global batch from (the step's key, number of the draw) and then sliced. So it does not depend on
    the number of ranks or micro-batches.
    """

    def __init__(
        self, *, step: int, total: int, noise: int, rows: slice | Tensor, batch_size: int, device: torch.device
    ) -> None:
        self.step = step  # optimiser steps done before this one
        self.total = total
        self.progress = step / total  # in [0, 1): what every schedule is a function of
        self.rows = rows  # which rows of the global batch this micro-batch holds
        self.batch_size = batch_size  # global
        self.device = device
        # True if the loss and gradients of the step are finite on every rank. A bool tensor () on the device, so that the
        # host does not synchronise. The loop sets it before `after_step`. State updates use it in torch.where.
        self.ok: Tensor = torch.ones((), dtype=torch.bool, device=device)
        # `Losses.carry` of the step's forward passes, by name: the rows of all micro-batches, concatenated. The loop sets
        # it before `after_step`.
        self.carried: dict[str, Tensor] = {}
        self._noise = noise  # key of this step's randomness
        self._draws = 0

    def generator(self) -> torch.Generator:
        """A generator for the next draw of this step, the same on every rank and for every micro-batch."""
        self._draws += 1
        return torch.Generator(self.device).manual_seed(key(self._noise, self._draws))

    def rand(self, *shape: int) -> Tensor:
        """Uniform [0, 1) noise (B, *shape), float32: this micro-batch's rows of the draw for the global batch."""
        return torch.rand(self.batch_size, *shape, generator=self.generator(), device=self.device)[self.rows]

    def randn(self, *shape: int) -> Tensor:
        """Normal noise (B, *shape), float32: this micro-batch's rows of the draw for the global batch."""
        return torch.randn(self.batch_size, *shape, generator=self.generator(), device=self.device)[self.rows]

    def shared_rand(self, *shape: int) -> Tensor:
        """Uniform [0, 1) noise of exactly `shape`, the same on every rank and micro-batch (e.g. one ratio a step)."""
        return torch.rand(*shape, generator=self.generator(), device=self.device)

    def shared_randn(self, *shape: int) -> Tensor:
        """Normal noise of exactly `shape`, the same on every rank and micro-batch (e.g. SIGReg's directions)."""
        return torch.randn(*shape, generator=self.generator(), device=self.device)

    @contextmanager
    def on_host(self) -> Iterator[Step]:
        """This step with its draws on the CPU, also if the run is on an accelerator. For masks made by hundreds of small
        operations: launching their kernels takes longer than computing them on the CPU."""
        host = copy.copy(self)
        host.device = torch.device("cpu")
        host.rows = self.rows.cpu() if isinstance(self.rows, Tensor) else self.rows
        yield host
        self._draws = host._draws

    def restarted(self) -> Step:
        """The same position, with the draws from the first one again, so that a second pass gets the same noise."""
        again = copy.copy(self)
        again._draws = 0
        return again

    def with_rows(self, rows: Tensor) -> Step:
        """The same position with other rows (B,) int64 of the global batch. Its draws continue after those made so far."""
        other = copy.copy(self)
        other.rows = rows
        return other


@dataclass
class Losses:
    """The result of a method's forward. All float32."""

    total: Tensor  # () with gradient: the mean over this micro-batch, so that the mean over ranks is the global loss
    terms: dict[str, Tensor] = field(default_factory=dict)  # detached scalars (), logged under these names
    # (B,) detached: each sample's loss; their mean is `total`. A term of the whole batch counts in full for each sample.
    per_sample: Tensor | None = None
    carry: dict[str, Tensor] = field(default_factory=dict)  # detached (n, ...): values that `after_step` needs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a paper trains its method: the defaults of the run's flags. Every one can be overridden by its flag."""

    optimizer: Literal["adamw", "sgd", "lars", "lamb", "muon"] = "adamw"
    lr: float = 1.5e-4  # peak, at a global batch of `lr_batch`; scaled to the run's batch by `lr_scaling`
    lr_batch: int = 256
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    final_lr: float = 0.0  # absolute, at the end of the schedule
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    final_weight_decay: float | None = None  # cosine from weight_decay to this; None: constant
    decay: Literal["no_1d", "no_1d_tokens", "all"] = "no_1d"  # which parameters decay, see optim.parameter_groups
    clip_grad: float | None = None  # norm of all gradients together, or of each parameter's alone
    clip_each: bool = False  # each parameter's alone (DINO, iBOT)
    warmup: float = 0.05  # share of the steps
    # Flags of the two-minute built-in run, if the paper's values are too large for it.
    small: dict[str, Any] = field(default_factory=dict)
    # The method's own knobs for the conformance checks. If empty, the checks use those in `small`. Give them if those are
    # too large or switch a part off: a step of 16 images of 32 pixels should take a tenth of a second.
    tiny: dict[str, Any] = field(default_factory=dict)
    encoder: dict[str, Any] = field(default_factory=dict)  # the paper's choices of encoder options, by flag name


class Method(nn.Module, ABC):
    """A pretext task: an encoder, the heads trained with it, and the loss. A file in `methods/` has one final subclass.

    All state is parameters and buffers. Schedules are functions of `Step.progress`. `forward` changes no state except
    batch-norm statistics; `after_step` changes state. Losses, softmaxes and norms compute in float32, also under mixed
    precision (autocast). For communication between ranks a method uses only `ssl_pretrain.distributed`.
    """

    recipe: ClassVar[Recipe] = Recipe()
    # Smallest global batch: 2 if the loss compares images with one another or a head has batch norm. The loop also checks
    # what the encoder needs.
    least_batch: ClassVar[int] = 1
    # Names in state_dict() of tensors without a gradient that never change, each with the reason as a comment. The
    # conformance checks require that all others without a gradient change. Constants of an encoder need not be listed.
    constant: ClassVar[frozenset[str]] = frozenset()

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The method's knobs; the defaults are the paper's; each is a flag. A knob that `sizes` decides has the type
        `int | None` and the default None."""

    def __init__(self, encoder: Backbone, config: Any) -> None:
        """`self.config` has every size decided; a run has decided them before, with its number of images."""
        super().__init__()
        self.encoder = encoder
        self.config = self.sized(config, encoder, None)

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """The sizes of the method's parts (decoder, predictor, heads, prototypes, queue) by knob, for an encoder (`dim` and
        `depth` are read; its tensors may be on the meta device) and a number of training images (None: not known). For
        the paper's encoders and data they are the paper's. A function of its arguments (`parts.sizes`)."""
        return {}

    @classmethod
    @final
    def sized(cls, config: Any, encoder: Backbone, images: int | None) -> Any:
        """The knobs `config` with those that are None decided by `sizes`; given ones are unchanged."""
        knobs = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
        left_open = [field.name for field in knobs if getattr(config, field.name) is None]
        rule = cls.sizes(config, encoder, images) if left_open else {}
        return (
            dataclasses.replace(config, **{name: rule[name] for name in left_open if name in rule}) if rule else config
        )

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The frozen networks that the method reads with these knobs: "teacher" (--teacher), "teacher_run" (--teacher RUN,
        with the whole method of that run: `Frozen.method`), "teacher_heads" (the same of a method with prototype heads, and
        its EMA teacher's weights), "tokenizer" (--tokenizer), "anchor" (--teacher, else the start weights of
        --init-from), and those of `more_teachers`. A view for one of them names it in
        `ViewSpec.network`."""
        return ()

    @classmethod
    def more_teachers(cls, config: Any) -> tuple[str, ...]:
        """Teachers beside that of --teacher which the knobs name, each as --teacher names one. They are opened as
        "teacher2", "teacher3" and so on (`frozen.teacher_names`), which `frozen` must name, too."""
        return ()

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """Make what depends on the initial weights of the encoder (an EMA teacher) or on the number of training images (a
        memory bank), and keep the frozen `networks`, which come by the names of `frozen`. Called once, after the
        constructor and --init-from, before a checkpoint is loaded."""

    @classmethod
    @abstractmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """The views that the method needs of each image."""

    @abstractmethod
    def forward(self, batch: Batch, step: Step) -> Losses:
        """The loss of one micro-batch."""

    def after_step(self, step: Step) -> None:
        """Update state without gradients (EMA teachers, queues, centres) after the optimiser's step, only if `step.ok`.

        `step.carried` has `Losses.carry` of this process's forward passes. `distributed.gather` of it gives those of all
        processes.
        """

    def rates(self) -> tuple[Rate, ...]:
        """Parameters with a learning rate or weight decay of their own. `--rates` adds to them."""
        return ()

    def exported(self) -> Backbone:
        """The encoder that evaluators get."""
        return self.encoder

    def exported_tokenizer(self) -> Quantizer | None:
        """What makes the exported encoder a tokenizer, for a method that trains one: the run then also exports to
        tokenizer/. Default: None."""
        return None

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The value of a loss term if the method learns nothing, and what that means, for each term that has such a value.

        batch_size: the global one.
        """
        return {}

    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Pictures for TensorBoard, by name: (n, C, H, W) in the views' normalised colours, the rows of one picture.

        What the method alone can show, such as the masks that its loss draws for this step: a few images of the step's
        batch and their rows of its noise are given. Views and features are drawn for every method. Called in eval mode
        (no drop path) and without gradients.
        """
        return {}


class WholeBatchMethod(Method, ABC):
    """A method whose loss depends on the whole batch: contrastive, clustering or correlation losses, batch norm in heads.

    Its forward has two parts, so that gradient accumulation gives the loss and the gradients of the whole batch (GradCache;
    Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021): first `embed` of each
    micro-batch, then `loss` once for all, then `embed` again with gradients.
    """

    @abstractmethod
    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """What the loss needs of each image, by name, each (B, ...). Everything that processes images independently."""

    @abstractmethod
    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """The loss of this process's part of the batch, from the rows of `embed` of all its micro-batches. Heads with batch
        norm belong here. `distributed.gather` and `distributed.mean` give access to the rows of other processes."""

    def forward(self, batch: Batch, step: Step) -> Losses:
        """The loss if there is only one micro-batch. Final: do not override it."""
        return self.loss(self.embed(batch, step), step)


def load(name: str) -> type[Method]:
    """The method of that name: the one subclass of Method that `methods/<name>.py` defines, or the class that another
    package's entry point (group `ssl_pretrain.methods`) names.

    Raises UserError for an unknown name, and TypeError for a module or an entry point without exactly one Method.
    """
    found = plugins.load("ssl_pretrain.methods", name, "method")
    if isinstance(found, ModuleType):
        classes = [c for c in vars(found).values() if isinstance(c, type) and issubclass(c, Method)]
        classes = [c for c in classes if c.__module__ == found.__name__]
        if len(classes) != 1:
            raise TypeError(f"{found.__name__} must define exactly one Method, it defines {len(classes)}")
        return classes[0]
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise TypeError(f"the entry point {name!r} must name a subclass of ssl_pretrain.pretext.Method, not {found!r}")
    return found
