"""`fld`, the command line. Each command is a module; what is heavy (torch, diffusers) is imported when a command runs."""

import typer

from .bench import bench
from .check import check
from .compare import compare
from .convert import convert
from .decode import decode
from .encode import encode
from .evaluate import evaluate
from .list import list_presets

app = typer.Typer(
    name="fld",
    help="Fast decoders for SDXL, Stable Diffusion and Stable Video Diffusion latents.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("list")(list_presets)
app.command("decode")(decode)
app.command("encode")(encode)
app.command("compare")(compare)
app.command("convert")(convert)
app.command("evaluate")(evaluate)
app.command("bench")(bench)
app.command("check")(check)
