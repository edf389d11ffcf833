"""Octic ViTs: equivariance of layers and of the whole encoder to quarter turns and mirror images, against group actions
that are written here as matrices and index tables, and the shares of weights and multiplications."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssl_pretrain import backbones
from ssl_pretrain.backbones import octic
from ssl_pretrain.errors import UserError

# What a turn of the image does to the parts A1, A2, B1, B2, and (x left, x right, y left, y right) of E: row i of the
# matrix says of which parts the new part i is made.
TURN = np.zeros((8, 8))
TURN[range(4), range(4)] = [1, 1, -1, -1]
TURN[4, 6] = TURN[5, 7] = -1
TURN[6, 4] = TURN[7, 5] = 1
MIRROR = np.diag([1.0, -1, 1, -1, -1, -1, 1, 1])


def rotated(images: Tensor) -> Tensor:
    return torch.rot90(images, 1, (-2, -1))


def mirrored(images: Tensor) -> Tensor:
    return images.flip(-1)


ACTIONS: dict[str, tuple[Callable[[Tensor], Tensor], np.ndarray]] = {
    "turn": (rotated, TURN),
    "mirror": (mirrored, MIRROR),
    "turn and mirror": (lambda x: mirrored(rotated(x)), MIRROR @ TURN),
    "half turn": (lambda x: rotated(rotated(x)), TURN @ TURN),
}


def acted(x: Tensor, matrix: np.ndarray) -> Tensor:
    """(..., 8, c) features, their parts turned."""
    return torch.einsum("ij,...jc->...ic", torch.from_numpy(matrix).to(x.dtype), x)


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """With all weights away from where they begin."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_matrices_are_a_representation_of_the_square() -> None:
    eye = np.eye(8)
    np.testing.assert_array_equal(np.linalg.matrix_power(TURN, 4), eye)
    np.testing.assert_array_equal(MIRROR @ MIRROR, eye)
    np.testing.assert_array_equal(MIRROR @ TURN @ MIRROR, TURN.T)


def test_the_basis_turns_functions_on_the_group_into_parts() -> None:
    """A turn of a function on the group, as a permutation of its eight values, is TURN of its parts."""
    basis = octic._regular_basis().double().numpy()
    np.testing.assert_allclose(basis @ basis.T, np.eye(8), atol=1e-7)
    values = np.random.default_rng(0).standard_normal(8)
    turned = values[[1, 2, 3, 0, 7, 4, 5, 6]]
    mirror = values[[4, 5, 6, 7, 0, 1, 2, 3]]
    np.testing.assert_allclose(basis @ turned, TURN @ basis @ values, atol=1e-6)
    np.testing.assert_allclose(basis @ mirror, MIRROR @ basis @ values, atol=1e-6)


LAYERS = {
    "linear": lambda: octic.OcticLinear(32, 64),
    "scale": lambda: octic.OcticScale(32, 0.5),
    "norm": lambda: octic.OcticNorm(32),
    "attention": lambda: octic.OcticAttention(32, 2),
    "mlp": lambda: octic.OcticMlp(32, 64),
    "block": lambda: octic.OcticBlock(32, 2, 4.0, 0.1),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_equivariant(layer: str, action: str) -> None:
    """For 10 tokens of random features, in float64. An ordinary GELU of the parts is not."""
    model, x = moved(LAYERS[layer]().double()), noise(3, 10, 8, 4)
    matrix = ACTIONS[action][1]
    with torch.no_grad():
        found, expected = model(acted(x, matrix)), acted(model(x), matrix)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6
    gelu = torch.nn.functional.gelu
    assert not torch.allclose(gelu(acted(x, TURN)), acted(gelu(x), TURN), atol=1e-2)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("size", [(32, 32), (48, 48), (24, 24)])
def test_the_encoder_is_equivariant(size: tuple[int, int], action: str) -> None:
    """All blocks equivariant: patches go to their new places and their parts turn, in float32 to 1e-5; also at other image
    sizes than the encoder's, where positions are resized."""
    model = moved(backbones.build("octic_micro", image_size=(32, 32), patch_size=8, octic_mode="octic"))
    turn, matrix = ACTIONS[action]
    images = noise(2, 3, *size).float()
    with torch.no_grad():
        plain, other = model(images, blocks=(0, -1)), model(turn(images))
    places = turn(torch.arange(plain.grid[0] * plain.grid[1]).unflatten(0, plain.grid)).flatten()
    expected = acted(plain.patches[:, places].unflatten(2, (8, -1)), matrix)
    found = other.patches.unflatten(2, (8, -1))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert plain.cls is not None
    assert other.cls is not None
    expected = acted(plain.cls.unflatten(1, (8, -1)), matrix)
    assert float((other.cls.unflatten(1, (8, -1)) - expected).abs().max() / expected.abs().max()) < 1e-5
    # Not because nothing depends on places: the patches of a shuffled image are others.
    with torch.no_grad():
        shuffled = model(images.roll(8, 3))
    assert float((shuffled.patches.roll(-1, 1) - plain.patches).abs().max() / plain.patches.abs().max()) > 1e-2


@pytest.mark.parametrize("action", ACTIONS)
def test_the_invariant_encoder_does_not_see_turns(action: str) -> None:
    model = moved(backbones.build("octic_micro", image_size=(32, 32), patch_size=8, octic_mode="invariant"))
    hybrid = moved(backbones.build("octic_micro", image_size=(32, 32), patch_size=8))
    images = noise(2, 3, 32, 32).float()
    turn = ACTIONS[action][0]
    with torch.no_grad():
        one, two = model(images).pooled, model(turn(images)).pooled
        three, four = hybrid(images).pooled, hybrid(turn(images)).pooled
    assert float((one - two).abs().max() / one.abs().max()) < 1e-5
    assert float((three - four).abs().max() / three.abs().max()) > 1e-3  # a hybrid sees them
    assert float((one[0] - one[1]).abs().max() / one.abs().max()) > 1e-2


def test_half_of_the_hybrid_is_equivariant() -> None:
    model = moved(backbones.build("octic_micro", image_size=(32, 32), patch_size=8, octic_blocks=3))
    images = noise(2, 3, 32, 32).float()
    with torch.no_grad():
        plain, other = (model(x, blocks=(1, 3)).blocks for x in (images, rotated(images)))
    places = torch.cat(
        [torch.zeros(1, dtype=torch.int64), 1 + rotated(torch.arange(16).unflatten(0, (4, 4))).flatten()]
    )
    expected = acted(plain[0][:, places].unflatten(2, (8, -1)), TURN)
    assert float((other[0].unflatten(2, (8, -1)) - expected).abs().max() / expected.abs().max()) < 1e-5
    expected = acted(plain[1][:, places].unflatten(2, (8, -1)), TURN)
    assert float((other[1].unflatten(2, (8, -1)) - expected).abs().max() / expected.abs().max()) > 1e-2


def test_a_norm_has_mean_0_and_deviation_1_over_all_channels() -> None:
    """By hand in NumPy, from a fresh norm."""
    norm, x = octic.OcticNorm(32).double(), 3 * noise(2, 5, 8, 4) + 1
    a = x.numpy().copy()
    a[:, :, :4] -= a[:, :, :4].mean(3, keepdims=True)
    for first in (4, 6):
        a[:, :, first : first + 2] -= a[:, :, first : first + 2].mean((2, 3), keepdims=True)
    a /= np.sqrt((a**2).mean((2, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(x).detach().numpy(), a, atol=1e-12)


def test_shares_of_weights_and_multiplications() -> None:
    """An eighth of the weights of a dense layer (the paper, section 3), and 3/16 of its multiplications."""
    layer, x = octic.OcticLinear(64, 128), torch.randn(2, 10, 8, 8)
    assert sum(p.numel() for p in (layer.ones, layer.twos)) == 64 * 128 // 8
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 20 * 64 * 128 * 3 // 16


def test_weights_of_another_size_keep_the_equivariance() -> None:
    small = moved(backbones.build("octic_micro", image_size=(32, 32), patch_size=8, octic_mode="octic"))
    large = backbones.build("octic_micro", image_size=(64, 64), patch_size=8, octic_mode="octic").eval()
    large.load_state_dict(large.adapt(small.state_dict(), (32, 32)))
    fields = [octic.symmetric(model.pos_quarters.detach()) for model in (small, large)]
    assert fields[1].shape[-1] == 8
    # The resized table is what resizing the whole field gives.
    whole = torch.nn.functional.interpolate(fields[0], size=(8, 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(fields[1], whole, atol=1e-5, rtol=1e-5)
    images = noise(1, 3, 64, 64).float()
    with torch.no_grad():
        plain, other = large(images), large(rotated(images))
    places = rotated(torch.arange(64).unflatten(0, (8, 8))).flatten()
    expected = acted(plain.patches[:, places].unflatten(2, (8, -1)), TURN)
    assert float((other.patches.unflatten(2, (8, -1)) - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 3}, "multiple of 8 times --heads 3"),
        ({"patch_size": 7}, "--patch-size 7 must be even"),
        ({"mlp_ratio": 0.51}, "no multiple of 8"),
        ({"octic_blocks": 5}, "--octic-blocks 5 is more than --depth 4"),
        ({"pool": "cls", "cls": False}, "needs a class token"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        backbones.build("octic_micro", image_size=(56, 56), **{"patch_size": 8, **options})


@pytest.mark.parametrize("mode", ["hybrid", "invariant", "octic"])
def test_an_encoder_of_one_block_has_it_equivariant(mode: str) -> None:
    model = backbones.build("octic_micro", image_size=(16, 16), patch_size=8, depth=1, octic_mode=mode)
    assert len(model.octic_blocks) == 1
    assert model(torch.zeros(1, 3, 16, 16)).patches.shape == (1, 4, 128)


def test_gradients_of_the_three_modes() -> None:
    """Against differences of the loss, in float64, for one weight of each kind."""
    for mode, cls in itertools.product(("hybrid", "invariant", "octic"), (True, False)):
        model = moved(
            backbones.build(
                "octic_micro", image_size=(16, 16), patch_size=8, octic_mode=mode, cls=cls, depth=2
            ).double()
        )
        images = noise(2, 3, 16, 16)

        def loss(model: torch.nn.Module = model, images: Tensor = images) -> Tensor:
            found = model(images).patches
            return (found * torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)).sum()

        loss().backward()
        for parameter in list(model.parameters())[::5]:
            at = int(parameter.grad.abs().argmax())
            slope = float(parameter.grad.flatten()[at])
            with torch.no_grad():
                values = []
                for sign in (1, -1):
                    parameter.view(-1)[at] += sign * 1e-5
                    values.append(float(loss()))
                    parameter.view(-1)[at] -= sign * 1e-5
            assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-6)
