"""What was asked of each preset and what it has: the table at the head of RESULTS.md, from the records beside the weights (results.py writes it)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fast_latent_decoders.evaluation import tables
from fast_latent_decoders.evaluation.metrics import METRICS as PICTURE_METRICS
from fast_latent_decoders.evaluation.temporal import VIDEO_METRICS

Record = dict[str, Any]
METRICS = PICTURE_METRICS | VIDEO_METRICS
QUALITY = ("psnr", "ssim", "ms_ssim", "ssimulacra2", "stlpips")  # differences to the baseline
IN_TIME = ("temporal_difference", "flicker", "warping_excess")
AHEAD = dict.fromkeys(QUALITY, 0.0)
SUBPIXEL = {"flat": 42.0, "worst": 12.0}
OTHERS = {"flat": 38.0}
WANTED: dict[str, dict[str, float]] = {  # issues 12 and 13
    "subpixel-sdxl": {**AHEAD, "psnr": 0.7, **SUBPIXEL},
    "subpixel-small-sdxl": {"psnr": 0.0, "ssimulacra2": 0.0, "stlpips": 0.0, **SUBPIXEL},
    "tae-192-sdxl": {"psnr": 1.0, "ssimulacra2": 0.0, "stlpips": 0.0, **OTHERS},
    "efficientvit-sdxl": {**AHEAD, **OTHERS},
    "subpixel-sd": {**AHEAD, "psnr": 0.7, **SUBPIXEL},
    "subpixel-temporal-svd": {**AHEAD, **dict.fromkeys(IN_TIME, 0.0), **SUBPIXEL},
    "tae-192-svd": OTHERS,
    "efficientvit-svd": OTHERS,
    "tae-temporal-svd": OTHERS,
}
RIVALS = {"efficientvit-sdxl": ["tae-192-sdxl"], "subpixel-temporal-svd": ["tae-192-svd", "tae-temporal-svd"]}  # who must be matched too
SHARP = (0.9, 1.1)
TINT = 1.0  # 1/255, of each channel's mean


def markdown(cards: Path) -> str:
    """A table for pictures and one for clips, of the presets that were measured."""
    paths = {name: cards / name / "quality.json" for name in WANTED}
    records = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    parts = []
    for metrics in (QUALITY, QUALITY + IN_TIME):
        names = [name for name, record in records.items() if (IN_TIME[0] in of(record, name)) == (metrics != QUALITY)]
        head = ["preset", *(METRICS[metric].title for metric in metrics), "tint of a channel", "mean size of tint", "sharpness"]
        head += ["flat colours, dB", "worst", "textured, dB", "reversed at 0 or 1"]
        parts.append(tables.markdown(head, [row(name, records, metrics) for name in names]))
    return "\n\n".join(parts) + "\n"


def row(name: str, records: dict[str, Record], metrics: Sequence[str]) -> list[str]:
    record, wanted = records[name], WANTED[name]
    mine, baseline = of(record, name), of(record, record["baseline"])
    cells = [f"`{name}`"]
    for metric in metrics:
        best = max if METRICS[metric].better == "higher" else min
        asked = best([wanted[metric], *(change(records[rival], rival, metric) for rival in RIVALS.get(name, []) if rival in records)]) if metric in wanted else None
        found = change(record, name, metric)
        cells.append(cell(found, asked, asked is None or best(found, asked) == found, f"+.{METRICS[metric].digits}f"))
    tint, size, theirs, sharp = max((mine[f"tint_{c}"]["mean"] for c in "rgb"), key=abs), mine["tint"]["mean"], baseline["tint"]["mean"], mine["sharpness"]["mean"]
    cells += [cell(tint, TINT, abs(tint) < TINT, "+.1f"), cell(size, theirs, size < theirs, ".2f"), cell(sharp, SHARP[0], SHARP[0] <= sharp <= SHARP[1], ".2f")]
    colours, others = record["colours"][name], record["colours"][record["baseline"]]
    cells.append(cell(colours["psnr"], wanted["flat"], colours["psnr"] >= wanted["flat"], ".1f"))
    cells.append(cell(colours["worst"], wanted.get("worst"), colours["worst"] <= wanted.get("worst", 255), ".1f"))
    cells.append(cell(colours["textured"], others["textured"], colours["textured"] > others["textured"], ".1f"))
    ends = {share: record["figures"][share][name] for share in (min(record["figures"], key=float), max(record["figures"], key=float))}
    back = [
        f"{METRICS[metric].title} at {share}"
        for share, figures in ends.items()
        for metric in metrics
        if metric in wanted and is_behind(figures[metric]["difference"], METRICS[metric].better)
    ]
    return [*cells, ", ".join(back) or "none"]


def middle(record: Record) -> str:
    """The share of the colour table that differences are given at."""
    return list(record["figures"])[len(record["figures"]) // 2]


def of(record: Record, name: str) -> Record:
    """Its figures at the middle share of the colour table."""
    return record["figures"][middle(record)][name]


def change(record: Record, name: str, metric: str) -> float:
    """The mean difference to the baseline of its own record."""
    return float(of(record, name)[metric]["difference"]["mean"])


def is_behind(difference: Record, better: str) -> bool:
    """With 95 % confidence."""
    return bool(difference["high"] < 0 if better == "higher" else difference["low"] > 0)


def cell(found: float, asked: float | None, met: bool, form: str) -> str:
    """What it has (what was asked); bold where it falls short."""
    text = f"{found:{form}}"
    return (text if met else f"**{text}**") + (f" ({asked:{form.lstrip('+')}})" if asked is not None else "")
