"""Image to video with Stable Video Diffusion and a fast decoder inside its VAE: python examples/svd.py photo.jpg"""

import numpy as np
import torch
import typer
from diffusers import StableVideoDiffusionPipeline
from diffusers.utils import load_image

from fast_latent_decoders import stream_frames, swap_decoder
from fast_latent_decoders.clips import write_clip


def main(
    image: str,
    model: str = "stabilityai/stable-video-diffusion-img2vid-xt",
    decoder: str = "subpixel-temporal-svd",
    frames: int = 25,
    steps: int = 25,
    width: int = 1024,
    height: int = 576,
    out: str = "svd.mp4",
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = StableVideoDiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    swap_decoder(pipe, decoder)
    picture = load_image(image).resize((width, height))
    # One frame after the other: seamless, whatever the clip's length, in the memory of one frame.
    clip = stream_frames(pipe, picture, width=width, height=height, num_frames=frames, num_inference_steps=steps)
    count = write_clip(out, (np.asarray(frame) for (frame,) in clip))
    print(f"wrote {count} frames to {out}")


if __name__ == "__main__":
    typer.run(main)
