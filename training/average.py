"""The average of a finished run's weights and those it began with, which is often better than either (Wortsman et al. 2022, arXiv:2109.01903).

    python training/average.py training/runs/subpixel-sdxl training/runs/subpixel-sdxl-average --share 0.3 0.4 0.5 [--keep 0.4]

A run that goes on from good weights with other losses or pictures wins what it was begun for and loses some of what was there. Both lie in
one basin of the loss, so that a share of the way from the one to the other can have most of both. Each share is measured as train.py measures;
`--keep` writes it as a run's folder that publish.py takes, with its own figures in run.json and card.
"""

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

import torch
from config import Config, build_decoder
from data import pick
from export import write_export
from grow import grow
from losses import ShiftTolerantLPIPS
from publish import RefusedError, find_export
from pydantic import TypeAdapter
from running import mixed_precision, sentences
from torch import Tensor, nn
from validate import measure

from fast_latent_decoders import FastDecoder
from fast_latent_decoders.engines import keep_memory
from fast_latent_decoders.evaluation.encoders import load_encoder


def average(first: FastDecoder, last: FastDecoder, share: float) -> FastDecoder:
    """`share` of the way from the first decoder's weights to the last one's, in float32; neither is changed.

    Raises:
        ValueError: decoders of different families or shapes.
    """
    mine, theirs = ({k: list(v) if isinstance(v, tuple) else v for k, v in d.config.items() if not k.startswith("_")} for d in (first, last))
    if type(first) is not type(last) or mine != theirs:
        raise ValueError(f"expected two decoders of one shape, got a {type(first).__name__} {mine} and a {type(last).__name__} {theirs}")
    made, begun = copy.deepcopy(last).float().eval(), first.decoder.state_dict()
    made.decoder.load_state_dict({key: torch.lerp(begun[key].float(), value, share) for key, value in made.decoder.state_dict().items()})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="of train.py, finished, that had an init")
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, nargs="+", default=(0.25, 0.5, 0.75), help="of the way from the init to the run's weights")
    parser.add_argument("--keep", type=float, help="the share that is written")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists: give another folder")
    try:
        export = find_export(arguments.run)
    except RefusedError as error:
        raise SystemExit(str(error)) from None
    run = json.loads((export / "run.json").read_text())
    c = TypeAdapter(Config).validate_python(run["starts"][-1]["config"])
    if not c.init:
        raise SystemExit(f"{arguments.run} began with random weights: there is nothing to average with")
    with sentences():
        first, last = build_decoder(c), FastDecoder.from_pretrained(export).float()
        grow(FastDecoder.from_pretrained(c.init).float(), first, torch.Generator().manual_seed(c.seed))  # as train.py began
        encoder, samples, stlpips = load_encoder(c.encoder, c.stand_in, last), pick(c.val, c.val_count), ShiftTolerantLPIPS()
    keep_memory()
    half = mixed_precision(last.decoder, last.config.latent_channels) == "bf16"
    for share in sorted({*arguments.share, *([] if arguments.keep is None else [arguments.keep])}):
        model = average(first, last, share).to(memory_format=torch.channels_last)

        def decode(z: Tensor, frames: int, network: nn.Module = model.decoder) -> Tensor:  # in the trainer's format: its figures are beside these
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return network(z.contiguous(memory_format=torch.channels_last), frames).float()

        found = measure(decode, encoder, samples, share=0.5, stlpips=stlpips)
        print(share, found, flush=True)
        if share == arguments.keep:
            summary = {**run, "val": found, "val_of_run": run["val"], "average": share}
            folder = write_export(arguments.out, model, replace(c, out=str(arguments.out)), summary)
            print(f"{folder} has {share:g} of the run and the rest of what it began with")


if __name__ == "__main__":
    main()
