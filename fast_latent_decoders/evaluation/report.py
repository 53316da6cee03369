"""Rows to figures, and figures to tables: JSON, Markdown and one HTML page that needs no other file."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .frechet import Moments, frechet, kernel_distance
from .info import MetricInfo
from .intervals import interval, paired
from .run import Store, slug

Figures = dict[str, Any]
KEPT = 2048  # features that a kernel distance sees: its cost grows with their square


def summarise(store: Store, infos: Mapping[str, MetricInfo], decoders: Sequence[str], shares: Sequence[float], baseline: str | None) -> Figures:
    """share -> decoder -> metric -> mean, 95 % interval and n; and of the differences to the baseline on the same samples."""
    found: Figures = {}
    for share in shares:
        values = {name: {row["key"]: row for row in store.rows if (row["decoder"], row["share"]) == (name, share)} for name in decoders}
        found[f"{share:g}"] = {}
        for name in decoders:
            figures: Figures = {}
            for metric in infos:
                mine = {key: row[metric] for key, row in values[name].items() if row.get(metric) is not None}
                if not mine:
                    continue
                figures[metric] = interval(list(mine.values()))._asdict()
                if baseline in values and name != baseline:
                    theirs = {key: row[metric] for key, row in values[baseline].items() if row.get(metric) is not None}
                    keys = [key for key in mine if key in theirs]
                    figures[metric]["difference"] = paired([mine[k] for k in keys], [theirs[k] for k in keys])._asdict()
            found[f"{share:g}"][name] = figures
    return found


def distances(store: Store, titles: Mapping[str, str], decoders: Sequence[str], shares: Sequence[float]) -> Figures:
    """share -> decoder -> network -> Frechet distance (n, d, whether it can be compared) and unbiased kernel distance."""
    found: Figures = {f"{share:g}": {name: {} for name in decoders} for share in shares}
    for network in titles:
        truth = store.features("truth", network)
        if len(truth) < 2:
            continue
        true_moments = moments_of(truth)
        for share in shares:
            for name in decoders:
                mine = store.features(slug(name, share), network)
                if len(mine) < 2:
                    continue
                distance = frechet(moments_of(mine), true_moments)
                kept = (torch.from_numpy(np.array(part[:: -(-len(part) // KEPT)])) for part in (mine, truth))
                kernel = kernel_distance(*kept, paired=True)  # the same pictures on both sides
                found[f"{share:g}"][name][network] = {
                    "frechet": distance.value, "n": distance.n, "d": distance.d, "comparable": distance.comparable,
                    "kernel": kernel.value, "kernel_low": kernel.low, "kernel_high": kernel.high,
                }  # fmt: skip
    return found


def moments_of(features: np.ndarray) -> Moments:
    moments = Moments(features.shape[1])
    for start in range(0, len(features), 1024):
        moments.update(torch.from_numpy(np.array(features[start : start + 1024])))
    return moments


def show(figure: Mapping[str, Any], info: MetricInfo) -> str:
    """24.01 ± 0.31: the mean and half the width of its interval."""
    if not figure["n"]:
        return "-"
    mean, half = figure["mean"], (figure["high"] - figure["low"]) / 2
    text = f"{mean:+.{info.digits}f}" if info.better == "zero" else f"{mean:.{info.digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{info.digits}f}"


def tables(results: Figures, infos: Mapping[str, MetricInfo], titles: Mapping[str, str]) -> dict[str, list[list[str]]]:
    """Title -> rows of cells, the first the header."""
    found: dict[str, list[list[str]]] = {}
    several = len(results["figures"]) > 1
    for share, decoders in results["figures"].items():
        at = f", {share} of the colour table" if several or share != "0" else ""
        used = [metric for metric in infos if any(metric in figures for figures in decoders.values())]
        arrows = {"higher": " ↑", "lower": " ↓", "zero": "", "one": " → 1"}
        heads = [f"{infos[m].title}{', ' + infos[m].unit if infos[m].unit else ''}{arrows[infos[m].better]}" for m in used]
        networks = [n for n in titles if any(n in d for d in results["distances"].get(share, {}).values())]
        heads += [f"{kind} {titles[n]} ↓" for n in networks for kind in ("Frechet,", "kernel x1000,")]
        rows = [["decoder", *heads]]
        for name, figures in decoders.items():
            cells = [show(figures[m], infos[m]) if m in figures else "-" for m in used]
            for network in networks:
                entry = results["distances"][share].get(name, {}).get(network)
                cells += [show_frechet(entry), f"{1e3 * entry['kernel']:.2f} [{1e3 * entry['kernel_low']:.2f}, {1e3 * entry['kernel_high']:.2f}]"] if entry else ["-", "-"]
            rows.append([name, *cells])
        found[f"Means and 95 % intervals{at}"] = rows
        if baseline := results["baseline"]:
            rows = [["decoder", *(infos[m].title for m in used)]]
            for name, figures in decoders.items():
                if name != baseline:
                    rows.append([name, *(show_difference(figures.get(m, {}).get("difference"), infos[m]) for m in used)])
            if len(rows) > 1:
                found[f"Differences to {baseline} on the same samples{at} (bold: the interval leaves out 0)"] = rows
    if colours := results.get("colours"):
        found["Colours of real latents, which no stand-in made"] = [
            ["decoder", "colours", "flat: PSNR, dB ↑", "95th percentile, 1/255 ↓", "worst, 1/255 ↓", "textured: PSNR, dB ↑"],
            *([name, str(c["n"]), f"{c['psnr']:.1f}", f"{c['p95']:.1f}", f"{c['worst']:.1f}", f"{c['textured']:.1f}"] for name, c in colours.items()),
        ]
    return found


def show_frechet(entry: Mapping[str, Any]) -> str:
    text = f"{entry['frechet']:.3g} (n {entry['n']}, d {entry['d']}"
    return text + (")" if entry["comparable"] else "; not comparable: n < d)")


def show_difference(figure: Mapping[str, Any] | None, info: MetricInfo) -> str:
    if not figure or not figure["n"]:
        return "-"
    text = f"{figure['mean']:+.{info.digits}f} [{figure['low']:+.{info.digits}f}, {figure['high']:+.{info.digits}f}]"
    return f"**{text}**" if figure["low"] > 0 or figure["high"] < 0 else text


def notes(results: Figures) -> list[str]:
    """What was measured, how and on what, a sentence each."""
    protocol, machine = results["protocol"], results["machine"]
    size = protocol["size"]
    how = (
        f"short side brought to {size} px (bicubic, antialiased), centre square" if size else "at their own size, cut to whole latents"
    ) + "; that tensor is the encoder's input and the reference, pictures are compared as 8-bit ones"
    encoder = protocol["encoder"]
    if reference := results["reference"]:
        how = f"latents without a truth: {reference}'s pictures of the same latents stand in its place, all figures tell of agreement with it, none of quality"
    seed = f", seed {protocol['seed']}" if encoder["posterior"] == "sample" else ""
    first = f" (the first {protocol['frames']} frames of each)" if any(source["kind"] == "clips" for source in protocol["sources"]) else ""
    told = [
        f"{results['n']} samples{first} of {', '.join(source['path'] for source in protocol['sources'])}: {how}.",
        f"Encoder: {encoder['name']} (weights {encoder['weights']}), {encoder['posterior']}{seed}." if encoder["posterior"] else f"Latents: {encoder['name']}.",
        f"{machine}, {results['date']}. Intervals: bootstrap over samples.",
    ]
    if results["failed"]:
        told.append(f"{len(results['failed'])} samples could not be read: {'; '.join(f'{k}: {v}' for k, v in list(results['failed'].items())[:5])}")
    return told + [f"{name}: not available: {why}" for name, why in results["unavailable"].items()]


def markdown(results: Figures, infos: Mapping[str, MetricInfo], titles: Mapping[str, str]) -> str:
    parts = []
    for title, rows in tables(results, infos, titles).items():
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append(f"**{title}**\n\n" + "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]))
    return "\n\n".join([*parts, *notes(results)]) + "\n"


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1500px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}.wide{overflow-x:auto}img{max-width:100%;height:auto}th{font-weight:600}"""


def page(results: Figures, infos: Mapping[str, MetricInfo], titles: Mapping[str, str], pictures: Mapping[str, Image.Image]) -> str:
    """One self-contained HTML page."""

    def cell(text: str, tag: str) -> str:
        bold = text.startswith("**")
        text = html.escape(text.strip("*"))
        return f"<{tag}>{f'<b>{text}</b>' if bold else text}</{tag}>"

    body = [f"<h1>{html.escape(results['title'])}</h1>", *(f"<p>{html.escape(note)}</p>" for note in notes(results))]
    for title, rows in tables(results, infos, titles).items():
        lines = ["<tr>" + "".join(cell(text, "td" if i else "th") for text in row) + "</tr>" for i, row in enumerate(rows)]
        body.append(f"<h2>{html.escape(title)}</h2><div class=wide><table>{''.join(lines)}</table></div>")
    for title, picture in pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)  # JPEG would add to the very errors that are to be seen
        data = base64.b64encode(buffer.getvalue()).decode()
        body.append(f'<h2>{html.escape(title)}</h2><div class=wide><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></div>')
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(results['title'])}</title>"
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
