"""Pipelines saved and loaded in a fresh process; what a socket refuses; loading that is strict."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoModel
from safetensors.torch import load_file, save_file

import fast_latent_decoders
from fast_latent_decoders import FastDecoder, SubpixelDecoder, TAEDecoder, restore_decoder, swap_decoder
from tests.pipelines import tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"

FRESH = """
import sys
import numpy as np
import torch
import fast_latent_decoders
from diffusers import StableDiffusionXLPipeline
from tests.pipelines import tiny

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    pipe = tiny._quiet(StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False))
    assert type(pipe.vae) is fast_latent_decoders.SubpixelDecoder, type(pipe.vae)
    np.save(folder + "/text.npy", tiny.run(pipe))
    image = tiny.image_to_image(pipe)
    if pipe.vae.config.encoder == "external":
        try:
            tiny.run(image)
        except RuntimeError as error:
            assert "encoder='external' and none was given: pass encoder=vae" in str(error), error
        else:
            raise AssertionError("it fell back to another encoder")
        pipe.vae.with_encoder(tiny.kl())
    if pipe.vae.config.encoder != "none":
        np.save(folder + "/image.npy", tiny.run(image))
"""


def fresh_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(fast_latent_decoders.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=False, env=environment, cwd=root, capture_output=True, text=True)


@pytest.mark.filterwarnings("ignore:encoding with the tiny")
def test_a_saved_pipeline_gives_the_same_picture_in_a_fresh_process(tmp_path: Path) -> None:
    """With each kind of encoder; an external one has to be given again, and never falls back to another."""
    expected: dict[str, dict[str, np.ndarray]] = {}
    for encoder in ("embedded", "external", "none"):
        pipe = tiny.sdxl()
        fast = tiny.decoder(encoder="none" if encoder == "external" else encoder)
        pipe.vae = fast.with_encoder(pipe.vae) if encoder == "external" else fast
        pipe.save_pretrained(tmp_path / encoder)
        index = json.loads((tmp_path / encoder / "model_index.json").read_text())
        assert index["vae"] == ["fast_latent_decoders", "SubpixelDecoder"]
        assert sorted(os.listdir(tmp_path / encoder / "vae")) == ["config.json", WEIGHTS]
        expected[encoder] = {"text": tiny.run(pipe)}
        if encoder != "none":
            expected[encoder]["image"] = tiny.run(tiny.image_to_image(pipe))
    result = fresh_process(FRESH, *(str(tmp_path / encoder) for encoder in expected))
    assert result.returncode == 0, result.stderr[-3000:]
    for encoder, pictures in expected.items():
        for name, picture in pictures.items():
            np.testing.assert_allclose(np.load(tmp_path / encoder / f"{name}.npy"), picture, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_without_the_import_diffusers_says_what_is_missing(tmp_path: Path) -> None:
    """CONTRACT 6.2: reload snippets begin with `import fast_latent_decoders`."""
    pipe = tiny.sdxl()
    pipe.vae = tiny.decoder()
    pipe.save_pretrained(tmp_path)
    result = fresh_process("import sys, diffusers; diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])", str(tmp_path))
    assert "fast_latent_decoders is not one of the libraries" in result.stderr


@pytest.mark.parametrize("way", ["swapped", "by hand"])
def test_a_pipeline_with_a_socket_refuses_to_be_saved(way: str, tmp_path: Path) -> None:
    """It would reload as another decoder (CONTRACT 4.6). Nothing is written before the refusal; restored, it saves as ever."""
    pipe = tiny.sdxl()
    original = pipe.vae.decoder
    if way == "swapped":
        swap_decoder(pipe, tiny.decoder(), keep=True)
    else:
        pipe.vae.decoder = tiny.decoder().inside(pipe.vae)
    for save in (pipe.save_pretrained, tiny.image_to_image(pipe).save_pretrained, pipe.vae.save_pretrained):
        with pytest.raises(RuntimeError, match=r"decodes with SubpixelDecoder, which its format cannot hold.*restore_decoder"):
            save(tmp_path / "refused")
        assert not list((tmp_path / "refused").rglob("*.*"))
    if way == "swapped":
        restore_decoder(pipe)
    else:
        pipe.vae.decoder = original  # the guard is still there, and lets it through with all its options
    pipe.save_pretrained(tmp_path / "restored", variant="fp16")
    assert (tmp_path / "restored" / "vae" / "diffusion_pytorch_model.fp16.safetensors").exists()
    assert json.loads((tmp_path / "restored" / "vae" / "config.json").read_text())["force_upcast"] is True


def test_svd_and_sd_refuse_too(tmp_path: Path) -> None:
    for pipe in (tiny.svd(), tiny.sd()):
        swap_decoder(pipe, tiny.decoder(space="sd"))
        with pytest.raises(RuntimeError, match="cannot hold"):
            pipe.save_pretrained(tmp_path)
        assert not list(tmp_path.rglob("*.*"))


# ---------------------------------------------------------------- the decoder alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_round_trips_are_bit_exact(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    fast, z = tiny.decoder(family).to(dtype), tiny.latents()
    fast.save_pretrained(tmp_path)
    for cls in (FastDecoder, type(fast)):
        loaded = cls.from_pretrained(tmp_path, torch_dtype=dtype)
        assert type(loaded) is type(fast)
        assert loaded.dtype == dtype
        assert not loaded.training
        assert loaded.config.encoder == "none"
        assert torch.equal(loaded.decode(z).sample, fast.decode(z).sample)


def test_the_folder_holds_what_is_pushed_to_the_hub(tmp_path: Path) -> None:
    """`push_to_hub` uploads what `save_pretrained` writes: a config with every field, and weights."""
    fast = tiny.decoder()
    fast.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", WEIGHTS]
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = {"_class_name": "SubpixelDecoder", "widths": [16, 8, 8], "blocks": [1, 1, 1], "convs": 1, "latent_space": "sdxl"}
    wanted |= {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": False, "block_out_channels": [64] * 4}
    assert {key: config[key] for key in wanted} == wanted
    assert load_file(tmp_path / WEIGHTS).keys() == fast.state_dict().keys()


def test_variants(tmp_path: Path) -> None:
    fast = tiny.decoder().to(torch.float16)
    fast.save_pretrained(tmp_path, variant="fp16")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.fp16.safetensors"]
    loaded = FastDecoder.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert torch.equal(loaded.decode(tiny.latents()).sample, fast.decode(tiny.latents()).sample)
    with pytest.raises(OSError):
        FastDecoder.from_pretrained(tmp_path)


def test_a_pipeline_with_a_variant(tmp_path: Path) -> None:
    pipe = tiny.sdxl(torch.float16)
    pipe.vae = tiny.decoder().to(torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    loaded = type(pipe).from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16, add_watermarker=False)
    np.testing.assert_array_equal(tiny.run(tiny._quiet(loaded)), tiny.run(pipe))


def test_as_a_component_of_a_pipeline(tmp_path: Path) -> None:
    """`from_pretrained(..., vae=fast)`, and diffusers' AutoModel on a pipeline's subfolder (CONTRACT 6.5, 6.6)."""
    pipe = tiny.sdxl()
    pipe.vae = fast = tiny.decoder()
    pipe.save_pretrained(tmp_path)
    other = tiny.decoder("tae")
    assert type(pipe).from_pretrained(tmp_path, vae=other).vae is other
    loaded = AutoModel.from_pretrained(str(tmp_path), subfolder="vae")
    assert torch.equal(loaded.decode(tiny.latents()).sample, fast.decode(tiny.latents()).sample)
    assert torch.equal(
        FastDecoder.from_pretrained(tmp_path, subfolder="vae").decode(tiny.latents()).sample, fast.decode(tiny.latents()).sample
    )


def change(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda t: t.pop("decoder.layers.0.bias"), r"do not fit its SubpixelDecoder config: 1 missing tensors \(decoder.layers.0.bias"),
        (lambda t: t.update({"encoder.0.weight": torch.zeros(1)}), r"1 unexpected tensors \(encoder.0.weight"),
        (lambda t: t.update({"decoder.layers.0.bias": torch.zeros(5)}), r"decoder.layers.0.bias"),
    ],
    ids=["missing", "surplus", "misshapen"],
)
def test_a_checkpoint_that_does_not_fit_is_an_error(edit: Any, sentence: str, tmp_path: Path) -> None:
    tiny.decoder().save_pretrained(tmp_path)
    change(tmp_path, edit)
    for low_cpu_mem_usage in (True, False):
        with pytest.raises((ValueError, RuntimeError), match=sentence):
            FastDecoder.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_another_class_is_an_error(tmp_path: Path) -> None:
    tiny.decoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a SubpixelDecoder, expected TAEDecoder"):
        TAEDecoder.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, sentence in (("AutoencoderTiny", "convert it first: fld convert"), ("Other", "holds a Other, expected SubpixelDecoder")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": name}))
        with pytest.raises(ValueError, match=sentence):
            FastDecoder.from_pretrained(tmp_path)


def test_unknown_config_fields_of_a_later_version_do_not_hurt(tmp_path: Path) -> None:
    fast = tiny.decoder()
    fast.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "from_the_future": 1}))
    assert isinstance(FastDecoder.from_pretrained(tmp_path), SubpixelDecoder)


def test_loading_information_is_handed_out_when_asked_for(tmp_path: Path) -> None:
    tiny.decoder().save_pretrained(tmp_path)
    loaded, information = FastDecoder.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, SubpixelDecoder)
    assert not information["missing_keys"]
