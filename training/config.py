"""Configuration of a run: frozen dataclasses from YAML, changed by key=value. Types are checked, unknown keys are errors."""

import difflib
from collections.abc import Iterable
from dataclasses import field, fields
from glob import glob
from pathlib import Path
from typing import Any, Literal

import yaml
from losses import PERCEPTUAL, PIXEL
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class StandIn:
    """What makes a stand-in encoder's latents resemble the real one's (DESIGN 5). Everything is off for a real VAE."""

    redraw: bool = True  # draw the encoder's weights anew inside their float8 rounding box, for every shard
    colour_table: str | None = None  # what the real encoder adds to flat colours
    table_share: tuple[float, float] = (0.2, 0.8)  # of that table, drawn per sample
    colours: str | None = None  # real latents of flat colours
    transplants: float = 0.125  # share of samples with a real colour
    noise: float = 0.03  # largest standard deviation of the noise on latents, drawn per sample


@dataclass(frozen=True, config=STRICT)
class Gan:
    """The adversarial term (equation 1): gamma * H(step - t0)."""

    weight: float = 0.0  # gamma; the paper's 0.8 stands for the adaptive form
    start: int = 10_000  # t0; until then neither decoder nor discriminator sees the other
    kind: Literal["hinge", "least_squares", "relativistic"] = "hinge"
    adaptive: bool = True  # weight times the ratio of gradients at the last layer; false is the literal form
    lr: float = 2e-4
    memory: int = 512  # earlier fakes, which are half of those it learns from


@dataclass(frozen=True, config=STRICT)
class Config:
    decoder: dict[str, Any]  # class name and configuration of the decoder
    out: str  # folder of checkpoints, log and the finished model
    pictures: list[str]  # patterns of WebDataset shards
    val_pictures: list[str]
    val_count: int = 24
    val_every: int = 1000
    baseline: str | None = None  # preset to compare with
    stand_in: StandIn = StandIn()

    seed: int = 0
    steps: int = 10_000
    crops: list[tuple[float, int, int]] = field(default_factory=lambda: [(0.0, 128, 8)])  # [from this share of the run, px, batch]
    shard: int = 2048  # crops whose latents are made at once, with one draw of the encoder's weights
    epochs_per_shard: int = 3

    losses: dict[str, float] = field(default_factory=lambda: {"l1": 1.0, "stlpips": 0.3})  # term -> weight; 0 switches it off
    perceptual_share: dict[str, float] = field(default_factory=dict)  # term -> share of a batch that it sees; else all
    squeezenet: str | None = None  # weights of SqueezeNet 1.1 for the term "squeeze"
    gan: Gan = Gan()

    lr: float = 1e-3
    final_lr: float = 0.02  # share of lr at the end of the cosine
    warmup: int = 200
    weight_decay: float = 1e-4
    clip: float = 1.0  # gradient norm
    ema: float = 0.999
    save_every: int = 250

    def __post_init__(self) -> None:
        known = {*PIXEL, *PERCEPTUAL}
        for where, names in (("losses", self.losses), ("perceptual_share", self.perceptual_share)):
            for name in names:
                if name not in known:
                    raise ValueError(unknown(name, known, where))
        if not self.crops or self.crops[0][0] != 0:
            raise ValueError(f"crops must begin at share 0 of the run, got {self.crops}")


def unknown(name: str, known: Iterable[str], where: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown key {name!r} in {where}" + (f": did you mean {near[0]}?" if near else ".") + f" The keys are {', '.join(sorted(known))}"


def read_config(path: str, changes: list[str]) -> Config:
    """The YAML file at `path`, with changes of the form key=value; stand_in.noise=0 reaches inside.

    Raises:
        SystemExit: a key that does not exist, or a value of another type; each is named, with the nearest right key.
    """
    values = yaml.safe_load(Path(path).read_text())
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise SystemExit(f"expected key=value, got {change!r}")
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise SystemExit(f"{key}: {parent} holds no keys of its own")
        place[last] = yaml.safe_load(value)
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        raise SystemExit("\n".join(explain(problem, path) for problem in error.errors())) from None


def explain(problem: Any, path: str) -> str:
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "unexpected_keyword_argument":
        section = {"stand_in": StandIn, "gan": Gan}.get(problem["loc"][0], Config) if len(problem["loc"]) > 1 else Config
        return unknown(problem["loc"][-1], [f.name for f in fields(section)], path)
    if problem["type"] in ("missing", "missing_argument"):
        return f"{path} lacks {place}"
    if not place:
        return f"{path}: {problem['msg'].removeprefix('Value error, ')}"
    return f"{path}: {place} is {problem['input']!r}. {problem['msg']}"


def expand(patterns: list[str]) -> list[str]:
    return sorted(path for pattern in patterns for path in glob(pattern))
