"""Give channels that have fallen asleep new weights, and the decoder's function as it is.

    python training/wake.py subpixel-sd training/runs/awake --config training/configs/laptop/subpixel-sd.yaml

A channel that its ReLU makes zero on every crop has no gradient, and stays so for ever: many of those that a network was
grown by, at a high rate (RESULTS.md). It gets the weights of a new convolution, and those that read it become zero: the function stays
(but where another picture would have woken it), and training can use the channel again. The folder that it writes is an `init:` of train.py.
"""

from itertools import pairwise

import torch
from running import sentences
from shorten import drawn_latents, parse, parser, write_start
from torch import Tensor, nn

from fast_latent_decoders import FastDecoder
from fast_latent_decoders.networks.blocks import BlockNetwork, Residual


def convolutions_of(block: Residual) -> list[nn.Conv2d]:
    """From first to last; between any two, channels that only they see."""
    return [part for part in block.conv if isinstance(part, nn.Conv2d)]


@torch.inference_mode()
def second_moments(network: BlockNetwork, z: Tensor, batch: int = 8) -> dict[nn.Conv2d, Tensor]:
    """For each convolution the sums over all pixels of the products of its input's channels, (C, C) in float64.

    A network that mixes frames sees `batch` pictures as a clip.
    """
    found: dict[nn.Conv2d, Tensor] = {}

    def add(conv: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        x = inputs[0].transpose(0, 1).flatten(1)
        assert isinstance(conv, nn.Conv2d)
        found[conv] = found.get(conv, 0) + (x @ x.T).double()

    handles = [layer.register_forward_hook(add) for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    try:
        for part in z.split(batch):
            network(part, len(part))
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def wake(network: BlockNetwork, z: Tensor, tries: int = 8) -> int:
    """Begin the channels within residual blocks anew that are zero for all these scaled latents (M, C, h, w); how many they were.

    Where the new weights are zero for them as well, others are drawn.
    """
    pairs = [pair for block in network.modules() if isinstance(block, Residual) for pair in pairwise(convolutions_of(block))]
    counts: list[int] = []
    while len(counts) < tries and 0 not in counts:
        moments = second_moments(network, z)
        counts.append(0)
        for writer, reader in pairs:
            asleep = moments[reader].diagonal() == 0
            new = nn.Conv2d(writer.in_channels, writer.out_channels, 3, padding=1)
            nn.init.kaiming_normal_(new.weight, nonlinearity="relu")  # as large as trained ones
            for mine, fresh in zip(writer.parameters(), new.parameters(), strict=True):
                mine[asleep] = fresh[asleep]
            reader.weight[:, asleep] = 0
            counts[-1] += int(asleep.sum())
    return counts[0]


def main() -> None:
    arguments = parse(parser(__doc__))
    with sentences():
        model = FastDecoder.from_pretrained(arguments.source).float()
        z = drawn_latents(arguments.config, arguments.crops, model)
    count = wake(model.decoder, z)
    write_start(model, arguments.out, arguments.source, "with sleeping channels begun anew")
    print(f"{arguments.out}: {count} channels begun anew, zero on {len(z)} crops")


if __name__ == "__main__":
    main()
