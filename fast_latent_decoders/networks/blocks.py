"""What every decoder network shares: a flat list of blocks and the one walk over it.

Conventions: tensors are (N, C, H, W); the input is scaled latents, the output pictures, nominally in [-1, 1], not clamped.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

State = list[Tensor]  # of a stream: what each block kept of the last frame, (clips, C, h, w)


def squash(z: Tensor) -> Tensor:
    """Bound scaled latents to (-3, 3), TAESD's input convention (FACTS 2.2): whatever comes in, fp16 stays finite."""
    return 3 * torch.tanh(z / 3)


def frames_of(latents: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Frame by frame (clips, C, h, w) of one clip (frames, C, h, w), several (clips, frames, C, h, w), or an iterable of either.

    Raises ValueError for another shape.
    """
    for part in [latents] if isinstance(latents, Tensor) else latents:
        if part.ndim not in (4, 5):
            raise ValueError(f"expected latents (frames, C, h, w) or (clips, frames, C, h, w), got shape {tuple(part.shape)}")
        yield from (part if part.ndim == 5 else part[None]).unbind(1)


class BlockNetwork(nn.Module):
    """A decoder as data: `layers`, walked from first to last.

    Blocks that mix frames carry ``temporal = True`` and are called as ``block(x, num_frames)``, the others as ``block(x)``.
    Blocks that see the whole picture carry ``is_global = True``: such a network has no finite receptive field.
    Whole and tiled decoding use this walk on different windows of the latents.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] | None = None

    def forward(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Scaled latents (N, C, h, w) to pictures (N, 3, 8h, 8w)."""
        x = squash(z)
        for layer in self.layers:
            x = self.call(layer, x, num_frames) if getattr(layer, "temporal", False) else self.call(layer, x)
        return self.to_picture(x)

    def call(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """One layer, its activations computed again for the gradient where gradient checkpointing is on."""
        checkpoint = self._gradient_checkpointing_func if self.gradient_checkpointing and torch.is_grad_enabled() else None
        return checkpoint(layer, *inputs) if checkpoint else layer(*inputs)

    @property
    def mixes_frames(self) -> bool:
        return any(getattr(layer, "temporal", False) for layer in self.layers)

    @property
    def streams(self) -> bool:
        """Whether frames can be decoded as they come; else a clip is wanted whole."""
        return type(self).stream is not BlockNetwork.stream or not self.mixes_frames

    def stream(self, z: Tensor, num_frames: int, state: State | None = None) -> tuple[Tensor, State]:
        """The next `num_frames` frames of each clip, and what the frames after them need; `state` is that of the frames before.

        Raises TypeError: the network cannot; ValueError: a state of other clips.
        """
        if self.streams:
            return self(z), []
        raise TypeError(f"{type(self).__name__} needs the whole clip at once: decode(latents, num_frames=...)")

    def to_picture(self, x: Tensor) -> Tensor:
        """The last layer's output to [-1, 1]; the identity unless a family says otherwise."""
        return x

    def halo(self) -> int | None:
        """Latents that a tile needs around it for its pixels to be exact; None if the network sees everything.

        Follows the receptive field from the output back to the latents, rounding up at each upsampling.
        """
        halo = 0
        for module in reversed(list(self.modules())):
            if getattr(module, "is_global", False):
                return None
            if isinstance(module, nn.Conv2d):
                halo += (module.kernel_size[0] - 1) // 2 * module.dilation[0]
            elif isinstance(module, nn.PixelShuffle):
                halo = -(-halo // module.upscale_factor)
            elif isinstance(module, nn.Upsample):
                halo = -(-halo // 2)
        return halo


class Residual(nn.Module):
    """A branch `conv` around which the input is carried, and how both are joined."""

    conv: nn.Sequential

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.conv(x))

    def join(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


def convolutions(width: int, count: int) -> nn.Sequential:
    """3x3 convolutions at one width, a ReLU between any two."""
    layers: list[nn.Module] = []
    for i in range(count):
        layers += [nn.ReLU()] if i else []
        layers += [nn.Conv2d(width, width, 3, padding=1)]
    return nn.Sequential(*layers)


class ResidualBlock(Residual):
    """x + conv(relu(... conv(x))), all 3x3 at one width; the last convolution starts at zero, so a new block is the identity."""

    def __init__(self, width: int, convs: int) -> None:
        super().__init__()
        self.conv = convolutions(width, convs)
        zero_init(self.conv[-1])


def zero_init(module: nn.Module) -> nn.Module:
    """All parameters zero: what a residual branch ends with, so that a new block is the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class SubpixelUp(nn.Sequential):
    """`factor` times the resolution by a 3x3 convolution and a pixel shuffle.

    The sub-pixel kernels of a channel start equal (Aitken et al. 2017), as nearest upsampling would be:
    no checkerboard before the first step.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2) -> None:
        phases = factor**2
        conv = nn.Conv2d(in_channels, phases * out_channels, 3, padding=1)
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter.copy_(parameter[::phases].repeat_interleave(phases, dim=0))
        super().__init__(conv, nn.PixelShuffle(factor))
        self.factor = factor
