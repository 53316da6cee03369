"""Growing: start a larger decoder as exactly the function of a smaller one, and change a network's form but not its function.

    source = FastDecoder.from_pretrained("taesdxl")
    target = TAEDecoder(width=96, blocks=(4, 4, 3, 1))
    grow(source, target)            # then train target
    branch(target.decoder)          # if wanted; fold_branches before saving

Conventions: networks take scaled latents (N, C, h, w) and give pictures (N, 3, 8h, 8w), nominally in [-1, 1].
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast_latent_decoders import (
    EfficientViTDecoder,
    FastDecoder,
    SubpixelDecoder,
    SubpixelTemporalDecoder,
    TAEDecoder,
    TAETemporalDecoder,
)
from fast_latent_decoders.networks.blocks import BlockNetwork, Residual, ResidualBlock, SubpixelUp, zero_init
from fast_latent_decoders.networks.efficientvit import EfficientViTBlock
from fast_latent_decoders.networks.streaming import MEMORY, Memory
from fast_latent_decoders.networks.tae import TAEBlock
from fast_latent_decoders.networks.temporal import TemporalMidBlock

Network = TypeVar("Network", bound=nn.Module)
INTO_OTHERS = ((TAEDecoder, TAETemporalDecoder), (SubpixelDecoder, SubpixelTemporalDecoder), (SubpixelDecoder, EfficientViTDecoder))

# ---------------------------------------------------------------- wider and deeper


def grow(source: FastDecoder, target: FastDecoder, generator: torch.Generator | None = None) -> None:
    """Fill `target` with weights that compute `source`'s function, to float32's rounding; its own weights are lost.

    `target` is of the same family (or a temporal one, which then decodes frame by frame at first, or an EfficientViT for a Subpixel,
    whose attention is the identity at first), and every width and block count is at least the source's. The same shape is a copy.
    The idea is Net2Net's (Chen et al. 2016), but new channels are no copies of old ones: they read through fresh weights, and
    nothing old reads them yet (zeros). That is exact, where copies stay copies under training unless noise, which is not exact,
    parts them; and it needs no bookkeeping along the residual trunk. The zeros have a gradient from the first step on,
    the fresh weights from the second.
    New blocks stand behind their stage's old ones and start as the identity, with the features of the block before if they can have them.

    Args:
        generator: draws the fresh weights; None: torch's own.

    Raises:
        ValueError: another family or latent space, a width or block count below the source's, another upsampling, number of
            convolutions in a block or place of the mid block, a first TAE block where values may be negative (its ReLU would
            cut them), or another width behind a temporal mid block (its normalisation groups would change). `target` is then
            untouched.
    """
    families = type(source), type(target)
    if families[0] is not families[1] and families not in INTO_OTHERS:
        raise ValueError(
            f"expected a target of the source's family, {families[0].__name__}, got {families[1].__name__}; "
            "only a TAEDecoder also grows into a TAETemporalDecoder, and a SubpixelDecoder into a SubpixelTemporalDecoder or an EfficientViTDecoder"
        )
    if source.latent_space != target.latent_space:
        raise ValueError(f"expected a target for the source's latent space, {source.latent_space}, got {target.latent_space}")
    network = _fresh(target, generator)
    old, before = list(source.decoder.layers), None
    for i, layer in enumerate(network.layers):
        if old and type(layer) in (type(old[0]), MEMORY.get(type(old[0]))):
            _embed(old.pop(0), layer, i)
        elif isinstance(layer, (TAEBlock, ResidualBlock)):
            if isinstance(layer, TAEBlock) and not isinstance(before, (nn.ReLU, TAEBlock)):
                raise ValueError(
                    f"a new TAE block at layer {i} cannot start as the identity, as its ReLU would cut negative values; expected "
                    "the source's mid_block, and no block in stages of the target that have none in the source"
                )
            if type(before) is type(layer):  # features that are worth reading: of fresh ones three in four fell asleep (RESULTS.md)
                layer.load_state_dict(before.state_dict())
            zero_init(layer.conv[-1])
        elif not isinstance(layer, (EfficientViTBlock, TemporalMidBlock)):  # new ones are the identity
            raise ValueError(
                f"expected the source's layers and perhaps more blocks in the target, got {type(layer).__name__} at layer {i} "
                f"where the source has {type(old[0]).__name__ if old else 'no more layers'}; give the target at least as many "
                "blocks in every stage and the same mid_block or published, and fold the source's branches"
            )
        before = layer
    target.decoder.load_state_dict(network.state_dict())


def _fresh(target: FastDecoder, generator: torch.Generator | None) -> BlockNetwork:
    """A new network of the target's configuration in float32, for exactness; drawn anew, its features as large as trained ones."""
    with torch.random.fork_rng(devices=[], enabled=generator is not None):
        if generator is not None:
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        network = type(target).from_config(target.config).decoder.float()
        for block in network.modules():
            if isinstance(block, Residual):
                for conv in block.conv[:-1]:
                    if isinstance(conv, nn.Conv2d):  # torch's own draw more than halves them at each step, and what is small falls asleep (RESULTS.md)
                        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        return network


@torch.no_grad()
def _embed(source: nn.Module, target: nn.Module, index: int) -> None:
    """Put one layer's weights into a new and perhaps wider one: old channels come first and read only old ones.

    A pixel shuffle makes channel c of channels 4c to 4c + 3, and attention heads are runs of channels, so first stays first.
    """
    mine, theirs = target.state_dict(), source.state_dict()  # views of the parameters
    if mine.keys() != theirs.keys() or getattr(source, "mode", None) != getattr(target, "mode", None):
        raise ValueError(
            f"layer {index} of the target, {target}, is not that of the source, {source}, at another width; "
            "give the target the same convs and upsampling, and fold the source's branches"
        )
    wider = [name for name in mine if mine[name].shape != theirs[name].shape]
    if wider and isinstance(source, TemporalMidBlock):
        raise ValueError(
            f"expected the source's width behind a temporal mid block, which normalises groups of channels; got {wider[0]} of shape "
            f"{tuple(mine[wider[0]].shape)} for {tuple(theirs[wider[0]].shape)}; grow a frame-wise TAEDecoder instead"
        )
    for name in mine:
        if any(new < old for new, old in zip(mine[name].shape, theirs[name].shape, strict=True)):
            raise ValueError(
                f"expected a target at least as wide as its source, got layers.{index}.{name} of shape {tuple(mine[name].shape)} "
                f"for {tuple(theirs[name].shape)}; give the target larger widths"
            )
        if name not in wider:
            mine[name].copy_(theirs[name])
            continue
        # An EfficientViT block joins two runs of channels, and splits into two: old ones come first in each.
        vit = isinstance(source, EfficientViTBlock)
        rows = 2 if vit and name.startswith(("feed_forward.expand.", "feed_forward.depthwise.")) else 1
        joined = isinstance(source, Memory) and name == "conv.0.weight"  # a frame and the one before; of a plain block only the first
        columns = 2 if joined or (vit and name == "attention.out.weight") else 1
        new, old = mine[name], theirs[name].to(mine[name])
        if vit and name.endswith(("out.weight", "narrow.weight", "norm.weight")):
            # These feed, or are, an RMS norm: its mean must not change, over more channels, of which the new ones are zero.
            # Those learn if their gain is not zero as well.
            scale = (len(new) / len(old)) ** 0.5
            old = old / scale if name.endswith("norm.weight") else old * scale
            new.fill_(1 if name.endswith("norm.weight") else 0)
        if new.ndim == 1:
            new, old = new[:, None], old[:, None]
        new = new.view(rows, len(new) // rows, columns, new.shape[1] // columns, *new.shape[2:])
        old = old.reshape(rows, len(old) // rows, columns, old.shape[1] // columns, *old.shape[2:])
        new[:, : old.shape[1]] = 0
        new[:, : old.shape[1], :, : old.shape[3]] = old


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
                if nearest and up.scale_factor in (2, (2, 2)) and _is_plain_3x3(conv):
                    parent[i], parent[i + 1] = _subpixel(conv), nn.PixelShuffle(2)
    return network


def _is_plain_3x3(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        type(module) is nn.Conv2d  # a subclass may do more
        and (module.kernel_size, module.stride, module.dilation, module.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and (module.padding, module.padding_mode) == ((1, 1), "zeros")
    )


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


# ---------------------------------------------------------------- last layer


@torch.no_grad()
def fit_last_layer(network: BlockNetwork, latents: Tensor, targets: Tensor, ridge: float = 1e-6, batch: int = 4) -> None:
    """Fit the last convolution and its bias to the targets by least squares; everything before it stays.

    Normal equations in float64, added up over strips of 16 rows of `batch` pictures, so memory does not grow with the number
    of pictures. They are solved for the change of the weights, so that `ridge` holds what the pictures leave open at what it
    was. A temporal network sees each picture as a clip of one frame.

    Args:
        latents: (M, C, h, w) scaled.
        targets: (M, 3, 8h, 8w) on [-1, 1], floating point.
        ridge: weight of the squared change, in units of the features' mean square.

    Raises:
        ValueError: latents and targets that do not fit, no positive ridge, or a network that does not end in a 3x3 convolution
            with bias, with or without a pixel shuffle.
    """
    last = network.layers[-1]
    conv, factor = (last[0], last.factor) if isinstance(last, SubpixelUp) else (last, 1)
    if not _is_plain_3x3(conv) or conv.bias is None:
        raise ValueError(f"expected a network that ends in a plain 3x3 convolution with bias, got {last}; fold branches first")
    expected = (len(latents), 3, *(8 * side for side in latents.shape[2:]))
    if not len(latents) or tuple(targets.shape) != expected or not targets.is_floating_point() or not ridge > 0:
        raise ValueError(
            f"expected latents (M, C, h, w), floating-point targets (M, 3, 8h, 8w) on [-1, 1] and a ridge above 0; got latents "
            f"{tuple(latents.shape)}, {targets.dtype} targets {tuple(targets.shape)}, ridge {ridge}"
        )
    ends = network.to_picture(torch.tensor([0.0, 1.0])).tolist()  # pictures are a + (b - a) * output
    size = conv.weight[0].numel() + 1
    gram = torch.zeros(size, size, dtype=torch.float64, device=conv.weight.device)
    cross = gram.new_zeros(size, conv.out_channels)
    seen: list[Tensor] = []
    handle = conv.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    training = network.training
    network.eval()
    try:
        for z, target in zip(latents.split(batch), targets.split(batch), strict=True):
            seen.clear()
            network(z.to(conv.weight))
            features, output = F.pad(seen[0], (1, 1, 1, 1)), seen[1].double()
            wanted = (target.to(output) - ends[0]) / (ends[1] - ends[0])
            error = (F.pixel_unshuffle(wanted, factor) if factor > 1 else wanted) - output
            for top in range(0, error.shape[2], 16):
                x = F.unfold(features[:, :, top : top + 18].double(), 3).transpose(0, 1).flatten(1)  # (9C, pixels)
                x = torch.cat([x, torch.ones_like(x[:1])])
                gram += x @ x.T
                cross += x @ error[:, :, top : top + 16].transpose(0, 1).flatten(1).T
    finally:
        handle.remove()
        network.train(training)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    change = torch.linalg.solve(gram, cross).T
    conv.weight.copy_(conv.weight.double() + change[:, :-1].reshape(conv.weight.shape))
    conv.bias.copy_(conv.bias.double() + change[:, -1])


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
    _replace(network, lambda module: BranchedConv(module) if _is_plain_3x3(module) else module)


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
