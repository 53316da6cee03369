"""Clips in and out of files, frame by frame: no clip is ever whole in memory.

Conventions: a frame is (H, W, 3) uint8, RGB. Films are BT.709 of limited range, and say so.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .atomic import FileError, reason, replacing

SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")  # what is looked for in folders; a .gif is a picture there
FPS = 7.0  # Stable Video Diffusion's

# Near-lossless, since small differences between decoders are what one looks at.
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    ".mp4": ("libx264", {"crf": "12"}),
    ".webm": ("libvpx-vp9", {"crf": "16", "b": "0", "row-mt": "1"}),
}
FORMATS = (*CODECS, ".gif")


def write_clip(path: str | Path, frames: Iterable[np.ndarray], fps: float = FPS, *, force: bool = False) -> int:
    """Write frames of one size as .mp4 (H.264), .webm (VP9) or .gif, whole or not at all. Returns their number.

    An odd side is repeated by one pixel in films, whose colours have half the resolution. A .gif keeps time in hundredths of a second.

    Raises:
        FileError: `path` exists and `force` is not given, has another suffix, or cannot be written; there are no frames.
        ImportError: PyAV is missing; the message names the extra.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise FileError(f"{path} has no known suffix of a clip: expected {', '.join(FORMATS)}")
    if not 0.1 <= fps <= 1000:
        raise FileError(f"{path} was not written: expected between 0.1 and 1000 frames a second, got {fps}")
    counted = _Counted(frames)
    with replacing(path, force=force) as temporary:
        if suffix == ".gif":
            pictures = (Image.fromarray(frame) for frame in counted)
            first = next(pictures, None)
            if first is not None:
                first.save(temporary, "GIF", save_all=True, append_images=pictures, duration=1000 / fps, loop=0)
        else:
            _write_film(temporary, counted, fps, suffix)
        if not counted.number:
            raise FileError(f"{path} was not written: there are no frames")
    return counted.number


class _Counted:
    def __init__(self, frames: Iterable[np.ndarray]) -> None:
        self.frames, self.number = frames, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for frame in self.frames:
            self.number += 1
            yield frame


def _write_film(path: Path, frames: Iterable[np.ndarray], fps: float, suffix: str) -> None:
    av = _av()
    from av.video.reformatter import ColorRange, Colorspace

    codec, options = CODECS[suffix]
    with av.open(str(path), "w", format=suffix[1:]) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.pix_fmt, stream.color_range, stream.colorspace = "yuv420p", ColorRange.MPEG, Colorspace.ITU709
        stream.color_primaries = stream.color_trc = 1  # BT.709
        for picture in frames:
            height, width = picture.shape[:2]
            even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = even.shape[:2]
            frame = av.VideoFrame.from_ndarray(even, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            frame.colorspace, frame.color_range = Colorspace.ITU709, ColorRange.MPEG
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_clip(path: str | Path) -> tuple[Iterator[np.ndarray], float]:
    """The frames of a film, and how many there are in a second (`FPS` where it does not tell).

    Raises:
        FileError: the file is no film, broken or empty; a break further on is raised when its frame comes.
        ImportError: PyAV is missing; the message names the extra.
    """
    path, av = Path(path), _av()
    try:
        if path.stat().st_size == 0:
            raise FileError(f"{path} is empty (0 bytes); write it again")
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise FileError(f"{path} holds no video")
            rate = container.streams.video[0].average_rate
    except (OSError, av.FFmpegError) as error:
        raise FileError(f"{path} cannot be read as a film: {reason(error)}") from error
    return _frames(path), float(rate) if rate else FPS


def _frames(path: Path) -> Iterator[np.ndarray]:
    av = _av()
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(container.streams.video[0]):
                yield frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise FileError(f"{path} is broken: {reason(error)}") from error


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("clips need PyAV: pip install 'fast-latent-decoders[video]'") from error
    return av
