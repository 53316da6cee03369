"""Whose latents: any frozen encoder, and the conventions that make a tiny one stand in for a real VAE's (DESIGN 5).

TAESD(XL)'s encoder is a close copy of the full VAE's, with three known faults; each has its cure here:
its stored weights were rounded to float8, so they are drawn anew inside the rounding box; its flat colours are off,
so a share of a colour table is added; and real flat colours are known, so their latents are used with texture transplanted.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import diffusers
import torch
from diffusers.models.autoencoders.vae import EncoderTiny
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..decoder import FastDecoder
from ..encoder import load_tiny_encoder
from ..presets import check_space


@dataclass(frozen=True)
class Encoder:
    """Whose latents: frozen, never trained."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # a training configuration checks its keys

    path: str | None = None  # folder or Hub id of a diffusers VAE, or a TAESD-like .safetensors file; without, TAESD's of the latent space
    subfolder: str | None = None  # of the folder or Hub repository
    posterior: Literal["sample", "mode"] = "sample"  # of a VAE; tiny encoders have none


@dataclass(frozen=True)
class StandIn:
    """What makes a tiny encoder's latents resemble those of the VAE it stands for (DESIGN 5). All off for a real VAE."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # a training configuration checks its keys

    redraw: bool = False  # draw the encoder's weights anew inside their float8 rounding box, for every shard
    colour_table: str | None = None  # what the real encoder adds to flat colours
    table_share: tuple[float, float] = (0.2, 0.8)  # of that table, drawn per sample
    colours: str | None = None  # real latents of flat colours
    transplants: float = 0.125  # share of samples with a real colour
    noise: float = 0.0  # largest standard deviation of the noise on latents, drawn per sample


class FrozenEncoder(ABC):
    """Pictures (N, 3, H, W) in [-1, 1] to scaled latents (N, C, H/8, W/8); what goes in and comes out stays in main memory."""

    network: Any  # a tiny encoder, or a VAE without its decoder

    def __init__(self, network: nn.Module, name: str, channels: int) -> None:
        self.network = network.float().eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.name, self.channels, self.device = name, channels, torch.device("cpu")
        self.stored = {key: value.clone() for key, value in self.network.state_dict().items()}
        self.table: Tensor | None = None
        self.colours: dict[str, Tensor] | None = None

    @property
    def hash(self) -> str:
        """Of all weights as they are stored, so that a cache of latents knows its encoder."""
        digest = hashlib.sha256(self.name.encode())
        for key, value in sorted(self.stored.items()):
            digest.update(key.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device) -> Self:
        """Encode there."""
        self.device = device
        self.network.to(device)
        return self

    @abstractmethod
    def latents(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """As `encode`, on this device and differentiable, which the re-encoding loss needs."""

    @torch.no_grad()
    def encode(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The latents, in float32. Without a generator a posterior's mode, with one a sample of it if so configured."""
        x = pictures.to(self.device).contiguous(memory_format=torch.channels_last)
        return self.latents(x, generator).float().cpu()

    def redraw(self, generator: torch.Generator | None) -> None:
        """Draw every convolution weight inside the box that float8 (e4m3) rounding left open; None gives back the stored ones."""
        drawn = dict(self.stored)
        for key, value in self.stored.items():
            if key.endswith("weight") and generator is not None:
                exponent = value.abs().clamp_min(2.0**-20).log2().floor()
                step = (2 ** (exponent - 3)).clamp_min(2.0**-9)
                drawn[key] = value + (torch.rand(value.shape, generator=generator) - 0.5) * step
        self.network.load_state_dict(drawn)

    def table_at(self, pictures: Tensor) -> Tensor:
        """What the colour table would add to the latents of these pictures: real minus stand-in, (N, C, H/8, W/8)."""
        if self.table is None:
            return torch.zeros(len(pictures), self.channels, *(n // 8 for n in pictures.shape[2:]))
        rgb = F.avg_pool2d(pictures, 8).permute(0, 2, 3, 1)[:, None]  # (N, 1, h, w, 3), in [-1, 1] as grid_sample wants it
        # The table's axes are red, green, blue; grid_sample reads the last axis first (weights/README.md).
        delta = F.grid_sample(
            self.table[None].expand(len(pictures), -1, -1, -1, -1), rgb.flip(-1), align_corners=True, padding_mode="border"
        )
        return delta[:, :, 0]

    def transplant(self, texture: Tensor, amplitude: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Real colours with a texture on them: latents real(c) + E(c + t) - E(c) and their target c + t.

        Args:
            texture: (N, 3, H, W), pictures in [-1, 1] whose departure from their own mean is the texture.
            amplitude: (N,), what that departure is multiplied by; 0 is a flat colour.
            index: (N,), which of the real colours.
        """
        assert self.colours is not None, "expected a file of real colours, got none; give `stand_in.colours`"
        flat = (self.colours["srgb"][index] * 2 - 1)[:, :, None, None].expand_as(texture)
        residual = texture - texture.mean(dim=(2, 3), keepdim=True)
        target = (flat + amplitude[:, None, None, None] * residual).clamp(-1, 1)
        real = self.colours["latent"][index][:, :, None, None]
        both = self.encode(torch.cat([target, flat]))
        return real + both[: len(target)] - both[len(target) :], target


class TinyEncoder(FrozenEncoder):
    """An encoder of TAESD's shape, whose output is scaled latents already."""

    def latents(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.network(pictures)


class VAEEncoder(FrozenEncoder):
    """The encoding half of a diffusers VAE."""

    def __init__(self, vae: Any, name: str, posterior: str) -> None:
        self.posterior = posterior
        self.scale, self.shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
        channels = vae.config.latent_channels
        vae.decoder = nn.Identity()  # frees it
        super().__init__(vae, name, channels)

    def latents(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        posterior = self.network.encode(pictures).latent_dist
        z = posterior.sample(generator) if generator is not None and self.posterior == "sample" else posterior.mode()
        return (z - self.shift) * self.scale


def load_encoder(encoder: Encoder, stand_in: StandIn, model: FastDecoder) -> FrozenEncoder:
    """The encoder of a configuration, with its conventions, for the latent space of `model`.

    Raises:
        ValueError: it makes latents of another space, or conventions of a stand-in are asked of a real VAE.
    """
    space, path = model.latent_space, encoder.path
    if path is None:
        try:
            found: FrozenEncoder = TinyEncoder(load_tiny_encoder(space), f"the tiny {space.name} encoder", space.channels)
        except RuntimeError as error:
            raise ValueError(f"{error}: here, a folder, a Hub id or a TAESD-like file") from None
    elif path.endswith(".safetensors"):
        found = TinyEncoder(*read_tiny(Path(path)))
    else:
        vae = read_vae(path, encoder.subfolder)
        if type(vae).__name__ == "AutoencoderTiny":
            found = TinyEncoder(vae.encoder, path, vae.config.latent_channels)
        else:
            check_space(vae, model.latent_space)
            found = VAEEncoder(vae, path, encoder.posterior)
            if on := [key for key in ("redraw", "colour_table", "colours") if getattr(stand_in, key)]:
                raise ValueError(f"{path} is a real VAE, and stand_in.{' and stand_in.'.join(on)} are for an encoder that stands in for one")
    if found.channels != space.channels:
        raise ValueError(f"{found.name} makes latents of {found.channels} channels, and the decoder takes {space.channels}")
    found.table = load_file(stand_in.colour_table)["delta"] if stand_in.colour_table else None
    found.colours = load_file(stand_in.colours) if stand_in.colours else None
    return found


def read_tiny(path: Path) -> tuple[nn.Module, str, int]:
    """TAESD's encoder from a file in madebyollin/taesd's layout or diffusers', its name and its number of latent channels."""
    state = {key.removeprefix("encoder.").removeprefix("layers."): value.float() for key, value in load_file(path).items() if "decoder" not in key}
    last = max((key for key in state if key.endswith("weight")), key=lambda key: int(key.split(".")[0]), default=None)
    if last is None or state[last].ndim != 4:
        raise ValueError(f"{path} holds no encoder of TAESD's shape")
    network = EncoderTiny(3, state[last].shape[0], num_blocks=(1, 3, 3, 3), block_out_channels=(64,) * 4, act_fn="relu")
    try:
        network.load_state_dict({f"layers.{key}": value for key, value in state.items()}, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} holds no encoder of TAESD's shape: {error}") from None
    return network, path.name, len(state[last])


def read_vae(path: str, subfolder: str | None) -> Any:
    """A VAE of any diffusers class from a folder or the Hub (OWNER/NAME, or OWNER/NAME/SUBFOLDER); its config names the class."""
    if subfolder is None and path.count("/") == 2 and not Path(path).exists():
        path, _, subfolder = path.rpartition("/")
    where = {"subfolder": subfolder} if subfolder else {}
    try:
        name = diffusers.AutoencoderKL.load_config(path, **where).get("_class_name")
        return getattr(diffusers, name).from_pretrained(path, **where)
    except (OSError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no VAE that diffusers can load ({error}); give a folder or Hub id, and encoder.subfolder=vae for a pipeline") from error
