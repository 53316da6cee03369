"""`fld decode`: latents to pictures."""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .loading import DeviceName, DtypeName, find_device, load_decoder, run_decoder, vae_units
from .run import Claims, Run, collect, writable_folder
from .video import VideoFormat, decode_clips

if TYPE_CHECKING:
    from torch import Tensor

    from ..decoder import FastDecoder


def decode(
    paths: Annotated[list[Path], typer.Argument(help="Latent files, or folders of them.", show_default=False)],
    decoder: Annotated[str, typer.Option(help="A preset (see fld list), a folder or a Hub id.")] = "subpixel-sdxl",
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out"),
    picture_format: Annotated[Literal["png", "jpg", "webp"], typer.Option("--format", help="Format of the pictures.")] = "png",
    video: Annotated[
        VideoFormat | None, typer.Option(help="The latents of a file are one clip: make a film of them, or .png frames.", show_default=False)
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.1, max=1000, help="Frames a second.  [default: what the file says, else 7]", show_default=False)
    ] = None,
    dtype: Annotated[DtypeName, typer.Option(help="Number format; auto measures which is fastest here.")] = "auto",
    device: Annotated[DeviceName, typer.Option(help="Where to decode.")] = "auto",
    backend: Annotated[
        Literal["torch", "openvino"], typer.Option(help="openvino is the fastest on many CPUs; it needs the extra export.")
    ] = "torch",
    tile: Annotated[bool, typer.Option("--tile", help="Decode in parts, for large pictures in little memory.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Latents of one shape that are decoded together.")] = 1,
    scaled: Annotated[
        bool, typer.Option("--scaled", help="Files that do not say so hold scaled latents, not VAE units.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace pictures that are already there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done, with times, as JSON.")] = False,
) -> None:
    """Decode latents (.safetensors, .latent, .npy, .npz, .pt, .pth) to pictures, or with --video to films."""
    from ..files import READERS
    from ..pictures import write_picture

    find_device(device)  # wrong usage is said before any work
    pictures: list[dict[str, Any]] = []
    seconds = 0.0
    with Run("decoding", quiet=as_json) as run:
        files = collect(run, paths, tuple(READERS), "latent")
        if not files or not writable_folder(run, out):
            run.end()
        fast = load_decoder(decoder, device, dtype, backend)
        if tile:
            fast.enable_tiling()
        place = fast.device.type
        used = str(fast._engine.dtype if fast._engine else fast.dtype).removeprefix("torch.")
        if video:
            pictures = decode_clips(run, files, fast, out, video, fps, scaled, force)
            seconds = sum(told["seconds"] for told in pictures)
            files = []
        for batch in batched(read_all(run, files, fast, out, picture_format, scaled, force), batch_size):
            start = time.perf_counter()
            try:
                with run.noting_warnings():
                    decoded = run_decoder(fast, stack(batch))
            except ValueError as error:
                for item in batch:
                    run.fail(item.source, str(error))
                continue
            took = time.perf_counter() - start
            seconds += took
            for item, picture in zip(batch, decoded, strict=True):
                try:
                    write_picture(item.output, picture, force=force)
                except ValueError as error:
                    run.fail(item.source, f"{item.source}: {error}")
                    continue
                run.finish(item.source, item.output)
                size = {"width": picture.shape[2], "height": picture.shape[1]}
                pictures.append(
                    {"input": str(item.source), "output": str(item.output), **size, "seconds": round(took / len(batch), 4)}
                )
    if as_json:
        about = {"decoder": decoder, "latent_space": fast.latent_space.name, "device": place, "dtype": used}
        skipped = [str(path) for path in run.skipped]
        typer.echo(
            json.dumps(
                {**about, "seconds": round(seconds, 4), "clips" if video else "pictures": pictures, "skipped": skipped, "failed": run.failures()},
                indent=2,
            )
        )
    else:
        summary = run.summary("clip" if video else "picture", out)
        typer.echo(f"{summary} ({decoder}, {place}, {used})" if run.done else summary)
    run.end()


@dataclass(frozen=True)
class Item:
    """One latent (C, h, w) in VAE units on its way from a file to a picture."""

    source: Path
    output: Path
    z: "Tensor"


def read_all(
    run: Run, files: list[Path], decoder: "FastDecoder", out: Path, suffix: str, scaled: bool, force: bool
) -> Iterator[Item]:
    """The latents that are still to be decoded. Files that cannot be read are the run's failures."""
    from ..files import read_latents

    claims = Claims()
    for file in run.over(files, len(files)):
        try:
            latents = vae_units(run, file, read_latents(file), decoder, scaled)
        except ValueError as error:
            run.fail(file, str(error))
            continue
        names = [file.stem] if len(latents) == 1 else [f"{file.stem}-{i}" for i in range(len(latents))]
        outputs = [out / f"{name}.{suffix}" for name in names]
        conflict = next(filter(None, (claims.conflict(output, file) for output in outputs)), None)
        if conflict:
            run.fail(file, conflict)
            continue
        for output, z in zip(outputs, latents, strict=True):
            if output.exists() and not force:
                run.skip(output)
            else:
                yield Item(file, output, z)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of up to `size` latents of one shape. No more than `size` of each shape are held at a time."""
    waiting: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        group = waiting.setdefault(tuple(item.z.shape), [])
        group.append(item)
        if len(group) == size:
            yield waiting.pop(tuple(item.z.shape))
    yield from waiting.values()


def stack(batch: list[Item]) -> "Tensor":
    import torch

    return torch.stack([item.z for item in batch])
