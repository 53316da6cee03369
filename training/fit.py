"""The fit of a network's last layer to given pictures, by least squares."""

import torch
import torch.nn.functional as F
from fold import is_plain_3x3
from torch import Tensor

from fast_latent_decoders.networks.blocks import BlockNetwork, SubpixelUp


@torch.no_grad()
def fit_last_layer(network: BlockNetwork, latents: Tensor, targets: Tensor, ridge: float = 1e-6, batch: int = 4) -> None:
    """Fit the last convolution and its bias to the targets by least squares; everything before it stays.

    Normal equations in float64, added up over strips of 16 rows of `batch` pictures, so memory does not grow with the number
    of pictures. They are solved for the change of the weights, so that `ridge` holds what the pictures leave open at what it
    was. A temporal network sees each picture as a clip of one frame.

    Args:
        latents: (M, C, h, w) scaled.
        targets: (M, 3, 8h, 8w) on [-1, 1], floating point.
        ridge: weight of the squared change, in units of the features' mean square.

    Raises:
        ValueError: latents and targets that do not fit, no positive ridge, or a network that does not end in a 3x3 convolution
            with bias, with or without a pixel shuffle.
    """
    last = network.layers[-1]
    conv, factor = (last[0], last.factor) if isinstance(last, SubpixelUp) else (last, 1)
    if not is_plain_3x3(conv) or conv.bias is None:
        raise ValueError(f"expected a network that ends in a plain 3x3 convolution with bias, got {last}; fold branches first")
    expected = (len(latents), 3, *(8 * side for side in latents.shape[2:]))
    if not len(latents) or tuple(targets.shape) != expected or not targets.is_floating_point() or not ridge > 0:
        raise ValueError(
            f"expected latents (M, C, h, w), floating-point targets (M, 3, 8h, 8w) on [-1, 1] and a ridge above 0; got latents "
            f"{tuple(latents.shape)}, {targets.dtype} targets {tuple(targets.shape)}, ridge {ridge}"
        )
    ends = network.to_picture(torch.tensor([0.0, 1.0])).tolist()  # pictures are a + (b - a) * output
    size = conv.weight[0].numel() + 1
    gram = torch.zeros(size, size, dtype=torch.float64, device=conv.weight.device)
    cross = gram.new_zeros(size, conv.out_channels)
    seen: list[Tensor] = []
    handle = conv.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    training = network.training
    network.eval()
    try:
        for z, target in zip(latents.split(batch), targets.split(batch), strict=True):
            seen.clear()
            network(z.to(conv.weight))
            features, output = F.pad(seen[0], (1, 1, 1, 1)), seen[1].double()
            wanted = (target.to(output) - ends[0]) / (ends[1] - ends[0])
            error = (F.pixel_unshuffle(wanted, factor) if factor > 1 else wanted) - output
            for top in range(0, error.shape[2], 16):
                x = F.unfold(features[:, :, top : top + 18].double(), 3).transpose(0, 1).flatten(1)  # (9C, pixels)
                x = torch.cat([x, torch.ones_like(x[:1])])
                gram += x @ x.T
                cross += x @ error[:, :, top : top + 16].transpose(0, 1).flatten(1).T
    finally:
        handle.remove()
        network.train(training)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    change = torch.linalg.solve(gram, cross).T
    conv.weight.copy_(conv.weight.double() + change[:, :-1].reshape(conv.weight.shape))
    conv.bias.copy_(conv.bias.double() + change[:, -1])
