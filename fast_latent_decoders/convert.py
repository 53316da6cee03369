"""TAESD and AutoencoderTiny checkpoints to TAEDecoder, and back. Tensors are renamed, never changed."""

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .atomic import FileError, reason
from .networks.tae import TAENetwork, stage_widths

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

    from . import TAEDecoder

logger = logging.getLogger(__name__)

PREFIX = "decoder.layers."
BLOCKS = (3, 3, 3, 1)  # TAESD's, and the paper's TAE-192's (FACTS 2.2)
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")


def from_taesd(path: str | Path, *, latent_space: str = "sdxl") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the state dict (float32) of a `TAEDecoder` with the weights of a tiny autoencoder's decoder.

    Two layouts are told apart by their tensor names: TAESD's own decoder file ("1.weight" to "19.bias"), and diffusers'
    `AutoencoderTiny` ("decoder.layers.*"; a file, or a folder whose config.json is obeyed). The latter's encoder is dropped,
    and a log line says so. Width and latent channels come from the shapes.

    Raises:
        FileError: the file cannot be read.
        ValueError: neither layout, or a tensor is missing, surplus or of another shape; the message names it.
    """
    path = Path(path)
    tensors, config = _read(path)
    if any(name.startswith(PREFIX) for name in tensors):
        encoder = [name for name in tensors if name.startswith("encoder.")]
        if encoder:
            logger.warning("%s: dropped the %d tensors of its encoder (encoder.*)", path, len(encoder))
        state = {name: tensor for name, tensor in tensors.items() if not name.startswith("encoder.")}
    elif "0.weight" in tensors:
        raise ValueError(f"{path} is TAESD's encoder (its tensor names begin at 0); expected the decoder (1 to 19)")
    elif "1.weight" in tensors:
        # TAESD's first layer is the clamp, which has no tensors; ours begins after it.
        state = {re.sub(r"^\d+", lambda m: f"{PREFIX}{int(m[0]) - 1}", name): tensor for name, tensor in tensors.items()}
    else:
        some = ", ".join(list(tensors)[:3]) or "none"
        raise ValueError(f"{path} is no tiny decoder: expected tensors named 1.weight ... or decoder.layers.*, got {some}")
    blocks = tuple(config.get("num_decoder_blocks", BLOCKS))
    width, channels = _width_and_channels(path, state)
    upsampling = config.get("upsample_fn", "nearest")
    with torch.device("meta"):
        network = TAENetwork(channels, width, blocks, upsampling)
    _check(path, state, network)
    made = {"width": width, "blocks": list(blocks), "latent_channels": channels, "latent_space": latent_space}
    if upsampling != "nearest":
        made["upsampling"] = upsampling
    return made, {name: tensor.float().contiguous() for name, tensor in state.items()}


def to_taesd(decoder: "TAEDecoder") -> dict[str, Tensor]:
    """The state dict of TAESD's own decoder layout, "1.weight" and so on, as its users' loaders expect.

    Raises:
        ValueError: block counts or upsampling are not TAESD's, as such loaders build the network without asking; or more than
            one width, which they cannot.
    """
    config = decoder.config
    _one_width(decoder)
    blocks, upsampling = tuple(config["blocks"]), config.get("upsampling", "nearest")
    if blocks != BLOCKS or upsampling != "nearest":
        raise ValueError(
            f"TAESD's layout means blocks {BLOCKS} and nearest upsampling, this decoder has {blocks} and {upsampling}; "
            "convert it to autoencoder-tiny, which has a configuration"
        )
    state = decoder.decoder.layers.state_dict()
    return {
        re.sub(r"^\d+", lambda m: str(int(m[0]) + 1), name): tensor.detach().cpu().contiguous() for name, tensor in state.items()
    }


def to_autoencoder_tiny(decoder: "TAEDecoder", *, encoder: nn.Module | None = None) -> "AutoencoderTiny":
    """The decoder as diffusers' own `AutoencoderTiny`, which loads where this package is not installed.

    It takes and gives *scaled* latents (its `scaling_factor` is 1.0). Its encoder is `encoder`, a diffusers `EncoderTiny` of
    the standard shape, or else the tiny encoder of the same latent space that comes with this package.

    Raises:
        ValueError: the decoder has more than one width; an `AutoencoderTiny` has one (FACTS 2.4).
        RuntimeError: no tiny encoder exists for this latent space and none is given.
    """
    from diffusers import AutoencoderTiny

    from .encoder import load_tiny_encoder

    width = _one_width(decoder)
    encoder = encoder or load_tiny_encoder(decoder.latent_space)
    config = decoder.config
    tiny: Any = AutoencoderTiny(  # diffusers hides its modules from type checkers
        decoder_block_out_channels=(width,) * 4,
        num_decoder_blocks=tuple(config["blocks"]),
        latent_channels=config["latent_channels"],
        upsample_fn=config.get("upsampling", "nearest"),
    )
    tiny.encoder.load_state_dict({name: tensor.float() for name, tensor in encoder.state_dict().items()})
    tiny.decoder.load_state_dict(decoder.decoder.state_dict())
    return nn.Module.to(tiny, decoder.dtype).eval()  # ModelMixin's own logs a warning about nothing (CONTRACT 7.11)


def _one_width(decoder: "TAEDecoder") -> int:
    widths = stage_widths(decoder.config["width"])
    if len(set(widths)) > 1:
        raise ValueError(f"expected one width in all stages, as tiny autoencoders have; this decoder has {widths}, which only this package loads")
    return widths[0]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint, and the configuration if it is a folder."""
    config: dict[str, Any] = {}
    try:
        if path.is_dir():
            config = json.loads((path / "config.json").read_text())
            if config.get("_class_name") != "AutoencoderTiny":
                raise ValueError(f"{path} is of class {config.get('_class_name')}; expected an AutoencoderTiny or a TAESD file")
            _check_config(path, config)
            path = next((path / name for name in WEIGHTS if (path / name).exists()), path / WEIGHTS[0])
        if path.stat().st_size == 0:
            raise FileError(f"{path} is empty (0 bytes); download it again")
        if path.suffix == ".safetensors":
            return load_file(path), config
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be read: {reason(error)}") from error
    except Exception as error:  # what the libraries raise on broken bytes is theirs to choose
        said = f"{path} is not a whole checkpoint of plain tensors ({reason(error)[:160]}); download it again"
        raise FileError(said) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise FileError(f"{path} holds a {type(loaded).__name__}; expected a state dict of tensors")
    return loaded, config


def _check_config(path: Path, config: dict[str, Any]) -> None:
    widths = set(config.get("decoder_block_out_channels", (64,)))
    wanted = {"act_fn": "relu", "upsampling_scaling_factor": 2, "out_channels": 3}
    wrong = [f"{key} {config[key]!r}" for key, value in wanted.items() if config.get(key, value) != value]
    if len(widths) > 1:
        wrong.append(f"widths {config['decoder_block_out_channels']}")
    if wrong:
        raise ValueError(f"{path} has {', '.join(wrong)}; TAEDecoder has one width, relu, and twice the size at each step")


def _width_and_channels(path: Path, state: dict[str, Tensor]) -> tuple[int, int]:
    name = PREFIX + "0.weight"
    if name not in state:
        raise ValueError(f"{path} lacks the tensor {name}")
    shape = state[name].shape
    if len(shape) != 4:
        raise ValueError(f"{path}: expected {name} of shape (width, latent channels, 3, 3), got {tuple(shape)}")
    return shape[0], shape[1]


def _check(path: Path, state: dict[str, Tensor], network: nn.Module) -> None:
    expected = {f"decoder.{name}": tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or surplus:
        said = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("has the surplus", surplus)) if names]
        raise ValueError(f"{path} {' and '.join(said)}; nothing was converted")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(f"{path}: expected {name} of shape {shape}, got {tuple(state[name].shape)}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return f"tensor{'s' * (len(names) > 1)} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
