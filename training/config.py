"""Configuration of a run: frozen dataclasses from YAML, changed by key=value. Types are checked, unknown keys are errors."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from losses import TERMS
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fast_latent_decoders import FastDecoder
from fast_latent_decoders.evaluation.encoders import Encoder, StandIn
from fast_latent_decoders.evaluation.samples import Source

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class Stage:
    """A part of the run: sizes, and how much the crops are changed before they are encoded (progressive augmentation)."""

    start: float = 0.0  # share of the run
    crop: int = 128  # px, a multiple of 8
    batch: int = 8  # crops a step and process
    reduce: float = 3.0  # pictures are reduced by up to this; half of the crops are not
    flip: float = 0.5  # share of crops that are mirrored
    colour: float = 0.05  # share of crops that pass through a random colour matrix
    grey: float = 0.0  # share of crops that lose their colours
    jpeg: float = 0.0  # share of crops that are compressed and read back
    vivid: float = 0.0  # share of crops that are sharpened and get more colour and contrast, as generated pictures have them
    clips: float = 0.0  # share of steps that train on clips
    clip_batch: int = 1  # clips a step and process
    frames: int = 8  # consecutive frames of a clip
    stride: int = 3  # every n-th frame of the source, n drawn up to this


@dataclass(frozen=True, config=STRICT)
class Gan:
    """The adversarial term (equation 1): gamma * H(step - t0)."""

    weight: float = 0.0  # gamma; the paper's 0.8 stands for the adaptive form
    start: int = 10_000  # t0; until then neither decoder nor discriminator sees the other
    kind: Literal["hinge", "least_squares", "relativistic"] = "hinge"
    adaptive: bool = True  # weight times the ratio of gradients at the last layer; false is the literal form
    normalised: bool = False  # each picture's gradient to one length before it enters the decoder (seraena); excludes adaptive
    lr: float = 2e-4
    memory: int = 512  # earlier fakes, which are half of those it learns from


@dataclass(frozen=True, config=STRICT)
class Teacher:
    """Another decoder of the same latents, to be imitated on latents that need no true picture."""

    path: str | None = None  # preset, folder or Hub id of a FastDecoder, AutoencoderTiny or AutoencoderKL
    output: float = 0.0  # weight of the L1 distance to its pictures
    losses: dict[str, float] = field(default_factory=dict)  # term of single pictures -> weight, between its pictures and the decoder's
    features: float = 0.0  # weight of the distance to its attention maps at 1/8, 1/4 and 1/2
    latents: list[Literal["real", "noisy", "mixed", "recoloured", "widened"]] = field(default_factory=lambda: ["real"])  # one kind a step, in turn
    structure: bool = False  # leave the means over squares out of the output term: a teacher's colours may be wrong
    means: int = 8  # px: side of those squares
    share: float = 0.25  # of a batch, on average: whole pictures or clips


@dataclass(frozen=True, config=STRICT)
class Faces:
    """More weight for faces in the pixel terms."""

    weight: float = 1.0  # of a pixel in a face; 1 switches it off
    detector: str | None = None  # YuNet's .onnx, for samples whose metadata have no boxes


@dataclass(frozen=True, config=STRICT)
class Config:
    decoder: dict[str, Any]  # class name and configuration of the decoder
    out: str  # folder of checkpoints, log and the finished model
    data: list[Source]
    val: list[Source]
    val_count: int = 24
    val_every: int = 1000
    baseline: str | None = None  # preset to compare with
    init: str | None = None  # preset or folder whose weights are the first ones; a narrower or shallower one is grown
    warm_start: str | None = None  # export whose weights and step this run goes on from, where no checkpoint was kept
    branches: bool = False  # train every 3x3 convolution as 3x3 + 1x1 + identity; folded when the run ends

    encoder: Encoder = Encoder()
    stand_in: StandIn = StandIn()
    cache: str | None = None  # shards of latents made by latents.py; without, they are made as the run goes
    shard: int = 2048  # crops (of 128 px) whose latents are made at once
    reuse: int = 3  # times that each crop is used before the next shard is made
    workers: int = 2  # processes that read and crop

    seed: int = 0
    steps: int = 10_000
    stages: list[Stage] = field(default_factory=lambda: [Stage()])
    losses: dict[str, float] = field(default_factory=lambda: {"l1": 1.0, "stlpips": 0.3})  # term -> weight; 0 switches it off
    perceptual_share: dict[str, float] = field(default_factory=dict)  # perceptual term -> share of a batch that it sees; else all
    squeezenet: str | None = None  # weights of SqueezeNet 1.1 for the term "squeeze"
    faces: Faces = Faces()
    gan: Gan = Gan()
    teacher: Teacher = Teacher()

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: of the convolutions between the first and the last one
    lr: float = 1e-3
    final_lr: float = 0.02  # share of lr at the end of the cosine
    warmup: int = 200
    weight_decay: float = 1e-4
    clip: float = 1.0  # gradient norm
    accumulate: int = 1  # batches a step
    ema: float = 0.999
    compile: bool = False  # torch.compile the decoder
    save_every: int = 250
    trackers: list[str] = field(default_factory=list)  # of Accelerate, such as tensorboard

    def __post_init__(self) -> None:
        every = [name for group in TERMS.values() for name in group]
        terms: list[tuple[str, dict[str, float], Sequence[str]]] = [
            ("losses", self.losses, every),
            ("perceptual_share", self.perceptual_share, TERMS["perceptual"]),
            ("teacher.losses", self.teacher.losses, [*TERMS["pixels"], *TERMS["perceptual"]]),
        ]
        for where, names, known in terms:
            for name in names:
                if name not in known:
                    raise ValueError(unknown(name, known, where))
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] != 0 or starts != sorted(starts):
            raise ValueError(f"stages must begin at start 0 and follow each other, got {starts}")
        if bad := [stage.crop for stage in self.stages if stage.crop % 8 or stage.crop < 16]:
            raise ValueError(f"crops must be multiples of 8 px, at least 16; got {bad}")
        if self.teacher.means < 1:
            raise ValueError(f"teacher.means must be at least 1 px, got {self.teacher.means}")
        if self.teacher.structure and (bad := [stage.crop for stage in self.stages if stage.crop % self.teacher.means]):
            raise ValueError(f"crops must be multiples of teacher.means, {self.teacher.means} px; got {bad}")
        if latents := [source.path for source in (*self.data, *self.val) if source.kind.startswith("latent")]:
            raise ValueError(f"{latents[0]} is of latents: a decoder is trained and measured on pictures or clips")
        if self.gan.normalised and self.gan.adaptive:
            raise ValueError("gan.normalised sets the gradient's length itself: give gan.adaptive=false with it")
        if self.losses.get("flat") and not self.stand_in.colours:
            raise ValueError("the term flat needs stand_in.colours, a file of latents of flat colours")
        if self.init and self.warm_start:
            raise ValueError("init begins a new run with given weights, warm_start goes on with one: give one of them")
        kinds = {source.kind for source in self.data}
        wanted = {"clips" for s in self.stages if s.clips > 0} | {"pictures" for s in self.stages if s.clips < 1}
        if missing := sorted(wanted - kinds):
            raise ValueError(f"the stages train on {' and '.join(missing)}, and no source under data has kind: {missing[0]}")


SECTIONS = {
    "data": Source, "val": Source, "stages": Stage, "encoder": Encoder, "stand_in": StandIn, "faces": Faces, "gan": Gan, "teacher": Teacher
}  # fmt: skip


def unknown(name: str, known: Iterable[str], where: str, what: str = "key") -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    said = f"unknown {what} {name!r} in {where}" + (f": did you mean {near[0]}?" if near else ".")
    return f"{said} There are {', '.join(known)}"


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a file over those of its `base`, a file beside it; sections are merged key by key, lists replaced."""
    values = yaml.safe_load(path.read_text())
    if "base" not in values:
        return values
    merged = read_yaml(path.parent / values.pop("base"))
    for key, value in values.items():
        # Losses and the decoder are given whole: what the base had must not linger there.
        sections = isinstance(value, dict) and key not in ("losses", "decoder", "perceptual_share")
        merged[key] = {**merged.get(key, {}), **value} if sections else value
    return merged


def read_config(path: str, changes: list[str]) -> Config:
    """The YAML file at `path`, with changes of the form key=value; stand_in.noise=0 reaches inside, stages.0.batch=4 into lists.

    Raises:
        SystemExit: a key that does not exist, or a value of another type; each is named, with the nearest right key.
    """
    values = read_yaml(Path(path))
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise SystemExit(f"expected key=value, got {change!r}")
        *parents, last = key.split(".")
        place: Any = values
        for parent in parents:
            if isinstance(place, list) and parent.isdigit() and int(parent) < len(place):
                place = place[int(parent)]
            elif isinstance(place, dict):
                place = place.setdefault(parent, {})
            else:
                raise SystemExit(f"{key}: there is no {parent}")
        if not isinstance(place, dict):
            raise SystemExit(f"{key}: {'.'.join(parents)} holds no keys of its own")
        place[last] = yaml.safe_load(value)
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        raise SystemExit("\n".join(explain(problem, path) for problem in error.errors())) from None


def build_decoder(c: Config) -> FastDecoder:
    """The decoder of a configuration, with random weights.

    Raises:
        SystemExit: no such class, or an argument that it does not take.
    """
    values = dict(c.decoder)
    name = values.pop("_class_name", None)
    if name not in FastDecoder.families:
        raise SystemExit(unknown(str(name), FastDecoder.families, "decoder._class_name", "class"))
    try:
        return FastDecoder.families[name](**values)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"decoder: {error}") from None


def explain(problem: Any, path: str) -> str:
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "unexpected_keyword_argument":
        section = SECTIONS[problem["loc"][0]] if len(problem["loc"]) > 1 else Config
        return unknown(problem["loc"][-1], [f.name for f in fields(section)], path)
    if problem["type"] in ("missing", "missing_argument"):
        return f"{path} lacks {place}"
    if not place:
        return f"{path}: {problem['msg'].removeprefix('Value error, ')}"
    return f"{path}: {place} is {problem['input']!r}. {problem['msg']}"
