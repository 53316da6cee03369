"""Subpixel: our own family. Capacity at 1/8 resolution, less at 1/4 and, if at all, 1/2, nothing at full resolution (issue 9).

TAESD spends 55 % of its work at full resolution (FIELD 1e.1). Here every upsampling, the last one to RGB included,
is a convolution followed by a pixel shuffle, and no layer normalises: tiles can be exact and fp16 cannot overflow
through a statistic.
"""

from collections.abc import Callable, Sequence

from torch import nn

from .blocks import BlockNetwork, ResidualBlock, SubpixelUp
from .tae import TAEBlock

BLOCKS: dict[str, Callable[[int, int], nn.Module]] = {"residual": ResidualBlock, "tae": TAEBlock}


class SubpixelNetwork(BlockNetwork):
    """Stages of residual blocks at 1/8, 1/4 and 1/2 of the picture's resolution; with fewer, the last pixel shuffle goes further.

    `block` "tae" takes TAESD's blocks, which end in a ReLU, and a ReLU before the first: so a TAE's stages fit (training/shorten.py).
    """

    def __init__(
        self, latent_channels: int, widths: Sequence[int], blocks: Sequence[int], convs: int, block: str = "residual"
    ) -> None:
        if not 1 <= len(widths) <= 3 or len(blocks) != len(widths) or min(*widths, convs) < 1 or min(blocks) < 0:
            raise ValueError(
                "expected up to three widths and as many block counts (for 1/8, 1/4 and 1/2 resolution), widths and convs at least 1, no count negative; "
                f"got widths {tuple(widths)}, blocks {tuple(blocks)}, convs {convs}"
            )
        if block not in BLOCKS:
            raise ValueError(f"expected block to be one of {', '.join(BLOCKS)}; got {block!r}")
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, widths[0], 3, padding=1)]
        layers += [nn.ReLU()] if block == "tae" else []
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers += [BLOCKS[block](width, convs) for _ in range(count)]
            layers += [SubpixelUp(width, widths[i + 1]) if i + 1 < len(widths) else SubpixelUp(width, 3, 2 ** (4 - len(widths)))]
        super().__init__(layers)
