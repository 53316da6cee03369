"""Growing: larger decoders that start as exactly the smaller one."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from fast_latent_decoders import EfficientViTDecoder, FastDecoder, SubpixelDecoder, TAEDecoder

from .families import FAMILIES, error, latents, made, steps
from .tiny import module

GROWN = [
    ("tae", {"width": 12}),
    ("tae", {"blocks": (3, 2, 1, 2)}),
    ("tae", {"width": 9, "blocks": (2, 2, 2, 2), "upsampling": "bilinear"}),
    ("subpixel", {"widths": (20, 8, 7)}),
    ("subpixel", {"widths": (16, 12, 8), "blocks": (3, 1, 2)}),
    ("subpixel-4", {"widths": (16, 12), "blocks": (3, 2)}),
    ("efficientvit", {"widths": (64, 24, 16)}),
    ("efficientvit", {"widths": (96, 16, 16), "attention_blocks": 3, "residual_blocks": (2, 2)}),
    ("temporal", {"blocks": (2, 3, 1, 2)}),
    ("streaming", {"widths": (20, 8, 7)}),
    ("temporal", {"blocks": (2, 2, 1, 2), "mid_block": "latent"}),
]


@pytest.fixture
def grow() -> ModuleType:
    return module("grow")


@pytest.mark.parametrize(("family", "changes"), GROWN)
def test_a_larger_decoder_starts_as_the_smaller_one(grow: ModuleType, family: str, changes: dict[str, Any]) -> None:
    shape = {key: changes[key] for key in ("upsampling", "mid_block") if key in changes}
    source = made(family, **shape)
    target = made(family, **changes)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    grow.grow(source, target)
    z = latents()
    assert source.decoder(z).std() > 0.01
    assert error(source.decoder, target.decoder, z, 2) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_shape_is_a_copy(grow: ModuleType, family: str) -> None:
    source, target = made(family), made(family)
    grow.grow(source, target)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())


def test_published_efficientvit_is_copied_with_its_statistics(grow: ModuleType) -> None:
    source, target = EfficientViTDecoder(published=True), EfficientViTDecoder(published=True)
    for layer in source.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
    grow.grow(source, target)
    assert error(source.decoder.eval(), target.decoder.eval(), latents(3, 4)) == 0


def test_taesdxl_grows(grow: ModuleType) -> None:
    """Wider and deeper from real weights, loaded at half precision as well."""
    source = FastDecoder.from_pretrained("taesdxl")
    target = TAEDecoder(width=96, blocks=(4, 3, 4, 2))
    grow.grow(source, target)
    z = torch.randn(1, 4, 9, 6)
    assert error(source.decoder, target.decoder, z) < 1e-4
    grow.grow(source.half(), target)
    assert error(source.float().decoder, target.decoder, z) < 1e-4


def test_a_tae_widens_where_it_is_cheap_first(grow: ModuleType) -> None:
    """From one width over four and back to one: the way of tae-192-sdxl on a small machine."""
    source, four, target = made("tae"), made("tae", width=(16, 12, 8, 8)), made("tae", width=16)
    grow.grow(source, four)
    grow.grow(four, target)
    z = latents()
    assert error(source.decoder, four.decoder, z) < 1e-5
    assert error(four.decoder, target.decoder, z) < 1e-5


def test_subpixel_preset_grows(grow: ModuleType) -> None:
    source = FastDecoder.from_pretrained("subpixel-sdxl")
    target = SubpixelDecoder((160, 80, 64), (4, 3, 3), 3, "tae")
    grow.grow(source, target)
    assert error(source.decoder, target.decoder, torch.randn(1, 4, 8, 6)) < 1e-4


def test_an_efficientvit_begins_as_a_subpixel(grow: ModuleType) -> None:
    """The way of efficientvit-sdxl: attention behind the residual blocks at 1/8, wider there. All of it learns."""
    source = FastDecoder.from_pretrained("subpixel-sdxl")
    target = EfficientViTDecoder((160, 64, 48), 2, (4, 3, 2), 3, "tae")
    grow.grow(source, target)
    z = torch.randn(1, 4, 8, 6)
    assert error(source.decoder, target.decoder, z) < 1e-4
    steps(target.decoder, 2)
    assert all(layer.attention.norm.weight.abs().min() > 0 for layer in target.decoder.layers if hasattr(layer, "attention"))
    with pytest.raises(ValueError, match="into a SubpixelTemporalDecoder or an EfficientViTDecoder"):
        grow.grow(target, source)


@pytest.mark.parametrize("mid_block", ["upsampled", "latent"])
def test_temporal_grows_from_frames(grow: ModuleType, mid_block: str) -> None:
    source = made("tae", latent_space="sd")
    target = made("temporal", mid_block=mid_block, blocks=(2, 2, 1, 1))
    grow.grow(source, target)
    z = latents()
    with torch.no_grad():
        assert (source.decoder(z) - target.decoder(z, 2)).abs().max() < 1e-5


def test_a_temporal_tae_widens_behind_its_mid_block(grow: ModuleType) -> None:
    """The way of tae-temporal-svd on a small machine: the mid block learns where the rest is cheap."""
    source, target = made("temporal", width=(32, 32, 8, 8)), made("temporal", width=32)
    steps(source.decoder, 2)
    grow.grow(source, target)
    z = latents()
    assert (source.decoder(z, 2) - source.decoder(z)).abs().max() > 1e-6
    assert error(source.decoder, target.decoder, z, 2) < 1e-5


@pytest.mark.parametrize(
    ("family", "changes"),
    [("tae", {"width": 20}), ("subpixel", {"widths": (24, 16, 12)}), ("efficientvit", {"widths": (64, 32, 16)})],
)
def test_new_channels_learn(grow: ModuleType, family: str, changes: dict[str, Any]) -> None:
    """After a few steps new rows and columns have moved, and no two new rows are alike."""
    source, target = made(family), made(family, **changes)
    grow.grow(source, target)
    old, network = dict(source.decoder.named_parameters()), target.decoder
    start = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    steps(network, 4)
    for name, parameter in network.named_parameters():
        moved = (parameter != start[name]).float()
        rows, columns = len(old[name]), old[name].shape[1] if parameter.ndim > 1 else None
        # Not all: a ReLU may keep one or the other shut.
        assert len(parameter) == rows or moved[rows:].mean() > 0.5, name
        assert columns is None or parameter.shape[1] == columns or moved[:, columns:].mean() > 0.5, name
        if columns:
            assert len(parameter[rows:].flatten(1).unique(dim=0)) == len(parameter) - rows, name


def test_new_blocks_learn(grow: ModuleType) -> None:
    for family, changes, added in (("tae", {"blocks": (2, 1, 1, 1)}, 3), ("subpixel", {"blocks": (2, 1, 1)}, 2)):
        source, target = made(family), made(family, **changes)
        grow.grow(source, target)
        start = {name: parameter.detach().clone() for name, parameter in target.decoder.layers[added].named_parameters()}
        assert torch.equal(start["conv.0.weight"], target.decoder.layers[added - 1].conv[0].weight)  # features worth reading
        steps(target.decoder, 3)
        moved = target.decoder.layers[added].named_parameters()
        assert all(not torch.equal(parameter, start[name]) for name, parameter in moved)


def test_a_generator_decides_the_fresh_weights_alone(grow: ModuleType) -> None:
    source, grown = made("tae"), []
    state = torch.get_rng_state()
    for seed in (1, 1, 2):
        target = TAEDecoder(width=12, blocks=(1, 1, 1, 1))
        torch.set_rng_state(state)
        grow.grow(source, target, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), state)
        grown.append(target.decoder.layers[0].weight)
    assert torch.equal(grown[0], grown[1]) and not torch.equal(grown[0], grown[2])


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (("tae", {}), ("subpixel", {}), "expected a target of the source's family, TAEDecoder, got SubpixelDecoder"),
        (("tae", {}), ("tae", {"latent_space": "sd"}), "latent space"),
        (("tae", {}), ("tae", {"latent_space": "mine", "latent_channels": 16, "scaling_factor": 1.0}), "latent space"),
        (("tae", {}), ("tae", {"width": 6}), "at least as wide as its source.*larger widths"),
        (("tae", {"blocks": (2, 1, 1, 1)}), ("tae", {}), "at least as many blocks"),
        (("tae", {}), ("tae", {"upsampling": "bilinear"}), "same convs and upsampling"),
        (("tae", {"blocks": (1, 0, 1, 1)}), ("tae", {}), "cannot start as the identity"),
        (("subpixel", {}), ("subpixel", {"convs": 2}), "same convs"),
        (("temporal", {}), ("temporal", {"width": 64}), "grow a frame-wise TAEDecoder"),
        (("temporal", {}), ("temporal", {"mid_block": "latent"}), "source's mid_block"),
        (("efficientvit", {}), ("efficientvit", {"published": True}), "published"),
    ],
)
def test_what_cannot_grow_is_an_error_and_leaves_the_target(
    grow: ModuleType, source: tuple[str, dict[str, Any]], target: tuple[str, dict[str, Any]], message: str
) -> None:
    large = made(target[0], **target[1])
    before = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        grow.grow(made(source[0], **source[1]), large)
    assert all(torch.equal(tensor, before[name]) for name, tensor in large.state_dict().items())
