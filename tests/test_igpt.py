"""iGPT: loss and gradient against NumPy in float64, causality, orders, the palette, features of a middle block, runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from method_helpers import check_stated
from scale_oracles import convs_of, numpy_area, numpy_levels
from ssl_pretrain.methods.igpt import IGPT
from torch import nn

from ssl_pretrain import backbones, encoder, tokenizer
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.backbones.quantizer import Quantizer
from ssl_pretrain.backbones.scale_stem import reading
from ssl_pretrain.backbones.scales import Levels
from ssl_pretrain.backbones.token_stem import Palette, shuffled
from ssl_pretrain.conformance import one_step
from ssl_pretrain.data.views import Sight
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.frozen import Frozen
from ssl_pretrain.pretext import Losses

KERNELS = 210  # of a step: python tests/kernels.py igpt
DEVICE_KERNELS = 224  # with the optimiser, on an accelerator: python tests/device.py igpt
ON_THE_HOST = ["_local_scalar_dense"]
SMALL = [
    *["--encoder", "vit_micro", "--depth", "2", "--dim", "64", "--heads", "2", "--image-size", "32", "--no-score"],
    *["--workers", "0", "--batch-size", "32", "--lr", "2e-3", "--log-every", "5", "--patch-size", "4"],
]
CHOICES = [{}, {"order": "random"}, {"ids": "tokenizer"}, {"ids": "tokenizer", "order": "random"}]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_loss_terms_and_gradient_against_numpy(choice: dict):
    method = one_step.build("igpt", **choice).eval()
    batch = one_step.batch(method)
    losses = method(batch, one_step.step())
    losses.total.backward()
    maps = method.maps(batch.views["image"])
    order = shuffled(16).numpy() if "order" in choice else np.arange(16)
    t = maps.flatten(1).numpy()[:, order]
    keep = torch.from_numpy(order).expand(len(t), -1)
    with torch.no_grad():  # the class token and all ids but the last one, in their order
        seen = method.encoder(maps[:, None], keep=keep, attention="causal")
    x = np.concatenate([seen.cls[:, None].double().numpy(), seen.patches[:, :-1].double().numpy()], 1)
    w = method.head.weight.detach().double().numpy()
    logits = x @ w.T
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -np.take_along_axis(logp, t[..., None], -1)[..., 0]
    assert float(losses.total.detach()) == pytest.approx(each.mean(), rel=1e-5)
    assert float(losses.terms["bits"]) == pytest.approx(each.mean() / np.log(2), rel=1e-5)
    np.testing.assert_allclose(losses.per_sample, each.mean(1), rtol=1e-4)
    wrong = np.exp(logp) - np.eye(len(w))[t]
    np.testing.assert_allclose(method.head.weight.grad, np.einsum("bnk,bnd->kd", wrong, x) / t.size, atol=1e-5)
    share = np.bincount(t.ravel(), minlength=len(w)) / t.size
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert float(losses.terms["accuracy"]) == pytest.approx((logp.argmax(-1) == t).mean())
    assert float(losses.terms["majority"]) == pytest.approx(share.max())
    assert float(losses.terms["gain"]) == pytest.approx(max(0, 1 - each.mean() / entropy), abs=1e-5)


@pytest.mark.parametrize("order", ["raster", "random"])
def test_an_id_changes_only_the_predictions_of_later_ones(order: str):
    method = one_step.build("igpt", order=order).eval()
    maps = torch.randint(0, 16, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    places = shuffled(16) if order == "random" else torch.arange(16)
    if order == "random":
        assert not torch.equal(places, torch.arange(16))
        assert torch.equal(places.sort().values, torch.arange(16))
    for position in (0, 6, 15):
        other = maps.flatten(1).clone()
        other[:, places[position]] = (other[:, places[position]] + 5) % 16
        with torch.no_grad():
            before = method.predict(maps, one_step.step())[1]
            after = method.predict(other.view(2, 4, 4), one_step.step())[1]
        changed = (before - after).abs().amax((0, 2)) > 1e-6
        assert changed.nonzero().flatten().tolist() == list(range(position + 1, 16))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_features_are_those_of_the_middle_block_and_recorded(choice: dict, tmp_path: Path):
    method = one_step.build("igpt", feature_depth=0.5, **choice).eval()
    exported = method.exported().eval()
    assert exported.depth == 1
    assert exported.describe()["feature_block"] == 1
    assert exported.describe()["options"]["depth"] == 2
    images = torch.randn(2, 3, *exported.image_size)
    order = shuffled(16) if "order" in choice else torch.arange(16)
    with torch.no_grad():
        whole = method.encoder
        keep = order.expand(2, -1)
        seen = whole(method.maps(images)[:, None], keep=keep, attention="causal", blocks=(0,), attention_of=(0,))
        expected = whole.blocks[1].norm1(seen.blocks[0][:, 1:])
        found = exported(images, blocks=(-1,), attention_of=(-1,))
    torch.testing.assert_close(found.patches[:, order], expected)
    in_places = found.attention[0][:, :, 1:, 1:][:, :, order][..., order]
    torch.testing.assert_close(in_places, seen.attention[0][:, :, 1:, 1:])
    torch.testing.assert_close(found.pooled, expected.mean(1))
    torch.testing.assert_close(exported.norm(found.blocks[0])[:, 1:], found.patches)
    how = Preprocessing.for_size(exported.image_size, (0.5,) * 3, (0.25,) * 3)
    encoder.save(tmp_path, Encoder(exported, exported.name, how, {}))
    with torch.no_grad():
        assert torch.equal(encoder.load(tmp_path)(images).patches, found.patches)
    last = one_step.build("igpt", feature_depth=1.0, **choice).eval().exported()
    assert last.depth == 2
    assert torch.equal(last.norm.weight, one_step.build("igpt", **choice).encoder.norm.weight)


def test_the_palette_is_k_means_of_the_first_batch():
    method = one_step.build("igpt", colours=16)
    batch, step = one_step.batch(method), one_step.step()
    before = method.tokenizer.colours.clone()
    step.carried = method(batch, step).carry
    # The mean colours of patches of 8 x 8 pixels, by hand
    images = batch.views["image"].double().numpy().reshape(16, 3, 4, 8, 4, 8).mean((3, 5)).transpose(0, 2, 3, 1)
    given = step.carried["colours"].flatten(0, 1).double().numpy()
    np.testing.assert_allclose(np.sort(given, 0), np.sort(images.reshape(-1, 3), 0), atol=1e-5)
    method.after_step(step)
    made = method.tokenizer.colours.double().numpy()
    assert not np.allclose(made, before)
    ids = ((given[:, None] - made) ** 2).sum(-1).argmin(1)

    def error(colours: np.ndarray) -> float:
        return ((given[:, None] - colours) ** 2).sum(-1).min(1).mean()

    assert error(made) < 0.6 * error(given[:16])
    for colour in set(ids):  # Lloyd's iterations have nearly come to rest
        assert np.abs(given[ids == colour].mean(0) - made[colour]).max() < 0.1
    np.testing.assert_array_equal(
        method.maps(batch.views["image"]).flatten(), ((images.reshape(-1, 1, 3) - made) ** 2).sum(-1).argmin(1)
    )
    fixed = method.tokenizer.colours.clone()
    again = one_step.step(number=4)
    again.carried = method(batch, again).carry
    method.after_step(again)
    assert torch.equal(method.tokenizer.colours, fixed)


def test_a_palette_of_no_rgb_images():
    palette = Palette((2, 4), 3, 1)
    palette.colours.copy_(torch.tensor([[0.0], [1.0], [1.0]]))
    images = torch.tensor([[[[0.0, 0.2, 0.1, 0.1, 1, 1, 1, 1], [0, 0, 0, 0, 2, 1, 1, 0]]]])
    assert palette(images).tolist() == [[[0, 1]]]


# ---- By scale


def of_scales(scales: tuple[int, ...] = (1, 2, 4)) -> Frozen:
    """A frozen tokenizer with 8 codes, of several scales, whose convolutions are not the identity."""
    torch.manual_seed(3)
    backbone = backbones.build("vit_micro", image_size=(32, 32), patch_size=16, depth=2, dim=96, heads=3)
    quantizer = Quantizer(backbone.dim, 8, 4, scales=scales)
    if scales:
        for part in quantizer.scales.parameters():
            nn.init.normal_(part, std=0.3)
    sight, scale = Sight(backbone.stride), ((0.5,) * 3, (0.25,) * 3)
    return Frozen(backbone, spec="runs/t", fingerprint="t", sight=sight, own=scale, run=scale, quantizer=quantizer)


def by_scale(**knobs) -> IGPT:
    return one_step.build_reading("igpt", {"tokenizer": of_scales()}, {"ids": "tokenizer", "order": "scale", **knobs})


GRIDS = [(1, 1), (2, 2), (4, 4)]
LEVEL = np.repeat([0, 1, 2], [1, 4, 16])


def test_loss_terms_and_gradient_of_all_scales_against_numpy():
    method = by_scale().eval()
    images = one_step.batch(method).views["image"]
    losses = method(one_step.batch(method), one_step.step())
    losses.total.backward()
    frozen = method.tokenizer
    with torch.no_grad():
        seen = frozen(images)
        z = frozen.quantizer.embed(seen.patches).double().numpy().reshape(-1, 4, 4, 4)
    assert seen.grid == (4, 4)
    found = [
        numpy_levels(x, frozen.quantizer.codes.double().numpy(), GRIDS, convs_of(frozen.quantizer.scales)) for x in z
    ]
    t = np.array([np.concatenate(ids) for ids, _, _ in found])
    assert len(set(t.ravel())) > 3
    # What enters: the sum of the coarser scales at the size of the scale; nothing for the first one.
    stem = method.encoder.patch_embed
    proj, bias = (part.detach().double().numpy() for part in (stem.proj.weight, stem.proj.bias))
    level = stem.level.detach().double().numpy()
    rows = [np.broadcast_to(stem.start[0].detach().double().numpy() + level[0], (len(z), 1, 128))]
    for s in (1, 2):
        inputs = np.array([numpy_area(sums[s - 1], GRIDS[s]).reshape(-1, 4) for _, _, sums in found])
        rows.append(inputs @ proj.T + bias + level[s])
    embedded = np.concatenate(rows, 1)
    where = []
    for side, _ in GRIDS:
        for cell in range(side**2):
            row, column = ((n + 0.5) * 4 / side for n in divmod(cell, side))
            where.append(int(row) * 4 + int(column))
    mask = torch.ones(1, 22, 22, dtype=torch.bool)
    for q in range(22):
        for k in range(22):
            mask[0, q, k] = k == 0 or (q > 0 and bool(LEVEL[k - 1] <= LEVEL[q - 1]))

    class Given(nn.Module):
        proj = stem.proj

        def forward(self, maps, keep):
            return torch.from_numpy(embedded).float()

    vit = method.encoder
    with torch.no_grad():
        vit.patch_embed = Given()
        keep = torch.tensor(where).expand(len(z), -1)
        x = vit(torch.zeros(len(z), 8, 4, 4), keep=keep, attention=mask).patches.double().numpy()
    w = method.head.weight.detach().double().numpy()
    logits = x @ w.T
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -np.take_along_axis(logp, t[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.per_sample, each.mean(1), rtol=1e-4)
    assert float(losses.terms["bits"]) == pytest.approx(each.mean() / np.log(2), rel=1e-5)
    for s, side in enumerate((1, 2, 4)):
        assert float(losses.terms[f"bits_{side}"]) == pytest.approx(each[:, s == LEVEL].mean() / np.log(2), rel=1e-4)
    wrong = np.exp(logp) - np.eye(len(w))[t]
    np.testing.assert_allclose(method.head.weight.grad, np.einsum("bnk,bnd->kd", wrong, x) / t.size, atol=1e-5)
    assert all(p.grad is not None and p.grad.any() for p in stem.parameters())


def test_an_id_changes_only_the_predictions_of_finer_scales():
    method = by_scale().eval()
    quantizer = method.tokenizer.quantizer

    def logits(ids: torch.Tensor) -> torch.Tensor:
        sums = quantizer.scales.lookup(ids, (4, 4), quantizer.vectors())
        with torch.no_grad():
            return method.predict_levels(Levels(ids, torch.empty(0), sums), (4, 4), one_step.step())

    ids = torch.randint(0, 8, (2, 21), generator=torch.Generator().manual_seed(0))
    for position in (0, 3, 20):
        other = ids.clone()
        other[:, position] = (other[:, position] + 3) % 8
        changed = (logits(ids) - logits(other)).abs().amax((0, 2)) > 1e-6
        assert changed.numpy().tolist() == (LEVEL[position] < LEVEL).tolist()


def test_features_by_scale_are_those_of_the_finest_places(tmp_path: Path):
    method = by_scale(feature_depth=0.5).eval()
    exported = method.exported().eval()
    assert exported.depth == 1
    assert "keep" not in exported.supports
    images = torch.randn(2, 3, *exported.image_size)
    with torch.no_grad():
        levels, grid = method.tokenizer.levels(images)
        maps, how = reading(method.encoder, levels, grid)
        seen = method.encoder(maps, **how, blocks=(0,))
        expected = method.encoder.blocks[1].norm1(seen.blocks[0][:, -16:])
        found = exported(images, blocks=(-1,))
    assert found.grid == (4, 4)
    torch.testing.assert_close(found.patches, expected)
    torch.testing.assert_close(found.pooled, expected.mean(1))
    assert found.blocks[0].shape[1] == found.tokens.shape[1] == 17
    how = Preprocessing.for_size(exported.image_size, (0.5,) * 3, (0.25,) * 3)
    encoder.save(tmp_path, Encoder(exported, exported.name, how, {}))
    read = encoder.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(read(images).patches, found.patches)
        assert read(torch.randn(1, 3, 96, 128)).grid == (6, 8)  # of another size, with the same shares
    with pytest.raises(UnsupportedByBackbone, match="'keep'"):
        exported(images, keep=torch.zeros(2, 1, dtype=torch.int64))


def test_it_learns_the_ids_of_all_scales():
    """Of one batch, more than their frequencies say; the first scale, which sees nothing, no more than these."""
    method = by_scale()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    for number in range(40):
        losses = method(one_step.batch(method), one_step.step(number=number % 10))
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(losses.terms["gain"]) > 0.1
    assert float(losses.terms["bits_4"]) < float(losses.terms["bits"]) + 1


def test_tokenizers_of_one_scale_are_refused():
    with pytest.raises(UserError, match="--order scale: colours have one scale; give --ids tokenizer"):
        IGPT.Config(order="scale")
    with pytest.raises(UserError, match="--order scale: --tokenizer runs/t has one scale; train one of several"):
        one_step.build_reading("igpt", {"tokenizer": of_scales(())}, {"ids": "tokenizer", "order": "scale"})
    with pytest.raises(UserError, match="give --pool mean"):
        IGPT(
            backbones.build("vit_micro", image_size=(32, 32), patch_size=8, depth=2, pool="cls"),
            IGPT.Config(ids="tokenizer", order="scale"),
        )


def test_a_run_by_scale(pretrain_here, photos: Path, tmp_path: Path):
    few = [*SMALL, "--data", photos, "--steps", "2", "--picture-every", "0", "--batch-size", "8"]
    pretrain_here("--method", "vqtok", *few, "--codes", "16", "--scales", "1", "2", "8", "--out", tmp_path / "tokens")
    argv = ["--ids", "tokenizer", "--tokenizer", tmp_path / "tokens", "--order", "scale"]
    pretrain_here("--method", "igpt", *few, *argv, "--out", tmp_path / "run")
    exported = encoder.load(tmp_path / "run")
    assert exported.backbone.config.order == "scale"
    assert exported.lineage["tokenizer"]["fingerprint"] == tokenizer.load(tmp_path / "tokens").fingerprint
    assert exported(torch.rand(2, 3, 32, 32)).patches.shape == (2, 64, 64)


def test_collapsed_is_what_it_states():
    uniform = one_step.build("igpt")
    ids = uniform.maps(one_step.batch(uniform).views["image"])
    share = np.bincount(ids.flatten(), minlength=16) / ids.numel()
    with torch.no_grad():  # the norm's output is constant, so that the head's weights are the logits
        uniform.encoder.norm.weight.zero_()
    uniform.head = nn.Linear(128, 16)
    nn.init.zeros_(uniform.head.weight)
    with torch.no_grad():
        uniform.head.bias.copy_(torch.from_numpy(np.log(share + 1e-9)))
    single = one_step.build("igpt")
    single.tokenizer.colours[1:] = 1e3
    losses = [method(one_step.batch(method), one_step.step()) for method in (uniform, single)]
    check_stated(
        uniform,
        {name: Losses(total=x.total, terms=x.terms) for name, x in zip(("gain", "majority"), losses, strict=True)},
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cls": False}, "give --cls"),
        ({"pool": "cls"}, "give --pool mean"),
        ({"norms": "post"}, "leave it out"),
    ],
)
def test_wrong_encoders_are_refused(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        IGPT(backbones.build("vit_micro", image_size=(32, 32), patch_size=8, depth=2, **options), IGPT.Config())


@pytest.mark.parametrize("ids", ["colours", "tokenizer"])
def test_a_run_on_built_in_images(ids: str, pretrain, tmp_path: Path):
    """Ids are predicted better than by the most frequent one; the export has what it needs and names the block."""
    run, tokens = tmp_path / "run", tmp_path / "tokens"
    more = ["--ids", ids, "--steps", "120", "--colours", "32"]
    if ids == "tokenizer":
        argv = ["--codes", "32", "--codebook-decay", "0.9", "--steps", "60", "--out", tokens]
        pretrain("--method", "vqtok", *SMALL, *argv)
        more += ["--tokenizer", tokens]
    pretrain("--method", "igpt", *SMALL, *more, "--out", run)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in logged if "accuracy" in line][-6:]
    accuracy, majority, gain = (np.mean([line[name] for line in last]) for name in ("accuracy", "majority", "gain"))
    print(f"accuracy {accuracy:.3f}, majority {majority:.3f}, gain {gain:.3f}")
    assert accuracy > majority + 0.02
    assert gain > 0.02
    exported = encoder.load(run)
    assert exported.backbone.config.feature_block == 1
    assert exported.backbone.config.attention == "causal"
    images = (4 * torch.rand(2, 3, 8, 8) - 2).repeat_interleave(4, 2).repeat_interleave(4, 3)  # a colour a patch
    assert exported(images).pooled.shape == (2, 64)
    if ids == "tokenizer":
        assert torch.equal(exported.backbone.tokenizer(images), tokenizer.load(tokens).ids(images))
        assert exported.lineage["tokenizer"]["fingerprint"] == tokenizer.load(tokens).fingerprint
    else:
        ids_of = exported.backbone.tokenizer(images)
        assert len(ids_of.unique()) > 8
