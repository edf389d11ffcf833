"""MAE against float64 NumPy written from the paper, and against transformers' implementation with the same weights."""

import math

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_zero_
from numpy_oracles import numpy_patches
from ssl_pretrain.methods.mae import MAE
from torch import nn

from ssl_pretrain import backbones
from ssl_pretrain.conformance import one_step
from ssl_pretrain.errors import UserError
from ssl_pretrain.optim import parameter_groups
from ssl_pretrain.parts.masks import put, random_masking, rows
from ssl_pretrain.parts.patches import moments, normalise, patchify, unpatchify
from ssl_pretrain.pretext import Batch, Step

KERNELS = 134  # of a step: python tests/kernels.py mae
DEVICE_KERNELS = 149  # with the optimiser, on an accelerator: python tests/device.py mae


def build(size: tuple[int, int] = (32, 48), **knobs: object) -> MAE:
    torch.manual_seed(0)
    options = {**backbones.defaults("vit_micro"), "patch_size": 8, "depth": 2, **MAE.recipe.encoder}
    encoder = backbones.build("vit_micro", image_size=size, **options)
    small = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4, **knobs}
    return MAE(encoder, MAE.Config(**small)).double()


def step(batch: int = 4, noise: int = 1) -> Step:
    where = {"rows": slice(0, batch), "batch_size": batch, "device": torch.device("cpu")}
    return Step(step=0, total=10, noise=noise, **where)


def images(batch: int = 4, size: tuple[int, int] = (32, 48), seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_patchify_and_its_inverse() -> None:
    x = images(2)
    found = patchify(x, (8, 8))
    np.testing.assert_array_equal(found.numpy(), numpy_patches(x.numpy(), 8))
    assert torch.equal(unpatchify(found, (8, 8), (4, 6)), x)
    one_channel = torch.randn(2, 1, 12, 8)
    assert torch.equal(unpatchify(patchify(one_channel, (4, 2)), (4, 2), (3, 4)), one_channel)


def test_normalised_target_uses_the_unbiased_variance() -> None:
    patches = patchify(images(2), (8, 8)).float()
    found, (mean, deviation) = normalise(patches), moments(patches)
    x = patches.double().numpy()
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose((found * deviation + mean).numpy(), x, rtol=1e-4, atol=1e-5)
    flat = torch.full((1, 1, 192), 0.3)
    assert torch.allclose(normalise(flat)[0], torch.zeros(1), atol=1e-4)  # no variance: no NaN


def test_masking_keeps_exactly_so_many_and_every_patch_equally_often() -> None:
    patches, kept, draws = 16, 4, 4000
    noise = torch.rand(draws, patches, generator=torch.Generator().manual_seed(0))
    keep, masked = random_masking(noise, kept)
    assert keep.shape == (draws, kept)
    assert masked.shape == (draws, patches - kept)
    both = torch.cat([keep, masked], 1).sort(1).values
    assert torch.equal(both, torch.arange(patches).expand(draws, -1))
    counts = np.bincount(keep.flatten().numpy(), minlength=patches)
    expected = draws * kept / patches
    chi_square = ((counts - expected) ** 2 / (expected * (1 - kept / patches))).sum()
    assert chi_square < 37.7  # 99.9 % of chi-square with 15 degrees of freedom
    together = np.zeros((patches, patches))
    for row in keep.numpy():
        together[np.ix_(row, row)] += 1
    pairs = together[np.triu_indices(patches, 1)]
    assert abs(pairs.mean() - draws * kept * (kept - 1) / (patches * (patches - 1))) < 1e-9
    assert pairs.std() < 3 * math.sqrt(pairs.mean())  # no two patches hang together


def test_the_released_count_is_rounded_down() -> None:
    assert [build().kept(n) for n in (196, 64, 7)] == [49, 16, 1]


def test_rows_and_put() -> None:
    x, index = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 3]])
    assert torch.equal(rows(x, index), torch.stack([x[0, [4, 0]], x[1, [1, 3]]]))
    assert torch.equal(rows(put(x, index, torch.ones(2, 2, 3)), index), torch.ones(2, 2, 3))
    assert torch.equal(put(x, index, rows(x, index)), x)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_and_gradient_against_numpy(norm_pix: bool) -> None:
    method = build(norm_pix=norm_pix)
    x = images()
    found = method(Batch(views={"image": x}, index=torch.arange(4)), step())
    found.total.backward()

    with torch.no_grad():
        predicted, masked, _, _ = method.reconstruct(x, step())
    target = numpy_patches(x.numpy(), 8)
    if norm_pix:
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    # The paper's form: a mask over all patches, 1 where removed.
    mask, full = np.zeros(target.shape[:2]), np.zeros_like(target)
    for i in range(4):
        mask[i, masked[i].numpy()] = 1
        full[i, masked[i].numpy()] = predicted[i].numpy()
    squares = ((full - target) ** 2).mean(-1)
    assert float(found.total.detach()) == pytest.approx((squares * mask).sum() / mask.sum(), rel=1e-5)
    per_sample = (squares * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(found.per_sample.numpy(), per_sample, rtol=1e-5)
    gradient = 2 * (full - target) * mask[..., None] / (mask.sum() * target.shape[-1])
    np.testing.assert_allclose(method.decoder_pred.bias.grad.numpy(), gradient.sum((0, 1)), rtol=1e-4, atol=1e-7)


def test_the_loss_asks_nothing_of_visible_patches() -> None:
    method = build()
    nn.init.zeros_(method.decoder_pred.weight)  # a constant painting: only the target is left to depend on the image
    nn.init.normal_(method.decoder_pred.bias, std=0.5)
    x = images()
    _, masked, keep, _ = method.reconstruct(x, step())

    def loss(changed: torch.Tensor) -> float:
        patches = patchify(x, (8, 8))
        patches = put(patches, changed, torch.randn(4, changed.shape[1], 192, dtype=torch.float64))
        image = unpatchify(patches, (8, 8), (4, 6))
        return float(method(Batch(views={"image": image}, index=torch.arange(4)), step()).total.detach())

    still = float(method(Batch(views={"image": x}, index=torch.arange(4)), step()).total.detach())
    assert loss(keep) == still
    assert loss(masked[:, :1]) != still


def test_the_encoder_sees_only_the_kept_patches() -> None:
    method = build(norm_pix=False)
    x = images()
    before, masked, _, _ = method.reconstruct(x, step())
    patches = put(patchify(x, (8, 8)), masked, torch.randn(4, masked.shape[1], 192, dtype=torch.float64))
    after, _, _, _ = method.reconstruct(unpatchify(patches, (8, 8), (4, 6)), step())
    assert torch.equal(before, after)


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    encoder = backbones.build(
        "vit_small", image_size=(64, 64), **{**backbones.defaults("vit_small"), "depth": 1, **MAE.recipe.encoder}
    )
    method = MAE(encoder, MAE.Config(decoder_depth=1))
    method.requires_grad_(False)
    for module in method.modules():
        if isinstance(module, nn.Linear):
            fan_out, fan_in = module.weight.shape
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert float(module.weight.abs().max()) <= bound
            assert float(module.weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert module.bias is None or not module.bias.any()
    patch = encoder.patch_embed.proj.weight
    bound = math.sqrt(6 / (384 + 3 * 16 * 16))
    assert 0.95 * bound < float(patch.abs().max()) <= bound
    assert float(method.mask_token.std()) == pytest.approx(0.02, rel=0.15)
    assert float(encoder.cls_token.std()) == pytest.approx(0.02, rel=0.15)


def test_parameter_groups_are_the_released_ones() -> None:
    method = build()
    groups = parameter_groups(method, method.encoder, rule=MAE.recipe.decay)
    decays = {name: g["decays"] for g in groups for name in g["names"]}
    assert decays["mask_token"]
    assert decays["encoder.cls_token"]
    assert not decays["decoder_norm.weight"]
    assert not decays["decoder_pred.bias"]
    assert "encoder.pos_embed" not in decays  # fixed sine-cosine positions are not trained
    assert "decoder_pos_embed" not in decays


def test_collapsed_state_has_the_stated_loss() -> None:
    """The mean colour is zero where the target is normalised; in plain pixels the loss depends on the images."""
    method = one_step.build("mae", norm_pix=True)
    make_zero_(method.decoder_pred)
    check_stated(method, {"loss": losses_of(method)})
    assert one_step.build("mae", norm_pix=False).collapsed(one_step.BATCH) == {}


def test_pictures_keep_what_was_visible() -> None:
    method = build()
    x = images()
    shown = method.pictures(Batch(views={"image": x}, index=torch.arange(4)), step())
    assert list(shown) == ["input", "masked", "reconstruction"]
    _, masked, keep, _ = method.reconstruct(x, step())
    for name in ("masked", "reconstruction"):
        assert torch.allclose(
            rows(patchify(shown[name].double(), (8, 8)), keep), rows(patchify(x, (8, 8)), keep), atol=1e-6
        )
    assert not rows(patchify(shown["masked"], (8, 8)), masked).any()


def test_other_image_sizes_than_the_configured_one() -> None:
    method = build().float()
    x = images(2, (48, 32)).float()
    found = method(Batch(views={"image": x}, index=torch.arange(2)), step(2))
    assert torch.isfinite(found.total)


@pytest.mark.parametrize(
    "knobs",
    [{"mask_ratio": 0.0}, {"mask_ratio": 0.99}, {"decoder_dim": 30}, {"decoder_heads": 5}, {"decoder_depth": 0},
     {"decoder_heads": 0}, {"decoder_dim": 0}],
)  # fmt: skip
def test_knobs_that_cannot_be(knobs: dict) -> None:
    with pytest.raises(UserError, match="--"):
        build(**knobs)


def test_equal_to_transformers_with_the_same_weights_and_noise() -> None:
    from oracles import import_transformers

    transformers = import_transformers()
    method = build(size=(32, 32)).float()
    config = transformers.ViTMAEConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, image_size=32, patch_size=8,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=128,
        layer_norm_eps=1e-6, norm_pix_loss=True, mask_ratio=0.75, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config)
    state = theirs.state_dict()
    ours = dict(method.named_parameters())

    def block(prefix: str, own: str) -> dict[str, torch.Tensor]:
        query, key, value = ours[f"{own}.attn.qkv.weight"].chunk(3)
        query_bias, key_bias, value_bias = ours[f"{own}.attn.qkv.bias"].chunk(3)
        return {
            f"{prefix}.attention.q_proj.weight": query, f"{prefix}.attention.q_proj.bias": query_bias,
            f"{prefix}.attention.k_proj.weight": key, f"{prefix}.attention.k_proj.bias": key_bias,
            f"{prefix}.attention.v_proj.weight": value, f"{prefix}.attention.v_proj.bias": value_bias,
            f"{prefix}.attention.o_proj.weight": ours[f"{own}.attn.proj.weight"],
            f"{prefix}.attention.o_proj.bias": ours[f"{own}.attn.proj.bias"],
            **{f"{prefix}.layernorm_before.{w}": ours[f"{own}.norm1.{w}"] for w in ("weight", "bias")},
            **{f"{prefix}.layernorm_after.{w}": ours[f"{own}.norm2.{w}"] for w in ("weight", "bias")},
            **{f"{prefix}.mlp.fc1.{w}": ours[f"{own}.mlp.fc1.{w}"] for w in ("weight", "bias")},
            **{f"{prefix}.mlp.fc2.{w}": ours[f"{own}.mlp.fc2.{w}"] for w in ("weight", "bias")},
        }  # fmt: skip

    mapped = {
        "vit.embeddings.cls_token": ours["encoder.cls_token"],
        "vit.embeddings.patch_embeddings.projection.weight": ours["encoder.patch_embed.proj.weight"],
        "vit.embeddings.patch_embeddings.projection.bias": ours["encoder.patch_embed.proj.bias"],
        "decoder.mask_token": ours["mask_token"],
        # Their constructor leaves the tables empty; the tables have a test of their own.
        "vit.embeddings.position_embeddings": method.encoder.pos_embed,
        "decoder.decoder_pos_embed": nn.functional.pad(method.decoder_pos_embed, (0, 0, 1, 0)),
    }
    layers = sorted({name.split(".layernorm_before")[0] for name in state if "layernorm_before" in name})
    for prefix in layers:
        number = prefix.split(".")[-1]
        mapped.update(block(prefix, f"decoder_blocks.{number}" if "decoder" in prefix else f"encoder.blocks.{number}"))
    for w in ("weight", "bias"):
        mapped[f"vit.layernorm.{w}"] = ours[f"encoder.norm.{w}"]
        mapped[f"decoder.decoder_embed.{w}"] = ours[f"decoder_embed.{w}"]
        mapped[f"decoder.decoder_norm.{w}"] = ours[f"decoder_norm.{w}"]
        mapped[f"decoder.decoder_pred.{w}"] = ours[f"decoder_pred.{w}"]
    assert set(state) == set(mapped)
    theirs.load_state_dict(mapped)

    x, noise = images(4, (32, 32)).float(), step().rand(16)
    # Their pixels of a patch are in the same order as the released code's: row, column, channel.
    expected = theirs(pixel_values=x, noise=noise)
    found = method(Batch(views={"image": x}, index=torch.arange(4)), step())
    torch.testing.assert_close(found.total, expected.loss, rtol=1e-5, atol=1e-6)
    expected.loss.backward()
    found.total.backward()
    theirs_gradients = dict(theirs.named_parameters())
    for name in ("decoder.mask_token", "vit.embeddings.patch_embeddings.projection.weight", "vit.embeddings.cls_token"):
        torch.testing.assert_close(mapped[name].grad, theirs_gradients[name].grad, rtol=1e-3, atol=1e-6)
