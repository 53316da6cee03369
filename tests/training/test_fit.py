"""The fit of a last layer."""

from types import ModuleType

import pytest
import torch
from torch import nn

from fast_latent_decoders.networks.blocks import BlockNetwork

from .families import error, made
from .tiny import module


@pytest.fixture
def fit() -> ModuleType:
    return module("fit")


def last_conv(network: BlockNetwork) -> nn.Conv2d:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)][-1]


@pytest.mark.parametrize("family", ["tae", "subpixel", "subpixel-4", "efficientvit", "temporal"])
def test_the_fit_recovers_a_disturbed_last_layer(fit: ModuleType, family: str) -> None:
    network = made(family).decoder.train()
    z = torch.randn(5, 4, 6, 5)
    with torch.no_grad():
        targets = network(z)
        others = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        for parameter in last_conv(network).parameters():
            parameter.add_(torch.randn_like(parameter))
        disturbed = (network(z) - targets).abs().max()
    fit.fit_last_layer(network, z, targets, batch=2)
    with torch.no_grad():
        assert (network(z) - targets).abs().max() < 1e-3 * disturbed
    conv = last_conv(network)
    last = next(name for name, module in network.named_modules() if module is conv)
    assert all(
        torch.equal(tensor, others[name]) for name, tensor in network.state_dict().items() if not name.startswith(f"{last}.")
    )
    assert network.training and not conv._forward_hooks


def test_the_fit_is_least_squares_whatever_the_batches(fit: ModuleType) -> None:
    """Random targets: no other last layer comes nearer, and batches of pictures do not matter."""
    z, targets, fitted = torch.randn(3, 4, 6, 5), torch.randn(3, 3, 48, 40), []
    source = made("subpixel")
    for batch in (1, 3):
        target = made("subpixel")
        module("grow").grow(source, target)
        fit.fit_last_layer(target.decoder, z, targets, batch=batch)
        fitted.append(target.decoder)
    assert error(fitted[0], fitted[1], z) < 1e-4
    (fitted[0](z) - targets).square().mean().backward()
    (source.decoder(z) - targets).square().mean().backward()
    gradients = [torch.cat([p.grad.flatten() for p in last_conv(n).parameters()]) for n in (fitted[0], source.decoder)]
    assert gradients[0].norm() < 1e-3 * gradients[1].norm()


def test_what_has_no_targets_stays(fit: ModuleType) -> None:
    """The more weight samples without targets have, the less those with targets change the network there."""
    z, targets, held = torch.randn(2, 4, 6, 5), torch.randn(2, 3, 48, 40), torch.randn(6, 4, 6, 5)
    source, moved, missed = made("subpixel"), [], []
    for weight in (0.1, 10.0):
        target = made("subpixel")
        module("grow").grow(source, target)
        fitted = fit.LastLayerFit(target.decoder)
        fitted.add(held, None, weight, positions=500)
        fitted.add(z, targets)
        fitted.solve()
        moved.append((target.decoder(held) - source.decoder(held)).square().mean())
        missed.append((target.decoder(z) - targets).square().mean())
    assert moved[1] < moved[0] / 2
    assert missed[0] < missed[1] < (source.decoder(z) - targets).square().mean()


def test_bad_fits_are_errors(fit: ModuleType) -> None:
    network, z, pictures = made("tae").decoder, torch.randn(1, 4, 2, 3), torch.rand(1, 3, 16, 24)
    for bad in ((z, pictures[..., 1:]), (z, pictures.byte()), (z[:0], pictures[:0])):
        with pytest.raises(ValueError, match="expected latents"):
            fit.fit_last_layer(network, *bad)
    with pytest.raises(ValueError, match=r"a ridge above 0, got ridge 0\.0 and some samples"):
        fit.fit_last_layer(network, z, pictures, 0.0)
    with pytest.raises(ValueError, match="and no samples"):
        fit.LastLayerFit(network).solve()
    with pytest.raises(ValueError, match=r"\(M \* 2, C, h, w\)"):
        fit.LastLayerFit(network).add(z, pictures, frames=2)
    module("fold").branch(network)
    with pytest.raises(ValueError, match="fold branches first"):
        fit.fit_last_layer(network, z, pictures)
