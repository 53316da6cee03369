"""`fld list`: the decoders that have weights."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .run import table_console


def list_presets(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the decoders that can be named with --decoder."""
    from .. import presets

    rows: list[dict[str, Any]] = []
    for name, preset in presets().items():
        rows.append(
            {
                "name": name,
                "class": preset.class_name,
                "latent_space": preset.latent_space,
                "parameters": preset.parameters,
                "megabytes": round(preset.megabytes, 1),
                "mac_per_pixel": round(preset.mac_per_pixel),
                "licence": preset.licence,
                "location": preset.location,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("decoder", "latent space", "class", "licence", "weights")
    for title in ("parameters", "MB (fp16)", "MAC/pixel"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            *(row["name"], row["latent_space"], row["class"], row["licence"], place(row["location"])),
            *(f"{row['parameters'] / 1e6:.2f} M", f"{row['megabytes']:.1f}", f"{row['mac_per_pixel'] / 1e3:.0f} K"),
        )
    table_console().print(table)


def place(location: str | None) -> str:
    if location is None:
        return "not here"
    return "here" if Path(location).is_dir() else location
