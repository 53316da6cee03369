"""A small network of every shape, and what is asked of all of them."""

from collections.abc import Callable

import torch

from fast_latent_decoders.networks.blocks import BlockNetwork
from fast_latent_decoders.networks.efficientvit import EfficientViTNetwork, PublishedEfficientViTNetwork
from fast_latent_decoders.networks.subpixel import SubpixelNetwork
from fast_latent_decoders.networks.tae import TAENetwork
from fast_latent_decoders.networks.temporal import TAETemporalNetwork

SMALL = {
    "tae": lambda channels=4: TAENetwork(channels, 16, (1, 1, 1, 1)),
    "tae of four widths": lambda channels=4: TAENetwork(channels, (16, 12, 8, 4), (1, 1, 1, 1)),
    "tae bilinear": lambda channels=4: TAENetwork(channels, 16, (1, 1, 1, 1), "bilinear"),
    "temporal": lambda channels=4: TAETemporalNetwork(channels, 64, (1, 1, 1, 1)),
    "temporal latent": lambda channels=4: TAETemporalNetwork(channels, 64, (1, 1, 1, 1), mid_block="latent"),
    "efficientvit": lambda channels=4: EfficientViTNetwork(channels, (32, 16, 8), 2, (1, 1)),
    "efficientvit at 1/8": lambda channels=4: EfficientViTNetwork(channels, (32, 16, 8), 2, (1, 1, 1), 3, "tae"),
    "published efficientvit": PublishedEfficientViTNetwork,
    "subpixel": lambda channels=4: SubpixelNetwork(channels, (16, 16, 8), (1, 1, 1), 2),
    "subpixel by 4": lambda channels=4: SubpixelNetwork(channels, (16, 16), (1, 1), 2),
    "subpixel by 8": lambda channels=4: SubpixelNetwork(channels, (16,), (1,), 2),
}


def build(name: str, channels: int = 4) -> BlockNetwork:
    """A small network in evaluation mode that has left its initialisation: nothing is zero, so nothing hides."""
    return perturb(SMALL[name](channels)).eval()


def perturb(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel()  # 1 for biases and gains
            parameter.add_(0.5 / max(fan_in, 25) ** 0.5 * torch.randn_like(parameter))
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.5 * torch.rand_like(buffer))
    return module


def parameters(build: Callable[[], torch.nn.Module]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()
