"""Image to image with SDXL: the VAE keeps its own encoder, only its decoder is swapped. python examples/image_to_image.py photo.jpg"""

import torch
import typer
from diffusers import StableDiffusionXLImg2ImgPipeline
from diffusers.utils import load_image

from fast_latent_decoders import swap_decoder


def main(
    image: str,
    prompt: str = "the same scene as an oil painting",
    model: str = "stabilityai/stable-diffusion-xl-base-1.0",
    decoder: str = "subpixel-sdxl",
    strength: float = 0.5,
    steps: int = 30,
    size: int = 1024,
    out: str = "image_to_image.png",
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    swap_decoder(pipe, decoder)
    picture = load_image(image).resize((size, size))
    pipe(prompt, image=picture, strength=strength, num_inference_steps=steps).images[0].save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
