"""`fld encode`: pictures to latents."""

from pathlib import Path
from typing import Annotated

import typer

from .loading import DeviceName, find_device, load_decoder
from .run import Claims, Run, collect, writable_folder, wrong_usage


def encode(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.", show_default=False)],
    decoder: Annotated[
        str | None, typer.Option(help="The decoder whose encoder is used: a preset, a folder or a Hub id.", show_default=False)
    ] = None,
    latent_space: Annotated[
        str | None, typer.Option(help="sdxl or sd, instead of --decoder.  [default: sdxl]", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the latents.")] = Path("latents"),
    device: Annotated[DeviceName, typer.Option(help="Where to encode.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace latents that are already there.")] = False,
) -> None:
    """Encode pictures to .safetensors latents in VAE units, with their latent space and units as metadata."""
    from ..files import write_latents
    from ..pictures import SUFFIXES, read_picture

    place = find_device(device)
    claims = Claims()
    with Run("encoding") as run:
        files = collect(run, images, SUFFIXES, "picture")
        if not files or not writable_folder(run, out):
            run.end()
        fast = load_decoder(decoder or decoder_for(latent_space or "sdxl"), place)
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
                picture = read_picture(file)
                if picture.note:
                    run.note(f"{file}: {picture.note}")
                with run.noting_warnings():
                    latents = fast.encode(picture.tensor[None].to(place)).latent_dist.mode()
                write_latents(output, latents, space, force=force)
            except (ValueError, RuntimeError) as error:
                run.fail(file, " ".join(str(error).split()))
                continue
            run.finish(file, output)
    typer.echo(run.summary("latent file", out))
    run.end()


def decoder_for(space: str) -> str:
    """The first preset of a latent space, of those whose weights are at hand if there is one: any of them has its encoder."""
    from .. import presets

    fitting = {name: preset for name, preset in presets().items() if preset.latent_space == space}
    if not fitting:
        wrong_usage(f"--latent-space {space}: no preset has it; there are sdxl and sd, or pass --decoder")
    return next((name for name, preset in fitting.items() if preset.location), next(iter(fitting)))
