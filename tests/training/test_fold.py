"""Networks in another form: folded upsampling, and branches that fold away."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fast_latent_decoders import FastDecoder
from fast_latent_decoders.tiling import decode_tiled

from .families import FAMILIES, error, latents, made, steps
from .tiny import module


@pytest.fixture
def fold() -> ModuleType:
    return module("fold")


# ---------------------------------------------------------------- upsampling


@pytest.mark.parametrize("family", ["tae", "temporal"])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 4)])
def test_folded_upsampling_is_exact_up_to_the_borders(fold: ModuleType, family: str, size: tuple[int, int]) -> None:
    network = made(family).decoder
    folded = fold.fold_upsampling(network)
    assert type(folded) is type(network)
    assert not any(isinstance(module, nn.Upsample) for module in folded.modules())
    assert sum(isinstance(module, nn.Upsample) for module in network.modules()) == 3
    assert error(network, folded, latents(*size), 2) < 1e-5


def test_folded_upsampling_of_a_preset(fold: ModuleType) -> None:
    network = FastDecoder.from_pretrained("taesdxl").decoder
    assert error(network, fold.fold_upsampling(network), torch.randn(1, 4, 9, 7)) < 1e-4


def test_a_folded_network_tiles_exactly(fold: ModuleType) -> None:
    folded = fold.fold_upsampling(made("tae").decoder)
    assert made("tae").decoder.halo() <= folded.halo() <= made("tae").decoder.halo() + 1
    z = torch.randn(1, 4, 40, 9)
    with torch.no_grad():
        assert (decode_tiled(folded, z, None, 8) - folded(z)).abs().max() < 1e-5


def test_a_bias_is_folded_and_what_does_not_fit_stays(fold: ModuleType) -> None:
    x = torch.randn(1, 3, 5, 4)
    up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, padding=1))
    folded = fold.fold_upsampling(nn.Sequential(up))
    assert isinstance(folded[0][1], nn.PixelShuffle)
    assert torch.allclose(folded(x), up(x), atol=1e-6)
    for conv in (
        nn.Conv2d(3, 5, 3),
        nn.Conv2d(3, 5, 1),
        nn.Conv2d(3, 5, 3, padding=1, stride=2),
        nn.Conv2d(3, 3, 3, padding=1, groups=3),
    ):
        other = nn.Sequential(nn.Upsample(scale_factor=2), conv)
        assert torch.equal(fold.fold_upsampling(other)(x), other(x))
    for other in (nn.Upsample(scale_factor=3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample((10, 8))):
        assert torch.equal(fold.fold_upsampling(nn.Sequential(other, up[1]))(x), up[1](other(x)))


# ---------------------------------------------------------------- branches


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_start_as_nothing_and_fold(fold: ModuleType, family: str) -> None:
    decoder = made(family)
    network, plain = decoder.decoder, {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    halo = network.halo()
    z = latents()
    with torch.no_grad():
        start = network(z, 2)
        fold.branch(network)
        fold.branch(network)  # branches have none of their own
        assert torch.equal(network(z, 2), start)
    assert network.halo() == halo
    steps(network, 2, lr=1e-2)
    branches = [module for module in network.modules() if type(module).__name__ == "BranchedConv"]
    assert len(branches) > 3
    assert all(b.point.abs().min() > 0 for b in branches[-1:])
    with torch.no_grad():
        trained = network(z, 2)
        fold.fold_branches(network)
        assert (trained - start).abs().max() > 1e-3
        assert (network(z, 2) - trained).abs().max() < 1e-5
    assert {name: tensor.shape for name, tensor in decoder.state_dict().items()} == {n: t.shape for n, t in plain.items()}
    assert not any(type(module).__name__ == "BranchedConv" for module in network.modules())
    (FAMILIES[family][0].from_config(decoder.config)).load_state_dict(decoder.state_dict())


@pytest.mark.parametrize("channels", [(6, 6), (6, 4)])
def test_branches_add_up(fold: ModuleType, channels: tuple[int, int]) -> None:
    """One kernel for three branches is the sum of the three outputs, and so are the gradients."""
    branched = fold.BranchedConv(nn.Conv2d(*channels, 3, padding=1))
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


def test_only_plain_convolutions_branch(fold: ModuleType) -> None:
    layers = [
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
    ]
    network = nn.Sequential(*layers, nn.Conv2d(4, 4, 3, padding=1, bias=False))
    fold.branch(network)
    assert [type(module).__name__ for module in network] == ["Conv2d"] * 4 + ["BranchedConv"]
    fold.fold_branches(network)
    assert type(network[4]) is nn.Conv2d and network[4].bias is None
