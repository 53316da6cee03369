"""A network's function in another form: upsampling folded into sub-pixel convolutions, and convolutions with branches that fold away.

    branch(network)                 # then train it; fold_branches before saving
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def is_plain_3x3(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """A 3x3 convolution with stride 1, zeros around, and one group."""
    return (
        type(module) is nn.Conv2d  # a subclass may do more
        and (module.kernel_size, module.stride, module.dilation, module.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and (module.padding, module.padding_mode) == ((1, 1), "zeros")
    )


# ---------------------------------------------------------------- upsampling


def fold_upsampling(network: Network) -> Network:
    """A copy in which nearest 2x upsampling + 3x3 convolution is a 3x3 convolution with 4x channels + pixel shuffle.

    Upsampled pixels are equal in pairs, so the taps that read one pair add up: 5 of 9 are zero for each of the four
    sub-pixels. The zeros around the picture are those around the latents, so borders are exact. As many multiplications, no
    upsampled tensor, and the zeros are free to learn. Each pair of layers becomes a pair: positions, hence the walk, stay;
    `halo` counts the zero taps too, so it is enough, and up to one latent more than before. Tensor names and shapes are no
    longer those of the family's configuration. Whatever else is in the network (bilinear upsampling, branches) stays.
    """
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        if isinstance(parent, nn.Sequential):
            for i, (up, conv) in enumerate(pairwise(list(parent))):
                nearest = isinstance(up, nn.Upsample) and up.mode == "nearest"
                if nearest and up.scale_factor in (2, (2, 2)) and is_plain_3x3(conv):
                    parent[i], parent[i + 1] = _subpixel(conv), nn.PixelShuffle(2)
    return network


@torch.no_grad()
def _subpixel(conv: nn.Conv2d) -> nn.Conv2d:
    weight = conv.weight.double()
    # Of an upsampled pair, the first pixel reads one to the left and two of its own, the second two of its own and one right.
    taps = weight.new_tensor([[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]])  # (sub-pixel, to, from)
    folded = nn.Conv2d(conv.in_channels, 4 * conv.out_channels, 3, padding=1, bias=conv.bias is not None).to(conv.weight)
    folded.weight.copy_(torch.einsum("pau,qbv,oiuv->opqiab", taps, taps, weight).flatten(0, 2))
    if folded.bias is not None and conv.bias is not None:
        folded.bias.copy_(conv.bias.repeat_interleave(4))
    return folded


# ---------------------------------------------------------------- branches


class BranchedConv(nn.Conv2d):
    """A 3x3 convolution + a 1x1 convolution + (where in == out) each channel times a number, as in RepVGG (Ding et al. 2021).

    (N, in, H, W) to (N, out, H, W). Without batch normalisation the sum is linear in the input, so the kernels are added and
    not the outputs: the same gradients for one convolution's work. New branches are zero, which leaves the function as it is
    and gives them a gradient at once. What they change is the way an optimiser takes: the centre tap moves up to three times.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        # A matrix: the trainer takes the last tensor with four dimensions for the last layer.
        self.point = nn.Parameter(conv.weight.new_zeros(conv.out_channels, conv.in_channels))
        square = conv.in_channels == conv.out_channels
        self.scale = nn.Parameter(conv.weight.new_zeros(conv.out_channels)) if square else None

    def kernel(self) -> Tensor:
        """The one 3x3 kernel, (out, in, 3, 3), that the branches add up to."""
        centre = self.point if self.scale is None else self.point + torch.diag(self.scale)
        return self.weight + F.pad(centre[:, :, None, None], (1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.kernel(), self.bias)

    def folded(self) -> nn.Conv2d:
        conv = nn.Conv2d(self.in_channels, self.out_channels, 3, padding=1, bias=self.bias is not None, device="meta")
        conv.weight, conv.bias = nn.Parameter(self.kernel().detach()), self.bias
        return conv


def branch(network: nn.Module) -> None:
    """Give every plain 3x3 convolution (stride 1, padding 1, one group) its branches, in place; the function stays the same.

    Make the optimiser afterwards, and call `fold_branches` before the decoder is saved: the state dict has more names.
    """
    _replace(network, lambda module: BranchedConv(module) if is_plain_3x3(module) else module)


def fold_branches(network: nn.Module) -> None:
    """Turn what `branch` made back into 3x3 `nn.Conv2d`, in place: the function stays, names and shapes are plain again."""
    _replace(network, lambda module: module.folded() if isinstance(module, BranchedConv) else module)


def _replace(parent: nn.Module, rule: Callable[[nn.Module], nn.Module]) -> None:
    for name, child in list(parent.named_children()):
        made = rule(child)
        if made is not child:
            setattr(parent, name, made)
        else:
            _replace(child, rule)
