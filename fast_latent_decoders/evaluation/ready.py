"""Latents that are there already, in place of an encoder: those of known pictures, or of pictures that nobody has seen."""

import hashlib
from pathlib import Path

from torch import Tensor

from ..atomic import FileError
from ..files import READERS, read_latents
from ..latent_space import LatentSpace
from .samples import Entry


class ReadyLatents:
    """Files of latents, scaled as they are read.

    Args:
        folder: where a picture's latents lie under the picture's stem; None: the samples themselves are files of latents.
        scaled: units of files that do not tell theirs.
    """

    colours = None

    def __init__(self, space: LatentSpace, folder: Path | None = None, *, scaled: bool = False) -> None:
        self.space, self.folder, self.scaled = space, folder, scaled
        self.name = f"ready latents of {folder}" if folder else "ready latents"
        self.hash = hashlib.sha256(f"{folder} {scaled}".encode()).hexdigest()[:16]
        self.doubts: dict[str, str] = {}  # file -> why its units may be others

    def read(self, entry: Entry) -> Tensor:
        """(N, C, h, w), scaled.

        Raises:
            FileError: there is no such file, or it is broken.
            ValueError: the latents are of another space.
        """
        path = self._path(entry)
        latents = read_latents(path)
        if latents.latent_space not in (None, self.space.name) or latents.tensor.shape[1] != self.space.channels:
            kind = latents.latent_space or f"{latents.tensor.shape[1]}-channel"
            raise ValueError(f"{path} holds {kind} latents, and the decoders are for {self.space.name}")
        if doubt := latents.doubt(self.space, scaled=self.scaled):
            self.doubts[str(path)] = doubt
        z = latents.in_vae_units(self.space, scaled=self.scaled)
        return (z - self.space.shift_factor) * self.space.scaling_factor

    def _path(self, entry: Entry) -> Path:
        if self.folder is None:
            if isinstance(entry.place, bytes) or entry.place[2] >= 0:
                raise ValueError("latents are read from files of their own: unpack the shard")
            return Path(entry.place[0])
        stem = Path(entry.key.rpartition(":")[2]).stem
        for suffix in READERS:
            if (path := self.folder / f"{stem}{suffix}").is_file():
                return path
        raise FileError(f"{self.folder} holds no latents {stem}{{{','.join(READERS)}}}")
