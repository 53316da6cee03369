"""Clips to look at: strips of frames, and several decoders side by side in one film."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..sheet import GAP, INK, LABEL, PAPER, shorten

HEIGHT = 128  # px of a frame in a strip
BAR = 22  # px of a label


def draw_strip(rows: Mapping[str, np.ndarray], count: int = 8) -> Image.Image:
    """Frames across, decoders down, as the paper's figure 4. Clips are (T, H, W, 3) uint8 of one shape."""
    first = next(iter(rows.values()))
    places = np.unique(np.linspace(0, len(first) - 1, min(count, len(first))).round().astype(int))
    width = round(HEIGHT * first.shape[2] / first.shape[1])
    sheet = Image.new("RGB", (LABEL + len(places) * (width + GAP), len(rows) * (HEIGHT + GAP) + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for j, (name, clip) in enumerate(rows.items()):
        top = GAP + j * (HEIGHT + GAP)
        pen.text((GAP, top), shorten(name, LABEL - GAP, font), INK, font)
        for i, place in enumerate(places):
            frame = Image.fromarray(clip[place]).resize((width, HEIGHT), Image.Resampling.LANCZOS)
            sheet.paste(frame, (LABEL + i * (width + GAP), top))
    return sheet


def write_side_by_side(path: Path, rows: Mapping[str, np.ndarray], fps: float = 8.0) -> None:
    """An H.264 film of the clips beside each other, each under its name. Clips are (T, H, W, 3) uint8 of one shape.

    The colours are BT.709 of limited range and the file says so.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    first = next(iter(rows.values()))
    count, height, width = first.shape[:3]
    labels = Image.new("RGB", (len(rows) * (width + GAP) - GAP, BAR), PAPER)
    pen, font = ImageDraw.Draw(labels), ImageFont.load_default(14)
    for i, name in enumerate(rows):
        pen.text((i * (width + GAP) + 2, 2), shorten(name, width - 4, font), INK, font)
    canvas = np.full(((BAR + height + 1) // 2 * 2, (labels.width + 1) // 2 * 2, 3), 255, np.uint8)  # yuv420p wants even sides
    canvas[:BAR, : labels.width] = np.array(labels)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = canvas.shape[1], canvas.shape[0], "yuv420p"
        stream.color_range, stream.colorspace = ColorRange.MPEG, Colorspace.ITU709
        stream.color_primaries = stream.color_trc = 1  # BT.709
        for t in range(count):
            for i, clip in enumerate(rows.values()):
                canvas[BAR : BAR + height, i * (width + GAP) : i * (width + GAP) + width] = clip[t]
            frame = av.VideoFrame.from_ndarray(canvas, format="rgb24").reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            frame.colorspace, frame.color_range = Colorspace.ITU709, ColorRange.MPEG
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
