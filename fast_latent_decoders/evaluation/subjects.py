"""What is benchmarked: presets, folders, the VAEs' own decoders, and families whose weights are not trained yet.

What a decoder computes does not depend on its weights, so random ones are enough for its time and memory.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..decoder import FastDecoder
from ..presets import locate, presets
from .decoders import lay_out

VAE = "the VAE's own, random weights"


@dataclass(frozen=True)
class Subject:
    """A model with `decode(z, return_dict=False)`, in float32 on the CPU, and what is known of it before it runs.

    `frames_count`: its decode takes `num_frames`. `slow`: a VAE's own decoder, which a CPU needs half a minute for.
    """

    name: str
    model: Any
    about: str
    file_bytes: int | None
    frames_count: bool
    slow: bool = False

    @classmethod
    def load(cls, name: str) -> Self:
        """By name: see `names`, `presets()`, or a folder or Hub id.

        Raises:
            OSError, ValueError: nothing can be loaded by that name; the message says what can.
        """
        if name in _VAES:
            return cls(name, _random(_VAES[name]), VAE, None, name == "svd-vae", slow=True)
        path = _trained(name) if name in _FAMILIES else name
        if path is None:
            model = _random(_FAMILIES[name])
            return cls(name, model, f"{type(model).__name__}, random weights", None, frames_count=True)
        model = FastDecoder.from_pretrained(path, torch_dtype=torch.float32).eval().requires_grad_(False)
        folder = Path(locate(path))
        sizes = [file.stat().st_size for file in folder.glob("*.safetensors")] if folder.is_dir() else []
        return cls(name, model, type(model).__name__, sum(sizes) or None, frames_count=True)

    @property
    def channels(self) -> int:
        return self.model.config.latent_channels

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def ready(self, device: str, dtype: torch.dtype, layout: str) -> Any:
        """A copy on `device`; this subject stays as it is."""
        return lay_out(copy.deepcopy(self.model).to(device, dtype), getattr(torch, layout))

    def decode(self, model: Any, z: Tensor, frames: int | None) -> Tensor:
        """(N, C, h, w) to (N, 3, 8h, 8w) by `model`, a copy of this subject's."""
        options = {"num_frames": frames or 1} if self.frames_count else {}
        return model.decode(z, return_dict=False, **options)[0]

    def counted(self, size: int, pictures: int, frames: int | None, bytes_each: int) -> tuple[int, int]:
        """Multiply-accumulates of a decode of `pictures` pictures of `size` px, and the bytes that its operations read and
        write one by one, unfused, in numbers of `bytes_each` bytes. Counted without computing anything."""
        # Half types all count as one: the meta device has them too.
        dtype = torch.float32 if bytes_each == 4 else torch.bfloat16
        model = copy.deepcopy(self.model).to("meta", dtype)
        z = torch.empty(pictures, self.channels, size // 8, size // 8, device="meta", dtype=dtype)
        with torch.no_grad():
            with FlopCounterMode(display=False) as flops:
                self.decode(model, z, frames)
            with _Traffic() as traffic:
                self.decode(model, z, frames)
        return flops.get_total_flops() // 2, traffic.bytes


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of what operations take and give; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for value in torch.utils._pytree.tree_leaves((args, kwargs, result)):
                self.bytes += value.nbytes if isinstance(value, Tensor) else 0
        return result


def names() -> list[str]:
    """Every name that `Subject.load` knows, besides folders and Hub ids."""
    return [*presets(), *_FAMILIES, *_VAES]


def _trained(name: str) -> str | None:
    """The preset with this family's weights, if there is one."""
    suffix = "svd" if name.endswith("temporal") else "sdxl"
    preset = presets().get(f"{name}-{suffix}")
    return preset.name if preset is not None and preset.location is not None else None


def _random(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
        for parameter in model.parameters():
            # New blocks are the identity by zeros, and a GPU multiplies zeros at less power, so at a higher clock.
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return model


def _sdxl_vae() -> Any:
    from diffusers import AutoencoderKL

    channels = (128, 256, 512, 512)
    vae: Any = AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
    )
    return _decoder_only(vae)


def _svd_vae() -> Any:
    from diffusers import AutoencoderKLTemporalDecoder

    channels = (128, 256, 512, 512)
    vae: Any = AutoencoderKLTemporalDecoder(
        block_out_channels=channels, layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4
    )
    return _decoder_only(vae)


def _decoder_only(vae: Any) -> Any:
    vae.encoder = vae.quant_conv = None
    return vae


def _family(name: str, **config: Any) -> Callable[[], Any]:
    return lambda: FastDecoder.families[name](**config)


_FAMILIES = {
    "tae-192": _family("TAEDecoder", width=192),
    "efficientvit": _family("EfficientViTDecoder"),
    "tae-temporal": _family("TAETemporalDecoder"),
    "subpixel-temporal": _family("SubpixelTemporalDecoder"),
}
_VAES = {"sdxl-vae": _sdxl_vae, "svd-vae": _svd_vae}
