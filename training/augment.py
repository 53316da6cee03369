"""Random changes of pictures and clips, all made before they are encoded, so that a latent belongs to the whole of its target.

How strong they are is a Stage's matter; stages follow each other as the run goes (progressive augmentation).
"""

import io

import numpy as np
import torch
from config import Stage
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor


def augment(frames: Tensor, boxes: np.ndarray | None, stage: Stage, rng: np.random.Generator) -> tuple[Tensor, np.ndarray | None]:
    """One crop, the same for every frame: place, reduction, flip, colours, compression.

    Pictures are only ever reduced, so that a crop is as sharp as a photograph is; half of the crops keep the picture's own scale.
    Pillow computes in integers on one thread: a crop does not depend on how many processes or threads make it.

    Args:
        frames: (T, 3, H, W) uint8.
        boxes: (n, 4) float32, x0 y0 x1 y1 in px, or None.

    Returns:
        (T, 3, crop, crop) uint8, and the boxes as seen in the crop; those outside it are dropped.

    Raises:
        ValueError: the frames are smaller than the crop.
    """
    size, (height, width) = stage.crop, frames.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"expected a short side of at least {size} px to crop from, got {width}x{height}")
    most = max(1.0, min(min(height, width) / size, stage.reduce))
    window = size if rng.random() < 0.5 else int(size * rng.uniform(1, most))
    top, left = int(rng.integers(height - window + 1)), int(rng.integers(width - window + 1))
    flip = rng.random() < stage.flip
    colours = colour_matrix(rng) if rng.random() < stage.colour else None
    grey = rng.random() < stage.grey
    quality = int(rng.integers(60, 96)) if rng.random() < stage.jpeg else None
    vivid = rng.uniform(size=3) if rng.random() < stage.vivid else None  # drawn last: without it crops are what they were before it

    pictures = []
    for frame in frames[..., top : top + window, left : left + window]:
        picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
        if window != size:
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)  # antialiased where it reduces
        if flip:
            picture = ImageOps.mirror(picture)
        if colours is not None:
            picture = picture.convert("RGB", colours)
        if vivid is not None:
            picture = generated(picture, *vivid)
        if grey:
            picture = picture.convert("L").convert("RGB")
        if quality is not None:
            picture = compressed(picture, quality)
        pictures.append(torch.from_numpy(np.array(picture)))
    target = torch.stack(pictures).permute(0, 3, 1, 2).contiguous()
    return target, None if boxes is None else moved(boxes, top, left, window, size, flip)


def colour_matrix(rng: np.random.Generator) -> tuple[float, ...]:
    """A random share of a random 3x3 mixture of the channels about mid-grey (FIELD 2b: TAESD's own augmentation), for Pillow."""
    identity = np.eye(3)
    matrix = identity + rng.random() * (rng.normal(size=(3, 3)) - identity)
    offset = 127.5 * (1 - matrix.sum(axis=1))  # mid-grey stays mid-grey
    return tuple(np.column_stack([matrix, offset]).flatten().tolist())


def generated(picture: Image.Image, sharper: float, more_colour: float, more_contrast: float) -> Image.Image:
    """A photograph nearer to what diffusion models make, whose edges are harder and colours stronger; amounts from 0 to 1."""
    picture = ImageEnhance.Color(picture).enhance(1 + more_colour)
    picture = ImageEnhance.Contrast(picture).enhance(1 + 0.3 * more_contrast)
    return picture.filter(ImageFilter.UnsharpMask(radius=1, percent=round(200 * sharper), threshold=0))


def compressed(picture: Image.Image, quality: int) -> Image.Image:
    """The picture as JPEG leaves it."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def moved(boxes: np.ndarray, top: int, left: int, window: int, size: int, flip: bool) -> np.ndarray:
    """Boxes of a picture as boxes of its crop, cut off at the edges."""
    boxes = ((boxes - np.array([left, top, left, top])) * (size / window)).astype(np.float32)
    if flip:
        boxes = np.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], axis=1)
    boxes = boxes.clip(0, size)
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
