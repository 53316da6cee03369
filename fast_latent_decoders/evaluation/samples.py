"""Where samples lie: an index of tar shards and folders, filtered by metadata. Nothing is decoded here and no picture is kept.

Metadata are the .json beside a sample, as img2dataset writes it. Read are:
    width, height           of the stored picture in px
    frames                  of a clip
    aesthetic               or AESTHETIC_SCORE, aesthetic_score
    face                    true where a face is
    boxes                   or faces, face_bboxes: [[x0, y0, x1, y1], ...] of the faces, in px of the upright stored picture or, if
                            none is above 1, in shares of its sides; a string that holds such a list will do
    file, class             the sample's file before it was packed, and its class; else its key and its folder
"""

import glob
import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple

import numpy as np

from ..files import READERS

log = logging.getLogger(__name__)

Kind = Literal["pictures", "clips", "latents", "latent clips"]
LATENTS = tuple(suffix[1:] for suffix in READERS)
SUFFIXES = {
    "pictures": ("jpg", "jpeg", "png", "webp"),
    "clips": ("mp4", "avi", "webm", "mov"),
    "latents": LATENTS,  # to be evaluated where there is no truth; nothing is trained on them
    "latent clips": LATENTS,
}


@dataclass(frozen=True)
class Source:
    """Where pictures or clips come from."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # a training configuration checks its keys

    path: str  # pattern of .tar shards (WebDataset, img2dataset), a folder, or, for training, hf:OWNER/NAME[:SPLIT], streamed
    kind: Kind = "pictures"
    weight: float = 1.0  # how often it is drawn from, beside the others of its kind
    min_size: int = 0  # short side in px
    aesthetic: tuple[float, float] | None = None  # scores to keep, both ends included
    faces: bool = False  # only samples whose metadata tell of a face
    names: str | None = None  # file that lists the samples to keep, such as UCF-101's trainlist01.txt
    classes: list[str] | None = None  # classes to keep


class Entry(NamedTuple):
    """Where one sample lies, and what the metadata say; zeros and None where they say nothing."""

    key: str  # shard.tar:key, or the file's path
    place: tuple[str, int, int] | bytes  # file, offset and size (-1: all of it), or the encoded sample itself
    side: int = 0  # px, the shorter one
    frames: int = 0
    boxes: np.ndarray | None = None  # (n, 4) float32 as in the metadata

    def open(self) -> BinaryIO:
        """Its encoded bytes. Raises OSError when the file has changed or ends too early."""
        if isinstance(self.place, bytes):
            return io.BytesIO(self.place)
        path, offset, size = self.place
        file = Path(path).open("rb")  # noqa: SIM115 (the reader closes it)
        if size < 0:
            return file
        with file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"the shard ends after {len(data)} of its {size} bytes")
        return io.BytesIO(data)


@dataclass
class Pool:
    """The samples of one source that passed its filters."""

    source: Source
    entries: list[Entry]
    sides: np.ndarray = field(init=False)
    frames: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.sides = np.array([entry.side for entry in self.entries], np.int32)
        self.frames = np.array([entry.frames for entry in self.entries], np.int32)

    def fitting(self, side: int, frames: int) -> np.ndarray:
        """Indices of the entries that may be as large and as long; where the metadata are silent, decoding will tell."""
        large = (self.sides == 0) | (self.sides >= max(side, self.source.min_size))
        return np.flatnonzero(large & ((self.frames == 0) | (self.frames >= frames)))


class Gate:
    """The filters of a source, and how many samples each of them left out."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.left_out: Counter[str] = Counter()
        self.broken = 0
        self.names = read_names(source.names) if source.names else None

    def entry(self, key: str, place: tuple[str, int, int] | bytes, metadata: Any, name: str) -> Entry | None:
        """The sample if it passes and its metadata are a dict that can be understood. `name` is its file with folders, for the filters by name and class."""
        try:
            side = min(int(metadata.get(side) or 0) for side in ("width", "height"))
            frames, boxes = int(metadata.get("frames") or 0), face_boxes(metadata)
            score = next((metadata[k] for k in ("AESTHETIC_SCORE", "aesthetic_score", "aesthetic") if k in metadata), None)
            score = float("nan") if score is None else float(score)
        except (ValueError, TypeError, AttributeError):
            self.broken += 1
            return None
        failed = self._failed(metadata, Path(name), side, boxes, score)
        if failed:
            self.left_out[failed] += 1
            return None
        return Entry(key, place, side, frames, boxes)

    def _failed(self, metadata: dict[str, Any], name: Path, side: int, boxes: np.ndarray | None, score: float) -> str | None:
        source = self.source
        if side and side < source.min_size:
            return f"min_size {source.min_size}"
        if source.aesthetic and not source.aesthetic[0] <= score <= source.aesthetic[1]:
            return "aesthetic {:g} to {:g}".format(*source.aesthetic)
        if source.faces and not (metadata.get("face") is True or (boxes is not None and len(boxes))):
            return "faces"
        if self.names is not None and not self.names & {name.stem, Path(str(metadata.get("file") or name)).stem}:
            return f"names {source.names}"
        if source.classes is not None and metadata.get("class", name.parent.name) not in source.classes:
            return f"classes {source.classes}"
        return None

    def check(self, kept: int) -> None:
        """Raises ValueError with a sentence when nothing is left; says how many samples had broken metadata."""
        path, kind = self.source.path, self.source.kind
        if self.broken:
            log.warning("%s: %d samples are left out, their metadata cannot be read", path, self.broken)
        if kept:
            return
        if self.left_out:
            filters = ", ".join(f"{name} left out {count}" for name, count in self.left_out.most_common())
            raise ValueError(f"the filters leave none of the {kind} of {path}: {filters}")
        suffixes = ", ".join(f".{suffix}" for suffix in SUFFIXES[kind])
        raise ValueError(f"{path} holds no {kind}: expected files or tar members KEY{suffixes.replace(', ', ', KEY')}")


def read_names(path: str) -> set[str]:
    """The stems of a list such as UCF-101's trainlist01.txt: one file a line, perhaps followed by a class number."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise FileNotFoundError(f"the list of names {path} cannot be read: {error.strerror}") from error
    return {Path(line.split()[0]).stem for line in lines if line.strip()}


def face_boxes(metadata: dict[str, Any]) -> np.ndarray | None:
    """(n, 4) float32 as in the metadata. Raises ValueError if they are not boxes."""
    value = next(
        (metadata[name] for name in ("boxes", "faces", "face_bboxes") if isinstance(metadata.get(name), (list, str))), None
    )
    if value is None:
        return None
    boxes = np.array(json.loads(value) if isinstance(value, str) else value, np.float32)
    if boxes.size and (boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all()):
        raise ValueError(f"expected boxes [[x0, y0, x1, y1], ...], got shape {boxes.shape}")
    return boxes.reshape(-1, 4)


def index(source: Source) -> Pool:
    """Every sample of a local source that passes its filters, in the order of the paths.

    Raises:
        FileNotFoundError: the path matches nothing.
        ValueError: nothing that passes the filters was found; the message names the filter.
    """
    from braceexpand import braceexpand
    from tqdm import tqdm

    paths = [match for pattern in braceexpand(source.path) for match in sorted(glob.glob(pattern, recursive=True))]
    if not paths:
        raise FileNotFoundError(f"{source.path} matches no file or folder: expected tar shards or a folder of {source.kind}")
    gate = Gate(source)
    entries: list[Entry] = []
    for path in tqdm(paths, desc=f"index of {source.path}", leave=False, disable=None):
        samples = (
            tar_samples(path, SUFFIXES[source.kind]) if path.endswith(".tar") else folder_samples(path, SUFFIXES[source.kind])
        )
        for key, place, text, name in samples:
            try:
                metadata = json.loads(text) if text else {}
            except ValueError:  # of which JSON's and Unicode's errors are kinds
                metadata = None
            entry = gate.entry(key, place, metadata, name)
            if entry is not None:
                entries.append(entry)
    gate.check(len(entries))
    return Pool(source, entries)


Raw = tuple[str, tuple[str, int, int], bytes, str]  # key, place, text of the metadata, file name


def tar_samples(path: str, suffixes: tuple[str, ...]) -> Iterator[Raw]:
    """The samples of a WebDataset shard: members KEY.SUFFIX and KEY.json, KEY ending at the first dot of the file's name."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    with Path(path).open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # or the tar would keep all headers
                    folder, slash, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    if member.isfile() and stem:
                        groups.setdefault(folder + slash + stem, {})[suffix.lower()] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            log.warning("%s is no whole, uncompressed tar (%s); %d samples were found in it", path, error, len(groups))
        for key, members in groups.items():
            media = next((suffix for suffix in suffixes if suffix in members), None)
            if media is None:
                continue
            text = b""
            if "json" in members:
                offset, size = members["json"]
                file.seek(offset)
                text = file.read(size)
            yield f"{Path(path).name}:{key}", (path, *members[media]), text, f"{key}.{media}"


def folder_samples(path: str, suffixes: tuple[str, ...]) -> Iterator[Raw]:
    """The files of a folder and the folders in it, each with KEY.json beside it if there is one; or the one file `path`."""
    files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
    sidecars = {file for file in files if file.suffix == ".json"}
    for file in files:
        if file.suffix.lower()[1:] in suffixes and not file.name.startswith(".") and file.is_file():
            sidecar = file.with_suffix(".json")
            yield str(file), (str(file), 0, -1), sidecar.read_bytes() if sidecar in sidecars else b"", str(file)
