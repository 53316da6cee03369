"""FastDecoder: a decoder that diffusers pipelines accept as their VAE (socket A), or inside it (socket B)."""

import os
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from . import presets
from .encoder import Encoding
from .engines import OpenVINOEngine, engine_or, keep_memory
from .latent_space import LatentSpace, latent_space
from .networks.blocks import BlockNetwork, State, frames_of
from .socket import DecoderSocket, plug
from .tiling import SPATIAL_FACTOR, decode_tiled

ENCODERS = ("embedded", "external", "none")


class FastDecoder(Encoding, ModelMixin, AutoencoderMixin, ConfigMixin):
    """The diffusers model that all families extend.

    Conventions:
        latents (N, C, h, w) in VAE units (what a pipeline hands to `vae.decode`), scaled inside;
        pictures (N, 3, 8h, 8w), nominally in [-1, 1], not clamped;
        dtype and device are the module's: latents are cast.
    """

    _supports_gradient_checkpointing = True
    _group_offload_block_modules: ClassVar = ["decoder"]
    families: ClassVar[dict[str, type["FastDecoder"]]] = {}
    config: Any  # diffusers says dict; it is a dict whose entries are attributes too
    decoder: BlockNetwork

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        FastDecoder.families[cls.__name__] = cls
        # What a saved pipeline's model_index.json names must outlive our file names (CONTRACT 6.1).
        if cls.__module__.startswith("fast_latent_decoders."):
            cls.__module__ = "fast_latent_decoders"

    def _set_up(self, network: BlockNetwork) -> None:
        """The end of every family's __init__: keeps the network, checks and completes the configuration.

        Raises:
            ValueError: `force_upcast=True`, an unknown `encoder`, a latent space that contradicts itself, or
                `block_out_channels` of another length than 4.
        """
        config = self.config
        if config.force_upcast:
            raise ValueError("force_upcast must be False: fast decoders are finite in float16, upcasting would only slow them down")
        if config.encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {config.encoder!r}")
        self.latent_space: LatentSpace = latent_space(
            config.latent_space, config.latent_channels, config.scaling_factor, config.shift_factor
        )
        # Pipelines read a spatial factor of 2 ** (length - 1) = 8 from this field and nothing else (CONTRACT 2.1, 2.8).
        channels = tuple(config.block_out_channels or (64,) * 4)
        if len(channels) != 4:
            raise ValueError(f"block_out_channels must have 4 entries, so that pipelines find a spatial factor of 8, got {channels}")
        self.register_to_config(
            block_out_channels=channels,
            latent_channels=self.latent_space.channels,
            scaling_factor=self.latent_space.scaling_factor,
            # diffusers takes arguments given by position for defaults, and `from_config`, so `inside`, would drop them.
            _use_default_values=[],
        )
        self.decoder = network
        self.use_slicing = False
        self.use_tiling = False
        self.tile_size = 128
        self._engine: OpenVINOEngine | None = None

    # ---------------------------------------------------------------- decode

    @apply_forward_hook  # without it model offload would not see this call (CONTRACT 7.3)
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        num_frames: int | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents to pictures.

        Args:
            z: (N, C, h, w) in VAE units, any floating dtype and device.
            return_dict: False gives a tuple of one tensor.
            generator: accepted because SD pipelines pass one; nothing is random here.
            num_frames: frames of each clip in the batch, for families that mix frames; None: N independent pictures.

        Returns:
            `sample` (N, 3, 8h, 8w), nominally in [-1, 1], not clamped, in the module's dtype.

        Raises:
            ValueError: z is not (N, C, h, w) with this decoder's number of channels, or not floating point.
        """
        return self._output(z, return_dict, num_frames)

    def forward(self, z: Tensor, return_dict: bool = True, num_frames: int | None = None) -> DecoderOutput | tuple[Tensor]:
        """`decode` in diffusers' model convention. SVD looks for `num_frames` in this signature (CONTRACT 3.3)."""
        return self._output(z, return_dict, num_frames)

    def _output(self, z: Tensor, return_dict: bool, num_frames: int | None) -> DecoderOutput | tuple[Tensor]:
        scaled = self._scaled(z)
        step = max(1, num_frames or 1) if self.use_slicing else len(scaled)
        parts = [self._decode(part, num_frames) for part in scaled.split(step)] if step < len(scaled) else [self._decode(scaled, num_frames)]
        sample = torch.cat(parts) if len(parts) > 1 else parts[0]
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _scaled(self, z: Tensor) -> Tensor:
        """Latents in VAE units to the scaled ones of the network's device and dtype. Raises ValueError as `decode`."""
        channels = self.config.latent_channels
        if z.ndim != 4 or z.shape[1] != channels or not z.is_floating_point():
            raise ValueError(
                f"expected floating-point latents (N, {channels}, h, w) of the {self.latent_space.name!r} latent space, "
                f"got {z.dtype} of shape {tuple(z.shape)}"
            )
        if self.device.type != "meta":  # under sequential offload the hooks move what they need (CONTRACT 7.6)
            z = z.to(self.device)
        space = self.latent_space
        return ((z.float() - space.shift_factor) * space.scaling_factor).to(self.dtype)

    def _decode(self, scaled: Tensor, num_frames: int | None) -> Tensor:
        network = engine_or(self.decoder, self._engine, scaled)
        if self.use_tiling:
            return decode_tiled(network, scaled, num_frames, self.tile_size)
        return network(scaled, num_frames)

    @apply_forward_hook
    @torch.no_grad()
    def decode_stream(self, latents: Tensor | Iterable[Tensor], state: State | None = None) -> Iterator[tuple[Tensor, State]]:
        """The frames of a clip one after the other, equal to those of the whole clip's `decode`, in the memory of a frame.

            for frame, state in decoder.decode_stream(latents):
                ...  # decode_stream(more_latents, state) goes on where this one ended

        Nothing is kept between calls but what the caller keeps: `state` is small, and any of those given out can be gone on from.
        Without gradients. Frames that are mixed are decoded by torch and whole, tiling or not.

        Args:
            latents: in VAE units, of one clip (frames, C, h, w) or of several (clips, frames, C, h, w); or an iterable of either, in order.
            state: of the frame before the first one; None: there is none.

        Yields:
            The frame (clips, 3, 8h, 8w), nominally in [-1, 1], not clamped, in the module's dtype; and the state after it.

        Raises:
            TypeError: the family mixes frames in a way that needs the whole clip.
            ValueError: latents of another shape, or a state of other clips.
        """
        for frame in frames_of(latents):
            scaled = self._scaled(frame)
            sample, state = self.decoder.stream(scaled, 1, state) if self.decoder.mixes_frames else (self._decode(scaled, None), [])
            yield sample, state

    def decode_bytes(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Latents to pictures that are ready to be saved: what diffusers' image processor makes of `decode`, computed on the device.

        Args:
            z, num_frames: as for `decode`.

        Returns:
            (N, 8h, 8w, 3) uint8 on the decoder's device: a quarter of float32's bytes to copy. ``Image.fromarray(x.cpu().numpy())``.
        """
        sample = self.decode(z, return_dict=False, num_frames=num_frames)[0]
        return (sample * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().mul(255).round().to(torch.uint8)

    def optimize(self, backend: Literal["torch", "compile", "openvino"] = "torch", dtype: torch.dtype | None = None) -> Self:
        """Make decoding fast on the device that this decoder is on. Returns self; pictures stay the same within `dtype`'s rounding.

        Args:
            backend: "torch": channels_last, and the number format that a self-test of a second finds fastest; on a Linux CPU the process
                then keeps the memory that it frees (`engines.keep_memory`). "compile": torch.compile besides, which a first decode of
                each size pays for; on a GPU with CUDA graphs. "openvino": OpenVINO, on a CPU, of the weights as they are now; sockets
                made from now on have it too, another device or training goes back to torch.
            dtype: computes in this one instead.

        Raises:
            ImportError: OpenVINO is missing; the message names the extra.
            ValueError: no number format works here; the backend cannot do this family, device or dtype; an unknown backend.
        """
        if backend not in ("torch", "compile", "openvino"):
            raise ValueError(f"expected the backend torch, compile or openvino, got {backend!r}")
        if backend == "openvino":
            if self.device.type != "cpu":
                raise ValueError(f"the backend openvino is for CPUs, and this decoder is on {self.device}; use the backend compile there")
            self._engine = OpenVINOEngine(self.decoder, self.config.latent_channels, dtype)
            return self
        from .evaluation.check import fastest_dtype  # it measures decoders, so it stands above this module

        self._engine = None
        if self.device.type == "cpu":
            keep_memory()
        dtype = dtype or fastest_dtype(self, self.device.type)
        module: Any = self
        nn.Module.to(module, dtype).to(memory_format=torch.channels_last)  # ModelMixin's `to(dtype)` logs a warning about nothing (CONTRACT 7.11)
        if backend == "compile":
            self.decoder.compile(mode="reduce-overhead" if self.device.type == "cuda" else None)
        return self

    def enable_tiling(self, tile_size: int = 128) -> None:
        """Decode about `tile_size` x `tile_size` latents at a time (8 times as many pixels a side): in strips, else in tiles.

        Exact for families with a finite receptive field. Strips need the memory of one strip and no more arithmetic than the whole.
        """
        if tile_size < 1:
            raise ValueError(f"tile_size must be at least 1 latent, got {tile_size}")
        self.tile_size = tile_size
        super().enable_tiling()

    # ---------------------------------------------------------------- socket B

    def inside(self, vae: nn.Module) -> DecoderSocket:
        """This decoder as a replacement for `vae.decoder`: ``vae.decoder = fast.inside(vae)``.

        The socket takes the VAE's device and dtype; where they are the decoder's own, weights are shared, not copied.
        From then on the VAE refuses to be saved while the socket is in it, and its tiles are exact (CONTRACT 4.6, 4.7).

        Raises:
            TypeError: `vae` is not a VAE with a decoder that can be replaced.
            ValueError: it has another latent space, or a `post_quant_conv` that cannot be inverted.
        """
        if isinstance(vae, FastDecoder) or not hasattr(vae, "decoder") or not hasattr(vae, "config"):
            raise TypeError(
                f"expected a diffusers VAE whose decoder can be replaced (AutoencoderKL, AutoencoderKLTemporalDecoder), "
                f"got {type(vae).__name__}; to replace the whole VAE, assign pipe.vae"
            )
        presets.check_space(vae, self.latent_space)
        if next(self.decoder.parameters()).device.type == "meta":
            raise ValueError("this decoder's weights are offloaded; load it again with from_pretrained and use that one")
        # A network of its own over the same tensors: `.to` on the VAE then leaves this decoder as it is.
        with torch.device("meta"):
            network = type(self).from_config(self.config).decoder
        network.load_state_dict(self.decoder.state_dict(), assign=True)
        network.train(self.decoder.training)
        return plug(DecoderSocket(network, self.latent_space, vae, type(self).__name__, self._engine), vae)

    # ---------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], encoder: nn.Module | None = None, **kwargs: Any) -> Self:
        """Load a preset by name, a folder, or a Hub id; called on `FastDecoder`, returns the class that the config names.

        Args:
            pretrained_model_name_or_path: a name of `presets()`; else a folder or Hub id, as in diffusers.
            encoder: a VAE of the same latent space that does the encoding.
            **kwargs: as for any diffusers model (`torch_dtype`, `variant`, `subfolder`, `revision`, ...).

        Raises:
            ValueError: another class than the one called, or a checkpoint with missing or surplus tensors.
            OSError: nothing to load there; for an unknown preset the message names the nearest ones.
        """
        path = presets.locate(str(pretrained_model_name_or_path))
        keys = ("subfolder", "revision", "token", "cache_dir", "force_download", "proxies", "local_files_only")
        config: Any = cls.load_config(path, **{key: kwargs[key] for key in keys if key in kwargs})
        name = config.get("_class_name")
        family = FastDecoder.families.get(name)
        if family is None or not issubclass(family, cls):
            known = ", ".join(c for c, k in FastDecoder.families.items() if issubclass(k, cls))
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {name}, expected {known}"
                + ("; convert it first: fld convert" if name == "AutoencoderTiny" else "")
            )
        wants_info = kwargs.pop("output_loading_info", False)
        model: Any
        model, info = super(FastDecoder, family).from_pretrained(path, output_loading_info=True, **kwargs)
        # diffusers only logs these, and leaves what is missing on the meta device (CONTRACT 6.11).
        wrong = {what: sorted(info[f"{what}_keys"]) for what in ("missing", "unexpected") if info[f"{what}_keys"]}
        if wrong:
            told = "; ".join(f"{len(keys)} {what} tensors ({', '.join(keys[:3])} ...)" for what, keys in wrong.items())
            raise ValueError(f"the weights in {pretrained_model_name_or_path} do not fit its {name} config: {told}")
        if encoder is not None:
            model.with_encoder(encoder)
        return (model, info) if wants_info else model  # type: ignore[return-value]  # a pair only where diffusers asks for one


FastDecoder.__module__ = "fast_latent_decoders"
assert SPATIAL_FACTOR == 8
