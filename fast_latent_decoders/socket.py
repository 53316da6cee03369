"""Socket B: a decoder in the place of `vae.decoder`, inside AutoencoderKL or AutoencoderKLTemporalDecoder."""

import inspect
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

from .engines import OpenVINOEngine, engine_or
from .latent_space import LatentSpace
from .networks.blocks import BlockNetwork, State, frames_of
from .tiling import decode_tiled

# Methods that a VAE has of its own while a socket is in it.
GUARDED = ("save_pretrained", "tiled_decode", "enable_tiling", "disable_tiling", "encode")


class DecoderSocket(nn.Module):
    """What a VAE calls as its decoder: unscaled latents after `post_quant_conv` in, a plain picture tensor out (CONTRACT 4.1).

    Undoes `post_quant_conv`, a learned 1x1 convolution that our networks never saw in training (CONTRACT 4.3), and scales,
    by one affine map that stays float32 whatever dtype the VAE is cast to.
    """

    matrix: Tensor
    offset: Tensor

    def __init__(self, network: BlockNetwork, space: LatentSpace, vae: nn.Module, family: str, engine: OpenVINOEngine | None = None) -> None:
        super().__init__()
        self.network = network
        self.space = space
        self.family = family
        self.engine = engine
        self.use_tiling = False
        self.tile_size = 128
        matrix, offset = _undo_post_quant_conv(vae, space)
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, z: Tensor, image_only_indicator: Tensor | None = None, num_frames: int = 1) -> Tensor:
        """z (N, C, h, w) as the VAE hands it over -> (N, 3, 8h, 8w) in [-1, 1]. `image_only_indicator` is SVD's and unused."""
        # Products and a sum, not a convolution: autocast and TF32 leave these in float32.
        z = z.float().to(self.matrix.device)
        scaled = (z[:, None] * self.matrix[:, :, None, None]).sum(2) + self.offset[:, None, None]
        scaled = scaled.to(get_parameter_dtype(self.network))  # under layerwise casting not the parameters' own (CONTRACT 7.8)
        network = engine_or(self.network, self.engine, scaled)
        if self.use_tiling:
            return decode_tiled(network, scaled, num_frames, self.tile_size)
        return network(scaled, num_frames)

    @torch.no_grad()
    def decode_stream(self, latents: Tensor | Iterable[Tensor], state: State | None = None) -> Iterator[tuple[Tensor, State]]:
        """As `FastDecoder.decode_stream`: latents in VAE units, which no `post_quant_conv` has touched."""
        for frame in frames_of(latents):
            scaled = (frame.float().to(self.matrix.device) - self.space.shift_factor) * self.space.scaling_factor
            sample, state = self.network.stream(scaled.to(get_parameter_dtype(self.network)), 1, state)
            yield sample, state

    def _apply(self, fn: Any, recurse: bool = True) -> "DecoderSocket":
        matrix, offset = self.matrix, self.offset
        super()._apply(fn, recurse)
        self.matrix, self.offset = matrix.to(self.matrix.device), offset.to(self.offset.device)
        return self


def _undo_post_quant_conv(vae: nn.Module, space: LatentSpace) -> tuple[Tensor, Tensor]:
    """The affine map from what follows `post_quant_conv` to scaled latents, computed in float64.

    Raises:
        ValueError: `post_quant_conv` cannot be inverted.
    """
    conv = getattr(vae, "post_quant_conv", None)
    matrix, bias = torch.eye(space.channels, dtype=torch.float64), torch.zeros(space.channels, dtype=torch.float64)
    if conv is not None:
        weights = _parameters(conv)
        matrix, bias = weights["weight"].double()[:, :, 0, 0], weights["bias"].double()
        if not torch.isfinite(matrix).all() or torch.linalg.cond(matrix) > 1e6:
            raise ValueError(
                "this VAE's post_quant_conv cannot be inverted (its matrix is singular), so no decoder can be put behind it; "
                "replace the whole VAE instead: pipe.vae = FastDecoder.from_pretrained(...)"
            )
    inverse = torch.linalg.inv(matrix)
    offset = -(inverse @ bias) - space.shift_factor
    return (space.scaling_factor * inverse).float(), (space.scaling_factor * offset).float()


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors on the CPU, also where sequential offload keeps them outside the module."""
    hook = getattr(module, "_hf_hook", None)
    stored = getattr(hook, "weights_map", None)
    return {
        name: (stored[name] if value.device.type == "meta" and stored is not None else value).detach().cpu()
        for name, value in module.named_parameters()
    }


# ---------------------------------------------------------------- plugging in


def plug(socket: DecoderSocket, vae: nn.Module) -> DecoderSocket:
    """Give the socket the VAE's device, dtype and offloading, and the VAE its guards. The VAE's decoder is not replaced yet.

    The guards are methods of this one VAE and ask at each call whether a socket is in place, so that they do no harm
    before it is assigned and after it is taken out.
    """
    socket.train(vae.training)
    socket.requires_grad_(next(vae.parameters()).requires_grad)
    follow(socket, vae)
    for guard in (_save_pretrained, _tiled_decode, _enable_tiling, _disable_tiling):
        name = guard.__name__.removeprefix("_")
        if hasattr(type(vae), name):
            setattr(vae, name, partial(guard, vae))  # unlike a bound method, this can be pickled with the VAE
    return socket


def unplug(vae: nn.Module) -> None:
    """Give the VAE its class's own methods back."""
    for name in GUARDED:
        vae.__dict__.pop(name, None)


def follow(decoder: nn.Module, vae: Any) -> None:
    """Give `decoder` the VAE's device and dtype; under sequential offload, hooks like those of the VAE's other parts."""
    device = vae.device
    decoder.to(device="cpu" if device.type == "meta" else device, dtype=vae.dtype)
    execution_device = _sequential_device(vae)
    if execution_device is not None:
        from accelerate import cpu_offload

        cpu_offload(decoder, execution_device, offload_buffers=True)


def _sequential_device(vae: nn.Module) -> torch.device | None:
    """Where sequential offload runs this VAE, None without it."""
    for module in vae.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        if getattr(hook, "offload", False) and hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return None


def _save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(self.decoder, DecoderSocket):
        return type(self).save_pretrained(self, *args, **kwargs)
    # Saved, it would reload as the original class with missing or random decoder weights (CONTRACT 4.6).
    raise RuntimeError(
        f"this {type(self).__name__} decodes with {self.decoder.family}, which its format cannot hold: it would reload with "
        "another decoder. Call restore_decoder(pipe) first, or use the whole fast VAE, which can be saved: "
        "pipe.vae = FastDecoder.from_pretrained(...)"
    )


# Pipelines look into the signature for what they may pass on: variant, safe_serialization, max_shard_size.
_save_pretrained.__signature__ = inspect.signature(ModelMixin.save_pretrained)  # type: ignore[attr-defined]


def _tiled_decode(self: Any, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
    """The VAE's own tiles are blended and change the picture (CONTRACT 4.7); the socket's are exact."""
    if not isinstance(self.decoder, DecoderSocket):
        return type(self).tiled_decode(self, z, return_dict=return_dict)
    before, self.decoder.use_tiling = self.decoder.use_tiling, True
    try:
        sample = self.decoder(self.post_quant_conv(z) if self.post_quant_conv is not None else z)
    finally:
        self.decoder.use_tiling = before
    return DecoderOutput(sample=sample) if return_dict else (sample,)


def _enable_tiling(self: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(self.decoder, DecoderSocket):
        self.decoder.use_tiling = True
        if not hasattr(self, "use_tiling"):  # SVD's VAE has no tiles of its own, and shall not seem to once restored
            return
    type(self).enable_tiling(self, *args, **kwargs)


def _disable_tiling(self: Any) -> None:
    if isinstance(self.decoder, DecoderSocket):
        self.decoder.use_tiling = False
        if not hasattr(self, "use_tiling"):
            return
    type(self).disable_tiling(self)
