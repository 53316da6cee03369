"""Measuring decoders on pictures or clips, one at a time: memory does not grow with their number, and a run that was stopped goes on.

Of every sample the frames are brought to one size first; that very tensor is what the encoder sees and what the decoded frames
are compared with (the paper compared differently resized ones, FACTS 7.3). Both are rounded to bytes: what a saved picture has.
"""

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..atomic import reason
from .decoders import Candidate, colour_fit, colour_sums, recoloured
from .encoders import FrozenEncoder
from .metrics import PictureMetric
from .reading import read
from .ready import ReadyLatents
from .samples import Entry, Source, index


@dataclass(frozen=True)
class Settings:
    """What a figure depends on, beside the decoder; a report states all of it, and a run goes on only under the same one."""

    sources: list[Source]
    size: int | None = 256  # short side in px, then the centre square; None: as they are, cut to whole latents
    count: int | None = None  # samples, evenly spread; None: all
    frames: int = 8  # of a clip, its first ones
    chunk: int | None = None  # frames of a clip that one call decodes, as a pipeline's decode_chunk_size; None: all
    shares: list[float] = field(default_factory=lambda: [0.0])  # of the colour table
    seed: int = 0  # of the posterior's samples
    metrics: list[str] = field(default_factory=list)
    features: list[str] = field(default_factory=list)

    @cached_property
    def chosen(self) -> list[tuple[Source, Entry]]:
        """The samples, evenly spread over all sources, which are indexed once. Raises as `index` does."""
        every = [(source, entry) for source in self.sources for entry in index(source).entries]
        count = min(self.count or len(every), len(every))
        return [every[int((i + 0.5) * len(every) / count)] for i in range(count)]


def finite(value: Any) -> float | None:
    """None for what is not there: JSON and CSV know no NaN."""
    return float(value) if math.isfinite(value) else None


def to_bytes(y: Tensor) -> Tensor:
    """[-1, 1] to correctly rounded 0..255."""
    return (y.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def to_floats(x: Tensor) -> Tensor:
    return x.float() / 127.5 - 1


def prepare(frames: Tensor, size: int | None) -> Tensor:
    """Frames (T, 3, H, W) uint8: short side to `size` (bicubic, antialiased) and the centre square; without a size cut to whole latents."""
    height, width = frames.shape[2:]
    if size is not None:
        scale = size / min(height, width)
        height, width = max(size, round(height * scale)), max(size, round(width * scale))
        if (height, width) != tuple(frames.shape[2:]):
            resized = F.interpolate(frames.float(), (height, width), mode="bicubic", antialias=True, align_corners=False)
            frames = resized.round().clamp(0, 255).to(torch.uint8)
    wanted = (size, size) if size is not None else (height // 8 * 8, width // 8 * 8)
    if min(wanted) < 8:
        raise ValueError(f"it is {width}x{height}: smaller than one latent")
    top, left = (height - wanted[0]) // 2, (width - wanted[1]) // 2
    return frames[..., top : top + wanted[0], left : left + wanted[1]]


class Store:
    """Rows and features on disk: a row for each sample, decoder and share, written as soon as a sample is done.

    Raises:
        ValueError: the folder holds a run under another protocol; each difference is named.
    """

    def __init__(self, folder: Path, about: dict[str, Any], width: dict[str, int]) -> None:
        self.folder, self.width = folder, width
        folder.mkdir(parents=True, exist_ok=True)
        told, about = folder / "protocol.json", json.loads(json.dumps(about))
        if told.exists():
            before = json.loads(told.read_text())
            if wrong := [f"{key} was {before.get(key)}, is {about.get(key)}" for key in {**before, **about} if before.get(key) != about.get(key)]:
                raise ValueError(f"{folder} holds an evaluation under another protocol ({'; '.join(wrong)}); give another --out, or --force")
        else:
            told.write_text(json.dumps(about, indent=1) + "\n")
        self.rows: list[dict[str, Any]] = []
        self.fits: dict[str, Tensor] = {}  # share -> sums of all samples
        self.failed: dict[str, str] = {}
        self._resume()

    def _resume(self) -> None:
        """Samples that were written whole; what was half written is dropped."""
        path = self.folder / "samples.jsonl"
        whole = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    whole.append(json.loads(line))
                except json.JSONDecodeError:
                    break
            path.write_text("".join(json.dumps(sample) + "\n" for sample in whole))
        for sample in whole:
            self._take(sample)
        kept = Counter(name for sample in whole for name in sample.get("features", []))
        for name, d in self.width.items():
            for file in self.folder.glob(f"{name}--*.f32"):
                with file.open("r+b") as f:
                    f.truncate(kept[file.stem] * d * 4)
        self.done = {sample["key"] for sample in whole}

    def _take(self, sample: dict[str, Any]) -> None:
        if "error" in sample:
            self.failed[sample["key"]] = sample["error"]
        self.rows += [{"key": sample["key"], **row} for row in sample.get("rows", [])]
        for share, sums in sample.get("fits", {}).items():
            self.fits[share] = self.fits.get(share, torch.zeros(28, dtype=torch.float64)) + torch.tensor(sums, dtype=torch.float64)

    def add(self, sample: dict[str, Any], features: dict[str, Tensor]) -> None:
        """Features first: a sample counts once its line is there."""
        for name, values in features.items():
            with (self.folder / f"{name}.f32").open("ab") as f:
                f.write(values.float().contiguous().numpy().tobytes())
        sample = {**sample, "features": [name for name, values in features.items() for _ in range(len(values))]}
        with (self.folder / "samples.jsonl").open("a") as f:
            f.write(json.dumps(sample) + "\n")
        self._take(sample)

    def features(self, name: str, network: str) -> np.ndarray:
        """(n, d) float32, mapped from the disk, of one network's features of "truth" or of a decoder's pictures."""
        path = self.folder / f"{network}--{name}.f32"
        if not path.exists() or not path.stat().st_size:
            return np.zeros((0, self.width[network]), np.float32)
        return np.memmap(path, np.float32, "r").reshape(-1, self.width[network])

    def write_csv(self) -> Path:
        """Every row, one a line: what anyone can compute again from."""
        path = self.folder / "pictures.csv"
        columns = dict.fromkeys(key for row in self.rows for key in row)
        with path.open("w", newline="") as f:
            writer = csv.DictWriter(f, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        return path


def slug(decoder: str, share: float) -> str:
    """A file name of its own for a decoder at a share of the table."""
    readable = "".join(c if c.isalnum() or c in "-." else "_" for c in decoder)[-60:]
    return f"{readable}-{hashlib.sha256(decoder.encode()).hexdigest()[:6]}-{share:g}"


class Network(Protocol):
    """Features of a sample's frames (T, 3, H, W) uint8: (n, d), for distances of distributions."""

    d: int
    title: str

    def extract(self, pictures: Tensor, /) -> Tensor: ...


@dataclass
class Tools:
    """What measures: opened once, for all samples."""

    metrics: dict[str, PictureMetric]
    video: dict[str, Callable[[Tensor, Tensor], float]]
    features: dict[str, Network]


@dataclass
class Eyes:
    """Where the truth and its latents come from.

    Args:
        encoder: makes the latents, or reads them.
        reference: decoder whose pictures stand in the truth's place, where samples are nothing but latents.
    """

    encoder: FrozenEncoder | ReadyLatents
    reference: Candidate | None = None

    def look(self, protocol: Settings, source: Source, entry: Entry) -> tuple[Tensor, Tensor, Tensor | float]:
        """The frames (T, 3, H, W) uint8 that are the truth, their scaled latents, and what all of the colour table would add to those.

        Raises:
            ValueError: ready latents and their picture differ in size.
            Exception: the sample is corrupt.
        """
        if self.reference:
            assert isinstance(self.encoder, ReadyLatents)
            z = self.encoder.read(entry)
            return to_bytes(self.reference.decode(z, frames_of(source, z))), z, 0.0
        x = prepare(read(source, entry, protocol.frames).frames, protocol.size)
        if isinstance(self.encoder, ReadyLatents):
            z = self.encoder.read(entry)
            z = z[: len(x)] if source.kind == "clips" else z
            if (len(x), *(n // 8 for n in x.shape[2:])) != (len(z), *z.shape[2:]):
                raise ValueError(f"its latents {tuple(z.shape)} and its frames {tuple(x.shape)} do not belong together")
            return x, z, 0.0
        seed = int.from_bytes(hashlib.sha256(f"{protocol.seed} {entry.key}".encode()).digest()[:8], "big") >> 1
        z = self.encoder.encode(to_floats(x), torch.Generator().manual_seed(seed))
        return x, z, self.encoder.table_at(to_floats(x))


def frames_of(source: Source, z: Tensor) -> int:
    """Frames that are decoded as one clip: latents are one clip or single pictures."""
    return len(z) if source.kind.endswith("clips") else 1


def decode_sample(
    protocol: Settings, eyes: Eyes, candidates: Sequence[Candidate], source: Source, entry: Entry
) -> tuple[Tensor, Iterator[tuple[Candidate, float, Tensor]]]:
    """The truth (T, 3, H, W) uint8, and what each decoder makes of its latents at each share of the colour table, in [-1, 1]."""
    x, z, table = eyes.look(protocol, source, entry)

    def decode(candidate: Candidate, z: Tensor) -> Tensor:
        frames = frames_of(source, z)
        chunks = z.split(protocol.chunk) if protocol.chunk and frames > 1 else [z]
        return torch.cat([candidate.decode(part, min(frames, len(part))) for part in chunks])

    return x, ((candidate, share, decode(candidate, z + share * table)) for share in protocol.shares for candidate in candidates)


def measure(
    protocol: Settings,
    eyes: Eyes,
    candidates: Sequence[Candidate],
    tools: Tools,
    store: Store,
    fitted: str | None = None,
) -> Iterator[str]:
    """Measures every sample that the store does not hold yet; yields each one's key when it is done.

    A sample that cannot be read is recorded with its reason, and the others go on.

    Args:
        fitted: name of the decoder whose best affine change of colour will be asked for.
    """
    for source, entry in protocol.chosen:
        if entry.key in store.done:
            continue
        try:
            x, decoded = decode_sample(protocol, eyes, candidates, source, entry)
        except Exception as error:  # noqa: BLE001 (whatever a reader raises on broken bytes)
            store.add({"key": entry.key, "error": reason(error)}, {})
            yield entry.key
            continue
        rows: list[dict[str, Any]] = []
        fits: dict[str, list[float]] = {}
        features = {f"{name}--truth": network.extract(x) for name, network in tools.features.items()}
        for candidate, share, y in decoded:
            if candidate.name == fitted:
                fits[f"{share:g}"] = colour_sums(y, to_floats(x))
            made = to_bytes(y)
            row = {"decoder": candidate.name, "share": share, "frames": len(x), "height": x.shape[2], "width": x.shape[3]}
            row |= {name: finite(np.mean(metric(made, x))) for name, metric in tools.metrics.items()}
            if len(x) > 1:
                row |= {name: finite(metric(made, x)) for name, metric in tools.video.items()}
            rows.append(row)
            features |= {f"{name}--{slug(candidate.name, share)}": network.extract(made) for name, network in tools.features.items()}
        store.add({"key": entry.key, "rows": rows, "fits": fits}, features)
        yield entry.key


def measure_recoloured(protocol: Settings, eyes: Eyes, candidate: Candidate, tools: Tools, store: Store) -> Iterator[str]:
    """Measures the fitted decoder once more, at each share with its best affine change of colour; its rows join the store's."""
    for share in protocol.shares:
        matrix = colour_fit(store.fits[f"{share:g}"])
        changed = recoloured(candidate, matrix)
        one = replace(protocol, shares=[share], features=[])
        told = {**about(one, eyes, "", [changed]), "matrix": matrix.tolist()}
        own = Store(store.folder / f"{slug(changed.name, share)}", told, {})
        yield from measure(one, eyes, [changed], replace(tools, features={}), own)
        store.rows += own.rows


def about(protocol: Settings, eyes: Eyes, posterior: str, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """All that the figures depend on."""
    return {
        **asdict(protocol),
        "encoder": {"name": eyes.encoder.name, "weights": eyes.encoder.hash, "posterior": posterior},
        **({"reference": {eyes.reference.name: eyes.reference.hash}} if eyes.reference else {}),
        "decoders": {candidate.name: candidate.hash for candidate in candidates},
    }
