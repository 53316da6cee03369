"""Pictures for training: WebDataset shards in, random crops out."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F


def load_pictures(shards: Sequence[str | Path]) -> list[Tensor]:
    """Every picture of the shards as (3, H, W) uint8, in the shards' order.

    Raises:
        FileNotFoundError: no shard was given.
        ValueError: a sample holds no picture that can be read; nothing is skipped in silence.
    """
    if not shards:
        raise FileNotFoundError("expected at least one shard (.tar) of pictures, found none; check the data patterns of the config")
    # Every process reads every shard: they differ in the crops that they draw.
    dataset = webdataset.WebDataset([str(s) for s in shards], shardshuffle=False, empty_check=False, nodesplitter=lambda every: every)
    pictures = []
    for sample in dataset:
        data = next((sample[key] for key in ("jpg", "jpeg", "png", "webp") if key in sample), None)
        try:
            image = Image.open(io.BytesIO(data or b"")).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"sample {sample['__key__']} of {sample['__url__']} holds no picture that can be read") from error
        pictures.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())
    return pictures


def spread(pictures: list[Tensor], count: int) -> list[Tensor]:
    """`count` of the pictures, evenly spread."""
    return pictures[:: max(1, len(pictures) // count)][:count]


def random_crop(pictures: Sequence[Tensor], size: int, rng: np.random.Generator, colour: float = 0.05) -> Tensor:
    """One crop (3, size, size) in [-1, 1]: random picture, scale, place and flip, and now and then other colours.

    Pictures are only ever reduced, so that a crop is as sharp as a photograph is. The share `colour` of the crops passes
    through a random 3x3 colour matrix (FIELD 2b: TAESD's own augmentation).
    """
    fitting = [p for p in (pictures[i] for i in rng.integers(len(pictures), size=16)) if min(p.shape[1:]) >= size]
    if not fitting:
        fitting = [p for p in pictures if min(p.shape[1:]) >= size]
    if not fitting:
        raise ValueError(f"expected pictures with a short side of at least {size} px to crop from, found none")
    picture = fitting[0]
    # Read a window of `window` px and reduce it to `size`: half of the crops stay at the picture's own scale.
    most = min(picture.shape[1:]) / size
    window = size if rng.random() < 0.5 else int(size * rng.uniform(1, min(most, 3)))
    top, left = (int(rng.integers(n - window + 1)) for n in picture.shape[1:])
    crop = picture[None, :, top : top + window, left : left + window].float() / 127.5 - 1
    if window != size:
        crop = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    if rng.random() < 0.5:
        crop = crop.flip(3)
    if rng.random() < colour:
        matrix = torch.from_numpy(rng.normal(size=(3, 3))).float()
        mixed = torch.einsum("ij,njhw->nihw", matrix, crop)
        crop = torch.lerp(crop, mixed, float(rng.random())).clamp(-1, 1)
    return crop[0]
