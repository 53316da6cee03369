"""Train a decoder on pictures or clips, on one device or with `accelerate launch` on many.

    python training/train.py --config training/configs/subpixel-sdxl.yaml [key=value ...]

Reads from top to bottom: schedule, then the run: data, model, loss, loop. The knobs are in config.py. A run that was stopped
goes on where it was when it is called again.
"""

import argparse
import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._functorch.config
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from adversary import Adversary, adaptive_ratio
from config import Config, build_decoder, read_config
from data import Sources, pick
from export import machine, summary, write_export
from faces import FaceDetector
from flats import FLAT_COLOURS, flat
from fold import branch, fold_branches
from grow import grow
from latents import Shards
from losses import PERCEPTUAL, PLAIN, WEIGHTED, ShiftTolerantLPIPS, perceptual, temporal
from optimizers import build_optimizers
from running import make_room, mixed_precision, save, sentences, stop_requested
from teacher import Lesson
from torch import Tensor
from tqdm import tqdm
from validate import Decode, draw, measure

from fast_latent_decoders import FastDecoder
from fast_latent_decoders.engines import keep_memory
from fast_latent_decoders.evaluation.encoders import load_encoder

# ---------------------------------------------------------------- schedule


def learning_rate(c: Config, step: int, begun: int = 0) -> float:
    """A cosine over the whole run, with a warm-up wherever an optimiser began without memory."""
    cosine = c.final_lr + (1 - c.final_lr) * 0.5 * (1 + math.cos(math.pi * step / c.steps))
    return c.lr * cosine * min(1.0, (step - begun + 1) / max(1, c.warmup))


def turn(c: Config, shards: Shards, step: int) -> tuple[int, str, int, Tensor]:
    """What a step trains on: number of the stage, "pictures" or "clips", number of the shard, rows in it.

    It follows from the step and the seed, so that a resumed run is the run that was stopped.
    """
    number = max(i for i, stage in enumerate(c.stages) if round(stage.start * c.steps) <= step)
    stage = c.stages[number]
    n = step - round(stage.start * c.steps)
    clips = math.floor(n * stage.clips)  # steps of this stage that were clips, spread evenly
    kind = "clips" if math.floor((n + 1) * stage.clips) > clips else "pictures"
    n, batch = (clips, stage.clip_batch) if kind == "clips" else (n - clips, stage.batch)
    count, batch = shards.count(stage, kind), batch * c.accumulate
    epoch, place = divmod(n, count // batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(c.seed + 31 * epoch))
    return number, kind, epoch // c.reuse, order[place * batch : (place + 1) * batch]


def warm_start(c: Config, model: FastDecoder) -> int:
    """Weights of an export, and the step that they were at: only the optimiser's memory is rebuilt.

    Raises:
        SystemExit: no run.json there, or a decoder of another shape.
    """
    run = Path(str(c.warm_start)) / "run.json"
    if not run.exists():
        raise SystemExit(f"{c.warm_start} has no run.json, which tells the step; with init= its weights are the first ones of a new run")
    source = FastDecoder.from_pretrained(str(c.warm_start)).float()
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise SystemExit(f"{c.warm_start} is a decoder of another shape than this run's ({error}); with init= it can be grown") from None
    return int(json.loads(run.read_text())["steps"])


# ---------------------------------------------------------------- run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; its keys are those of Config in config.py")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes to it")
    arguments = parser.parse_args()
    c = read_config(arguments.config, arguments.changes)
    out = Path(c.out)
    torch.manual_seed(c.seed)
    keep_memory()

    # The decoder and where it begins.
    model = build_decoder(c)
    network = model.decoder.to(memory_format=torch.channels_last).train()
    make_room(out, sum(parameter.numel() * parameter.element_size() for parameter in network.parameters()))
    state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True) if (out / "checkpoint.pt").exists() else None
    step = begun = 0
    if state is None and c.warm_start:
        step = begun = warm_start(c, model)
    elif state is None and c.init:
        with sentences():
            grow(FastDecoder.from_pretrained(c.init).float(), model, torch.Generator().manual_seed(c.seed))
    if c.branches:
        branch(network)

    # Data: pictures and clips.
    with sentences():
        sources = {kind: Sources(c.data, kind, c.seed) for kind in sorted({source.kind for source in c.data})}
        val = pick(c.val, c.val_count)
        detector = FaceDetector(c.faces.detector) if c.faces.detector else None

    # The machine.
    precision = state["precision"] if state else mixed_precision(network, model.config.latent_channels)
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    PartialState(cpu=cpu)  # the processes meet
    with sentences():
        precision = broadcast_object_list([precision])[0]
        accelerator = Accelerator(mixed_precision=precision, cpu=cpu, log_with=[*c.trackers] or None, project_dir=str(out))
    device, rank = accelerator.device, accelerator.process_index

    # The encoder that makes latents, and what is minimised.
    stlpips = ShiftTolerantLPIPS().to(device).to(memory_format=torch.channels_last)  # measures, and may be a term
    with sentences():
        encoder = load_encoder(c.encoder, c.stand_in, model).to(device)
        shards = Shards(c, sources, encoder, accelerator)
        features = {
            name: stlpips if name == "stlpips" else perceptual(name, c.squeezenet).to(device).to(memory_format=torch.channels_last)
            for name in PERCEPTUAL
            if c.losses.get(name) or c.teacher.losses.get(name)
        }
        lesson = Lesson(c.teacher, model.latent_space, network, device, features) if c.teacher.path else None
    adversary = Adversary(c.gan, model.config.latent_channels, accelerator, c.accumulate) if c.gan.weight else None
    last = [parameter for parameter in network.parameters() if parameter.ndim == 4][-1]
    weights = {**c.losses, "teacher": c.teacher.output, "teacher_maps": c.teacher.features}
    weights |= {f"teacher_{name}": weight for name, weight in c.teacher.losses.items()}

    optimizers = build_optimizers(network.to(device), c)
    if c.compile:
        torch._functorch.config.donated_buffer = False  # adaptive_ratio goes back through the graph before the step does
        network.compile()
    wrapped, *optimizers = accelerator.prepare(network, *optimizers)
    ema = {key: value.clone() for key, value in network.state_dict().items()}
    if state:
        network.load_state_dict(state["network"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        ema = {key: value.to(device) for key, value in state["ema"].items()}
        step, begun = state["step"], state.get("begun", 0)
        if adversary and "adversary" in state:
            adversary.load_state_dict(state["adversary"])

    def loss_of(z: Tensor, target: Tensor, faces: Tensor, frames: int, seed: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss of one batch, its terms (equation 1 and more) and the decoded pictures."""
        taught = lesson.latents(z, frames, step, seed) if lesson else z[:0]
        decoded, imitated = wrapped(torch.cat([z, taught]), frames).float().split([len(z), len(taught)])
        face_weight = 1 + (c.faces.weight - 1) * faces.float() if c.faces.weight != 1 else None
        terms = {name: term(decoded, target, face_weight) for name, term in WEIGHTED.items() if c.losses.get(name)}
        terms.update({name: term(decoded, target) for name, term in PLAIN.items() if c.losses.get(name)})
        for name in filter(c.losses.get, features):  # others are the teacher's alone
            # A term may see a share of the batch, another one at each step.
            seen_by = max(1, round(len(z) * c.perceptual_share.get(name, 1.0)))
            rows = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[:seen_by]
            terms[name] = features[name](decoded[rows], target[rows])
        if c.losses.get("temporal") and frames > 1:
            terms["temporal"] = temporal(decoded, target, frames)
        if c.losses.get("reencode"):
            with torch.no_grad():
                wanted = encoder.latents(target)
            terms["reencode"] = (encoder.latents(decoded) - wanted).abs().mean()
        if c.losses.get("flat"):
            assert encoder.colours is not None, "config.py asks for them"
            terms["flat"] = flat(network, encoder.colours, FLAT_COLOURS, seed)
        if lesson:
            terms.update(lesson.terms(imitated, taught, frames, decoded, z, seed))
        loss = torch.stack([weights[name] * term.float() for name, term in terms.items()]).sum()
        if adversary and step >= c.gan.start:
            terms["gan"] = adversary.loss(decoded, target, z)
            ratio = adaptive_ratio(loss, terms["gan"], last) if c.gan.adaptive else 1.0
            # A normalised gradient carries its weight itself.
            loss = loss + (1.0 if c.gan.normalised else c.gan.weight * ratio) * terms["gan"].float()
        return loss, terms, decoded

    asked_to_stop = stop_requested()

    # What is written: checkpoints, a log of JSON lines, trackers, pictures.
    log = (out / "log.jsonl").open("a")

    def note(**entry: Any) -> None:
        if accelerator.is_main_process:
            log.write(json.dumps(entry) + "\n")
            log.flush()

    def checkpoint() -> None:
        adversarial = {"adversary": adversary.state_dict()} if adversary else {}  # every process's memory
        if accelerator.is_main_process:
            parts = {"network": network.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "ema": ema, **adversarial}
            save(out / "checkpoint.pt", {**parts, "step": step, "begun": begun, "precision": precision})

    def decode_with(network: Any) -> Decode:
        def decode(z: Tensor, frames: int) -> Tensor:  # frame by frame where they do not mix, in the memory of one
            parts, frames = ([z], frames) if network.mixes_frames else (z.split(1), 1)
            return torch.cat([network(part.to(device), frames).cpu() for part in parts])

        return decode

    def validate() -> dict[str, float]:
        trained = {key: value.clone() for key, value in network.state_dict().items()}
        network.load_state_dict(ema)
        network.eval()
        found = measure(decode_with(network), encoder, val, share=0.5, stlpips=stlpips, detector=detector)
        decoders = {str(c.baseline): decode_with(baseline)} if baseline else {}
        sheet = draw({**decoders, f"step {step}": decode_with(network)}, encoder, val[:4])
        (out / "pictures").mkdir(exist_ok=True)
        sheet.save(out / "pictures" / f"{step:07d}.png")
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"pictures": np.array(sheet)[None]}, step=step, **order)
        network.train().load_state_dict(trained)
        return found

    accelerator.init_trackers("fast_latent_decoders", {"config": json.dumps(asdict(c))})
    baseline = FastDecoder.from_pretrained(c.baseline).float().decoder.to(device) if c.baseline else None
    note(config=asdict(c), step=step, time=round(time.time()), precision=precision, processes=accelerator.num_processes)
    samples = {path: count for found in sources.values() for path, count in found.counts().items()}
    note(data={"samples": samples, "encoder": {"name": encoder.name, "hash": encoder.hash}, "machine": machine()})
    if baseline and step == begun and accelerator.is_main_process:
        note(baseline=measure(decode_with(baseline), encoder, val, share=0.5, stlpips=stlpips, detector=detector))

    seen: dict[str, float] = {}
    crops, since = 0, time.perf_counter()
    bar = tqdm(initial=step, total=c.steps, disable=None if accelerator.is_main_process else True, dynamic_ncols=True)
    while step < c.steps:
        number, kind, which, rows = turn(c, shards, step)
        shard = shards.get(number, kind, which)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = learning_rate(c, step, begun)

        network.zero_grad(set_to_none=True)
        batches = rows.chunk(c.accumulate)
        for i, batch in enumerate(batches):
            seed = ((c.seed * 7_000_003 + step) * accelerator.num_processes + rank) * c.accumulate + i
            z, target, faces = (part.to(device) for part in shard.draw(c, batch, seed))
            with accelerator.autocast():
                loss, terms, decoded = loss_of(z, target, faces, shard.targets.shape[1], seed)
            with nullcontext() if i == len(batches) - 1 else accelerator.no_sync(wrapped):
                accelerator.backward(loss / len(batches))
            if adversary and step >= c.gan.start:
                with accelerator.autocast():
                    terms["discriminator"] = torch.tensor(adversary.learn(decoded, target, z, seed))
        norm = accelerator.clip_grad_norm_(network.parameters(), c.clip)
        if not torch.isfinite(norm):
            raise SystemExit(f"the gradient is not finite at step {step}: lower lr; the last checkpoint is in {out}")
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        decay = min(c.ema, (step - begun) / (step - begun + 10))
        with torch.no_grad():
            for name, value in network.state_dict().items():
                ema[name].lerp_(value, 1 - decay if value.is_floating_point() else 1)

        for name, term in terms.items():
            seen[name] = 0.98 * seen.get(name, term.item()) + 0.02 * term.item()
        crops += len(rows) * shard.targets.shape[1] * accelerator.num_processes
        bar.update()
        bar.set_postfix({name: f"{value:.4f}" for name, value in seen.items()})
        if asked_to_stop():
            accelerator.set_trigger()
        stopped = accelerator.check_trigger()  # any process was asked: all end at the same step
        if stopped or step % c.save_every == 0 or step == c.steps:
            checkpoint()
            seconds, since = time.perf_counter() - since, time.perf_counter()
            speed = {"crops_per_s": crops / seconds, "waiting": shards.waited / seconds, "encoding": shards.encoded / seconds}
            crops, shards.waited, shards.encoded = 0, 0.0, 0.0
            figures = {"norm": norm.item(), "lr": learning_rate(c, step - 1, begun), **speed, **seen}
            note(step=step, time=round(time.time()), **figures, **({"skipped": sum(shards.skipped.values())} if shards.skipped else {}))
            accelerator.log(figures, step=step)
        if accelerator.is_main_process and (step % c.val_every == 0 or step == c.steps):
            found = validate()
            note(step=step, val=found)
            accelerator.log({f"val/{key}": value for key, value in found.items()}, step=step)
            bar.write(f"{step} {found}")
        if stopped and step < c.steps:
            raise SystemExit(f"stopped at step {step} of {c.steps}; the same command goes on from there")

    if shards.skipped:
        note(data={"skipped": sum(shards.skipped.values())})
        told = "; ".join(f"{name} ({count} times)" for name, count in shards.skipped.most_common(5))
        print(f"process {rank} skipped {sum(shards.skipped.values())} samples: {told}")
    accelerator.end_training()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # or the decoder would keep computing under autocast
    if accelerator.is_main_process:
        network.load_state_dict(ema)
        if c.branches:
            fold_branches(network)
        log.close()
        print(f"finished: the decoder is in {write_export(out, model.cpu(), c, summary(out))}")


if __name__ == "__main__":
    main()
