"""One case of the benchmark, and the call that runs it: eager, compiled, as a CUDA graph, or in tiles."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .decoders import lay_out
from .subjects import Subject
from .timing import Clock, Task


@dataclass(frozen=True)
class Case:
    """One row. `size` in pixels, square; `batch` pictures, or clips of `frames` pictures each; `tile` in latents."""

    decoder: str
    size: int = 512
    batch: int = 1
    frames: int | None = None
    dtype: str = "float32"
    layout: str = "channels_last"
    mode: str = "eager"
    tile: int = 128

    @property
    def pictures(self) -> int:
        return self.batch * (self.frames or 1)


def task_of(case: Case, subject: Subject, device: str, *, in_place: bool = False) -> Task:
    """A call that decodes the case's latents once. `in_place` takes the subject's own model instead of a copy.

    Raises:
        RuntimeError: the mode cannot be had on this device; one sentence says why.
    """
    dtype = getattr(torch, case.dtype)
    if case.mode == "graph" and device != "cuda":
        raise RuntimeError(f"CUDA graphs need a CUDA device, this is {device}")
    if case.mode == "tiled" and case.tile * 8 >= case.size:
        raise RuntimeError(f"one tile of {case.tile} latents covers a picture of {case.size} px")
    if in_place:
        model: Any = lay_out(subject.model.to(device, dtype), getattr(torch, case.layout))
    else:
        model = subject.ready(device, dtype, case.layout)
    z = latents(subject, case).to(device, dtype).contiguous(memory_format=getattr(torch, case.layout))
    if case.mode == "tiled":
        _tile(model, case.tile)
    if case.mode == "openvino":
        _hand_over(model, dtype)
    if case.mode == "compiled":
        model.decoder = torch.compile(model.decoder, fullgraph=True, dynamic=False)

    @torch.inference_mode()
    def call() -> Tensor:
        return subject.decode(model, z, case.frames)

    if case.mode == "compiled":
        # One function of ours is compiled for each model, which is more often than torch allows by itself.
        # It is compiled for each number of threads, too: for all of them, and for one, where processor time is taken.
        with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
            call()
            with Clock(device).one_thread():
                call()
    return _captured(call) if case.mode == "graph" else call


def _tile(model: Any, tile: int) -> None:
    """Tiles of `tile` latents: exact for ours; a VAE's own overlap by a quarter and are blended."""
    try:
        model.enable_tiling(tile)
    except (TypeError, ValueError, NotImplementedError):
        raise RuntimeError(f"{type(model).__name__} has no tiles") from None
    if hasattr(model, "tile_latent_min_size"):
        model.tile_latent_min_size, model.tile_sample_min_size = tile, tile * 8


def _hand_over(model: Any, dtype: torch.dtype) -> None:
    """To OpenVINO's engine."""
    optimize = getattr(model, "optimize", None)
    if optimize is None:
        raise RuntimeError(f"{type(model).__name__} has no engine but torch's")
    try:
        optimize("openvino", dtype)
    except (ImportError, ValueError) as error:
        raise RuntimeError(str(error)) from None


def _captured(call: Callable[[], Tensor]) -> Task:
    """The call as a CUDA graph: recorded once, launched as a whole."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what the libraries set up at their first calls cannot be recorded
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> Tensor:
        graph.replay()
        return kept

    return replay


def latents(subject: Subject, case: Case) -> Tensor:
    """(batch * frames, C, size / 8, size / 8) in VAE units, the same for all cases of this shape, float32."""
    generator = torch.Generator().manual_seed(0)
    scale = subject.model.config.scaling_factor
    return torch.randn(case.pictures, subject.channels, case.size // 8, case.size // 8, generator=generator) / scale
