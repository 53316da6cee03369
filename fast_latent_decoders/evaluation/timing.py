"""Timing that can be believed: synchronised, warmed up, interleaved, with its spread, and processor time beside wall time.

All times are milliseconds of one call.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

Task = Callable[[], object]
K = TypeVar("K")


@dataclass(frozen=True)
class Timing:
    """One task: quartiles of the wall time over `repeats` calls, and the processor time of a call on one thread.

    On a GPU `cpu` is what the host spends to launch and wait. `returned` is the median time after which the call came back,
    before the device was waited for: what a clock without synchronisation would have shown.
    """

    median: float
    q1: float
    q3: float
    cpu: float
    returned: float
    repeats: int
    warmup: int


class Clock:
    """Reads wall and processor time for work on one device."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def wall(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def cpu(self) -> float:
        """Seconds of processor time of this process, all its threads together."""
        return time.process_time()

    def synchronise(self) -> None:
        """Wait until the device has done all it was given; a CPU has by then."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        elif self.device == "mps":
            torch.mps.synchronize()

    @property
    def threads(self) -> int:
        """How much sooner a CPU is done with all its threads than with one, at best; 1 for other devices."""
        return torch.get_num_threads() if self.device == "cpu" else 1

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """Several threads count the time in which they wait for each other as processor time; one does not."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def measure(
    tasks: Mapping[K, Task],
    *,
    repeats: int = 7,
    warmup: int = 2,
    budget: float = 20.0,
    clock: Clock | None = None,
    said: Callable[[K], object] = lambda _: None,
) -> dict[K, Timing | str]:
    """Time the tasks in turn, round by round, so that whatever slows the machine down meets them all.

    Every task first runs once on one thread, for its processor time. One that would take more than `budget` seconds for all
    its repeats gets as many as fit, at least one, and that first run is then its warm-up: where a call takes seconds, the
    choice of kernels does not count. `said` is told of each task before its first run.

    Returns:
        A Timing for each task, or one sentence on why it cannot run: a failing task does not keep the others from theirs.
    """
    clock = clock or Clock()
    found: dict[K, Timing | str] = {}
    plan: dict[K, tuple[int, int]] = {}
    cpus: dict[K, float] = {}
    for key, task in tasks.items():
        said(key)
        with clock.one_thread():
            result = _attempt(task, clock)
        if isinstance(result, str):
            found[key] = result
            continue
        plan[key] = planned(result.wall / clock.threads, repeats, warmup, budget)
        cpus[key] = result.cpu
    samples: dict[K, list[Sample]] = {key: [] for key in plan}

    def turn(key: K, *, one_thread: bool = False) -> Sample | None:
        if key in found:
            return None
        if one_thread:
            with clock.one_thread():
                result = _attempt(tasks[key], clock)
        else:
            result = _attempt(tasks[key], clock)
        if isinstance(result, str):
            found[key] = result
            return None
        return result

    for round_ in range(warmup):
        for key, (_, its_warmup) in plan.items():
            if round_ < its_warmup:
                turn(key)
    for key, (_, its_warmup) in plan.items():
        if its_warmup and (sample := turn(key, one_thread=True)):  # now without the first call's expenses
            cpus[key] = sample.cpu
    for round_ in range(repeats):
        for key, (its_repeats, _) in plan.items():
            if round_ < its_repeats and (sample := turn(key)):
                samples[key].append(sample)
    for key, (its_repeats, its_warmup) in plan.items():
        if key not in found:
            q1, median, q3 = quartiles([1e3 * sample.wall for sample in samples[key]])
            returned = statistics.median(1e3 * sample.returned for sample in samples[key])
            found[key] = Timing(median, q1, q3, 1e3 * cpus[key], returned, its_repeats, its_warmup)
    return {key: found[key] for key in tasks}


def planned(seconds: float, repeats: int, warmup: int, budget: float) -> tuple[int, int]:
    """Repeats and warm-up rounds for a task whose call takes about `seconds`."""
    if seconds * (repeats + warmup) <= budget:
        return repeats, warmup
    return min(repeats, max(1, int(budget / seconds))), 0 if seconds > 1 else warmup


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile, interpolated between the values."""
    if len(values) == 1:
        return (values[0],) * 3
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: until the device was done, until the call returned, and processor time."""

    wall: float
    returned: float
    cpu: float


def _attempt(task: Task, clock: Clock) -> Sample | str:
    try:
        clock.synchronise()
        cpu, start = clock.cpu(), clock.wall()
        result = task()
        returned = clock.wall()
        clock.synchronise()
        end, cpu_end = clock.wall(), clock.cpu()
        del result  # after the clock: giving memory back is the next call's business
        return Sample(end - start, returned - start, cpu_end - cpu)
    except Exception as error:  # noqa: BLE001 - devices and compilers raise what they like; the row says what
        return why(error)


def why(error: BaseException) -> str:
    """One sentence on why a task could not run."""
    said = " ".join((str(error) or type(error).__name__).split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in said or "can't allocate" in said:
        return "out of memory"
    return said if len(said) <= 160 else f"{said[:157]}..."
