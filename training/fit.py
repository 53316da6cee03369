"""The fit of a network's last layer to given pictures, by least squares."""

import torch
import torch.nn.functional as F
from fold import is_plain_3x3
from torch import Tensor

from fast_latent_decoders.networks.blocks import BlockNetwork, SubpixelUp


class LastLayerFit:
    """Normal equations of the last convolution and its bias, added up over samples; everything before it stays.

    They are kept in float64, and solved for the change of the weights, so that what the samples leave open stays as it was.

    Raises:
        ValueError: a network that does not end in a 3x3 convolution with bias, with or without a pixel shuffle.
    """

    def __init__(self, network: BlockNetwork) -> None:
        last = network.layers[-1]
        self.network = network
        conv, self.factor = (last[0], last.factor) if isinstance(last, SubpixelUp) else (last, 1)
        if not is_plain_3x3(conv) or conv.bias is None:
            raise ValueError(f"expected a network that ends in a plain 3x3 convolution with bias, got {last}; fold branches first")
        self.conv, self.bias = conv, conv.bias
        self.ends = network.to_picture(torch.tensor([0.0, 1.0])).tolist()  # pictures are a + (b - a) * output
        size = conv.weight[0].numel() + 1
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=conv.weight.device)
        self.cross = self.gram.new_zeros(size, conv.out_channels)

    @torch.no_grad()
    def add(
        self, latents: Tensor, targets: Tensor | None, weight: float = 1.0, frames: int = 1, batch: int = 4, positions: int | None = None
    ) -> None:
        """Samples, whose mean squared error counts `weight`; without targets what the network makes of them is wanted to stay.

        Strips of 16 rows of `batch` samples at a time, so memory does not grow with their number.

        Args:
            latents: (M * frames, C, h, w) scaled.
            targets: (M * frames, 3, 8h, 8w) on [-1, 1], floating point, or None.
            frames: of a clip; a temporal network sees each sample as a clip of so many.
            positions: of each batch, at random, that are looked at; None: all.

        Raises:
            ValueError: latents and targets that do not fit.
        """
        expected = (len(latents), 3, *(8 * side for side in latents.shape[2:]))
        fits = targets is None or (tuple(targets.shape) == expected and targets.is_floating_point())
        if not len(latents) or len(latents) % frames or not fits:
            told = "none" if targets is None else f"{targets.dtype} {tuple(targets.shape)}"
            raise ValueError(
                f"expected latents (M * {frames}, C, h, w) and floating-point targets (M * {frames}, 3, 8h, 8w) on [-1, 1]; got latents "
                f"{tuple(latents.shape)} and targets {told}"
            )
        gram, cross, count = torch.zeros_like(self.gram), torch.zeros_like(self.cross), 0
        seen: list[Tensor] = []
        generator = torch.Generator().manual_seed(0)
        handle = self.conv.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
        training = self.network.training
        self.network.eval()
        try:
            for place in range(0, len(latents), batch * frames):
                z = latents[place : place + batch * frames]
                seen.clear()
                self.network(z.to(self.conv.weight), frames)
                mode = "constant" if self.conv.padding_mode == "zeros" else self.conv.padding_mode
                features, output = F.pad(seen[0], (1, 1, 1, 1), mode), seen[1].double()
                error = torch.zeros_like(output)
                if targets is not None:
                    wanted = (targets[place : place + len(z)].to(output) - self.ends[0]) / (self.ends[1] - self.ends[0])
                    error = (F.pixel_unshuffle(wanted, self.factor) if self.factor > 1 else wanted) - output
                share = min(1.0, positions / error[:, 0].numel()) if positions else 1.0
                for top in range(0, error.shape[2], 16):
                    x = F.unfold(features[:, :, top : top + 18], 3).transpose(0, 1).flatten(1)  # (9C, pixels)
                    e = error[:, :, top : top + 16].transpose(0, 1).flatten(1)
                    if share < 1:
                        chosen = torch.randperm(x.shape[1], generator=generator)[: max(1, round(share * x.shape[1]))].to(x.device)
                        x, e = x[:, chosen], e[:, chosen]
                    x = torch.cat([x.double(), torch.ones_like(e[:1])])
                    gram += x @ x.T
                    cross += x @ e.T
                    count += x.shape[1]
        finally:
            handle.remove()
            self.network.train(training)
        self.gram += weight / count * gram
        self.cross += weight / count * cross

    @torch.no_grad()
    def solve(self, ridge: float = 1e-6) -> None:
        """Change the network's last layer. `ridge` is the weight of the squared change, in units of the features' mean square.

        Raises ValueError for a ridge that is not positive, and where no samples were added.
        """
        if not ridge > 0 or not self.gram.any():
            raise ValueError(f"expected samples that were added and a ridge above 0, got ridge {ridge} and {'some' if self.gram.any() else 'no'} samples")
        gram = self.gram.clone()
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        change = torch.linalg.solve(gram, self.cross).T
        self.conv.weight.copy_(self.conv.weight.double() + change[:, :-1].reshape(self.conv.weight.shape))
        self.bias.copy_(self.bias.double() + change[:, -1])


def fit_last_layer(network: BlockNetwork, latents: Tensor, targets: Tensor, ridge: float = 1e-6, batch: int = 4) -> None:
    """Fit the last layer to the targets of latents (M, C, h, w), as `LastLayerFit` does it."""
    fit = LastLayerFit(network)
    fit.add(latents, targets, batch=batch)
    fit.solve(ridge)
