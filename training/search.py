"""The search for Subpixel's shape: variants at equal training time, and what each costs (issue 12; figures in RESULTS.md).

    python training/search.py --minutes 15 [--scale 0.5] [NAME ...]

trains each variant from random weights, for as many steps as its network goes forward and back in so many minutes of this machine,
by the settings of configs/laptop/search.yaml, into training/runs/search-NAME, and prints quality beside the times of a decode.
`--scale` trains them at that share of their widths, where the hours are short; times are those of the full widths in any case.
What is finished is not trained again. Steps are counted before the first one is trained: the machine should be idle then.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from fold import branch
from running import mixed_precision
from torch import Tensor, nn

from fast_latent_decoders import FastDecoder
from fast_latent_decoders.engines import keep_memory
from fast_latent_decoders.evaluation.timing import measure
from fast_latent_decoders.networks import subpixel
from fast_latent_decoders.networks.blocks import BlockNetwork, Residual, ResidualBlock, zero_init
from fast_latent_decoders.networks.efficientvit import EfficientViTBlock
from fast_latent_decoders.presets import Preset

CONFIG = Path(__file__).parent / "configs" / "laptop" / "search.yaml"

# Name -> what differs from 128/64/64 channels with 4/3/1 TAE blocks of three convolutions, which is as fast as subpixel-sdxl was asked to be;
# all cost about as much, 79 to 98 K MAC/px.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "base-again": {"train": ["seed=1"]},  # how much is chance
    "ships": {"stages": [[128, 4], [64, 3], [48, 2]]},
    "wide": {"stages": [[192, 2], [64, 3], [64, 1]]},
    "deep": {"stages": [[96, 7], [64, 3], [64, 1]]},
    "quarter": {"stages": [[96, 4], [96, 2], [64, 1]]},  # more at 1/4
    "half": {"stages": [[96, 3], [64, 2], [64, 2]]},  # more at 1/2
    "thin-half": {"stages": [[128, 4], [64, 4], [32, 3]]},
    "no-half": {"stages": [[128, 5], [96, 3]], "factors": [2, 4]},  # from 1/4 to the picture in one step
    "two-convs": {"stages": [[128, 6], [64, 5], [64, 1]], "convs": 2},
    "up-1x1": {"up_kernel": 1},
    "residual": {"block": "residual"},  # no ReLU behind the sum, and a new block is the identity
    "silu": {"block": "silu"},
    "gelu": {"block": "gelu"},
    "depthwise": {"block": "depthwise", "stages": [[160, 8], [96, 4], [64, 2]]},
    "attention": {"stages": [[128, 3], [64, 3], [64, 1]], "attention": 2},
    "branches": {"train": ["branches=true"]},  # re-parameterised
}


def arguments_of(name: str, scale: float = 1.0) -> dict[str, Any]:
    """A variant's arguments of VariantDecoder, its widths times `scale`."""
    found = {"stages": [[128, 4], [64, 3], [64, 1]], **VARIANTS[name]}
    found.pop("train", None)
    return {**found, "stages": [[round(width * scale), count] for width, count in found["stages"]]}


class ActivatedBlock(ResidualBlock):
    """ResidualBlock with another activation."""

    def __init__(self, width: int, convs: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__(width, convs)
        self.conv = nn.Sequential(*(activation() if isinstance(layer, nn.ReLU) else layer for layer in self.conv))


class DepthwiseBlock(Residual):
    """x + 1x1(gelu(1x1(7x7 depthwise(x)))), four times as wide inside, without normalisation (after ConvNeXt, Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        spread = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.conv = nn.Sequential(spread, nn.Conv2d(width, 4 * width, 1), nn.GELU(), zero_init(nn.Conv2d(4 * width, width, 1)))


BLOCKS: dict[str, Callable[[int, int], nn.Module]] = {
    **subpixel.BLOCKS,
    "silu": lambda width, convs: ActivatedBlock(width, convs, nn.SiLU),
    "gelu": lambda width, convs: ActivatedBlock(width, convs, nn.GELU),
    "depthwise": lambda width, convs: DepthwiseBlock(width),
}


class Up(nn.Sequential):
    """`factor` times the resolution; the sub-pixel kernels of a channel start equal."""

    def __init__(self, before: int, after: int, factor: int, kernel: int) -> None:
        conv = nn.Conv2d(before, factor**2 * after, kernel, padding=kernel // 2)
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter.copy_(parameter[:: factor**2].repeat_interleave(factor**2, dim=0))
        super().__init__(conv, nn.PixelShuffle(factor))


class VariantDecoder(FastDecoder):
    """Stages of [width, blocks], a factor of upsampling behind each."""

    @register_to_config
    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        factors: Sequence[int] = (2, 2, 2),
        convs: int = 3,
        block: str = "tae",
        attention: int = 0,
        up_kernel: int = 3,
        latent_space: str = "sdxl",
        latent_channels: int | None = 4,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        encoder: str = "embedded",
        block_out_channels: Sequence[int] | None = None,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(latent_channels or 4, stages[0][0], 3, padding=1), *([nn.ReLU()] if block == "tae" else [])]
        layers += [EfficientViTBlock(stages[0][0]) for _ in range(attention)]
        following = [*(width for width, _ in stages[1:]), 3]
        for i, ((width, count), factor) in enumerate(zip(stages, factors, strict=True)):
            layers += [BLOCKS[block](width, convs) for _ in range(count)]
            layers += [Up(width, following[i], factor, 3 if i == len(stages) - 1 else up_kernel)]
        self._set_up(BlockNetwork(layers))


def seconds_of_a_step(networks: dict[str, BlockNetwork]) -> dict[str, float]:
    """Forward and backward of 8 crops of 128 px, all in turn; in the number format that the trainer would choose for the first."""
    half = mixed_precision(next(iter(networks.values())), 4) == "bf16"
    z = torch.randn(8, 4, 16, 16).contiguous(memory_format=torch.channels_last)

    def call(network: BlockNetwork) -> Callable[[], None]:
        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y = network(z)
            y.float().abs().mean().backward()
            network.zero_grad(set_to_none=True)

        return step

    tasks = {name: call(network.train().to(memory_format=torch.channels_last)) for name, network in networks.items()}
    found: dict[str, float] = {}
    for name, timing in measure(tasks).items():
        assert not isinstance(timing, str), f"{name}: {timing}"
        found[name] = timing.median / 1e3
    return found


def time_decodes(networks: dict[str, BlockNetwork]) -> dict[str, dict[str, float]]:
    """Median ms at 512 px in float32 and, where the processor has it, bfloat16, all in turn."""
    found: dict[str, dict[str, float]] = {name: {} for name in networks}
    half = mixed_precision(next(iter(networks.values())), 4) == "bf16"  # emulated, a decode takes seconds
    for dtype in (torch.float32, *([torch.bfloat16] if half else [])):
        z = torch.randn(1, 4, 64, 64).to(dtype).contiguous(memory_format=torch.channels_last)

        def call(network: BlockNetwork, z: Tensor = z) -> Callable[[], Tensor]:
            return lambda: torch.inference_mode()(network)(z)

        tasks = {name: call(network.eval().to(dtype).to(memory_format=torch.channels_last)) for name, network in networks.items()}
        for name, timing in measure(tasks).items():
            found[name][str(dtype)[6:]] = float("nan") if isinstance(timing, str) else timing.median
    return found


COLUMNS = {"psnr": 2, "ssim": 4, "stlpips": 4, "sharpness": 2, "mesh": 2, "flat_psnr": 1}  # and their digits


def result(name: str) -> dict[str, float] | None:
    run = Path("training/runs") / f"search-{name}" / "export" / "run.json"
    if not run.exists():
        return None
    found = json.loads(run.read_text())
    return {"steps": found["steps"], **found["val"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[], help=f"of {', '.join(VARIANTS)}; by default all")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the widths to train at")
    parser.add_argument("--change", action="append", default=[], metavar="key=value", help="to the configuration, several times")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in VARIANTS]:
        parser.error(f"there is no variant {unknown[0]}; there are {', '.join(VARIANTS)}")
    import train

    keep_memory()  # as the trainer does
    names = arguments.names or list(VARIANTS)
    if missing := [name for name in names if result(name) is None]:
        networks: dict[str, Any] = {name: VariantDecoder(**arguments_of(name, arguments.scale)).decoder for name in missing}
        for network in [networks[name] for name in missing if "branches=true" in VARIANTS[name].get("train", [])]:
            branch(network)
        seconds = seconds_of_a_step(networks)
        for name in missing:
            given = {"_class_name": "VariantDecoder", **arguments_of(name, arguments.scale)}
            steps = round(arguments.minutes * 60 / seconds[name])
            print(f"{name}: {steps} steps of {seconds[name]:.3f} s")
            changes = [f"decoder={json.dumps(given)}", f"out=training/runs/search-{name}", f"steps={steps}", f"val_every={steps}"]
            sys.argv = ["train.py", "--config", str(CONFIG), *changes, *VARIANTS[name].get("train", []), *arguments.change]
            train.main()
    times = time_decodes({name: VariantDecoder(**arguments_of(name)).decoder for name in names})
    print("| variant | K MAC/px | 512 px, ms: fp32 (/ bf16) | steps | PSNR, dB | SSIM | ST-LPIPS | sharpness | mesh, 1/255 | flat colours, dB |")
    print("|" + "---|" * 10)
    for name in names:
        sizes, found = Preset(name, "VariantDecoder", "sdxl", "MIT", arguments_of(name)), result(name) or {}
        cells = [f"{found[key]:.{digits}f}" for key, digits in COLUMNS.items()]
        milliseconds = " / ".join(f"{time:.0f}" for time in times[name].values())
        print(f"| {name} | {sizes.mac_per_pixel / 1e3:.0f} | {milliseconds} | {found['steps']:.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
