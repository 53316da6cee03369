"""What every decoder network does: shapes, halos, number formats, and what training and export need."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fast_latent_decoders.networks.efficientvit import EfficientViTNetwork, PublishedEfficientViTNetwork
from fast_latent_decoders.networks.tae import TAENetwork
from fast_latent_decoders.networks.temporal import TAETemporalNetwork

from .small import SMALL, build, largest_difference

small = pytest.mark.parametrize("name", SMALL)


@small
@pytest.mark.parametrize(("channels", "shape"), [(4, (1, 3, 5)), (4, (2, 1, 1)), (16, (1, 4, 2))])
def test_eight_times_the_latents(name, channels, shape):
    n, h, w = shape
    z = torch.randn(n, channels, h, w)
    with torch.no_grad():
        assert build(name, channels)(z).shape == (n, 3, 8 * h, 8 * w)


@small
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_finite_on_hostile_latents(name, dtype):
    network = build(name).to(dtype)
    hostile = torch.cat([1e4 * torch.randn(1, 4, 4, 4), torch.full((1, 4, 4, 4), 6e4), torch.zeros(1, 4, 4, 4)])
    with torch.no_grad():
        pictures = network(hostile.to(dtype))
    assert pictures.dtype == dtype and pictures.isfinite().all()


@small
def test_memory_layout_changes_nothing(name):
    network, z = build(name), torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        expected = network(z)
        channels_last = network.to(memory_format=torch.channels_last)(z.contiguous(memory_format=torch.channels_last))
    assert largest_difference(channels_last, expected) < 1e-5


@small
def test_gradient_checkpointing_gives_the_same_gradients(name):
    network, z = build(name), torch.randn(2, 4, 4, 4)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        network(z, num_frames=2).square().mean().backward()
        return [parameter.grad for parameter in network.parameters()]

    expected = gradients()
    network.gradient_checkpointing = True
    network._gradient_checkpointing_func = lambda layer, *inputs: checkpoint(layer, *inputs, use_reentrant=False)
    for gradient, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)
    assert all(gradient.any() for gradient in expected)


@small
def test_compiles_as_one_graph(name):
    torch.compiler.reset()
    network, z = build(name), torch.randn(2, 4, 3, 4)
    with torch.no_grad():
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)(z, num_frames=2)
        assert largest_difference(compiled, network(z, num_frames=2)) < 1e-5


@small
def test_gradients_under_autocast_point_the_same_way(name):
    # On one x86 processor a bfloat16 Conv3d had NaN gradients: finite is not to be taken for granted.
    network, z = build(name), torch.randn(2, 4, 4, 4)

    def gradient(autocast: bool) -> torch.Tensor:
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            pictures = network(z, num_frames=2)
        pictures.float().square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    assert torch.cosine_similarity(gradient(True), gradient(False), dim=0) > 0.99


@pytest.mark.parametrize(
    ("network", "halo"),
    [
        (lambda: TAENetwork(4, 8), 19),
        (lambda: TAENetwork(4, 8, (3, 2, 2, 1), "bilinear"), 18),
        (lambda: PublishedEfficientViTNetwork(4), 16),
        (lambda: TAETemporalNetwork(4, 32), None),
        (lambda: EfficientViTNetwork(4), None),
    ],
)
def test_halo(network, halo):
    with torch.device("meta"):
        assert network().halo() == halo


@pytest.mark.parametrize("name", ["tae", "tae bilinear", "published efficientvit", "subpixel", "subpixel by 4", "subpixel by 8"])
def test_nothing_reaches_past_the_halo(name):
    network = build(name)
    halo = network.halo()
    # A row of latents; the pixels of the one in the middle must not depend on those past the halo.
    z = torch.randn(1, 4, 1, 2 * halo + 5, requires_grad=True)
    middle = halo + 2
    network(z)[..., 8 * middle : 8 * middle + 8].abs().sum().backward()
    assert z.grad[..., : middle - halo].abs().max() == 0 and z.grad[..., middle + halo + 1 :].abs().max() == 0
