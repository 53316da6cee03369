"""Measure decoders on held-out pictures and against the clock, and write the README's table.

    python training/evaluate.py training/configs/laptop/subpixel-sdxl.yaml subpixel-sdxl taesdxl [--count 200] [--write]

Quality: stand-in latents with 0, half and all of the colour table (DESIGN 5), means over pictures, and real flat colours.
Speed: all decoders in turn on the same latents, median wall time beside processor time; a machine that is busy is marked.
With --write the results go to hub_cards/<first decoder>/results.json and the tables into README.md and the card.
"""

import argparse
import json
import platform
import re
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from config import read_config
from data import pick
from losses import ShiftTolerantLPIPS
from tqdm import tqdm
from validate import Decode, flat_colours, latents_of, measure_picture

from fast_latent_decoders import FastDecoder, presets
from fast_latent_decoders.evaluation.encoders import FrozenEncoder, load_encoder
from fast_latent_decoders.evaluation.reading import Sample

ROOT = Path(__file__).parent.parent
SHARES = (0.0, 0.5, 1.0)


@torch.inference_mode()
def quality(decoders: dict[str, FastDecoder], encoder: FrozenEncoder, pictures: list[Sample], every: int) -> dict[str, Any]:
    stlpips = ShiftTolerantLPIPS()
    networks: dict[str, Decode] = {name: decoder.decoder for name, decoder in decoders.items()}
    rows: dict[tuple[str, float], list[dict[str, float]]] = {(name, share): [] for name in networks for share in SHARES}
    for x, z, table in tqdm(latents_of(encoder, pictures), total=len(pictures), disable=None):
        for (name, share), values in rows.items():
            latents = (z + share * table).contiguous(memory_format=torch.channels_last)
            values.append(measure_picture(networks[name](latents, len(x)), x, stlpips))
    found: dict[str, Any] = {name: {} for name in networks}
    for (name, share), values in rows.items():
        found[name][f"a={share}"] = {key: float(np.mean([row[key] for row in values])) for key in values[0]}
    for name, network in networks.items():
        found[name]["flat"] = flat_colours(network, encoder, every)
    return found


@torch.inference_mode()
def speed(decoders: dict[str, FastDecoder], repeats: int = 7) -> dict[str, Any]:
    """Median and spread of the wall time, and processor time, in ms; the decoders take turns within one run."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        networks = {name: d.decoder.to(dtype).to(memory_format=torch.channels_last) for name, d in decoders.items()}
        for px in (512, 1024):
            z = torch.randn(1, 4, px // 8, px // 8, generator=torch.Generator().manual_seed(0)).to(dtype)
            z = z.contiguous(memory_format=torch.channels_last)
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
            for round_ in range(repeats + 2):  # two to warm up
                for name, network in networks.items():
                    start, cpu = time.perf_counter(), time.process_time()
                    network(z)
                    if round_ >= 2:
                        times[name].append((time.perf_counter() - start, time.process_time() - cpu))
            for name, pairs in times.items():
                wall, cpus = ([1e3 * pair[i] for pair in pairs] for i in (0, 1))
                found.setdefault(name, {})[f"{str(dtype)[6:]} {px}"] = {
                    "ms": statistics.median(wall),
                    "low": min(wall),
                    "high": max(wall),
                    "cpu_ms": statistics.median(cpus),
                }
    return found


def busy(seconds: float = 3.0) -> float:
    """Share of this machine's processor time that others use while this process sleeps."""

    def read() -> list[int]:
        return [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]

    before = read()
    time.sleep(seconds)
    used = [b - a for a, b in zip(before, read(), strict=True)]
    return 1 - (used[3] + used[4]) / max(1, sum(used))  # idle and waiting for the disk


def machine() -> dict[str, Any]:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in Path("/proc/cpuinfo").read_text()]
    return {
        "cpu": f"{model or platform.processor()}, {torch.get_num_threads()} threads, {' '.join(flags) or 'no bfloat16 instructions'}",
        "busy_before": round(busy(), 3),
        **{package: version(package) for package in ("torch", "diffusers")},
    }


def tables(results: dict[str, Any]) -> str:
    """The Markdown that goes into README and card."""
    names = list(results["decoders"])
    lines = [
        "| decoder | parameters | fp16 MB | MAC/px | 512 px, ms: fp32 / bf16 | 1024 px, ms: fp32 / bf16 |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        preset, times = presets()[name], results["decoders"][name]["speed"]
        cells = [
            " / ".join(f"{times[f'{dtype} {px}']['ms']:.0f}" for dtype in ("float32", "bfloat16")) for px in (512, 1024)
        ]
        lines.append(
            f"| `{name}` | {preset.parameters / 1e6:.2f} M | {preset.megabytes:.1f} | {preset.mac_per_pixel / 1e3:.0f} K | {cells[0]} | {cells[1]} |"
        )
    where = results["machine"]
    busy = " **The machine was busy: compare rows, do not quote.**" if where["busy_before"] > 0.1 else ""
    lines += ["", f"Median of 7, channels_last, {where['cpu']}, torch {where['torch']}.{busy}"]
    lines += [f"Below: means over {results['pictures']} held-out pictures, and {results['flat_colours']} flat colours.", ""]
    lines += [
        "| decoder | share of colour table | PSNR dB | SSIM | SSIMULACRA2 | ST-LPIPS | tint r g b, 1/255 | mean \\|tint\\| | flat colours dB (worst /255) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for share in SHARES:
        for name in names:
            row, flat = results["decoders"][name][f"a={share}"], results["decoders"][name]["flat"]
            tint = " ".join(f"{row[f'tint_{c}']:+.1f}" for c in "rgb")
            colours = f"{flat['flat_psnr']:.1f} ({flat['flat_worst']:.1f})" if share == 0.5 else ""
            lines.append(
                f"| `{name}` | {share} | {row['psnr']:.2f} | {row['ssim']:.3f} | {row['ssimulacra2']:.1f} | {row['stlpips']:.4f} | {tint} "
                f"| {row['tint_size']:.2f} | {colours} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("decoders", nargs="+", help="presets or folders")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--every", type=int, default=1, help="of the flat colours, take each such one")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    where = machine()
    config = read_config(arguments.config, [])
    pictures = pick(config.val, arguments.count)
    decoders = {name: FastDecoder.from_pretrained(name).eval() for name in arguments.decoders}
    encoder = load_encoder(config.encoder, config.stand_in, next(iter(decoders.values())))

    times = speed(decoders)
    for decoder in decoders.values():
        decoder.decoder.float()
    measured = quality(decoders, encoder, pictures, arguments.every)
    colours = len(encoder.colours["srgb"][:: arguments.every]) if encoder.colours else 0
    results: dict[str, Any] = {"machine": where, "pictures": len(pictures), "flat_colours": colours, "decoders": {}}
    for name in decoders:
        results["decoders"][name] = {**measured[name], "speed": times[name]}
    print(tables(results))
    if arguments.write:
        first = next(iter(decoders))
        card = ROOT / "hub_cards" / first
        (card / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        for path in (ROOT / "README.md", card / "README.md"):
            before, after = re.split(r"(?<=<!-- results -->).*(?=<!-- end of results -->)", path.read_text(), flags=re.DOTALL)
            path.write_text(f"{before}\n{tables(results)}\n{after}")


if __name__ == "__main__":
    main()
