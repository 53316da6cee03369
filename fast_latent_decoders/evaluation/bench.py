"""The benchmark: which cases are run, in which order, and the record that tables and plots are made from."""

import datetime
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from . import end_to_end, machine
from .cases import Case, task_of
from .memory import peak_of_child, peak_of_gpu
from .subjects import Subject
from .timing import Clock, Task, Timing, measure, why

FORMAT = 1  # of the record


@dataclass(frozen=True)
class Options:
    """What `fld bench` was asked for; every combination is a case. `pipeline`: milliseconds of one step of the UNet."""

    decoders: Sequence[str]
    sizes: Sequence[int] = (512,)
    batches: Sequence[int] = (1,)
    frames: int | None = None
    device: str = "cpu"
    dtypes: Sequence[str] = ("float32",)
    layouts: Sequence[str] = ("channels_last",)
    modes: Sequence[str] = ("eager",)
    tile: int = 128
    repeats: int = 7
    budget: float = 10.0
    memory: bool = False
    end_to_end: bool = False
    pipeline: float | None = None


def groups(options: Options, slow: Sequence[str] = ()) -> Iterator[list[Case]]:
    """Cases that are timed in turn with one another: all of one size and batch.

    On a CPU the decoders in `slow` run once for each size: with the first of everything else.
    """
    for size, batch in itertools.product(options.sizes, options.batches):
        ways = list(itertools.product(options.dtypes, options.layouts, options.modes))
        group = []
        for way, name in itertools.product(ways, options.decoders):
            if options.device == "cpu" and name in slow and (way != ways[0] or batch != options.batches[0]):
                continue
            group.append(Case(name, size, batch, options.frames, *way, options.tile))
        yield group


# ---------------------------------------------------------------- running


def run(options: Options, say: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """Run all cases and return the record (DESIGN 1.5: the JSON of `fld bench`). `say` is told what is going on.

    Raises:
        OSError, ValueError: a decoder cannot be loaded.
    """
    subjects = {name: Subject.load(name) for name in options.decoders}
    say("is the machine idle?")
    before = machine.idleness()
    say("what can it do at best?")
    roof = machine.roofline(options.device, options.dtypes)
    clock = Clock(options.device)
    rows: list[dict[str, Any]] = []
    slow = [name for name, subject in subjects.items() if subject.slow]
    for group in groups(options, slow):
        rows += _run_group(group, subjects, options, clock, roof, say)
    if options.memory and options.device == "cpu":
        for row in rows:
            if row["reason"] is None:
                say(f"memory of {row['decoder']} at {row['size']} px")
                row |= _memory(row)
    whole = end_to_end.measure_saving(options, subjects[options.decoders[0]], clock, say) if options.end_to_end else []
    after = machine.idleness(ask_load=False)
    reasons = list(before.reasons) + [f"{reason} (after the run)" for reason in after.reasons]
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "options": {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(options).items()},
        "machine": machine.describe(options.device),
        "versions": machine.versions(),
        "idleness": {"before": before.as_json(), "after": after.as_json(), "busy": bool(reasons), "reasons": reasons},
        "roofline": roof,
        "decoders": [_about(subject) for subject in subjects.values()],
        "rows": rows,
        "saving": whole,
        "pipeline": end_to_end.shares(rows, options.pipeline) if options.pipeline else [],
    }


def _about(subject: Subject) -> dict[str, Any]:
    return {
        "name": subject.name,
        "about": subject.about,
        "parameters": subject.parameters,
        "fp16_bytes": 2 * subject.parameters,
        "file_bytes": subject.file_bytes,
        # Of one more frame or picture: a clip's first frame has nothing before it to look at.
        "mac_per_pixel": (subject.counted(512, 2, 2, 4)[0] - subject.counted(512, 1, 1, 4)[0]) / 512**2,
    }


def _run_group(
    group: list[Case],
    subjects: dict[str, Subject],
    options: Options,
    clock: Clock,
    roof: dict[str, Any],
    say: Callable[[str], object],
) -> list[dict[str, Any]]:
    tasks: dict[Case, Task] = {}
    reasons: dict[Case, str] = {}
    for case in group:
        if case.mode == "compiled":
            say(f"compiling {case.decoder} ({case.dtype})")
        try:
            tasks[case] = task_of(case, subjects[case.decoder], options.device)
        except Exception as error:  # noqa: BLE001 - compilers and devices raise what they like; the row says what
            reasons[case] = why(error)
    timed = measure(
        tasks,
        repeats=options.repeats,
        budget=options.budget,
        clock=clock,
        said=lambda case: say(f"{case.decoder}, {case.size} px, {case.dtype}, {case.mode}"),
    )
    rows = []
    for case in group:
        result = timed.get(case, reasons.get(case, ""))
        row = {**asdict(case), "reason": result if isinstance(result, str) else None, "peak_bytes": None, "peak_reason": None}
        if isinstance(result, Timing):
            row |= _figures(case, subjects[case.decoder], result, roof)
            if options.memory and options.device == "cuda":
                row["peak_bytes"] = peak_of_gpu(tasks[case])
            elif options.memory and options.device == "mps":
                row["peak_reason"] = "the allocator of this device keeps no peak"
        rows.append(row)
    return rows


def _figures(case: Case, subject: Subject, timing: Timing, roof: dict[str, Any]) -> dict[str, Any]:
    """Times in ms; rates; and the share of the time that the work would take at the device's best."""
    seconds = timing.median / 1e3
    macs, traffic = subject.counted(case.size, case.pictures, case.frames, getattr(torch, case.dtype).itemsize)
    rate = roof["matrix"].get(case.dtype)
    pixels = case.pictures * case.size**2
    return {
        "ms": timing.median,
        "q1_ms": timing.q1,
        "q3_ms": timing.q3,
        "cpu_ms": timing.cpu,
        "returned_ms": timing.returned,
        "repeats": timing.repeats,
        "warmup": timing.warmup,
        "mpx_per_s": pixels / 1e6 / seconds,
        "mac_per_pixel": macs / pixels,
        "matrix_share": 2 * macs / rate / seconds if rate else None,
        "copy_share": traffic / roof["copy"] / seconds,
    }


def _memory(row: dict[str, Any]) -> dict[str, Any]:
    if row["mode"] == "compiled":
        return {"peak_reason": "the compiler's own memory would be counted"}
    try:
        case = {field.name: row[field.name] for field in fields(Case)}
        return {"peak_bytes": peak_of_child(case, torch.get_num_threads())}
    except (RuntimeError, OSError) as error:
        return {"peak_reason": why(error)}
