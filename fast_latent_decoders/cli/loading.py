"""Decoders and devices for the commands."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from .run import Run, wrong_usage

if TYPE_CHECKING:
    import torch

    from ..decoder import FastDecoder
    from ..files import Latents

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def find_device(name: DeviceName) -> str:
    """The device called `name`; "auto" is the best there is. Wrong usage if this machine has no such device."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in there.items() if available)
    if not there[name]:
        wrong_usage(f"--device {name}: this machine has none that torch {torch.__version__} can use; try --device auto")
    return name


def named(given: list[str]) -> dict[str, str]:
    """What is shown -> what is loaded, of decoders given as PLACE or NAME=PLACE; wrong usage where one name has two places."""
    found: dict[str, str] = {}
    for value in given:
        name, equals, place = value.partition("=")
        if not equals or Path(value).exists():
            name = place = value
        if not name or not place:
            wrong_usage(f"--decoder {value}: expected a preset, folder or Hub id, or NAME= before one")
        if found.setdefault(name, place) != place:
            wrong_usage(f"--decoder: {name} is {found[name]} and {place}; give them two names")
    return found


def load_decoder(name: str, device: str = "cpu", dtype: DtypeName = "float32", backend: str = "torch") -> "FastDecoder":
    """A preset, folder or Hub id, ready on `device`; wrong usage if it cannot be loaded.

    dtype "auto" measures what is fastest. Together with device "auto" it also sees whether the best device gives the CPU's
    picture, and takes the CPU, with a note, where it does not.
    """
    if (name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name) and not Path(name).exists():
        wrong_usage(f"--decoder {name}: there is no such folder")  # said here, before the Hub is asked for it five times
    import torch
    from diffusers.utils import logging

    from .. import FastDecoder

    logging.set_verbosity_error()  # its notes on offline caches and dtypes are not ours to print
    try:
        decoder = FastDecoder.from_pretrained(name, torch_dtype=torch.float32)
    except Exception as error:  # noqa: BLE001 - broken folders make diffusers and safetensors raise what they like
        wrong_usage(f"--decoder {name}: {' '.join(str(error).split()) or type(error).__name__}")
    decoder.eval().requires_grad_(False)
    if backend == "openvino":
        try:
            return decoder.to("cpu" if device == "auto" else device).optimize("openvino", None if dtype == "auto" else getattr(torch, dtype))
        except (ImportError, ValueError) as error:
            wrong_usage(f"--backend openvino: {error}")
    place = find_device("auto") if device == "auto" else device
    if dtype != "auto":
        chosen = getattr(torch, dtype)
    else:
        from ..evaluation.check import fastest_dtype

        try:
            chosen = fastest_dtype(decoder, place)
        except ValueError as error:
            if place == "cpu":
                wrong_usage(f"--decoder {name}: {error}")
            if device != "auto":
                wrong_usage(f"--device {place}: {error}; try --device cpu")
            typer.echo(f"note: {error}; decoding on the CPU", err=True)
            place = "cpu"
            chosen = fastest_dtype(decoder, place)
    return decoder.to(place).optimize(dtype=chosen)


def vae_units(run: Run, path: object, latents: "Latents", decoder: "FastDecoder", scaled: bool) -> "torch.Tensor":
    """The latents of a file for this decoder, (N, C, h, w) in VAE units, with a note where their units are in doubt.

    Raises:
        ValueError: they belong to another latent space, or have another number of channels.
    """
    space = decoder.latent_space
    if latents.latent_space not in (None, space.name):
        raise ValueError(
            f"{path} holds {latents.latent_space!r} latents and the decoder is for {space.name!r}; "
            f"{fitting_presets(latents.latent_space)}"
        )
    channels = latents.tensor.shape[1]
    if channels != space.channels:
        raise ValueError(
            f"{path} has latents of {channels} channels (shape {tuple(latents.tensor.shape)}); the decoder expects "
            f"{space.channels}, as (N, {space.channels}, h, w)"
        )
    doubt = latents.doubt(space, scaled=scaled)
    if doubt:
        run.note(f"{path}: {doubt}")
    return latents.in_vae_units(space, scaled=scaled)


def fitting_presets(space: str) -> str:
    """A clause on which presets decode the latent space `space`."""
    from .. import presets

    fitting = [name for name, preset in presets().items() if preset.latent_space == space]
    return f"decoders that fit: {', '.join(fitting)}" if fitting else "no preset fits it"


def run_decoder(decoder: "FastDecoder", z: "torch.Tensor") -> "torch.Tensor":
    """(N, C, h, w) in VAE units -> (N, 3, 8h, 8w) float32 on the CPU.

    Raises:
        ValueError: memory ran out; the message says what to try.
    """
    import torch

    with guarded(), torch.inference_mode():
        return decoder.decode(z, return_dict=False)[0].float().cpu()


@contextmanager
def guarded() -> Iterator[None]:
    """Raises ValueError where memory runs out; the message says what to try."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(OUT_OF_MEMORY) from error
    except RuntimeError as error:
        if "alloc" in str(error) or "out of memory" in str(error):
            raise ValueError(OUT_OF_MEMORY) from error
        raise


OUT_OF_MEMORY = "memory ran out while decoding; try --tile, a smaller --batch-size or a half --dtype"
