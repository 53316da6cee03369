"""TAE: the paper's decoder, TAESD's layer list at any width (FACTS 2.2), or at one width for each resolution.

Tensor names and maths are those of diffusers' `DecoderTiny`, so the weights of an `AutoencoderTiny` decoder load as they are
and ours can be exported as one.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from .blocks import BlockNetwork, Residual, convolutions

UPSAMPLINGS = ("nearest", "bilinear")


class TAENetwork(BlockNetwork):
    """Four stages of residual blocks, at 1/8, 1/4, 1/2 and full resolution.

    Scaled latents (N, latent_channels, h, w) to pictures (N, 3, 8h, 8w), nominally in [-1, 1].
    The published TAE-192 is ``TAENetwork(4, 192)``, TAESD is ``TAENetwork(4, 64)``. Four widths, one for each stage, are no
    published shape: (192, 192, 64, 64) has a fifth of TAE-192's work, nearly all of which is at 1/2 and full resolution
    (FACTS 2.4, 2.6). The convolution behind an upsampling goes from one width to the next.
    Raises ValueError for a width below 1, anything but one or four widths and four block counts, or an unknown upsampling.
    """

    def __init__(
        self, latent_channels: int, width: int | Sequence[int], blocks: Sequence[int] = (3, 3, 3, 1), upsampling: str = "nearest"
    ) -> None:
        widths = stage_widths(width)
        if len(widths) != 4 or min(widths) < 1 or len(blocks) != 4 or min(blocks) < 0:
            raise ValueError(
                "expected a width of at least 1, or four, and four block counts (for 1/8, 1/4, 1/2 and full resolution) of at "
                f"least 0; got width {width}, blocks {tuple(blocks)}"
            )
        if upsampling not in UPSAMPLINGS:
            raise ValueError(f"expected upsampling to be one of {', '.join(UPSAMPLINGS)}; got {upsampling!r}")
        # Positions are tensor names: nothing may move.
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for count, this, following in zip(blocks[:-1], widths[:-1], widths[1:], strict=True):
            layers += [TAEBlock(this) for _ in range(count)]
            layers += [nn.Upsample(scale_factor=2, mode=upsampling), nn.Conv2d(this, following, 3, padding=1, bias=False)]
        layers += [TAEBlock(widths[-1]) for _ in range(blocks[-1])]
        super().__init__([*layers, nn.Conv2d(widths[-1], 3, 3, padding=1)])

    def to_picture(self, x: Tensor) -> Tensor:
        """The layers end in [0, 1]."""
        return x.mul(2).sub(1)

    def halo(self) -> int | None:
        """As in `BlockNetwork`. Bilinear upsampling reads one more neighbour at each step: 1 + 1/2 + 1/4 latents, so two."""
        halo = super().halo()
        bilinear = any(isinstance(layer, nn.Upsample) and layer.mode == "bilinear" for layer in self.layers)
        return halo + 2 if halo is not None and bilinear else halo


def stage_widths(width: int | Sequence[int]) -> tuple[int, ...]:
    """A TAE's channels at 1/8, 1/4, 1/2 and full resolution, from its configuration's `width`."""
    return (width,) * 4 if isinstance(width, int) else tuple(width)


class TAEBlock(Residual):
    """relu(x + conv(relu(... conv(x)))), all 3x3 at one width; three convolutions in every TAE."""

    def __init__(self, width: int, convs: int = 3) -> None:
        super().__init__()
        self.conv = convolutions(width, convs)
        self.relu = nn.ReLU()

    def join(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.relu(residual + x)
