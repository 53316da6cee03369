"""Flat colours as the inside of an endless surface shows them.

In a crop of 128 px every pixel sees the border and its zeros, so colours that are learnt from crops are those beside a border;
inside a large surface they come out otherwise (RESULTS.md, "Colours away from the border"). A network that normalises by the whole
picture takes its border in everywhere, so that no endless surface is like one of a picture: it is shown ones of 256 px instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fast_latent_decoders.evaluation.colour import SIDE
from fast_latent_decoders.networks.blocks import BlockNetwork

FLAT_COLOURS = 64  # of a step: as many latents as a crop of 128 px


def takes_all_in(network: nn.Module) -> bool:
    """Whether what a network makes of a surface's inside depends on its border, however far away."""
    return any(isinstance(module, nn.GroupNorm) for module in network.modules())


@contextmanager
def endless(network: nn.Module) -> Iterator[None]:
    """A network whose latents go on beyond every edge as they began: what it makes of a few is the inside of an endless surface.

    Convolutions over time keep their zeros: a clip has a beginning. Nothing changes where the network takes all of a surface in.
    """
    convs = [] if takes_all_in(network) else [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    changed = [m for m in convs if m.padding_mode == "zeros" and m.padding[0] == m.padding[1] != 0]
    for conv in changed:
        conv.padding_mode = "circular"
    try:
        yield
    finally:
        for conv in changed:
            conv.padding_mode = "zeros"


def surfaces(network: BlockNetwork, srgb: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, int]:
    """Colours (N, 3) in [0, 1] and their scaled latents (N, C) as latents and targets of endless surfaces, and the frames of each.

    For a network that mixes frames they are clips of two that stand still: one frame with a past, one without. Call it in `endless`.
    One that takes all of a surface in gets 256 px of each 64th colour, one frame: sixteen times as many latents.
    """
    if takes_all_in(network):
        frames, side, srgb, latents = 1, SIDE, srgb[::FLAT_COLOURS], latents[::FLAT_COLOURS]
    else:
        frames, side = 2 if network.mixes_frames else 1, 2  # what a 5x5 convolution can be wrapped round
    z = latents.repeat_interleave(frames, 0)[:, :, None, None].expand(-1, -1, side, side)
    target = (srgb * 2 - 1).repeat_interleave(frames, 0)[:, :, None, None].expand(-1, -1, 8 * side, 8 * side)
    return z, target, frames


def flat(network: BlockNetwork, colours: dict[str, Tensor], count: int, seed: int) -> Tensor:
    """The loss term: L1 of `count` real colours of endless surfaces, drawn by `seed`; beyond white and black nothing is asked."""
    rows = torch.randint(len(colours["srgb"]), (count,), generator=torch.Generator().manual_seed(seed))
    device = next(network.parameters()).device
    z, target, frames = surfaces(network, *(colours[key][rows].to(device) for key in ("srgb", "latent")))
    with endless(network):
        decoded = network(z.contiguous(memory_format=torch.channels_last), frames).float()
    return (decoded.clamp(-1, 1) - target).abs().mean()
