"""Measurements of a preset, kept beside its weights, and the tables made of them.

    fld evaluate DATA --decoder subpixel-sdxl --decoder taesdxl --out evaluation ...
    fld bench subpixel-sdxl taesdxl --size 512 --size 1024 --json bench.json
    python training/results.py subpixel-sdxl --quality evaluation/report.json --speed bench.json

copies both records to hub_cards/<preset>/ as quality.json and speed.json, and writes the tables between the marks in the card, a short one in
README.md, and what was asked and what is there (targets.py) in RESULTS.md. Without options it only writes the tables anew; --check writes nothing and fails where one differs.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import targets
from targets import IN_TIME, METRICS, Record, middle

from fast_latent_decoders.atomic import replacing
from fast_latent_decoders.evaluation import report, tables

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "hub_cards"
BLOCK = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- end of results -->)", re.DOTALL)
COLUMNS = ("psnr", "ssim", "ms_ssim", "ssimulacra2", "stlpips", "tint", "sharpness", "mesh", *IN_TIME)  # where they were measured
BRIEF = ("psnr", "ssim", "ssimulacra2", "stlpips", *IN_TIME)
ARROWS = {"higher": " ↑", "lower": " ↓", "one": " → 1", "zero": " → 0"}
SUMMARISED = ("subpixel-sdxl", "subpixel-sd", "subpixel-temporal-svd")  # presets whose records README sums up
TUNED = ", tuned"  # how a report calls a control row


def quality_of(path: Path, preset: str) -> Record:
    """A report of `fld evaluate` that measured the preset. Raises ValueError for another file."""
    try:
        record = json.loads(path.read_text())
        known = preset in next(iter(record["figures"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path} is no report.json of fld evaluate ({error})") from None
    if not known:
        raise ValueError(f"{path} did not measure {preset}")
    # Why a download failed is the affair of the machine that tried.
    record["unavailable"] = {name: why.split(" (")[0] for name, why in record["unavailable"].items()}
    return record


def speed_of(path: Path, preset: str) -> Record:
    """A record of `fld bench` that timed the preset. Raises ValueError for another file."""
    try:
        record = json.loads(path.read_text())
        known = any(row["decoder"] == preset and row["reason"] is None for row in record["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of fld bench ({error})") from None
    if not known:
        raise ValueError(f"{path} did not time {preset}")
    return record


def speed_table(record: Record) -> str:
    """Sizes, and milliseconds at each resolution and in each format; who was fastest of several ways to run counts."""
    dtypes, sizes = (list(dict.fromkeys(row[key] for row in record["rows"])) for key in ("dtype", "size"))
    head = ["decoder", "parameters", "fp16 MB", "MAC/px"]
    head += [f"{size} px{of_frames(record)}, ms: {' / '.join(tables.SHORT[name] for name in dtypes)}" for size in sizes]
    lines = []
    for each in record["decoders"]:
        line = [f"`{each['name']}`", f"{each['parameters'] / 1e6:.2f} M", f"{each['fp16_bytes'] / 1e6:.1f}", f"{each['mac_per_pixel'] / 1e3:,.0f} K"]
        for size in sizes:
            times = [fastest(record, each["name"], size, dtype) for dtype in dtypes]
            line.append(" / ".join(tables.ms(time) if time else "-" for time in times))
        lines.append(line)
    table = tables.markdown(head, lines)
    return f"{table}\n\n{tables.machine_lines(record)}\n\nMedian of up to {record['options']['repeats']} calls, one {'clip' if record['options']['frames'] else 'picture'}, decoders in turn."


def quality_table(record: Record) -> str:
    """Means and intervals at each share of the colour table, differences at the middle one, and real colours."""
    shares, first = list(record["figures"]), middle(record)
    columns = [name for name in COLUMNS if any(name in figures for figures in record["figures"][first].values())]
    lines, differences = [], []
    for share in (first, *(share for share in shares if share != first)):
        for name, figures in record["figures"][share].items():
            cells = [report.show(figures[metric], METRICS[metric]) if metric in figures else "-" for metric in columns]
            lines.append([f"`{name}`", *([share] if len(shares) > 1 else []), *cells])
            if share == first and any("difference" in figure for figure in figures.values()):
                changes = [report.show_difference(figures.get(metric, {}).get("difference"), METRICS[metric]) for metric in columns]
                differences.append([f"`{name}`", *changes])
    parts = [tables.markdown(["decoder", *(["share of colour table"] if len(shares) > 1 else []), *map(title, columns)], lines)]
    if differences:
        where = f" (share {first})" if len(shares) > 1 else ""
        parts += [f"Differences to `{record['baseline']}` on the same samples{where}, bold where the 95 % interval leaves out 0:"]
        parts += [tables.markdown(["decoder", *(METRICS[name].title for name in columns)], differences)]
    if record["colours"]:
        head = ["decoder", "flat: PSNR, dB ↑", "95th percentile, 1/255 ↓", "worst, 1/255 ↓", "textured: PSNR, dB ↑"]
        count = next(iter(record["colours"].values()))["n"]
        parts += [f"{count:,} colours of real latents, which no stand-in made:"]
        parts += [tables.markdown(head, [[f"`{name}`", *(f"{c[key]:.1f}" for key in ("psnr", "p95", "worst", "textured"))] for name, c in record["colours"].items()])]
    tuned = [name.removesuffix(TUNED) for name in record["figures"][first] if name.endswith(TUNED)]
    control = [f"`{name}{TUNED}` is the control row: {name}'s own decoder after a run on our pictures, with our losses (training/RESULTS.md)." for name in tuned]
    return "\n\n".join([*parts, *control, *report.notes(record)])


def block(preset: str) -> str:
    """All tables of a preset, from the records beside its weights."""
    parts = []
    for name, read, table in (("speed", speed_of, speed_table), ("quality", quality_of, quality_table)):
        if (path := CARDS / preset / f"{name}.json").is_file():
            parts.append(table(read(path, preset)))
    return "\n\n".join(parts) + "\n" if parts else ""


def summary(preset: str) -> str:
    """README's table: a line for each decoder whose quality was measured, and one for the VAE's own, whose weights are not at hand."""
    speed, quality = speed_of(CARDS / preset / "speed.json", preset), quality_of(CARDS / preset / "quality.json", preset)
    share, size, dtypes = middle(quality), max(row["size"] for row in speed["rows"]), [row["dtype"] for row in speed["rows"]]
    figures, baseline = quality["figures"][share], quality["baseline"]
    columns = [metric for metric in BRIEF if metric in figures[baseline]]
    pace = fastest(speed, baseline, size, dtypes[-1]) or math.nan
    lines = []
    for each in speed["decoders"]:
        name = each["name"]
        if name not in figures and not name.endswith("-vae"):
            continue
        dtype, time = next((dtype, time) for dtype in (dtypes[-1], dtypes[0]) if (time := fastest(speed, name, size, dtype)))
        line = [f"`{name}`", f"{each['fp16_bytes'] / 1e6:.1f}", f"{tables.ms(time)} ({tables.SHORT[dtype]})", f"{pace / time:.{1 if time <= pace else 2}f}"]
        for metric in columns:
            figure = figures.get(name, {}).get(metric)
            change = figure and figure.get("difference")
            ahead = change and (change["low"] > 0 if METRICS[metric].better == "higher" else change["high"] < 0)  # towards zero: from above
            value = f"{figure['mean']:.{METRICS[metric].digits}f}" if figure else "-"
            line.append(f"**{value}**" if ahead else value)
        lines.append([*line, f"{quality['colours'][name]['psnr']:.1f}" if name in quality["colours"] else "-"])
    head = ["decoder", "fp16 MB", f"{size} px{of_frames(speed)}, ms", "times as fast", *map(title, columns), "real flat colours, dB ↑"]
    told = f"{quality['n']} held-out {'clips' if IN_TIME[0] in columns else 'pictures'}, {share} of the colour table; bold: ahead of `{baseline}` with 95 % confidence. "
    return f"{tables.markdown(head, lines)}\n\n{told}{tables.machine_lines(speed).splitlines()[0]}. Everything, other shares too: [{preset}](hub_cards/{preset}/README.md)."


def of_frames(record: Record) -> str:
    """What is timed beside pictures."""
    return f" x {frames} frames" if (frames := record["options"]["frames"]) else ""


def title(metric: str) -> str:
    """PSNR, dB ↑"""
    info = METRICS[metric]
    return f"{info.title}{', ' + info.unit if info.unit else ''}{ARROWS[info.better]}"


def fastest(record: Record, decoder: str, size: int, dtype: str) -> float | None:
    """Milliseconds of one picture, of whichever way to run was fastest."""
    wanted = (decoder, size, dtype, 1, None)
    rows = [row["ms"] for row in record["rows"] if (row["decoder"], row["size"], row["dtype"], row["batch"], row["reason"]) == wanted]
    return min(rows, default=None)


def updated(path: Path, made: str) -> str:
    """A document's text with these tables in it. Raises ValueError where the marks are missing."""
    text = path.read_text()
    if len(BLOCK.findall(text)) != 1:
        raise ValueError(f"{path} must hold one line <!-- results --> and, after it, one line <!-- end of results -->")
    return BLOCK.sub(lambda _: made, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", help="with a folder under hub_cards")
    parser.add_argument("--quality", type=Path, help="report.json of fld evaluate")
    parser.add_argument("--speed", type=Path, help="--json record of fld bench")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is not that of its records")
    arguments = parser.parse_args()
    if arguments.check and (arguments.quality or arguments.speed):
        parser.error("--check takes no new records")
    try:
        for preset in arguments.presets:
            records = {}
            if arguments.quality:
                records["quality"] = quality_of(arguments.quality, preset)
            if arguments.speed:
                records["speed"] = speed_of(arguments.speed, preset)
            for name, record in records.items():
                with replacing(CARDS / preset / f"{name}.json", force=True) as path:
                    path.write_text(json.dumps(record, indent=1) + "\n")
        made = {CARDS / preset / "README.md": block(preset) for preset in arguments.presets}
        if set(SUMMARISED) & set(arguments.presets):
            made[ROOT / "README.md"] = "\n\n".join(map(summary, SUMMARISED)) + "\n"
        if set(targets.WANTED) & set(arguments.presets):
            made[ROOT / "training" / "RESULTS.md"] = targets.markdown(CARDS)
        stale = [(path, text) for path, told in made.items() if (text := updated(path, told)) != path.read_text()]
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    for path, text in stale:
        if arguments.check:
            print(f"the tables of {path} are not those of its records: python training/results.py {' '.join(arguments.presets)}")
        else:
            with replacing(path, force=True) as temporary:
                temporary.write_text(text)
            print(f"wrote the tables of {path}")
    if arguments.check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
