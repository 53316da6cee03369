"""Text to image with SDXL and a fast decoder as the whole VAE: python examples/sdxl.py "a red fox in the snow" """

import torch
import typer
from diffusers import StableDiffusionXLPipeline

from fast_latent_decoders import FastDecoder


def main(
    prompt: str = "a red fox in the snow",
    model: str = "stabilityai/stable-diffusion-xl-base-1.0",
    decoder: str = "subpixel-sdxl",
    steps: int = 30,
    size: int = 1024,
    out: str = "sdxl.png",
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=dtype)
    pipe.vae = FastDecoder.from_pretrained(decoder, torch_dtype=dtype)
    pipe.to(device)
    pipe(prompt, num_inference_steps=steps, height=size, width=size).images[0].save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
