"""MSN against float64 NumPy written from the paper: targets, loss, masks, the moving average."""

import math

import numpy as np
import pytest
import torch
from method_helpers import check_stated, losses_of, make_nearest_, make_uniform_, make_zero_
from ssl_pretrain.methods.msn import MSN
from torch import Tensor, nn

from ssl_pretrain import backbones
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.backbones.vit import ViT
from ssl_pretrain.conformance import one_step
from ssl_pretrain.conformance.one_step import after_step
from ssl_pretrain.errors import UserError
from ssl_pretrain.pretext import Batch, Losses, Step

KERNELS = 330  # of a step: python tests/kernels.py msn
DEVICE_KERNELS = 355  # with the optimiser, on an accelerator: python tests/device.py msn

K, E, N, A = 7, 5, 12, 3
SMALL = {"prototypes": K, "embedding_dim": E, "hidden_dim": 16, "local_views": A - 1}


def build(head: bool = False, supports: frozenset[str] | None = None, **knobs: object) -> MSN:
    torch.manual_seed(0)
    options = {**backbones.defaults("vit_micro"), "patch_size": 8, "depth": 1, **MSN.recipe.encoder}
    encoder = backbones.build("vit_micro", image_size=(32, 40), **options)
    if supports is not None:
        encoder.supports = supports
    method = MSN(encoder, MSN.Config(**{**SMALL, **knobs}))
    if not head:
        method.head = nn.Sequential()  # the test gives embeddings
    method.prepare(N)
    return method


def step(number: int = 3, ok: bool = True, noise: int = 1) -> Step:
    made = Step(step=number, total=10, noise=noise, rows=slice(0, N), batch_size=N, device=torch.device("cpu"))
    made.ok = torch.tensor(ok)
    return made


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = {name: torch.randn(N, 3, 32, 40, generator=generator) for name in ("target", "anchor")}
    views["local"] = torch.randn(A - 1, N, 3, 16, 16, generator=generator)
    return Batch(views=views, index=torch.arange(N))


def embeddings() -> tuple[np.ndarray, np.ndarray]:
    """Anchors (N, A, E) and target (N, E), those of an image alike."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(N, E))
    return target[:, None] + 0.5 * rng.normal(size=(N, A, E)), target


def softmax_of_cosines(z: np.ndarray, prototypes: np.ndarray, temperature: float) -> np.ndarray:
    z, c = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (z, prototypes))
    p = np.exp(z @ c.T / temperature)
    return p / p.sum(-1, keepdims=True)


def numpy_targets(target: np.ndarray, prototypes: np.ndarray, even: bool, sharpening: float = 0.25) -> np.ndarray:
    """Softmax at the anchors' temperature, to the power 1 / sharpening, and then three rounds of Sinkhorn-Knopp."""
    p = softmax_of_cosines(target, prototypes, 0.1) ** (1 / sharpening)
    p = p / p.sum(1, keepdims=True)
    for _ in range(3 if even else 0):
        p = p / p.sum(0, keepdims=True) / p.shape[1]
        p = p / p.sum(1, keepdims=True)
    return p


def numpy_loss(
    anchors: np.ndarray, wanted: np.ndarray, prototypes: np.ndarray, weight: float = 1.0
) -> tuple[float, float, float]:
    """Equation 1, one anchor after the other, the entropy counted from ln K: total, cross-entropy, unevenness."""
    predictions = [softmax_of_cosines(anchors[:, a], prototypes, 0.1) for a in range(anchors.shape[1])]
    cross = np.mean([-(wanted * np.log(p)).sum(1).mean() for p in predictions])
    mean = np.mean([p.mean(0) for p in predictions], axis=0)
    uneven = math.log(len(mean)) + (mean * np.log(mean)).sum()
    return cross + weight * uneven, cross, uneven


def loss_of(method: MSN, anchors: Tensor, target: Tensor) -> Losses:
    return method.loss({"anchors": anchors, "target": target}, step())


@pytest.mark.parametrize("knobs", [{}, {"sinkhorn": False}, {"entropy_weight": 5.0}, {"sharpening": 0.5}])
def test_loss_and_gradients_against_numpy(knobs: dict[str, float]) -> None:
    method, (anchors, target) = build(**knobs), embeddings()
    leaf = torch.tensor(anchors, dtype=torch.float32, requires_grad=True)
    aim = torch.tensor(target, dtype=torch.float32, requires_grad=True)
    found = loss_of(method, leaf, aim)
    prototypes = method.prototypes.weight.detach().double().numpy()
    wanted = numpy_targets(target, prototypes, bool(knobs.get("sinkhorn", True)), knobs.get("sharpening", 0.25))
    weight = knobs.get("entropy_weight", 1.0)
    total, cross, uneven = numpy_loss(anchors, wanted, prototypes, weight)
    assert found.total.item() == pytest.approx(total, rel=1e-4)
    assert found.terms["cross_entropy"].item() == pytest.approx(cross, rel=1e-4)
    assert found.terms["unevenness"].item() == pytest.approx(uneven, rel=1e-3)
    entropy = -(wanted * np.log(wanted)).sum(1).mean()
    assert found.terms["target_entropy"].item() == pytest.approx(entropy, rel=1e-3)
    found.total.backward()
    assert aim.grad is None  # nothing flows into the target
    for array, grad in ((anchors, leaf.grad), (prototypes, method.prototypes.weight.grad)):
        assert grad is not None
        differences = np.empty_like(array)
        for place in np.ndindex(array.shape):
            moved = []
            for sign in (1, -1):
                other = array.copy()
                other[place] += sign * 1e-6
                a, c = (other, prototypes) if array is anchors else (anchors, other)
                moved.append(numpy_loss(a, wanted, c, weight)[0])
            differences[place] = (moved[0] - moved[1]) / 2e-6
        np.testing.assert_allclose(grad.numpy(), differences, rtol=1e-3, atol=1e-3 * np.abs(differences).max())


def test_sinkhorn_evens_the_targets_out() -> None:
    similarities = torch.rand(N, K, generator=torch.Generator().manual_seed(0)) * 0.2
    similarities[:, 2] += 0.1
    used = [build(sinkhorn=on).assign(similarities).sum(0) for on in (False, True)]
    assert used[0][2] > N / 2
    assert used[1][2] < 2 * N / K


def seen_by_the_encoder(method: MSN, monkeypatch: pytest.MonkeyPatch, at: Step) -> list[dict]:
    calls = []
    plain = ViT._embedded

    def spy(self: nn.Module, images: Tensor, keep: Tensor | None, replace: object) -> object:
        calls.append({"trained": self is method.encoder, "images": images, "keep": keep})
        return plain(self, images, keep, replace)

    monkeypatch.setattr(ViT, "_embedded", spy)
    method.embed(batch(), at)
    monkeypatch.undo()
    return calls


def test_only_the_large_anchor_loses_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build()
    anchor, local, target = seen_by_the_encoder(method, monkeypatch, step())
    assert anchor["keep"].shape == (N, 17)  # of 4 x 5 patches 15 % go: 20 * 0.85
    assert len(set(map(tuple, anchor["keep"].sort(1).values.tolist()))) > 1  # each image has its own
    assert torch.equal(anchor["images"], batch().views["anchor"])
    assert local["keep"] is None
    assert local["trained"]
    assert target["keep"] is None
    assert not target["trained"]
    assert torch.equal(target["images"], batch().views["target"])
    whole, _, _ = seen_by_the_encoder(build(drop_ratio=0.0), monkeypatch, step())
    assert whole["keep"] is None


def test_patches_are_dropped_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build(drop_ratio=0.5)
    counts = np.zeros(20)
    for noise in range(40):
        keep = seen_by_the_encoder(method, monkeypatch, step(noise=noise))[0]["keep"]
        counts += np.bincount(keep.flatten().numpy(), minlength=20)
    draws = 40 * N
    assert counts.sum() == draws * 10
    assert ((counts - draws / 2) ** 2 / (draws / 4)).sum() < 43.8  # 99.9 % of chi-square with 19 degrees of freedom


def test_the_count_is_rounded_down() -> None:
    assert [build().kept(n) for n in (196, 20, 7)] == [166, 17, 5]


def test_an_encoder_that_cannot_drop_tokens_serves_without_dropping() -> None:
    with pytest.raises(UnsupportedByBackbone, match="msn needs an encoder that supports 'keep'"):
        build(supports=frozenset())
    build(supports=frozenset(), drop_ratio=0.0)


def test_the_target_network_follows_and_gets_no_gradient() -> None:
    method = build(head=True, momentum=0.9)
    for p, q in zip(method.teacher["encoder"].parameters(), method.encoder.parameters(), strict=True):
        assert torch.equal(p, q)
    found = method(batch(), step())
    found.total.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    with torch.no_grad():
        for p in (*method.encoder.parameters(), *method.head.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    old = {n: p.detach().double().numpy().copy() for n, p in method.teacher.named_parameters()}
    new = {f"encoder.{n}": p for n, p in method.encoder.named_parameters()}
    new |= {f"head.{n}": p for n, p in method.head.named_parameters()}
    after_step(method, step(5, ok=False), {})
    assert all(np.array_equal(old[n], p.detach().double().numpy()) for n, p in method.teacher.named_parameters())
    after_step(method, step(5), {})
    momentum = 0.9 + 0.1 * 5 / 10  # half of the way to 1
    assert old.keys() == new.keys()
    for n, p in method.teacher.named_parameters():
        expected = momentum * old[n] + (1 - momentum) * new[n].detach().double().numpy()
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert method.exported() is method.teacher["encoder"]


@pytest.mark.parametrize("sinkhorn", [True, False])
def test_collapsed_state_has_the_stated_loss(sinkhorn: bool) -> None:
    method = one_step.build("msn", sinkhorn=sinkhorn)
    make_uniform_(method.prototypes)
    uniform = losses_of(method)

    method = one_step.build("msn", sinkhorn=sinkhorn)
    for head in (method.head, method.teacher["head"]):
        make_zero_(head[-1])
        torch.nn.init.ones_(head[-1].bias)
    make_nearest_(method.prototypes, 3)
    one = losses_of(method)
    check_stated(method, {"cross_entropy": uniform, "unevenness": one, "target_entropy": uniform})


def test_collapsed_embeddings_have_a_finite_gradient() -> None:
    method = build(temperature=0.01)
    same = torch.ones(N, A, E, requires_grad=True)
    make_nearest_(method.prototypes, 3)
    loss_of(method, same, same[:, 0]).total.backward()
    assert same.grad is not None
    assert bool(torch.isfinite(same.grad).all())


def test_the_released_views() -> None:
    target, anchor, local = MSN.views(MSN.Config(), (224, 224))
    assert target.scale == anchor.scale == (0.3, 1.0)
    assert (local.count, local.size, local.scale) == (10, (96, 96), (0.05, 0.3))
    assert [spec.name for spec in MSN.views(MSN.Config(local_views=0), (224, 224))] == ["target", "anchor"]


@pytest.mark.parametrize(
    "knobs", [{"drop_ratio": 1.0}, {"drop_ratio": 0.99}, {"momentum": 1.0}, {"sharpening": 0.0}, {"temperature": -1.0}]
)
def test_knobs_out_of_range_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(knobs)).replace("_", "-")):
        build(**knobs)
