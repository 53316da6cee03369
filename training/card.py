"""The model card of a trained decoder, filled from its run: what it is, what it was fitted to and how, whose weights are in it."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fast_latent_decoders import FastDecoder
from fast_latent_decoders.presets import HUB_ORG, PRESETS, Preset, locate

if TYPE_CHECKING:
    from config import Config, Source, Stage, StandIn

RESULTS = "<!-- results -->\n<!-- end of results -->"  # results.py fills what is between them
OURS = "apache-2.0"
SPACES = {"sdxl": "SDXL", "sd": "SD 1.x, SD 2.x and Stable Video Diffusion"}
TINY = {"sdxl": "TAESDXL's encoder (MIT, Ollin Boer Bohan)", "sd": "TAESD's encoder (MIT, Ollin Boer Bohan)"}
FAMILIES = {
    "SubpixelDecoder": "Residual blocks at {stages} of the picture's resolution, nothing at full resolution; every upsampling is "
    "a convolution and a pixel shuffle. No normalisation: tiles are exact, float16 is finite.",
    "SubpixelTemporalDecoder": "The Subpixel family; some blocks at low resolution also see the frame before, so a clip can be decoded as it comes, or in one call. "
    "No normalisation: float16 is finite.",
    "TAEDecoder": "TAESD's layer list at one width. No normalisation: tiles are exact, float16 is finite.",
    "TAETemporalDecoder": "TAESD's layer list at one width with one spatio-temporal mid block: frames are mixed within one decode call, "
    "so leave `decode_chunk_size` at its default, all frames. Tiles are blended.",
    "EfficientViTDecoder": "EfficientViT blocks (linear attention) at 1/8 of the picture's resolution, residual blocks at 1/4 and 1/2, and of three counts also in front of the attention. Tiles are blended.",
}
TERMS = {
    "l1": "L1", "mse": "squared error", "charbonnier": "Charbonnier, a smooth L1", "frequency": "difference of the spectra",
    "ms_ssim": "1 - MS-SSIM", "colour": "L1 of the means over 8x8 px", "detail": "local contrast near Nyquist, too little of it weighing more", "lattice": "rms of a pattern that errors repeat every 2 or 8 px", "temporal": "difference of the changes between frames",
    "flat": "L1 of real flat colours as an endless surface shows them", "reencode": "difference of the latents when encoded again", "lpips": "LPIPS on VGG16 (BSD-2-Clause, Zhang et al.)",
    "stlpips": "shift-tolerant LPIPS (BSD-2-Clause, Ghildyal and Liu)", "squeeze": "features of SqueezeNet 1.1 (BSD, DeepScale)",
}  # fmt: skip
METRICS = {
    "psnr": "PSNR, dB", "stlpips": "ST-LPIPS", "tint_size": "mean absolute tint, 1/255", "flat_psnr": "flat colours: PSNR, dB",
    "flat_worst": "flat colours: worst, 1/255",
}  # fmt: skip


def header_of(card: str) -> dict[str, Any]:
    """The YAML header of a card's text; empty where it has none."""
    found = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    return yaml.safe_load(found[1]) if found else {}


def place_of(init: str) -> Path:
    """The folder of the initial weights; one that does not exist for a Hub id, or if they moved since the run began: that must not cost its export."""
    try:
        return Path(locate(init))
    except OSError:
        return Path(init)


def origin(init: str) -> dict[str, str]:
    """Whose the initial weights are, by their own card: `licence` (of the Hub's list), `credit`, and `base_model` if they have a Hub id.

    `licence` is "unknown" where no card tells.
    """
    place = place_of(init)
    path = place / "README.md"
    text = path.read_text() if path.exists() else ""
    header = header_of(text)
    found = {"licence": str(header.get("license", "unknown"))}
    if credit := re.search(r"Weights by .*?(?=\n\n|\Z)", text, flags=re.DOTALL):  # as in the cards of hub_cards and in ours
        found["credit"] = " ".join(credit[0].split())
    if HUB_ORG and init in PRESETS:
        found["base_model"] = f"{HUB_ORG}/{init}"
    elif not place.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", init):
        found["base_model"] = init
    elif isinstance(base := header.get("base_model"), str):
        found["base_model"] = base
    return found


def shown(path: str) -> str:
    """A path as a card tells it: without the folders of the machine that it is absolute on."""
    return "/".join(Path(path).parts[-2:]) if Path(path).is_absolute() else path


def tell_source(source: "Source", counts: dict[str, int]) -> str:
    filters = [
        f"short side at least {source.min_size} px" if source.min_size else "",
        "aesthetic score {:g} to {:g}".format(*source.aesthetic) if source.aesthetic else "",
        "with a face" if source.faces else "",
        f"those listed in {shown(source.names)}" if source.names else "",
        f"classes {', '.join(source.classes)}" if source.classes else "",
        f"weight {source.weight:g}" if source.weight != 1 else "",
    ]
    count = f"{counts[source.path]:,} " if source.path in counts else ""
    return f"- {count}{source.kind} of `{shown(source.path)}`" + "".join(f", {f}" for f in filters if f)


def tell_encoder(c: "Config", space: str, found: dict[str, str]) -> tuple[str, bool]:
    """What encoded the pictures, and whether it only stands in for the VAE's own encoder."""
    path = c.encoder.path
    tiny = path is None or path.endswith(".safetensors") or "tiny" in found.get("name", "").lower()
    known = (
        TINY.get(space, "a tiny encoder")
        if path is None
        else f"`{shown(path)}`" + (f" ({c.encoder.subfolder})" if c.encoder.subfolder else "")
    )
    text = f"Latents of {known}" + ("" if tiny else f", the posterior's {c.encoder.posterior}")
    text += f", hash `{found['hash']}`" if found.get("hash") else ""
    return text + (f", a stand-in for the encoder of {SPACES.get(space, space)}." if tiny else "."), tiny


def tell_stand_in(s: "StandIn") -> list[str]:
    told = [
        "its weights are drawn anew inside their float8 rounding box for every shard of latents" if s.redraw else "",
        f"{s.table_share[0]:g} to {s.table_share[1]:g} of a table of what the VAE's own encoder adds to flat colours"
        if s.colour_table
        else "",
        f"latents of flat colours that the VAE itself made, with textures transplanted, in {s.transplants:.1%} of the samples"
        if s.colours
        else "",
        f"noise on the latents, standard deviation up to {s.noise:g}" if s.noise else "",
    ]
    return [f"- {line};" for line in told if line]


def tell_stage(stage: "Stage", steps: int) -> str:
    changes = (
        f"reduced up to {stage.reduce:g} times, {stage.flip:.0%} mirrored, {stage.colour:.0%} recoloured, {stage.grey:.0%} grey, {stage.jpeg:.0%} JPEG"
        + (f", {stage.vivid:.0%} vivid" if stage.vivid else "")
    )
    clips = (
        f"{stage.clips:.0%} of steps, {stage.clip_batch} x {stage.frames} frames, stride up to {stage.stride}"
        if stage.clips
        else "none"
    )
    return f"| {math.ceil(stage.start * steps):,} | {stage.crop} px | {stage.batch} | {changes} | {clips} |"


def tell_losses(c: "Config") -> list[str]:
    rows = [
        f"| `{name}` | {weight:g} | {TERMS.get(name, '')}"
        + (f", on {c.perceptual_share[name]:.0%} of each batch |" if name in c.perceptual_share else " |")
        for name, weight in c.losses.items()
        if weight
    ]
    if c.gan.weight:
        length = "each picture's gradient to one length" if c.gan.normalised else "adaptive" if c.gan.adaptive else "literal"
        rows.append(f"| `gan` | {c.gan.weight:g} | {c.gan.kind} discriminator from step {c.gan.start:,}, {length} |")
    side = c.teacher.means
    pictures = f"pictures, without their means over {side}x{side} px," if c.teacher.structure else "pictures"
    taught = [("output", c.teacher.output, pictures), ("features", c.teacher.features, "attention maps")]
    taught += [(f"losses.{name}", weight, f"`{name}` to pictures") for name, weight in c.teacher.losses.items()]
    for name, weight, what in taught:
        if c.teacher.path and weight:
            rows.append(
                f"| `teacher.{name}` | {weight:g} | {what} of `{shown(c.teacher.path)}`, on latents: {', '.join(c.teacher.latents)} |"
            )
    if c.faces.weight != 1:
        rows.append(f"| `faces` | {c.faces.weight:g} | weight of pixels in faces, in the pixel terms |")
    return ["| term | weight | what |", "|---|---|---|", *rows]


def tell_measured(val: dict[str, float], baseline: dict[str, float], name: str | None) -> list[str]:
    if not val:
        return ["The run was not validated."]
    titles = ["this decoder"] + ([f"`{name}`" if name else "baseline"] if baseline else [])
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for key, title in METRICS.items():
        if key in val:
            cells = [f"{column[key]:.4g}" if key in column else "" for column in (val, baseline)[: len(titles)]]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def make_card(c: "Config", model: FastDecoder, summary: dict[str, Any], machine: str, load: str) -> str:
    """The card as Markdown. `load` is what the snippets give to `from_pretrained`."""
    family, space, name = type(model).__name__, model.latent_space.name, Path(c.out).name
    own = {key: value for key, value in model.config.items() if not key.startswith("_")}
    sizes = Preset(name, family, space, OURS, own)
    encoder, tiny = tell_encoder(c, space, summary.get("encoder", {}))
    first = origin(c.init) if c.init else {}
    licence, start = first.get("licence", OURS), (summary.get("starts") or [{}])[-1]
    header: dict[str, Any] = {"license": licence, "library_name": "diffusers", "tags": ["latents", "vae", "decoder", space]}
    if "base_model" in first:
        header["base_model"] = first["base_model"]
    if sets := sorted({source.path.split(":")[1] for source in c.data if source.path.startswith("hf:")}):
        header["datasets"] = sets
    samples, skipped = summary.get("samples", {}), summary.get("skipped")
    processes = start.get("processes", 1)
    per_step = f"{processes} process{'es' * (processes > 1)} x {c.accumulate} batch{'es' * (c.accumulate > 1)} a step"
    shape = ", ".join(
        f"{key} {own[key]}" for key in ("width", "widths", "blocks", "convs", "block", "memory", "attention_blocks", "residual_blocks") if key in own
    )
    limits = (
        "It was not trained against the encoder of the VAE itself but against a tiny one that stands in for it: expect small differences in "
        "colour and detail on latents of the real one, also where the figures above, made with the same stand-in, show none. "
        if tiny
        else ""
    )
    half = " with half of the colour table" if tiny and c.stand_in.colour_table else ""
    if c.stand_in.colours:
        limits += (
            "The training saw the flat colours that are measured: they show that colours are learnt, not that they generalise. "
        )
    starts, average = max(1, len(summary.get("starts", []))), summary.get("average")
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, default_flow_style=None)}---",
        f"# {name}\n",
        f"A small, fast decoder for {SPACES.get(space, space)} latents: {'an' if family[0] in 'AEIOU' else 'a'} `{family}` of `fast_latent_decoders` ({shape}).",
        FAMILIES.get(family, "").format(stages=["1/8", "1/8 and 1/4", "1/8, 1/4 and 1/2"][len(own.get("widths", ())[:3]) - 1]) + "\n",
        f"{sizes.parameters:,} parameters, {sizes.megabytes:.1f} MB in float16, {sizes.mac_per_pixel / 1e3:.0f} K multiply-accumulates per pixel.\n",
        "```python\nfrom fast_latent_decoders import FastDecoder, swap_decoder",
        f'pipe.vae = FastDecoder.from_pretrained("{load}", torch_dtype=pipe.dtype).to(pipe.device)  # the whole VAE',
        f'swap_decoder(pipe, "{load}")  # or only its decoder\n```\n',
        f"Latents (N, {model.latent_space.channels}, h, w) in VAE units (what a pipeline hands to `vae.decode`), scaled inside;",
        "pictures (N, 3, 8h, 8w), nominally in [-1, 1].\n",
        f"## What it costs and what it gives\n\n{RESULTS}\n",
        f"When training ended, on {c.val_count} held-out samples of {', '.join(f'`{shown(s.path)}`' for s in c.val)}, encoded as below{half}:\n",
        *tell_measured(summary.get("val") or {}, summary.get("baseline") or {}, c.baseline),
        f"\n## Limits\n\n{limits}Pictures are softer than those of the VAE's own decoder, most of all small text and distant faces.\n",
        "## How it was trained\n\nFitted to:\n",
        *(tell_source(source, samples) for source in c.data),
        *([f"- {skipped:,} samples could not be read and were left out"] if skipped else []),
        f"\n{encoder}" + (" On top of it:\n" if tiny and tell_stand_in(c.stand_in) else ""),
        *(tell_stand_in(c.stand_in) if tiny else []),
        "\n" + "\n".join(tell_losses(c)) + "\n",
        f"{summary.get('steps', 0):,} steps in {summary.get('hours', 0):g} hours on {machine}, precision {start.get('precision', 'not logged')},",
        f"{per_step}, learning rate {c.lr:g}{' (Muon)' if c.optimizer == 'muon' else ''}, average of the weights {c.ema:g}.",
        *([f"The weights are {average:g} of the run's and {1 - average:g} of those it began with (`average.py`)."] if average is not None else []),
        *(["Its last layer was then fitted to flat colours without a border in view (`recolour.py`); the measurement above is from after it."] if "recoloured" in summary else []),
        *tell_before(summary.get("before")),
        f"`run.json` holds every setting{f', of each of the {starts} starts of the run' if starts > 1 else ''}.\n",
        "| from step | crops | a batch | changes before encoding | clips |\n|---|---|---|---|---|",
        *(tell_stage(stage, c.steps) for stage in c.stages),
        "\n## Licence\n\n" + tell_licence(c.init, first, licence),
    ]
    return "\n".join(lines) + "\n"


def tell_before(run: dict[str, Any] | None) -> list[str]:
    """How long the initial weights had been trained, in all runs before this one."""
    runs = []
    while run is not None:
        runs.append(run)
        run = run.get("before")
    if not runs:
        return []
    count = f"{len(runs)} runs of " if len(runs) > 1 else ""
    steps = ", then ".join(f"{earlier.get('steps', 0):,}" for earlier in reversed(runs))
    hours = sum(earlier.get("hours", 0) for earlier in runs)
    return [f"Before it the initial weights had {count}{steps} steps, in {hours:.3g} hours; their record is `before` in `run.json`."]


def tell_licence(init: str | None, first: dict[str, str], licence: str) -> str:
    if init is None:
        return "Apache-2.0. The first weights were random."
    name = {"mit": "MIT", "apache-2.0": "Apache-2.0"}.get(licence, licence)
    if licence == "unknown":
        return f"Unknown: the initial weights are those of `{shown(init)}`, and no card tells their licence."
    return f"{name}, the licence of the initial weights, which come from `{first.get('base_model', shown(init))}`. {first.get('credit', '')}".rstrip()
