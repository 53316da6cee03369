"""Shards of latents with their targets: made as a run goes, or once and for all:

    python training/latents.py --config training/configs/laptop/subpixel-sdxl.yaml --out cache --count 8 [key=value ...]
    python training/train.py --config training/configs/laptop/subpixel-sdxl.yaml cache=cache

Everything is cropped first and encoded then, so that every latent belongs to the whole of its target (DESIGN 5). What a shard
holds follows from the seed, its number and the process alone.
"""

import argparse
import atexit
import json
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from config import Config, Stage, build_decoder, read_config
from data import Crops, Sources, collate
from running import ENDING, born_deaf, sentences
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fast_latent_decoders.evaluation.encoders import FrozenEncoder, load_encoder
from fast_latent_decoders.evaluation.samples import Kind


@dataclass
class Shard:
    """Latents and targets made with one draw of the encoder's weights: M crops of T frames, T = 1 for pictures."""

    latents: Tensor  # (M, T, C, h, w) scaled
    table: Tensor  # (M, T, C, h, w), what the colour table adds at share 1; zero for transplants
    targets: Tensor  # (M, T, 3, H, W) uint8
    faces: Tensor  # (M, T, 1, H, W) bool

    def draw(self, c: Config, rows: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents with a share of the colour table and a little noise, drawn anew at every use; targets in [-1, 1]; faces.

        Frames of one clip, with one share and one amount of noise, follow each other: (rows * T, ...) each.
        """
        generator = torch.Generator().manual_seed(seed)
        each = (len(rows), 1, 1, 1, 1)
        low, high = c.stand_in.table_share
        share = low + (high - low) * torch.rand(each, generator=generator)
        sigma = c.stand_in.noise * torch.rand(each, generator=generator)
        z = self.latents[rows] + share * self.table[rows]
        z = (z + sigma * torch.randn(z.shape, generator=generator)).flatten(0, 1)
        targets, faces = (part[rows].flatten(0, 1) for part in (self.targets, self.faces))
        return z.contiguous(memory_format=torch.channels_last), targets.float() / 127.5 - 1, faces


class Shards:
    """Shards by number. While one is trained on, `c.workers` processes crop for the next."""

    def __init__(self, c: Config, sources: Mapping[Any, Sources], encoder: FrozenEncoder, accelerator: Accelerator) -> None:
        self.c, self.sources, self.encoder, self.accelerator = c, sources, encoder, accelerator
        self.held: dict[str, tuple[tuple[int, int], Shard]] = {}  # kind -> its key and shard
        self.ahead: dict[tuple[str, int, int], Iterator[Any]] = {}
        self.skipped: Counter[str] = Counter()
        self.waited = self.encoded = 0.0  # seconds
        if c.workers:  # which are deaf to what multiprocessing would end them with
            atexit.register(end_workers)

    def count(self, stage: Stage, kind: str) -> int:
        """Crops or clips in a shard: about as many pixels at every size, and at least one batch."""
        frames, batch = (stage.frames, stage.clip_batch) if kind == "clips" else (1, stage.batch)
        return max(batch * self.c.accumulate, int(self.c.shard * (128 / stage.crop) ** 2 / frames))

    def get(self, stage: int, kind: str, number: int) -> Shard:
        if self.held.get(kind, (None,))[0] != (stage, number):
            self.held.pop(kind, None)  # the old one's memory first
            self.held[kind] = ((stage, number), self._read(stage, kind, number) if self.c.cache else self._make(stage, kind, number))
        return self.held[kind][1]

    def _read(self, stage: int, kind: str, number: int) -> Shard:
        """From the cache, memory-mapped; its shards are taken in turn, each process beginning at another."""
        folder = Path(str(self.c.cache)) / f"{stage}-{kind}"
        paths = sorted(folder.glob("*.safetensors"))
        check_cache(self.c, self.encoder, Path(str(self.c.cache)), stage, kind)
        start = time.perf_counter()
        turn = number * self.accelerator.num_processes + self.accelerator.process_index
        shard = Shard(**load_file(paths[turn % len(paths)]))
        self.waited += time.perf_counter() - start
        if len(shard.latents) < self.count(self.c.stages[stage], kind):
            raise SystemExit(f"{folder} has shards of {len(shard.latents)}, the run wants {self.count(self.c.stages[stage], kind)}: make it again")
        return shard

    def _crops(self, stage: int, kind: str, number: int) -> Iterator[Any]:
        """What workers read and crop for this shard, in batches; they begin at once."""
        c, frames = self.c, self.c.stages[stage].frames if kind == "clips" else 1
        rank = self.accelerator.process_index
        seed = (c.seed, stage, kind == "clips", number, rank)
        part = self.sources[kind].part(number * self.accelerator.num_processes + rank)  # of a stream, each process its own
        crops = Crops(part, c.stages[stage], c.faces, seed, self.count(c.stages[stage], kind), kind == "clips")
        size = max(1, 32 // frames)
        ahead = -(-len(crops) // size // c.workers) if c.workers else None  # the whole of the next shard
        # Deaf from birth: torch gives a worker a SIGTERM handler that ends it, before worker_init_fn is called.
        with born_deaf():
            return iter(DataLoader(crops, size, num_workers=c.workers, collate_fn=collate, prefetch_factor=ahead, worker_init_fn=deaf))

    def _make(self, stage: int, kind: str, number: int) -> Shard:
        c, encoder = self.c, self.encoder
        generator = torch.Generator()
        rng = np.random.default_rng((c.seed, stage, kind == "clips", number, self.accelerator.process_index, 1))
        generator.manual_seed(int(rng.integers(2**62)))
        if c.stand_in.redraw:
            encoder.redraw(generator)
        with sentences():
            batches = self.ahead.pop((kind, stage, number), None) or self._crops(stage, kind, number)
        parts: list[tuple[Tensor, ...]] = []
        while True:
            start = time.perf_counter()
            with sentences():
                batch = next(batches, None)
            if batch is None:
                break
            targets, faces, skipped = batch
            self.skipped.update(skipped)
            self.waited -= start - (start := time.perf_counter())
            parts.append((*self._encode(targets, kind, generator), faces))
            self.encoded += time.perf_counter() - start
        encoder.redraw(None)  # who else uses it, measuring or for a loss, finds it as it is stored
        if c.workers:
            self.ahead = {(kind, stage, number + 1): self._crops(stage, kind, number + 1), **{k: v for k, v in self.ahead.items() if k[0] != kind}}
        return Shard(*(torch.cat(p) for p in zip(*parts, strict=True)))

    def _encode(self, targets: Tensor, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, table and targets of crops (M, T, 3, H, W); some get a real colour in place of their own."""
        encoder, (clips, frames) = self.encoder, targets.shape[:2]
        x = targets.flatten(0, 1).float() / 127.5 - 1
        with self.accelerator.autocast():
            latents = encoder.encode(x, generator)
        table = encoder.table_at(x)
        if encoder.colours is not None and (n := round(clips * self.c.stand_in.transplants)):
            # A third quite flat, the rest from hardly visible to photographic: flatness is never the cue.
            amplitude = torch.where(torch.rand(n, generator=generator) < 1 / 3, 0.0, 10 ** (-2 * torch.rand(n, generator=generator)))
            colours = torch.randint(len(encoder.colours["srgb"]), (n,), generator=generator)
            each = [choice.repeat_interleave(frames) for choice in (amplitude, colours)]  # one for all frames of a clip
            with self.accelerator.autocast():
                latents[: n * frames], x[: n * frames] = encoder.transplant(x[: n * frames], *each)
            table[: n * frames] = 0
        targets = ((x + 1) * 127.5).round().to(torch.uint8)
        first, second, third = (part.unflatten(0, (clips, frames)) for part in (latents, table, targets))
        return first, second, third


def first_latents(c: Config, encoder: FrozenEncoder, kind: Kind) -> Tensor:
    """Scaled latents of a run's first shard, frames of one clip after each other: (M * T, C, h, w)."""
    shard = Shards(c, {kind: Sources(c.data, kind, c.seed)}, encoder, Accelerator(cpu=True)).get(0, kind, 0)
    return shard.draw(c, torch.arange(len(shard.latents)), c.seed)[0]


def deaf(_: int) -> None:
    """A signal to all processes (Ctrl-C, a cluster's SIGTERM) is for the trainer, which saves; its workers end when it does."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()


def conventions(c: Config, encoder: FrozenEncoder, stage: int) -> dict[str, Any]:
    """What a cached shard depends on; a cache that was made with other conventions is refused."""
    stand_in = {key: value for key, value in asdict(c.stand_in).items() if key not in ("noise", "table_share")}  # drawn at every use
    changes = {key: value for key, value in asdict(c.stages[stage]).items() if key not in ("start", "batch", "clips", "clip_batch")}
    found = {"encoder": encoder.name, "weights": encoder.hash, "posterior": c.encoder.posterior, **stand_in, **changes, **asdict(c.faces)}
    return json.loads(json.dumps({**found, "data": [asdict(source) for source in c.data]}))


def check_cache(c: Config, encoder: FrozenEncoder, cache: Path, stage: int, kind: str) -> None:
    """Raises SystemExit: no such cache, or one of another encoder or convention; each difference is named."""
    about = cache / f"{stage}-{kind}" / "conventions.json"
    if not about.exists():
        raise SystemExit(f"{cache} holds no {kind} for stage {stage}: make them with training/latents.py, or leave cache out")
    stored, wanted = json.loads(about.read_text()), conventions(c, encoder, stage)
    if wrong := [f"{key} was {stored.get(key)}, is {wanted.get(key)}" for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]:
        raise SystemExit(f"{cache} was made otherwise: {'; '.join(wrong)}. Make it again with training/latents.py, or leave cache out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--count", type=int, default=8, help="shards for each stage")
    parser.add_argument("changes", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    c = read_config(arguments.config, [*arguments.changes, "cache=null"])
    accelerator = Accelerator()
    with sentences():
        encoder = load_encoder(c.encoder, c.stand_in, build_decoder(c)).to(accelerator.device)
        sources = {kind: Sources(c.data, kind, c.seed) for kind in {source.kind for source in c.data}}
    shards = Shards(c, sources, encoder, accelerator)
    for stage, about in enumerate(c.stages):
        for kind in ("pictures",) * (about.clips < 1) + ("clips",) * (about.clips > 0):
            folder = arguments.out / f"{stage}-{kind}"
            folder.mkdir(parents=True, exist_ok=True)
            told = folder / "conventions.json"
            if told.exists():
                check_cache(c, encoder, arguments.out, stage, kind)
            else:
                told.write_text(json.dumps(conventions(c, encoder, stage), indent=1) + "\n")
            for number in tqdm(range(arguments.count), desc=f"{kind} of stage {stage}, {about.crop} px"):
                path = folder / f"{number:05d}.safetensors"
                if path.exists():  # made by an earlier call
                    continue
                temporary = path.with_suffix(".tmp")
                save_file({key: value.contiguous() for key, value in vars(shards.get(stage, kind, number)).items()}, temporary)
                temporary.replace(path)
    if shards.skipped:
        print(f"skipped {sum(shards.skipped.values())} samples: {dict(shards.skipped.most_common(5))}")


if __name__ == "__main__":
    main()
