"""What a long run needs of the machine: number format, room on the disk, whole checkpoints, an orderly end."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn


def mixed_precision(network: nn.Module, channels: int) -> str:
    """ "bf16" or "no". On a CPU one step is timed each way: with AMX or AVX512-BF16 bfloat16 wins, without it loses (DESIGN 4)."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"

    def seconds(precision: str, size: int, backward: bool) -> float:
        z = torch.randn(2, channels, size, size).contiguous(memory_format=torch.channels_last)
        taken = []
        for _ in range(4):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), torch.set_grad_enabled(backward):
                y = network(z)
            if backward:
                y.float().abs().mean().backward()
            taken.append(time.perf_counter() - start)
            network.zero_grad(set_to_none=True)
        return min(taken)  # the first one prepares, and the machine may be doing other things

    if seconds("bf16", 4, backward=False) > 2 * seconds("no", 4, backward=False):
        return "no"  # emulated, and too slow to be timed at length
    return min(("no", "bf16"), key=lambda precision: seconds(precision, 16, backward=True))


@contextmanager
def sentences() -> Iterator[None]:
    """What is wrong with what the user gave (a path, a package, a name) is said in one sentence, without a traceback."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise SystemExit(str(error)) from error


def make_room(out: Path, size: int) -> None:
    """Make the folder of a run.

    Raises:
        SystemExit: it cannot be made or written to, or has no room for two checkpoints of the network, its average and the
            optimiser's two moments, of `size` bytes each. It fails now, not after an hour.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".room").write_bytes(b"")
        (out / ".room").unlink()
    except OSError as error:
        raise SystemExit(f"{out} cannot be written to ({error.strerror}): give another folder with out=") from None
    if (free := shutil.disk_usage(out).free) < 8 * size:
        raise SystemExit(f"{out} has {free / 1e6:.0f} MB free and checkpoints need {8 * size / 1e6:.0f} MB: give another folder with out=")


def save(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def born_deaf() -> Iterator[None]:
    """Processes started in here hold Ctrl-C and SIGTERM back from their first instruction on; ours wait until we are out."""
    mask = getattr(signal, "pthread_sigmask", None)  # not on Windows
    if mask:
        mask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        if mask:
            mask(signal.SIG_UNBLOCK, ENDING)


def stop_requested() -> Callable[[], bool]:
    """True once the process was asked to end (Ctrl-C, SIGTERM): the loop then ends at a whole step and saves."""
    asked: list[int] = []
    for number in ENDING:
        signal.signal(number, lambda received, _: asked.append(received))
    return lambda: bool(asked)
