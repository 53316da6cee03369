"""Train a decoder on pictures, on one device or with `accelerate launch` on many.

    python training/train.py --config training/configs/subpixel-sdxl.yaml [key=value ...]

Reads from top to bottom: data, helpers, then the run: model, optimiser, loop. The knobs are in config.py. A run that was
stopped goes on where it was when it is called again.
"""

import argparse
import json
import math
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from adversary import Adversary, adaptive_ratio
from config import Config, expand, read_config
from data import load_pictures, random_crop, spread
from latents import StandInEncoder
from losses import PERCEPTUAL, PIXEL, ShiftTolerantLPIPS, perceptual
from torch import Tensor, nn
from tqdm import tqdm
from validate import measure

from fast_latent_decoders import FastDecoder

# ---------------------------------------------------------------- data


@dataclass
class Shard:
    """Latents and targets made with one draw of the encoder's weights."""

    latents: Tensor  # (M, C, h, w) scaled
    table: Tensor  # (M, C, h, w), what the colour table adds at share 1; zero for transplants
    targets: Tensor  # (M, 3, H, W) uint8


def shard_count(c: Config, size: int) -> int:
    """Crops in a shard: as many pixels at every crop size."""
    return max(64, int(c.shard * (128 / size) ** 2))


def make_shard(c: Config, pictures: list[Tensor], encoder: StandInEncoder, size: int, index: int, accelerator: Accelerator) -> Shard:
    """Crop first, then encode the crop: every latent belongs to the whole of its target (DESIGN 5). Each process has its own."""
    rng = np.random.default_rng((c.seed, size, index, accelerator.process_index))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    if c.stand_in.redraw:
        encoder.redraw(generator)
    count = shard_count(c, size)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in tqdm(range(0, count, 32), desc=f"latents of shard {index}", leave=False, disable=None):
        crops = torch.stack([random_crop(pictures, size, rng) for _ in range(min(32, count - start))])
        with accelerator.autocast():
            latents = encoder.encode(crops)
        table = encoder.table_at(crops)
        if encoder.colours is not None and (n := round(len(crops) * c.stand_in.transplants)):
            # A third quite flat, the rest from hardly visible to photographic: flatness is never the cue.
            amplitude = torch.where(
                torch.rand(n, generator=generator) < 1 / 3, 0.0, 10 ** (-2 * torch.rand(n, generator=generator))
            )
            colours = torch.randint(len(encoder.colours["srgb"]), (n,), generator=generator)
            with accelerator.autocast():
                latents[:n], crops[:n] = encoder.transplant(crops[:n], amplitude, colours)
            table[:n] = 0
        parts.append((latents, table, ((crops + 1) * 127.5).round().to(torch.uint8)))
    return Shard(*(torch.cat(p) for p in zip(*parts, strict=True)))


def draw_batch(c: Config, shard: Shard, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Latents with a share of the colour table and a little noise, drawn anew at every use, and their targets."""
    generator = torch.Generator().manual_seed(seed)
    low, high = c.stand_in.table_share
    share = low + (high - low) * torch.rand(len(rows), 1, 1, 1, generator=generator)
    sigma = c.stand_in.noise * torch.rand(len(rows), 1, 1, 1, generator=generator)
    z = shard.latents[rows] + share * shard.table[rows]
    z = z + sigma * torch.randn(z.shape, generator=generator)
    return z.contiguous(memory_format=torch.channels_last), shard.targets[rows].float() / 127.5 - 1


# ---------------------------------------------------------------- helpers


def mixed_precision(network: nn.Module, channels: int) -> str:
    """ "bf16" or "no". On a CPU one step is timed each way: with AMX or AVX512-BF16 bfloat16 wins, without it loses (DESIGN 4)."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    z = torch.randn(4, channels, 16, 16).contiguous(memory_format=torch.channels_last)
    seconds = {}
    for precision in ("no", "bf16"):
        for _ in range(3):  # the last one counts
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                y = network(z)
            y.float().abs().mean().backward()
            seconds[precision] = time.perf_counter() - start
            network.zero_grad(set_to_none=True)
    return min(seconds, key=lambda precision: seconds[precision])


def learning_rate(c: Config, step: int) -> float:
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    progress = (step - c.warmup) / max(1, c.steps - c.warmup)
    return c.lr * (c.final_lr + (1 - c.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def save(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def stop_requested() -> Callable[[], bool]:
    """True once the process was asked to end (Ctrl-C, SIGTERM): the loop then ends at a whole step and saves."""
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: asked.append(received))
    return lambda: bool(asked)


def summary(out: Path) -> dict[str, Any]:
    """What run.json says of a run, from its log: the configuration at every start, steps, hours, the last measurement."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "norm" in entry]
    gaps = [b["time"] - a["time"] for a, b in pairwise(steps)]
    return {
        "starts": [entry for entry in entries if "config" in entry],
        "steps": steps[-1]["step"] if steps else 0,
        "hours": round(sum(gap for gap in gaps if gap < 900) / 3600, 2),  # longer gaps are pauses
        "val": next((entry["val"] for entry in reversed(entries) if "val" in entry), {}),
    }


# ---------------------------------------------------------------- run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; its keys are those of Config in config.py")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes to it")
    arguments = parser.parse_args()
    c = read_config(arguments.config, arguments.changes)
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "log.jsonl").open("a")  # a folder that cannot be written to fails now, not after an hour
    torch.manual_seed(c.seed)

    pictures = load_pictures(expand(c.pictures))
    val = spread(load_pictures(expand(c.val_pictures)), c.val_count)
    family = dict(c.decoder)
    model = FastDecoder.families[family.pop("_class_name")](**family)
    network = model.decoder.to(memory_format=torch.channels_last).train()
    size = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    if (free := shutil.disk_usage(out).free) < 8 * size:  # two checkpoints of network, EMA and the optimiser's two moments
        raise SystemExit(f"{out} has {free / 1e6:.0f} MB free and checkpoints need {8 * size / 1e6:.0f} MB: give another folder with out=")

    state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True) if (out / "checkpoint.pt").exists() else None
    precision = state["precision"] if state else mixed_precision(network, model.config.latent_channels)
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    PartialState(cpu=cpu)  # the processes meet
    accelerator = Accelerator(mixed_precision=broadcast_object_list([precision])[0], cpu=cpu)
    device, rank = accelerator.device, accelerator.process_index
    encoder = StandInEncoder(model.latent_space, c.stand_in.colour_table, c.stand_in.colours).to(device)
    stlpips = ShiftTolerantLPIPS().to(device).to(memory_format=torch.channels_last)  # measures, and may be a term
    features = {
        name: stlpips if name == "stlpips" else perceptual(name, c.squeezenet).to(device).to(memory_format=torch.channels_last)
        for name in PERCEPTUAL
        if c.losses.get(name)
    }
    adversary = Adversary(model.config.latent_channels, c.gan.kind, c.gan.lr, c.gan.memory, accelerator) if c.gan.weight else None
    last = [parameter for parameter in network.parameters() if parameter.ndim == 4][-1]
    optimizer = torch.optim.AdamW(network.parameters(), lr=c.lr, betas=(0.9, 0.99), weight_decay=c.weight_decay, fused=True)
    wrapped, optimizer = accelerator.prepare(network, optimizer)
    ema = {key: value.clone() for key, value in network.state_dict().items()}

    step = 0
    if state:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step = {key: value.to(device) for key, value in state["ema"].items()}, state["step"]
        if adversary and "adversary" in state:
            adversary.load_state_dict(state["adversary"])

    def checkpoint() -> None:
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema}
        adversarial = {"adversary": adversary.state_dict()} if adversary else {}
        save(out / "checkpoint.pt", {**state, **adversarial, "step": step, "precision": precision})

    def validate() -> dict[str, float]:
        trained = {key: value.clone() for key, value in network.state_dict().items()}
        network.load_state_dict(ema)
        encoder.redraw(None)
        network.eval()
        found = measure(lambda z: network(z.to(device)).cpu(), encoder, val, share=0.5, stlpips=stlpips)
        network.train().load_state_dict(trained)
        return found

    def note(**entry: Any) -> None:
        if accelerator.is_main_process:
            log.write(json.dumps(entry) + "\n")
            log.flush()

    note(config=asdict(c), step=step, precision=precision, processes=accelerator.num_processes)
    if c.baseline and step == 0 and accelerator.is_main_process:
        encoder.redraw(None)
        note(baseline=measure(FastDecoder.from_pretrained(c.baseline).decoder, encoder, val, share=0.5, stlpips=stlpips))

    shard: Shard | None = None
    shard_key: tuple[int, int] | None = None
    seen: dict[str, float] = {}
    asked_to_stop = stop_requested()
    bar = tqdm(initial=step, total=c.steps, disable=None if accelerator.is_main_process else True, dynamic_ncols=True)
    while step < c.steps:
        # Everything random follows from the seed and the step, so that a resumed run is the run that was stopped.
        first, size, batch = max((round(share * c.steps), int(px), int(n)) for share, px, n in c.crops if share * c.steps <= step)
        count = shard_count(c, size)
        epoch, place = divmod(step - first, count // batch)
        key = (size, epoch // c.epochs_per_shard)
        if shard is None or key != shard_key:
            shard, shard_key = make_shard(c, pictures, encoder, size, key[1], accelerator), key
        order = torch.randperm(count, generator=torch.Generator().manual_seed(c.seed + 31 * epoch))
        seed = (c.seed * 7_000_003 + step) * accelerator.num_processes + rank
        z, target = (t.to(device) for t in draw_batch(c, shard, order[place * batch : (place + 1) * batch], seed))

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(c, step)
        with accelerator.autocast():
            decoded = wrapped(z).float()
            terms = {name: term(decoded, target) for name, term in PIXEL.items() if c.losses.get(name)}
            for name, distance in features.items():
                # A term may see a share of the batch, another one at each step.
                seen_by = max(1, round(len(z) * c.perceptual_share.get(name, 1.0)))
                rows = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[:seen_by]
                terms[name] = distance(decoded[rows], target[rows])
            loss = torch.stack([c.losses[name] * term.float() for name, term in terms.items()]).sum()
            if adversary and step >= c.gan.start:
                terms["gan"] = adversary.loss(decoded, target, z)
                ratio = adaptive_ratio(loss, terms["gan"], last) if c.gan.adaptive else 1.0
                loss = loss + c.gan.weight * ratio * terms["gan"].float()
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(network.parameters(), c.clip)
        if not torch.isfinite(norm):
            raise SystemExit(f"the gradient is not finite at step {step}: lower lr; the last checkpoint is in {out}")
        optimizer.step()
        if adversary and step >= c.gan.start:
            with accelerator.autocast():
                terms["discriminator"] = torch.tensor(adversary.learn(decoded, target, z, seed))
        step += 1
        decay = min(c.ema, step / (step + 10))
        with torch.no_grad():
            for name, value in network.state_dict().items():
                ema[name].lerp_(value, 1 - decay)

        for name, term in terms.items():
            seen[name] = 0.98 * seen.get(name, term.item()) + 0.02 * term.item()
        bar.update()
        bar.set_postfix({name: f"{value:.4f}" for name, value in seen.items()})
        stopped = asked_to_stop()
        if accelerator.is_main_process and (stopped or step % c.save_every == 0 or step == c.steps):
            checkpoint()
            note(step=step, time=round(time.time()), norm=norm.item(), **seen)
        if accelerator.is_main_process and (step % c.val_every == 0 or step == c.steps):
            found = validate()
            note(step=step, val=found)
            bar.write(f"{step} {found}")
        if stopped and step < c.steps:
            raise SystemExit(f"stopped at step {step} of {c.steps}; the same command goes on from there")

    if accelerator.is_main_process:
        network.load_state_dict(ema)
        model.to("cpu", torch.float16).save_pretrained(out / "model")
        log.close()
        (out / "model" / "run.json").write_text(json.dumps({**summary(out), "torch": torch.__version__}, indent=1) + "\n")
        print(f"finished: the decoder is in {out / 'model'}")


if __name__ == "__main__":
    main()
