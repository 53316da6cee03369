"""Latents to train and measure on, from a stand-in for the VAE's encoder (DESIGN 5).

TAESD(XL)'s encoder is a close copy of the full VAE's, with three known faults; each has its cure here:
its stored weights were rounded to float8, so they are drawn anew inside the rounding box; its flat colours are off,
so a share of a colour table is added; and real flat colours are known, so their latents are used with texture transplanted.
"""

from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from fast_latent_decoders import LatentSpace
from fast_latent_decoders.encoder import load_tiny_encoder


class StandInEncoder:
    """TAESD's or TAESDXL's encoder, pictures (N, 3, H, W) in [-1, 1] to scaled latents (N, C, H/8, W/8)."""

    def __init__(self, space: LatentSpace, colour_table: str | None = None, colours: str | None = None) -> None:
        self.channels = space.channels
        self.device = torch.device("cpu")
        self.network = load_tiny_encoder(space).float().to(memory_format=torch.channels_last)
        self.stored = {key: value.clone() for key, value in self.network.state_dict().items()}
        self.table = load_file(colour_table)["delta"] if colour_table else None
        self.colours = load_file(colours) if colours else None

    def to(self, device: torch.device) -> Self:
        """Encode there. What goes in and comes out stays in main memory."""
        self.device = device
        self.network.to(device)
        return self

    def redraw(self, generator: torch.Generator | None) -> None:
        """Draw every convolution weight inside the box that float8 (e4m3) rounding left open; None gives back the stored ones."""
        drawn = dict(self.stored)
        for key, value in self.stored.items():
            if key.endswith("weight") and generator is not None:
                exponent = value.abs().clamp_min(2.0**-20).log2().floor()
                step = (2 ** (exponent - 3)).clamp_min(2.0**-9)
                drawn[key] = value + (torch.rand(value.shape, generator=generator) - 0.5) * step
        self.network.load_state_dict(drawn)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        return self.network(pictures.to(self.device).contiguous(memory_format=torch.channels_last)).float().cpu()

    def table_at(self, pictures: Tensor) -> Tensor:
        """What the colour table would add to the latents of these pictures: real minus stand-in, (N, C, H/8, W/8)."""
        if self.table is None:
            return torch.zeros(len(pictures), self.channels, *(n // 8 for n in pictures.shape[2:]))
        rgb = F.avg_pool2d(pictures, 8).permute(0, 2, 3, 1)[:, None]  # (N, 1, h, w, 3), in [-1, 1] as grid_sample wants it
        # The table's axes are red, green, blue; grid_sample reads the last axis first (weights/README.md).
        delta = F.grid_sample(
            self.table[None].expand(len(pictures), -1, -1, -1, -1), rgb.flip(-1), align_corners=True, padding_mode="border"
        )
        return delta[:, :, 0]

    def transplant(self, texture: Tensor, amplitude: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Real colours with a texture on them: latents real(c) + E(c + t) - E(c) and their target c + t.

        Args:
            texture: (N, 3, H, W), pictures in [-1, 1] whose departure from their own mean is the texture.
            amplitude: (N,), what that departure is multiplied by; 0 is a flat colour.
            index: (N,), which of the real colours.
        """
        assert self.colours is not None, "expected a file of real colours, got none; give `colours`"
        flat = (self.colours["srgb"][index] * 2 - 1)[:, :, None, None].expand_as(texture)
        residual = texture - texture.mean(dim=(2, 3), keepdim=True)
        target = (flat + amplitude[:, None, None, None] * residual).clamp(-1, 1)
        real = self.colours["latent"][index][:, :, None, None]
        both = self.encode(torch.cat([target, flat]))
        return real + both[: len(target)] - both[len(target) :], target
