"""Tiny, random, seeded, offline pipelines and decoders: the real classes of diffusers and ours, a few channels wide.

Their pictures mean nothing; what is compared is one way of decoding the same latents with another.
"""

from typing import Any

import numpy as np
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    EulerDiscreteScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from fast_latent_decoders import (
    EfficientViTDecoder,
    FastDecoder,
    SubpixelDecoder,
    SubpixelTemporalDecoder,
    TAEDecoder,
    TAETemporalDecoder,
)

SIZE = 64
LATENT = SIZE // 8
# A learned-looking 1x1 convolution: far from the identity, well conditioned (3.2).
POST_QUANT = torch.tensor([[0.9, 0.3, -0.2, 0.1], [-0.25, 1.1, 0.2, 0.3], [0.1, -0.3, 0.8, -0.2], [0.2, 0.1, 0.3, -1.2]])
POST_QUANT_BIAS = torch.tensor([0.4, -0.6, 0.2, 0.5])

FAMILIES: dict[str, tuple[type[FastDecoder], dict[str, Any]]] = {
    "subpixel": (SubpixelDecoder, {"widths": (16, 8, 8), "blocks": (1, 1, 1), "convs": 1}),
    "subpixel-4": (SubpixelDecoder, {"widths": (16, 8), "blocks": (1, 1), "convs": 1}),  # the last pixel shuffle by 4
    "streaming": (SubpixelTemporalDecoder, {"widths": (16, 8, 8), "blocks": (2, 1, 1), "memory": (1, 1, 0)}),
    "tae": (TAEDecoder, {"width": 8, "blocks": (1, 1, 1, 1)}),
    "tae-bilinear": (TAEDecoder, {"width": (12, 8, 8, 4), "blocks": (1, 1, 1, 1), "upsampling": "bilinear"}),
    "temporal": (TAETemporalDecoder, {"width": 32, "blocks": (1, 1, 1, 1), "mid_block": "latent"}),
    "efficientvit": (EfficientViTDecoder, {"widths": (32, 16, 8), "attention_blocks": 2, "residual_blocks": (1, 1)}),
}
LOCAL = ("subpixel", "subpixel-4", "streaming", "tae", "tae-bilinear")  # families with a finite receptive field


# ---------------------------------------------------------------- decoders


def decoder(family: str = "subpixel", space: str = "sdxl", seed: int = 0, **config: Any) -> Any:
    """A small decoder whose every layer counts, and whose pictures stay inside [-1, 1]."""
    cls, shape = FAMILIES[family]
    torch.manual_seed(seed)
    made = cls(**{"latent_space": space, "encoder": "none", **shape, **config})
    return randomised(made).eval().requires_grad_(False)


def randomised(fast: FastDecoder) -> FastDecoder:
    """Residual branches start at zero: give them weights. The last convolution then centres the pictures, with a spread of 0.2."""
    z = latents(fast.latent_space.name)
    gain = 2 if isinstance(fast, TAEDecoder | TAETemporalDecoder) else 1  # their layers end in [0, 1]
    last = [module for module in fast.decoder.modules() if isinstance(module, nn.Conv2d)][-1]
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.copy_(torch.where(parameter == 0, torch.randn_like(parameter) * 0.1, parameter))
        last.bias.zero_()
        last.weight.mul_(0.2 / fast.decode(z).sample.std())
        last.bias.sub_(fast.decode(z).sample.mean() / gain)
    return fast


def latents(space: str = "sdxl", n: int = 1, height: int = LATENT, width: int = LATENT, seed: int = 0) -> Tensor:
    """Latents in VAE units, whose scaled values have a spread of one."""
    scale = {"sdxl": 0.13025, "sd": 0.18215}[space]
    return torch.randn(n, 4, height, width, generator=torch.Generator().manual_seed(seed)) / scale


# ---------------------------------------------------------------- VAEs


def kl(space: str = "sdxl", dtype: torch.dtype = torch.float32, **config: Any) -> AutoencoderKL:
    """AutoencoderKL with a learned-looking post_quant_conv, as SDXL's (upcasting) or SD's."""
    torch.manual_seed(1)
    vae = AutoencoderKL(
        **{
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [32] * 4,
            "scaling_factor": {"sdxl": 0.13025, "sd": 0.18215}[space],
            "force_upcast": space == "sdxl",
            "sample_size": SIZE,
            **config,
        }
    )
    if vae.config.latent_channels == 4 and vae.post_quant_conv is not None:
        with torch.no_grad():
            vae.post_quant_conv.weight.copy_(POST_QUANT[:, :, None, None])
            vae.post_quant_conv.bias.copy_(POST_QUANT_BIAS)
    return vae.to(dtype).eval()


def temporal_kl(dtype: torch.dtype = torch.float32) -> AutoencoderKLTemporalDecoder:
    """SVD's VAE; it has no post_quant_conv."""
    torch.manual_seed(1)
    config = {"down_block_types": ["DownEncoderBlock2D"] * 4, "block_out_channels": [32] * 4}
    return AutoencoderKLTemporalDecoder(**config).to(dtype).eval()


# ---------------------------------------------------------------- pipelines


def _tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


def _text_encoder(cls: type = CLIPTextModel) -> Any:
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=16, projection_dim=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return cls(config).eval()


def _unet_config(sdxl: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 64 if sdxl else 32,
    }
    if sdxl:
        config |= {
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "transformer_layers_per_block": (1, 2),
            "projection_class_embeddings_input_dim": 80,
        }
    return config


def _unet(sdxl: bool) -> UNet2DConditionModel:
    torch.manual_seed(3)
    return UNet2DConditionModel(sample_size=LATENT, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **_unet_config(sdxl))


def sdxl(dtype: torch.dtype = torch.float32, vae: nn.Module | None = None) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline(
        vae=kl("sdxl") if vae is None else vae,
        text_encoder=_text_encoder(),
        text_encoder_2=_text_encoder(CLIPTextModelWithProjection),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=_unet(sdxl=True),
        scheduler=EulerDiscreteScheduler(steps_offset=1),
        add_watermarker=False,
    )
    return _quiet(pipe.to(dtype))


def image_to_image(pipe: StableDiffusionXLPipeline) -> StableDiffusionXLImg2ImgPipeline:
    return _quiet(StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False))


def inpainting(pipe: StableDiffusionXLPipeline) -> StableDiffusionXLInpaintPipeline:
    return _quiet(StableDiffusionXLInpaintPipeline(**pipe.components, add_watermarker=False))


def controlnet(pipe: StableDiffusionXLPipeline) -> StableDiffusionXLControlNetPipeline:
    torch.manual_seed(4)
    net = ControlNetModel(conditioning_embedding_out_channels=(8, 8, 16, 16), **_unet_config(sdxl=True)).to(pipe.dtype)
    return _quiet(StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=net, add_watermarker=False))


def sd(dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=kl("sd"),
        text_encoder=_text_encoder(),
        tokenizer=_tokenizer(),
        unet=_unet(sdxl=False),
        scheduler=EulerDiscreteScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _quiet(pipe.to(dtype))


def svd(dtype: torch.dtype = torch.float32, image_size: int = SIZE) -> StableVideoDiffusionPipeline:
    """`image_size` is what the image encoder takes: tensors must come so, pictures are resized to 224 by the pipeline."""
    torch.manual_seed(5)
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=LATENT, num_attention_heads=(2, 4), cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, projection_dim=32, num_hidden_layers=2, num_attention_heads=4, image_size=image_size, intermediate_size=37, patch_size=16
    )
    pipe = StableVideoDiffusionPipeline(
        vae=temporal_kl(),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
        feature_extractor=CLIPImageProcessor(crop_size=image_size, size={"shortest_edge": image_size}),
    )
    return _quiet(pipe.to(dtype))


def animatediff(dtype: torch.dtype = torch.float32) -> AnimateDiffPipeline:
    torch.manual_seed(6)
    adapter = MotionAdapter(block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4)
    pipe = AnimateDiffPipeline(
        vae=kl("sd"),
        text_encoder=_text_encoder(),
        tokenizer=_tokenizer(),
        unet=_unet(sdxl=False),
        motion_adapter=adapter.eval(),
        scheduler=EulerDiscreteScheduler(steps_offset=1),
    )
    return _quiet(pipe.to(dtype))


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------- running them


def picture(seed: int = 0) -> Image.Image:
    """A smooth 64x64 picture."""
    noise = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def still() -> Tensor:
    """What image-to-video begins with; a tensor, as pictures would be resized."""
    return torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 255


def run(pipe: Any, steps: int = 2, **inputs: Any) -> np.ndarray:
    """One call of any of the pipelines, with the pictures its kind needs, as an array in [0, 1]."""
    inputs = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": steps, "output_type": "np", **inputs}
    if isinstance(pipe, StableVideoDiffusionPipeline):
        return pipe(still(), **{"height": SIZE, "width": SIZE, "num_frames": 4, **inputs}).frames
    if isinstance(pipe, StableDiffusionXLInpaintPipeline):
        mask = Image.fromarray(np.pad(np.full((24, 24), 255, np.uint8), 20))
        inputs = {"image": picture(), "mask_image": mask, "height": SIZE, "width": SIZE, "strength": 0.9, **inputs}
    elif isinstance(pipe, StableDiffusionXLImg2ImgPipeline):
        inputs = {"image": picture(), "strength": 0.9, **inputs}
    elif isinstance(pipe, StableDiffusionXLControlNetPipeline):
        inputs = {"image": picture(), **inputs}
    else:
        inputs = {"height": SIZE, "width": SIZE, **inputs}
    return pipe("a cat", **inputs).images
