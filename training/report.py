"""Curves of one or more runs as one HTML page that needs nothing else: python training/report.py RUN [RUN ...] [--out report.html]

Losses (smoothed, as they are logged), validation with the baseline dashed, learning rate, throughput; then the last values, what
differs between the configurations, and each run's last validation picture. Runs that are still going on can be read too.
"""

import argparse
import base64
import html
import io
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export import read_log

from fast_latent_decoders.atomic import FileError, replacing

VALIDATION = {
    "psnr": "PSNR, dB (higher is better)", "ssim": "SSIM (higher is better)", "stlpips": "ST-LPIPS (lower is better)",
    "tint_size": "mean |tint|, 1/255 (lower is better)", "sharpness": "power near Nyquist, of the truth's (1 is right)",
    "mesh": "mesh of 8 px, 1/255 (lower is better)", "psnr_faces": "PSNR in faces, dB (higher is better)",
    "flat_psnr": "flat colours: PSNR, dB (higher is better)", "flat_worst": "flat colours: worst error, 1/255 (lower is better)",
}  # fmt: skip
THROUGHPUT = {
    "crops_per_s": "crops a second", "waiting": "share of time waiting for data", "encoding": "share of time encoding"
}  # fmt: skip
OTHERS = {"step", "time", "lr", "skipped", *THROUGHPUT}
COLUMNS = 3
STYLE = """body{font:15px/1.5 sans-serif;max-width:1240px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin-bottom:1em}td,th{padding:.25em .9em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}svg,img{max-width:100%;height:auto}.chip{padding:0 .6em;margin-right:.5em}
.wide{overflow-x:auto}"""

Curve = list[tuple[int, float]]  # (step, value)


@dataclass
class Run:
    """What one log holds, by what is drawn."""

    name: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)  # of the last start
    baseline: dict[str, float] = field(default_factory=dict)
    losses: dict[str, Curve] = field(default_factory=dict)
    val: dict[str, Curve] = field(default_factory=dict)
    pace: dict[str, Curve] = field(default_factory=dict)  # learning rate and throughput


def add(curves: dict[str, Curve], step: int, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            curves.setdefault(key, []).append((step, value))


def read_run(folder: Path) -> Run:
    """Raises FileNotFoundError where there is no log.jsonl."""
    run = Run(folder.resolve().name, folder)
    for entry in read_log(folder):
        if isinstance(entry.get("config"), dict):
            run.config = entry["config"]
        elif isinstance(entry.get("baseline"), dict):
            run.baseline = entry["baseline"]
        elif isinstance(step := entry.get("step"), int):
            if isinstance(entry.get("val"), dict):
                add(run.val, step, entry["val"])
            elif "norm" in entry:
                add(run.losses, step, {key: value for key, value in entry.items() if key not in OTHERS})
                add(run.pace, step, {key: value for key, value in entry.items() if key in ("lr", *THROUGHPUT)})
    return run


# ---------------------------------------------------------------- curves


def panels(runs: list[Run]) -> list[tuple[str, str, str]]:
    """(which curves, key, title) of everything that any run has."""
    terms = dict.fromkeys(key for run in runs for key in run.losses if key != "norm")
    found = [("val", key, title) for key, title in VALIDATION.items()]
    found += [("losses", key, f"loss: {key}") for key in terms] + [("losses", "norm", "gradient norm")]
    found += [("pace", key, title) for key, title in {"lr": "learning rate", **THROUGHPUT}.items()]
    return [(kind, key, title) for kind, key, title in found if any(key in getattr(run, kind) for run in runs)]


def colour(index: int) -> str:
    return f"C{index % 10}"


def draw(runs: list[Run]) -> Any:
    """A matplotlib figure with one panel for each quantity, the runs in their colours."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogLocator, MaxNLocator

    shown = panels(runs)
    rows = max(1, math.ceil(len(shown) / COLUMNS))
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(12, 0.7 + 2.7 * rows), layout=ConstrainedLayoutEngine(h_pad=0.1))
        axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True).flatten()
        for axis in axes[len(shown) :]:
            axis.set_axis_off()
        handles: dict[str, Any] = {}
        for axis, (kind, key, title) in zip(axes, shown, strict=False):
            values: list[float] = []
            baselines = {run.baseline[key] for run in runs if kind == "val" and key in run.baseline}
            for i, run in enumerate(runs):
                if curve := sorted(getattr(run, kind).get(key, [])):
                    steps, heights = zip(*curve, strict=True)
                    marker = "o" if kind == "val" or len(curve) == 1 else ""
                    handles[run.name] = axis.plot(
                        steps, heights, color=colour(i), marker=marker, markersize=3, lw=1.3, label=run.name
                    )[0]
                    values += heights
                if kind == "val" and key in run.baseline:
                    grey = len(baselines) == 1
                    style = {"color": "0.35" if grey else colour(i), "ls": "--", "lw": 1.1}
                    handles["baseline" if grey else f"baseline of {run.name}"] = axis.axhline(run.baseline[key], **style)
            if kind == "losses" and min(values) > 0 and max(values) > 4 * min(values):
                axis.set_yscale("log")
                axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter("{x:g}")
            elif key == "lr":
                axis.yaxis.set_major_formatter("{x:g}")
            if kind == "pace":
                axis.set_ylim(0, 1 if key in ("waiting", "encoding") else 1.1 * max(values))
            axis.set_title(title, loc="left", fontsize=9.5)
            axis.xaxis.set_tick_params(labelbottom=True)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k" if step >= 1000 else f"{step:g}")
        for axis in axes[max(0, len(shown) - COLUMNS) : len(shown)]:
            axis.set_xlabel("step")
        if handles:
            handles = dict(sorted(handles.items(), key=lambda item: item[0].startswith("baseline")))
            figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=min(5, len(handles)), frameon=False)
    return figure


# ---------------------------------------------------------------- page


def table(titles: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f'<div class="wide"><table>{line(titles, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def last_values(runs: list[Run]) -> str:
    rows = [["last step"] + [str(max((c[-1][0] for c in (*run.losses.values(), *run.val.values())), default="")) for run in runs]]
    for kind, key, title in panels(runs):
        curves = [getattr(run, kind).get(key) for run in runs]
        cells = [f"{curve[-1][1]:.4g}" if curve else "" for curve in curves]
        if kind == "val":
            told = [
                f" (baseline {run.baseline[key]:.4g})" if cell and key in run.baseline else ""
                for run, cell in zip(runs, cells, strict=True)
            ]
            cells = [cell + more for cell, more in zip(cells, told, strict=True)]
        rows.append([title, *cells])
    return table(["", *(run.name for run in runs)], rows)


def flat(config: Any, place: str = "") -> dict[str, str]:
    """Nested keys as a.b.0.c -> text."""
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    if not items:
        return {place: str(config)}
    return {k: v for key, value in items for k, v in flat(value, f"{place}.{key}".strip(".")).items()}


def differences(runs: list[Run]) -> str:
    runs = [run for run in runs if run.config]
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [
        [key, *(config.get(key, "") for config in configs)] for key in keys if len({config.get(key) for config in configs}) > 1
    ]
    if not rows:
        return "<p>Nothing.</p>"
    return table(["", *(run.name for run in runs)], rows)


def markdown(runs: list[Run]) -> str:
    """A row for each run: what differs between their configurations, steps, last measurements. For RESULTS.md."""
    configs = [flat(run.config) for run in runs]
    keys = [key for key in dict.fromkeys(k for c in configs for k in c) if len({c.get(key) for c in configs}) > 1 and key != "out"]
    titles = {key: title.split(" (")[0].replace("|", "\\|") for key, title in VALIDATION.items()}
    measured = [(key, title) for key, title in titles.items() if any(key in run.val for run in runs)]
    lines = ["| run | " + " | ".join([*(f"`{key}`" for key in keys), "steps", *(title for _, title in measured)]) + " |"]
    lines.append("|---" * (2 + len(keys) + len(measured)) + "|")
    for run, config in zip(runs, configs, strict=True):
        step = str(max((curve[-1][0] for curve in run.val.values()), default=""))
        values = [f"{run.val[key][-1][1]:.4g}" if key in run.val else "" for key, _ in measured]
        lines.append("| " + " | ".join([run.name, *(config.get(key, "") for key in keys), step, *values]) + " |")
    return "\n".join(lines)


def last_picture(run: Run) -> str:
    """The newest by the numbers in the names; an <img> that holds the file itself."""
    found = sorted((run.folder / "pictures").glob("*.png"), key=lambda p: ([int(n) for n in re.findall(r"\d+", p.name)], p.name))
    if not found:
        return ""
    data = base64.b64encode(found[-1].read_bytes()).decode()
    name = html.escape(f"{run.name}: {found[-1].name}")
    return f'<h3>{name}</h3><img alt="{name}" src="data:image/png;base64,{data}">'


def page(runs: list[Run], svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    pictures = "".join(map(last_picture, runs))
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Training runs</title><style>{STYLE}</style></head><body>'
        f"<h1>Training runs</h1><p>{html.escape(', '.join(run.name for run in runs))}. Losses are smoothed as they are logged.</p>{svg}"
        f"<h2>Last values</h2>{last_values(runs)}"
        + (f"<h2>What differs between the configurations</h2>{differences(runs)}" if len(runs) > 1 else "")
        + (f"<h2>Last validation pictures</h2>{pictures}" if pictures else "")
        + "</body></html>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders with a log.jsonl")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--png", action="store_true", help="the curves also as a picture beside it")
    parser.add_argument("--markdown", action="store_true", help="print a table of the last measurements instead")
    parser.add_argument("--force", action="store_true", help="replace --out")
    arguments = parser.parse_args()
    try:
        runs = [read_run(folder) for folder in dict.fromkeys(arguments.runs)]
        if len({run.name for run in runs}) < len(runs):
            for run in runs:
                run.name = run.folder.as_posix()
        if arguments.markdown:
            print(markdown(runs))
            return
        figure, svg = draw(runs), io.StringIO()
        figure.savefig(svg, format="svg")
        with replacing(arguments.out, force=arguments.force) as temporary:
            temporary.write_text(page(runs, svg.getvalue()))
        if arguments.png:
            with replacing(arguments.out.with_suffix(".png"), force=arguments.force) as temporary:
                figure.savefig(temporary, format="png", dpi=130)
    except FileNotFoundError as error:
        print(f"{Path(error.filename).parent} holds no log.jsonl: expected the folder of a run of train.py", file=sys.stderr)
        raise SystemExit(2) from None
    except FileError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{arguments.out}: {len(runs)} run{'s' * (len(runs) > 1)}")


if __name__ == "__main__":
    main()
