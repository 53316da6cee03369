"""Any decoder under one call, so that all are measured alike: FastDecoders and diffusers' own VAEs."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..decoder import FastDecoder
from .encoders import read_vae


@dataclass(frozen=True)
class Candidate:
    """A decoder to be measured.

    decode: scaled latents (N, C, h, w) and the frames of a clip -> pictures (N, 3, 8h, 8w), nominally in [-1, 1].
    """

    name: str
    decode: Callable[[Tensor, int], Tensor]
    model: Any
    channels: int
    parameters: int
    hash: str  # of the weights


def lay_out(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The weights of `model` in this memory layout, in place; those of a video VAE's 3D convolutions have five axes and stay as they are."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return model


def load_candidate(place: str, device: str, name: str | None = None) -> Candidate:
    """A preset, a folder or a Hub id of a FastDecoder, AutoencoderTiny, AutoencoderKL or AutoencoderKLTemporalDecoder, in float32.

    It is shown as `name`, without as `place`.

    Raises:
        ValueError: nothing of the kind can be loaded there.
    """
    try:
        model: Any = FastDecoder.from_pretrained(place)
        scale, shift = model.latent_space.scaling_factor, model.latent_space.shift_factor
    except (OSError, ValueError) as error:
        try:
            model = read_vae(place, None)
        except ValueError:
            raise ValueError(f"{place}: {error}") from error
        scale, shift = model.config.scaling_factor, getattr(model.config, "shift_factor", None) or 0.0
    network = model.decoder
    nn.Module.to(model, torch.device(device), torch.float32).eval().requires_grad_(False)  # ModelMixin's logs a warning (CONTRACT 7.11)
    lay_out(network, torch.channels_last)
    temporal = isinstance(model, FastDecoder) or type(model).__name__ == "AutoencoderKLTemporalDecoder"

    @torch.inference_mode()
    def decode(z: Tensor, frames: int) -> Tensor:
        units = (z / scale + shift).to(device, torch.float32).contiguous(memory_format=torch.channels_last)
        decoded = model.decode(units, num_frames=frames) if temporal else model.decode(units)
        return decoded.sample.float().cpu()

    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().float().numpy().tobytes())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Candidate(name or place, decode, model, model.config.latent_channels, parameters, digest.hexdigest()[:16])


def recoloured(candidate: Candidate, matrix: Tensor) -> Candidate:
    """The same decoder with one affine change of colour behind it: (3, 4), applied to [-1, 1]."""

    def decode(z: Tensor, frames: int) -> Tensor:
        y = candidate.decode(z, frames)
        return torch.einsum("ij,njhw->nihw", matrix[:, :3], y) + matrix[:, 3, None, None]

    name = f"{candidate.name} + affine colour"
    return Candidate(name, decode, candidate.model, candidate.channels, candidate.parameters, candidate.hash)


def colour_sums(decoded: Tensor, truth: Tensor) -> list[float]:
    """Of pictures (N, 3, H, W) in [-1, 1] what `colour_fit` needs, 28 numbers: sums over samples are the sums of all."""
    a = torch.cat([decoded.clamp(-1, 1).transpose(0, 1).flatten(1), torch.ones(1, decoded[:, 0].numel())]).double()
    x = truth.transpose(0, 1).flatten(1).double()
    return [*(a @ a.T / a.shape[1]).flatten().tolist(), *(a @ x.T / a.shape[1]).flatten().tolist()]


def colour_fit(sums: Tensor) -> Tensor:
    """The affine change of colour (3, 4) that brings decoded pictures nearest to the truth, by least squares; each sample counts alike."""
    sums = sums.double()
    return torch.linalg.solve(sums[:16].view(4, 4), sums[16:].view(4, 3)).T.float()
