"""Maps and attention of timm's models: what timm's own modules give, in the pass that gives the features."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from feature_pyramid import Pyramid
from oracles import import_timm, import_torchvision
from scenes import write
from ssl_pretrain.launch.evaluate import main
from torch import Tensor, nn

from ssl_pretrain import backbones, encoder
from ssl_pretrain.backbones.backbone import UnsupportedByBackbone
from ssl_pretrain.encoder import Encoder, Preprocessing
from ssl_pretrain.errors import UserError
from ssl_pretrain.foreign import libraries

SIZE = (64, 96)
VIT = {"timm_args": ("depth=2", "embed_dim=48", "patch_size=8")}
STAGED = {"resnet18": {}, "convnext_atto": {}, "mobilenetv4_conv_small": {}, "pvt_v2_b0": {}}


@pytest.fixture(autouse=True)
def timm() -> ModuleType:
    return import_timm()


def built(name: str, size: tuple[int, int] = SIZE, **options: Any) -> Any:
    torch.manual_seed(0)
    return backbones.build(f"timm:{name}", image_size=size, **options).eval()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def outputs_of(model: nn.Module, names: list[str], images: Tensor) -> list[Tensor]:
    """What these modules give in a forward of the model."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: found.update({name: out}))
        for name in names
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return [found[name] for name in names]


@pytest.mark.parametrize("name", STAGED)
def test_maps_are_the_last_four_stages_that_timm_states(name: str) -> None:
    model, images = built(name), draw(2, 3, *SIZE)
    stated = model.model.feature_info[-4:]
    assert (
        model.map_strides == tuple((each["reduction"],) * 2 for each in stated) == ((4, 4), (8, 8), (16, 16), (32, 32))
    )
    assert model.map_channels == tuple(each["num_chs"] for each in stated)
    with torch.no_grad():
        found, plain = model(images, maps=True), model(images)
    assert plain.maps == ()
    wanted = outputs_of(model.model, [each["module"] for each in stated], images)
    for ours, theirs, stride, width in zip(found.maps, wanted, model.map_strides, model.map_channels, strict=True):
        assert tuple(ours.shape) == (2, width, SIZE[0] // stride[0], SIZE[1] // stride[1])
        assert torch.equal(ours, theirs)
    for part in ("pooled", "patches"):
        assert torch.equal(getattr(found, part), getattr(plain, part)), part


def test_maps_of_a_model_with_channels_last_are_channels_first() -> None:
    model = built("swin_tiny_patch4_window7_224", (64, 64))
    with torch.no_grad():
        maps = model(draw(1, 3, 64, 64), maps=True).maps
    assert [tuple(x.shape[1:]) for x in maps] == [(96, 16, 16), (192, 8, 8), (384, 4, 4), (768, 2, 2)]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_vits_maps_are_its_patches_resampled(name: str) -> None:
    """As of our ViT, of timm's class `VisionTransformer` and of others."""
    model, images = built(name, **VIT), draw(2, 3, *SIZE)
    with torch.no_grad():
        found = model(images, maps=True)
    assert model.map_strides == ((2, 2), (4, 4), (8, 8), (16, 16))
    assert model.map_channels == (48,) * 4
    assert torch.equal(found.maps[2], found.patches.mT.unflatten(2, (8, 12)))
    assert [tuple(x.shape[2:]) for x in found.maps] == [(32, 48), (16, 24), (8, 12), (4, 6)]
    if name.startswith("vit"):
        with pytest.raises(UserError, match="without keep"):
            model(images, keep=torch.zeros(2, 3, dtype=torch.int64), maps=True)


@pytest.mark.parametrize(("name", "options"), [("vit_tiny_patch16_224", VIT), ("resnet18", {})])
def test_torchvisions_fpn_takes_the_maps_and_trains_the_encoder(name: str, options: dict) -> None:
    model = built(name, **options)
    neck = Pyramid(import_torchvision(), model).train()
    sum(x.square().mean() for x in neck(draw(2, 3, *SIZE)).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_timm_encoder_is_scored_on_segmentation(tmp_path: Path) -> None:
    model = built("resnet18", (64, 64))
    encoder.save(
        tmp_path / "e", Encoder(model, "timm:resnet18", Preprocessing.for_size((64, 64), (0.5,) * 3, (0.2,) * 3), {})
    )
    for i in range(6):
        split = "train" if i < 4 else "test"
        write(tmp_path / "scenes", f"{split}/{i}.png", f"{split}/{i}.seg.png", i)
    words = ["--encoder", str(tmp_path / "e"), "--data", str(tmp_path / "scenes"), "--out", str(tmp_path / "out")]
    assert main(["segment", *words, "--task", "knn", "--workers", "0", "--image-size", "64"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]["miou"] > 0


def test_weights_of_timm_for_evaluation_have_the_same_maps(timm: ModuleType, tmp_path: Path) -> None:
    for name, stages in (("resnet18", 4), ("vit_tiny_patch16_224", None)):
        torch.manual_seed(3)
        theirs = timm.create_model(name)
        torch.save(theirs.state_dict(), tmp_path / f"{name}.pth")
        found = libraries.load(f"timm:{name},checkpoint={tmp_path / name}.pth,image-size=224")
        own = built(name, (224, 224))
        own.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith(("fc.", "head."))})
        assert (found.backbone.map_strides, found.backbone.map_channels) == (own.map_strides, own.map_channels)
        images = draw(1, 3, 224, 224)
        with torch.no_grad():
            seen, plain, wanted = found(images, maps=True), found(images), own(images, maps=True)
        assert torch.equal(seen.pooled, plain.pooled)
        assert plain.maps == ()
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(seen.maps, wanted.maps, strict=True)), stages


# ---- Attention.


def test_attention_is_what_timm_computes() -> None:
    """timm's block without its fused kernel has the weights as the input of its dropout."""
    model, images = built("vit_tiny_patch16_224", **VIT), draw(2, 3, *SIZE)
    with torch.no_grad():
        plain, found = model(images), model(images, attention_of=(-1, 0))
        logits = model(images, attention_of=(1,), attention_logits=True).attention[0]
    for part in ("tokens", "pooled"):
        assert torch.equal(getattr(found, part), getattr(plain, part))
    for block in model.model.blocks:
        block.attn.fused_attn = False
    wanted = outputs_of(model.model, ["blocks.1.attn.attn_drop", "blocks.0.attn.attn_drop"], images)
    for ours, theirs in zip(found.attention, wanted, strict=True):
        assert ours.shape == (2, 3, 97, 97)
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.allclose(logits.softmax(-1), wanted[0], atol=1e-6)


def test_attention_of_other_models_is_refused() -> None:
    for name in ("resnet18", "deit_tiny_distilled_patch16_224"):
        with pytest.raises(UnsupportedByBackbone, match="attention_of needs an encoder that supports 'attention_maps'"):
            built(name, (64, 64))(draw(1, 3, 64, 64), attention_of=(0,))


def test_maelite_trains_a_vit_of_timm(
    photos: Path, tmp_path: Path, pretrain_here: Any, capfd: pytest.CaptureFixture
) -> None:
    """Attention with kept patches, gradients and blocks that are computed again; pictures of the attention."""
    teacher = built("vit_tiny_patch16_224", (32, 32), **VIT)
    how = Preprocessing.for_size((32, 32), (0.5,) * 3, (0.2,) * 3)
    encoder.save(tmp_path / "teacher", Encoder(teacher, "timm:vit_tiny_patch16_224", how, {}))
    words = ["--method", "maelite", "--data", photos, "--encoder", "timm:vit_tiny_patch16_224", "--image-size", 32]
    words += ["--timm-args", *VIT["timm_args"], "--teacher", tmp_path / "teacher", "--gradient-checkpointing"]
    words += "--decoder-dim 32 --decoder-depth 1 --decoder-heads 2 --batch-size 8 --steps 2 --workers 0".split()
    pretrain_here(*words, "--precision", "fp32", "--no-score", "--out", tmp_path / "run")
    assert "not drawn" not in capfd.readouterr().err
    assert any(b"attention of the last block" in file.read_bytes() for file in (tmp_path / "run").rglob("*tfevents*"))
