"""The swap without `swap_decoder`: `inside` gives a module that stands in for vae.decoder. python examples/swap_by_hand.py"""

import torch
import typer
from diffusers import StableDiffusionXLPipeline

from fast_latent_decoders import FastDecoder, restore_decoder


def main(
    prompt: str = "a red fox in the snow",
    model: str = "stabilityai/stable-diffusion-xl-base-1.0",
    decoder: str = "subpixel-sdxl",
    steps: int = 30,
    size: int = 1024,
    out: str = "swapped",
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    latents = pipe(prompt, num_inference_steps=steps, height=size, width=size, output_type="latent").images

    original = pipe.vae.decoder
    for name in ("original", "fast"):
        if name == "fast":
            pipe.vae.decoder = FastDecoder.from_pretrained(decoder).inside(pipe.vae)
        vae = pipe.vae.to(torch.float32) if name == "original" else pipe.vae  # SDXL's own decoder overflows in float16
        with torch.no_grad():
            sample = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        pipe.image_processor.postprocess(sample)[0].save(f"{out}-{name}.png")
    restore_decoder(pipe, original=original)
    print(f"wrote {out}-original.png and {out}-fast.png")


if __name__ == "__main__":
    typer.run(main)
