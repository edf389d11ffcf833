"""--compile: the blocks are compiled in the first steps and never again."""

import pytest
import torch

from ssl_pretrain import backbones, plugins
from ssl_pretrain.conformance.one_step import BATCH, after_step, batch, build
from ssl_pretrain.loop import parallel
from ssl_pretrain.pretext import Step

STEPS, SETTLED = 5, 3


@pytest.mark.filterwarnings("default")  # the tracer looks at gradients of tensors that have none
@pytest.mark.parametrize("name", plugins.own("ssl_pretrain.methods"))
def test_no_block_is_compiled_again_after_the_first_steps(name: str) -> None:
    torch._dynamo.reset()
    method = build(name)
    for block in parallel.blocks(method):
        block.compile(backend="aot_eager")  # traces as the default backend does, and compiles nothing
    given = batch(method, slice(0, BATCH))
    for number in range(STEPS):
        noise = number + 2  # with these, blocks of both sizes that I-JEPA draws here come within the first steps
        step = Step(
            step=number, total=STEPS, noise=noise, rows=slice(0, BATCH), batch_size=BATCH, device=torch.device("cpu")
        )
        torch.compiler.set_stance("fail_on_recompile" if number >= SETTLED else "default")
        try:
            losses = method(given, step)
            losses.total.backward()
        finally:
            torch.compiler.set_stance("default")
        after_step(method, step, losses.carry)
        assert torch.isfinite(losses.total)


@pytest.mark.filterwarnings("default")
def test_the_check_sees_a_block_that_is_compiled_again() -> None:
    torch._dynamo.reset()
    block = build("mae").encoder.blocks[0]
    block.compile(backend="aot_eager", dynamic=False)
    width = build("mae").encoder.dim
    block(torch.zeros(2, 5, width))
    torch.compiler.set_stance("fail_on_recompile")
    try:
        with pytest.raises(RuntimeError, match="recompile"):
            block(torch.zeros(2, 7, width))
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "options",
    [{"shortcut_decay": 0.5}, {"drop_path": 0.3, "layer_scale": 0.1}, {"drop_path": 0.5, "drop_rows": True}],
    ids=str,
)
def test_a_deep_encoder_stays_below_the_compilers_limit(options: dict[str, float]) -> None:
    torch._dynamo.reset()
    encoder = backbones.build(
        "vit_micro", image_size=(32, 32), patch_size=8, **{"dim": 32, "depth": 12, "heads": 2}, **options
    )
    for block in parallel.blocks(encoder):
        block.compile(backend="aot_eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        encoder.train()(torch.randn(16, 3, 32, 32), drop=torch.rand(16, 24)).pooled.sum().backward()
