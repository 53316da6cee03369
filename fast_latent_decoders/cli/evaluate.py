"""`fld evaluate`: decoders against the truth, on pictures or clips, and a report of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .loading import DeviceName, find_device, named
from .run import Run, count, wrong_usage

if TYPE_CHECKING:
    from PIL import Image

PICTURES = ["psnr", "ssim", "ms_ssim", "lpips_vgg", "stlpips", "ssimulacra2", "tint_r", "tint_g", "tint_b", "tint", "sharpness", "mesh"]


def evaluate(
    data: Annotated[list[str], typer.Argument(help="Folders, or patterns of WebDataset shards: 'val/*.tar'; with --agreement, of latents.")],
    decoder: Annotated[list[str], typer.Option(help="A preset, folder or Hub id, of ours or a diffusers VAE; NAME=FOLDER shows it as NAME. Several times.")] = [  # noqa: B006
        "subpixel-sdxl",
        "subpixel-small-sdxl",
        "taesdxl",
    ],
    out: Annotated[Path, typer.Option(help="Folder of the report; called again, an evaluation goes on.")] = Path("evaluation"),
    baseline: Annotated[str | None, typer.Option(help="One of the decoders, to which the others are compared.")] = None,
    clips: Annotated[bool, typer.Option("--clips", help="The data are clips.")] = False,
    size: Annotated[int, typer.Option(help="Short side in px, then the centre square; 0: as they are.")] = 256,
    samples: Annotated[int | None, typer.Option("--count", help="Samples, evenly spread; without, all.")] = None,
    frames: Annotated[int, typer.Option(help="Of each clip, its first ones; I3D looks at 16.")] = 16,
    chunk: Annotated[int | None, typer.Option(min=1, help="Frames of a clip that one call decodes, without it all; error at the joins is measured.")] = None,
    encoder: Annotated[str | None, typer.Option(help="A VAE (folder, Hub id) or TAESD-like file; without, the decoders' tiny one.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Of the encoder's folder or Hub repository.")] = None,
    posterior: Annotated[Literal["mode", "sample"], typer.Option(help="Of a VAE's encoder.")] = "mode",
    seed: Annotated[int, typer.Option(help="Of the posterior's samples.")] = 0,
    latents: Annotated[Path | None, typer.Option(help="Folder of ready latents, named like the pictures, in place of an encoder.")] = None,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="The data are latents without a truth: compare with what the baseline makes of them.")
    ] = False,
    scaled: Annotated[bool, typer.Option("--scaled", help="Files of latents that do not tell their units are scaled ones.")] = False,
    colour_table: Annotated[Path | None, typer.Option(help="What the real encoder adds to the tiny one: 0, half and all of it.")] = None,
    colours: Annotated[Path | None, typer.Option(help="Real latents of flat colours: a colour report.")] = None,
    colours_every: Annotated[int, typer.Option(min=1, help="Take each such colour: all 6,181 are an hour on a laptop.")] = 8,
    metric: Annotated[list[str], typer.Option(help="Several times.")] = PICTURES,
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="Networks whose features' distributions are compared.  [default: inception, alexnet-st; of clips videomae-v2, i3d]",
            show_default=False,
        ),
    ] = None,
    names: Annotated[str | None, typer.Option(help="File that lists the samples, such as UCF-101's testlist01.txt.")] = None,
    classes: Annotated[list[str], typer.Option("--class", help="A class to keep; several times.")] = [],  # noqa: B006
    device: Annotated[DeviceName, typer.Option(help="Where to decode.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Begin anew in a folder that holds another evaluation.")] = False,
) -> None:
    """Measure decoders on pictures, clips or latents: JSON, CSV, Markdown and a page with the figures and pictures.

    Every sample is brought to one size first; that is what the encoder sees and what is compared with.
    """
    import json
    import shutil
    from datetime import UTC, datetime

    from ..atomic import replacing
    from ..clips import write_clip
    from ..evaluation import report, sheets
    from ..evaluation.clips import side_by_side
    from ..evaluation.decoders import load_candidate
    from ..evaluation.encoders import Encoder, StandIn, load_encoder
    from ..evaluation.machine import describe, versions
    from ..evaluation.metrics import AGREEMENT
    from ..evaluation.ready import ReadyLatents
    from ..evaluation.run import Eyes, Settings, Store, about, measure, measure_recoloured
    from ..evaluation.samples import Source
    from ..evaluation.tools import open_tools

    place = find_device(device)
    places = named(decoder)
    decoder = list(places)
    baseline = baseline or ("taesdxl" if "taesdxl" in decoder else decoder[-1])
    if baseline not in decoder:
        wrong_usage(f"--baseline {baseline} is none of the decoders: {', '.join(decoder)}")
    kinds: dict[tuple[bool, bool], Literal["pictures", "clips", "latents", "latent clips"]]
    kinds = {(False, False): "pictures", (False, True): "clips", (True, False): "latents", (True, True): "latent clips"}
    kind = kinds[agreement, clips]
    if latents or agreement:
        if idle := [name for name, value in {"encoder": encoder, "colour-table": colour_table, "colours": colours}.items() if value]:
            wrong_usage(f"--{idle[0]}: the latents are given, nothing is encoded")
        if latents and agreement:
            wrong_usage("--latents has a truth to compare with, --agreement has none: give one of them")
        if latents and not latents.is_dir():
            wrong_usage(f"--latents {latents}: there is no such folder")
        size = 0
    if agreement:
        metric = [*metric, *AGREEMENT]
        if len(decoder) < 2:
            wrong_usage("--agreement compares decoders with a baseline: give at least two")
    drawn = "" if latents or agreement else posterior
    sources = [Source(path, kind, names=names, classes=classes or None) for path in data]
    shares = [0.0, 0.5, 1.0] if colour_table else [0.0]
    with Run("measuring", quiet=True) as run:
        try:
            candidates = [load_candidate(loaded, place, name) for name, loaded in places.items()]
            first = next((c.model for c in candidates if hasattr(c.model, "latent_space")), None)
            if first is None:
                wrong_usage("at least one decoder must be of this package, so that the latents' convention is known")
            reference = next(c for c in candidates if c.name == baseline) if agreement else None
            if reference:
                candidates.remove(reference)
                decoder.remove(reference.name)
            stand_in = StandIn(colour_table=str(colour_table) if colour_table else None, colours=str(colours) if colours else None)
            if latents or agreement:
                eyes = Eyes(ReadyLatents(first.latent_space, latents, scaled=scaled), reference)
            else:
                eyes = Eyes(load_encoder(Encoder(encoder, subfolder, posterior), stand_in, first))
            tools, infos, titles, unavailable = open_tools(metric, features or (["videomae-v2", "i3d"] if clips else ["inception", "alexnet-st"]), clips, place, chunk)
            protocol = Settings(sources, size or None, samples, frames, chunk, shares, seed, list(infos), list(titles))
            todo = protocol.chosen
            if force and (out / "protocol.json").exists():  # only now that nothing is wrong with the call
                shutil.rmtree(out)
            store = Store(out, about(protocol, eyes, drawn, candidates), {name: network.d for name, network in tools.features.items()})
        except (ValueError, OSError, ImportError) as error:
            wrong_usage(str(error))
        progress = measure(protocol, eyes, candidates, tools, store, baseline if colour_table else None)
        for _ in run.over(progress, len(todo) - len(store.done)):
            pass
        shown = list(decoder)
        if colour_table and store.rows:
            shown.append(f"{baseline} + affine colour")
            plain = next(candidate for candidate in candidates if candidate.name == baseline)
            again = measure_recoloured(protocol, eyes, plain, tools, store)
            for _ in run.over(again, len(todo) * len(shares)):
                pass
        for key, why in store.failed.items():
            run.fail(key, why)
        for key, why in getattr(eyes.encoder, "doubts", {}).items():
            run.note(f"{key}: {why}")
        if not store.rows:
            wrong_usage(f"not one sample of {', '.join(data)} could be measured")
        about_machine = describe(place)
        results: dict[str, Any] = {
            "title": f"{count(len(decoder), 'decoder')} on {', '.join(data)}",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": f"{about_machine['cpu']}, {about_machine['threads']} threads, torch {versions()['torch']}",
            "protocol": about(protocol, eyes, drawn, candidates),
            "n": len({row["key"] for row in store.rows}),
            "baseline": None if agreement else baseline,
            "reference": baseline if agreement else None,
            "parameters": {candidate.name: candidate.parameters for candidate in candidates},
            "figures": report.summarise(store, infos, shown, shares, None if agreement else baseline),
            "distances": report.distances(store, titles, decoder, shares),
            "colours": {},
            "failed": store.failed,
            "unavailable": unavailable,
        }
        pictures: dict[str, Image.Image] = {}
        if eyes.encoder.colours is not None:
            results["colours"], swatches = sheets.colour_report(protocol, eyes.encoder, candidates, colours_every)
            pictures |= swatches
        store.write_csv()
        with replacing(out / "report.json", force=True) as path:
            path.write_text(json.dumps(results, indent=1) + "\n")
        with replacing(out / "report.md", force=True) as path:
            path.write_text(report.markdown(results, infos, titles))
        # figures are there before pictures are, which are decoded anew
        pictures |= sheets.draw(protocol, eyes, candidates, store, infos, baseline)
        if clips:
            write_clip(out / "side-by-side.mp4", side_by_side(sheets.first_clip(protocol, eyes, candidates, store)), 8, force=True)
        with replacing(out / "report.html", force=True) as path:
            path.write_text(report.page(results, infos, titles, pictures))
        for title, picture in pictures.items():
            picture.save(out / f"{sheets.file_name(title)}.png")
    typer.echo(report.markdown(results, infos, titles))
    typer.echo(f"report in {out}/report.html")
    run.end()
