"""Clips to look at: strips of frames, and several decoders side by side in one film."""

from collections.abc import Iterable, Iterator, Mapping

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


def side_by_side(rows: Mapping[str, Iterable[np.ndarray]]) -> Iterator[np.ndarray]:
    """Frames of the clips beside each other, each under its name. The clips' frames are (H, W, 3) uint8 of one size."""
    canvas: np.ndarray | None = None
    for frames in zip(*rows.values(), strict=True):
        height, width = frames[0].shape[:2]
        if canvas is None:
            labels = Image.new("RGB", (len(rows) * (width + GAP) - GAP, BAR), PAPER)
            pen, font = ImageDraw.Draw(labels), ImageFont.load_default(14)
            for i, name in enumerate(rows):
                pen.text((i * (width + GAP) + 2, 2), shorten(name, width - 4, font), INK, font)
            canvas = np.full((BAR + height, labels.width, 3), 255, np.uint8)
            canvas[:BAR] = np.array(labels)
        for i, frame in enumerate(frames):
            canvas[BAR:, i * (width + GAP) : i * (width + GAP) + width] = frame
        yield canvas.copy()
