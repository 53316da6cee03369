"""Pictures of a report: contact sheet, worst samples, strips of frames, swatches. They are decoded anew, so none had to be kept."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..sheet import Compared, draw_sheet
from .clips import draw_strip
from .colour import draw_swatches, flat_colours, textured_colours
from .decoders import Candidate
from .encoders import FrozenEncoder
from .info import MetricInfo
from .reading import read
from .run import Eyes, Settings, Store, decode_sample, prepare, to_bytes, to_floats

SHOWN = 6  # samples of the contact sheet
WORST = 5
GAIN = 4  # of error maps


def file_name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:80]


def as_array(frames: Tensor) -> np.ndarray:
    return frames.permute(0, 2, 3, 1).numpy()


def draw(
    protocol: Settings,
    eyes: Eyes,
    candidates: Sequence[Candidate],
    store: Store,
    infos: Mapping[str, MetricInfo],
    baseline: str,
) -> dict[str, Image.Image]:
    """Title -> picture, at the middle share of the colour table."""
    protocol = at_middle(protocol)
    share = protocol.shares[0]
    truth = eyes.reference.name if eyes.reference else "source"
    entries = {entry.key: (source, entry) for source, entry in protocol.chosen}
    by = next((m for m in ("stlpips", "psnr") if m in infos), next(iter(infos), None))
    first: dict[tuple[str, str], np.ndarray] = {}  # frames, by sample and decoder: most sheets show the same samples

    def compared(keys: Sequence[str], shown: Sequence[Candidate], maps: bool) -> list[Compared]:
        found = []
        for key in keys:
            x, decoded = decode_sample(protocol, eyes, [c for c in shown if (key, c.name) not in first], *entries[key])
            first.update({(key, candidate.name): as_array(to_bytes(y[:1]))[0] for candidate, _, y in decoded})
            source = as_array(x[:1])[0]
            pictures: dict[str, np.ndarray] = {}
            for candidate in shown:
                made = pictures[candidate.name] = first[key, candidate.name]
                if maps:
                    error = GAIN * np.abs(made.astype(int) - source)
                    pictures[f"{candidate.name}: error x{GAIN}"] = error.clip(max=255).astype(np.uint8)
            figures = {c.name: figures_of(store, key, c.name, share) for c in shown}
            found.append(Compared(key.split("/")[-1], source, pictures, figures))
        return found

    done = [key for key in entries if any(row["key"] == key for row in store.rows)]
    spread = [done[int((i + 0.5) * len(done) / min(SHOWN, len(done)))] for i in range(min(SHOWN, len(done)))]
    rows = compared(spread, candidates, maps=True)
    sheets = {"Contact sheet": draw_sheet(list(rows[0].decoded), rows, truth)}
    if by is not None:
        for candidate in candidates:
            values = {r["key"]: r.get(by) for r in store.rows if (r["decoder"], r["share"]) == (candidate.name, share)}
            known = {key: value for key, value in values.items() if value is not None}
            worst = sorted(known, key=lambda key: infos[by].badness(known[key]), reverse=True)[:WORST]
            shown = list({c.name: c for c in (candidate, *(c for c in candidates if c.name == baseline))}.values())
            if worst:
                sheets[f"Worst of {candidate.name}, by {infos[by].title}"] = draw_sheet([c.name for c in shown], compared(worst, shown, maps=False), truth)
    if protocol.sources[0].kind.endswith("clips"):
        for key in spread[:2]:
            sheets[f"Frames of {key.split('/')[-1]}"] = draw_strip(clip_rows(protocol, eyes, candidates, entries[key]))
    return sheets


def at_middle(protocol: Settings) -> Settings:
    """The middle share of the colour table alone: no other is shown, so none is decoded."""
    return replace(protocol, shares=[protocol.shares[len(protocol.shares) // 2]])


def clip_rows(protocol: Settings, eyes: Eyes, candidates: Sequence[Candidate], entry: Any) -> dict[str, np.ndarray]:
    """"truth" and each decoder's frames at the protocol's one share, (T, H, W, 3) uint8."""
    x, decoded = decode_sample(protocol, eyes, candidates, *entry)
    return {eyes.reference.name if eyes.reference else "truth": as_array(x)} | {candidate.name: as_array(to_bytes(y)) for candidate, _, y in decoded}


def first_clip(protocol: Settings, eyes: Eyes, candidates: Sequence[Candidate], store: Store) -> dict[str, np.ndarray]:
    """Of the first clip that was measured, "truth" and each decoder's frames, at the middle share."""
    entry = next(pair for pair in protocol.chosen if any(row["key"] == pair[1].key for row in store.rows))
    return clip_rows(at_middle(protocol), eyes, candidates, entry)


def figures_of(store: Store, key: str, decoder: str, share: float) -> dict[str, float | None]:
    row = next(r for r in store.rows if (r["key"], r["decoder"], r["share"]) == (key, decoder, share))
    return {"psnr": row.get("psnr"), "ssim": row.get("ssim")}


def colour_report(
    protocol: Settings, encoder: FrozenEncoder, candidates: Sequence[Candidate], every: int = 1
) -> tuple[dict[str, dict[str, float]], dict[str, Image.Image]]:
    """Of each decoder the figures of flat and textured real colours, and its swatches."""
    textures = []
    for source, entry in protocol.chosen:
        with suppress(Exception):  # broken samples were told of
            textures.append(to_floats(prepare(read(source, entry, 1).frames, 256)))
        if len(textures) == 32:
            break
    figures, swatches = {}, {}
    for candidate in candidates:
        flat = flat_colours(candidate.decode, encoder, every)
        textured = [textured_colours(candidate, encoder, texture, seed=i) for i, texture in enumerate(textures)]
        figures[candidate.name] = {"psnr": flat.psnr, "p95": flat.p95, "worst": flat.worst, "textured": float(np.mean(textured)), "n": len(flat.asked)}
        swatches[f"Flat colours of {candidate.name}: above asked for, below decoded"] = draw_swatches(flat)
    return figures, swatches
