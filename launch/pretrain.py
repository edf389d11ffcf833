"""The command `ssl-pretrain`."""

import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from ssl_pretrain import config, flags, plugins
from ssl_pretrain.config import BUILT_IN_RUN, Run
from ssl_pretrain.distributed import environment
from ssl_pretrain.errors import UserError, nearest
from ssl_pretrain.files import write_text
from ssl_pretrain.loop.signals import StopRequest

from . import grid, recipe_files
from .beginning import Beginning
from .options import Launch
from .run_command import cannot_write, run_command
from .start import start_processes_or_job

PROG = "ssl-pretrain"
DESCRIPTION = "Pretrain a vision encoder on images without labels."
EPILOG = (
    "Example: ssl-pretrain --method mae --data photos/ --out runs/mae. With --method, --help shows the method's and the "
    "encoder's flags too. Exit codes: 0 done, 2 wrong flags or data, 75 stopped early and resumable, 1 any other error."
)
# The flags that --help shows first.
COMMON = (
    "method data out encoder image_size batch_size steps epochs lr weight_decay workers nproc config init_from seed logger"
).split()
LENGTHS = ("steps", "epochs", "images")  # flags that set the length of a run
IMAGENET_IMAGES = 1_281_167  # stands for a number of images that --help does not count


def main(argv: Sequence[str] | None = None, *, placed: bool = False) -> int:
    """Run the command; returns its exit code, having said everything there is to say.

    placed: this process was started by the launcher, so the flags of the launcher are ignored.
    """

    def work(argv: list[str]) -> int:
        try:
            # In a job, signals are handled from the start, because importing torch takes seconds.
            with StopRequest() if environment.in_slurm_step() else nullcontext():
                return _main(argv, placed)
        except KeyboardInterrupt:
            print(
                f"{PROG}: interrupted; the same command continues from the last checkpoint, if there is one",
                file=sys.stderr,
            )
            return 75

    return run_command(PROG, work, argv)


def _main(argv: list[str], placed: bool) -> int:
    if argv[:1] == ["reproduce"]:
        from .reproduce import reproduce

        return reproduce(argv[1:], main)
    if argv[:1] in (["--complete"], ["--print-completion"]):
        from . import completion

        return completion.command(argv)
    if flags.word(argv, "--config") in ("list", "help"):
        print(recipe_files.overview())
        return 0
    run, launch, knobs, options = _read(argv)
    if not placed:
        out = (run.out or Path("runs/grid")) if launch.grid else config.folder(run)
        code = start_processes_or_job("pretrain", argv, launch, out, _check)
        if code == 1 and launch.launcher == "local" and not launch.grid:
            _ended_without_a_word(out)
        if code is not None:
            return code

    from ssl_pretrain.distributed import rendezvous  # torch: not before the command is known to be good
    from ssl_pretrain.loop import manifest, preflight
    from ssl_pretrain.loop.watch import LostProcess
    from ssl_pretrain.train import Diverged, train

    from . import requeue

    if run.preflight:
        table = preflight.alone(config.folder(run))
        if environment.find().rank == 0:
            _tell(table)
        return 0
    place, out, in_job = environment.find(), config.folder(run), environment.in_slurm_step()
    starts, found = manifest.starts(out), manifest.read(out).get("state", "")

    def failed(why: str) -> None:
        # A run that did not begin does not change the folder, because it may be another run's. The exception is a job that
        # was requeued to continue this run. The disk may be full.
        if len(manifest.starts(out)) > len(starts) or requeue.restarted():
            with suppress(OSError):
                manifest.end(out, f"failed: {why}")

    try:
        with StopRequest(requeue.deadline(launch.stop_before)) if in_job else nullcontext():
            outcome = train(run, knobs, options)
    except UserError as mistake:
        if place.rank == 0:
            failed(str(mistake))
        raise
    except rendezvous.MissingProcess as problem:
        done = requeue.missed(out, place, found, launch.max_requeues)
        if done is None:
            failed(str(problem))
        print(f"{PROG}: {problem}{'' if done is None else f'; {done}'}", file=sys.stderr)
        return 1 if done is None else 75
    except KeyboardInterrupt:
        failed("interrupted before it was saved; the same command continues from the last checkpoint")
        raise
    except Diverged as problem:
        print(f"{PROG}: {problem}", file=sys.stderr)
        failed(str(problem))
        return 1
    except OSError as problem:
        text, code = cannot_write(problem)
        failed(text)
        if not getattr(problem, "reported_elsewhere", False):
            print(f"{PROG}: {text}", file=sys.stderr)
        return code
    except Exception as problem:
        why = f"process {place.rank} of {place.size}: {requeue.plain(problem)}"
        if place.size == 1 or not requeue.lost_a_process(problem):
            failed(why)
            raise
        done = requeue.crashed(out, place, starts, launch.max_requeues)
        if done is None:
            if not manifest.read(out).get("state", "").startswith("failed"):  # unless the process at fault has said why
                failed(why)
            print(f"{PROG}: {problem if isinstance(problem, LostProcess) else why}", file=sys.stderr)
            return 1
        print(f"{PROG}: {why}; {done}", file=sys.stderr)
        return 75
    if outcome.stopped:
        if place.rank == 0:
            _tell(f"stopped by {outcome.stopped} after step {outcome.step} of {outcome.steps}; saved in {outcome.out}")
            _tell("the same command continues from there")
        done = requeue.preempted(out, place, outcome.stopped, outcome.step, launch.max_requeues) if in_job else None
        if done is not None:
            _tell(done)
        return 75
    if place.rank != 0:
        return 0
    if outcome.bad_images:
        _tell(f"{outcome.bad_images} unreadable images, listed in {outcome.out / 'bad_images.jsonl'}")
    _finish(run, outcome.out)
    return 0


def read_command(argv: list[str]) -> tuple[Run, Any, Any]:
    """The run, the method's knobs and the encoder's options that a command line (and its --config) asks for."""
    run, _, knobs, options = _read(argv)
    return run, knobs, options


def read_launch(argv: list[str]) -> tuple[Run, Launch, Any, Any]:
    """`read_command`, with the flags of the launcher too."""
    return _read(argv)


def _read(argv: list[str]) -> tuple[Run, Launch, Any, Any]:
    """The settings of a command line.

    Imports torch only once the method, the encoder and the data are known to be there.
    """
    method, encoder, file, data = (flags.word(argv, name) for name in ("--method", "--encoder", "--config", "--data"))
    written = config.read_yaml(recipe_files.path(file)) if file else {}
    _refuse_code(written, argv)
    for name in ("method", "data", "encoder"):  # they are looked at before the rest is
        try:
            flags.check(written.get(name, ""), str)
        except ValueError as problem:
            raise UserError(f"{name}: {problem}") from None
    if any(flags.word(argv, f"--{name}") is not None for name in LENGTHS):
        written = {name: value for name, value in written.items() if name not in LENGTHS}  # another length overrides it
    if file and data is None and "data" not in written and not {"-h", "--help"} & set(argv):
        _refuse_recipe_without_data(file, argv)
    method, data = method or written.get("method"), data or written.get("data", "fractals")
    if method is None and (method := grid.first(argv, "method")) is not None:
        argv = ["--method", method, *argv]
    if method is None:
        # Without a method its knobs are unknown: this prints the run's flags (--help) or names what is wrong with them.
        epilog = _methods() + EPILOG
        flags.parse([Run, Launch], argv, {}, prog=PROG, description=DESCRIPTION, epilog=epilog, common=COMMON)
        raise AssertionError("a run without a method was accepted")
    if method not in plugins.names("ssl_pretrain.methods"):
        raise UserError(f"unknown method {method!r}{nearest(method, plugins.names('ssl_pretrain.methods'))}")
    from ssl_pretrain.data.source import missing  # NumPy: not for --help alone

    if (nothing := missing(data)) is not None:
        raise UserError(f"--data: {nothing}")

    from ssl_pretrain import backbones, pretext

    kind = pretext.load(method)
    small = {**BUILT_IN_RUN, **kind.recipe.small} if data.split(":")[0] == "fractals" else {}
    if any(flags.word(argv, f"--{name}") is not None or name in written for name in LENGTHS):
        small = {name: value for name, value in small.items() if name not in LENGTHS}
    asked = encoder or written.get("encoder")
    begin = Beginning.read(argv, written, method, data)
    begin.check_encoder(asked)
    name = asked or begin.settings.get("encoder") or small.get("encoder", "vit_small")
    if backbones.prefix(name) == "module" and name != encoder:  # of the weights that the run starts from
        raise UserError(_imported("encoder", name))
    if backbones.prefix(name) == "tokens":
        raise UserError(
            f"--encoder {name}: an encoder with a tokenizer as its stem is exported by a run and is not trained further: "
            f"tune it for labels with ssl-eval finetune, or begin a new run (--encoder vit_small --tokenizer RUN)"
        )
    kinds: list[Any] = [Run, Launch, kind.Config, backbones.config_class(name)]
    sizes = backbones.defaults(name)
    below = {**sizes, **kind.recipe.encoder, **small, **begin.settings}
    if name != begin.settings.get("encoder"):
        below |= {**sizes, "encoder": name}  # with --partial, another size than that of the weights
    known = {field for each in kinds for field in each.__dataclass_fields__}
    if "drop_path" not in known and written.get("drop_path") == 0:  # true of an encoder that has none
        written = {key: value for key, value in written.items() if key != "drop_path"}
    defaults = {**{key: value for key, value in below.items() if key in known}, **written}

    def decided(parts: list[Any]) -> dict[str, Any]:
        return _decided(parts, kind)

    parsed = flags.parse(
        kinds,
        argv,
        defaults,
        prog=PROG,
        description=DESCRIPTION,
        epilog=EPILOG,
        common=COMMON,
        decided=decided,
        elsewhere=lambda flag: _methods_with(flag, method),
    )
    return begin.checked(*parsed)


def _methods_with(flag: str, method: str) -> str:
    """Which methods have a flag that `method` has not, to append to a message; "" if none has."""
    from ssl_pretrain import pretext

    name, found = flag.removeprefix("--").removeprefix("no-").replace("-", "_"), []
    for other in plugins.names("ssl_pretrain.methods"):
        with suppress(Exception):  # a plugin of another package that cannot be imported
            if name in pretext.load(other).Config.__dataclass_fields__:
                found.append(other)
    return f": --method {method} has none; {', '.join(found)} {'have' if len(found) > 1 else 'has'}" if found else ""


def _decided(parts: list[Any], kind: Any) -> dict[str, Any]:
    """What the flags that are None will be, for --help: as `config.resolve` decides, without opening the data."""
    run, knobs, options = parts[0], parts[2], parts[3]
    short = run.steps is not None or run.images is not None  # the length is known without the number of images
    resolved = config.resolve(run, kind.recipe, IMAGENET_IMAGES, "fp32")
    of_length = () if short else ("steps", "warmup_steps", "cooldown_steps")
    found = {
        name: getattr(resolved, name)
        for name in run.__dataclass_fields__
        if getattr(run, name) is None and name not in of_length and getattr(resolved, name) is not None
    }
    if resolved.clip_grad is None:
        found["clip_grad"] = "none"
    return found | _decided_sizes(run, kind, knobs, options)


def _decided_sizes(run: Run, kind: Any, knobs: Any, options: Any) -> dict[str, Any]:
    """The sizes that the method's flags leave open, as far as they do not depend on the number of images."""
    left_open = [name for name in knobs.__dataclass_fields__ if getattr(knobs, name) is None]
    if not left_open:
        return {}
    from ssl_pretrain.loop import sizes  # torch, which the method has imported

    few, many = (sizes.sized(run, kind, knobs, options, images) for images in (1, IMAGENET_IMAGES))
    values = {name: (getattr(few, name), getattr(many, name)) for name in left_open}
    found = {name: value for name, (value, other) in values.items() if value is not None and value == other}
    config: type = type(knobs)
    texts = flags.docs(config)
    return {name: "by the encoder" for name in left_open if "(default" not in texts.get(name, "")} | found


def _check(argv: list[str]) -> None:
    """Raise UserError for a command line that cannot be read, or whose run would end before its first step, as far as this
    can be found without weights and other processes."""
    run, _, knobs, options = _read(argv)
    from ssl_pretrain.train import check_settings

    check_settings(run, knobs, options)


def _refuse_code(written: dict[str, Any], argv: list[str]) -> None:
    """Raise UserError for code (module:PACKAGE:FUNCTION) that a YAML file names and the command does not."""
    for key, value in written.items():
        names_code = isinstance(value, str) and value.startswith("module:")
        if names_code and flags.word(argv, "--" + key.replace("_", "-")) is None:
            raise UserError(_imported(key, value))


def _refuse_recipe_without_data(file: str, argv: list[str]) -> None:
    """Raise UserError for a recipe of the package and no images: its settings are for those of its own command."""
    if file in recipe_files.names() and grid.first(argv, "data") is None:
        raise UserError(
            f"--config {file} is a recipe for images of your own: name them with --data DIR (--data fractals trains on "
            f"the built-in images)"
        )


def _imported(key: str, name: str) -> str:
    flag = "--" + key.replace("_", "-")
    return f"{key}: {name} would be imported: name code in the command, {flag} {name}, not in a file"


def _methods() -> str:
    return f"Methods: {', '.join(plugins.names('ssl_pretrain.methods'))}. "


def _finish(run: Run, out: Path) -> None:
    """Say where the encoder is, how good it is at a glance, and what to do next."""
    from ssl_pretrain import encoder
    from ssl_pretrain.data.training import open_training
    from ssl_pretrain.loop import verdict
    from ssl_pretrain.loop.guard import BEST
    from ssl_pretrain.loop.saver import read_best
    from ssl_pretrain.loop.score import KnnScore

    from .run_folder import VERDICT

    _tell(f"encoder: {out / 'encoder'}")
    if run.keep_best is not None and (best := read_best(out)):
        _tell(f"best encoder: {out / BEST / 'encoder'} (step {best['step']}, {best['by']} {best['score']:.4g})")
    score = KnnScore.of(run) if run.score else None
    if run.score:
        trained = encoder.load(out, code=run.encoder)
        lines = verdict.of_unlabelled(run, trained) if score is None else verdict.of_labelled(run, out, trained, score)
        _tell("\n".join(lines))
        with suppress(OSError):  # the run itself is done
            write_text(out / VERDICT, "\n".join(lines) + "\n")
    data = "" if run.data == "fractals" else f" --data {run.data}"
    _tell("next:")
    labelled = score is not None or (not run.score and open_training(run.data, run.train_split).labels is not None)
    if labelled:
        _tell(f"  ssl-eval linear --encoder {out}{data}")
        _tell(f"  ssl-eval knn --encoder {out}{data}")
    else:
        _tell(f"  ssl-eval diagnose --encoder {out}{data}")
        _tell(f"  ssl-eval retrieval --encoder {out}{data}")
    _tell(f"  ssl-report {out}")
    _tell(f"  tensorboard --logdir {out / 'tensorboard'}")


def _ended_without_a_word(out: Path) -> None:
    """Say in the manifest that the run's processes are gone, where none of them could."""
    from ssl_pretrain.loop import manifest

    if manifest.read(out).get("state") == "running":
        with suppress(OSError):
            manifest.end(out, "failed: a process was killed; the same command continues from the last checkpoint")
            shutil.rmtree(out / "heartbeats", ignore_errors=True)


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
