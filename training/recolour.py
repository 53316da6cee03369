"""Flat colours without a border in view, put right by a decoder's last layer.

    python training/recolour.py subpixel-sd training/runs/subpixel-sd-recoloured

In a crop of 128 px every pixel sees the border and its zeros, so that is where a run learns colours; inside a large surface they come
out otherwise (RESULTS.md, "Colours away from the border"). One fit of the last convolution by least squares, minutes where training
takes hours: it asks for real flat colours as an endless surface shows them (one of 256 px where a norm takes the border in), and for
the decoder's own pictures of the run's data.
The folder that it writes is one that publish.py takes. The colours that train.py measures are left out of the fit.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from card import place_of
from config import Config, Stage
from data import pick
from export import write_export
from fit import LastLayerFit
from flats import endless, surfaces
from latents import first_latents
from losses import ShiftTolerantLPIPS
from pydantic import TypeAdapter
from running import sentences
from torch import Tensor
from validate import MEASURED_COLOURS, measure

from fast_latent_decoders import FastDecoder
from fast_latent_decoders.engines import keep_memory
from fast_latent_decoders.evaluation.encoders import FrozenEncoder, load_encoder
from fast_latent_decoders.evaluation.samples import Kind

PICTURE, COLOUR = 2**14, 2**4  # positions of each that are looked at


def crops(c: Config, encoder: FrozenEncoder, kind: Kind, count: int, side: int, frames: int) -> Tensor:
    """Latents (count * frames, C, side/8, side/8), scaled, of "pictures" or "clips" of the run's data."""
    stage = Stage(crop=side, batch=1, reduce=1.0, clips=float(kind == "clips"), frames=frames)
    return first_latents(replace(c, stages=[stage], shard=math.ceil(count * (side / 128) ** 2) * frames, cache=None), encoder, kind)


@torch.no_grad()
def add_flat(fit: LastLayerFit, srgb: Tensor, latents: Tensor, weight: float) -> None:
    """Colours (N, 3) in [0, 1] and their latents (N, C), as endless surfaces, or as `surfaces` has them."""
    z, target, frames = surfaces(fit.network, srgb, latents)
    batch = max(1, 256 // z[0, 0].numel())
    with endless(fit.network):
        own = torch.cat([fit.network(part, frames) for part in z.split(batch * frames)])
        beyond = (target.abs() == 1) & (own * target > 1)  # is cut off anyway
        fit.add(z, torch.where(beyond, own, target), weight, frames, batch, batch * frames * (COLOUR if batch > 1 else PICTURE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="preset, or folder of an export, with its run.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--crops", type=int, default=64, help="pictures, and as many clips where the run had some (default %(default)s)")
    parser.add_argument("--side", type=int, default=256, help="px of a crop (default %(default)s)")
    parser.add_argument("--weight", type=float, default=0.3, help="of flat colours against pictures (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists: give another folder")
    if arguments.side % 8 or arguments.side < 64 or arguments.crops < 1 or not arguments.weight > 0:
        parser.error("expected a side that is a multiple of 8 px and at least 64, crops and a weight above 0")
    record = place_of(arguments.source) / "run.json"
    if not record.exists():
        parser.error(f"{arguments.source} has no run.json, which tells its data: expected a preset or the export of a run")
    run = json.loads(record.read_text())
    c = TypeAdapter(Config).validate_python(run["starts"][-1]["config"])
    if c.stand_in.colours is None:
        parser.error(f"{arguments.source} was trained without real flat colours (stand_in.colours): there is nothing to fit it to")
    keep_memory()
    with sentences():
        model = FastDecoder.from_pretrained(arguments.source).float().eval().to(memory_format=torch.channels_last)
        encoder, samples, stlpips = load_encoder(c.encoder, c.stand_in, model), pick(c.val, c.val_count), ShiftTolerantLPIPS()
        fit = LastLayerFit(model.decoder)
        for kind in sorted({source.kind for source in c.data}):
            frames = 2 if kind == "clips" and model.decoder.mixes_frames else 1
            z = crops(c, encoder, kind, arguments.crops, arguments.side, frames)
            fit.add(z, None, frames=frames, batch=1, positions=PICTURE * frames)
    assert encoder.colours is not None
    fitted_to = torch.arange(len(encoder.colours["srgb"])) % MEASURED_COLOURS != 0
    add_flat(fit, encoder.colours["srgb"][fitted_to], encoder.colours["latent"][fitted_to], arguments.weight)
    fit.solve()

    def decode(z: Tensor, frames: int) -> Tensor:
        return model.decoder(z.contiguous(memory_format=torch.channels_last), frames)

    found = measure(decode, encoder, samples, share=0.5, stlpips=stlpips)
    print("before", run["val"], "after", found, sep="\n")
    told = {"crops": arguments.crops, "side": arguments.side, "weight": arguments.weight, "val_before": run["val"]}
    summary = {**run, "val": found, "recoloured": told}
    print(f"the decoder is in {write_export(arguments.out, model, replace(c, init=arguments.source, out=str(arguments.out)), summary)}")


if __name__ == "__main__":
    main()
