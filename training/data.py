"""Pictures and clips for training: sources in, random crops out (sources: DATA.md; the index: samples.py).

    sources = Sources(c.data, "pictures", c.seed)
    crops = Crops(sources.part(k), stage, c.faces, (c.seed, k, rank), count)
    for item in DataLoader(crops, batch_size=32, num_workers=2, collate_fn=collate): ...

A crop is a function of its seed and its number alone: not of the processes that make it, nor of what was made before.
"""

import logging
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from augment import augment
from config import Faces, Stage
from faces import FaceDetector
from stream import Stream
from torch import Tensor
from torch.utils.data import Dataset

from fast_latent_decoders.atomic import reason
from fast_latent_decoders.evaluation.reading import Sample, TooSmall, read
from fast_latent_decoders.evaluation.samples import Kind, Pool, Source, index

log = logging.getLogger(__name__)

TRIES = 1000  # samples of a source that may fail in a row, most of them for being too small
CORRUPT = 100  # of them that may be corrupt


class Part(NamedTuple):
    """What a shard of latents draws from."""

    pools: list[Pool]


class Item(NamedTuple):
    """A crop; or, collated, a batch of them, with N in front."""

    target: Tensor  # (T, 3, crop, crop) uint8
    mask: Tensor  # (T, 1, crop, crop) bool, true in faces
    skipped: list[str]  # "key: reason" of the corrupt samples met on the way


class Sources:
    """The sources of one kind, opened: local ones are indexed here and now, streams are read part by part.

    Args:
        seed: of the order in which a stream's shards are read.
        per_part: samples that a part holds of a stream.

    Raises:
        FileNotFoundError: a path or a list of names does not exist.
        ValueError: a source is empty, or its filters leave nothing; each is named.
        ImportError: a package is missing; the message says how to install it.
    """

    def __init__(
        self, sources: Sequence[Source], kind: Kind, seed: int = 0, per_part: int = 1024
    ) -> None:
        chosen = [source for source in sources if source.kind == kind and source.weight > 0]
        if not chosen:
            raise ValueError(f"expected a source of {kind} with a weight above 0, found none")
        self.opened = [open_source(source, seed, per_part) for source in chosen]

    def part(self, k: int) -> Part:
        """What shard k of the latents draws from: all samples of local sources, and each stream's part k.

        Processes that are to see other samples of a stream ask for other parts.
        """
        return Part([source.part(k) if isinstance(source, Stream) else source for source in self.opened])

    def counts(self) -> dict[str, int]:
        """Samples of each local source; nobody has counted a stream's."""
        return {source.source.path: len(source.entries) for source in self.opened if isinstance(source, Pool)}


def open_source(source: Source, seed: int, per_part: int) -> Pool | Stream:
    if source.kind == "clips":
        try:
            import av  # noqa: F401
        except ImportError as error:
            raise ImportError(f"the clips of {source.path} need PyAV: pip install 'fast-latent-decoders[train]'") from error
    return Stream(source, seed, per_part) if source.path.startswith("hf:") else index(source)


@cache
def warn_once(message: str) -> None:
    log.warning(message)


class Crops(Dataset[Item]):
    """`count` random crops of a part, as a stage wants them.

    Args:
        seed: crop i follows from (*seed, i); non-negative numbers.
        clips: crops of stage.frames frames; else of one.

    Raises:
        ValueError: no source has a sample as large and as long as the stage wants.
        FileNotFoundError, ImportError: faces are to be found and the detector cannot be had.
    """

    def __init__(self, part: Part, stage: Stage, faces: Faces, seed: tuple[int, ...], count: int, clips: bool = False) -> None:
        self.stage, self.seed, self.count = stage, seed, count
        self.frames = stage.frames if clips else 1
        self.detector = None if faces.weight == 1 else FaceDetector(faces.detector)
        fitting = [(pool, pool.fitting(stage.crop, self.frames)) for pool in part.pools]
        self.pools = [(pool, places) for pool, places in fitting if len(places)]
        size = f"{stage.crop} px" + (f" and {self.frames} frames" if clips else "")
        for pool, places in fitting:
            if not len(places):
                warn_once(f"no sample of {pool.source.path} has {size}: it is not drawn from in this stage")
        if not self.pools:
            raise ValueError(f"no source has a sample with a short side of at least {size}: lower the crop, or add larger ones")
        if (
            faces.weight != 1
            and not faces.detector
            and not any(e.boxes is not None for pool, _ in self.pools for e in pool.entries)
        ):
            warn_once("faces have a weight, but no sample has boxes: give faces.detector, or faces count like the rest")
        self.weights = np.cumsum([pool.source.weight for pool, _ in self.pools])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Item:
        if not 0 <= i < self.count:
            raise IndexError(f"crop {i} of {self.count}")  # which also ends a loop over the crops
        rng = np.random.default_rng((*self.seed, i))
        pool, places = self.pools[int(np.searchsorted(self.weights, rng.random() * self.weights[-1], side="right"))]
        skipped: list[str] = []
        small = 0
        while small + len(skipped) < TRIES and len(skipped) < CORRUPT:
            entry = pool.entries[places[rng.integers(len(places))]]
            try:
                sample = read(pool.source, entry, self.frames, self.stage.crop, rng, self.stage.stride)
            except TooSmall:
                small += 1
                continue
            except Exception as error:  # noqa: BLE001 (whatever a decoder raises on broken bytes)
                skipped.append(f"{entry.key}: {reason(error)}")
                continue
            target, boxes = augment(sample.frames, sample.boxes, self.stage, rng)
            mask = self.detector.mask(target, boxes) if self.detector else torch.zeros_like(target[:, :1], dtype=torch.bool)
            return Item(target, mask, skipped)
        shown = "; ".join(list(dict.fromkeys(skipped))[:3])
        raise ValueError(
            f"{small + len(skipped)} samples of {pool.source.path} in a row cannot be used: {len(skipped)} are corrupt, "
            f"{small} smaller than {max(self.stage.crop, pool.source.min_size)} px. {shown}"
        )


def collate(items: Sequence[Item]) -> Item:
    """A batch: (N, T, 3, crop, crop), (N, T, 1, crop, crop), and all that was skipped."""
    targets, masks, skipped = zip(*items, strict=True)
    return Item(torch.stack(targets), torch.stack(masks), [line for lines in skipped for line in lines])


def pick(sources: Sequence[Source], count: int, frames: int = 8) -> list[Sample]:
    """`count` samples, evenly spread over all sources of both kinds; a clip gives its first frames. For validation.

    A corrupt sample is named in a warning, and the next one takes its place.

    Raises:
        FileNotFoundError, ImportError: as Sources does.
        ValueError: a source is empty, or not one sample can be read.
    """
    opened = [open_source(source, 0, count) for source in sources]
    pools = [source.part(0) if isinstance(source, Stream) else source for source in opened]
    every = [(pool.source, entry) for pool in pools for entry in pool.entries]
    count = min(count, len(every))
    samples: list[Sample] = []
    tried: set[int] = set()
    for place in (int((i + 0.5) * len(every) / count) for i in range(count)):
        while place < len(every) and place not in tried:
            tried.add(place)
            try:
                samples.append(read(*every[place], frames))
                break
            except TooSmall:
                pass
            except Exception as error:  # noqa: BLE001 (whatever a decoder raises on broken bytes)
                log.warning("%s is left out: %s", every[place][1].key, reason(error))
            place += 1
    if not samples:
        raise ValueError(f"not one sample of {', '.join(source.path for source in sources)} can be read")
    return samples
