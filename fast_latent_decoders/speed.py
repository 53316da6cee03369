"""Which number format decodes fastest on this machine: measured, since processors differ too much for a table."""

import copy
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .decoder import FastDecoder

SIDE = 16  # latents: 128 pixels, enough that the convolutions and not their calls are timed
REPEATS = 2
MARGIN = 0.9  # float32 is exact: bfloat16 must take at most this share of its time


@torch.inference_mode()
def fastest_dtype(decoder: "FastDecoder", device: torch.device | str) -> torch.dtype:
    """float16 on cuda and mps; on a CPU float32 or bfloat16, whichever decodes a small latent faster with channels_last.

    Processors with AMX or AVX512-BF16 gain three- to fivefold from bfloat16, others lose. Takes well under a second; the
    decoder itself is not changed.
    """
    if torch.device(device).type != "cpu":
        return torch.float16
    candidates = {dtype: _copy(decoder, dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(candidates, float("inf"))
    threads = torch.get_num_threads()
    # Processor time of one thread: on a busy machine the clock on the wall tells of the others' work, and several threads
    # count the time in which they wait for each other.
    torch.set_num_threads(1)
    try:
        for _ in range(1 + REPEATS):  # the first round also pays for the choice of kernels
            for dtype, network in candidates.items():
                z = torch.zeros(1, decoder.latent_space.channels, SIDE, SIDE, dtype=dtype)
                start = time.process_time()
                network(z)
                best[dtype] = min(best[dtype], time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return torch.bfloat16 if best[torch.bfloat16] < MARGIN * best[torch.float32] else torch.float32


def _copy(decoder: "FastDecoder", dtype: torch.dtype) -> torch.nn.Module:
    return copy.deepcopy(decoder.decoder).to("cpu", dtype).to(memory_format=torch.channels_last).eval()
