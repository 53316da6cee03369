"""Samples of a Hugging Face data set that is streamed, a part at a time."""

import io
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from fast_latent_decoders.evaluation.samples import SUFFIXES, Entry, Gate, Pool, Source

log = logging.getLogger(__name__)


class Stream:
    """A source hf:OWNER/NAME[:SPLIT], of which no more than `per_part` samples are held, encoded, at a time.

    A stream has no random access: part k is read from the start of one of its shards on, and what is drawn within a part has
    random access again. So a run that is stopped resumes by reading its part anew.

    Raises:
        ImportError: the package `datasets` is not installed.
        ValueError: the data set cannot be opened.
    """

    def __init__(self, source: Source, seed: int, per_part: int) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(f"{source.path} needs the package datasets: pip install 'fast-latent-decoders[train]'") from error
        self.source, self.seed, self.per_part = source, seed, per_part
        name, _, split = source.path.removeprefix("hf:").partition(":")
        try:
            self.rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        except Exception as error:  # no network, no such data set, no such split: a type of its own for each
            raise ValueError(f"{source.path} cannot be opened: {error}") from error
        if self.rows.features:
            self.rows = self.rows.decode(False)  # the bytes as they are
        log.warning(
            "%s is streamed: a run that was stopped resumes at the start of a shard of latents, reading its part anew",
            source.path,
        )

    def part(self, k: int) -> Pool:
        """The samples of part k: a function of (seed, k), and of the data set.

        The shards are read in turn, in another order each round; each round goes on where the last one ended in a shard, and
        begins again once it is exhausted.

        Raises:
            ValueError: no sample passes the filters.
        """
        shards = self.rows.num_shards
        turn, place = divmod(k, shards)
        shard = int(np.random.default_rng((self.seed, turn)).permutation(shards)[place])
        gate = Gate(self.source)
        entries = list(islice(self._entries(shard, gate), turn * self.per_part, (turn + 1) * self.per_part))
        if not entries and turn:
            gate = Gate(self.source)
            entries = list(islice(self._entries(shard, gate), self.per_part))
        gate.check(len(entries))
        return Pool(self.source, entries)

    def _entries(self, shard: int, gate: Gate) -> Iterator[Entry]:
        rows = self.rows.shard(num_shards=self.rows.num_shards, index=shard) if self.rows.num_shards > 1 else self.rows
        for number, row in enumerate(rows):
            metadata = {**row, **(row["json"] if isinstance(row.get("json"), dict) else {})}
            # Columns named as files end come first, then any that holds a file.
            columns = [name for name in (*SUFFIXES[self.source.kind], "image", "video") if name in row]
            data = next((data for name in (*columns, *row) if (data := encoded(row[name]))), None)
            if data is None:
                gate.broken += 1
                continue
            key = str(row.get("__key__") or f"{shard}/{number}")
            entry = gate.entry(f"{self.source.path}:{key}", data, metadata, key)
            if entry is not None:
                yield entry


def encoded(value: Any) -> bytes | None:
    """The bytes of an encoded picture or clip, as `datasets` hands them over; None for any other value."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and value.get("bytes"):
        return value["bytes"]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        import fsspec

        with fsspec.open(value["path"]) as file:
            return file.read()
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return buffer.getvalue()
    return None
