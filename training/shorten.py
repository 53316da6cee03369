"""A Subpixel decoder that begins as the first stages of a TAE, or of a larger Subpixel decoder: what TAESDXL knows, without its full-resolution stage.

    python training/shorten.py taesdxl training/runs/short --blocks 3 3 2 --config training/configs/laptop/subpixel-sdxl.yaml

Stages at 1/8, 1/4 and 1/2 are copied, each upsampling folded into a sub-pixel convolution (fold.fold_upsampling); the head, which goes
from 1/2 to the picture in one convolution, is fitted by least squares to the source's own pictures of the configuration's crops.
The folder that it writes is an `init:` of train.py. It keeps the source's licence: say so in its card.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from card import origin, place_of
from config import read_config
from fit import fit_last_layer
from fold import fold_upsampling
from latents import first_latents
from running import sentences
from torch import Tensor, nn

from fast_latent_decoders import FastDecoder, SubpixelDecoder, TAEDecoder
from fast_latent_decoders.evaluation.encoders import load_encoder
from fast_latent_decoders.networks.blocks import Residual, SubpixelUp
from fast_latent_decoders.networks.tae import stage_widths


def shorten(source: TAEDecoder | SubpixelDecoder, blocks: Sequence[int], half: int | None = None) -> SubpixelDecoder:
    """The first `blocks` of the source's blocks at 1/8, 1/4 and 1/2; what follows them there is left out, and the head is new.

    Args:
        blocks: three counts, or two: then the head goes from 1/4 to the picture.
        half: another width at 1/2, where most of the work is: that stage is new then too.

    Raises:
        ValueError: more blocks or stages than the source has, or bilinear upsampling, which no 3x3 sub-pixel convolution equals.
    """
    config = source.config
    most = tuple(config.blocks[:3])
    if len(blocks) not in range(2, len(most) + 1) or any(not 1 <= mine <= theirs for mine, theirs in zip(blocks, most, strict=False)):
        raise ValueError(f"expected two or three block counts from 1 to those of the source, {most}, got {tuple(blocks)}")
    if half and len(blocks) == 2:
        raise ValueError(f"expected no width at 1/2 where there is no such stage, got {half} and block counts {tuple(blocks)}")
    shared = {name: config[name] for name in ("latent_space", "latent_channels", "scaling_factor", "shift_factor", "encoder")}
    if isinstance(source, SubpixelDecoder):
        widths, convs, block, layers = list(config.widths), config.convs, config.block, list(source.decoder.layers)
    else:
        if config.upsampling != "nearest":
            raise ValueError(f"expected a source that upsamples nearest, got {config.upsampling}")
        widths, convs, block, layers = [*stage_widths(config.width)[:3]], 3, "tae", list(fold_upsampling(source.decoder).layers)
    if half:
        widths[2] = half
    target = SubpixelDecoder(widths[: len(blocks)], tuple(blocks), convs, block, **shared)
    stages: list[list[nn.Module]] = [[]]
    for layer in layers:
        if not isinstance(layer, nn.PixelShuffle):
            stages[-1].append(layer)
        if isinstance(layer, (nn.PixelShuffle, SubpixelUp)):
            stages.append([])
    kept: list[nn.Module] = []
    for stage, count in zip(stages, blocks, strict=False):
        theirs = [layer for layer in stage if isinstance(layer, Residual)]
        kept += [layer for layer in stage if layer not in theirs[count:]]
    # The last one leads on to what is left out: the head stands in its place.
    for mine, layer in zip(list(target.decoder.layers)[:-1], kept[:-1], strict=True):
        weights = layer.state_dict()
        if isinstance(mine, SubpixelUp) and not isinstance(layer, SubpixelUp):
            weights = {"0.weight": weights["weight"], "0.bias": torch.zeros(len(weights["weight"]))}
        if all(weights[name].shape == tensor.shape for name, tensor in mine.state_dict().items()):
            mine.load_state_dict(weights)
    return target


def card(source: str, how: str) -> str:
    """Whose the weights are, for the card of what is trained from them: the source's licence and credit."""
    found = origin(source)
    header = f"license: {found['licence']}" + (f"\nbase_model: {found['base_model']}" if "base_model" in found else "")
    return f"---\n{header}\n---\n# {source}, {how}\n\n{found.get('credit', '')}\n"


def drawn_latents(config: str, crops: int, source: FastDecoder) -> Tensor:
    """Scaled latents (M, C, 16, 16) of a configuration's first crops of 128 px."""
    c = read_config(config, [f"shard={crops}", "stages=[{crop: 128}]"])
    return first_latents(c, load_encoder(c.encoder, c.stand_in, source), "pictures")


@torch.inference_mode()
def fit_and_write(source: FastDecoder, target: FastDecoder, z: Tensor, out: Path, name: str, how: str) -> None:
    """Fit the head to the source's own pictures, write the folder, and say how near to them it comes."""
    taught = torch.cat([source.decoder(part) for part in z.split(8)])
    fit_last_layer(target.decoder, z, taught)
    error = torch.cat([target.decoder(part) for part in z.split(8)]) - taught
    write_start(target, out, name, how)
    print(f"{out}: {10 * (4 / error.square().mean()).log10():.2f} dB to the source's pictures of {len(z)} crops")


def write_start(model: FastDecoder, out: Path, source: str, how: str) -> None:
    """A folder that a run can begin with: weights, whose they are, and how the source was trained."""
    model.save_pretrained(out)
    (out / "README.md").write_text(card(source, how))
    if (record := place_of(source) / "run.json").exists():
        shutil.copy(record, out)


def parser(description: str | None) -> argparse.ArgumentParser:
    """What shorten.py, thin.py and wake.py are told alike."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("source", help="preset or folder")
    made.add_argument("out", type=Path)
    made.add_argument("--config", required=True, help="YAML file of train.py: its crops and their latents")
    made.add_argument("--crops", type=int, default=256, help="that are looked at")
    return made


def parse(told: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; an `out` that exists is an error."""
    arguments = told.parse_args()
    if arguments.out.exists():
        told.error(f"{arguments.out} exists: give another folder")
    return arguments


def main() -> None:
    told = parser(__doc__)
    told.add_argument("--blocks", type=int, nargs="+", default=(3, 3, 3), metavar="N", help="at 1/8, 1/4 and, if at all, 1/2 of the resolution")
    told.add_argument("--half", type=int, metavar="WIDTH", help="another width at 1/2; that stage begins at random")
    arguments = parse(told)
    with sentences():
        source = FastDecoder.from_pretrained(arguments.source).float()
        if not isinstance(source, (TAEDecoder, SubpixelDecoder)):
            raise SystemExit(f"expected a TAEDecoder or SubpixelDecoder, got {type(source).__name__} in {arguments.source}")
        target = shorten(source, arguments.blocks, arguments.half)
        z = drawn_latents(arguments.config, arguments.crops, source)
    fit_and_write(source, target, z, arguments.out, arguments.source, "shortened")


if __name__ == "__main__":
    main()
