"""Latent spaces: what a decoder needs to know of the VAE whose latents it decodes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentSpace:
    """The convention of one VAE's latents.

    A pipeline hands a VAE latents in *VAE units*; networks are trained on *scaled* latents,
    ``(z - shift_factor) * scaling_factor``, which have a spread of about one.
    """

    name: str
    channels: int
    scaling_factor: float
    shift_factor: float = 0.0
    spatial_factor: int = 8


SDXL = LatentSpace("sdxl", channels=4, scaling_factor=0.13025)
SD = LatentSpace("sd", channels=4, scaling_factor=0.18215)  # SD 1.x, SD 2.x and Stable Video Diffusion

KNOWN = {space.name: space for space in (SDXL, SD)}


def latent_space(
    name: str,
    channels: int | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
) -> LatentSpace:
    """The latent space called `name`; values that are given must agree with a known one, or define a new one.

    Raises:
        ValueError: a value contradicts a known space, or a new space lacks channels or scaling factor.
    """
    given = {"channels": channels, "scaling_factor": scaling_factor, "shift_factor": shift_factor}
    if name in KNOWN:
        space = KNOWN[name]
        for key, value in given.items():
            if value is not None and abs(value - getattr(space, key)) > 1e-6:
                raise ValueError(
                    f"latent space {name!r} has {key} {getattr(space, key)}, got {value}; "
                    "leave it out, or give the space a name of its own"
                )
        return space
    if channels is None or scaling_factor is None:
        raise ValueError(
            f"latent space {name!r} is not one of {', '.join(KNOWN)}, so latent_channels and scaling_factor must be given"
        )
    return LatentSpace(name, channels, scaling_factor, shift_factor or 0.0)
