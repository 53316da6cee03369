"""Pictures in and out of files.

Conventions: a picture is a tensor (3, H, W), RGB, float32 in [-1, 1].
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .atomic import FileError, reason, replacing

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")  # what is looked for in folders

# Writing: near-lossless where a format is lossy, since small differences between decoders are what one looks at.
FORMATS = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
}


@dataclass(frozen=True)
class Picture:
    """A picture read from a file: (3, H, W) in [-1, 1]; `note` says what was cut off, if anything."""

    tensor: Tensor
    note: str | None = None


def read_picture(path: str | Path, multiple: int = 8) -> Picture:
    """Read a picture upright and as RGB, with transparency on white, cropped centrally to sides that `multiple` divides.

    Raises:
        FileError: the file is no picture, broken, too large for Pillow's limit, or smaller than `multiple`.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise FileError(f"{path} is empty (0 bytes); write it again")
        with Image.open(path) as image:
            image.load()
            values = to_rgb(path, ImageOps.exif_transpose(image))
    except FileError:
        raise
    except Image.UnidentifiedImageError as error:
        raise FileError(f"{path} is not a picture that Pillow can read; expected {', '.join(SUFFIXES)}") from error
    except Image.DecompressionBombError as error:
        raise FileError(f"{path} is larger than Pillow allows ({reason(error)})") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error ... on broken bytes
        raise FileError(f"{path} cannot be read as a picture: {reason(error)}") from error
    inside = cropped(path, values, multiple)
    note = None
    if inside.shape != values.shape:
        sizes = (f"{array.shape[1]}x{array.shape[0]}" for array in (values, inside))
        note = f"cropped from {' to '.join(sizes)}, multiples of {multiple}"
    return Picture(torch.from_numpy(inside).permute(2, 0, 1).contiguous() * 2 - 1, note)


def cropped(path: Path, values: np.ndarray, multiple: int = 8) -> np.ndarray:
    """The middle of (H, W, 3) whose sides `multiple` divides. Raises FileError for smaller ones."""
    height, width = (side // multiple * multiple for side in values.shape[:2])
    if not height or not width:
        raise FileError(f"{path} is {values.shape[1]}x{values.shape[0]}; expected sides of at least {multiple} pixels")
    top, left = (values.shape[0] - height) // 2, (values.shape[1] - width) // 2
    return values[top : top + height, left : left + width]


def to_rgb(path: Path, image: Image.Image) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1]."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        # Pillow's own conversion to 8 bits clips these at 255 instead of dividing.
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise FileError(f"{path} holds 32-bit values; expected 8 or 16 bits a channel: convert it first")
        return np.repeat((grey / 65535).astype(np.float32)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def to_bytes(picture: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1], any float type -> (H, W, 3) uint8, clamped and rounded to nearest.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"expected a picture (3, H, W), got shape {tuple(picture.shape)}")
    picture = picture.detach().float()
    if not torch.isfinite(picture).all():
        raise ValueError("the picture has values that are NaN or infinite; decode it in float32")
    return (picture.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def write_picture(path: str | Path, picture: Tensor, *, force: bool = False) -> None:
    """Write a picture (3, H, W) in [-1, 1] as .png, .jpg, .jpeg or .webp.

    Raises:
        FileError: `path` exists and `force` is not given, has another suffix, or cannot be written; the picture is not finite.
    """
    path = Path(path)
    try:
        values = to_bytes(picture)
    except ValueError as error:
        raise FileError(f"{path} was not written: {error}") from error
    write_image(path, Image.fromarray(values), force=force)


def write_image(path: str | Path, image: Image.Image, *, force: bool = False) -> None:
    """Write an RGB image in the format of its suffix, whole or not at all. Raises FileError as `write_picture` does."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise FileError(f"{path} has no known picture suffix: expected {', '.join(FORMATS)}")
    name, options = FORMATS[path.suffix.lower()]
    with replacing(path, force=force) as temporary:
        try:
            image.save(temporary, name, **options)
        except ValueError as error:  # a side too long for the format
            raise OSError(reason(error)) from error
