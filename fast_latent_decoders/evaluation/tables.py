"""The record of a benchmark as Markdown that also reads well on a terminal."""

from collections.abc import Sequence
from typing import Any

from .end_to_end import CODECS, DEFAULT_CODEC, STEPS

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
BYTES = "to bytes, then to the host"


def tables(record: dict[str, Any], *, unsynchronised: bool = False) -> str:
    """All tables of a record of `bench.run`. `unsynchronised` shows beside each time when the call returned."""
    parts = [machine_lines(record), _decoders(record)]
    for key in dict.fromkeys(map(_group, record["rows"])):
        rows = [row for row in record["rows"] if _group(row) == key]
        parts += [f"**{_title(rows[0])}**", _times(rows, record, unsynchronised)]
    parts.append(_legend(record, unsynchronised))
    for size in dict.fromkeys(row["size"] for row in record["saving"]):
        parts += [f"**From latents to a file, {size} x {size}, one picture**", _stages(record, size)]
        if whole := _whole(record, size):
            parts.append(whole)
    for key in dict.fromkeys(map(_group, record["pipeline"])):
        rows = [row for row in record["pipeline"] if _group(row) == key]
        parts.append(f"**The decoder in a whole pipeline, {_title(rows[0])}, {ms(rows[0]['unet_ms'])} ms for each step**")
        parts.append(_pipeline(rows))
    if record["pipeline"]:
        parts.append("The decode's share of the time, and how many times sooner the pipeline is done than with the VAE's own decoder.")
    return "\n\n".join(parts)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A padded table; the first `left` columns are aligned left, the others right."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(head))]
    pad = [[cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))] for line in lines]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (pad[0], rule, *pad[1:]))


def ms(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.{0 if value >= 99.5 else 1 if value >= 9.95 else 2}f}"


def how(row: dict[str, Any]) -> str:
    """fp32, bf16 tiled, fp16 NCHW compiled: what is not the default is named."""
    layout = "" if row["layout"] == "channels_last" else "NCHW"
    return " ".join(filter(None, (SHORT[row["dtype"]], layout, "" if row["mode"] == "eager" else row["mode"])))


def _group(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["size"], row["batch"], row["frames"]


def _title(row: dict[str, Any]) -> str:
    what = f"batch {row['batch']}" if row["frames"] is None else f"{row['batch']} x {row['frames']} frames"
    return f"{row['size']} x {row['size']}, {what}"


def machine_lines(record: dict[str, Any]) -> str:
    """Machine, versions, date, what it does at best, and whether it was busy."""
    about, idle, roof = record["machine"], record["idleness"], record["roofline"]
    device = about.get("gpu") or f"{about['cpu']}, {about['threads']} of {about['cores']} cores"
    special = [name for name in about["instructions"] if name in ("avx512_bf16", "amx_bf16")]
    if "gpu" not in about:
        device += f", {', '.join(special) or 'no bfloat16 instructions'}"
    rates = ", ".join(f"{SHORT[name]} {rate / 1e9:,.0f}" for name, rate in roof["matrix"].items() if rate)
    lines = [
        f"{device}; torch {record['versions']['torch']}, {about['system'].split('-')[0]}, {record['date'][:10]}",
        f"At best: matrix products {rates} GFLOP/s; copy {roof['copy'] / 1e9:.1f} GB/s, read and written",
    ]
    if idle["busy"]:
        lines += ["", "**The machine was busy: compare rows, do not quote them.**", *(f"- {reason}" for reason in idle["reasons"])]
    return "\n".join(lines)


def _decoders(record: dict[str, Any]) -> str:
    rows = [
        [
            each["name"],
            each["about"],
            f"{each['parameters'] / 1e6:.2f} M",
            f"{each['fp16_bytes'] / 1e6:.1f}",
            "-" if each["file_bytes"] is None else f"{each['file_bytes'] / 1e6:.1f}",
            f"{each['mac_per_pixel'] / 1e3:,.0f} K",
        ]
        for each in record["decoders"]
    ]
    return markdown(["decoder", "what", "parameters", "fp16 MB", "file MB", "MAC/px"], rows, left=2)


def _times(rows: Sequence[dict[str, Any]], record: dict[str, Any], unsynchronised: bool) -> str:
    memory = record["options"]["memory"]
    head = ["decoder", "how", "ms", "quartiles", "CPU ms", "Mpx/s", "of best", "n"]
    head += ["MB"] * memory + ["unsync. ms"] * unsynchronised
    notes: dict[str, int] = {}

    def note(sentence: str) -> str:
        return f"[{notes.setdefault(sentence, len(notes) + 1)}]"

    lines = []
    for row in rows:
        cells = [row["decoder"], how(row)]
        if row["reason"] is not None:
            lines.append(cells + [note(row["reason"])] + ["-"] * (len(head) - 3))
            continue
        cells += [ms(row["ms"]), f"{ms(row['q1_ms'])}-{ms(row['q3_ms'])}" if row["repeats"] > 1 else "-", ms(row["cpu_ms"])]
        cells += [f"{row['mpx_per_s']:.2f}", of_best(row), str(row["repeats"])]
        if memory:
            cells.append(note(row["peak_reason"]) if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}")
        lines.append(cells + [ms(row["returned_ms"])] * unsynchronised)
    table = markdown(head, lines, left=2)
    return "\n".join([table, *([""] if notes else []), *(f"[{number}] {sentence}" for sentence, number in notes.items())])


def of_best(row: dict[str, Any]) -> str:
    """The nearer roof: 62% M of the matrix rate, or 80% C of the copy bandwidth."""
    found = {"M": row["matrix_share"] or 0.0, "C": row["copy_share"] or 0.0}
    roof = max(found, key=lambda key: found[key])
    return f"{100 * found[roof]:.0f}% {roof}"


def _legend(record: dict[str, Any], unsynchronised: bool) -> str:
    options = record["options"]
    hosts = "" if record["machine"]["device"] == "cpu" else ", here the host's"
    lines = [
        f"ms: median of n calls (asked: {options['repeats']}; fewer where they would take over {options['budget']:g} s),",
        "in turn with the other rows, after warm-up, device waited for.",
        f"CPU ms: processor time of one call on one thread{hosts}.",
        "of best: share of this machine's matrix rate (M) or, counting every operation's reads and writes, of its",
        "copy bandwidth (C), whichever is nearer. Over 100 % C: operations are fused or stay in the cache;",
        "over 100 % M: the matrix product was disturbed, or is a slow one in this format.",
    ]
    if options["memory"]:
        lines.append(
            "MB: peak of a fresh process for loading and one decode, without its imports."
            if record["machine"]["device"] == "cpu"
            else "MB: peak of the device's allocator during a call, all loaded decoders included."
        )
    if any(row["decoder"].endswith("-vae") for row in record["rows"]) and record["machine"]["device"] == "cpu":
        lines.append("The VAE's own decoder is slow on a CPU and runs once for each size, in the first format and mode asked for.")
    if unsynchronised:
        lines += [
            "unsync. ms: when the call returned. A GPU works on after that, so such a clock shows launches, much the same",
            "at every resolution; a CPU returns when it is done, and the two agree.",
        ]
    return "\n".join(lines)


# ---------------------------------------------------------------- end to end


def _stages(record: dict[str, Any], size: int) -> str:
    rows = []
    for row in record["saving"]:
        if row["size"] == size:
            file = "-" if row["file_bytes"] is None else f"{row['file_bytes'] / 1e6:.2f}"
            if row["reason"] is None:
                rows.append([row["stage"], ms(row["ms"]), f"{ms(row['q1_ms'])}-{ms(row['q3_ms'])}", ms(row["cpu_ms"]), file])
            else:
                rows.append([row["stage"], row["reason"], "-", "-", file])
    return markdown(["stage", "ms", "quartiles", "CPU ms", "file MB"], rows)


def _whole(record: dict[str, Any], size: int) -> str:
    """Decode, bytes and file together for each decoder, as they add up one after the other; a disk comes on top."""
    stages = {row["stage"]: row["ms"] for row in record["saving"] if row["size"] == size and row["reason"] is None}
    shown = [name for name in CODECS if name in stages and name in ("PNG, level 1", DEFAULT_CODEC, "WebP, quality 95", "JPEG, quality 95")]
    if BYTES not in stages:
        return ""
    rows = []
    for row in record["rows"]:
        if row["size"] == size and row["batch"] == 1 and row["frames"] is None and row["reason"] is None:
            decode = row["ms"]
            total = {name: decode + stages[BYTES] + stages[name] for name in shown}
            rows.append([row["decoder"], how(row), ms(decode), *(f"{ms(t)} ({100 * decode / t:.0f}%)" for t in total.values())])
    if not rows:
        return ""
    head = ["decoder", "how", "decode ms", *(f"+ {name.replace(', level', '').replace(', quality', '').split(' (')[0]}" for name in shown)]
    return markdown(head, rows, left=2) + "\n\nDecode, bytes and encoding added up, in memory; in brackets the decode's share."


def _pipeline(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        gains = row["gain"]
        cells = [
            f"{100 * row['share'][str(steps)]:.1f}%" + (f" {gains[str(steps)]:.2f}x" if gains else "") for steps in STEPS
        ]
        lines.append([row["decoder"], how(row), ms(row["ms"]), *cells])
    return markdown(["decoder", "how", "decode ms", *(f"{steps} steps" for steps in STEPS)], lines, left=2)
