"""Growing: start a larger decoder as exactly the function of a smaller one.

    source = FastDecoder.from_pretrained("taesdxl")
    target = TAEDecoder(width=96, blocks=(4, 4, 3, 1))
    grow(source, target)            # then train target

Conventions: networks take scaled latents (N, C, h, w) and give pictures (N, 3, 8h, 8w), nominally in [-1, 1].
"""

import torch
from torch import nn

from fast_latent_decoders import (
    EfficientViTDecoder,
    FastDecoder,
    SubpixelDecoder,
    SubpixelTemporalDecoder,
    TAEDecoder,
    TAETemporalDecoder,
)
from fast_latent_decoders.networks.blocks import BlockNetwork, Residual, ResidualBlock, zero_init
from fast_latent_decoders.networks.efficientvit import EfficientViTBlock
from fast_latent_decoders.networks.streaming import MEMORY, Memory
from fast_latent_decoders.networks.tae import TAEBlock
from fast_latent_decoders.networks.temporal import TemporalMidBlock

INTO_OTHERS = ((TAEDecoder, TAETemporalDecoder), (SubpixelDecoder, SubpixelTemporalDecoder), (SubpixelDecoder, EfficientViTDecoder))


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
