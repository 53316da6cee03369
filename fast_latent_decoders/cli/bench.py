"""`fld bench`: latency, throughput, memory, and the decoder's part of the whole."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .loading import DeviceName, find_device
from .run import wrong_usage

if TYPE_CHECKING:
    from ..evaluation.bench import Options

DECODERS = ["subpixel-sdxl", "subpixel-small-sdxl", "taesdxl", "tae-192", "efficientvit", "sdxl-vae"]
PLOTS = (".png", ".svg", ".pdf")


class Dtype(StrEnum):  # typer takes lists of these, and no lists of Literals
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Layout(StrEnum):
    channels_last = "channels_last"
    contiguous = "contiguous"


class Mode(StrEnum):
    eager = "eager"
    compiled = "compiled"
    tiled = "tiled"
    graph = "graph"
    openvino = "openvino"



def bench(
    decoders: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DECODER",
            help="Presets, folders or Hub ids; also tae-192, efficientvit, tae-temporal (random weights where none are trained), "
            f"sdxl-vae and svd-vae (random). By default: {', '.join(DECODERS)}.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[list[int], typer.Option(min=16, max=8192, help="Side of the picture in pixels; several times for several.")] = [512],  # noqa: B006
    batch: Annotated[list[int], typer.Option(min=1, help="Pictures (with --frames: clips) decoded together.")] = [1],  # noqa: B006
    frames: Annotated[int | None, typer.Option(min=1, help="Frames in each clip.", show_default=False)] = None,
    device: Annotated[DeviceName, typer.Option(help="Where to decode.")] = "auto",
    dtype: Annotated[
        list[Dtype] | None,
        typer.Option(help="Number formats; by default float32 and what fld check finds faster.", show_default=False),
    ] = None,
    layout: Annotated[list[Layout], typer.Option(help="Memory layouts.")] = [Layout.channels_last],  # noqa: B006
    mode: Annotated[list[Mode], typer.Option(help="Ways to run; graph is a CUDA graph, openvino another engine for CPUs.")] = [Mode.eager],  # noqa: B006
    tile_size: Annotated[int, typer.Option(min=1, help="Side of a tile in latents, for --mode tiled.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Measured calls of each row.")] = 7,
    budget: Annotated[float, typer.Option(min=0, help="Seconds for a row; slower ones get fewer repeats.")] = 10.0,
    memory: Annotated[bool, typer.Option("--memory", help="Peak memory; on a CPU a process for each row.")] = False,
    end_to_end: Annotated[bool, typer.Option("--end-to-end", help="From latents to PNG, WebP and JPEG.")] = False,
    pipeline: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="UNET_MS", help="Share of a pipeline whose steps take this long.", show_default=False),
    ] = None,
    unsynchronised: Annotated[
        bool, typer.Option("--unsynchronised", help="Also when each call returned: what a careless clock shows on a GPU.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the record; one that is there is shown again.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Quality against time: .png, .svg or .pdf.", show_default=False)
    ] = None,
    quality: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="report.json of fld evaluate, for --plot; by default that of subpixel-sdxl's card.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are already there.")] = False,
) -> None:
    """Time decoders against each other: synchronised, warmed up, in turn, with spread and processor time.

    Prints Markdown. Says so if the machine is busy. A row that cannot run is printed with its reason.
    """
    if any(side % 8 for side in size):
        wrong_usage(f"--size {next(side for side in size if side % 8)}: expected a multiple of 8")
    if plot and plot.suffix.lower() not in PLOTS:
        wrong_usage(f"--plot {plot}: expected a file ending in {', '.join(PLOTS)}")
    from ..evaluation.bench import Options
    from ..evaluation.tables import tables

    figures = quality_figures(quality) if plot else {}
    if json_file and json_file.exists() and not force:
        record = saved(json_file)
        typer.echo(f"note: {json_file} is already there and is shown; --force measures again", err=True)
    else:
        place = find_device(device)
        names = list(dict.fromkeys(decoders or DECODERS))
        record = measured(
            Options(
                names,
                sizes=tuple(dict.fromkeys(size)),
                batches=tuple(dict.fromkeys(batch)),
                frames=frames,
                device=place,
                dtypes=tuple(dict.fromkeys(map(str, dtype))) if dtype else default_dtypes(names, place),
                layouts=tuple(dict.fromkeys("contiguous_format" if name is Layout.contiguous else str(name) for name in layout)),
                modes=tuple(dict.fromkeys(map(str, mode))),
                tile=tile_size,
                repeats=repeats,
                budget=budget,
                memory=memory,
                end_to_end=end_to_end,
                pipeline=pipeline,
            )
        )
        if json_file:
            write(json_file, json.dumps(record, indent=1).encode() + b"\n", force=force)
    typer.echo(tables(record, unsynchronised=unsynchronised))
    if plot:
        draw_plot(record, figures, plot, force=force)
    raise typer.Exit(0 if any(row["reason"] is None for row in record["rows"]) else 1)


def default_dtypes(names: list[str], device: str) -> tuple[str, ...]:
    """float32, and the format that the first decoder with weights of its own is faster in."""
    from .. import FastDecoder
    from ..evaluation.check import fastest_dtype
    from ..presets import DEFAULT, presets

    known = [name for name in names if name in presets() and presets()[name].location]
    decoder = FastDecoder.from_pretrained(known[0] if known else DEFAULT)  # as it is: `load_decoder` changes how this process uses memory
    try:
        chosen = str(fastest_dtype(decoder, device)).removeprefix("torch.")
    except ValueError:  # the rows will show it
        chosen = "float32"
    return tuple(dict.fromkeys(("float32", chosen)))


def measured(options: "Options") -> dict[str, Any]:
    """Run, with a line on stderr that says what is going on; a terminal keeps only the latest."""
    from diffusers.utils import logging

    from ..evaluation.bench import run

    logging.set_verbosity_error()
    console = Console(stderr=True)
    try:
        if console.is_terminal:
            with console.status("...") as status:
                return run(options, lambda line: status.update(line))
        return run(options, lambda line: typer.echo(line, err=True))
    except (OSError, ValueError) as error:
        wrong_usage(" ".join(str(error).split()))


def saved(file: Path) -> dict[str, Any]:
    from ..evaluation.bench import FORMAT

    try:
        record = json.loads(file.read_text())
        if record["format"] == FORMAT and record["rows"] is not None:
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    wrong_usage(f"--json {file} is there and is no record of this fld bench; --force replaces it")


def quality_figures(files: list[Path] | None) -> dict[str, dict[str, float]]:
    from ..evaluation.plot import read_quality
    from ..presets import DEFAULT, folder

    try:
        found = files or [folder(DEFAULT) / "quality.json"]
        return read_quality(found if files else [file for file in found if file.exists()])
    except (OSError, ValueError) as error:
        wrong_usage(f"--quality: {error}")


def write(path: Path, content: bytes, *, force: bool) -> None:
    from ..atomic import FileError, replacing

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, force=force) as temporary:
            temporary.write_bytes(content)
    except (FileError, OSError) as error:
        typer.echo(f"{path} was not written: {error}", err=True)
        raise typer.Exit(1) from error


def draw_plot(record: dict[str, Any], figures: dict[str, dict[str, float]], path: Path, *, force: bool) -> None:
    from ..evaluation.plot import draw

    if path.exists() and not force:
        typer.echo(f"{path} is already there; --force replaces it", err=True)
        return
    try:
        content = draw(record, figures, path.suffix.lower())
    except ImportError as error:
        typer.echo(f"{path} was not written: {error}", err=True)
        raise typer.Exit(1) from error
    write(path, content, force=force)
    typer.echo(f"\nQuality against time in {path}")
