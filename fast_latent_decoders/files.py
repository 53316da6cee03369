"""Latents in files.

Conventions: tensors are (N, C, h, w), float32. *VAE units* are what a pipeline hands to a VAE's decode; *scaled* latents,
``(z - shift) * scaling_factor``, are what a diffusion model works on and have a spread of about one.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .atomic import FileError, reason, replacing
from .latent_space import LatentSpace

Units = Literal["vae", "scaled"]

NAMES = ("latents", "latent", "samples", "latent_tensor")  # a file with several tensors is read by these, in this order
COMFY_SCALE = 1 / 0.18215  # ComfyUI's files from before it wrote latent_format_version_0 hold SD's scaled latents
TYPICAL_RMS = 0.85  # of scaled latents; real ones lie between 0.46 (a dull lilac) and 2.33 (pure yellow)


@dataclass(frozen=True)
class Latents:
    """The latents of one file: (N, C, h, w) float32, finite; `units`, `latent_space` and `fps` are None where the file is silent."""

    tensor: Tensor
    units: Units | None = None
    latent_space: str | None = None
    fps: float | None = None  # frames a second, of a clip

    def in_vae_units(self, space: LatentSpace, *, scaled: bool = False) -> Tensor:
        """(N, C, h, w) in VAE units; `scaled` says what they are when the file does not."""
        if self.units == "scaled" or (self.units is None and scaled):
            return self.tensor / space.scaling_factor + space.shift_factor
        return self.tensor

    def doubt(self, space: LatentSpace, *, scaled: bool = False) -> str | None:
        """A warning when the file does not tell its units and its spread fits the other ones better than those assumed."""
        if self.units is not None:
            return None
        # About zero, not about the mean: a picture of one colour has hardly any spread, but its channels lie off zero. The border
        # is the geometric middle; it is right for all of 6,181 flat colours of either space, in scaled and in VAE units.
        rms = self.tensor.square().mean().sqrt().item()
        if (rms < TYPICAL_RMS / math.sqrt(space.scaling_factor)) == scaled or rms == 0:
            return None
        assumed, other, cure = ("scaled", "VAE", "without") if scaled else ("VAE", "scaled", "with")
        return f"its spread (rms {rms:.2f}) fits {other} units better than the {assumed} units assumed; try {cure} --scaled"


def read_latents(path: str | Path) -> Latents:
    """Read .safetensors, ComfyUI's .latent, .npy, .npz, .pt or .pth; one latent (C, h, w) or several (N, C, h, w).

    Metadata `latent_space` and `units` ("vae" or "scaled") is obeyed: the header of a safetensors file, strings beside the
    tensor in .npz and .pt. Pickled objects are never run.

    Raises:
        FileError: the file is no latent file, or broken, empty, ambiguous, of a wrong shape or not finite.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise FileError(f"{path} is not a latent file: expected {', '.join(READERS)}, got {path.suffix or 'no suffix'}")
    try:
        if path.stat().st_size == 0:
            raise FileError(f"{path} is empty (0 bytes); write it again")
        path.open("rb").close()  # from here on an OSError is the contents' fault
    except OSError as error:
        raise FileError(f"{path} cannot be read: {reason(error)}") from error
    try:
        tensor, metadata, name = reader(path)
    except FileError:
        raise
    except Exception as error:  # what the libraries raise on broken bytes is theirs to choose: a dozen types were met
        raise FileError(
            f"{path} is not a whole {path.suffix} file of plain tensors ({reason(error)[:160]}); write or download it again"
        ) from error
    latents = _checked(path, tensor)
    if name == "latent_tensor":
        return Latents(latents if "latent_format_version_0" in metadata else latents * COMFY_SCALE, "vae")
    units, space = metadata.get("units"), metadata.get("latent_space")
    if units not in (None, "vae", "scaled"):
        raise FileError(f"{path} says its units are {units!r}; expected 'vae' or 'scaled'")
    fps = str(metadata.get("fps", ""))
    return Latents(latents, units, space, float(fps) if re.fullmatch(r"\d+(\.\d+)?", fps) else None)


def write_latents(path: str | Path, z: Tensor, latent_space: str, units: Units = "vae", fps: float | None = None, *, force: bool = False) -> None:
    """Write latents (C, h, w) or (N, C, h, w) as .safetensors, float32, with `latent_space`, `units` and of a clip `fps` as metadata.

    Raises:
        FileError: `path` exists and `force` is not given, has another suffix, or cannot be written; `z` is not finite latents.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise FileError(f"{path} cannot hold latents with their units: expected the suffix .safetensors")
    if units not in ("vae", "scaled"):
        raise ValueError(f"expected units 'vae' or 'scaled', got {units!r}")
    _checked(path, z)
    tensors = {"latents": z.detach().float().cpu().contiguous()}
    with replacing(path, force=force) as temporary:
        temporary.write_bytes(save(tensors, {"latent_space": latent_space, "units": units} | ({"fps": f"{fps:g}"} if fps else {})))


def _checked(path: Path, tensor: Tensor) -> Tensor:
    """The tensor as (N, C, h, w) float32, or a sentence about what is wrong with it."""
    if not tensor.is_floating_point():
        raise FileError(f"{path} holds {str(tensor.dtype).removeprefix('torch.')} values; latents are floating-point numbers")
    if tensor.ndim not in (3, 4) or 0 in tensor.shape:
        hint = "; save a clip's frames as (frames, C, h, w)" if tensor.ndim == 5 else ""
        raise FileError(f"{path} has shape {tuple(tensor.shape)}: expected latents (C, h, w) or (N, C, h, w){hint}")
    tensor = tensor.detach().to("cpu", torch.float32)
    broken = tensor.numel() - int(torch.isfinite(tensor).sum())
    if broken:
        raise FileError(f"{path} has {broken} of {tensor.numel()} values that are NaN or infinite; make these latents again")
    return tensor[None] if tensor.ndim == 3 else tensor


def _pick(path: Path, names: Iterable[str]) -> str:
    """Which tensor of a file is the latents: the only one, or the first of NAMES."""
    names = list(names)
    if len(names) == 1:
        return names[0]
    for name in NAMES:
        if name in names:
            return name
    if not names:
        raise FileError(f"{path} holds no tensor; expected latents")
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise FileError(f"{path} holds {len(names)} tensors ({some}); expected one, or one named {', '.join(NAMES[:3])}")


Read = tuple[Tensor, Mapping[str, Any], str]  # the tensor, the metadata, the tensor's name


def _read_safetensors(path: Path) -> Read:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        metadata = dict(file.metadata() or {})
        if "latent_format_version_0" in names:
            metadata["latent_format_version_0"] = ""
        name = _pick(path, [name for name in names if name != "latent_format_version_0"])
        return file.get_tensor(name), metadata, name


def _read_numpy(path: Path) -> Read:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return _from_numpy(path, loaded), {}, "latents"
    with loaded:
        arrays = {name: loaded[name] for name in loaded.files}
    metadata = {name: str(array) for name, array in arrays.items() if array.dtype.kind == "U" and array.ndim == 0}
    name = _pick(path, [name for name, array in arrays.items() if array.dtype.kind in "fiub" and array.ndim > 0])
    return _from_numpy(path, arrays[name]), metadata, name


def _from_numpy(path: Path, array: np.ndarray) -> Tensor:
    if array.dtype.kind != "f":
        raise FileError(f"{path} holds {array.dtype} values; latents are floating-point numbers")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is reported as such
        return torch.from_numpy(array.astype(np.float32, order="C"))  # astype also settles byte order and strides


def _read_torch(path: Path) -> Read:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, Tensor):
        return loaded, {}, "latents"
    if not isinstance(loaded, Mapping):
        raise FileError(f"{path} holds a {type(loaded).__name__}; expected a tensor, or a dict with a tensor named latents")
    name = _pick(path, [key for key, value in loaded.items() if isinstance(value, Tensor) and value.ndim > 0])
    return loaded[name], {key: value for key, value in loaded.items() if isinstance(value, str)}, name


READERS: dict[str, Callable[[Path], Read]] = {
    ".safetensors": _read_safetensors,
    ".latent": _read_safetensors,
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".pt": _read_torch,
    ".pth": _read_torch,
}
