"""The paper's tables 1 to 3, measured anew: quality by `fld evaluate`, time by `fld bench`. The commands are printed first.

    python training/paper_tables.py 1 coco/val2017
    python training/paper_tables.py 2 coco/val2017
    python training/paper_tables.py 3 UCF-101 --names ucfTrainTestlist/testlist01.txt

Where the Hub cannot be reached, `--tiny` encodes with TAESD's encoder and leaves out the VAE's own decoder.
"""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from typer.main import get_command

from fast_latent_decoders import presets
from fast_latent_decoders.cli import app

SDXL, SVD = "madebyollin/sdxl-vae-fp16-fix", "stabilityai/stable-video-diffusion-img2vid-xt/vae"
PICTURES = ["tae-192-sdxl", "efficientvit-sdxl", "subpixel-sdxl", "subpixel-small-sdxl", "taesdxl"]
CLIPS = ["tae-192-svd", "tae-temporal-svd", "efficientvit-svd", "subpixel-temporal-svd", "subpixel-sd", "taesd"]
# The paper squashes pictures to a square and COCO's are 640 x 480 (FACTS 7.2, 7.10): here the short side is scaled, the centre is cut.
# Sixteen frames of a clip are two of the paper's windows for VideoMAE, and the one that I3D wants; times are for eight, as in the paper.
SIZES = {1: 256, 2: 1024, 3: 240}


def main(
    table: Annotated[int, typer.Argument(min=1, max=3)],
    data: Annotated[str, typer.Argument(help="COCO2017's val pictures; for table 3 UCF-101's clips.")],
    names: Annotated[str | None, typer.Option(help="UCF-101's list, testlist01.txt.")] = None,
    classes: Annotated[list[str], typer.Option("--class", help="Of UCF-101; several times.")] = [],  # noqa: B006
    vae: Annotated[str | None, typer.Option(help="The VAE that encodes and is the baseline; a folder or Hub id.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="TAESD's encoder in the VAE's place.")] = False,
    count: Annotated[int | None, typer.Option(help="Samples; without, all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("paper"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the commands.")] = False,
) -> None:
    """Measure one of the paper's tables."""
    clips = table == 3
    wanted = CLIPS if clips else PICTURES
    decoders = [name for name in wanted if name in presets() and presets()[name].location]
    if missing := [name for name in wanted if name not in decoders]:
        typer.echo(f"left out, there are no weights yet: {', '.join(missing)}")
    vae = vae or (SVD if clips else SDXL)
    measured = decoders if tiny else [vae, *decoders]
    evaluate = ["evaluate", data, "--size", str(SIZES[table]), "--out", str(out / f"table-{table}"), "--baseline", measured[0 if not tiny else -1]]
    evaluate += [word for name in measured for word in ("--decoder", name)]
    evaluate += [] if tiny else ["--encoder", vae, "--posterior", "sample"]
    evaluate += ["--clips", "--frames", "16", "--features", "videomae-v2", "--features", "i3d"] if clips else ["--features", "inception"]
    evaluate += ["--names", names] if names else []
    evaluate += [word for name in classes for word in ("--class", name)]
    evaluate += ["--count", str(count)] if count else []
    bench = ["bench", *(("svd-vae",) if clips else ("sdxl-vae", "efficientvit")), *decoders, "--size", str(SIZES[table]), "--unsynchronised"]
    bench += ["--frames", "8"] if clips else []
    bench += ["--json", str(out / f"table-{table}-bench.json")]
    for words in (evaluate, bench):
        typer.echo(f"fld {shlex.join(words)}")
    for words in (evaluate, bench) if not dry_run else ():
        code = get_command(app).main(words, prog_name="fld", standalone_mode=False)
        if code:
            raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
