"""`fld compare`: what several decoders make of the same latents, on one sheet and in figures."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from .loading import DeviceName, DtypeName, find_device, load_decoder, named, run_decoder, vae_units
from .run import Run, collect, count, is_input, table_console, wrong_usage
from .video import compare_clips

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..decoder import FastDecoder
    from ..sheet import Compared


def compare(
    paths: Annotated[
        list[Path], typer.Argument(help="Latents (a picture of the same name beside them is their source) or pictures.")
    ],
    decoder: Annotated[list[str], typer.Option(help="A preset, folder or Hub id; NAME=FOLDER shows it as NAME. Several times.")] = [  # noqa: B006
        "subpixel-sdxl",
        "taesdxl",
    ],
    out: Annotated[Path, typer.Option(help="The sheet: .png, .jpg or .webp.")] = Path("compare.png"),
    video: Annotated[
        bool, typer.Option("--video", help="Latents of a file are one clip: --out is a folder, for a film and a strip of frames of each.")
    ] = False,
    fps: Annotated[
        float | None, typer.Option(min=0.1, max=1000, help="Frames a second.  [default: what the file says, else 7]", show_default=False)
    ] = None,
    dtype: Annotated[DtypeName, typer.Option(help="Number format of all decoders.")] = "float32",
    device: Annotated[DeviceName, typer.Option(help="Where to decode.")] = "auto",
    scaled: Annotated[bool, typer.Option("--scaled", help="Latents that do not say so are scaled, not in VAE units.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a sheet that is already there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Decode the same inputs with several decoders: a contact sheet, and PSNR and SSIM where a source picture is known.

    Pictures are encoded by each decoder's own encoder first.
    """
    from ..files import READERS
    from ..pictures import FORMATS, SUFFIXES, write_image
    from ..sheet import draw_sheet

    places = named(decoder)
    names = list(places)
    place = find_device(device)
    if video:
        compare_clips(paths, places, out if out.suffix.lower() not in FORMATS else out.with_suffix(""), place, dtype, fps, scaled, force, as_json)
    if out.suffix.lower() not in FORMATS:
        wrong_usage(f"--out {out}: expected a file ending in {', '.join(FORMATS)}")
    with Run("comparing", quiet=True) as run:
        files = inputs(collect(run, paths, (*READERS, *SUFFIXES), "latent or picture"))
        decoders = {name: load_decoder(loaded, place, dtype) for name, loaded in places.items()} if files else {}
        rows: list[Compared] = []
        for file, source in run.over(files.items(), len(files)):
            try:
                rows += list(rows_of(run, file, source, decoders, scaled))  # all of a file's, or none
            except (ValueError, RuntimeError) as error:
                run.fail(file, " ".join(str(error).split()))
        if rows and out.exists() and not force:
            run.note(f"{out} is already there and stays as it is; --force replaces it")
        elif rows:
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
                write_image(out, draw_sheet(names, rows), force=force)
                run.finish(out, out)
            except (OSError, ValueError) as error:
                run.fail(out, f"{out} cannot be written: {error}")
    if as_json:
        figures = [{"name": row.name, "figures": row.figures} for row in rows]
        typer.echo(json.dumps({"decoders": names, "pictures": figures, "failed": run.failures()}, indent=2))
    elif rows:
        if any(row.figures for row in rows):
            table_console().print(figures_table(names, rows))
        if run.done:
            typer.echo(f"{count(len(rows), 'picture')} by {count(len(names), 'decoder')} in {out}")
    run.end()


def inputs(files: Sequence[Path]) -> dict[Path, Path | None]:
    """What to compare -> its source: latents with a picture of their name (beside them or in `files`), and other pictures."""
    from ..files import READERS
    from ..pictures import SUFFIXES

    latents = [file for file in files if file.suffix.lower() in READERS]
    pictures = {file.stem: file for file in files if file not in latents}
    sources: dict[Path, Path | None] = {}
    for file in latents:
        beside = (file.with_suffix(suffix) for suffix in SUFFIXES)
        sources[file] = next((near for near in beside if is_input(near, SUFFIXES)), pictures.get(file.stem))
    stems = {file.stem for file in latents}
    return sources | {file: file for file in files if file not in sources and file.stem not in stems}


def rows_of(
    run: Run, file: Path, source_file: Path | None, decoders: dict[str, "FastDecoder"], scaled: bool
) -> Iterator["Compared"]:
    """One row for each latent of `file`, or for the picture."""
    from ..files import READERS, read_latents
    from ..pictures import read_picture, to_bytes
    from ..sheet import Compared

    picture: Tensor | None = None
    latents = read_latents(file) if file.suffix.lower() in READERS else None
    if source_file:
        read = read_picture(source_file)
        picture = read.tensor
        if read.note:
            run.note(f"{source_file}: {read.note}")
    source = None if picture is None else to_bytes(picture)
    decoded: dict[str, Tensor] = {}
    for name, decoder in decoders.items():
        if latents is None:
            assert picture is not None
            with run.noting_warnings():
                z = decoder.encode(picture[None].to(decoder.device)).latent_dist.mode()
        else:
            z = vae_units(run, file, latents, decoder, scaled)
        decoded[name] = run_decoder(decoder, z)
    number = len(next(iter(decoded.values())))
    if source is not None and number > 1:
        run.note(f"{file} holds {number} latents, so {source_file} is not taken for their source")
        source = None
    for i in range(number):
        pictures = {name: to_bytes(batch[i]) for name, batch in decoded.items()}
        shape = next(iter(pictures.values())).shape
        if source is not None and source.shape != shape:
            run.note(
                f"{source_file} is {source.shape[1]}x{source.shape[0]} and {file} decodes to {shape[1]}x{shape[0]}, "
                "so it is not taken for its source"
            )
            source = None
        row_figures = {name: figures(run, source, made) for name, made in pictures.items()} if source is not None else {}
        yield Compared(file.stem if number == 1 else f"{file.stem}-{i}", source, pictures, row_figures)


def figures(run: Run, source: "np.ndarray", made: "np.ndarray") -> dict[str, float | None]:
    """PSNR (dB) and SSIM of two (H, W, 3) uint8 pictures; None where a figure cannot be had. SSIM as Wang et al. 2004."""
    import numpy as np

    error = float(np.mean((source.astype(np.float64) - made) ** 2))
    psnr = None if error == 0 else round(10 * float(np.log10(255**2 / error)), 3)  # equal pictures: infinite, not JSON
    ssim: float | None = None
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        run.note("SSIM needs scikit-image: pip install 'fast-latent-decoders[eval]'")
    else:
        if min(source.shape[:2]) >= 11:  # its window
            options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
            ssim = round(float(structural_similarity(source, made, channel_axis=2, data_range=255, **options)), 4)
    return {"psnr": psnr, "ssim": ssim}


def figures_table(names: Sequence[str], rows: Sequence["Compared"]) -> Table:
    """Pictures down, decoders across, the mean last."""
    table = Table("PSNR dB / SSIM")
    for name in names:
        table.add_column(Text(name), justify="right")
    measured = [row for row in rows if row.figures]
    for row in measured:
        table.add_row(Text(row.name), *(row.caption(name) for name in names))
    if len(measured) > 1:
        table.add_section()
        table.add_row("mean", *(f"{mean(measured, name, 'psnr', 2)} / {mean(measured, name, 'ssim', 3)}" for name in names))
    return table


def mean(rows: Sequence["Compared"], name: str, figure: str, digits: int) -> str:
    values = [value for row in rows if (value := row.figures[name][figure]) is not None]
    return f"{sum(values) / len(values):.{digits}f}" if values else "-"
