"""A contact sheet: the source and what each decoder makes of it, with a zoomed detail beside each picture."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BOX = 320  # pixels of a thumbnail's and of a detail's square
DETAIL = 64  # pixels of the picture that the detail shows, five times enlarged
GAP, LABEL, LINE = 8, 200, 22
INK, PAPER, MARK = "black", "white", "red"


@dataclass(frozen=True)
class Compared:
    """One input: pictures are (H, W, 3) uint8 of one shape; `source` is None and `figures` empty where none is known."""

    name: str
    source: np.ndarray | None
    decoded: dict[str, np.ndarray]
    figures: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def caption(self, decoder: str) -> str:
        """PSNR / SSIM, or nothing."""
        if decoder not in self.figures:
            return ""
        psnr, ssim = self.figures[decoder]["psnr"], self.figures[decoder]["ssim"]
        said = "equal" if psnr is None else f"{psnr:.2f} dB"
        return said if ssim is None else f"{said} / {ssim:.3f}"


def draw_sheet(decoders: Sequence[str], inputs: Sequence[Compared], source: str = "source") -> Image.Image:
    """Inputs across; down, first the sources under the name `source`, then a row for each decoder, with its name and its figures."""
    column, line = 2 * BOX + 2 * GAP, BOX + LINE + GAP
    sheet = Image.new("RGB", (LABEL + len(inputs) * (column + GAP) + GAP, LINE + GAP + (len(decoders) + 1) * line), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for j, label in enumerate([source, *decoders]):
        pen.text((GAP, LINE + GAP + j * line), shorten(label, LABEL - GAP, font), INK, font)
    for i, row in enumerate(inputs):
        x = LABEL + i * (column + GAP)
        pen.text((x, GAP // 2), shorten(row.name, column, font), INK, font)
        corner = busiest(row.source if row.source is not None else next(iter(row.decoded.values())))
        for j, name in enumerate([None, *decoders]):
            y = LINE + GAP + j * line
            picture = row.source if name is None else row.decoded[name]
            if picture is None:
                pen.text((x, y), "no source picture", INK, font)
                continue
            paste(sheet, pen, picture, corner, (x, y), mark=j == 0 or (j == 1 and row.source is None))
            pen.text((x, y + BOX + 2), row.caption(name) if name else "", INK, font)
    return sheet


def paste(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    picture: np.ndarray,
    corner: tuple[int, int],
    at: tuple[int, int],
    *,
    mark: bool,
) -> None:
    """A thumbnail and, right of it, the detail whose top left corner (row, column) is `corner`."""
    image = Image.fromarray(picture)
    scale = BOX / max(image.size)
    thumbnail = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    sheet.paste(thumbnail, at)
    top, left = corner
    right, bottom = min(left + DETAIL, image.width), min(top + DETAIL, image.height)
    zoom = BOX // DETAIL
    detail = image.crop((left, top, right, bottom))
    # Nearest, so that the decoder's own pixels are seen and not the enlargement's.
    detail = detail.resize((detail.width * zoom, detail.height * zoom), Image.Resampling.NEAREST)
    sheet.paste(detail, (at[0] + BOX + GAP, at[1]))
    if mark:
        pen.rectangle([at[k % 2] + scale * side for k, side in enumerate((left, top, right, bottom))], outline=MARK)


def busiest(picture: np.ndarray) -> tuple[int, int]:
    """The corner (row, column) of the DETAIL square with the strongest edges: where decoders differ."""
    grey = picture.astype(np.float32).mean(axis=2)
    edges = np.abs(np.diff(grey, axis=0, append=grey[-1:])) + np.abs(np.diff(grey, axis=1, append=grey[:, -1:]))
    rows = range(0, max(1, grey.shape[0] - DETAIL + 1), DETAIL // 4)
    columns = range(0, max(1, grey.shape[1] - DETAIL + 1), DETAIL // 4)
    return max(((y, x) for y in rows for x in columns), key=lambda c: edges[c[0] : c[0] + DETAIL, c[1] : c[1] + DETAIL].sum())


def shorten(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The text, or its end after an ellipsis: of a path the end says more."""
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength("…" + text) > width:
        text = text[1:]
    return "…" + text
