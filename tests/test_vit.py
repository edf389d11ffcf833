"""The ViT against timm's and transformers' with the same weights, and each option against what it is defined to do."""

import subprocess
import sys
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import import_timm, import_transformers, to_transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssl_pretrain import backbones
from ssl_pretrain.backbones.backbone import Features, UnsupportedByBackbone
from ssl_pretrain.backbones.vit import Block, PatchEmbed, ViT
from ssl_pretrain.errors import UserError

SIZE, DIM, DEPTH, HEADS = (32, 48), 64, 3, 4  # a grid of 4 x 6 patches of 8 pixels
PATCHES = 24


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vit(size: tuple[int, int] = SIZE, in_chans: int = 3, **options: Any) -> ViT:
    """A small ViT in eval mode whose every parameter is noise, so that none hides behind a 0 or a 1."""
    options = {"patch_size": 8, "dim": DIM, "depth": DEPTH, "heads": HEADS, **options}
    model = backbones.build("vit_micro", image_size=size, in_chans=in_chans, **options)
    assert isinstance(model, ViT)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.15 * draw(*parameter.shape, seed=i))
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model.eval()


def images(count: int = 2, size: tuple[int, int] = SIZE, channels: int = 3, seed: int = 0) -> Tensor:
    return draw(count, channels, *size, seed=100 + seed)


def tokens(features: Features) -> Tensor:
    """(B, L, D), prefix first."""
    return features.patches if features.prefix is None else torch.cat([features.prefix, features.patches], dim=1)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


# ---- Names and sizes.


def test_every_name_is_built_as_its_size_says() -> None:
    assert [name for name in backbones.names() if name.startswith("vit")][:2] == ["vit_micro", "vit_tiny"]
    for name in backbones.names():
        if name.startswith("vit"):
            with torch.device("meta"):
                model = backbones.build(name, image_size=(224, 224))
            assert {o: getattr(model.config, o) for o in backbones.defaults(name)} == backbones.defaults(name)
            assert (model.dim, model.depth) == (model.config.dim, len(model.blocks))  # type: ignore[attr-defined]
    sizes = {
        n: (d["dim"], d["depth"], d["heads"])
        for n in backbones.names()
        if n.startswith("vit") and (d := backbones.defaults(n))
    }
    assert sizes["vit_small"] == (384, 12, 6)
    assert sizes["vit_giant"] == (1536, 40, 24)


def test_parameter_counts_are_the_published_ones() -> None:
    """ViT-Ti/S/B/L with 1000 classes have 5.72, 22.05, 86.57 and 304.33 million (DeiT, table 1; ViT, timm)."""
    counts = {"vit_tiny": 5717416, "vit_small": 22050664, "vit_base": 86567656, "vit_large": 304326632}
    for name, published in counts.items():
        with torch.device("meta"):
            model = backbones.build(name, image_size=(224, 224))
        assert sum(p.numel() for p in model.parameters()) + 1000 * (model.dim + 1) == published


def test_listing_names_and_sizes_does_not_import_torch() -> None:
    code = (
        "import sys; from ssl_pretrain import backbones; backbones.names(); backbones.defaults('vit_tiny'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_described_encoder_is_built_again() -> None:
    model = vit(registers=2, positions="rope", layer_scale=1e-3, drop_path=0.1)
    again = backbones.build("vit_micro", image_size=model.image_size, in_chans=3, **model.describe())
    assert again.config == model.config
    assert {f.name for f in fields(backbones.config_class("vit_micro"))} == set(model.describe())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vit_tinny"}, "unknown encoder 'vit_tinny'; did you mean vit_tiny"),
        ({"name": "../vit_tiny"}, "unknown encoder"),
        ({"name": "backbone"}, "unknown encoder"),
        ({"patchsize": 8}, "vit_micro has no option 'patchsize'; did you mean patch_size"),
        ({"depth": "3"}, "depth: '3' is not a whole number"),
        ({"positions": "learnt"}, "'learnt' is not one of learned, sincos, rope, relative; did you mean learned"),
        ({"image_size": (33, 50)}, r"33 x 50 .* patches of 8 x 8: use --image-size 32 48 or another --patch-size"),
        ({"image_size": (3, 48)}, "use --image-size 8 48"),
        ({"heads": 5}, "--heads 5 must divide --dim 64; 4 does"),
        ({"heads": 0}, "--heads is 0; it must be above 0"),
        ({"in_chans": 0}, "--in-chans is 0"),
        ({"registers": -1}, "--registers is -1"),
        ({"drop_path": 1.0}, "--drop-path is 1.0; it must be at least 0 and below 1"),
        ({"dim": 66, "heads": 3, "positions": "sincos"}, "multiple of 4, not 66"),
        ({"dim": 66, "heads": 3, "positions": "rope"}, "multiple of 4, not 22"),
        ({"cls": False, "pool": "cls"}, "--pool cls needs a class token"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(options: dict[str, Any], message: str) -> None:
    given = {"name": "vit_micro", "image_size": SIZE, "patch_size": 8, "dim": DIM, "heads": HEADS, **options}
    with pytest.raises(UserError, match=message):
        backbones.build(**given)


def test_images_that_do_not_fit_are_named() -> None:
    model = vit()
    with pytest.raises(UserError, match="images of 3 channels, not 1"):
        model(images(channels=1))
    with pytest.raises(UserError, match="images of 32 x 44 pixels"):
        model(images(size=(32, 44)))
    with pytest.raises(UserError, match=r"blocks 0 to 2 \(or -3 to -1\), not 3"):
        model(images(), blocks=(3,))
    with pytest.raises(UnsupportedByBackbone, match="'levels'"):
        model.require("a method", "keep", "levels")
    model.require("a method", "keep", "replace", "attention", "blocks", "drop_path")


# ---- The same numbers as other people's ViTs.

TIMM = {
    "plain": ({}, {}),
    "no class token": ({"class_token": False, "global_pool": "avg", "fc_norm": False}, {"cls": False}),
    "registers": ({"reg_tokens": 3, "no_embed_class": True}, {"registers": 3}),
    "layer scale": ({"init_values": 0.1}, {"layer_scale": 0.1}),
    "query-key norm": ({"qk_norm": True}, {"qk_norm": True}),
    "no qkv bias": ({"qkv_bias": False}, {"qkv_bias": False}),
    "narrow mlp": ({"mlp_ratio": 2.5}, {"mlp_ratio": 2.5}),
    "four channels": ({"in_chans": 4}, {"in_chans": 4}),
}


@pytest.mark.parametrize("variant", [*TIMM, "swiglu"])
def test_outputs_and_gradients_equal_timm(variant: str) -> None:
    timm = import_timm()
    if variant == "swiglu":
        hidden = (int(4 * DIM * 2 / 3) + 7) // 8 * 8
        theirs: dict[str, Any] = {
            "mlp_layer": timm.layers.SwiGLUPacked,
            "mlp_ratio": 2 * hidden / DIM,
            "act_layer": "silu",
        }
        ours: dict[str, Any] = {"swiglu": True}
    else:
        theirs, ours = TIMM[variant]
    model = vit(**ours)
    other = timm.models.vision_transformer.VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, num_classes=0, **theirs
    ).eval()

    def renamed(named: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {n.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): t for n, t in named.items()}
        if "reg_tokens" in named:  # timm adds no position to the class token then
            named["reg_token"] = named.pop("reg_tokens")
            named["pos_embed"] = named["pos_embed"][:, 1:]
        return named

    state = renamed(dict(model.state_dict()))
    if variant == "registers":
        state["cls_token"] = state["cls_token"] + model.state_dict()["pos_embed"][:, :1]
    other.load_state_dict(state)
    x = images(channels=model.in_chans)
    found, expected = tokens(model(x)), other.forward_features(x)
    close(found, expected)
    g = draw(*found.shape, seed=7)
    found.backward(g)
    expected.backward(g)
    gradients = renamed({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for n, parameter in other.named_parameters():
        assert parameter.grad is not None
        close(gradients[n], parameter.grad, 1e-4)


def test_a_whole_vit_tiny_equals_timm() -> None:
    timm = import_timm()
    torch.manual_seed(0)
    other = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0).eval()
    model = backbones.build("vit_tiny", image_size=(224, 224), pool="cls").eval()
    model.load_state_dict(other.state_dict())
    x = images(1, (224, 224))
    with torch.no_grad():
        found = model(x, blocks=(0, 5, -1))
        close(found.pooled, other(x))
        theirs = other.forward_intermediates(
            x, [0, 5, 11], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
    for one, (patches, prefix) in zip(found.blocks, theirs, strict=True):
        close(one, torch.cat([prefix, patches], dim=1))


SQUARE = (40, 40)  # transformers resizes positions of square grids only


def small(config: Any, **options: Any) -> Any:
    """A configuration of transformers' with our small sizes."""
    sizes = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "patch_size": 8}
    return config(**{"image_size": SQUARE, **sizes, "layer_norm_eps": 1e-6, **options})


@pytest.mark.parametrize("size", [SQUARE, (64, 24)], ids=["trained size", "other size"])
def test_outputs_equal_transformers_vit(size: tuple[int, int]) -> None:
    transformers = import_transformers()
    other = transformers.ViTModel(small(transformers.ViTConfig, intermediate_size=4 * DIM), add_pooling_layer=False)
    model = vit(SQUARE)
    other.eval().load_state_dict(to_transformers(model.state_dict(), other.state_dict()))
    x = images(size=size)
    with torch.no_grad():
        found, expected = model(x), other(x, interpolate_pos_encoding=True).last_hidden_state
    close(tokens(found), expected)
    assert found.grid == (size[0] // 8, size[1] // 8)
    assert found.cls is not None
    close(found.cls, expected[:, 0])
    close(found.pooled, expected[:, 1:].mean(1))


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_outputs_equal_transformers_dinov2(registers: int, swiglu: bool) -> None:
    transformers = import_transformers()
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    more = {"num_register_tokens": registers} if registers else {}
    config = small(getattr(transformers, name + "Config"), use_swiglu_ffn=swiglu, **more)
    other = getattr(transformers, name + "Model")(config).eval()
    model = vit(SQUARE, registers=registers, swiglu=swiglu, layer_scale=1.0)
    other.load_state_dict(to_transformers(model.state_dict(), other.state_dict()))
    with torch.no_grad():
        close(tokens(model(images(size=SQUARE))), other(images(size=SQUARE)).last_hidden_state)


def test_outputs_with_patches_left_out_equal_transformers_mae() -> None:
    transformers = import_transformers()
    config = small(transformers.ViTMAEConfig, intermediate_size=4 * DIM, mask_ratio=0.75, image_size=SIZE)
    other = transformers.ViTMAEModel(config).eval()
    model = vit(positions="sincos")
    other.load_state_dict(to_transformers(model.state_dict(), other.state_dict()))
    noise = torch.rand(2, PATCHES, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = other(images(), noise=noise).last_hidden_state
        found = model(images(), keep=noise.argsort(dim=1)[:, : PATCHES // 4])
    assert found.patches.shape == (2, 6, DIM)
    close(tokens(found), expected)


def test_rotary_outputs_equal_transformers_dinov3() -> None:
    transformers = import_transformers()
    if not hasattr(transformers, "DINOv3ViTModel"):
        pytest.skip("this transformers has no DINOv3 to compare with")
    config = small(transformers.DINOv3ViTConfig, intermediate_size=4 * DIM, num_register_tokens=2)
    other = transformers.DINOv3ViTModel(config).eval()
    model = vit(registers=2, positions="rope", layer_scale=1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.bias"):
                parameter[DIM : 2 * DIM] = 0  # DINOv3's keys have no bias
        state = to_transformers(model.state_dict(), other.state_dict())
        state["embeddings.mask_token"] = state["embeddings.mask_token"][None]
        other.load_state_dict(state)
        for size in (SIZE, (64, 40)):
            x = images(size=size)
            close(tokens(model(x)), other(x).last_hidden_state)
        x, keep = images(), torch.stack([torch.randperm(PATCHES, generator=torch.Generator().manual_seed(1))] * 2)
        permuted = model(x, keep=keep).patches
        close(permuted, other(x).last_hidden_state[:, 3:].gather(1, keep[:, :, None].expand(-1, -1, DIM)))


# ---- What the forward can be asked for.


def test_patch_embedding_is_the_convolution() -> None:
    embed, x = PatchEmbed(4, 5, 12), draw(2, 5, 8, 20)
    expected = embed.proj(x).flatten(2).transpose(1, 2)
    close(embed(x), expected, 1e-6)
    close(embed(x.to(memory_format=torch.channels_last)), expected, 1e-6)
    keep = torch.tensor([[9, 0, 3], [4, 4, 8]])
    close(embed(x, keep), torch.stack([expected[i, k] for i, k in enumerate(keep)]), 1e-6)


def plain_forward(
    model: ViT, x: Tensor, rows: list[list[int]], masked: Tensor | None = None, token: Any = None
) -> Tensor:
    """A forward in the words of the formulas on chosen patches, one image at a time: (B, L, D)."""
    state, results = model.state_dict(), []
    for image, chosen in enumerate(rows):
        patches = F.conv2d(x[image : image + 1], state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 8)
        patches = patches[0].flatten(1).T.clone()
        if masked is not None:
            patches[masked[image]] = token
        absolute = state.get("pos_embed", torch.zeros(1, PATCHES + 1, DIM))[0]
        t = torch.cat([state["cls_token"][0] + absolute[:1], state["reg_tokens"][0], (patches + absolute[1:])[chosen]])
        for i in range(DEPTH):
            w = {n.removeprefix(f"blocks.{i}."): v for n, v in state.items() if n.startswith(f"blocks.{i}.")}
            alpha = 1 + (model.config.shortcut_decay - 1) * i / (DEPTH - 1)
            y = F.layer_norm(t, (DIM,), w["norm1.weight"], w["norm1.bias"], 1e-6)
            q, k, v = (y @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]).chunk(3, dim=1)
            heads = []
            for h in range(HEADS):
                part = slice(h * DIM // HEADS, (h + 1) * DIM // HEADS)
                scores = (q[:, part] @ k[:, part].T) / (DIM // HEADS) ** 0.5
                if "attn.relative_position_bias_table" in w:
                    scores = scores + relative_scores(w["attn.relative_position_bias_table"][:, h], chosen)
                heads.append(scores.softmax(1) @ v[:, part])
            t = alpha * t + torch.cat(heads, 1) @ w["attn.proj.weight"].T + w["attn.proj.bias"]
            y = F.layer_norm(t, (DIM,), w["norm2.weight"], w["norm2.bias"], 1e-6)
            y = F.gelu(y @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
            t = alpha * t + y @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
        results.append(F.layer_norm(t, (DIM,), state["norm.weight"], state["norm.bias"], 1e-6))
    return torch.stack(results)


def relative_scores(table: Tensor, chosen: list[int]) -> Tensor:
    """What a head's table of relative positions on a 4 x 6 grid adds, pair by pair: 7 x 11 offsets, then the three of the
    three prefix tokens."""
    places = [None, None, None, *[(patch // 6, patch % 6) for patch in chosen]]
    scores = torch.zeros(len(places), len(places))
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            if query is not None and key is not None:
                scores[i, j] = table[:77].reshape(7, 11)[query[0] - key[0] + 3, query[1] - key[1] + 5]
            else:
                scores[i, j] = table[77 if key is not None else 78 if query is not None else 79]
    return scores


@pytest.mark.parametrize("positions", ["learned", "sincos", "relative"])
def test_keep_and_replace_equal_a_plain_forward(positions: str) -> None:
    model, x = vit(registers=2, positions=positions), images()
    keep = torch.tensor([[20, 3, 7, 11, 0], [1, 2, 23, 5, 6]])
    masked = torch.zeros(2, PATCHES, dtype=torch.bool)
    masked[0, [3, 11, 12]] = masked[1, [0, 23]] = True
    token, everything = draw(DIM, seed=9), [list(range(PATCHES))] * 2
    with torch.no_grad():
        close(tokens(model(x)), plain_forward(model, x, everything), 1e-4)
        close(tokens(model(x, keep=keep)), plain_forward(model, x, keep.tolist()), 1e-4)
        replaced = model(x, replace=(masked, token))
        close(tokens(replaced), plain_forward(model, x, everything, masked, token), 1e-4)
        both = model(x, keep=keep, replace=(masked, token))
        close(tokens(both), plain_forward(model, x, keep.tolist(), masked, token), 1e-4)
    assert both.grid == (4, 6)
    assert both.prefix is not None
    assert both.prefix.shape == (2, 3, DIM)


@pytest.mark.parametrize("decay", [0.7, 0.0])
def test_shortcuts_decay_linearly_in_depth_on_both_branches(decay: float) -> None:
    model, x = vit(registers=1, shortcut_decay=decay), images()
    with torch.no_grad():
        close(tokens(model(x)), plain_forward(model, x, [list(range(PATCHES))] * 2), 1e-4)
        assert not torch.allclose(tokens(model(x)), tokens(vit(registers=1)(x)), atol=1e-2)


@pytest.mark.parametrize("positions", ["learned", "sincos", "rope", "relative"])
def test_keeping_all_patches_in_another_order_permutes_the_output(positions: str) -> None:
    model, x = vit(positions=positions, cls=False, registers=1), images()
    order = torch.stack([torch.randperm(PATCHES, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    with torch.no_grad():
        whole, permuted = model(x), model(x, keep=order)
    close(permuted.patches, whole.patches.gather(1, order[:, :, None].expand(-1, -1, DIM)))
    close(permuted.pooled, whole.pooled)
    assert whole.cls is None


def test_dropped_patches_are_not_looked_at() -> None:
    model, x, keep = vit(), images(), torch.tensor([[0, 7, 9], [1, 2, 3]])
    other = x.clone()
    other[0, :, 8:16, :8] = float("nan")  # patch 6
    with torch.no_grad():
        assert torch.equal(model(x, keep=keep).patches, model(other, keep=keep).patches)


def changed_from(x: Tensor, patch: int) -> Tensor:
    """The images with every patch from `patch` on made other."""
    grid = draw(*x.shape, seed=55)
    later = (torch.arange(PATCHES) >= patch).reshape(4, 6).repeat_interleave(8, 0).repeat_interleave(8, 1)
    return torch.where(later, grid, x)


@pytest.mark.parametrize(
    "options",
    [{"cls": False}, {"registers": 2}, {"positions": "rope", "cls": False}, {"positions": "relative"}],
    ids=str,
)
def test_causal_attention_leaks_nothing_from_later_patches(options: dict[str, Any]) -> None:
    model, x, at = vit(**options), images(), 10
    with torch.no_grad():
        found, other = model(x, attention="causal"), model(changed_from(x, at), attention="causal")
    close(tokens(other)[:, : model.prefix_tokens + at], tokens(found)[:, : model.prefix_tokens + at])
    assert (other.patches[:, at:] - found.patches[:, at:]).abs().amin(dim=(0, 2)).max() > 1e-4
    # and each token does see those before it: the first patch reaches the last one
    with torch.no_grad():
        first = x.clone()
        first[:, :, :8, :8] += 1
        assert not torch.allclose(model(first, attention="causal").patches[:, -1], found.patches[:, -1], atol=1e-4)


@pytest.mark.parametrize("positions", ["learned", "relative"])
def test_prefix_attention_sees_the_whole_prefix_and_nothing_later(positions: str) -> None:
    model, x = vit(registers=1, positions=positions), images()
    lengths = torch.tensor([4, 10])
    with torch.no_grad():
        found = model(x, attention="prefix", prefix_length=lengths)
        other = model(changed_from(x, 9), attention="prefix", prefix_length=lengths)
    close(other.patches[0, :9], found.patches[0, :9])  # beyond its prefix image 0 is causal
    assert (other.patches[1, :9] - found.patches[1, :9]).abs().amax(1).min() > 1e-4  # patch 9 is in image 1's prefix
    with torch.no_grad():
        whole = model(x, attention="prefix", prefix_length=torch.tensor([PATCHES, PATCHES]))
        close(tokens(whole), tokens(model(x)))
        mask = torch.ones(1, PATCHES + 2, PATCHES + 2, dtype=torch.bool).tril()
        close(tokens(model(x, attention=mask)), tokens(model(x, attention="causal")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "diagonal"}, "it must be full, causal, prefix"),
        ({"attention": "prefix"}, "needs prefix_length"),
        ({"attention": torch.ones(1, PATCHES, PATCHES, dtype=torch.bool)}, r"\(B or 1, 25, 25\), not \(1, 24, 24\)"),
    ],
)
def test_an_attention_there_is_not_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vit()(images(), **options)


def test_an_attention_mask_of_kept_tokens_keeps_groups_apart() -> None:
    """Block-diagonal attention over two groups is two forwards of one group each."""
    model, x = vit(cls=False), images()
    first, second = torch.tensor([[0, 5, 9], [3, 4, 8]]), torch.tensor([[1, 2], [22, 23]])
    mask = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).bool()[None]
    with torch.no_grad():
        together = model(x, keep=torch.cat([first, second], 1), attention=mask).patches
        close(together[:, :3], model(x, keep=first).patches)
        close(together[:, 3:], model(x, keep=second).patches)


def test_blocks_come_in_the_order_asked_for_and_before_the_norm() -> None:
    model = vit(registers=1)
    with torch.no_grad():
        found = model(images(), blocks=(-1, 0, 2))
        last, first, also_last = found.blocks
        assert torch.equal(last, also_last)
        close(model.norm(last), tokens(found))
        close(model.norm(model.blocks[2](model.blocks[1](first))), tokens(found))
    assert model(images()).blocks == ()


def test_pooling() -> None:
    x = images()
    with torch.no_grad():
        by_cls, by_mean = vit(pool="cls", registers=2)(x), vit(pool="mean", registers=2)(x)
        assert torch.equal(by_cls.pooled, tokens(by_cls)[:, 0])
        close(by_mean.pooled, tokens(by_mean)[:, 3:].mean(1))


def test_the_same_grid_uses_the_table_itself_and_its_gradient_reaches_every_row() -> None:
    model = vit()
    model(images()).patches.square().sum().backward()
    assert isinstance(model.pos_embed, Tensor)
    assert model.pos_embed.grad is not None
    assert (model.pos_embed.grad.abs().amax(2) > 0).all()
    model.zero_grad()
    model(images(size=(16, 24)), keep=torch.tensor([[0, 4], [1, 5]])).patches.square().sum().backward()
    assert model.pos_embed.grad is not None
    assert (model.pos_embed.grad.abs().amax(2) > 0).any()


# ---- Training.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cls": False, "positions": "sincos"},
        {"registers": 3, "positions": "rope"},
        {"positions": "relative"},
        {"layer_scale": 1e-2, "swiglu": True, "qk_norm": True},
        {"pool": "cls", "drop_path": 0.3, "shortcut_decay": 0.7},
    ],
    ids=str,
)
def test_no_parameter_is_dead(options: dict[str, Any]) -> None:
    torch.manual_seed(0)  # the weights a run begins with
    sizes = {"patch_size": 8, "dim": DIM, "depth": DEPTH, "heads": HEADS}
    model = backbones.build("vit_micro", image_size=SIZE, **sizes, **options).train()
    features = model(images(), drop=torch.full((2, 2 * DEPTH), 0.9))
    (features.pooled.square().mean() + features.patches[:, ::2].pow(3).mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = backbones.build("vit_micro", image_size=(64, 64), patch_size=4, registers=4, layer_scale=0.01)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name.endswith("gamma"):
            assert (value == 0.01).all(), name
        elif "norm" in name and name.endswith("weight"):
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        elif name == "patch_embed.proj.weight":
            assert float(value.std()) == pytest.approx((3 * 4 * 4 * 3) ** -0.5, rel=0.05)
        else:
            assert float(value.std()) == pytest.approx(0.02, rel=0.15), name
            assert float(value.mean()) == pytest.approx(0, abs=0.005), name
    torch.manual_seed(0)
    again = backbones.build("vit_micro", image_size=(64, 64), patch_size=4, registers=4, layer_scale=0.01)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_drop_path_drops_each_samples_branches_and_keeps_the_expectation() -> None:
    rate = 0.4
    model, x = vit(drop_path=rate, layer_scale=1.0).train(), images(1)
    rates = [0, 0, rate / 2, rate / 2, rate, rate]  # linear in depth, both branches of a block alike

    def by_hand(factors: list[float]) -> Tensor:
        t = model._positioned(model.patch_embed(x), model.grid, None)
        for i, block in enumerate(model.blocks):
            t = t + factors[2 * i] * block.ls1(block.attn(block.norm1(t), None, False, None))  # type: ignore[operator]
            t = t + factors[2 * i + 1] * block.ls2(block.mlp(block.norm2(t)))  # type: ignore[operator]
        return model.norm(t)

    noise = torch.tensor([[0.0, 0.9, 0.19, 0.21, 0.39, 0.41], [0.5, 0.5, 0.21, 0.0, 0.41, 0.39]])
    with torch.no_grad():
        found = tokens(model(x.expand(2, -1, -1, -1), drop=noise))
        for row in range(2):
            factors = [float(u >= p) / (1 - p) for u, p in zip(noise[row].tolist(), rates, strict=True)]
            close(found[row], by_hand(factors)[0], 1e-4)
        again = tokens(model(x.expand(2, -1, -1, -1), drop=noise))
        assert torch.equal(found, again)

        many = torch.rand(20000, 2 * DEPTH, generator=torch.Generator().manual_seed(0))
        (factors,), _ = model._drop_path([many])
        np.testing.assert_allclose(factors.mean(0).numpy(), 1, atol=0.03)
        np.testing.assert_allclose((factors == 0).float().mean(0).numpy(), rates, atol=0.02)

        model.eval()
        assert torch.equal(tokens(model(x)), tokens(model(x, drop=torch.zeros(1, 2 * DEPTH))))
        close(tokens(model(x)), by_hand([1.0] * 6), 1e-4)


def test_drop_path_without_noise_says_where_it_comes_from() -> None:
    model = vit(drop_path=0.1)
    model.train()
    with pytest.raises(RuntimeError, match=r"drop=step\.rand\(6\)"):
        model(images())
    vit().train()(images())  # without drop path none is needed


@pytest.mark.parametrize(
    "options", [{}, {"positions": "rope", "cls": False, "qk_norm": True}, {"positions": "relative"}], ids=str
)
def test_bfloat16_autocast_is_close_to_float32_and_keeps_the_stream_float32(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = backbones.build("vit_micro", image_size=SIZE, patch_size=8, **options)
    exact = model(images(), blocks=(0,))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images(), blocks=(0,))
    assert found.blocks[0].dtype == torch.float32
    assert found.patches.dtype == torch.float32
    torch.testing.assert_close(found.patches, exact.patches, atol=0.03, rtol=0.03)
    assert not torch.equal(found.patches, exact.patches)
    found.pooled.square().mean().backward()
    half = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    exact.pooled.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert F.cosine_similarity(half[name].flatten(), parameter.grad.flatten(), dim=0) > 0.98, name


def test_layers_for_learning_rate_decay() -> None:
    model = vit(registers=1)
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert {layers[n] for n in ("patch_embed.proj.weight", "cls_token", "reg_tokens", "pos_embed")} == {0}
    assert layers["blocks.0.norm1.weight"] == 1
    assert layers["blocks.2.mlp.fc2.bias"] == 3
    assert layers["norm.weight"] == 4
    with pytest.raises(KeyError):
        model.layer_of("head.weight")


TOGETHER: list[dict[str, Any]] = [
    {},
    {"positions": "rope", "qk_norm": True, "cls": False},
    {"registers": 2, "layer_scale": 0.3, "swiglu": True, "norms": "patches"},
    {"drop_path": 0.4, "shortcut_decay": 0.5, "norms": "post"},
    {"drop_path": 0.4, "drop_rows": True, "positions": "rope", "registers": 1},
    {"drop_path": 0.4, "drop_rows": True, "drop_path_uniform": True, "shortcut_decay": 0.5, "norms": "post"},
    {"positions": "relative"},
]


@pytest.mark.parametrize("options", TOGETHER, ids=str)
@pytest.mark.parametrize("blocks", [(), (-1, 0)], ids=str)
def test_batches_together_give_what_each_gives_alone(options: dict[str, Any], blocks: tuple[int, ...]) -> None:
    model = vit(**options).double().train()
    keep = torch.stack([torch.randperm(PATCHES, generator=torch.Generator().manual_seed(i))[:7] for i in range(2)])
    token, masked = draw(DIM, seed=5).double().requires_grad_(), draw(3, 6, seed=6) > 0
    batches = [
        (images(2).double(), {"keep": keep}),
        (images(3, (16, 24), seed=1).double(), {"replace": (masked, token)}),
        (images(4, (24, 16), seed=2).double(), {}),  # as many tokens as the one before
    ]
    batches = [
        (x, how | {"blocks": blocks, "drop": torch.rand(len(x), 2 * DEPTH, generator=torch.Generator().manual_seed(9))})
        for x, how in batches
    ]
    alone = [model(x, **how) for x, how in batches]
    together = model.forward_crops(batches)
    parameters = [*model.parameters(), token]

    def gradients(found: list[Features]) -> tuple[Tensor, ...]:
        total = sum((each.pooled.sin().sum() + tokens(each).square().mean() for each in found), torch.zeros(()))
        return torch.autograd.grad(total, parameters, allow_unused=True)

    for one, other in zip(together, alone, strict=True):
        assert one.grid == other.grid
        for name in ("cls", "patches", "pooled", "prefix"):
            if getattr(other, name) is None:
                assert getattr(one, name) is None
            else:
                close(getattr(one, name), getattr(other, name), 1e-10)
        assert len(one.blocks) == len(blocks)
        for a, b in zip(one.blocks, other.blocks, strict=True):
            close(a, b, 1e-10)
    for a, b in zip(gradients(together), gradients(alone), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            close(a, b, 1e-9)


POOLED: list[dict[str, Any]] = [
    {},
    {"positions": "rope", "qk_norm": True, "registers": 2},
    {"drop_path": 0.4, "shortcut_decay": 0.5, "norms": "post", "layer_scale": 0.3},
    {"positions": "relative", "registers": 1},
]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("options", POOLED, ids=str)
def test_asked_for_the_class_token_alone_it_gives_the_same_for_less(options: dict[str, Any], together: bool) -> None:
    model = vit(pool="cls", **options).double().train()
    crops = [images(2).double(), images(3, (16, 24), seed=1).double()]
    how = [{"drop": torch.rand(len(x), 2 * DEPTH, generator=torch.Generator().manual_seed(9))} for x in crops]

    def run(pooled_only: bool) -> tuple[list[Tensor], list[Tensor], int]:
        batches = [(x, each | {"pooled_only": pooled_only}) for x, each in zip(crops, how, strict=True)]
        with FlopCounterMode(display=False) as count:
            found = model.forward_crops(batches) if together else [model(x, **each) for x, each in batches]
            pooled = [features.pooled for features in found]
            gradients = torch.autograd.grad(sum(x.sin().sum() for x in pooled), list(model.parameters()))
        return pooled, list(gradients), count.get_total_flops()

    (some, of_some, fewer), (whole, of_whole, more) = run(True), run(False)
    for one, other in zip([*some, *of_some], [*whole, *of_whole], strict=True):
        close(one, other, 1e-10)
    assert fewer < more * (1 - 0.6 / DEPTH)  # of the last block, nine twelfths of the matrix products


def test_where_more_than_the_class_token_is_needed_it_is_there() -> None:
    x = images()
    with torch.no_grad():
        by_cls, by_mean = vit(pool="cls"), vit(pool="mean")
        assert torch.equal(by_mean(x, pooled_only=True).pooled, by_mean(x).pooled)
        assert by_cls(x, pooled_only=True, blocks=(-1,)).blocks[0].shape == (2, PATCHES + 1, DIM)
        assert torch.equal(by_cls(x, pooled_only=True, attention="causal").cls, by_cls(x, attention="causal").cls)


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_block_asked_for_some_tokens_gives_those_of_all(post_norm: bool) -> None:
    block = Block(DIM, 2, post_norm=post_norm, qk_norm=True, layer_scale=0.5, shortcut=0.7).double()
    x, branches = draw(3, 9, DIM).double().requires_grad_(), draw(3, 1, 2, seed=1).double()
    angles = draw(1, 1, 9, DIM // 4, seed=2).double()
    same: dict[str, Any] = {"rope": (angles.cos(), angles.sin()), "branches": branches}
    some, whole = block(x, first=4, **same), block(x, **same)[:, :4]
    close(some, whole, 1e-12)
    g = draw(*whole.shape, seed=3).double()
    wanted = [x, *block.parameters()]
    for one, other in zip(torch.autograd.grad(some, wanted, g), torch.autograd.grad(whole, wanted, g), strict=True):
        close(one, other, 1e-10)


def test_batches_with_masked_attention_together_are_done_one_by_one() -> None:
    model = vit()
    batches: list[tuple[Tensor, dict[str, Any]]] = [(images(2), {"attention": "causal"}), (images(3, (16, 24)), {})]
    for one, (x, how) in zip(model.forward_crops(batches), batches, strict=True):
        assert torch.equal(one.patches, model(x, **how).patches)


@pytest.mark.parametrize("positions", ["rope", "relative"])
def test_it_is_one_graph_for_the_compiler(positions: str) -> None:
    model, x = vit(registers=1, positions=positions, drop_path=0.2).train(), images()
    keep, drop = torch.tensor([[0, 5, 9], [3, 4, 8]]), torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # traces as any backend does, compiles nothing
    found, expected = compiled(x, keep=keep, drop=drop, blocks=(0,)), model(x, keep=keep, drop=drop, blocks=(0,))
    close(found.patches, expected.patches)
    close(found.blocks[0], expected.blocks[0])


@pytest.mark.parametrize("pooled_only", [False, True])
def test_batches_together_are_one_graph_for_the_compiler(pooled_only: bool) -> None:
    model = vit(positions="rope", pool="cls")

    def together(large: Tensor, small: Tensor) -> list[Tensor]:
        asked = {"pooled_only": pooled_only}
        return [features.pooled for features in model.forward_crops([(large, asked), (small, asked)])]

    crops = images(), images(3, (16, 24))
    compiled = torch.compile(together, backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(*crops), together(*crops), strict=True):
        close(one, other)


def test_a_whole_number_does_for_a_layer_scale() -> None:
    made = backbones.build("vit_micro", image_size=(16, 16), in_chans=3, patch_size=8, depth=1, layer_scale=1)
    assert made.blocks[0].ls1.gamma.dtype == torch.float32
