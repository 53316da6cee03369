"""Growing: larger decoders that start as exactly the smaller one, folded forms, and the fit of a last layer."""

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast_latent_decoders import (
    EfficientViTDecoder,
    FastDecoder,
    SubpixelDecoder,
    SubpixelTemporalDecoder,
    TAEDecoder,
    TAETemporalDecoder,
)
from fast_latent_decoders.networks.blocks import BlockNetwork
from fast_latent_decoders.tiling import decode_tiled

from .tiny import module

FAMILIES: dict[str, tuple[type[FastDecoder], dict[str, Any]]] = {
    "tae": (TAEDecoder, {"width": 8, "blocks": (1, 1, 1, 1)}),
    "subpixel": (SubpixelDecoder, {"widths": (12, 8, 6), "blocks": (1, 1, 1), "convs": 3}),
    "subpixel-4": (SubpixelDecoder, {"widths": (12, 8), "blocks": (1, 1), "convs": 3}),
    "efficientvit": (EfficientViTDecoder, {"widths": (32, 16, 8), "attention_blocks": 1, "residual_blocks": (1, 1)}),
    "temporal": (TAETemporalDecoder, {"width": 32, "blocks": (1, 1, 1, 1)}),
    "streaming": (SubpixelTemporalDecoder, {"widths": (12, 8, 6), "blocks": (2, 1, 1), "memory": (1, 1, 0), "latent_space": "sdxl"}),
}


@pytest.fixture
def grow() -> ModuleType:
    return module("grow")


def made(family: str, **changes: Any) -> FastDecoder:
    """A small decoder none of whose weights is zero, so that nothing is preserved by accident."""
    cls, config = FAMILIES[family]
    decoder = cls(**{**config, **changes})
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return decoder


def latents(*size: int) -> Tensor:
    return torch.randn(2, 4, *(size or (5, 7))) * 2


@torch.no_grad()
def error(a: nn.Module, b: nn.Module, z: Tensor, *rest: Any) -> float:
    return (a(z, *rest) - b(z, *rest)).abs().max().item()


def steps(network: BlockNetwork, count: int, lr: float = 1e-3) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    for _ in range(count):
        optimizer.zero_grad()
        network(latents(), 2).sub(0.3).square().mean().backward()
        optimizer.step()


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


# ---------------------------------------------------------------- upsampling


@pytest.mark.parametrize("family", ["tae", "temporal"])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 4)])
def test_folded_upsampling_is_exact_up_to_the_borders(grow: ModuleType, family: str, size: tuple[int, int]) -> None:
    network = made(family).decoder
    folded = grow.fold_upsampling(network)
    assert type(folded) is type(network)
    assert not any(isinstance(module, nn.Upsample) for module in folded.modules())
    assert sum(isinstance(module, nn.Upsample) for module in network.modules()) == 3
    assert error(network, folded, latents(*size), 2) < 1e-5


def test_folded_upsampling_of_a_preset(grow: ModuleType) -> None:
    network = FastDecoder.from_pretrained("taesdxl").decoder
    assert error(network, grow.fold_upsampling(network), torch.randn(1, 4, 9, 7)) < 1e-4


def test_a_folded_network_tiles_exactly(grow: ModuleType) -> None:
    folded = grow.fold_upsampling(made("tae").decoder)
    assert made("tae").decoder.halo() <= folded.halo() <= made("tae").decoder.halo() + 1
    z = torch.randn(1, 4, 40, 9)
    with torch.no_grad():
        assert (decode_tiled(folded, z, None, 8) - folded(z)).abs().max() < 1e-5


def test_a_bias_is_folded_and_what_does_not_fit_stays(grow: ModuleType) -> None:
    x = torch.randn(1, 3, 5, 4)
    up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, padding=1))
    folded = grow.fold_upsampling(nn.Sequential(up))
    assert isinstance(folded[0][1], nn.PixelShuffle)
    assert torch.allclose(folded(x), up(x), atol=1e-6)
    for conv in (
        nn.Conv2d(3, 5, 3),
        nn.Conv2d(3, 5, 1),
        nn.Conv2d(3, 5, 3, padding=1, stride=2),
        nn.Conv2d(3, 3, 3, padding=1, groups=3),
    ):
        other = nn.Sequential(nn.Upsample(scale_factor=2), conv)
        assert torch.equal(grow.fold_upsampling(other)(x), other(x))
    for other in (nn.Upsample(scale_factor=3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample((10, 8))):
        assert torch.equal(grow.fold_upsampling(nn.Sequential(other, up[1]))(x), up[1](other(x)))


# ---------------------------------------------------------------- last layer


def last_conv(network: BlockNetwork) -> nn.Conv2d:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)][-1]


@pytest.mark.parametrize("family", ["tae", "subpixel", "subpixel-4", "efficientvit", "temporal"])
def test_the_fit_recovers_a_disturbed_last_layer(grow: ModuleType, family: str) -> None:
    network = made(family).decoder.train()
    z = torch.randn(5, 4, 6, 5)
    with torch.no_grad():
        targets = network(z)
        others = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        for parameter in last_conv(network).parameters():
            parameter.add_(torch.randn_like(parameter))
        disturbed = (network(z) - targets).abs().max()
    grow.fit_last_layer(network, z, targets, batch=2)
    with torch.no_grad():
        assert (network(z) - targets).abs().max() < 1e-3 * disturbed
    conv = last_conv(network)
    last = next(name for name, module in network.named_modules() if module is conv)
    assert all(
        torch.equal(tensor, others[name]) for name, tensor in network.state_dict().items() if not name.startswith(f"{last}.")
    )
    assert network.training and not conv._forward_hooks


def test_the_fit_is_least_squares_whatever_the_batches(grow: ModuleType) -> None:
    """Random targets: no other last layer comes nearer, and batches of pictures do not matter."""
    z, targets, fitted = torch.randn(3, 4, 6, 5), torch.randn(3, 3, 48, 40), []
    source = made("subpixel")
    for batch in (1, 3):
        target = made("subpixel")
        grow.grow(source, target)
        grow.fit_last_layer(target.decoder, z, targets, batch=batch)
        fitted.append(target.decoder)
    assert error(fitted[0], fitted[1], z) < 1e-4
    (fitted[0](z) - targets).square().mean().backward()
    (source.decoder(z) - targets).square().mean().backward()
    gradients = [torch.cat([p.grad.flatten() for p in last_conv(n).parameters()]) for n in (fitted[0], source.decoder)]
    assert gradients[0].norm() < 1e-3 * gradients[1].norm()


def test_bad_fits_are_errors(grow: ModuleType) -> None:
    network, z, pictures = made("tae").decoder, torch.randn(1, 4, 2, 3), torch.rand(1, 3, 16, 24)
    for bad in ((z, pictures[..., 1:]), (z, pictures.byte()), (z, pictures, 0.0), (z[:0], pictures[:0])):
        with pytest.raises(ValueError, match="expected latents"):
            grow.fit_last_layer(network, *bad)
    grow.branch(network)
    with pytest.raises(ValueError, match="fold branches first"):
        grow.fit_last_layer(network, z, pictures)


# ---------------------------------------------------------------- branches


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_start_as_nothing_and_fold(grow: ModuleType, family: str) -> None:
    decoder = made(family)
    network, plain = decoder.decoder, {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    halo = network.halo()
    z = latents()
    with torch.no_grad():
        start = network(z, 2)
        grow.branch(network)
        grow.branch(network)  # branches have none of their own
        assert torch.equal(network(z, 2), start)
    assert network.halo() == halo
    steps(network, 2, lr=1e-2)
    branches = [module for module in network.modules() if type(module).__name__ == "BranchedConv"]
    assert len(branches) > 3
    assert all(b.point.abs().min() > 0 for b in branches[-1:])
    with torch.no_grad():
        trained = network(z, 2)
        grow.fold_branches(network)
        assert (trained - start).abs().max() > 1e-3
        assert (network(z, 2) - trained).abs().max() < 1e-5
    assert {name: tensor.shape for name, tensor in decoder.state_dict().items()} == {n: t.shape for n, t in plain.items()}
    assert not any(type(module).__name__ == "BranchedConv" for module in network.modules())
    (FAMILIES[family][0].from_config(decoder.config)).load_state_dict(decoder.state_dict())


@pytest.mark.parametrize("channels", [(6, 6), (6, 4)])
def test_branches_add_up(grow: ModuleType, channels: tuple[int, int]) -> None:
    """One kernel for three branches is the sum of the three outputs, and so are the gradients."""
    branched = grow.BranchedConv(nn.Conv2d(*channels, 3, padding=1))
    nn.init.normal_(branched.point)
    square = channels[0] == channels[1]
    assert (branched.scale is not None) == square
    if square:
        nn.init.normal_(branched.scale)
    x = torch.randn(2, channels[0], 5, 7)
    summed = F.conv2d(x, branched.weight, branched.bias, padding=1) + F.conv2d(x, branched.point[:, :, None, None])
    summed = summed + x * branched.scale.view(-1, 1, 1) if square else summed
    assert (branched(x) - summed).abs().max() < 1e-5
    assert (branched.folded()(x) - summed).abs().max() < 1e-5
    mine, theirs = (torch.autograd.grad(y.square().mean(), list(branched.parameters())) for y in (branched(x), summed))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, theirs, strict=True))


def test_only_plain_convolutions_branch(grow: ModuleType) -> None:
    layers = [
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
    ]
    network = nn.Sequential(*layers, nn.Conv2d(4, 4, 3, padding=1, bias=False))
    grow.branch(network)
    assert [type(module).__name__ for module in network] == ["Conv2d"] * 4 + ["BranchedConv"]
    grow.fold_branches(network)
    assert type(network[4]) is nn.Conv2d and network[4].bias is None
