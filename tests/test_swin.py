"""The Swin Transformer V2 against timm's and transformers' with the same weights, and each option against what it is
defined to do."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_bits, command, losses
from export_cases import difference
from oracles import import_timm, import_transformers
from ssl_pretrain.launch import export
from torch import Tensor, nn

from ssl_pretrain import backbones, checkpoint, encoder, optim
from ssl_pretrain.backbones import adapters, forms
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.backbones.swin import Block, Swin, Windows
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.foreign import conversion, libraries, published, to_libraries
from ssl_pretrain.foreign.specs import Spec
from ssl_pretrain.loop import parallel

SIZE = (64, 96)
DEPTHS, HEADS = (2, 1, 3), (1, 2, 4)
SMALL: dict[str, Any] = {"dim": 16, "depths": DEPTHS, "heads": HEADS, "window": 4, "patch_size": 2}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(found: Tensor, expected: Tensor) -> float:
    return difference(found.detach(), expected.detach())


def noised(model: nn.Module) -> Any:
    """In eval mode, with every parameter noise, so that none hides behind a 0 or a 1."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            spread, centre = (1.0, 2.0) if "logit_scale" in name else (0.2, 0.5 if parameter.ndim == 1 else 0.0)
            parameter.copy_(centre + spread * draw(*parameter.shape, seed=i))
    return model.eval()


def swin(size: tuple[int, int] = SIZE, in_chans: int = 3, **options: Any) -> Swin:
    return noised(backbones.build("swin_micro", image_size=size, in_chans=in_chans, **{**SMALL, **options}))


def of_timm(model: Swin, **options: Any) -> Any:
    """timm's model of the same sizes and weights, and our name of each of its parameters."""
    timm = import_timm()
    form = forms.timm_form(model)
    arguments = form.arguments if isinstance(form, forms.Form) else options
    other = timm.models.swin_transformer_v2.SwinTransformerV2(num_classes=0, **{**arguments, **options})
    weights = timm.models.swin_transformer_v2.checkpoint_filter_fn(dict(model.state_dict()), other)
    other.load_state_dict(weights)
    return other.eval()


def timm_name(name: str) -> str:
    """timm merges before a stage, we (as released) after one."""
    parts = name.split(".")
    return ".".join(["layers", str(int(parts[1]) + 1), *parts[2:]]) if parts[2:3] == ["downsample"] else name


def check_gradients(ours: nn.Module, theirs: dict[str, Tensor | None], tolerance: float = 1e-4) -> None:
    largest = max(float(p.grad.abs().max()) for p in ours.parameters() if p.grad is not None)
    for name, parameter in ours.named_parameters():
        expected = theirs[name]
        assert parameter.grad is not None, name
        assert expected is not None, name
        torch.testing.assert_close(parameter.grad, expected, atol=tolerance * largest, rtol=tolerance, msg=name)


# ---- Against other implementations.


@pytest.mark.parametrize(
    ("size", "in_chans", "options"),
    [
        (SIZE, 3, {}),
        ((32, 32), 1, {}),
        ((64, 64), 3, {"window": 8}),
        ((16, 64), 3, {}),
        ((64, 64), 3, {"window": 8, "pretrained_windows": (4, 4, 2)}),
        ((32, 64), 3, {"patch_size": 4, "window": 2}),
    ],
    ids=["wide", "one channel", "window 8", "a map lower than a window", "other windows in training", "patch 4"],
)
def test_outputs_maps_and_gradients_equal_timm(size: tuple[int, int], in_chans: int, options: dict[str, Any]) -> None:
    model = swin(size, in_chans, **options)
    other, x = of_timm(model), draw(2, in_chans, *size)
    found, expected = model(x, maps=True), other(x)
    last, maps = other.forward_intermediates(x, output_fmt="NCHW")
    assert apart(found.patches, last.flatten(1, 2) if last.shape[3] == model.dim else last.flatten(2).mT) < 1e-5
    assert apart(found.pooled, expected) < 1e-5
    assert len(found.maps) == len(maps) == len(DEPTHS)
    for one, theirs, stride, channels in zip(found.maps, maps, model.map_strides, model.map_channels, strict=True):
        assert one.shape == (2, channels, size[0] // stride[0], size[1] // stride[1])
        assert apart(one, theirs) < 1e-5
    g = draw(*found.pooled.shape, seed=7)
    found.pooled.backward(g)
    expected.backward(g)
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    check_gradients(model, {name: gradients[timm_name(name)] for name, _ in model.named_parameters()})


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((64, 64), {}),
        ((72, 88), {}),  # maps of 36 x 44, 18 x 22 and 9 x 11: padded to 20 x 24 and 12 x 12
        ((128, 64), {"window": 7, "pretrained_windows": (4, 4, 4)}),
    ],
    ids=["square", "padded", "padded, other windows"],
)
def test_outputs_maps_and_gradients_equal_transformers(size: tuple[int, int], options: dict[str, Any]) -> None:
    """Also where windows do not divide a map, which timm pads in another place."""
    transformers = import_transformers()
    model = swin(size, **options)
    kind, settings, weights = to_libraries._swin(model, model.state_dict())
    assert kind == "Swinv2Model"
    other = transformers.Swinv2Model(transformers.Swinv2Config(**settings)).eval()
    other.load_state_dict(weights)
    x = draw(2, 3, *size)
    found, expected = model(x, maps=True), other(x)
    assert apart(found.patches, expected.last_hidden_state) < 1e-5
    assert apart(found.pooled, expected.pooler_output) < 1e-5
    levels = transformers.Swinv2Backbone(
        transformers.Swinv2Config(**settings, out_features=["stage1", "stage2", "stage3"])
    ).eval()
    missing = levels.load_state_dict(weights, strict=False)
    assert not missing.missing_keys
    for one, theirs in zip(found.maps, levels(x).feature_maps, strict=True):
        assert apart(one, theirs) < 1e-5
    g = draw(*found.pooled.shape, seed=7)
    found.pooled.backward(g)
    expected.pooler_output.backward(g)
    gradients = {name: p.grad for name, p in other.named_parameters()}
    _, _, ours = to_libraries._swin(model, {name: p.grad for name, p in model.named_parameters()})
    largest = max(float(gradient.abs().max()) for gradient in ours.values())
    assert ours.keys() == gradients.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-4 * largest, rtol=1e-4, msg=name)


def test_a_shifted_block_against_numpy() -> None:
    """One block in float64, position by position, from the papers: which positions see each other, the bias of their
    offset, the clamp of the scale, the norm after the branch."""
    torch.manual_seed(0)
    dim, heads, window, trained, size = 8, 2, 4, 6, (8, 12)
    block = noised(Block(dim, heads)).double()
    with torch.no_grad():
        block.attn.logit_scale[1] = 7.0  # above log 100
    x = draw(1, *size, dim, seed=3).double()
    windows = Windows.of(size, window, trained, True, block.attn.qkv.weight)
    found = block(x, windows)[0].detach().numpy()

    weights = {name: value.detach().numpy() for name, value in block.named_parameters()}
    image = x[0].numpy()
    qkv = image @ weights["attn.qkv.weight"].T
    zeros = np.zeros(dim)
    qkv = qkv + np.concatenate([weights["attn.q_bias"], zeros, weights["attn.v_bias"]])
    q, k, v = (part.reshape(*size, heads, dim // heads) for part in np.split(qkv, 3, axis=-1))
    scale = np.exp(np.minimum(weights["attn.logit_scale"][:, 0, 0], np.log(100)))

    def window_of(*place: int) -> tuple[int, ...]:
        """The window of a position: rolled by 2, so that the first two rows are below the last ones."""
        return tuple((at - 2) % length // window for at, length in zip(place, size, strict=True))

    def offset(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, ...]:
        """In the rolled image."""
        return tuple((a - 2) % length - (b - 2) % length for a, b, length in zip(one, other, size, strict=True))

    def region(*place: int) -> tuple[int, ...]:
        """Positions of one window that are neighbours in the image."""
        return tuple((at + 2) // window for at in place)

    def bias(between: tuple[int, ...]) -> np.ndarray:
        scaled = np.array(between) * 8 / (trained - 1)
        spaced = np.sign(scaled) * np.log2(np.abs(scaled) + 1) / np.log2(8)
        hidden = np.maximum(weights["attn.cpb_mlp.0.weight"] @ spaced + weights["attn.cpb_mlp.0.bias"], 0)
        return 16 / (1 + np.exp(-weights["attn.cpb_mlp.2.weight"] @ hidden))

    places = [(y, x) for y in range(size[0]) for x in range(size[1])]
    out = np.zeros_like(image)
    for y, x_ in places:
        seen = [place for place in places if window_of(*place) == window_of(y, x_)]
        hidden_from = np.array([-100.0 * (region(*place) != region(y, x_)) for place in seen])
        for head in range(heads):
            a = q[y, x_, head] / np.linalg.norm(q[y, x_, head])
            scores = np.array([
                scale[head] * (a @ k[i, j, head]) / np.linalg.norm(k[i, j, head]) + bias(offset((y, x_), (i, j)))[head]
                for i, j in seen
            ])  # fmt: skip
            weight = np.exp(scores + hidden_from - (scores + hidden_from).max())
            columns = slice(head * dim // heads, (head + 1) * dim // heads)
            out[y, x_, columns] = sum(w * v[i, j, head] for w, (i, j) in zip(weight / weight.sum(), seen, strict=True))
    out = out @ weights["attn.proj.weight"].T + weights["attn.proj.bias"]

    def norm(values: np.ndarray, name: str) -> np.ndarray:
        centred = values - values.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    middle = image + norm(out, "norm1")
    mlp = (
        torch.nn.functional.gelu(torch.tensor(middle @ weights["mlp.fc1.weight"].T + weights["mlp.fc1.bias"])).numpy()
        @ weights["mlp.fc2.weight"].T
        + weights["mlp.fc2.bias"]
    )
    np.testing.assert_allclose(found, middle + norm(mlp, "norm2"), rtol=1e-7, atol=1e-7)


# ---- Sizes, where it begins, layers.


@pytest.mark.parametrize(
    ("name", "millions", "dim", "depth", "stride"),
    [
        ("swin_micro", None, 128, 6, 8),
        ("swin_tiny", 28.35, 768, 12, 32),
        ("swin_small", 49.73, 768, 24, 32),
        ("swin_base", 87.92, 1024, 24, 32),
        ("swin_large", 196.74, 1536, 24, 32),
    ],
)
def test_every_size_is_built_as_its_size_says(
    name: str, millions: float | None, dim: int, depth: int, stride: int
) -> None:
    """Parameters as timm's models of these names have with 1000 classes."""
    with torch.device("meta"):
        model = backbones.build(name, image_size=(256, 256))
    assert (model.dim, model.depth, model.stride, model.unit) == (dim, depth, (stride, stride), (stride, stride))
    assert model.token_dim == model.map_channels[0]
    if millions is not None:
        count = sum(p.numel() for p in model.parameters()) + 1000 * (dim + 1)
        assert count / 1e6 == pytest.approx(millions, abs=0.006)


def test_weights_begin_as_released() -> None:
    torch.manual_seed(0)
    model = backbones.build("swin_micro", image_size=SIZE)
    for name, parameter in model.named_parameters():
        if "logit_scale" in name:
            assert torch.allclose(parameter.exp(), torch.tensor(10.0)), name
        elif name.startswith("patch_embed.proj"):
            assert parameter.any(), name  # torch's initialisation
        elif parameter.ndim == 1:
            is_one = name.endswith("norm.weight")
            assert (parameter == float(is_one)).all(), name  # the norms of blocks, norm1 and norm2, begin at 0
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
    x = draw(2, 8, 12, 32)
    windows = Windows.of((8, 12), 4, 4, True, model.norm.weight)
    assert torch.equal(model.layers[0].blocks[1](x, windows), x)  # so a block begins as the identity
    assert all(part.eps == 1e-5 for part in model.modules() if isinstance(part, nn.LayerNorm))


def test_every_parameter_has_a_layer() -> None:
    model = swin()
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert set(layers.values()) == set(range(sum(DEPTHS) + 2))
    assert list(layers.values()) == sorted(layers.values())  # in the order of the forward
    assert layers["layers.0.downsample.norm.weight"] == layers["layers.0.blocks.1.norm2.bias"] == 2
    assert layers["layers.1.blocks.0.attn.q_bias"] == 3
    with pytest.raises(KeyError):
        model.layer_of("head.weight")


def test_weight_decay_leaves_out_scales_and_the_mlp_of_biases() -> None:
    model = swin()
    for rule, expected in (("no_1d", False), ("all", True)):
        groups = optim.parameter_groups(model, model, rule=rule)
        decayed = {name for group in groups if group["decays"] for name in group["names"]}
        assert ("layers.0.blocks.0.attn.logit_scale" in decayed) == expected
        assert ("layers.0.blocks.0.attn.cpb_mlp.0.weight" in decayed) == expected
        assert {"layers.0.blocks.0.attn.qkv.weight", "layers.0.downsample.reduction.weight"} <= decayed


# ---- Windows, masks, drop path, compilation.


def test_the_bias_of_an_offset_stays_at_other_windows_and_image_sizes() -> None:
    """The export says with which windows it was trained, and every later encoder counts offsets by these."""
    model = swin((64, 64))
    assert model.describe()["pretrained_windows"] == (4, 4, 4)
    attn = model.layers[0].blocks[0].attn

    def biases(window: int, trained: int) -> Tensor:
        scores = attn.scores(Windows.of((16, 16), window, trained, False, attn.qkv.weight))[0].detach()
        return scores.unflatten(1, (window, window)).unflatten(3, (window, window))

    small, large = biases(4, 4), biases(8, 4)
    torch.testing.assert_close(large[:, :4, :4, :4, :4], small)
    torch.testing.assert_close(large[:, 4:, 2:6, 4:, 2:6], small)
    assert not torch.allclose(biases(8, 8)[:, :4, :4, :4, :4], small)
    last = swin((32, 32), window=8)  # maps of 16, 8 and 4: the last one is smaller than a window
    assert last.pretrained_windows == (8, 8, 4)
    again = backbones.build("swin_micro", image_size=(96, 96), **last.describe())
    assert again.pretrained_windows == (8, 8, 4)


def test_images_of_another_size_are_encoded_as_an_encoder_for_that_size_does() -> None:
    model, x = swin((64, 64)), draw(2, 3, 48, 80)
    other = backbones.build("swin_micro", image_size=(48, 80), **model.describe()).eval()
    other.load_state_dict(model.adapt(model.state_dict(), model.image_size))
    assert torch.equal(model(x).patches, other(x).patches)
    assert model(x).grid == (6, 10)


def test_a_masked_unit_hides_its_pixels_and_no_others() -> None:
    model, x = swin((64, 64)), draw(2, 3, 64, 64)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[0, 9] = mask[1, 63] = True  # row 1, column 1; the last corner
    token = draw(16, seed=3)
    pixels = mask.unflatten(1, (8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    with torch.no_grad():
        found = model(x, replace=(mask, token), maps=True)
        assert torch.equal(model(torch.where(pixels, x + 5, x), replace=(mask, token)).patches, found.patches)
        near = x.clone()
        near[0, :, 7, 8] += 5  # a pixel above the masked unit
        assert not torch.equal(model(near, replace=(mask, token)).patches, found.patches)
    # Against timm: its embeddings after their norm, with the token put in place by hand.
    other = of_timm(model)
    with torch.no_grad():
        y = torch.where(pixels[:, 0, ::2, ::2, None], token, other.patch_embed(x))
        assert apart(found.patches, other.norm(other.layers(y)).flatten(1, 2)) < 1e-5


def test_drop_path_drops_each_samples_branches_at_the_rates_of_their_depth() -> None:
    """A dropped branch is one whose norm is 0; a kept one has its norm over the probability to be kept."""
    model, x = swin(drop_path=0.5).train(), draw(3, 3, *SIZE)
    rates = [0.1 * i for i in range(6) for _ in range(2)]
    drop = torch.rand(3, 12, generator=torch.Generator().manual_seed(5))
    drop[0, 7], drop[0, 10], drop[1, 11] = 0.29, 0.51, 0.49
    found = model(x, drop=drop)
    dropped = 0
    for sample in range(3):
        plain = swin()
        norms = [norm for stage in plain.layers for block in stage.blocks for norm in (block.norm1, block.norm2)]
        with torch.no_grad():
            for i, (norm, rate) in enumerate(zip(norms, rates, strict=True)):
                kept = drop[sample, i].item() >= rate
                dropped += not kept
                norm.weight.mul_(kept / (1 - rate))
                norm.bias.mul_(kept / (1 - rate))
            torch.testing.assert_close(found.pooled[sample], plain(x[sample : sample + 1]).pooled[0])
    assert dropped >= 3
    with pytest.raises(RuntimeError, match=r"pass drop=step.rand\(12\)"):
        model(x)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "depths",
    [(2, 2), pytest.param((2, 2, 6, 2), marks=pytest.mark.slow)],
    ids=["two stages", "four stages"],
)
def test_no_block_is_compiled_again(depths: tuple[int, ...]) -> None:
    """Each stage has a graph for each of its two kinds of blocks. Four stages fit into the compiler's limit of graphs."""
    torch._dynamo.reset()
    heads = tuple(2**i for i in range(len(depths)))
    model = swin((64, 64), depths=depths, heads=heads, drop_path=0.1).train()
    for block in parallel.blocks(model):
        block.compile(backend="aot_eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for number in range(3):
            torch.compiler.set_stance("fail_on_recompile" if number else "default")
            try:
                noise = torch.rand(2, 2 * sum(depths), generator=torch.Generator().manual_seed(number))
                model(draw(2, 3, 64, 64, seed=number), drop=noise).pooled.sum().backward()
            finally:
                torch.compiler.set_stance("default")


def test_autocast_to_bfloat16_stays_near_float32() -> None:
    model, x = swin(drop_path=0.1).train(), draw(4, 3, *SIZE)
    drop = torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
    expected = model(x, drop=drop)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x, drop=drop)
    assert found.pooled.dtype == found.patches.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found.pooled, expected.pooled).min() > 0.99


def test_low_rank_updates_are_of_its_attention_and_merge() -> None:
    model = swin((32, 32))
    names = adapters.attention_matrices(model)
    assert len(names) == 2 * sum(DEPTHS)  # queries, keys and values; and the projection
    plain = swin((32, 32))
    adapters.add(model, names, 2, 4.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                parameter.copy_(0.1 * draw(*parameter.shape))
    x = draw(2, 3, 32, 32)
    assert apart(model(x).patches, plain(x).patches) > 0.01
    adapters.merge_into(plain, model)
    assert apart(model(x).patches, plain(x).patches) < 1e-5


# ---- Mistakes.


@pytest.mark.parametrize(
    ("option", "ask"),
    [
        ("keep", lambda m, x: m(x, keep=torch.zeros(2, 1, dtype=torch.long))),
        ("attention", lambda m, x: m(x, attention="causal")),
        ("blocks", lambda m, x: m(x, blocks=(-1,))),
    ],
)
def test_what_it_cannot_do_is_refused(option: str, ask: Callable[[Swin, Tensor], Any]) -> None:
    with pytest.raises(UnsupportedByBackbone, match=rf"called with '{option}', which Swin does not support"):
        ask(swin(), draw(2, 3, *SIZE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (2, 0, 2)}, "--depths is 2 0 2; each must be above 0"),
        ({"heads": (1, 2)}, "--heads has 2 numbers, and --depths says 3 stages"),
        ({"heads": (3, 2, 4)}, "3 must divide the width of stage 1, 16"),
        ({"window": 1}, "--window is 1; it must be at least 2"),
        ({"pretrained_windows": (4, 4)}, "--pretrained-windows has 2 numbers"),
        ({"pretrained_windows": (4, 4, 1)}, "--pretrained-windows is 4 4 1; each must be at least 2"),
        ({"patch_size": 0}, "--patch-size is 0; it must be above 0"),
        ({"drop_path": 1.0}, "--drop-path is 1.0; it must be at least 0 and below 1"),
        ({"in_chans": 0}, "--in-chans is 0"),
        ({"image_size": (60, 96)}, "images of 60 x 96 pixels .* stride, 8 pixels: use --image-size 64 96 or a small"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        backbones.build("swin_micro", **{"image_size": SIZE, **SMALL, **options})


def test_images_that_do_not_fit_are_named() -> None:
    with pytest.raises(UserError, match="images of 3 channels, not 1"):
        swin()(draw(2, 1, *SIZE))
    with pytest.raises(UserError, match="images of 64 x 60 pixels"):
        swin()(draw(2, 3, 64, 60))


# ---- Runs.


@pytest.mark.slow
def test_a_run_is_the_same_on_two_processes_and_after_a_kill(photos: Path, tmp_path: Path, pretrain: Callable) -> None:
    """SimMIM with drop path and the normalised target."""
    same: tuple[object, ...] = (
        *("--method", "simmim", "--encoder", "swin_micro", "--dim", 16, "--depths", 1, 2, "--heads", 1, 2),
        *("--image-size", 32, "--drop-path", 0.2, "--norm-target", 5, "--batch-size", 8, "--workers", 0, "--no-score"),
        *("--steps", 16, "--log-every", 1, "--checkpoint-every", 4, "--data", photos),
    )
    pretrain(*same, "--out", tmp_path / "one")
    pretrain(*same, "--out", tmp_path / "two", "--nproc", 2)
    assert len(losses(tmp_path / "one")) == 16
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    killed = tmp_path / "killed"
    process = subprocess.Popen(command("pretrain", *same, "--out", killed), stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((killed / "checkpoints").glob("step-*")):
        time.sleep(0.005)
    process.kill()
    process.wait()
    pretrain(*same, "--out", killed)
    assert_same_bits(checkpoint.load(killed / "checkpoints", 16), checkpoint.load(tmp_path / "one" / "checkpoints", 16))


# ---- Exports and files of others.


def exported(model: Swin) -> Encoder:
    how = Preprocessing.for_size(model.image_size, (0.5,) * model.in_chans, (0.2,) * model.in_chans)
    return Encoder(model, "swin_micro", how, {"method": "simmim"}).eval()


def test_an_export_opens_in_timm_and_transformers(tmp_path: Path) -> None:
    timm = import_timm()
    import_transformers()
    written = exported(swin((64, 64)))
    encoder.save(tmp_path, written)
    x = draw(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder.load(tmp_path)(x).patches, written(x).patches)
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert apart(model(x), written(x).pooled) < 1e-5
    kind, differences = to_libraries.to_transformers(written, tmp_path / "theirs")
    assert kind == "Swinv2Model"
    assert max(differences.values()) < 1e-5
    assert "ssl-export to transformers" in (tmp_path / "README.md").read_text()
    assert max(to_libraries.to_timm(written, tmp_path / "timm").values()) < 1e-5


def test_what_timm_and_transformers_lack_is_named() -> None:
    padded, low = swin((72, 72)), swin((16, 64))
    assert "a map of 18 positions does not divide into windows of 4" in str(forms.timm_form(padded))
    assert "one side of a window for both axes" in str(to_libraries._swin(low, low.state_dict()))


def official(model: Swin, window: int, trained: int, across: int) -> dict[str, Any]:
    """A checkpoint of SimMIM's pretraining as the authors save it."""
    weights = dict(model.state_dict())
    for stage, depth in enumerate(DEPTHS):
        axis = torch.arange(1 - window, window).float() * 8 / (trained - 1)
        spaced = axis.sign() * torch.log2(axis.abs() + 1) / np.log2(8)
        table = torch.stack(torch.meshgrid(spaced, spaced, indexing="ij"), -1)[None]
        for block in range(depth):
            place = f"layers.{stage}.blocks.{block}."
            weights[f"{place}attn.relative_coords_table"] = table
            weights[f"{place}attn.relative_position_index"] = torch.zeros(window**2, window**2, dtype=torch.long)
            if block % 2:
                weights[f"{place}attn_mask"] = torch.zeros((across // 2**stage) ** 2, window**2, window**2)
    weights = {name.replace("cpb_mlp", "rpe_mlp"): value for name, value in weights.items()}
    weights["mask_token"] = torch.zeros(1, 1, 16)
    beside = {"decoder.0.weight": torch.zeros(192, 64, 1, 1), "decoder.0.bias": torch.zeros(192)}
    return {"model": {f"encoder.{name}": value for name, value in weights.items()} | beside, "epoch": 7}


def test_the_authors_files_are_read_with_their_windows(tmp_path: Path) -> None:
    model = swin((64, 64), pretrained_windows=(3, 3, 3))
    file = tmp_path / "simmim.pth"
    torch.save(official(model, 4, 3, across=8), file)
    read = libraries.load(f"torch:{file}")
    assert read.backbone.describe() == model.describe() | {"drop_path": 0.0}
    assert read.backbone.image_size == (64, 64)
    x = draw(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(read(x).patches, model(x).patches)
    assert read.lineage["method"] == "swin"
    assert "mask_token" in read.lineage["left_out"]
    other = libraries.load(f"torch:{file},image-size=96")
    assert other.backbone.image_size == (96, 96)
    assert other.backbone.pretrained_windows == (3, 3, 3)


def test_a_file_without_its_windows_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = swin((64, 64))
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"does not show the side of its windows: .*timm:NAME,checkpoint="):
        published.read(tmp_path / "x.pth")


def test_a_model_of_timm_is_converted(tmp_path: Path) -> None:
    timm = import_timm()
    name = "swinv2_tiny_window8_256"
    torch.manual_seed(0)
    other = noised(timm.create_model(name, pretrained=False))
    file = tmp_path / "model.pth"
    torch.save(other.state_dict(), file)
    ours = conversion.convert(Spec("timm", name, {"checkpoint": str(file)}), (128, 128))
    assert (ours.name, ours.backbone.image_size) == ("swin_tiny", (128, 128))
    assert ours.backbone.pretrained_windows == (8, 8, 8, 8)


def test_a_folder_of_transformers_is_converted(tmp_path: Path) -> None:
    model = swin((64, 64))
    to_libraries.to_transformers(exported(model), tmp_path / "hf")
    stated = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert stated["pretrained_window_sizes"] == [4, 4, 4]
    ours = conversion.convert(Spec("hf", str(tmp_path / "hf"), {}))
    assert ours.backbone.describe() == model.describe()
    x = draw(2, 3, 64, 64)
    theirs = libraries.load(f"hf:{tmp_path / 'hf'}")  # the library's own model
    assert theirs.backbone.stride == (8, 8)
    with torch.no_grad():
        assert torch.equal(ours.backbone(x).patches, model(x).patches)
        assert apart(theirs(x).patches, model(x).patches) < 1e-5


def test_an_export_is_resized_with_its_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By the command of docs/exports.md."""
    written = exported(swin((64, 64)))
    encoder.save(tmp_path / "runs" / "simmim" / "encoder", written)
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"^    ssl-export (resize .*)$", (ROOT / "docs" / "exports.md").read_text(), re.M)
    words = line.split()
    assert export.main(words) == 0
    assert "128 x 128 pixels, windows of 8 x 8 positions" in capsys.readouterr().out
    read = encoder.load(words[-1])
    assert (read.preprocessing.resize, read.preprocessing.crop) == (128, (128, 128))
    assert read.lineage["resized_from"] == [64, 64]
    assert read.backbone.describe() == written.backbone.describe() | {"window": 8, "pretrained_windows": (4, 4, 4)}
    x = draw(1, 3, 128, 128)
    other = of_timm(read.backbone)
    with torch.no_grad():
        assert apart(read(x).pooled, other(x)) < 1e-5
    assert export.main(words) == 2  # there is an export


def test_weights_start_an_encoder_with_other_windows_only_where_these_are_said(tmp_path: Path) -> None:
    encoder.save(tmp_path, exported(swin((64, 64))))
    said = backbones.build(
        "swin_micro", image_size=(128, 128), **{**SMALL, "window": 8, "pretrained_windows": (4, 4, 4)}
    )
    encoder.load_weights(tmp_path, said)
    assert torch.equal(said.norm.weight, encoder.load(tmp_path).backbone.norm.weight)
    silent = backbones.build("swin_micro", image_size=(128, 128), **{**SMALL, "window": 8})
    with pytest.raises(UserError, match=r"--pretrained-windows \(8, 8, 8\) instead of \(4, 4, 4\)"):
        encoder.load_weights(tmp_path, silent)
