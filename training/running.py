"""What a long run needs of the machine: number format, room on the disk, whole checkpoints, an orderly end."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def mixed_precision(network: nn.Module, channels: int) -> str:
    """ "bf16" or "no". On a CPU one step is timed each way: with AMX or AVX512-BF16 bfloat16 wins, without it loses (DESIGN 4)."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    z = torch.randn(2, channels, 16, 16).contiguous(memory_format=torch.channels_last)
    seconds = {}
    for precision in ("no", "bf16"):
        for _ in range(3):  # the last one counts
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                y = network(z)
            y.float().abs().mean().backward()
            seconds[precision] = time.perf_counter() - start
            network.zero_grad(set_to_none=True)
            if seconds[precision] > 5 * seconds.get("no", 1e9):
                return "no"  # emulated: no need to wait for it
    return min(seconds, key=lambda precision: seconds[precision])


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


def stop_requested() -> Callable[[], bool]:
    """True once the process was asked to end (Ctrl-C, SIGTERM): the loop then ends at a whole step and saves."""
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: asked.append(received))
    return lambda: bool(asked)
