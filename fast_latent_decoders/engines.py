"""Other engines than torch for a decoder's network, and what torch lacks on a CPU (issue 12). An engine holds the weights as they were when it was made."""

import copy
import ctypes
import functools
import warnings
from contextlib import suppress
from typing import Any, Self

import torch
from torch import Tensor

from .networks.blocks import BlockNetwork


def keep_memory() -> None:
    """Let glibc keep the memory of large tensors for the next ones, in this process from now on.

    By default it gives each back to the system, which then clears and maps it anew page by page: up to half of the time of a
    1024 px picture on a CPU (training/RESULTS.md). The process holds on to what its largest call needed. Nothing happens with another C library.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((-4, 0), (-1, -1), (-2, 2**28)):  # M_MMAP_MAX: none; M_TRIM_THRESHOLD: never; M_TOP_PAD: grow by 256 MiB
            mallopt(option, value)


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's Core, one for the whole process, never freed.

    Each Core gives its thread an alternate signal stack, and on its end unmaps it and restores the one before. Freed in another
    order than they were made, they leave a stack that is gone, and the next signal with a handler ends the process: SIGCHLD, once
    a torch DataLoader has had workers.

    Raises:
        ImportError: OpenVINO is missing; the message names the extra.
    """
    try:
        import openvino
    except ImportError as error:
        raise ImportError("the backend openvino needs OpenVINO: pip install 'fast-latent-decoders[export]'") from error
    return openvino.Core()


class OpenVINOEngine:
    """A network compiled by OpenVINO for this machine's CPU, once for all numbers and sizes of pictures.

    Called as the network is: scaled latents (N, C, h, w) on the CPU to pictures (N, 3, 8h, 8w), of the latents' dtype. Without gradients.

    Args:
        dtype: torch.float32 or torch.bfloat16, in which it computes; None: bfloat16 where the processor has it (AMX, AVX512-BF16).

    Raises:
        ImportError: OpenVINO is missing; the message names the extra.
        ValueError: the network mixes frames, or the processor cannot compute in `dtype`.
    """

    def __init__(self, network: BlockNetwork, channels: int, dtype: torch.dtype | None = None) -> None:
        core = openvino_core()
        import openvino

        if network.mixes_frames:
            raise ValueError(f"{type(network).__name__} mixes the frames of a clip, which the backend openvino cannot; use the backend torch")
        native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.dtype = dtype or (torch.bfloat16 if native else torch.float32)
        if self.dtype not in (torch.float32, torch.bfloat16) or (self.dtype == torch.bfloat16 and not native):
            fitting = "float32 or bfloat16" if native else "float32"
            raise ValueError(f"the backend openvino computes in {fitting} on this processor, got {self.dtype}")
        self._halo = network.halo()
        plain = copy.deepcopy(network).to("cpu", torch.float32).to(memory_format=torch.contiguous_format).eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates the tracing that OpenVINO converts by
            self._model = openvino.convert_model(
                plain, example_input=torch.zeros(1, channels, 8, 8), input=[openvino.PartialShape([-1, channels, -1, -1])]
            )
        self._compiled: dict[int, Any] = {}  # number of threads -> compiled model

    def __call__(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        threads = torch.get_num_threads()
        if threads not in self._compiled:
            precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[self.dtype]
            options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
            self._compiled[threads] = openvino_core().compile_model(self._model, "CPU", options)
        result = self._compiled[threads](z.detach().float().contiguous().numpy(), share_inputs=True)[0]
        return torch.from_numpy(result).to(z.dtype)

    def halo(self) -> int | None:
        """As `BlockNetwork.halo`."""
        return self._halo

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing in it changes


def engine_or(network: BlockNetwork, engine: OpenVINOEngine | None, z: Tensor) -> BlockNetwork | OpenVINOEngine:
    """What decodes `z`: the engine where it can, else the network: on another device, in training, or where gradients are wanted."""
    if engine is None or z.device.type != "cpu" or network.training or (torch.is_grad_enabled() and z.requires_grad):
        return network
    return engine
