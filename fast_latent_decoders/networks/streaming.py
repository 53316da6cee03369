"""Subpixel for clips: some low-resolution blocks also see the frame before, so that a clip can be decoded as it comes (issue 13).

A block that reads the previous frame's features beside its own (Bohan's MemBlock, FIELD 1a) is causal and needs no statistics:
what a later frame needs of an earlier one is one feature map for each such block, and that is the whole state of a stream.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blocks import Residual, ResidualBlock, State, squash
from .subpixel import SubpixelNetwork
from .tae import TAEBlock

PIXELS = 2**20  # decoded at once: more frames together gain no speed, and take memory


class MemoryConv(nn.Conv2d):
    """A 3x3 convolution of (frame, frame before), 2*width channels to width, as the sum of one of each.

    The same as one of both side by side, up to rounding, without the copy that lays them there (RESULTS.md, "Streaming").
    """

    def __init__(self, width: int) -> None:
        super().__init__(2 * width, width, 3, padding=1)

    def forward(self, x: Tensor, num_frames: int = 1, past: Tensor | None = None) -> Tensor:
        """(clips*frames, width, h, w) to the same; `past` (clips, width, h, w) is what came before each clip, None: nothing, zeros.

        Raises ValueError: a past of other clips.
        """
        frames = x.unflatten(0, (-1, num_frames))
        if past is not None and past.shape != frames[:, 0].shape:
            raise ValueError(f"expected the state of as many clips of this size, {tuple(frames[:, 0].shape)}; got {tuple(past.shape)}")
        this, before = self.weight.chunk(2, 1)
        result = self._conv_forward(x, this, self.bias)
        clips = result.unflatten(0, (-1, num_frames))
        if num_frames > 1:
            clips[:, 1:] += self._conv_forward(frames[:, :-1].flatten(0, 1), before, None).unflatten(0, (-1, num_frames - 1))
        if past is not None:
            clips[:, 0] += self._conv_forward(past, before, None)
        return result


class Memory(Residual):
    """A residual block whose first convolution reads (frame, frame before); new, it ignores the frame before."""

    temporal = True

    def __init__(self, width: int, convs: int) -> None:
        super().__init__(width, convs)
        plain = self.conv[0].state_dict()
        self.conv[0] = MemoryConv(width)
        self.conv[0].load_state_dict({**plain, "weight": torch.cat([plain["weight"], torch.zeros_like(plain["weight"])], 1)})

    def forward(self, x: Tensor, num_frames: int | None = None, past: Tensor | None = None) -> Tensor:
        """(clips*frames, C, h, w) to the same, `past` as in `MemoryConv`."""
        first, *others = self.conv
        residual = first(x, num_frames or 1, past)
        for layer in others:
            residual = layer(residual)
        return self.join(x, residual)


class MemoryResidualBlock(Memory, ResidualBlock):
    pass


class MemoryTAEBlock(Memory, TAEBlock):
    pass


MEMORY: dict[type[nn.Module], type[Memory]] = {ResidualBlock: MemoryResidualBlock, TAEBlock: MemoryTAEBlock}


class SubpixelTemporalNetwork(SubpixelNetwork):
    """`SubpixelNetwork` in which the last `memory` blocks of each stage also see the frame before.

    Scaled latents (clips*frames, latent_channels, h, w) to pictures. Frames go through a few at a time, so the memory of a clip does
    not grow with its length; with gradients they go all at once.
    """

    def __init__(
        self, latent_channels: int, widths: Sequence[int], blocks: Sequence[int], convs: int, block: str = "residual", memory: Sequence[int] = (1, 1, 0)
    ) -> None:
        super().__init__(latent_channels, widths, blocks, convs, block)
        if len(memory) != len(blocks) or any(not 0 <= mine <= count for mine, count in zip(memory, blocks, strict=True)):
            raise ValueError(f"expected a number of memory blocks for each stage, from 0 to the stage's blocks {tuple(blocks)}; got {tuple(memory)}")
        places = iter([i for i, layer in enumerate(self.layers) if isinstance(layer, Residual)])
        for width, count, remembering in zip(widths, blocks, memory, strict=True):
            for i in range(count):
                place = next(places)
                if i >= count - remembering:
                    self.layers[place] = MEMORY[type(self.layers[place])](width, convs)

    def stream(self, z: Tensor, num_frames: int, state: State | None = None) -> tuple[Tensor, State]:
        count = sum(isinstance(layer, Memory) for layer in self.layers)
        if state is not None and len(state) != count:
            raise ValueError(f"expected a state of this network, {count} tensors; got {len(state)}")
        x = squash(z)
        kept: State = []
        for layer in self.layers:
            if isinstance(layer, Memory):
                past = state[len(kept)] if state is not None else None
                kept.append(x.unflatten(0, (-1, num_frames))[:, -1].clone())  # or all frames would be kept with it
                x = self.call(layer, x, num_frames, past)
            else:
                x = self.call(layer, x)
        return self.to_picture(x), kept

    def forward(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Raises ValueError if the batch is not made of whole clips."""
        frames = num_frames or 1
        if len(z) % frames:
            raise ValueError(f"expected a batch of whole clips, that is clips * num_frames latents; got {len(z)} latents and num_frames {num_frames}")
        at_once = frames if torch.is_grad_enabled() else max(1, PIXELS // (len(z) // frames * 64 * z.shape[2] * z.shape[3]))
        if num_frames is None or at_once >= frames:
            return self.stream(z, frames)[0]
        sample: Tensor | None = None
        state: State | None = None
        for start in range(0, frames, at_once):
            part = z.unflatten(0, (-1, frames))[:, start : start + at_once]
            pictures, state = self.stream(part.flatten(0, 1), part.shape[1], state)
            if sample is None:
                sample = pictures.new_empty(len(part), frames, *pictures.shape[1:])
            sample[:, start : start + at_once] = pictures.unflatten(0, part.shape[:2])
        assert sample is not None
        return sample.flatten(0, 1)
