"""Another decoder of the same latents as a teacher: on latents that no encoder made there is no true picture, but there is its."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from config import Teacher
from losses import PLAIN, WEIGHTED
from torch import Tensor, nn
from torch.nn import functional as F

from fast_latent_decoders import FastDecoder
from fast_latent_decoders.evaluation.encoders import read_vae
from fast_latent_decoders.latent_space import LatentSpace
from fast_latent_decoders.networks.blocks import BlockNetwork

Distance = Callable[[Tensor, Tensor], Tensor]


def load_teacher(path: str, space: LatentSpace) -> nn.Module:
    """A decoder of scaled latents: a preset's, a folder's or Hub id's FastDecoder, AutoencoderTiny or AutoencoderKL.

    Raises:
        SystemExit: nothing to load there, or a decoder of another latent space.
    """
    try:
        model: Any = FastDecoder.from_pretrained(path).float()
        network, name = model.decoder, model.latent_space.name
    except (OSError, ValueError):
        model, name = read_vae(path, None), space.name  # a VAE does not tell its space's name, but its channels
        network = model.decoder if type(model).__name__ == "AutoencoderTiny" else FullDecoder(model)
    if (model.config.latent_channels, name) != (space.channels, space.name):
        theirs = f"{model.config.latent_channels} channels of the latent space {name!r}"
        raise SystemExit(f"the teacher {path} takes latents of {theirs}, the decoder {space.channels} of {space.name!r}")
    return network.eval().requires_grad_(False)


class FullDecoder(nn.Module):
    """A VAE's decoder on scaled latents."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.scale, self.shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
        self.before, self.decoder = getattr(vae, "post_quant_conv", None) or nn.Identity(), vae.decoder
        self.layers = [self.decoder.mid_block, *self.decoder.up_blocks]  # what `Maps` watches

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(self.before(z / self.scale + self.shift))


class Maps:
    """Attention maps of a decoder (Zagoruyko and Komodakis 2017): mean square over channels, of unit length for each picture.

    At 1/8, 1/4 and 1/2 of the picture's resolution, from the last of `layers` that works there. They need no learned
    projection between networks of different widths.
    """

    scales = (1, 2, 4)

    def __init__(self, network: Any) -> None:
        self.found: dict[int, Tensor] = {}
        for layer in network.layers:
            layer.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            self.found[output.shape[-1]] = output

    def take(self, width: int) -> list[Tensor]:
        """Of the last forward pass, of latents `width` wide; at a resolution where nothing works, none."""
        maps = [self.found[width * s].float().square().mean(1).flatten(1) for s in self.scales if width * s in self.found]
        self.found = {}
        return [F.normalize(m, dim=1) for m in maps]


class Lesson:
    """Two calls: `latents` to be decoded beside the batch, and `terms` for what became of them.

    Latents as they are ("real") are decoded with the batch already: they are not decoded twice.
    """

    def __init__(
        self, c: Teacher, space: LatentSpace, network: nn.Module, device: torch.device, features: Mapping[str, nn.Module]
    ) -> None:
        assert c.path is not None
        self.c = c
        known: dict[str, Distance] = {**WEIGHTED, **PLAIN, **features}
        self.distances = {name: known[name] for name, weight in c.losses.items() if weight}
        self.network = load_teacher(c.path, space).to(device).to(memory_format=torch.channels_last)
        self.maps = (Maps(network), Maps(self.network)) if c.features else None

    def latents(self, z: Tensor, frames: int, step: int, seed: int) -> Tensor:
        """A share of the batch's clips, noisy, mixed, recoloured or widened: (n, C, h, w); none where they stay as they are.

        The share of a batch that is too small for it is a chance: of one clip a step, a quarter is a clip in every fourth step.
        """
        kind = self.c.latents[step % len(self.c.latents)]
        if kind == "real":
            return z[:0]
        generator = torch.Generator().manual_seed(seed)
        clips = z.unflatten(0, (-1, frames))
        count = self.count(len(clips), generator)
        order = torch.randperm(len(clips), generator=generator)
        chosen = clips[order[:count]]
        each = (count, 1, 1, 1, 1)
        if kind == "noisy":
            sigma = 0.5 * torch.rand(each, generator=generator)
            chosen = chosen + (sigma * torch.randn(chosen.shape, generator=generator)).to(z)
        elif kind == "mixed":
            others = clips[order.roll(1)[:count]].flip(-1)  # mirrored: a clip that is alone has another one in itself
            chosen = torch.lerp(chosen, others, torch.rand(each, generator=generator).to(z))
        elif kind == "recoloured":
            channels = (count, 1, z.shape[1], 1, 1)
            scale, shift = 1 + 0.2 * torch.randn(channels, generator=generator), 0.5 * torch.randn(channels, generator=generator)
            chosen = chosen * scale.to(z) + shift.to(z)
        elif kind == "widened":  # TAESD's encoder gives flatter latents than SD's own, RESULTS.md
            mean = chosen.mean((1, 3, 4), keepdim=True)
            chosen = torch.lerp(mean, chosen, 1 + 0.3 * torch.rand(each, generator=generator).to(z))
        return chosen.flatten(0, 1).contiguous(memory_format=torch.channels_last)

    def count(self, clips: int, generator: torch.Generator) -> int:
        """How many of `clips` are taught: their share, rounded by chance so that it is right on average.

        The first draw of a step's generator, and no later one's, or what is drawn for the taught would depend on their being taught.
        """
        return math.floor(clips * self.c.share + torch.rand((), generator=generator).item())

    def terms(self, decoded: Tensor, z: Tensor, frames: int, own: Tensor, own_z: Tensor, seed: int) -> dict[str, Tensor]:
        """The distances to the teacher's pictures and maps of the same latents; weights are the configuration's.

        None where chance left no clip to be taught.

        Args:
            decoded, z: pictures and latents of `latents`, if there were any.
            own, own_z: those of the batch, whose last clips are taken where there were none.
        """
        count = self.count(len(own) // frames, torch.Generator().manual_seed(seed)) * frames
        if not count:
            return {}
        if not len(z):
            decoded, z = own[-count:], own_z[-count:].contiguous(memory_format=torch.channels_last)
        mine = self.maps[0].take(z.shape[-1]) if self.maps else []
        with torch.no_grad():
            taught = (self.network(z, frames) if isinstance(self.network, BlockNetwork) else self.network(z)).float()
        difference = decoded - taught
        if self.c.structure:
            difference = difference - F.interpolate(F.avg_pool2d(difference, self.c.means), scale_factor=self.c.means)
        terms = {"teacher": difference.abs().mean()} if self.c.output else {}
        terms.update({f"teacher_{name}": distance(decoded, taught) for name, distance in self.distances.items()})
        if self.maps:
            theirs = self.maps[1].take(z.shape[-1])
            pairs = zip(mine, theirs, strict=True)
            terms["teacher_maps"] = torch.stack([(a[-len(z) :] - b).square().sum(1).mean() for a, b in pairs]).mean()
        return terms
