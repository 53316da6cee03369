"""Colours of real latents: no stand-in encoder is between the truth and what is measured (DESIGN 5)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decoders import Candidate
from .encoders import FrozenEncoder

SIDE = 32  # latents of a flat picture; of its decode the centre is taken, where no border is seen
CENTRE = 128  # px


@dataclass(frozen=True)
class Colours:
    """Error of flat colours, and the colours themselves for a swatch sheet."""

    psnr: float  # dB, of the error of all pixels of all colours
    p95: float  # of the colours' mean errors' largest channel, in 1/255
    worst: float
    asked: Tensor  # (N, 3) in [0, 1]
    decoded: Tensor  # (N, 3), means over the centre


def flat_colours(decode: Callable[[Tensor, int], Tensor], encoder: FrozenEncoder, every: int = 1) -> Colours:
    """Each `every`-th of the real latents of flat colours, constant over 32x32, decoded one batch at a time; the centre 128 px count."""
    assert encoder.colours is not None, "expected latents of flat colours"
    asked, latents = (encoder.colours[key][::every] for key in ("srgb", "latent"))
    edge = (8 * SIDE - CENTRE) // 2
    squares, means = 0.0, []
    for colours, z in zip(asked.split(8), latents.split(8), strict=True):
        y = decode(z[:, :, None, None].expand(-1, -1, SIDE, SIDE), 1)[..., edge:-edge, edge:-edge].float()
        y = (y.clamp(-1, 1) + 1) / 2
        squares += (y - colours[:, :, None, None]).double().square().mean(dim=(1, 2, 3)).sum().item()
        means.append(y.mean(dim=(2, 3)))
    decoded = torch.cat(means)
    errors = (decoded - asked).abs().amax(1) * 255
    psnr = -10 * float(np.log10(max(squares / len(asked), 1e-12)))
    return Colours(psnr, errors.quantile(0.95).item(), errors.max().item(), asked, decoded)


def textured_colours(candidate: Candidate, encoder: FrozenEncoder, textures: Tensor, amplitude: float = 0.1, seed: int = 0) -> float:
    """PSNR in dB of real colours with photographs' residuals on them: latents real(c) + E(c + t) - E(c), picture c + t.

    Args:
        textures: (N, 3, H, W) in [-1, 1]; each lends its departure from its mean, times `amplitude`, to one colour drawn by `seed`.
    """
    assert encoder.colours is not None
    index = torch.randint(len(encoder.colours["srgb"]), (len(textures),), generator=torch.Generator().manual_seed(seed))
    z, target = encoder.transplant(textures, torch.full((len(textures),), amplitude), index)
    error = candidate.decode(z, 1).clamp(-1, 1) - target
    return -10 * float(np.log10(max(error.square().mean().item() / 4, 1e-12)))


def draw_swatches(colours: Colours, count: int = 256, side: int = 24) -> Image.Image:
    """Pairs of squares, above asked for and below decoded, spread over the colours by brightness."""
    order = colours.asked.mean(1).argsort()[torch.linspace(0, len(colours.asked) - 1, min(count, len(colours.asked))).long()]
    columns = int(np.ceil(np.sqrt(len(order) * 2)))
    rows = -(-len(order) // columns)
    sheet = np.full((rows * (2 * side + 4), columns * (side + 2), 3), 255, np.uint8)
    for place, i in enumerate(order.tolist()):
        top, left = place // columns * (2 * side + 4), place % columns * (side + 2)
        for row, colour in enumerate((colours.asked[i], colours.decoded[i])):
            sheet[top + row * side : top + (row + 1) * side, left : left + side] = (colour * 255).round().numpy()
    return Image.fromarray(sheet)
