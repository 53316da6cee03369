"""The self-test: does this decoder work on this machine, and in which number format and layout is it fastest?

Measured, since processors differ too much for a table, and since some devices compute nonsense without saying so.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .timing import Clock, why

if TYPE_CHECKING:
    from ..decoder import FastDecoder

SIDE = 16  # latents: 128 pixels, enough that the convolutions and not their calls are timed
REPEATS = 2
SLOW = 3.0  # times float32's time, from which on a format is not tried any further
MARGIN = 0.9  # a less exact format must take at most this share of the time
# What a device's picture may differ from float32 on the CPU, as a share of the picture's own rms. Three digits at least are
# left of float32 where a GPU rounds its factors to TF32; bfloat16 has two by itself.
ALLOWED = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.15}  # in the order of exactness
LAYOUTS = ("channels_last", "contiguous_format")
# Which formats may win. On a CPU float16 is slower than float32 wherever it was measured (DESIGN 4).
WINNERS = {"cpu": ("float32", "bfloat16")}


@dataclass(frozen=True)
class Trial:
    """One format and layout: milliseconds of a decode of 128 px (of processor time of one thread on a CPU), the rms
    difference from float32 on the CPU in 1/255 of the range, and what is wrong. `broken`: it runs, and gives a wrong picture."""

    dtype: str
    layout: str
    ms: float | None = None
    error: float | None = None
    problem: str | None = None
    broken: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def self_test(
    decoder: "FastDecoder", device: str, dtypes: Sequence[str] = tuple(ALLOWED), layouts: Sequence[str] = LAYOUTS
) -> list[Trial]:
    """Decode a fixed latent and a hostile one in every format and layout. The decoder itself is not changed."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, decoder.latent_space.channels, SIDE, SIDE, generator=generator)  # scaled latents
    clock = Clock(device)
    with clock.one_thread():
        expected = _copy(decoder, "cpu", "float32", "contiguous_format")(z)
        if not torch.isfinite(expected).all():
            sentence = "the decoder gives NaN or infinite values in float32 on the CPU: its weights are broken"
            return [Trial("float32", "contiguous_format", problem=sentence, broken=True)]
        trials: list[Trial] = []
        for dtype in dtypes:
            for layout in layouts:
                slow = _slow(trials, dtype)
                trials.append(Trial(dtype, layout, problem=slow) if slow else _try(decoder, device, dtype, layout, z, expected, clock))
        return trials


def best(trials: Sequence[Trial], device: str) -> Trial | None:
    """The fastest one that works; a less exact format only where it is faster by a margin. None if nothing works."""
    chosen: Trial | None = None
    for dtype in WINNERS.get(device, tuple(ALLOWED)):
        fitting = [trial for trial in trials if trial.dtype == dtype and trial.problem is None]
        quickest = min(fitting, key=lambda trial: trial.ms or 0.0, default=None)
        if quickest and (chosen is None or (quickest.ms or 0.0) < MARGIN * (chosen.ms or 0.0)):
            chosen = quickest
    return chosen


def fastest_dtype(decoder: "FastDecoder", device: str) -> torch.dtype:
    """What `--dtype auto` takes: the fastest format that works on `device` with channels_last. Takes about a second.

    Processors with AMX or AVX512-BF16 gain three- to fivefold from bfloat16, others lose.

    Raises:
        ValueError: no format works there; the message says what came out.
    """
    trials = self_test(decoder, device, WINNERS.get(device, tuple(ALLOWED)), ("channels_last",))
    chosen = best(trials, device)
    if chosen is None:
        raise ValueError("; ".join(dict.fromkeys(trial.problem or "" for trial in trials)))
    return getattr(torch, chosen.dtype)


def _slow(trials: Sequence[Trial], dtype: str) -> str | None:
    """Why not to try this format again: emulated, it takes minutes in an unfortunate layout."""
    times = {trial.dtype: trial.ms for trial in trials if trial.ms is not None}
    if dtype == "float32" or not {dtype, "float32"} <= times.keys():
        return None
    ratio = times[dtype] / max(times["float32"], 1e-6)
    return f"{dtype} takes {ratio:.1f} times as long as float32, so its other layouts were not tried" if ratio > SLOW else None


def _copy(decoder: "FastDecoder", device: str, dtype: str, layout: str) -> torch.nn.Module:
    network = copy.deepcopy(decoder.decoder).to(device, getattr(torch, dtype))
    return network.to(memory_format=getattr(torch, layout)).eval()


def _try(
    decoder: "FastDecoder", device: str, dtype: str, layout: str, z: Tensor, expected: Tensor, clock: Clock
) -> Trial:
    try:
        network = _copy(decoder, device, dtype, layout)
        there = z.to(device, getattr(torch, dtype)).contiguous(memory_format=getattr(torch, layout))
        hostile = network(30 * there)  # this first call also pays for the choice of kernels
        ms = float("inf")
        for _ in range(REPEATS):
            clock.synchronise()
            # On a busy CPU the clock on the wall tells of the others' work.
            now = clock.cpu if device == "cpu" else clock.wall
            start = now()
            picture = network(there)
            clock.synchronise()
            ms = min(ms, 1e3 * (now() - start))
        hostile, picture = hostile.float().cpu(), picture.float().cpu()
    except Exception as error:  # noqa: BLE001 - devices raise what they like
        return Trial(dtype, layout, problem=f"{dtype} does not run on {device}: {why(error)}")
    if not (torch.isfinite(picture).all() and torch.isfinite(hostile).all()):
        sentence = f"{dtype} gives NaN or infinite values on {device}: do not use it with this decoder"
        return Trial(dtype, layout, ms, problem=sentence, broken=True)
    difference = (picture - expected).square().mean().sqrt().item()
    off, size = difference * 127.5, expected.square().mean().sqrt().item()
    if difference > ALLOWED[dtype] * max(size, 1e-3):
        sentence = f"{dtype} on {device} differs by {off:.1f}/255 (rms) from float32 on the CPU: do not use it there"
        return Trial(dtype, layout, ms, off, sentence, broken=True)
    return Trial(dtype, layout, ms, off)
