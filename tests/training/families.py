"""A small decoder of every family, for what is done to networks before and during training."""

from typing import Any

import torch
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

FAMILIES: dict[str, tuple[type[FastDecoder], dict[str, Any]]] = {
    "tae": (TAEDecoder, {"width": 8, "blocks": (1, 1, 1, 1)}),
    "subpixel": (SubpixelDecoder, {"widths": (12, 8, 6), "blocks": (1, 1, 1), "convs": 3}),
    "subpixel-4": (SubpixelDecoder, {"widths": (12, 8), "blocks": (1, 1), "convs": 3}),
    "efficientvit": (EfficientViTDecoder, {"widths": (32, 16, 8), "attention_blocks": 1, "residual_blocks": (1, 1)}),
    "temporal": (TAETemporalDecoder, {"width": 32, "blocks": (1, 1, 1, 1)}),
    "streaming": (SubpixelTemporalDecoder, {"widths": (12, 8, 6), "blocks": (2, 1, 1), "memory": (1, 1, 0), "latent_space": "sdxl"}),
}


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
