"""`fld check`: does this decoder work on this machine?"""

import json
from typing import Annotated, NoReturn

import typer
from rich.table import Table

from .loading import DeviceName, find_device, load_decoder
from .run import table_console


def check(
    decoder: Annotated[str, typer.Argument(help="A preset (see fld list), a folder or a Hub id.")] = "subpixel-sdxl",
    device: Annotated[DeviceName, typer.Option(help="What to check; auto is the best there is.")] = "auto",
    robust: Annotated[bool, typer.Option("--robust", help="Latents that no encoder makes, in float32 and both half types.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare a device with the CPU on a fixed latent, look for NaN, and name the fastest number format and layout.

    Exit code 1 if a picture comes out wrong.
    """
    from ..evaluation.check import best, self_test

    place = find_device(device)
    if robust:
        check_robustness(decoder, place, as_json)
    trials = self_test(load_decoder(decoder), place)
    chosen = best(trials, place)
    broken = list(dict.fromkeys(trial.problem for trial in trials if trial.broken and trial.problem))
    passing = [trial.problem for trial in trials if trial.problem and not trial.broken]
    works = chosen is not None and not broken
    if as_json:
        found = {"decoder": decoder, "device": place, "works": works, "best": chosen and chosen.as_json()}
        typer.echo(json.dumps({**found, "trials": [trial.as_json() for trial in trials], "problems": broken}, indent=2))
        raise typer.Exit(0 if works else 1)
    table = Table("dtype", "layout", "result")
    table.add_column("rms from CPU float32, /255", justify="right")
    table.add_column("ms, 128 px" + (", 1 thread" if place == "cpu" else ""), justify="right")
    for trial in trials:
        result = "wrong" if trial.broken else "-" if trial.problem else "right"
        error, ms = ("-" if value is None else f"{value:.2f}" for value in (trial.error, trial.ms))
        table.add_row(trial.dtype, trial.layout.removesuffix("_format"), result, error, ms)
    table_console().print(table)
    for sentence in (*broken, *dict.fromkeys(passing)):
        typer.echo(sentence, err=True)
    if chosen:
        typer.echo(f"{decoder} on {place}: fastest in {chosen.dtype}, {chosen.layout.removesuffix('_format')}")
    else:
        typer.echo(f"{decoder} does not work on {place}", err=True)
    raise typer.Exit(0 if works else 1)


def check_robustness(name: str, device: str, as_json: bool) -> NoReturn:
    from ..evaluation.robustness import LIMIT, robustness

    cases = robustness(load_decoder(name), device)
    if as_json:
        typer.echo(json.dumps({"decoder": name, "device": device, "cases": [case.as_json() for case in cases]}, indent=2))
    else:
        table = Table("latents (scaled)")
        for title in ("largest activation", "largest output", *(f"{dtype}: largest difference, /255" for dtype in cases[0].differences)):
            table.add_column(title, justify="right")
        for case in cases:
            differences = ("not finite" if value is None else f"{value:.1f}" for value in case.differences.values())
            table.add_row(case.name, f"{case.activation:.1f}", f"{case.output:.2f}", *differences)
        table_console().print(table)
        for case in cases:
            if not case.passed:
                typer.echo(f"{case.name}: not finite, or an activation above {LIMIT:.0f}", err=True)
    raise typer.Exit(0 if all(case.passed for case in cases) else 1)
