"""Quality against time: which decoders nothing beats in both."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .tables import how

METRICS = {"psnr": "PSNR, dB", "ssimulacra2": "SSIMULACRA2", "stlpips": "ST-LPIPS (axis turned: up is better)"}
LOWER_IS_BETTER = ("stlpips",)


def read_quality(files: Iterable[Path]) -> dict[str, dict[str, float]]:
    """Decoder -> metric -> mean at the middle share of the colour table, from report.json of `fld evaluate`; later files win.

    Raises:
        ValueError: a file is not of that layout; the message names it.
    """
    found: dict[str, dict[str, float]] = {}
    for file in files:
        try:
            shares = list(json.loads(file.read_text())["figures"].values())
            for name, figures in shares[len(shares) // 2].items():
                found[name] = {key: float(figures[key]["mean"]) for key in METRICS if key in figures}
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from error
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{file} is not a report.json of fld evaluate") from error
    return found


def fastest_rows(rows: Iterable[dict[str, Any]], size: int) -> dict[str, dict[str, Any]]:
    """Decoder -> its fastest timed row at `size`, batch 1."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["reason"] is None and row["size"] == size and row["batch"] == 1:
            best[row["decoder"]] = min(best.get(row["decoder"], row), row, key=lambda each: each["ms"])
    return best


def pareto(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of (time, quality) that no other one beats in both, from fast to slow; quality counts upwards."""
    found: list[str] = []
    top = float("-inf")
    for name, (_, quality) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if quality > top:
            found.append(name)
            top = quality
    return found


def draw(record: dict[str, Any], quality: dict[str, dict[str, float]], suffix: str) -> bytes:
    """The figure as a file's content: one panel for each metric, at the record's first size; decoders without a figure as lines.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fast-latent-decoders[eval]'") from error
    size = record["options"]["sizes"][0]
    rows = fastest_rows(record["rows"], size)
    metrics = [metric for metric in METRICS if any(metric in quality.get(name, {}) for name in rows)] or ["psnr"]
    figure = Figure(figsize=(5.2 * len(metrics), 4), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        sign = -1 if metric in LOWER_IS_BETTER else 1
        points = {name: (row["ms"], sign * quality[name][metric]) for name, row in rows.items() if metric in quality.get(name, {})}
        front = pareto(points)
        axis.plot(*zip(*(points[name] for name in front), strict=True) if front else ([], []), color="0.6", lw=1, zorder=1)
        for i, (name, row) in enumerate(rows.items()):
            colour = f"C{i}"
            if name in points:
                time, value = points[name]
                spread = [[time - row["q1_ms"]], [row["q3_ms"] - time]]
                axis.errorbar(time, value, xerr=spread, fmt="o" if name in front else "x", color=colour, capsize=2)
                axis.annotate(f"{name} ({how(row)})", (time, value), xytext=(0, -12), textcoords="offset points", ha="center", fontsize=8)
            else:
                axis.axvline(row["ms"], color=colour, ls=":", lw=1)
                label = f"{name} ({how(row)}), no quality figure"
                place = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right", "va": "top"}
                axis.annotate(label, (row["ms"], 0.98), fontsize=6, **place)
        axis.set_xscale("log")
        axis.margins(0.25)
        axis.set_xlabel(f"ms for {size} x {size}")
        axis.set_ylabel(METRICS[metric])
        if sign < 0:
            axis.yaxis.set_major_formatter(lambda value, _: f"{-value:.3f}")
        axis.grid(alpha=0.3)
    busy = ", machine busy" if record["idleness"]["busy"] else ""
    figure.suptitle(f"Quality against time ({record['machine'].get('gpu') or record['machine']['cpu']}{busy})", fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format=suffix.lstrip("."))
    return file.getvalue()
