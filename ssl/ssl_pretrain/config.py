"""What a run is: one frozen dataclass, filled from flags over YAML over the method's recipe, and compared on resume."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import yaml

from . import loggers, rates
from .errors import UserError
from .flags import ABOVE_0_TO_1, AT_LEAST_1, FROM_0_BELOW_1, FROM_0_TO_1, NOT_NEGATIVE, POSITIVE, stored_name, within

if TYPE_CHECKING:
    from .pretext import Recipe


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run."""

    method: str
    """Pretext method: a file in methods/, or an installed plugin."""
    data: str = "fractals"
    """Images: a folder (flat or nested), tar shards, parquet; or built-in 'fractals[:classes=20,images=4096,...]'."""
    train_split: str | None = None
    """Images to train on: a split, a folder in the data, or 'all' (default: the split train where there are splits)."""
    subset: float | str | None = None
    """Train on a part of the images: a share (0.1), a number of them (2000), or a file of their indices (.npy, or .txt with
    one a line). Smaller parts are contained in larger ones."""
    subset_seed: int = 0
    """Random seed of --subset. It does not depend on --seed."""
    out: Path | None = None
    """Run folder; the same command resumes it (default: runs/METHOD-DATA)."""
    config: Path | None = None
    """Recipe by its name ('list' shows all), or a YAML file with flags (underscores for dashes). Flags of the command line
    override it."""
    init_from: str | None = None
    """Start from the weights of an export, a run, or timm:, hf: or torch: instead of random weights. They also set the
    encoder and its options (docs/continue.md)."""
    init_state: str | None = None
    """Start from the whole state of the method (encoder, heads, EMA teacher, queues) in a checkpoint of another run:
    RUN@STEP, or RUN for its newest one."""
    branch: bool = False
    """With --init-state: take over the optimiser's state and the step too, as if that run went on with these flags; for a
    cooldown (docs/continue.md)."""
    adapters: Literal["none", "lora"] = "none"
    """lora: train low-rank updates of the start weights' attention matrices, which are merged in exports, instead of the
    encoder's own weights (docs/continue.md)."""
    lora_rank: int = 16
    """Rank of the updates of --adapters lora."""
    lora_alpha: float | None = None
    """Scale of the updates of --adapters lora: they are multiplied by this value / the rank (default: the rank)."""
    adapters_unfreeze: int = 0
    """With --adapters: also train this number of last blocks, and all norms (ExPLoRA)."""
    init_fingerprint: str | None = None
    """Fingerprint that the start weights must have (default: that of the weights; config.yaml records it)."""
    partial: bool = False
    """With start weights that do not fit everywhere: load those that fit, and list the others."""

    teacher: str | None = None
    """Frozen network that the method reads: an export, a run, or timm: hf: torch: module:. With a method that reads the
    decoder (g2sd): a run with its checkpoints, RUN or RUN@STEP (docs/running.md)."""
    tokenizer: str | None = None
    """Frozen tokenizer whose ids the method predicts: a run of a tokenizer (vqtok), or the tokenizer/ in one."""
    teacher_cache: Path | None = None
    """Folder with stored outputs of the teacher, read in place of running it; ssl-data cache-teacher writes it with the
    flags of the run (docs/targets.md)."""
    tokenizer_cache: Path | None = None
    """The same for the ids of the tokenizer."""

    encoder: str = "vit_small"
    """Backbone to train (fractals: vit_micro)."""
    image_size: tuple[int, ...] = (224,)
    """Image size in pixels: one number, or height and width (fractals: 32)."""
    in_chans: int = 3
    """Channels of the images: 3, 1 (grey), or more from .npy files."""
    mean: tuple[float, ...] | None = None
    """Channel means for normalisation, in [0, 1] (default: ImageNet's with 3 channels, else 0.5)."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations for normalisation (default: ImageNet's with 3 channels, else 0.25)."""
    aug: Literal["exact", "fast"] = "exact"
    """How views are made. exact: torchvision's arithmetic. fast: JPEGs are decoded with less precision and only as large as
    needed, and colour jitter is one matrix per image (docs/performance.md lists the differences)."""
    bad_images: Literal["replace", "skip", "fail"] = "replace"
    """What to do with an unreadable image: replace it by another random image, skip to the next one, or end the run."""
    max_pixels: int | None = None
    """Most pixels of an image; a larger one is taken for a decompression bomb and is a bad image (default: 178,956,970)."""

    steps: int | None = None
    """Length in optimiser steps (give only one of --steps, --epochs, --images)."""
    epochs: float | None = None
    """Length in passes over the data; without any of the three, 100 epochs."""
    images: int | None = None
    """Length in images seen."""
    extend: bool = False
    """Give an existing run another length. Its schedules are stretched to the new length."""
    batch_size: int = 256
    """Global batch size: images per optimiser step, over all processes and micro-batches (fractals: 128, or
    fewer if the method needs it)."""
    accumulate: int = 1
    """Gradient accumulation: number of micro-batches per optimiser step, to save memory."""

    stages: tuple[str, ...] = ()
    """Stages of the run with other views, each 'SHARE KEY=VALUE ...', for example '0.75 image_size=112'
    (docs/running.md)."""

    optimizer: Literal["adamw", "sgd", "lars", "lamb", "muon"] | None = None
    """Optimiser. lars, lamb: for large batches. muon: Muon for the encoder's matrices, AdamW for the rest (default: the
    method's)."""
    lr: float | None = None
    """Peak learning rate; it is not scaled by the batch size (default: the method's, scaled to the batch size)."""
    final_lr: float | None = None
    """Learning rate at the end (default: the method's)."""
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    """Learning rate after the warm-up: half a cosine; constant with a cooldown at the end; or in steps, each by
    --step-factor at one of the --milestones."""
    schedule_stretch: float = 1.0
    """Make the cosines of learning rate and weight decay this many times as long as the run, which ends before them
    (V-JEPA: 1.25)."""
    milestones: tuple[float, ...] = ()
    """Where the step schedule changes the learning rate: shares of the run, for example 0.6 0.9."""
    step_factor: float = 0.1
    """Factor on the learning rate at each of the --milestones."""
    warmup_lr: float = 0.0
    """Learning rate at the start of the warm-up, as used."""
    warmup_steps: int | None = None
    """Steps of linear learning-rate warm-up (default: the method's share of the run)."""
    cooldown_steps: int | None = None
    """Steps of cooldown of the constant schedule (default: a fifth of the run)."""
    cooldown_shape: Literal["linear", "sqrt"] = "linear"
    """How the learning rate falls in the cooldown: linearly, or as 1 - sqrt(share of the cooldown that is done)."""
    betas: tuple[float, float] | None = None
    """The two betas of AdamW and LAMB; SGD and LARS use the first one as momentum (default: the method's)."""
    weight_decay: float | None = None
    """Decoupled weight decay (default: the method's)."""
    final_weight_decay: float | None = None
    """Weight decay at the end; it changes by half a cosine (default: the method's, else constant)."""
    clip_grad: float | None = None
    """Gradient clipping: largest gradient norm; none: no clipping (default: the method's)."""
    clip_each: bool | None = None
    """Clip each parameter's gradient by its own norm instead of all by the global one (default: the method's)."""
    layer_decay: float = 1.0
    """Layer decay: factor on the learning rate for each block below the encoder's output."""
    layer_decay_blocks: int = 1
    """Number of consecutive blocks that share a factor of --layer-decay (ConvNeXt: 3)."""

    rates: tuple[str, ...] = ()
    """Parameters with rates of their own, each 'PATTERN KEY=VALUE ...': factors lr= and decay=, and start= and ramp=,
    shares of the run: the learning rate is 0 until start and then rises over ramp ('encoder.* start=0.05 ramp=0.05')."""

    seed: int = 0
    """Random seed of the whole run."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Mixed precision (autocast); auto: bf16 where the device computes in bf16 natively."""
    workers: int | None = None
    """Data loader processes per training process (default: chosen from the number of cores)."""
    compile: bool = False
    """Compile the model's blocks with torch.compile (takes about a minute at the start)."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """Several processes. ddp: each holds the model; fsdp: all share one; hsdp: those of each machine share one."""
    shard_size: int | None = None
    """With --parallel hsdp: number of processes that share one copy of the model (default: those of one machine)."""
    gradient_checkpointing: bool = field(default=False, metadata={"stored_as": "recompute"})
    """Gradient checkpointing (activation checkpointing): compute the blocks' activations again in the backward pass instead
    of keeping them. Less memory, about a third more time."""
    cpu_offload: bool = False
    """With --parallel fsdp or hsdp: keep parameters and optimiser state in host memory."""

    preflight: bool = False
    """Only check the processes, the machines and the run folder, print the result, and exit."""
    stall_after: float = 300.0
    """Seconds without a step after which all processes write their stacks and the late processes are named; 0: never."""

    checkpoint_every: int = 1000
    """Steps between checkpoints; the encoder is exported with each."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int | None = None
    """Also keep every checkpoint at a multiple of this many steps (default: none)."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl. The host waits for the device only then."""
    logger: tuple[str, ...] = field(default=("tensorboard",), metadata={"stored_as": "loggers"})
    """Where metrics go beside metrics.jsonl and TensorBoard: wandb, mlflow, and loggers of other packages
    (docs/loggers.md)."""
    monitor_every: int = 100
    """Steps between checks of the features for collapse (rank, standard deviation); 0: never."""
    picture_every: int = 500
    """Steps between pictures in TensorBoard, which also come before the first step and at the end; 0: never."""
    val_images: int = 0
    """Number of images for the validation loss. They come from a split named val, valid or validation, else from the
    training images, which are then fewer; never from a test split."""
    val_every: int = 500
    """Steps between validation losses."""
    knn_every: int = 0
    """Steps between kNN evaluations of the encoder while training (needs labels); 0: never."""
    knn_data: str | None = None
    """Labelled images for --knn-every, of the domain that is trained for (default: the run's data)."""
    knn_original: str | None = None
    """Labelled images of the domain that the start weights come from, also scored with --knn-every."""
    knn_drop: float = 3.0
    """Points of kNN accuracy that may be lost on --knn-original before a warning."""
    keep_best: Literal["knn", "val"] | None = None
    """Keep the checkpoint and the export with the best kNN accuracy (--knn-every) or the least validation loss
    (--val-images), in addition to the last ones, in the folder best/ of the run."""
    score: bool = True
    """At the end, compare the kNN accuracy of the encoder with that of the untrained encoder, where there are labels."""
    bad_steps: int = 20
    """Number of consecutive steps with a non-finite loss or gradient that ends the run."""

    def __post_init__(self) -> None:
        for range_, names in RANGES.items():
            within(self, range_, *names.split())
        loggers.check(self.logger)
        rates.parse(self.rates)
        if isinstance(self.subset, float | int):
            number = self.subset
            if not math.isfinite(number) or number <= 0 or (number > 1 and number != int(number)):
                raise UserError(f"--subset {number} must be a share above 0 and at most 1, or a whole number of images")
        if self.init_from is not None and self.init_state is not None:
            raise UserError("--init-from and --init-state: give one of them")
        if self.adapters != "none" and self.init_from is None and self.init_state is None:
            raise UserError("--adapters train updates of existing weights: name these with --init-from")
        if self.branch and self.init_state is None:
            raise UserError("--branch needs --init-state RUN@STEP, the checkpoint to branch off")
        if self.partial and self.init_from is None and (self.init_state is None or self.branch):
            raise UserError("--partial needs --init-from or --init-state, and a branch takes over the whole state")


# The interval of each numeric flag. None is not checked.
RANGES = {
    AT_LEAST_1: "layer_decay_blocks schedule_stretch lora_rank image_size in_chans max_pixels steps images batch_size "
    "accumulate shard_size checkpoint_every keep_last log_every val_every bad_steps",
    NOT_NEGATIVE: "lr final_lr warmup_lr warmup_steps cooldown_steps weight_decay final_weight_decay workers stall_after "
    "adapters_unfreeze keep_every monitor_every picture_every val_images knn_every knn_drop",
    POSITIVE: "lora_alpha epochs clip_grad",
    FROM_0_BELOW_1: "betas",
    FROM_0_TO_1: "mean layer_decay step_factor",
    ABOVE_0_TO_1: "std milestones",
}


@final
@dataclass(frozen=True, kw_only=True)
class Resolved(Run):
    """A run with every default decided: the fields that may be left open in a Run, here of the type they have then."""

    out: Path
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    steps: int
    optimizer: Literal["adamw", "sgd", "lars", "lamb", "muon"]
    lr: float
    final_lr: float
    warmup_steps: int
    cooldown_steps: int
    betas: tuple[float, float]
    weight_decay: float
    final_weight_decay: float
    clip_each: bool
    precision: Literal["fp32", "bf16"]


# Flags that may change when a run resumes: where and how fast it runs, and what is logged; never what is computed.
CHANGEABLE = frozenset(
    "out config data teacher_cache tokenizer_cache workers preflight stall_after nproc accumulate compile parallel "
    "shard_size recompute cpu_offload checkpoint_every keep_last keep_every log_every loggers monitor_every picture_every "
    "val_every knn_every knn_data knn_original knn_drop keep_best score bad_steps extend".split()
)
LENGTH_KEYS = frozenset({"steps", "epochs", "images", "warmup_steps", "cooldown_steps"})

# The built-in run on fractals: about two minutes on two CPU cores. A method's recipe adds its own (Recipe.small).
BUILT_IN_RUN = {
    "encoder": "vit_micro",
    "image_size": 32,
    "patch_size": 4,
    "batch_size": 128,
    "steps": 250,
    "picture_every": 50,
}

LORA_LR = 2e-4  # default peak of --adapters lora, for any batch size; usual are 1e-4 to 5e-4

MOST_YAML_BYTES, MOST_YAML_VALUES, MOST_YAML_DEPTH = 1 << 18, 10_000, 100

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (plain data only). Raises UserError where it cannot be read or is no mapping."""
    try:
        read = _mapping(path)
    except OSError as problem:
        raise UserError(f"--config {path}: {problem.strerror}") from None
    except ValueError as problem:
        raise UserError(f"--config {path} {problem}") from None
    # YAML 1.1 reads 1e-3 as text (it wants 1.0e-3), and everybody writes 1e-3.
    return {name.replace("-", "_"): _number(value) for name, value in read.items()}


def read_recorded(path: Path) -> dict[str, Any]:
    """What a run wrote into its config.yaml. Raises UserError where that cannot be read, or is no mapping any more."""
    try:
        if read := _mapping(path):
            return read
        raise ValueError("is empty")
    except (OSError, ValueError) as problem:
        why = problem.strerror if isinstance(problem, OSError) else problem
        raise UserError(
            f"{path} is not what the run wrote ({why}): put it back as it was, or choose another --out"
        ) from None


def load_yaml(content: bytes) -> Any:
    """What a YAML file of settings holds (plain data only, None where it is empty).

    Raises ValueError, in words that follow the file's name, for what is none. Time and memory are bounded: aliases, which
    can make a short file stand for billions of values, are counted before anything is built from them.
    """
    if len(content) > MOST_YAML_BYTES:
        raise ValueError(f"is larger than {MOST_YAML_BYTES >> 10} KiB: that is no file of settings")
    depth = deepest = 0
    for byte in content:  # the parser takes seconds to find this out
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
    if deepest > MOST_YAML_DEPTH:
        raise ValueError("is nested too deeply")
    loader = None
    try:
        loader = yaml.SafeLoader(content.decode("utf-8-sig"))
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_YAML_VALUES:
            raise ValueError(f"stands for more than {MOST_YAML_VALUES:,} values through its aliases (&name, *name)")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise ValueError(f"is not YAML: {' '.join(str(problem).split())}") from None
    except (TypeError, AttributeError, OverflowError, KeyError) as problem:  # of a value like !!timestamp x
        raise ValueError(f"is not YAML: {problem}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, those of its aliases counted each time. known: of nodes that were counted."""
    if id(node) not in known:
        known[id(node)] = MOST_YAML_VALUES + 1  # while it is counted: one that holds itself has no end
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_values(part, known) for part in inner)
    return known[id(node)]


def resolve(run: Run, recipe: "Recipe", images: int, precision: Literal["fp32", "bf16"]) -> Resolved:
    """The run with every default decided: from the method's recipe and the number of training images.

    Raises UserError for values that contradict each other.
    """
    given = [name for name in ("steps", "epochs", "images") if getattr(run, name) is not None]
    if len(given) > 1:
        raise UserError(f"--{' and --'.join(given)}: give one of them, they all set the run's length")
    batch_size = run.batch_size
    if run.images is not None:
        steps = math.ceil(run.images / batch_size)
    elif run.epochs is not None:
        steps = math.ceil(run.epochs * images / batch_size)
    elif run.steps is not None:
        steps = run.steps
    else:
        steps = math.ceil(100 * images / batch_size)
    size = run.image_size
    if len(size) not in (1, 2):
        raise UserError(f"--image-size takes one number or two (height width), not {' '.join(map(str, size))}")
    mean = run.mean or (IMAGENET_MEAN if run.in_chans == 3 else (0.5,) * run.in_chans)
    std = run.std or (IMAGENET_STD if run.in_chans == 3 else (0.25,) * run.in_chans)
    if len(mean) != run.in_chans or len(std) != run.in_chans:
        raise UserError(
            f"--mean has {len(mean)} and --std {len(std)} values, the images have {run.in_chans} channels: give both with "
            f"a value for each channel"
        )

    if run.lr is not None:
        lr = run.lr
    elif run.adapters == "lora":
        lr = LORA_LR
    else:
        ratio = batch_size / recipe.lr_batch
        lr = recipe.lr * {"linear": ratio, "sqrt": ratio**0.5, "none": 1.0}[recipe.lr_scaling]
    weight_decay = recipe.weight_decay if run.weight_decay is None else run.weight_decay
    final_weight_decay = run.final_weight_decay
    if final_weight_decay is None:
        own = recipe.final_weight_decay if run.weight_decay is None else None
        final_weight_decay = weight_decay if own is None else own
    warmup = round(recipe.warmup * steps) if run.warmup_steps is None else run.warmup_steps
    cooldown = steps // 5 if run.cooldown_steps is None else run.cooldown_steps
    if warmup + (cooldown if run.schedule == "constant" else 0) > steps:
        length = "" if run.steps is not None else f" ({length_flag(run)}, {images:,} images)"
        raise UserError(
            f"--warmup-steps {warmup} and --cooldown-steps {cooldown} do not fit into {steps} steps{length}"
        )
    if run.schedule != "step" and run.milestones:
        raise UserError(f"--milestones are of --schedule step, not of {run.schedule}: leave them out")
    if run.schedule == "step" and not run.milestones:
        raise UserError("--schedule step needs --milestones, shares of the run at which the rate changes, like 0.6 0.9")
    if run.schedule != "cosine" and run.schedule_stretch != 1:
        raise UserError(f"--schedule-stretch is of --schedule cosine, not of {run.schedule}: leave it out")
    if run.keep_best == "knn" and not run.knn_every:
        raise UserError("--keep-best knn needs scores to choose by: give --knn-every, the steps between them")
    if run.keep_best == "val" and not run.val_images:
        raise UserError("--keep-best val needs a validation loss to choose by: give --val-images, the images for it")
    for flag, value in (("--knn-data", run.knn_data), ("--knn-original", run.knn_original)):
        if value is not None and not run.knn_every:
            raise UserError(f"{flag} {value} is scored while training: give --knn-every, the steps between scores")
    if run.warmup_lr > lr:
        raise UserError(f"--warmup-lr {run.warmup_lr:g} is above the learning rate {lr:g} that the warm-up ends with")
    final_lr = min(recipe.final_lr, lr) if run.final_lr is None else run.final_lr
    if run.schedule == "step":
        final_lr = lr * run.step_factor ** len(run.milestones)
        if run.final_lr not in (None, final_lr):  # the config.yaml of a run has it
            raise UserError(
                f"--final-lr {run.final_lr:g}: --schedule step ends at {final_lr:g}, where --milestones and --step-factor "
                f"lead to; leave it out"
            )
    decided: dict[str, Any] = {
        "out": folder(run),
        "image_size": (size[0], size[-1]),
        "mean": mean,
        "std": std,
        "steps": steps,
        "epochs": None,
        "images": None,
        "optimizer": run.optimizer or recipe.optimizer,
        "lr": lr,
        "final_lr": final_lr,
        "warmup_steps": warmup,
        "cooldown_steps": cooldown if run.schedule == "constant" else 0,
        "betas": run.betas or recipe.betas,
        "weight_decay": weight_decay,
        "final_weight_decay": final_weight_decay,
        "clip_grad": recipe.clip_grad if run.clip_grad is None else run.clip_grad,
        "clip_each": recipe.clip_each if run.clip_each is None else run.clip_each,
        "precision": precision,
    }
    given_fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    return Resolved(**{**given_fields, **decided})


def length_flag(run: Run) -> str:
    """The flag that sets the run's length, as it was given: "--epochs 3"."""
    for name in ("images", "epochs", "steps"):
        if (value := getattr(run, name)) is not None:
            return f"--{name} {value:g}" if name == "epochs" else f"--{name} {value}"
    return "the default of 100 epochs"


def folder(run: Run) -> Path:
    """Where the run is kept."""
    return folder_of(run.out, run.method, run.data)


def folder_of(out: Path | None, method: str, data: str) -> Path:
    """Where a run with these flags is kept."""
    return out or Path("runs") / f"{method}-{Path(data.split(':', maxsplit=1)[0]).resolve().name}"


def plain(*parts: Any) -> dict[str, Any]:
    """The flags of all parts (run, method knobs, encoder options) as one mapping of plain data."""
    return {stored_name(f): _plain(getattr(part, f.name)) for part in parts for f in dataclasses.fields(part)}


def defaults(*parts: Any) -> dict[str, Any]:
    """The default of every flag of all parts that has one, as `plain` stores it. A flag that was added after a run began is
    at its default for that run, so a new flag's default must be what was done before."""
    fields = [f for part in parts for f in dataclasses.fields(part)]
    return {stored_name(f): _plain(f.default) for f in fields if f.default is not dataclasses.MISSING}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], allowed: frozenset[str]) -> list[str]:
    """What a continued run would change, one line a flag: '--lr: 0.001 -> 0.002'."""
    return [
        f"--{name.replace('_', '-')}: {before.get(name)} -> {now.get(name)}"
        for name in sorted({*before, *now} - allowed)
        if before.get(name) != now.get(name)
    ]


def _mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, {} where it is empty. Raises OSError, and ValueError that says what it is instead."""
    read = load_yaml(path.read_bytes())
    if read is None:
        return {}
    if not isinstance(read, dict) or not all(isinstance(name, str) for name in read):
        raise ValueError("must be a mapping of flags, like 'lr: 0.001'")
    return read


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
