"""The adversarial term behind two calls, so that the loop stays plain: `loss` for the decoder, `learn` for the discriminator."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from config import Gan
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Scores for patches of a picture, given its latents: (N, 3, 8h, 8w) and scaled (N, C, h, w) to (N, 1, h, w).

    Three strided convolutions, as taming-transformers' PatchGAN has, bring the picture to the latents' resolution, where both
    are joined: what is scored is whether this picture belongs to these latents, not whether it is pretty. Spectral
    normalisation instead of batch statistics, so that a picture's score does not depend on its batch.
    """

    def __init__(self, latent_channels: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        self.picture = nn.Sequential(*layers)
        self.joined = nn.Sequential(
            spectral_norm(nn.Conv2d(4 * width + latent_channels, 4 * width, 3, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(4 * width, 1, 3, padding=1)),
        )

    def forward(self, pictures: Tensor, latents: Tensor) -> Tensor:
        return self.joined(torch.cat([self.picture(pictures), latents], dim=1))


def decoder_loss(kind: str, fake: Tensor, real: Tensor) -> Tensor:
    """What the decoder minimises, from the scores of its pictures and of the true ones."""
    if kind == "hinge":
        return -fake.mean()
    if kind == "least_squares":
        return (fake - 1).square().mean()
    return F.softplus(real - fake).mean()  # relativistic: the gap counts, not the level


def discriminator_loss(kind: str, fake: Tensor, real: Tensor) -> Tensor:
    """What the discriminator minimises: the true picture's score up, the decoded one's down."""
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    if kind == "least_squares":
        return ((real - 1).square().mean() + (fake + 1).square().mean()) / 2
    return F.softplus(fake - real).mean()


class Adversary:
    """A discriminator with its optimiser and a memory of earlier fakes.

    Half of the fakes that the discriminator learns from are old ones, so that the decoder cannot win by going in circles
    (FIELD 2b, seraena). Which ones follows from a seed, so that a resumed run is the run that was stopped.
    """

    def __init__(self, c: Gan, latent_channels: int, accelerator: Accelerator, accumulate: int = 1, width: int = 64) -> None:
        self.c, self.accelerator, self.accumulate = c, accelerator, accumulate
        self.network = PatchDiscriminator(latent_channels, width).to(accelerator.device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=c.lr, betas=(0.5, 0.9))
        self.pictures: list[Tensor] = []  # uint8; in main memory, each process its own
        self.latents: list[Tensor] = []

    def loss(self, decoded: Tensor, target: Tensor, z: Tensor) -> Tensor:
        self.network.requires_grad_(False)
        with torch.no_grad():
            real = self.network(target, z)
        if self.c.normalised:
            decoded = of_one_length(decoded, self.c.weight / self.accumulate)
        return decoder_loss(self.c.kind, self.network(decoded, z), real)

    def learn(self, decoded: Tensor, target: Tensor, z: Tensor, seed: int) -> float:
        """One step of the discriminator; returns its loss. `decoded` is not differentiated."""
        generator = torch.Generator().manual_seed(seed)
        fake, given = decoded.detach().clone(), z.clone()
        fitting = [i for i, picture in enumerate(self.pictures) if picture.shape == fake.shape[1:]]
        for row in range(1, len(fake), 2) if fitting else ():
            old = fitting[int(torch.randint(len(fitting), (1,), generator=generator))]
            fake[row], given[row] = (self.pictures[old] / 127.5 - 1).to(fake), self.latents[old].to(given)
        for picture, latent in zip(decoded.detach(), z, strict=True):
            self._remember(((picture.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8), latent.cpu().clone(), generator)
        self.network.requires_grad_(True)
        loss = discriminator_loss(self.c.kind, self.network(fake, given), self.network(target, z))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.accelerator.num_processes > 1:  # as DistributedDataParallel does; the weights stay alike in all processes
            for parameter in self.network.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        self.optimizer.step()
        return loss.item()

    def _remember(self, picture: Tensor, latent: Tensor, generator: torch.Generator) -> None:
        if len(self.pictures) < self.c.memory:
            self.pictures.append(picture)
            self.latents.append(latent)
        elif self.c.memory:
            place = int(torch.randint(self.c.memory, (1,), generator=generator))
            self.pictures[place], self.latents[place] = picture, latent

    def state_dict(self) -> dict[str, Any]:
        """Everything, with every process's memory: all processes must call this."""
        memories = gather_object([(self.pictures, self.latents)])
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "memories": memories}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        memories = state["memories"]
        self.pictures, self.latents = (list(part) for part in memories[self.accelerator.process_index % len(memories)])


def of_one_length(decoded: Tensor, weight: float) -> Tensor:
    """The same pictures; the gradient of each, on its way back, is brought to the length that L1 times `weight` would give it.

    Then no picture that the discriminator finds easy drowns the others (seraena's normalised gradients, FIELD 2b).
    """

    def rescale(gradient: Tensor) -> Tensor:
        size = gradient.flatten(1).square().mean(1).sqrt()[:, None, None, None]
        return gradient / size.clamp_min(1e-12) * (weight / gradient.numel())

    passed = decoded.clone()
    passed.register_hook(rescale)
    return passed


def adaptive_ratio(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """||d reconstruction / d last|| / ||d adversarial / d last||, at most 10,000 (Taming Transformers): both pull alike hard.

    Args:
        last: the weight of the decoder's last layer.
    """
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    return (norms[0] / norms[1].clamp_min(1e-4)).clamp_max(1e4).detach()
