"""`fld encode`: pictures and clips to latents."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .loading import DeviceName, find_device, load_decoder
from .run import Claims, Run, collect, writable_folder, wrong_usage

if TYPE_CHECKING:
    from torch import Tensor

    from ..decoder import FastDecoder


def encode(
    images: Annotated[list[Path], typer.Argument(help="Pictures and films, or folders of them.", show_default=False)],
    decoder: Annotated[
        str | None, typer.Option(help="The decoder whose encoder is used: a preset, a folder or a Hub id.", show_default=False)
    ] = None,
    latent_space: Annotated[
        str | None, typer.Option(help="sdxl or sd, instead of --decoder.  [default: sdxl; sd for films]", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the latents.")] = Path("latents"),
    device: Annotated[DeviceName, typer.Option(help="Where to encode.")] = "auto",
    frames: Annotated[int | None, typer.Option(min=1, help="Of each film, how many frames from its start.  [default: all]", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace latents that are already there.")] = False,
) -> None:
    """Encode pictures to .safetensors latents (1, C, h, w) in VAE units, with their latent space and units as metadata.

    A film gives (frames, C, h, w), frame by frame, with its frames a second as metadata: what fld decode --video takes.
    """
    from .. import clips
    from ..files import write_latents
    from ..pictures import SUFFIXES, read_picture

    place = find_device(device)
    claims = Claims()
    with Run("encoding") as run:
        files = collect(run, images, (*SUFFIXES, *clips.SUFFIXES), "picture")
        if not files or not writable_folder(run, out):
            run.end()
        films = {file for file in files if file.suffix.lower() in clips.SUFFIXES}
        fast = load_decoder(decoder or decoder_for(latent_space or ("sd" if films == set(files) else "sdxl")), place)
        space = fast.latent_space.name
        if latent_space not in (None, space):
            wrong_usage(f"--decoder {decoder} is for {space!r}, not --latent-space {latent_space}; leave one of them out")
        for file in run.over(files, len(files)):
            output = out / f"{file.stem}.safetensors"
            try:
                conflict = claims.conflict(output, file)
                if conflict:
                    raise ValueError(conflict)
                if output.exists() and not force:
                    run.skip(output)
                    continue
                with run.noting_warnings():
                    if file in films:
                        latents, fps = encode_film(fast, file, frames)
                    else:
                        picture, fps = read_picture(file), None
                        if picture.note:
                            run.note(f"{file}: {picture.note}")
                        latents = fast.encode(picture.tensor[None].to(place)).latent_dist.mode()
                write_latents(output, latents, space, fps=fps, force=force)
            except (ValueError, RuntimeError, ImportError) as error:
                run.fail(file, " ".join(str(error).split()))
                continue
            run.finish(file, output)
    typer.echo(run.summary("latent file", out))
    run.end()


def encode_film(fast: "FastDecoder", file: Path, count: int | None) -> tuple["Tensor", float]:
    """The latents (frames, C, h, w) of the first `count` frames (None: all), cropped centrally to multiples of 8 px; frames a second.

    Raises:
        ValueError: the film is broken, too small, or has fewer frames.
    """
    import torch

    from ..clips import read_clip
    from ..pictures import cropped

    frames, fps = read_clip(file)
    latents = []
    with torch.inference_mode():
        for frame in islice(frames, count):
            x = torch.from_numpy(cropped(file, frame)).permute(2, 0, 1)[None].to(fast.device, torch.float32) / 127.5 - 1
            latents.append(fast.encode(x).latent_dist.mode().cpu())
    if not latents or len(latents) < (count or 0):
        raise ValueError(f"{file} has {len(latents)} frames" + (f" and --frames asks for {count}" if latents else "; expected a film"))
    return torch.cat(latents), fps


def decoder_for(space: str) -> str:
    """The first preset of a latent space, of those whose weights are at hand if there is one: any of them has its encoder."""
    from .. import presets

    fitting = {name: preset for name, preset in presets().items() if preset.latent_space == space}
    if not fitting:
        wrong_usage(f"--latent-space {space}: no preset has it; there are sdxl and sd, or pass --decoder")
    return next((name for name, preset in fitting.items() if preset.location), next(iter(fitting)))
