"""Every command and code block of the README runs; pipelines from the Hub are replaced by tiny random ones."""

import re
import shlex
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, StableVideoDiffusionPipeline
from typer.testing import CliRunner

from fast_latent_decoders.cli import app

from .pipelines import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_code_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_disk = DiffusionPipeline.from_pretrained.__func__  # type: ignore[attr-defined]

    def load(cls: type, name: str, **kwargs: object) -> DiffusionPipeline:
        if name == "my-pipeline":
            return from_disk(cls, name, **kwargs)
        return {StableDiffusionXLPipeline: tiny.sdxl, StableVideoDiffusionPipeline: lambda: tiny.svd(image_size=224)}[cls]()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(load))
    tiny.picture().save("photo.jpg")
    pipe = tiny.sdxl()
    names: dict[str, object] = {"pipe": pipe, "original_vae": tiny.kl(), "latents": tiny.latents()}
    for code in blocks("python"):
        if "from_pretrained(" not in code.split("FastDecoder")[0]:  # blocks that go on with a pipeline
            names["pipe"] = tiny.sdxl()
        # What only a GPU does quickly: its device, its dtype, a full-size picture; and compilation.
        code = code.replace('optimize("compile")', "optimize()").replace('"cuda"', '"cpu"').replace("torch.float16", "torch.float32").replace("(1024, 576)", "(64, 64)")
        code = code.replace('snow")', 'snow", height=64, width=64, num_inference_steps=2)').replace(
            "(64, 64)))", "(64, 64)), height=64, width=64, num_frames=2, num_inference_steps=2)"
        )
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102 (the README is ours)
    assert (tmp_path / "fox.png").exists()
    assert len(names["frames"]) == 2  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines() if line.startswith("fld ")])
def test_commands_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("examples", "hub_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code == 0, done.output


def test_the_two_commands_are_those_of_ci() -> None:
    first, second = (block.strip() for block in blocks("sh")[:2])
    assert first.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt . && ")
    assert second == ".venv/bin/pip install -c constraints.txt -e '.[all,dev]' && .venv/bin/pytest -n 2"
    ci = (ROOT / ".ci/run").read_text()
    assert all(part in ci for part in ("pip install --quiet -c constraints.txt -e '.[all,dev]'", ".venv/bin/pytest -n 2"))
