"""Put a decoder of your own on the Hub, or into a folder of the same content: python examples/push_to_hub.py FOLDER you/my-decoder"""

import typer

import fast_latent_decoders  # a pipeline saved with a fast decoder needs this import before it is loaded again


def main(folder: str, name: str, local: bool = False) -> None:
    decoder = fast_latent_decoders.FastDecoder.from_pretrained(folder)
    if local:
        decoder.save_pretrained(name)
    else:
        decoder.push_to_hub(name, commit_message=f"{type(decoder).__name__} for {decoder.config.latent_space} latents")
    print(f"load it with FastDecoder.from_pretrained({name!r})")


if __name__ == "__main__":
    typer.run(main)
