"""Write hub_cards/taesdxl, taesd and the two tiny encoders from TAESD's own files: python training/make_baselines.py FOLDER

FOLDER holds taesdxl_decoder.safetensors, taesdxl_encoder.safetensors and the same for taesd, in the layout of madebyollin/taesd.
Tensors keep the dtype they are stored in, so nothing is rounded on the way.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

import fast_latent_decoders

CARDS = Path(__file__).parent.parent / "hub_cards"
FILE = "diffusion_pytorch_model.safetensors"


def main(folder: Path) -> None:
    for name, space in (("taesdxl", "sdxl"), ("taesd", "sd")):
        decoder = fast_latent_decoders.TAEDecoder(width=64, latent_space=space)
        stored = load_file(folder / f"{name}_decoder.safetensors")
        # Index 0 of the original layout is the squash, which has no tensors.
        tensors = {"decoder.layers.{}.{}".format(int(k.split(".", 1)[0]) - 1, k.split(".", 1)[1]): v for k, v in stored.items()}
        decoder.load_state_dict(tensors, strict=True)
        (CARDS / name).mkdir(parents=True, exist_ok=True)
        decoder.save_config(CARDS / name)
        save_file(tensors, CARDS / name / FILE, metadata={"format": "pt", "license": "MIT", "origin": "madebyollin/taesd"})

        encoder = load_file(folder / f"{name}_encoder.safetensors")
        target = CARDS / f"{name}-encoder"
        target.mkdir(parents=True, exist_ok=True)
        config = {
            "_class_name": "EncoderTiny",
            "in_channels": 3,
            "out_channels": 4,
            "num_blocks": [1, 3, 3, 3],
            "block_out_channels": [64] * 4,
            "act_fn": "relu",
        }
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {f"layers.{k}": v for k, v in encoder.items()}
        save_file(tensors, target / FILE, metadata={"format": "pt", "license": "MIT", "origin": "madebyollin/taesd"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
