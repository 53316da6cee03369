"""EfficientViT: the paper's second family. It claims a vision transformer, and its code has none (FACTS 3.2), so here are both:
`EfficientViTNetwork`, with real EfficientViT blocks at 1/8 resolution, and `PublishedEfficientViTNetwork`, the published shape.

Blocks of either have the maths of diffusers' DC-AE blocks, and take their weights through a map of names.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import BlockNetwork, SubpixelUp
from .subpixel import SubpixelNetwork

HEAD = 32  # channels of an attention head
LEGAL_WIDTHS = (tuple(range(HEAD, 513, HEAD)), tuple(range(8, 257, 8)), tuple(range(8, 129, 8)))


class EfficientViTNetwork(SubpixelNetwork):
    """EfficientViT blocks at 1/8 of the picture's resolution, residual blocks at 1/4 and 1/2, nothing at full resolution.

    Scaled latents (N, latent_channels, h, w) to pictures (N, 3, 8h, 8w), nominally in [-1, 1].
    `widths` are the channels at 1/8, 1/4 and 1/2, `residual_blocks` the blocks at 1/4 and 1/2, of `convs` convolutions each. Capacity
    stands where positions are few: a DC-AE-like spread (128 channels at 1/2) is little faster than TAE-192 (issue 9). Three counts put
    residual blocks at 1/8 too, in front of the attention: that is `SubpixelNetwork` with EfficientViT blocks, and can begin as exactly one.
    Raises ValueError for illegal widths, listing the legal ones, for block counts that are not one and two or three numbers, and for
    `convs` and `block` as `SubpixelNetwork`.
    """

    def __init__(
        self,
        latent_channels: int,
        widths: Sequence[int] = (256, 128, 64),
        attention_blocks: int = 9,
        residual_blocks: Sequence[int] = (2, 1),
        convs: int = 2,
        block: str = "residual",
    ) -> None:
        if len(widths) != 3 or any(width not in legal for width, legal in zip(widths, LEGAL_WIDTHS, strict=True)):
            listed = "; ".join(f"1/{8 >> i}: {', '.join(map(str, legal))}" for i, legal in enumerate(LEGAL_WIDTHS))
            raise ValueError(f"expected three widths, legal at each resolution are {listed}; got widths {tuple(widths)}")
        if attention_blocks < 0 or len(residual_blocks) not in (2, 3) or min(residual_blocks) < 0:
            raise ValueError(
                "expected a count of attention blocks and two counts of residual blocks (for 1/4 and 1/2 resolution; three: 1/8 too), "
                f"none negative; got {attention_blocks} and {tuple(residual_blocks)}"
            )
        super().__init__(latent_channels, widths, (0, *residual_blocks)[-3:], convs, block)
        behind = next(i for i, layer in enumerate(self.layers) if isinstance(layer, SubpixelUp))
        for i in range(attention_blocks):
            self.layers.insert(behind + i, EfficientViTBlock(widths[0]))


class PublishedEfficientViTNetwork(BlockNetwork):
    """The published decoder, exactly (FACTS 3.3): 15 residual blocks with batch normalisation, 6,223,500 parameters.

    Scaled latents (N, latent_channels, h, w) to pictures (N, 3, 8h, 8w), nominally in [-1, 1]; the squash in front is ours.
    In training mode batch normalisation mixes the pictures of a batch, and gradient checkpointing counts each batch twice
    in its running statistics; in evaluation mode the network is local.
    Raises ValueError if `latent_channels` does not divide 256.
    """

    def __init__(self, latent_channels: int) -> None:
        if latent_channels < 1 or 256 % latent_channels:
            legal = ", ".join(str(2**i) for i in range(9))
            raise ValueError(f"expected latent channels that divide 256 ({legal}); got {latent_channels}")
        super().__init__(
            [
                RepeatConv(latent_channels, 256),
                RepeatConv(256, 512),
                nn.PixelShuffle(2),
                *(BatchNormBlock(128) for _ in range(10)),
                RepeatConv(128, 512),
                nn.PixelShuffle(2),
                *(BatchNormBlock(128) for _ in range(5)),
                RMSNorm(128),
                nn.ReLU(),
                SubpixelUp(128, 3),
            ]
        )


class EfficientViTBlock(nn.Module):
    """Linear attention, then a gated feed-forward, each added to x behind a normalisation whose gain starts at zero:
    a new block is the identity, and the sum stays bounded whatever came in."""

    is_global = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = LinearAttention(width)
        self.feed_forward = GatedFeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.attention(x))


class LinearAttention(nn.Module):
    """x + norm(out(attention)): ReLU linear attention in two scales, the second aggregated over 5x5 positions.

    relu(q) . relu(k) takes the place of softmax, so keys and values are summed once for all queries: the cost is linear in
    positions (Cai et al. 2023). Sums over a whole picture outgrow fp16, so they are float32, also under autocast.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.aggregate = nn.Sequential(
            nn.Conv2d(3 * width, 3 * width, 5, padding=2, groups=3 * width, bias=False),
            nn.Conv2d(3 * width, 3 * width, 1, groups=3 * width // HEAD, bias=False),
        )
        self.out = nn.Conv2d(2 * width, width, 1, bias=False)
        self.norm = RMSNorm(width, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, self.aggregate(qkv)], dim=1)
        autocast = torch.amp.is_autocast_available(x.device.type)  # not on "meta", for one
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
            # Heads are runs of 3 * HEAD channels, as in DC-AE: (N, heads, HEAD, h*w) each.
            q, k, v = qkv.float().flatten(2).unflatten(1, (-1, 3 * HEAD)).chunk(3, dim=2)
            q, k = F.relu(q), F.relu(k)
            summed = v @ k.transpose(2, 3)  # (N, heads, HEAD, HEAD)
            weight = k.sum(3, keepdim=True).transpose(2, 3) @ q  # (N, heads, 1, h*w)
            attended = (summed @ q) / (weight + 1e-6)  # a query may be all zero
        attended = attended.to(qkv.dtype).flatten(1, 2).unflatten(2, x.shape[2:])
        return x + self.norm(self.out(attended))


class GatedFeedForward(nn.Module):
    """x + norm(narrow(a * silu(b))), where a and b are 4 channels for each one, expanded and mixed depthwise over 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, 8 * width, 1)
        self.depthwise = nn.Conv2d(8 * width, 8 * width, 3, padding=1, groups=8 * width)
        self.narrow = nn.Conv2d(4 * width, width, 1, bias=False)
        self.norm = RMSNorm(width, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.depthwise(F.silu(self.expand(x))).chunk(2, dim=1)
        return x + self.norm(self.narrow(a * F.silu(b)))


class RMSNorm(nn.Module):
    """Each position's channels by their root mean square, times a gain, plus a bias; local, and computed in float32."""

    def __init__(self, width: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), gain))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-5)
        return torch.addcmul(self.bias.float().view(-1, 1, 1), wide, self.weight.float().view(-1, 1, 1)).to(x.dtype)


class BatchNormBlock(nn.Module):
    """x + batch_norm(conv(relu(conv(x)))), both 3x3 at one width, the second without bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class RepeatConv(nn.Conv2d):
    """A 3x3 convolution plus its input, each channel of it repeated to make up the output's number."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.repeat_interleave(self.out_channels // self.in_channels, dim=1)
