"""A training step compared with the same step of other libraries: kernels, host waits, images per CPU-second, peak
memory.

    python benchmarks/peers.py --count --rows mae dino      kernels and waits of a DINO 2 + 8 and an MAE step, ViT-S/16
    python benchmarks/peers.py --rows mae --rounds 5        images a CPU-second on one thread, ViT-Ti/16, float32
    python benchmarks/peers.py --rows mae --precision bf16  ours in bfloat16 against the others' float32
    python benchmarks/peers.py --memory                     the peak of a process that takes two steps

A step is forward and backward, without optimiser, on prepared images; each method has the paper's decoder, heads and
masks. Other libraries are measured if they are installed (`pip install --no-deps lightly==1.6.0`, `pip install
stable-pretraining==0.1.8 transformers`). lightly's parts of DINO are combined so that all crops of one size pass the
encoder at once, unlike in its own example. Variants alternate in one process and are compared by CPU time. The ceiling
is the rate of this machine's float32 matrix product, measured in the same way, with the FLOPs of our step as counted by
torch.
"""

import argparse
import copy
import importlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from counted import Counted
from losses import peer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssl_pretrain import backbones, memory, pretext
from ssl_pretrain.data.views import fitted
from ssl_pretrain.pretext import Batch, Step

OURS, LIGHTLY, STABLE, HF = "ssl-pretrain", "lightly", "stable-pretraining", "transformers"
SIZES = {"vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6)}  # width, depth, heads
Run = Callable[[], object]


def ours(name: str, encoder: str, images: int, precision: str, **knobs: Any) -> Run:
    """A step of one of our methods, as the loop calls it."""
    kind = pretext.load(name)
    options = {**backbones.defaults(encoder), "patch_size": 16, **kind.recipe.encoder, "drop_path": 0.0}
    with torch.device("meta"):  # the paper's sizes, also of parts beside an encoder that is smaller than the paper's
        paper = backbones.build("vit_large", image_size=(224, 224))
    config = kind.sized(kind.Config(**knobs), paper, None)
    method = kind(backbones.build(encoder, image_size=(224, 224), **options), config)
    method.prepare(images)
    views = {}
    for spec in fitted(kind.views(method.config, (224, 224)), (224, 224), method.encoder.stride):
        shape = (images, 3, *spec.size) if spec.count == 1 else (spec.count, images, 3, *spec.size)
        views[spec.name] = torch.randn(shape)
    batch = Batch(views=views, index=torch.arange(images), labels=None)

    def run() -> None:
        step = Step(step=50, total=100, noise=7, rows=slice(0, images), batch_size=images, device=torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses = method(batch, step)
        losses.total.backward()
        step.carried = losses.carry
        method.after_step(step)
        method.zero_grad(set_to_none=True)

    return run


def timm_vit(encoder: str, **options: Any) -> Any:
    """timm's ViT of the size, at 224 pixels."""
    peer("torchvision", "ops")
    kind = importlib.import_module("timm.models.vision_transformer").VisionTransformer
    dim, depth, heads = SIZES[encoder]
    return kind(patch_size=16, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0, **options)


def backward(loss: Callable[[], Tensor], *models: torch.nn.Module) -> Run:
    """A step of a loss of models."""

    def run() -> None:
        loss().backward()
        for model in models:
            model.zero_grad(set_to_none=True)

    return run


def mae(encoder: str, images: int, wanted: list[str], precision: str) -> dict[str, Run]:
    """MAE: 75 % masked, decoder of 8 blocks of 512 channels, normalised pixels"""
    x = torch.randn(images, 3, 224, 224)
    dim, depth, heads = SIZES[encoder]
    runs: dict[str, Run] = {}
    if OURS in wanted:
        runs[OURS] = ours("mae", encoder, images, precision)
    if LIGHTLY in wanted and (masked := peer("lightly.models.modules", "MaskedVisionTransformerTIMM")):
        utils = importlib.import_module("lightly.models.utils")
        backbone = masked(vit=timm_vit(encoder))
        decoder = peer("lightly.models.modules", "MAEDecoderTIMM")(num_patches=196, patch_size=16, embed_dim=dim)

        def lightly() -> Tensor:
            keep, hidden = utils.random_token_mask((images, 197), mask_ratio=0.75)
            decoded = decoder.embed(backbone.encode(images=x, idx_keep=keep))
            tokens = utils.repeat_token(decoder.mask_token, (images, 197))
            tokens = utils.set_at_index(tokens, keep, decoded.type_as(tokens))
            predicted = decoder.predict(utils.get_at_index(decoder.decode(tokens), hidden))
            target = utils.get_at_index(utils.patchify(x, 16), hidden - 1)
            target = utils.normalize_mean_var(target, dim=-1)
            return torch.nn.functional.mse_loss(predicted, target)

        runs[LIGHTLY] = backward(lightly, backbone, decoder)
    if STABLE in wanted and (kind := peer("stable_pretraining.methods.mae", "MAE")):
        stable = kind(timm_vit(encoder)).train()
        runs[STABLE] = backward(lambda: stable(x).loss, stable)
    if HF in wanted and (kind := peer("transformers", "ViTMAEForPreTraining")):
        config = peer("transformers", "ViTMAEConfig")(
            hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * dim,
            norm_pix_loss=True,
        )  # fmt: skip
        hf = kind(config).train()
        runs[HF] = backward(lambda: hf(x).loss, hf)
    return runs


def dino(encoder: str, images: int, wanted: list[str], precision: str) -> dict[str, Run]:
    """DINO: 2 crops of 224 and 8 of 96 pixels, head of 65,536 prototypes, with the teacher and its step"""
    dim = SIZES[encoder][0]
    runs: dict[str, Run] = {}
    if OURS in wanted:
        runs[OURS] = ours("dino", encoder, images, precision)
    if LIGHTLY in wanted and (kind := peer("lightly.models.modules.heads", "DINOProjectionHead")):
        update = peer("lightly.models.utils", "update_momentum")
        head = partial(kind, dim, 2048, 256, 65536)
        student, loss = (timm_vit(encoder, dynamic_img_size=True), head()), peer("lightly.loss", "DINOLoss")(65536)
        teacher = copy.deepcopy(student[0]).requires_grad_(False), head().requires_grad_(False)
        large, small = torch.randn(2 * images, 3, 224, 224), torch.randn(8 * images, 3, 96, 96)

        def lightly() -> Tensor:
            for one, other in zip(student, teacher, strict=True):
                update(one, other, m=0.996)
            with torch.no_grad():
                wanted = teacher[1](teacher[0](large)).chunk(2)
            found = student[1](torch.cat([student[0](large), student[0](small)])).chunk(10)
            return loss(list(wanted), list(found), epoch=50)

        runs[LIGHTLY] = backward(lightly, *student)
    return runs


def ijepa(encoder: str, images: int, wanted: list[str], precision: str) -> dict[str, Run]:
    """I-JEPA: 4 target blocks, predictor of 12 blocks of 384 channels, with the teacher and its step"""
    x = torch.randn(images, 3, 224, 224)
    dim = SIZES[encoder][0]
    runs: dict[str, Run] = {}
    if OURS in wanted:
        runs[OURS] = ours("ijepa", encoder, images, precision)
    if STABLE in wanted and (kind := peer("stable_pretraining.methods.ijepa", "IJEPA")):
        stable = kind(timm_vit(encoder), predictor_embed_dim=384, predictor_depth=12).train()

        def step() -> Tensor:
            stable.encoder.update_teacher()
            return stable(x).loss

        runs[STABLE] = backward(step, stable)
    if LIGHTLY in wanted and (masked := peer("lightly.models.modules", "MaskedVisionTransformerTIMM")):
        update = peer("lightly.models.utils", "update_momentum")
        student = masked(vit=timm_vit(encoder, class_token=False, global_pool="avg"))
        teacher = copy.deepcopy(student).requires_grad_(False)
        predictor = peer("lightly.models.modules.ijepa_timm", "IJEPAPredictorTIMM")(
            num_patches=196, depth=12, mlp_dim=dim, predictor_embed_dim=384, num_heads=12
        )
        collate = peer("lightly.data.ijepa_collate", "IJEPAMaskCollator")(input_size=(224, 224), patch_size=16, npred=4)
        gather = peer("lightly.models.utils", "apply_masks")

        def lightly() -> Tensor:
            update(student, teacher, m=0.996)
            _, context, targets = collate([(0,)] * images)
            with torch.no_grad():
                wanted = torch.nn.functional.layer_norm(teacher.encode(images=x), (dim,))
                wanted = gather(wanted, targets)
            seen = student.encode(images=x, idx_keep=context[0])
            return torch.nn.functional.smooth_l1_loss(predictor(seen, context, targets), wanted)

        runs[LIGHTLY] = backward(lightly, student, predictor)
    return runs


def lejepa(encoder: str, images: int, wanted: list[str], precision: str) -> dict[str, Run]:
    """LeJEPA: 2 views of 224 and 6 of 96 pixels, projector of 2,048, 2,048 and 64, 1,024 directions"""
    dim = SIZES[encoder][0]
    runs: dict[str, Run] = {}
    if OURS in wanted:
        runs[OURS] = ours("lejepa", encoder, images, precision, local_ratio=96 / 224)
    large, small = (torch.randn(count * images, 3, side, side) for count, side in ((2, 224), (6, 96)))

    def projector() -> Any:
        return peer("torchvision.ops", "MLP")(dim, [2048, 2048, 64], norm_layer=torch.nn.BatchNorm1d)

    if LIGHTLY in wanted and (kind := peer("lightly.loss.lejepa_loss", "LeJEPALoss")):
        net, head, loss = timm_vit(encoder, dynamic_img_size=True), projector(), kind()

        def lightly() -> Tensor:
            found = head(torch.cat([net(large), net(small)]))
            big, little = found[: len(large)], found[len(large) :]
            return loss(global_proj=big.unflatten(0, (2, -1)), local_proj=little.unflatten(0, (6, -1)))

        runs[LIGHTLY] = backward(lightly, net, head)
    if STABLE in wanted and (kind := peer("stable_pretraining.methods.lejepa", "LeJEPA")):
        stable = kind(f"{encoder}_patch16_224", projector=projector(), lamb=0.05, drop_path_rate=0.0).train()
        runs[STABLE] = backward(
            lambda: stable(global_views=list(large.chunk(2)), local_views=list(small.chunk(6))).loss, stable
        )
    return runs


ROWS: dict[str, Callable[[str, int, list[str], str], dict[str, Run]]] = {
    "mae": mae, "dino": dino, "ijepa": ijepa, "lejepa": lejepa,
}  # fmt: skip


def counts(names: list[str], variants: list[str]) -> None:
    """Kernels and waits of a step, as an accelerator would see them: where a CPU's cache does not cut tables up."""
    memory.CACHED = 2**40
    print("| step | | kernels | of the peer's | host waits |\n| --- | --- | --- | --- | --- |")
    for name in names:
        total: dict[str, int] = {}
        waits: dict[str, int] = {}
        for who, run in ROWS[name]("vit_small", 2, variants, "fp32").items():
            run()  # the first one sets things up
            with Counted() as count:
                run()
            total[who], waits[who] = sum(count.kernels.values()), len(count.waits)
        for who, kernels in total.items():
            share = "" if who == OURS else f"{total[OURS] / kernels:.2f}"
            print(f"| {name} | {who} | {kernels} | {share} | {waits[who]} |")


def speeds(names: list[str], variants: list[str], options: argparse.Namespace) -> None:
    """Images a CPU-second of one thread, in turns."""
    torch.set_num_threads(1)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    print("| step | | images a CPU-second | its time over ours | share of the matrix product's rate |")
    print("| --- | --- | --- | --- | --- |")
    for name in names:
        torch.manual_seed(0)
        runs = ROWS[name](options.encoder, options.images, variants, options.precision)
        with FlopCounterMode(display=False) as counter:
            runs[OURS]()
        taken: dict[str, list[float]] = {who: [] for who in ["ceiling", *runs]}
        for number in range(options.rounds + 1):
            for who, run in {"ceiling": lambda: [a @ b for _ in range(8)], **runs}.items():
                began = time.process_time()
                run()
                if number:
                    taken[who].append(time.process_time() - began)
        rate = 8 * 2 * 1024**3 / statistics.median(taken["ceiling"])
        for who in runs:
            seconds = statistics.median(taken[who])
            ratio = statistics.median(x / y for x, y in zip(taken[who], taken[OURS], strict=True))
            share = f"{counter.get_total_flops() / seconds / rate:.2f}" if who == OURS else ""
            print(f"| {name} | {who} | {options.images / seconds:.2f} | {ratio:.2f} | {share} |", flush=True)


def peaks(names: list[str], variants: list[str], options: argparse.Namespace) -> None:
    """Peak of a process that does two steps, each variant in its own, beyond what it has before them."""
    print("| step | | MB beyond the model | over ours |\n| --- | --- | --- | --- |")
    for name in names:
        found: dict[str, float] = {}
        for who in variants:
            argv = [sys.executable, str(Path(__file__)), "--rows", name, "--only", who, "--images", str(options.images)]
            said = subprocess.run(
                [*argv, "--encoder", options.encoder], capture_output=True, text=True, check=True
            ).stdout
            if said.strip():
                found[who] = float(said.split()[-1])
        for who, peak in found.items():
            print(f"| {name} | {who} | {peak:.0f} | {peak / found[OURS]:.2f} |", flush=True)


def one(name: str, who: str, options: argparse.Namespace) -> None:
    """Print what two steps of one variant add to the process's peak."""
    for run in ROWS[name](options.encoder, options.images, [who], "fp32").values():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        run()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--encoder", choices=SIZES, default="vit_tiny")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of our step")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    variants = [OURS, LIGHTLY, STABLE, HF]
    if options.only:
        one(options.rows[0], options.only, options)
    elif options.count:
        counts(options.rows, variants)
    elif options.memory:
        peaks(options.rows, variants, options)
    else:
        speeds(options.rows, variants, options)


if __name__ == "__main__":
    main()
