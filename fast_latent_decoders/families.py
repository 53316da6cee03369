"""The families of decoders: a network and its configuration each. The signature is the config (written to config.json).

Fields that all share:
    latent_space: "sdxl", "sd" (SD 1.x, 2.x, SVD), or a new name with its own channels and factors;
    latent_channels, scaling_factor, shift_factor: taken from the latent space where it is known;
    encoder: "embedded" (the tiny one of the latent space), "external" (given by `with_encoder`) or "none";
    block_out_channels, force_upcast: what pipelines read (CONTRACT 2.1); nothing of ours depends on them.
"""

from collections.abc import Sequence
from typing import ClassVar

from diffusers.configuration_utils import register_to_config

from .decoder import FastDecoder
from .latent_space import KNOWN
from .networks.efficientvit import EfficientViTNetwork, PublishedEfficientViTNetwork
from .networks.streaming import SubpixelTemporalNetwork
from .networks.subpixel import SubpixelNetwork
from .networks.tae import TAENetwork
from .networks.temporal import TAETemporalNetwork


def _channels(space: str, given: int | None) -> int:
    if given is None and space not in KNOWN:
        raise ValueError(f"latent space {space!r} is not one of {', '.join(KNOWN)}, so latent_channels must be given")
    return given if given is not None else KNOWN[space].channels


class SubpixelDecoder(FastDecoder):
    """Our own family: capacity at 1/8 resolution, every upsampling a convolution and a pixel shuffle (issue 9).

    Args:
        widths: channels at 1/8, 1/4 and 1/2 of the picture's resolution; fewer, and the last pixel shuffle goes by 4 or 8.
        blocks: residual blocks at each.
        convs: 3x3 convolutions in each block.
        block: "residual", or "tae" for TAESD's, which end in a ReLU.
    """

    _no_split_modules: ClassVar = ["ResidualBlock", "TAEBlock"]
    _repeated_blocks: ClassVar = ["ResidualBlock", "TAEBlock"]

    @register_to_config
    def __init__(
        self,
        widths: Sequence[int] = (192, 96, 48),
        blocks: Sequence[int] = (8, 3, 2),
        convs: int = 2,
        block: str = "residual",
        latent_space: str = "sdxl",
        latent_channels: int | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        encoder: str = "embedded",
        block_out_channels: Sequence[int] | None = None,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        self._set_up(SubpixelNetwork(_channels(latent_space, latent_channels), widths, blocks, convs, block))


class SubpixelTemporalDecoder(FastDecoder):
    """Subpixel for clips, for SVD: some low-resolution blocks also see the frame before, and nothing sees the frames after (issue 13).

    A `decode(z, num_frames=n)` call is one clip, or several, each with nothing before it. `decode_stream` gives frames as latents come,
    equal to the whole clip's. Frames are mixed within one `decode` call only, so SVD's `decode_chunk_size` changes the picture: leave
    it at its default, all frames, which takes no more memory.

    Args:
        widths, blocks, convs, block: as for `SubpixelDecoder`.
        memory: how many of each stage's blocks, from its end, see the frame before.
    """

    _no_split_modules: ClassVar = [*SubpixelDecoder._no_split_modules, "MemoryResidualBlock", "MemoryTAEBlock"]
    _repeated_blocks: ClassVar = _no_split_modules

    @register_to_config
    def __init__(
        self,
        widths: Sequence[int] = (128, 64, 48),
        blocks: Sequence[int] = (4, 3, 2),
        convs: int = 3,
        block: str = "tae",
        memory: Sequence[int] = (2, 2, 1),
        latent_space: str = "sd",
        latent_channels: int | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        encoder: str = "embedded",
        block_out_channels: Sequence[int] | None = None,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        self._set_up(SubpixelTemporalNetwork(_channels(latent_space, latent_channels), widths, blocks, convs, block, memory))


class TAEDecoder(FastDecoder):
    """TAESD's layer list: of width 192 it is the paper's TAE-192 (FACTS 2), of 64 TAESD and TAESDXL.

    Tensor names are those of `AutoencoderTiny`'s decoder; at one width `fld convert` turns one into the other.

    Args:
        width: channels of every stage, or four numbers, one for each: (192, 192, 64, 64) has a fifth of TAE-192's work.
        blocks: residual blocks at 1/8, 1/4, 1/2 and full resolution.
        upsampling: "nearest" or "bilinear".
    """

    _no_split_modules: ClassVar = ["TAEBlock"]
    _repeated_blocks: ClassVar = ["TAEBlock"]

    @register_to_config
    def __init__(
        self,
        width: int | Sequence[int] = 192,
        blocks: Sequence[int] = (3, 3, 3, 1),
        upsampling: str = "nearest",
        latent_space: str = "sdxl",
        latent_channels: int | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        encoder: str = "embedded",
        block_out_channels: Sequence[int] | None = None,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        self._set_up(TAENetwork(_channels(latent_space, latent_channels), width, blocks, upsampling))


class TAETemporalDecoder(FastDecoder):
    """TAE-Temporal: a TAE with one spatio-temporal mid block (FACTS 4), for SVD.

    Frames are mixed within one `decode` call only, so SVD's `decode_chunk_size` changes the picture: leave it at its default,
    all frames. Attention sees the whole frame, so tiles are blended, not exact. The first decode of a clip says so once.

    Args:
        width: channels of every stage, or four numbers, as for `TAEDecoder`; the mid block's is a multiple of 32.
        blocks: residual blocks at 1/8, 1/4, 1/2 and full resolution.
        upsampling: "nearest" or "bilinear".
        mid_block: "upsampled" (after the first upsampling) or "latent" (at latent resolution, a sixteenth of the attention).
        paper_exact: the published shape, whatever `blocks`, `upsampling` and `mid_block` say: (3, 2, 2, 1), bilinear, upsampled;
            10,897,541 parameters at width 192.
    """

    _no_split_modules: ClassVar = ["TAEBlock", "TemporalMidBlock"]
    _repeated_blocks: ClassVar = ["TAEBlock"]

    @register_to_config
    def __init__(
        self,
        width: int | Sequence[int] = 192,
        blocks: Sequence[int] = (3, 3, 3, 1),
        upsampling: str = "nearest",
        mid_block: str = "upsampled",
        paper_exact: bool = False,
        latent_space: str = "sd",
        latent_channels: int | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        encoder: str = "embedded",
        block_out_channels: Sequence[int] | None = None,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        if paper_exact:
            blocks, upsampling, mid_block = (3, 2, 2, 1), "bilinear", "upsampled"
        channels = _channels(latent_space, latent_channels)
        self._set_up(TAETemporalNetwork(channels, width, blocks, upsampling, mid_block))


class EfficientViTDecoder(FastDecoder):
    """The paper's second family, with the EfficientViT blocks that its code lacks (FACTS 3).

    Attention sees the whole picture, so tiles are blended, not exact.

    Args:
        widths: channels at 1/8 (EfficientViT blocks), 1/4 and 1/2 (residual blocks).
        attention_blocks: EfficientViT blocks at 1/8.
        residual_blocks: residual blocks at 1/4 and 1/2, or three numbers: at 1/8 too, in front of the EfficientViT blocks.
        convs, block: of the residual blocks, as for `SubpixelDecoder`.
        published: the shape that was published, whatever the other arguments say: 15 residual blocks, no attention,
            6,223,500 parameters.
    """

    _no_split_modules: ClassVar = ["EfficientViTBlock", *SubpixelDecoder._no_split_modules, "BatchNormBlock"]
    _repeated_blocks: ClassVar = ["EfficientViTBlock", "BatchNormBlock"]

    @register_to_config
    def __init__(
        self,
        widths: Sequence[int] = (256, 128, 64),
        attention_blocks: int = 9,
        residual_blocks: Sequence[int] = (2, 1),
        convs: int = 2,
        block: str = "residual",
        published: bool = False,
        latent_space: str = "sdxl",
        latent_channels: int | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        encoder: str = "embedded",
        block_out_channels: Sequence[int] | None = None,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        channels = _channels(latent_space, latent_channels)
        if published:
            self._set_up(PublishedEfficientViTNetwork(channels))
        else:
            self._set_up(EfficientViTNetwork(channels, widths, attention_blocks, residual_blocks, convs, block))
