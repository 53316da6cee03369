"""A Subpixel decoder with fewer channels, that begins as near to the larger one as least squares bring it.

    python training/thin.py subpixel-sdxl training/runs/thin --widths 128 64 48 --config training/configs/laptop/subpixel-sdxl.yaml

One channel after the other goes, always the one that is missed least: what the others say of it, by a linear fit on the configuration's
crops, moves into the weights that read it (after Luo et al. 2017, ThiNet, arXiv:1707.06342). Sleeping channels begin anew (wake.py), and the
head is fitted to the larger decoder's pictures. The folder that it writes is an `init:` of train.py, for the same or more blocks. It keeps
the source's licence: say so in its card.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from running import sentences
from shorten import drawn_latents, fit_and_write, parse, parser
from torch import Tensor, nn
from wake import convolutions_of, second_moments, wake

from fast_latent_decoders import FastDecoder, SubpixelDecoder
from fast_latent_decoders.networks.blocks import BlockNetwork, Residual, SubpixelUp


def eliminate(readers: Sequence[tuple[Tensor, Tensor]], width: int) -> tuple[list[int], list[Tensor]]:
    """Which `width` channels stay, and the weights that then read them.

    Args:
        readers: of convolutions that read the same channels: the second moments (C, C) of what each reads, and its weight (out, C, k, k).
    """
    kept = list(range(len(readers[0][0])))
    moments = [m + (1e-6 * m.diagonal().mean() + 1e-12) * torch.eye(len(m), dtype=m.dtype) for m, _ in readers]
    weights = [w.detach().double() for _, w in readers]
    output = [torch.einsum("oiyx,ij,ojyx->", w, m, w) + 1e-12 for w, m in zip(weights, moments, strict=True)]
    while len(kept) > width:
        inverses = [torch.linalg.inv(m) for m in moments]
        # 1 / diagonal is what the others leave of a channel; its share of each reader's output, roughly.
        missed = sum(w.square().sum((0, 2, 3)) / i.diagonal() / e for w, i, e in zip(weights, inverses, output, strict=True))
        least = int(torch.as_tensor(missed).argmin())
        rest = [n for n in range(len(kept)) if n != least]
        weights = [
            w[:, rest] - w[:, least : least + 1] * (i[least, rest] / i[least, least])[:, None, None]
            for w, i in zip(weights, inverses, strict=True)
        ]
        moments = [m[rest][:, rest] for m in moments]
        del kept[least]
    return kept, weights


Group = tuple[list[nn.Conv2d], list[tuple[nn.Conv2d, int]], int]


def groups(network: BlockNetwork, widths: Sequence[int]) -> Iterator[Group]:
    """Channels that must stay or go together: who reads them, who writes them with how many rows for each, and how many shall stay."""
    readers: list[nn.Conv2d] = []
    writers: list[tuple[nn.Conv2d, int]] = []
    left = list(widths)
    for layer in network.layers:
        if isinstance(layer, Residual):
            convs = convolutions_of(layer)
            for a, b in pairwise(convs):
                yield [b], [(a, 1)], left[0]
            readers.append(convs[0])
            writers.append((convs[-1], 1))
        elif isinstance(layer, SubpixelUp):
            conv = layer[0]
            assert isinstance(conv, nn.Conv2d)
            yield [*readers, conv], writers, left.pop(0)
            readers, writers = [], [(conv, layer.factor**2)]
        elif isinstance(layer, nn.Conv2d):
            writers.append((layer, 1))


@torch.no_grad()
def thin(source: SubpixelDecoder, widths: Sequence[int], z: Tensor) -> SubpixelDecoder:
    """`source` at other widths, none above its own.

    Args:
        z: scaled latents (M, C, h, w) that say which channels matter.

    Raises:
        ValueError: another number of widths, or a larger one.
    """
    theirs = list(source.config.widths)
    if len(widths) != len(theirs) or any(not 1 <= mine <= old for mine, old in zip(widths, theirs, strict=True)):
        raise ValueError(f"expected {len(theirs)} widths from 1 to those of the source, {theirs}, got {list(widths)}; train.py grows larger ones")
    target = SubpixelDecoder.from_config({**source.config, "widths": list(widths)})
    old, new = ([part for part in model.decoder.modules() if isinstance(part, nn.Conv2d)] for model in (source, target))
    moments = second_moments(source.decoder, z)
    rows = {conv: torch.arange(len(conv.weight)) for conv in old}
    weights = {conv: conv.weight.double() for conv in old}
    for readers, writers, width in groups(source.decoder, widths):
        kept, columns = eliminate([(moments[conv], conv.weight) for conv in readers], width)
        weights.update(zip(readers, columns, strict=True))
        for conv, phases in writers:
            rows[conv] = (phases * torch.tensor(kept)[:, None] + torch.arange(phases)).flatten()
    for conv, mine in zip(old, new, strict=True):
        mine.weight.copy_(weights[conv][rows[conv]])
        if conv.bias is not None and mine.bias is not None:
            mine.bias.copy_(conv.bias[rows[conv]])
    return target


def main() -> None:
    told = parser(__doc__)
    told.add_argument("--widths", type=int, nargs="+", required=True, metavar="WIDTH")
    arguments = parse(told)
    with sentences():
        source = FastDecoder.from_pretrained(arguments.source).float()
        if not isinstance(source, SubpixelDecoder):
            raise SystemExit(f"expected a SubpixelDecoder, got {type(source).__name__} in {arguments.source}")
        z = drawn_latents(arguments.config, arguments.crops, source)
        target = thin(source, arguments.widths, z)
    wake(target.decoder, z)
    fit_and_write(source, target, z, arguments.out, arguments.source, "with fewer channels")


if __name__ == "__main__":
    main()
