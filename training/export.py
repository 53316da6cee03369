"""The end of a run: a folder with weights in float16, configuration, card and record, loaded back and compared."""

import copy
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from card import make_card, place_of

from fast_latent_decoders import FastDecoder
from fast_latent_decoders.evaluation.machine import processor_name

if TYPE_CHECKING:
    from config import Config


def read_log(out: Path) -> list[dict[str, Any]]:
    """The entries of a run's log.jsonl. Lines that are not whole (a run that is being written, or was killed) are left out.

    Raises:
        FileNotFoundError: there is no log.jsonl.
    """
    entries = []
    for line in (out / "log.jsonl").read_text(errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


def summary(out: Path) -> dict[str, Any]:
    """What run.json says of a run, from its log: every start's configuration, steps, hours, last measurement, baseline, data.

    Hours are those between the entries of each start; from the start itself on, if its entry has a time.
    """
    entries = read_log(out)
    seconds = 0.0
    for a, b in pairwise([entry for entry in entries if "config" in entry or "norm" in entry]):
        if "norm" in b and "time" in a and "time" in b:  # what lies before a start is a pause
            seconds += b["time"] - a["time"]
    found: dict[str, Any] = {
        "starts": [entry for entry in entries if "config" in entry],
        "steps": max((entry["step"] for entry in entries if "norm" in entry), default=0),
        "hours": round(seconds / 3600, 2),
        "val": next((entry["val"] for entry in reversed(entries) if "val" in entry), {}),
    }
    for entry in entries:
        found.update(entry["data"] if isinstance(entry.get("data"), dict) else {})  # samples, skipped, encoder, machine
        found.update({"baseline": entry["baseline"]} if "baseline" in entry else {})
    return found


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and is removed when it does not.

    Until then, and if anything fails, what was at `path` stays as it was.
    """
    temporary, old = (path.with_name(f".fld-{uuid.uuid4().hex[:12]}.{end}") for end in ("part", "old"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not path.exists():
            os.replace(temporary, path)
            return
        os.replace(path, old)  # a folder that is not empty cannot be replaced in one step
        try:
            os.replace(temporary, path)
        except BaseException:
            os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def machine() -> str:
    """What this process computes on: the accelerators, or the processor with its threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def compare(mine: FastDecoder, folder: Path) -> None:
    """Loads the folder and compares.

    Raises:
        ValueError: a tensor or the decode of fixed latents differs, or a weight is not finite.
    """
    loaded = FastDecoder.from_pretrained(folder, torch_dtype=torch.float16)
    theirs = loaded.state_dict()
    for key, value in mine.state_dict().items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{key} is not finite in float16; the export is not written")
        if value.dtype != theirs[key].dtype or not torch.equal(value, theirs[key]):
            raise ValueError(f"{key} in {folder} is not what was saved; the export is not written")
    z = torch.randn(1, mine.config.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        a, b = (decoder.float().eval().decode(z / decoder.latent_space.scaling_factor).sample for decoder in (mine, loaded))
    if not torch.equal(a, b):
        raise ValueError(
            f"the decoder loaded from {folder} decodes otherwise, by up to {(a - b).abs().max():.2g}; the export is not written"
        )


def write_export(out: Path, model: FastDecoder, c: "Config", summary: dict[str, Any]) -> Path:
    """Writes <out>/export, which `FastDecoder.from_pretrained` loads: weights in float16, config.json, run.json, README.md.

    An export that is there already is the run's own earlier one and is replaced, whole or not at all.

    Args:
        model: holds the weights to be kept (the average, branches folded), of any dtype and device; it is not changed.
        summary: what `summary(out)` returns; every key may be missing.

    Returns:
        The folder.

    Raises:
        ValueError: the folder, loaded back, is not the model; or weights are not finite in float16.
    """
    target = out / "export"
    half = copy.deepcopy(model)
    half.decoder.to("cpu", torch.float16).to(memory_format=torch.contiguous_format)  # ModelMixin's own logs a warning (CONTRACT 7.11)
    where = summary.get("machine") or machine()
    versions = {"python": platform.python_version()} | {
        p: version(p) for p in ("fast-latent-decoders", "torch", "diffusers", "accelerate")
    }
    earlier = place_of(c.init) / "run.json" if c.init else None
    if earlier and earlier.exists() and "before" not in summary:  # weights that were trained before
        summary = {**summary, "before": json.loads(earlier.read_text())}
    run = {**summary, "machine": where, "versions": versions}
    with whole_folder(target) as folder:
        half.save_pretrained(folder)
        (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n")
        (folder / "README.md").write_text(make_card(c, model, summary, where, load=target.as_posix()))
        compare(half, folder)
    return target
