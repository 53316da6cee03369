"""What a decoder does with latents that no encoder makes: noise, extremes, constants, odd shapes (issue 12).

Diffusion models hand such latents over, and float16 ends at 65504: how near activations come is measured on every one of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .check import _copy

if TYPE_CHECKING:
    from ..decoder import FastDecoder

SIDE = 32  # latents
LIMIT = 2.0**14  # of an activation: a quarter of what float16 holds (DESIGN 1.3.6)
HALVES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One input: the largest |activation| and |output| in float32; of each half type the largest difference in 1/255, None: not finite."""

    name: str
    activation: float
    output: float
    differences: dict[str, float | None]

    @property
    def passed(self) -> bool:
        return self.activation < LIMIT and None not in self.differences.values()

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def inputs(channels: int) -> Iterator[tuple[str, Tensor]]:
    """Name -> scaled latents (1, C, h, w); what is like a picture's is smooth, with a spread of about one."""
    generator = torch.Generator().manual_seed(0)

    def noise(height: int, width: int) -> Tensor:
        return torch.randn(1, channels, height, width, generator=generator)

    smooth = nn.functional.interpolate(noise(6, 6), size=(SIDE, SIDE), mode="bicubic")
    yield "smooth", smooth
    for amount in (0.1, 0.5, 1.0):
        yield f"smooth + {amount:g} x noise", smooth + amount * noise(SIDE, SIDE)
    for size in (3, 10, 100):
        yield f"noise, |z| to {size}", (size / 3 * noise(SIDE, SIDE)).clamp(-size, size)
    for value in (0, 1, 100, -100):
        yield f"constant {value}", torch.full((1, channels, 8, 8), float(value))
    yield "corners of +-100", 100 * noise(SIDE, SIDE).sign()
    yield "1 x 1", noise(1, 1)
    yield "2 x 512", noise(2, 512)
    yield "512 x 1", noise(512, 1)


@torch.inference_mode()
def robustness(decoder: "FastDecoder", device: str = "cpu") -> list[Case]:
    """Every input in float32 and in both half types. The decoder itself is not changed."""
    exact = _copy(decoder, device, "float32", "channels_last")
    halves = {name: _copy(decoder, device, name, "channels_last") for name in HALVES}
    seen: list[float] = []
    for module in exact.modules():
        if not list(module.children()):
            module.register_forward_hook(_watch(seen))
    found = []
    for name, z in inputs(decoder.latent_space.channels):
        seen.clear()
        picture = exact(z.to(device))
        expected = picture.clamp(-1, 1)
        differences: dict[str, float | None] = {}
        for dtype, network in halves.items():
            made = network(z.to(device, getattr(torch, dtype))).float()
            difference = (made.clamp(-1, 1) - expected).abs().max().item() * 127.5
            differences[dtype] = difference if torch.isfinite(made).all() else None
        found.append(Case(name, max(seen), picture.abs().max().item(), differences))
    return found


def _watch(seen: list[float]) -> Callable[[nn.Module, Any, Tensor], None]:
    return lambda module, given, result: seen.append(result.abs().max().item())
