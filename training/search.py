"""The search for Subpixel's shape: variants at equal training time, and what each costs (issue 12; figures in RESULTS.md).

    python training/search.py --minutes 15 [NAME ...]

trains each variant from random weights for so many minutes of this machine, idle, by the settings of configs/laptop/ablation.yaml,
into training/runs/search-NAME, and prints quality beside the times of a decode. What is finished is not trained again.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from fast_latent_decoders import FastDecoder
from fast_latent_decoders.evaluation.timing import measure
from fast_latent_decoders.networks.blocks import BlockNetwork, Residual, ResidualBlock, zero_init
from fast_latent_decoders.networks.efficientvit import EfficientViTBlock

CONFIG = Path(__file__).parent / "configs" / "laptop" / "ablation.yaml"
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}

# Name -> what differs from the first subpixel-sdxl; all cost about as much, 138 to 174 K MAC/px.
VARIANTS: dict[str, dict[str, Any]] = {
    "shipped": {},
    "wide": {"stages": [[256, 4], [96, 3], [48, 2]]},
    "deep": {"stages": [[128, 18], [96, 3], [48, 2]]},
    "three-convs": {"stages": [[192, 5], [96, 2], [48, 1]], "convs": 3},
    "quarter": {"stages": [[160, 6], [128, 4], [48, 2]]},  # more at 1/4
    "no-half": {"stages": [[192, 8], [128, 4]], "factors": [2, 4]},  # from 1/4 to the picture in one step
    "thin-half": {"stages": [[192, 8], [128, 3], [32, 1]]},
    "depthwise": {"block": "depthwise", "stages": [[224, 12], [96, 6], [64, 3]]},
    "up-1x1": {"up_kernel": 1},
    "silu": {"activation": "silu"},
    "gelu": {"activation": "gelu"},
    "attention": {"stages": [[192, 6], [96, 3], [48, 2]], "attention": 2},
    "branches": {"train": ["branches=true"]},  # re-parameterised
}


class ActivatedBlock(Residual):
    """ResidualBlock with any activation."""

    def __init__(self, width: int, convs: int, activation: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(convs):
            layers += [ACTIVATIONS[activation]()] if i else []
            layers += [nn.Conv2d(width, width, 3, padding=1)]
        zero_init(layers[-1])
        self.conv = nn.Sequential(*layers)


class DepthwiseBlock(Residual):
    """x + 1x1(gelu(1x1(7x7 depthwise(x)))), four times as wide inside, without normalisation (after ConvNeXt, Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        spread = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.conv = nn.Sequential(spread, nn.Conv2d(width, 4 * width, 1), nn.GELU(), zero_init(nn.Conv2d(4 * width, width, 1)))


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
        stages: Sequence[Sequence[int]] = ((192, 8), (96, 3), (48, 2)),
        factors: Sequence[int] = (2, 2, 2),
        convs: int = 2,
        block: str = "residual",
        activation: str = "relu",
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

        def make(width: int) -> nn.Module:
            if block == "depthwise":
                return DepthwiseBlock(width)
            return ResidualBlock(width, convs) if activation == "relu" else ActivatedBlock(width, convs, activation)

        layers: list[nn.Module] = [nn.Conv2d(latent_channels or 4, stages[0][0], 3, padding=1)]
        layers += [EfficientViTBlock(stages[0][0]) for _ in range(attention)]
        following = [*(width for width, _ in stages[1:]), 3]
        for i, ((width, count), factor) in enumerate(zip(stages, factors, strict=True)):
            layers += [make(width) for _ in range(count)]
            layers += [Up(width, following[i], factor, 3 if i == len(stages) - 1 else up_kernel)]
        self._set_up(BlockNetwork(layers))


def seconds_of_a_step(network: BlockNetwork, precision: str) -> float:
    """Forward and backward of 8 crops of 128 px, the bulk of a step."""
    network.train().to(memory_format=torch.channels_last)
    z = torch.randn(8, 4, 16, 16).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y = network(z)
        y.float().abs().mean().backward()
        network.zero_grad(set_to_none=True)

    timing = measure({"step": step}, repeats=5)["step"]
    assert not isinstance(timing, str), timing
    return timing.median / 1e3


def time_decodes(networks: dict[str, BlockNetwork]) -> dict[str, dict[str, float]]:
    """Median ms at 512 px in float32 and bfloat16, all in turn."""
    found: dict[str, dict[str, float]] = {name: {} for name in networks}
    for dtype in (torch.float32, torch.bfloat16):
        z = torch.randn(1, 4, 64, 64).to(dtype).contiguous(memory_format=torch.channels_last)

        def call(network: BlockNetwork, z: Tensor = z) -> Callable[[], Tensor]:
            return lambda: torch.inference_mode()(network)(z)

        tasks = {name: call(network.eval().to(dtype).to(memory_format=torch.channels_last)) for name, network in networks.items()}
        for name, timing in measure(tasks).items():
            found[name][str(dtype)[6:]] = float("nan") if isinstance(timing, str) else timing.median
    return found


def result(name: str) -> dict[str, float] | None:
    run = Path("training/runs") / f"search-{name}" / "export" / "run.json"
    return json.loads(run.read_text())["val"] if run.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[], help=f"of {', '.join(VARIANTS)}; by default all")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--change", action="append", default=[], metavar="key=value", help="to the configuration, several times")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in VARIANTS]:
        parser.error(f"there is no variant {unknown[0]}; there are {', '.join(VARIANTS)}")
    import train
    from running import mixed_precision

    names = arguments.names or list(VARIANTS)
    for name in names:
        if result(name) is None:
            given = {"_class_name": "VariantDecoder", **{key: value for key, value in VARIANTS[name].items() if key != "train"}}
            network: Any = VariantDecoder(**{key: value for key, value in given.items() if key != "_class_name"}).decoder
            steps = round(arguments.minutes * 60 / seconds_of_a_step(network, mixed_precision(network, 4)))
            changes = [f"decoder={json.dumps(given)}", f"out=training/runs/search-{name}", f"steps={steps}", f"val_every={steps}"]
            sys.argv = ["train.py", "--config", str(CONFIG), *changes, *VARIANTS[name].get("train", []), *arguments.change]
            train.main()
    networks = {name: VariantDecoder(**{key: value for key, value in VARIANTS[name].items() if key != "train"}).decoder for name in names}
    times = time_decodes(networks)
    print("| variant | parameters, M | 512 px, ms: fp32 / bf16 | PSNR, dB | SSIM | ST-LPIPS | flat colours, dB |\n|---|---|---|---|---|---|---|")
    for name in names:
        found = result(name) or {}
        size = sum(parameter.numel() for parameter in networks[name].parameters()) / 1e6
        cells = [f"{found[key]:.{digits}f}" for key, digits in (("psnr", 2), ("ssim", 4), ("stlpips", 4), ("flat_psnr", 1))]
        print(f"| {name} | {size:.2f} | {times[name]['float32']:.0f} / {times[name]['bfloat16']:.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
