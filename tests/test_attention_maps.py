"""The attention that a ViT gives on demand: against float64 NumPy written from the definitions, and against what its blocks
did with it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ssl_pretrain import backbones
from ssl_pretrain.backbones.attention import weights
from ssl_pretrain.backbones.backbone import Backbone, UnsupportedByBackbone
from ssl_pretrain.backbones.vit import ViT
from ssl_pretrain.data.views import Sight
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.frozen import Frozen
from ssl_pretrain.parts.targets import attention_maps, check_attention

GRID, DIM, DEPTH, HEADS = (4, 6), 64, 3, 4
HEAD = DIM // HEADS
KEEP = torch.tensor([[5, 23, 0, 7, 11], [2, 1, 20, 14, 9]])
VARIANTS: list[dict[str, Any]] = [
    {},
    {"positions": "rope", "registers": 2},
    {"positions": "relative"},
    {"positions": "relative", "registers": 1, "qk_norm": True},
    {"positions": "sincos", "cls": False, "qk_norm": True, "qkv_bias": False},
    {"norms": "post", "shortcut_decay": 0.5},
]


def vit(**options: Any) -> ViT:
    """A small ViT in eval mode with noise in every parameter."""
    model = backbones.build(
        "vit_micro", image_size=(32, 48), **{"patch_size": 8, "dim": DIM, "depth": DEPTH, "heads": HEADS, **options}
    )
    assert isinstance(model, ViT)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + 0.5 * (parameter.ndim == 1))
    return model.eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def layer_norm(x: np.ndarray, part: Any) -> np.ndarray:
    scale, shift = (value.detach().double().numpy() for value in (part.weight, part.bias))
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + shift


def turned(x: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    """One head's query or key (d,) of the patch at (row, column), rotated by its position."""
    out, quarter = x.copy(), HEAD // 4
    for axis in (0, 1):
        at = (2 * place[axis] + 1) / GRID[axis] - 1
        for k in range(quarter):
            i, angle = axis * quarter + k, 2 * math.pi * at / 100 ** (k / quarter)
            a, b = x[i], x[i + HEAD // 2]
            out[i], out[i + HEAD // 2] = (
                a * math.cos(angle) - b * math.sin(angle),
                b * math.cos(angle) + a * math.sin(angle),
            )
    return out


def by_hand(model: ViT, i: int, entering: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The logits (B, heads, L, L) of block i for the tokens (B, L, D) that enter it; places (B, N): which patches."""
    block: Any = model.blocks[i]
    x = entering if model.config.norms == "post" else layer_norm(entering, block.norm1)
    qkv = x @ block.attn.qkv.weight.detach().double().numpy().T
    if block.attn.qkv.bias is not None:
        qkv = qkv + block.attn.qkv.bias.detach().double().numpy()
    prefix, (h, w) = model.prefix_tokens, GRID
    logits = np.zeros((len(x), HEADS, x.shape[1], x.shape[1]))
    for b in range(len(x)):
        where = [None] * prefix + [(int(p) // w, int(p) % w) for p in places[b]]
        for head in range(HEADS):
            q, k = (qkv[b, :, part * DIM + head * HEAD : part * DIM + (head + 1) * HEAD].copy() for part in (0, 1))
            if model.config.qk_norm:
                q, k = layer_norm(q, block.attn.q_norm), layer_norm(k, block.attn.k_norm)
            for t, place in enumerate(where):
                if place is not None and model.config.positions == "rope":
                    q[t], k[t] = turned(q[t], place), turned(k[t], place)
            for s, of_query in enumerate(where):
                for t, of_key in enumerate(where):
                    logits[b, head, s, t] = q[s] @ k[t] / math.sqrt(HEAD)
                    if model.config.positions == "relative":
                        table = block.attn.relative_position_bias_table.detach().double().numpy()
                        if of_query is None or of_key is None:
                            row = -1 if of_query is of_key else -3 if of_query is None else -2
                        else:
                            down, right = of_query[0] - of_key[0], of_query[1] - of_key[1]
                            row = (down + h - 1) * (2 * w - 1) + right + w - 1
                        logits[b, head, s, t] += table[row, head]
    return logits


@pytest.mark.parametrize("keep", [None, KEEP], ids=["all", "kept"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_attention_is_that_of_the_definition(options: dict[str, Any], keep: Tensor | None) -> None:
    model = vit(**options)
    with torch.no_grad():
        found = model.double()(images().double(), keep=keep, blocks=(0, 1), attention_of=(2, 1))
        logits = model(images().double(), keep=keep, attention_of=(-1,), attention_logits=True).attention[0]
    places = np.tile(np.arange(24), (2, 1)) if keep is None else keep.numpy()
    for attention, i in zip(found.attention, (2, 1), strict=True):
        expected = by_hand(model, i, found.blocks[i - 1].numpy(), places)
        if i == 2:
            np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-6, atol=1e-6)  # angles are float32
        expected = np.exp(expected - expected.max(-1, keepdims=True))
        expected /= expected.sum(-1, keepdims=True)
        np.testing.assert_allclose(attention.numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("how", [{}, {"keep": KEEP}, {"attention": "causal"}], ids=["all", "kept", "causal"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_attention_is_what_the_block_used(options: dict[str, Any], how: dict[str, Any]) -> None:
    """In float32: its product with the values, through the rest of the block, is the block's output."""
    model = vit(**options)
    block: Any = model.blocks[2]
    with torch.no_grad():
        found = model(images(), blocks=(1, 2), attention_of=(2,), **how)
        x, post = found.blocks[0], model.config.norms == "post"
        value = (
            block.attn.qkv(x if post else block.norm1(x))[..., 2 * DIM :].unflatten(2, (HEADS, HEAD)).transpose(1, 2)
        )
        y = block.attn.proj((found.attention[0] @ value).transpose(1, 2).flatten(2))
        x = y + (x if block.shortcut is None else x * block.shortcut)
        x = block.norm1(x) if post else x
        y = block.mlp(x if post else block.norm2(x)) + (x if block.shortcut is None else x * block.shortcut)
        y = block.norm2(y) if post else y
    scale = float(found.blocks[1].abs().max())
    assert float((y - found.blocks[1]).abs().max()) < 1e-5 * max(1.0, scale)


def test_gradients_flow_through_the_attention_and_nothing_else_changes() -> None:
    model = vit(positions="relative")
    plain = model(images())
    found = model(images(), attention_of=(1,))
    assert torch.equal(found.patches, plain.patches)
    assert plain.attention == ()
    found.attention[0].square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert {"blocks.1.attn.qkv.weight", "blocks.1.attn.relative_position_bias_table", "cls_token"} <= reached
    assert not any(name.startswith(("blocks.2.", "blocks.1.mlp", "norm.")) for name in reached)
    # of queries and keys, not of values
    assert not bool(model.blocks[1].attn.qkv.weight.grad[2 * DIM :].any())  # type: ignore[union-attr,index]


def test_only_the_blocks_asked_for_cost_more() -> None:
    model = vit()

    def flops(**options: Any) -> int:
        with FlopCounterMode(display=False) as count, torch.no_grad():
            model(images(), **options)
        return count.get_total_flops()

    scores = 2 * 2 * HEADS * 25 * 25 * HEAD  # of a block: multiplications and additions
    assert [flops(attention_of=of) - flops() for of in ((0,), (-1, 0), (1, 1))] == [scores, 2 * scores, scores]


def test_with_pooled_only_the_attention_is_of_all_tokens() -> None:
    model = vit(pool="cls")
    with torch.no_grad():
        some, whole = (model(images(), attention_of=(-1,), pooled_only=only) for only in (True, False))
    assert torch.equal(some.attention[0], whole.attention[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype).unbind(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = weights(q, k)
    assert found.dtype == torch.float32
    expected = (q.double() @ k.double().mT / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_under_autocast_the_attention_is_close_and_float32() -> None:
    model = vit()
    exact = model(images(), attention_of=(0,)).attention[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images(), attention_of=(0,)).attention[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.01)


def test_crops_in_several_sizes_have_their_own_attention() -> None:
    model, small = vit(positions="rope"), torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        both = model.forward_crops([(images(), {"attention_of": (0,)}), (small, {})])
        alone = model(images(), attention_of=(0,)).attention[0]
    assert torch.equal(both[0].attention[0], alone)
    assert both[1].attention == ()


def test_checkpointed_and_compiled_blocks_give_it_too() -> None:
    model = vit()
    expected = model(images(), attention_of=(1,))
    for block in model.blocks:
        own = block.forward
        block.forward = lambda *given, own=own: checkpoint(own, *given, use_reentrant=False)  # type: ignore[method-assign]
    found = model(images(), attention_of=(1,))
    assert torch.equal(found.attention[0], expected.attention[0])
    found.attention[0].sum().backward()
    compiled = torch.compile(vit(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        traced = compiled(images(), attention_of=(1,), attention_logits=True)
    torch.testing.assert_close(traced.attention[0].softmax(-1), expected.attention[0], rtol=1e-5, atol=1e-6)


def test_a_program_of_torch_export_has_it_in_its_result() -> None:
    class Mapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = vit()

        def forward(self, x: Tensor) -> Any:
            return self.encoder(x, attention_of=(-1,))

    model = Mapped()
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    found, expected = program.module()(images(3)), model(images(3))
    torch.testing.assert_close(found.attention[0], expected.attention[0])
    torch.testing.assert_close(found.pooled, expected.pooled)


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"blocks 0 to 2 \(or -3 to -1\), not 3"):
        vit()(images(), attention_of=(3,))
    model = vit(drop_path=0.5, drop_rows=True).train()
    with pytest.raises(UserError, match="--no-drop-rows"):
        model(images(), attention_of=(-1,), drop=torch.rand(2, 2 * DEPTH))
    first = model(images(), attention_of=(0,), drop=torch.rand(2, 2 * DEPTH)).attention[0]  # its rate is 0
    assert first.shape == (2, HEADS, 25, 25)
    with pytest.raises(UnsupportedByBackbone, match="'attention_maps', and ResNet does not"):
        backbones.build("resnet18", image_size=(32, 32)).require("a method", "attention_maps")


def frozen(backbone: Backbone) -> Frozen:
    own, run = ((0.5,) * 3, (0.25,) * 3), ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    return Frozen(backbone, spec="runs/t", fingerprint="t", sight=Sight(backbone.stride), own=own, run=run)


@pytest.mark.parametrize("keep", [None, KEEP], ids=["all", "kept"])
def test_a_tap_of_a_frozen_network_is_its_attention_on_its_own_pixels(keep: Tensor | None) -> None:
    model = vit()
    network, views = frozen(model), images()
    found = attention_maps(network, views, (-1, 0), keep=keep)
    mean, std = (torch.tensor(value)[:, None, None] for value in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    with torch.no_grad():
        expected = model((views * std + mean - 0.5) / 0.25, keep=keep, attention_of=(-1, 0)).attention
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert not one.requires_grad
    (logits,) = attention_maps(network, views, (-1,), keep=keep, logits=True)
    torch.testing.assert_close(logits.softmax(-1), found[0])


def test_a_frozen_network_without_such_attention_is_named() -> None:
    check_attention("--attention-block", frozen(vit()), -1, 2)
    with pytest.raises(UserError, match="--attention-block 3: runs/t has 3 blocks, -3 to 2"):
        check_attention("--attention-block", frozen(vit()), -1, 3)
    convolutions = frozen(backbones.build("resnet18", image_size=(32, 32)))
    with pytest.raises(
        UserError, match=r"--teacher: runs/t gives no attention maps \(ResNet\): use the export of a ViT"
    ):
        check_attention("--teacher", convolutions, -1)


def test_an_export_refuses_what_its_encoder_lacks() -> None:
    how = Preprocessing.for_size((32, 48), (0.5,) * 3, (0.25,) * 3)
    whole = Encoder(vit(), "vit_micro", how, {})
    assert whole(images(), attention_of=(0,)).attention[0].shape == (2, HEADS, 25, 25)
    convolutions = Encoder(backbones.build("resnet18", image_size=(32, 48)), "resnet18", how, {})
    with pytest.raises(UnsupportedByBackbone, match=r"the option attention_of needs .*'attention_maps'"):
        convolutions(images(), attention_of=(0,))
