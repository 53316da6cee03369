"""`fld convert`: tiny autoencoders' checkpoints to TAEDecoder, and back."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .run import wrong_usage

if TYPE_CHECKING:
    from ..families import TAEDecoder


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A TAESD decoder file, an AutoencoderTiny file or folder, or a TAEDecoder.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A folder; for --to taesd a .safetensors file.")],
    latent_space: Annotated[
        Literal["sdxl", "sd"] | None, typer.Option(help="Latent space of IN, where IN does not say it.", show_default=False)
    ] = None,
    to: Annotated[Literal["ours", "autoencoder-tiny", "taesd"], typer.Option(help="What to write.")] = "ours",
    force: Annotated[bool, typer.Option("--force", help="Replace what is already there.")] = False,
) -> None:
    """Convert decoders between TAESD's layout, diffusers' AutoencoderTiny and this package's TAEDecoder."""
    if to == "taesd" and target.suffix != ".safetensors":
        wrong_usage(f"OUT is {target}; --to taesd writes one file: give it the suffix .safetensors")
    if to != "taesd" and target.is_file():
        wrong_usage(f"OUT is {target}, a file; --to {to} writes a folder")
    there = target if to == "taesd" else target / "config.json"
    if there.exists() and not force:
        typer.echo(f"{there} is already there; --force replaces it")
        return
    try:
        decoder = read(source, latent_space)
    except typer.Exit:  # wrong usage; it is a RuntimeError
        raise
    except Exception as error:  # broken checkpoints make diffusers and safetensors raise what they like
        said = " ".join(str(error).split()) or type(error).__name__
        typer.echo(said if str(source) in said else f"{source} cannot be read: {said}", err=True)
        raise typer.Exit(1) from error
    try:
        write(decoder, target, to, force)
    except (OSError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        typer.echo(said if str(target) in said else f"{target} was not written: {said}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{source} -> {target} ({to}, {decoder.latent_space.name})")


def read(source: Path, latent_space: str | None) -> "TAEDecoder":
    """The decoder in `source`: ours as it is, anything else converted."""
    import json

    from diffusers.utils import logging

    from .. import FastDecoder, TAEDecoder, presets
    from ..convert import from_taesd

    logging.set_verbosity_error()
    config = source / "config.json"
    ours = str(source) in presets()
    if not ours and config.exists():
        ours = json.loads(config.read_text()).get("_class_name") in FastDecoder.families
    if ours:
        decoder = FastDecoder.from_pretrained(str(source))
        if not isinstance(decoder, TAEDecoder):
            raise ValueError(f"{source} is a {type(decoder).__name__}; only a TAEDecoder has the shape of a tiny autoencoder")
        if latent_space not in (None, decoder.latent_space.name):
            raise ValueError(f"{source} is for {decoder.latent_space.name!r}, not --latent-space {latent_space}; leave it out")
        return decoder
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    if latent_space is None:
        wrong_usage(f"{source} does not say its latent space; pass --latent-space sdxl or --latent-space sd")
    settings, state = from_taesd(source, latent_space=latent_space)
    decoder = TAEDecoder(**settings)
    decoder.load_state_dict(state, strict=True)
    return decoder.eval()


def write(decoder: "TAEDecoder", target: Path, to: str, force: bool) -> None:
    """Write the decoder in the form `to`."""
    from ..convert import to_autoencoder_tiny, to_taesd

    if to == "ours":
        write_folder(decoder, target)
    elif to == "autoencoder-tiny":
        write_folder(to_autoencoder_tiny(decoder), target)
    else:
        from safetensors.torch import save

        from ..atomic import replacing

        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target, force=force) as temporary:
            temporary.write_bytes(save(to_taesd(decoder)))


def write_folder(model: Any, folder: Path) -> None:
    """Save a model within the folder and move file by file, so that no half-written file is met and nothing else in it is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".fld-", dir=folder))
    try:
        model.save_pretrained(temporary)
        # The configuration last: its presence says that the folder is whole.
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
