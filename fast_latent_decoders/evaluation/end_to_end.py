"""What stands around a decode: bringing the picture to the host, bytes, files; and the pipeline that made the latents."""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..pictures import to_bytes
from .timing import Clock, Timing, measure

if TYPE_CHECKING:
    from .bench import Options
    from .subjects import Subject

STEPS = (4, 8, 30, 50)  # one-step models' kin, distilled ones, and what is usual
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    "PNG, level 0 (stored)": ("PNG", {"compress_level": 0}),
    "PNG, level 1": ("PNG", {"compress_level": 1}),
    "PNG, level 6 (Pillow's default)": ("PNG", {"compress_level": 6}),
    "PNG, level 9": ("PNG", {"compress_level": 9}),
    "WebP, lossless": ("WEBP", {"lossless": True, "method": 0}),
    "WebP, quality 95": ("WEBP", {"quality": 95}),
    "JPEG, quality 95": ("JPEG", {"quality": 95, "subsampling": 0}),
}
DEFAULT_CODEC = "PNG, level 6 (Pillow's default)"  # what `fld decode` writes


def measure_saving(
    options: "Options", subject: "Subject", clock: Clock, say: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Times of every stage after the decode, for each size: one picture, on its own.

    The picture has a photograph's spectrum, so that codecs have a photograph's work; it does not depend on the decoder.
    """
    found = []
    for size in options.sizes:
        say(f"saving a picture of {size} px")
        picture = photograph_like(size)
        image = Image.fromarray(to_bytes(picture))
        dtype = getattr(torch, options.dtypes[0])
        there = picture.to(options.device, dtype)
        tasks: dict[str, Callable[[], object]] = {
            f"to the host as {options.dtypes[0]}": lambda there=there: there.cpu(),  # type: ignore[misc]
            "to bytes, then to the host": lambda there=there: to_bytes(there),  # type: ignore[misc]
        }
        sizes = {}
        for name, codec in CODECS.items():
            sizes[name] = len(encoded(image, *codec))
            tasks[name] = lambda image=image, codec=codec: encoded(image, *codec)  # type: ignore[misc]
        timed = measure(tasks, repeats=options.repeats, budget=options.budget, clock=clock)
        for name, result in timed.items():
            row: dict[str, Any] = {"size": size, "stage": name, "file_bytes": sizes.get(name), "reason": None}
            if isinstance(result, Timing):
                row |= {"ms": result.median, "q1_ms": result.q1, "q3_ms": result.q3, "cpu_ms": result.cpu}
            else:
                row["reason"] = result
            found.append(row)
    return found


def encoded(image: Image.Image, name: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def photograph_like(size: int) -> Tensor:
    """(3, size, size) in [-1, 1]: noise whose amplitude falls with frequency as a photograph's does, its channels alike."""
    random = np.random.default_rng(0)
    y, x = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)
    falloff = 1 / np.maximum(np.hypot(y, x), 1 / size) ** 1.6  # files and times then come near those of decoded photographs
    shared = np.fft.rfft2(random.standard_normal((size, size)))
    planes = [np.fft.irfft2((shared + 0.3 * np.fft.rfft2(random.standard_normal((size, size)))) * falloff, (size, size)) for _ in "rgb"]
    values = np.stack(planes)
    return torch.from_numpy(np.clip(values / (2.5 * values.std()), -1, 1).astype(np.float32))


# ---------------------------------------------------------------- the pipeline


def share(decode_ms: float, unet_ms: float, steps: int) -> float:
    """The decode's part of `steps` UNet calls and one decode. Text encoders, a few per cent, are left out."""
    return decode_ms / (steps * unet_ms + decode_ms)


def gain(slow_ms: float, fast_ms: float, unet_ms: float, steps: int) -> float:
    """How many times sooner the whole pipeline is done with the faster decoder."""
    return (steps * unet_ms + slow_ms) / (steps * unet_ms + fast_ms)


def shares(rows: Sequence[dict[str, Any]], unet_ms: float) -> list[dict[str, Any]]:
    """For each timed row: its share of a pipeline at each of STEPS, and the pipeline's gain over the VAE's own decoder.

    `unet_ms` is one step for the row's batch and size. The VAE's row of the same size, batch and frames is what the gain
    refers to: the one in the same dtype if there is one, since a CPU measures it in one only.
    """
    timed = [row for row in rows if row["reason"] is None]
    found = []
    for row in timed:
        vaes = [
            other
            for other in timed
            if other["decoder"].endswith("-vae") and all(other[key] == row[key] for key in ("size", "batch", "frames"))
        ]
        vae = min(vaes, key=lambda other: (other["dtype"] != row["dtype"], other["ms"]), default=None)
        found.append(
            {
                **{key: row[key] for key in ("decoder", "size", "batch", "frames", "dtype", "layout", "mode", "ms")},
                "unet_ms": unet_ms,
                "share": {str(steps): share(row["ms"], unet_ms, steps) for steps in STEPS},
                "gain": {str(steps): gain(vae["ms"], row["ms"], unet_ms, steps) for steps in STEPS} if vae else None,
            }
        )
    return found
