"""Decoding in strips: rows of latents go through the network one after the other, and every layer keeps the few rows that its
next ones need. Nothing is computed twice and nothing blended: the picture is the whole decode's, in the memory of a strip.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .networks.blocks import BlockNetwork, Residual, squash

SPATIAL_FACTOR = 8  # every family (DESIGN 1.3.9)

POINTWISE = (nn.ReLU, nn.SiLU, nn.Identity, nn.PixelShuffle)  # what looks at no neighbour


class Strips:
    """Any part of a network that is fed strips along `dim` (2: rows, 3: columns), in order, and gives what is known by then."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def push(self, x: Tensor, *, last: bool) -> Tensor:
        """The next strip of the input, at least one row, to the next strip of the output, perhaps an empty one (the last never is)."""
        raise NotImplementedError

    def cut(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x.narrow(self.dim, start, max(0, stop - start))

    def joined(self, kept: Tensor | None, x: Tensor) -> Tensor:
        return x if kept is None or not kept.shape[self.dim] else torch.cat([kept, x], self.dim)


class Pointwise(Strips):
    def __init__(self, module: nn.Module, dim: int) -> None:
        super().__init__(dim)
        self.module = module

    def push(self, x: Tensor, *, last: bool) -> Tensor:
        return self.module(x)


class Convolution(Strips):
    """A convolution whose padding p keeps the size: its next outputs need 2p earlier rows.

    The module itself is called, padding and all, and the outputs that met a padding inside the picture are cut off: what wraps the
    module sees the call.
    """

    def __init__(self, module: nn.Conv2d, dim: int) -> None:
        super().__init__(dim)
        self.module, self.padding = module, int(module.padding[dim - 2])
        self.kept: Tensor | None = None
        self.dropped = self.given = 0  # rows before those kept, rows given out

    def push(self, x: Tensor, *, last: bool) -> Tensor:
        x = self.joined(self.kept, x)
        rows = x.shape[self.dim]
        stop = rows if last else max(rows - self.padding, self.given - self.dropped)
        y = self.cut(self.module(x), self.given - self.dropped, stop)
        self.given = self.dropped + stop
        start = max(0, rows - 2 * self.padding)
        self.kept = self.cut(x, start, rows).clone()  # or the whole strip would be kept with it
        self.dropped += start
        return y


class Chain(Strips):
    def __init__(self, modules: Iterable[nn.Module], dim: int) -> None:
        super().__init__(dim)
        self.parts = [open_strips(module, dim) for module in modules]

    def push(self, x: Tensor, *, last: bool) -> Tensor:
        for part in self.parts:
            if x.shape[self.dim]:
                x = part.push(x, last=last)
        return x


class Skip(Strips):
    """A residual block: what goes around the branch waits until the branch has caught up."""

    def __init__(self, module: Residual, dim: int) -> None:
        super().__init__(dim)
        self.module, self.branch = module, open_strips(module.conv, dim)
        self.waiting: Tensor | None = None

    def push(self, x: Tensor, *, last: bool) -> Tensor:
        residual = self.branch.push(x, last=last)
        x, rows = self.joined(self.waiting, x), residual.shape[self.dim]
        self.waiting = self.cut(x, rows, x.shape[self.dim]).clone()
        x = self.cut(x, 0, rows)
        return self.module.join(x, residual) if rows else x


class Unsupported(TypeError):
    """A module that strips cannot go through."""


def open_strips(module: nn.Module, dim: int) -> Strips:
    """Raises Unsupported for a module that sees more than a few neighbours, or of an unknown kind."""
    if isinstance(module, nn.Conv2d):
        i = dim - 2
        if isinstance(module.padding, str) or module.stride[i] != 1 or 2 * int(module.padding[i]) != module.dilation[i] * (module.kernel_size[i] - 1):
            raise Unsupported
        return Convolution(module, dim)
    if isinstance(module, Residual) and not getattr(module, "temporal", False):
        return Skip(module, dim)
    if isinstance(module, nn.Sequential):
        return Chain(module, dim)
    if isinstance(module, POINTWISE) or (isinstance(module, nn.Upsample) and module.mode == "nearest"):
        return Pointwise(module, dim)
    raise Unsupported


def decode_strips(network: BlockNetwork, z: Tensor, size: int) -> Tensor:
    """Scaled latents (N, C, h, w) to pictures (N, 3, 8h, 8w), `size` latents of the longer side at a time.

    Raises:
        Unsupported: a layer needs more than a few neighbours, or mixes frames; the network has a walk of its own; or hooks move weights
            block by block, and the blocks are never called here (CONTRACT 7.6).
    """
    if type(network).forward is not BlockNetwork.forward or any(hasattr(module, hook) for module in network.modules() for hook in ("_hf_hook", "_diffusers_hook")):
        raise Unsupported
    dim = 2 if z.shape[2] >= z.shape[3] else 3
    chain = Chain(network.layers, dim)
    parts = squash(z).split(size, dim)
    sample: Tensor | None = None
    at = 0
    for i, part in enumerate(parts):
        y = chain.push(part, last=i == len(parts) - 1)
        if rows := y.shape[dim]:
            y = network.to_picture(y)
            if sample is None:
                sample = y.new_empty(len(z), y.shape[1], z.shape[2] * SPATIAL_FACTOR, z.shape[3] * SPATIAL_FACTOR)
            sample.narrow(dim, at, rows).copy_(y)
            at += rows
    assert sample is not None and at == sample.shape[dim]
    return sample
