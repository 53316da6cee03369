"""TAE-Temporal: a TAE with one spatio-temporal mid block (FACTS 4, made sane).

The mid block's maths are those of diffusers' `MidBlockTemporalDecoder` with two layers. Despite the paper's "temporal attention"
the attention looks inside each frame; frames mix only through convolutions over time, blended in by one learned number each.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import zero_init
from .tae import TAENetwork, stage_widths

MID_BLOCKS = ("upsampled", "latent")


class TAETemporalNetwork(TAENetwork):
    """Scaled latents (clips*frames, latent_channels, h, w) to pictures (clips*frames, 3, 8h, 8w), nominally in [-1, 1].

    `mid_block` says where the mid block stands: "upsampled", as published, behind the first upsampling and its convolution
    (1/4 of the picture's resolution), or "latent", in front of it, with a sixteenth of the attention's work (FACTS 4.5).
    A new mid block is the identity, so the network starts as exactly its frame-wise TAE. It is not exact under tiling, nor
    when a clip is decoded in chunks: statistics and attention see the whole picture, and the statistics the whole clip.
    Four widths, as for `TAENetwork`, are no published shape.
    Raises ValueError for a width of the mid block that 32 normalisation groups do not divide, an unknown `mid_block`, and as `TAENetwork`.
    """

    def __init__(
        self,
        latent_channels: int,
        width: int | Sequence[int] = 192,
        blocks: Sequence[int] = (3, 3, 3, 1),
        upsampling: str = "nearest",
        mid_block: str = "upsampled",
    ) -> None:
        if mid_block not in MID_BLOCKS:
            raise ValueError(f"expected mid_block to be one of {', '.join(MID_BLOCKS)}; got {mid_block!r}")
        super().__init__(latent_channels, width, blocks, upsampling)
        upsampled = mid_block == "upsampled"
        mid_width = stage_widths(width)[upsampled]
        if mid_width % 32:
            legal = ", ".join(map(str, range(32, 257, 32)))
            raise ValueError(f"expected a width of the mid block that 32 normalisation groups divide ({legal}, ...); got {mid_width}")
        # Behind conv, relu and the first stage; "upsampled" also behind the upsampling and its convolution.
        self.mid_position = 2 + blocks[0] + (2 if upsampled else 0)
        self.layers.insert(self.mid_position, TemporalMidBlock(mid_width))


def load_framewise(network: TAETemporalNetwork, state_dict: Mapping[str, Tensor]) -> None:
    """Load a frame-wise TAE's tensors and leave the mid block as it is: layers behind it move up by one.

    Strict: a missing, surplus or misshapen tensor is a RuntimeError, as in `load_state_dict`.
    """
    position = network.mid_position
    mid_block = {name: tensor for name, tensor in network.state_dict().items() if name.startswith(f"layers.{position}.")}
    framewise = {}
    for name, tensor in state_dict.items():
        index = name.removeprefix("layers.").split(".")[0]
        if index.isdigit() and int(index) >= position:
            name = name.replace(index, str(int(index) + 1), 1)
        framewise[name] = tensor
    network.load_state_dict({**mid_block, **framewise})


class TemporalMidBlock(nn.Module):
    """Spatio-temporal residual block, spatial self-attention, spatio-temporal residual block."""

    temporal = True
    is_global = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = SpatioTemporalBlock(width)
        self.attention = SpatialAttention(width, heads=2)
        self.after = SpatioTemporalBlock(width)

    def forward(self, x: Tensor, num_frames: int | None = None) -> Tensor:
        """(clips*frames, C, h, w) to the same; without `num_frames` each picture is a clip of one frame.

        Raises ValueError if the batch is not made of whole clips.
        """
        frames = 1 if num_frames is None else num_frames
        if frames < 1 or x.shape[0] % frames:
            raise ValueError(
                "expected a batch of whole clips, that is clips * num_frames pictures; "
                f"got {x.shape[0]} pictures and num_frames {num_frames}"
            )
        return self.after(self.attention(self.before(x, frames)), frames)


class SpatioTemporalBlock(nn.Module):
    """A residual block in each frame, then one over time, whose residual counts sigmoid(mix): half at first.

    The last convolution of either starts at zero, so a new block is the identity. Convolutions over time are 2-D, over frames
    and positions: diffusers' Conv3d would make `.to(memory_format=torch.channels_last)` fail, and is slow on a CPU.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Sequential(
            nn.GroupNorm(32, width, eps=1e-6),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(32, width, eps=1e-6),
            nn.SiLU(),
            zero_init(nn.Conv2d(width, width, 3, padding=1)),
        )
        self.over_time = nn.Sequential(
            nn.GroupNorm(32, width, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(width, width, (3, 1), padding=(1, 0)),
            nn.GroupNorm(32, width, eps=1e-5),
            nn.SiLU(),
            zero_init(nn.Conv2d(width, width, (3, 1), padding=(1, 0))),
        )
        self.mix = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        x = x + self.spatial(x)
        clips = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(3)  # (clips, C, frames, h*w)
        residual = self.over_time(clips).transpose(1, 2).reshape(x.shape)
        # Blending x with x + residual is adding a share of the residual.
        return x + torch.sigmoid(self.mix).to(x.dtype) * residual


class SpatialAttention(nn.Module):
    """x + self-attention over the h*w positions of each frame; the output projection starts at zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = zero_init(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (N, h*w, C)
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, h*w, C / heads) each
        tokens = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])
