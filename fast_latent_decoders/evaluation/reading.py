"""Encoded pictures and clips to tensors (T, 3, H, W), uint8; a picture has T = 1."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..pictures import to_rgb
from .samples import Entry, Source


class Sample(NamedTuple):
    frames: Tensor  # (T, 3, H, W) uint8, RGB; a picture has T = 1
    boxes: np.ndarray | None  # (n, 4) float32, x0 y0 x1 y1 in px, of faces; None where the metadata say nothing
    key: str  # shard.tar:key, or the file's path


class TooSmall(Exception):
    """The picture is whole, but smaller than what is asked for."""


def read_picture(file: BinaryIO, side: int = 0) -> Tensor:
    """(1, 3, H, W) uint8: upright, grey as RGB, transparency on white, 16 bits reduced to 8.

    Raises:
        TooSmall: the short side has fewer than `side` px; found without decoding.
        Exception: the picture is broken; Pillow raises a dozen types.
    """
    try:
        image = Image.open(file)
    except UnidentifiedImageError:  # its message has an address in memory, another one each time
        raise ValueError("no picture that Pillow can read") from None
    with image:
        if min(image.size) < side:
            raise TooSmall
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "RGB" and not image.has_transparency_data:
            values = np.array(image)
        else:
            values = (to_rgb(Path("it"), image) * 255).round().astype(np.uint8)
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def read_clip(file: BinaryIO, count: int, choose: Callable[[int], tuple[int, int]], side: int = 0) -> Tensor:
    """(count, 3, H, W) uint8. `choose` is told how many frames there are and gives the first one and the stride.

    Raises:
        TooSmall: the short side has fewer than `side` px.
        ValueError: there are fewer than `count` frames.
        Exception: the clip is broken; the types are FFmpeg's.
    """
    # A header may promise more frames than there are: then the first ones are taken.
    for attempt in (choose, lambda total: (0, 1)):
        file.seek(0)
        frames = _frames(file, count, attempt, side)
        if len(frames) == count:
            return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    raise ValueError(f"it has {len(frames)} frames and {count} are needed")


def _frames(file: BinaryIO, count: int, choose: Callable[[int], tuple[int, int]], side: int) -> list[np.ndarray]:
    import av

    with av.open(file, "r") as container:
        if not container.streams.video:
            raise ValueError("it holds no video")
        stream = container.streams.video[0]
        if min(stream.width, stream.height) < side:
            raise TooSmall
        stream.codec_context.thread_count = 1  # the workers are the threads
        total = stream.frames
        if not total:
            total = sum(packet.size > 0 for packet in container.demux(stream))
            container.seek(0)
        start, stride = choose(total)
        frames = container.decode(stream)
        if start > 60 and stream.average_rate and stream.time_base:
            # Far into a long clip: begin at the key frame before it. Half a frame less, so that rounding skips none.
            pts = (stream.start_time or 0) + round((start - 0.5) / float(stream.average_rate * stream.time_base))
            container.seek(pts, stream=stream)
            frames = (frame for frame in container.decode(stream) if frame.pts is not None and frame.pts >= pts)
            start = 0
        return [frame.to_ndarray(format="rgb24") for frame in islice(frames, start, start + (count - 1) * stride + 1, stride)]


def read(
    source: Source, entry: Entry, frames: int = 1, side: int = 0, rng: np.random.Generator | None = None, stride: int = 1
) -> Sample:
    """The decoded sample: a whole picture, or `frames` frames of a clip: the first ones or, given `rng`, drawn ones.

    Raises:
        TooSmall: a side is shorter than `side` or than the source's min_size.
        Exception: it is corrupt.
    """

    def window(total: int) -> tuple[int, int]:
        if rng is None or total < frames:
            return 0, 1
        step = int(rng.integers(1, min(stride, (total - 1) // max(1, frames - 1)) + 1))
        return int(rng.integers(total - (frames - 1) * step)), step

    side = max(side, source.min_size)
    with entry.open() as file:
        pictures = read_picture(file, side) if source.kind == "pictures" else read_clip(file, frames, window, side)
    boxes = entry.boxes
    if boxes is not None and boxes.size and boxes.max() <= 1:
        height, width = pictures.shape[2:]
        boxes = boxes * np.array([width, height, width, height], np.float32)
    return Sample(pictures, boxes, entry.key)
