"""What a benchmark must know of the machine: what it is, whether it is idle, and what it can do at best."""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .timing import Clock

# Instructions that decide which number format is fast on a CPU.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_fp16", "asimdhp", "bf16")
PACKAGES = ("fast-latent-decoders", "torch", "diffusers", "numpy", "pillow")


def describe(device: str) -> dict[str, Any]:
    """Processor, threads, instructions, memory (bytes), operating system, and the GPU if `device` is one."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": instructions(),
        "memory": _memory(),
        "device": device,
    }
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {"gpu": about.name, "gpu_memory": about.total_memory, "cuda": torch.version.cuda}
    return found


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a folder that is not installed
            found[name] = "not installed"
    return found


def processor_name() -> str:
    lines = _read("/proc/cpuinfo").splitlines()
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def instructions() -> list[str]:
    flags = next((line for line in _read("/proc/cpuinfo").splitlines() if line.startswith(("flags", "Features"))), "")
    return [name for name in INSTRUCTIONS if name in flags.split()]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


# ---------------------------------------------------------------- idleness


@dataclass(frozen=True)
class Idleness:
    """`load`: mean number of running processes over the last minute, None where the system does not say.

    `wait`: wall time over processor time of a convolution on one thread; 1 when nobody else wants the core.
    `reasons`: sentences on why the machine is busy; none if it is idle.
    """

    load: float | None
    wait: float
    reasons: tuple[str, ...]

    @property
    def busy(self) -> bool:
        return bool(self.reasons)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"reasons": list(self.reasons), "busy": self.busy}


def judge(load: float | None, cores: int, wait: float, threads: int = 1) -> tuple[str, ...]:
    """Why a machine with these figures is busy. Some load is our own start; a core that is shared shows in `wait`.

    One thread may find a free core where all `threads` would not: with as many threads as cores any steady load counts.
    """
    free = max(0, cores - threads)
    allowed = max(0.6, 0.1 * cores) + 0.9 * free
    reasons = []
    if load is not None and load > allowed:
        reasons.append(f"load {load:.1f} on {cores} {'core' if cores == 1 else 'cores'}")
    if wait > 1.1:
        reasons.append(f"a convolution on one thread took {wait:.2f} times its processor time")
    return tuple(reasons)


def idleness(*, ask_load: bool = True, clock: Clock | None = None) -> Idleness:
    """Look now. After a benchmark `ask_load=False`: the load of the last minute is then the benchmark's own."""
    load = os.getloadavg()[0] if ask_load and hasattr(os, "getloadavg") else None
    wait = reference_wait(clock or Clock())
    return Idleness(load, wait, judge(load, os.cpu_count() or 1, wait, torch.get_num_threads()))


@torch.inference_mode()
def reference_wait(clock: Clock, rounds: int = 12) -> float:
    """Wall over processor time of a convolution (64 to 64 channels, 3x3, 256 px) on one thread; about a second in all."""
    x, weight = torch.ones(1, 64, 256, 256), torch.ones(64, 64, 3, 3)
    with clock.one_thread():
        torch.nn.functional.conv2d(x, weight, padding=1)
        wall, cpu = clock.wall(), clock.cpu()
        for _ in range(rounds):
            torch.nn.functional.conv2d(x, weight, padding=1)
        wall, cpu = clock.wall() - wall, clock.cpu() - cpu
    return wall / cpu if cpu > 0 else 1.0


# ---------------------------------------------------------------- roofline


@torch.inference_mode()
def roofline(device: str, dtypes: Sequence[str], clock: Clock | None = None, seconds: float = 0.3) -> dict[str, Any]:
    """What the device reaches at best, measured: floating-point operations per second of a matrix product in each dtype
    (a multiply-accumulate is two), and bytes per second of a large copy, read and written both counted."""
    clock = clock or Clock(device)
    matrix: dict[str, float | None] = {}
    for name in dtypes:
        try:
            matrix[name] = _matrix_rate(device, getattr(torch, name), clock, seconds)
        except (RuntimeError, TypeError):  # this device has no such product
            matrix[name] = None
    megabytes = 128 if device == "cpu" else 512
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    took = _quickest(lambda: target.copy_(source), clock)
    return {"matrix": matrix, "copy": 2 * source.nbytes / took}


def _matrix_rate(device: str, dtype: torch.dtype, clock: Clock, seconds: float) -> float:
    # Doubled until a product takes long enough: a small one times the call, and a large one takes minutes where a dtype is
    # emulated. The best rate met on the way: a roof is what can be reached, and others can only hide it.
    side, best = 256, 0.0
    while True:
        a = torch.ones(side, side, device=device, dtype=dtype)
        b = torch.ones(side, side, device=device, dtype=dtype)
        took = _quickest(lambda a=a, b=b: a @ b, clock)  # type: ignore[misc]
        best = max(best, 2 * side**3 / took)
        if took * 8 > seconds or side >= 8192:
            return best
        side *= 2


def _quickest(call: Callable[[], object], clock: Clock, rounds: int = 8) -> float:
    """Seconds of the best of some calls, the first one left out."""
    times = []
    for _ in range(rounds + 1):
        clock.synchronise()
        start = clock.wall()
        call()
        clock.synchronise()
        times.append(clock.wall() - start)
    return min(times[1:])
