"""Clips for the commands: the latents (frames, C, h, w) of one file are one clip."""

import json
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import typer

from .loading import DtypeName, guarded, load_decoder, vae_units
from .run import Claims, Run, collect, writable_folder

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from ..decoder import FastDecoder

VideoFormat = Literal["mp4", "webm", "gif", "frames"]


def clip_frames(decoder: "FastDecoder", z: "Tensor") -> Iterator["np.ndarray"]:
    """(H, W, 3) uint8 of latents (frames, C, h, w) in VAE units, one after the other; of families that need it, the whole clip first.

    Raises:
        ValueError: memory ran out; the message says what to try.
    """
    from ..pictures import to_bytes

    with guarded():
        stream = decoder.decode_stream(z)
        try:
            first = next(stream)[0]
        except TypeError:
            import torch

            with torch.inference_mode():
                yield from map(to_bytes, decoder.decode(z, num_frames=len(z)).sample)
            return
        for frame in chain([first], (frame for frame, _ in stream)):
            yield to_bytes(frame[0])


def decode_clips(
    run: Run, files: list[Path], decoder: "FastDecoder", out: Path, kind: VideoFormat, fps: float | None, scaled: bool, force: bool
) -> list[dict[str, Any]]:
    """Decode each file to a film, or to .png frames. Returns what --json tells of each."""
    from ..clips import FPS, write_clip
    from ..files import read_latents

    claims, told = Claims(), []
    for file in run.over(files, len(files)):
        start = time.perf_counter()
        try:
            latents = read_latents(file)
            z = vae_units(run, file, latents, decoder, scaled)
            names = [f"{file.stem}-{i:05}.png" for i in range(len(z))] if kind == "frames" else [f"{file.stem}.{kind}"]
            outputs = [out / name for name in names]
            if conflict := next(filter(None, (claims.conflict(output, file) for output in outputs)), None):
                raise ValueError(conflict)
            if not force and all(output.exists() for output in outputs):
                run.skip(outputs[0])
                continue
            rate = fps or latents.fps or FPS
            frames = clip_frames(decoder, z)
            with run.noting_warnings():
                if kind == "frames":
                    write_frames(outputs, frames, force=force)
                else:
                    write_clip(outputs[0], frames, rate, force=force)
        except (ValueError, ImportError) as error:
            run.fail(file, str(error))
            continue
        run.finish(file, outputs[0])
        about = {"frames": len(z), "fps": rate, "width": 8 * z.shape[3], "height": 8 * z.shape[2]}
        told.append({"input": str(file), "output": str(outputs[0]), **about, "seconds": round(time.perf_counter() - start, 4)})
    return told


def write_frames(outputs: list[Path], frames: Iterator["np.ndarray"], *, force: bool) -> None:
    """Frames that are already there stay as they are, unless `force` is given."""
    from PIL import Image

    from ..pictures import write_image

    for output, frame in zip(outputs, frames, strict=True):
        if force or not output.exists():
            write_image(output, Image.fromarray(frame), force=force)


def compare_clips(
    paths: list[Path], places: dict[str, str], out: Path, device: str, dtype: DtypeName, fps: float | None, scaled: bool, force: bool, as_json: bool
) -> NoReturn:
    """Of each clip a film of the decoders side by side and a strip of frames, the source first where a film of its name lies beside it.

    `places`: what is shown -> what is loaded. A film that is given itself is encoded by each decoder's own encoder. Frames are decoded twice rather than kept.
    """
    import numpy as np

    from .. import clips
    from ..evaluation.clips import draw_strip, side_by_side
    from ..files import READERS, read_latents
    from ..pictures import write_image
    from .encode import encode_film

    with Run("comparing", quiet=as_json) as run:
        files = collect(run, paths, (*READERS, *clips.SUFFIXES), "latent or film")
        if not files or not writable_folder(run, out):
            run.end()
        encoded = {file.stem for file in files if file.suffix.lower() in READERS}
        files = [file for file in files if file.suffix.lower() in READERS or file.stem not in encoded]  # the others are sources
        decoders = {name: load_decoder(place, device, dtype) for name, place in places.items()}
        for file in run.over(files, len(files)):
            film, strip = out / f"{file.stem}.mp4", out / f"{file.stem}.png"
            if film.exists() and strip.exists() and not force:
                run.skip(film)
                continue
            try:
                source = file if file.suffix.lower() in clips.SUFFIXES else next((s for s in map(file.with_suffix, clips.SUFFIXES) if s.exists()), None)
                rate = clips.read_clip(source)[1] if source else None
                with run.noting_warnings():
                    if source == file:
                        latents = {name: encode_film(decoder, file, None)[0] for name, decoder in decoders.items()}
                    else:
                        read = read_latents(file)
                        rate = read.fps or rate
                        latents = {name: vae_units(run, file, read, decoder, scaled) for name, decoder in decoders.items()}
                    count = len(next(iter(latents.values())))
                    rows = {name: partial(clip_frames, decoder, latents[name]) for name, decoder in decoders.items()}
                    if source:
                        rows = {"source": partial(source_frames, source, count, next(iter(latents.values())).shape[2:]), **rows}
                    shown = set(np.linspace(0, count - 1, min(8, count)).round().astype(int).tolist())
                    few = {name: np.stack([frame for i, frame in enumerate(frames()) if i in shown]) for name, frames in rows.items()}
                    write_image(strip, draw_strip(few), force=force or not film.exists())
                    clips.write_clip(film, side_by_side({name: frames() for name, frames in rows.items()}), fps or rate or clips.FPS, force=force)
            except (ValueError, RuntimeError, ImportError) as error:
                run.fail(file, " ".join(str(error).split()))
                continue
            run.finish(file, film)
    if as_json:
        done = [str(path) for path in run.done]
        typer.echo(json.dumps({"decoders": list(places), "clips": done, "skipped": [str(path) for path in run.skipped], "failed": run.failures()}, indent=2))
    else:
        typer.echo(run.summary("clip", out))
    run.end()


def source_frames(file: Path, count: int, size: "torch.Size") -> Iterator["np.ndarray"]:
    """The first `count` frames of a film, cropped as `fld encode` does. Raises ValueError where they do not fit latents of `size`."""
    from ..clips import read_clip
    from ..pictures import cropped

    number = 0
    for frame in islice(read_clip(file)[0], count):
        inside = cropped(file, frame)
        if inside.shape[:2] != (8 * size[0], 8 * size[1]):
            raise ValueError(f"{file} has frames of {frame.shape[1]}x{frame.shape[0]} px, which latents of {size[1]}x{size[0]} are not of")
        number += 1
        yield inside
    if number < count:
        raise ValueError(f"{file} has {number} frames, and the latents {count}: it is not their source; move it elsewhere")
