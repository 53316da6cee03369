"""Terms of the loss, the adversary and the teacher, against values computed by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fast_latent_decoders import FastDecoder, SubpixelDecoder, SubpixelTemporalDecoder

from .tiny import module


def test_stlpips_rises_with_noise() -> None:
    distance = module("losses").ShiftTolerantLPIPS()
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    values = [distance((x + s * torch.randn_like(x)).clamp(-1, 1), x).item() for s in (0.0, 0.1, 0.4)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[0] < values[1] < values[2]


def test_pixel_terms_have_hand_computed_values() -> None:
    """A constant error of 0.3; its spectrum is one coefficient, 0.3 * sqrt(H W), among H * (W / 2 + 1)."""
    losses = module("losses")
    x = torch.rand(2, 3, 64, 64) - 0.5
    expected = {
        "l1": 0.3, "mse": 0.09, "charbonnier": (0.09 + 1e-6) ** 0.5 - 1e-3, "frequency": 0.3 * 64 / (64 * 33), "colour": 0.3, "detail": 0,
        "lattice": 0,
    }  # fmt: skip
    terms = {**losses.WEIGHTED, **losses.PLAIN}
    assert terms.keys() == {*expected, "ms_ssim"}
    for name, value in expected.items():
        assert terms[name](x + 0.3, x).item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
    checkerboard = (torch.arange(64)[:, None] + torch.arange(64)) % 2 - 0.5
    assert terms["colour"](x + checkerboard, x).item() == pytest.approx(0, abs=1e-6)
    # It is all diagonal band at full resolution, one of six, with an amplitude of 0.5, and gone at half resolution.
    # Too much counts 0.3 of 0.5, too little 0.7 of 0.5.
    assert terms["detail"](0 * x + checkerboard, 0 * x).item() == pytest.approx(0.6 * (0.25 + 1e-6) ** 0.5 / 6, abs=1e-3)
    assert terms["detail"](0 * x, 0 * x + checkerboard).item() == pytest.approx(1.4 * (0.25 + 1e-6) ** 0.5 / 6, abs=1e-3)
    assert terms["detail"](x.roll(1, -1), x) < 0.2 * terms["detail"](0 * x, x)  # elsewhere is as good
    assert terms["lattice"](x + checkerboard, x).item() == pytest.approx(0.5, rel=0.01)
    dots = torch.zeros(64, 64)
    dots[3::8, 5::8] = 0.8  # one of a latent's 64 pixels, in every window of 64 px: 0.8 * sqrt(1 / 64 - 1 / 64**2)
    assert terms["lattice"](x + dots, x).item() > 0.99 / 2 * 0.0992
    for size in (16, 64, 128, 192):
        y = torch.rand(1, 3, size, size) * 2 - 1
        assert terms["ms_ssim"](y, y).item() == pytest.approx(0, abs=1e-5)
        assert terms["ms_ssim"](y, torch.rand_like(y)).item() > 0.1


def test_faces_count_more_in_pixel_terms() -> None:
    """An error of 1 in a quarter of the pixels, which count threefold: 3 / (3 + 3); equal weights change nothing."""
    error, weight = torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 8)
    error[..., :4, :4] = 1
    weight[..., :4, :4] = 3
    for name, term in module("losses").WEIGHTED.items():
        plain = term(error, torch.zeros_like(error)).item()
        assert plain == pytest.approx(0.25, abs=1e-3), name
        assert term(error, torch.zeros_like(error), torch.full_like(weight, 5)).item() == pytest.approx(plain), name
        assert term(error, torch.zeros_like(error), weight).item() == pytest.approx(0.5, abs=1e-3), name


def test_the_temporal_term_has_a_hand_computed_value() -> None:
    """Two clips of three frames. A constant error costs nothing; one frame off by 0.6 is two wrong changes of 0.6 among two."""
    temporal = module("losses").temporal
    target = torch.rand(6, 3, 8, 8)
    decoded = target + 0.5
    assert temporal(decoded, target, 3).item() == pytest.approx(0, abs=1e-6)
    decoded[1] += 0.6
    assert temporal(decoded, target, 3).item() == pytest.approx(0.6 * 2 / 4, rel=1e-4)
    assert temporal(decoded, target, 1).item() == 0


def test_a_term_without_its_weights_says_which_need_none() -> None:
    with pytest.raises(RuntimeError, match=r"squeezenet=PATH.*stlpips needs no file"):
        module("losses").perceptual("squeeze")


def test_adversarial_terms_have_hand_computed_values() -> None:
    adversary = module("adversary")
    fake, real = torch.tensor([0.5, -2.0]), torch.tensor([2.0, 0.0])
    gap = torch.nn.functional.softplus
    expected = {
        "hinge": (0.75, (0.5 + (1.5 + 0) / 2) / 2),
        "least_squares": ((0.25 + 9) / 2, ((1 + 1) / 2 + (2.25 + 1) / 2) / 2),
        "relativistic": (gap(torch.tensor([1.5, 2.0])).mean().item(), gap(torch.tensor([-1.5, -2.0])).mean().item()),
    }
    for kind, (mine, its) in expected.items():
        assert adversary.decoder_loss(kind, fake, real).item() == pytest.approx(mine)
        assert adversary.discriminator_loss(kind, fake, real).item() == pytest.approx(its)


def test_the_adaptive_ratio_is_that_of_the_gradients() -> None:
    w = torch.nn.Parameter(torch.ones(4))
    ratio = module("adversary").adaptive_ratio((3 * w).sum(), (w / 2).sum(), w)
    assert ratio.item() == pytest.approx(6)
    assert not ratio.requires_grad


def test_a_discriminator_learns_to_tell_and_leaves_the_decoder_alone() -> None:
    torch.manual_seed(0)
    adversary = module("adversary").Adversary(module("config").Gan(lr=1e-3, memory=6), 4, Accelerator(), width=8)
    z, target = torch.randn(4, 4, 4, 4), torch.rand(4, 3, 32, 32) * 2 - 1
    decoded = (target * 0.3).requires_grad_()
    losses = [adversary.learn(decoded, target, z, step) for step in range(16)]
    assert losses[-1] < 0.7 * losses[0]
    assert decoded.grad is None
    assert len(adversary.pictures) == 6
    adversary.loss(decoded, target, z).backward()
    assert decoded.grad is not None
    assert all(parameter.grad is None or not parameter.requires_grad for parameter in adversary.network.parameters())


def test_normalised_gradients_have_one_length_whatever_the_discriminator_says() -> None:
    """Each picture's gradient has the root mean square that L1's has, times the weight."""
    picture = torch.rand(3, 3, 16, 16, requires_grad=True)
    passed = module("adversary").of_one_length(picture, weight=0.5)
    (passed.flatten(1).square().sum(1) * torch.tensor([1.0, 1e-3, 1e3])).sum().backward()
    assert picture.grad is not None
    sizes = picture.grad.flatten(1).square().mean(1).sqrt()
    assert torch.allclose(sizes, torch.full((3,), 0.5 / picture.numel()), rtol=1e-4)


def lesson(student: FastDecoder, **settings: Any) -> Any:
    teacher = module("config").Teacher(**{"path": "taesdxl", "output": 1, **settings})
    features = {name: module("losses").perceptual(name) for name in teacher.losses if name == "stlpips"}
    return module("teacher").Lesson(teacher, student.latent_space, student.decoder, torch.device("cpu"), features)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    student = FastDecoder.from_pretrained("taesdxl").float()
    losses = {"stlpips": 1, "detail": 1, "mse": 1, "frequency": 0}
    found = lesson(student, features=1, losses=losses, latents=["real", "noisy", "mixed", "recoloured", "widened"])
    z = torch.randn(4, 4, 8, 8)
    for step in range(5):
        taught = found.latents(z, 1, step, seed=step)
        assert taught.shape == (1 if step else 0, 4, 8, 8), "real ones are decoded with the batch already"
        assert not any(torch.equal(row, other) for row in taught for other in z)
        decoded, imitated = student.decoder(torch.cat([z, taught])).split([len(z), len(taught)])
        terms = found.terms(imitated, taught, 1, decoded, z, seed=step)
        assert terms.keys() == {"teacher", "teacher_maps", "teacher_stlpips", "teacher_detail", "teacher_mse"}
        assert max(term.item() for term in terms.values()) < 1e-6


def test_a_teacher_of_clips_sees_their_frames_together(tmp_path: Path) -> None:
    student = SubpixelTemporalDecoder(widths=(8, 8, 8), blocks=(1, 1, 1), memory=(1, 0, 0)).float()
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.12)  # pictures of about 0.2: rounding, which a memory layout changes, stays far below what the frames before do
    student.save_pretrained(tmp_path)
    found = lesson(student, path=str(tmp_path), share=1)
    z = torch.randn(6, 4, 4, 4)
    together, apart = student.decoder(z, 3), student.decoder(z, 1)
    assert found.terms(together, z, 3, together, z, seed=0)["teacher"].item() < 1e-6
    assert found.terms(apart, z, 3, apart, z, seed=0)["teacher"].item() > 1e-3


@pytest.mark.parametrize("kind", ["noisy", "mixed", "real"])
def test_a_share_of_one_clip_is_a_whole_clip_now_and_then(kind: str) -> None:
    student = FastDecoder.from_pretrained("taesdxl").float()
    found = lesson(student, latents=[kind], share=0.25)
    z = torch.randn(3, 4, 4, 4)
    times = 0
    for seed in range(16):
        taught = found.latents(z, 3, seed, seed)
        terms = found.terms(student.decoder(taught), taught, 3, student.decoder(z), z, seed)
        assert not len(taught) or (taught.shape == z.shape and not torch.equal(taught, z)), "whole clips, and never the batch's own"
        assert kind == "real" or bool(len(taught)) == bool(terms)
        times += bool(terms)
    assert 1 <= times <= 8


def test_widened_latents_keep_their_mean_and_spread_further() -> None:
    found = lesson(FastDecoder.from_pretrained("taesdxl").float(), share=1, latents=["widened"])
    z = torch.randn(1, 4, 8, 8) * torch.tensor([0.5, 1, 2, 1]).view(1, 4, 1, 1) + 1
    gains = []
    for seed in range(20):
        wide = found.latents(z, 1, 0, seed)
        assert torch.allclose(wide.mean((2, 3)), z.mean((2, 3)), atol=1e-5)
        gain = wide.std((2, 3)) / z.std((2, 3))
        assert torch.allclose(gain, gain[:, :1].expand_as(gain), atol=1e-4), "all channels alike"
        gains.append(gain[0, 0].item())
    assert 1 <= min(gains) < 1.1 and 1.2 < max(gains) <= 1.3


def test_a_teacher_of_structure_is_not_followed_in_colour() -> None:
    student = FastDecoder.from_pretrained("taesdxl").float()
    z = torch.randn(2, 4, 8, 8)
    tinted = student.decoder(z) + 0.3
    assert lesson(student, share=1).terms(tinted, z, 1, tinted, z, seed=0)["teacher"].item() == pytest.approx(0.3, rel=1e-3)
    assert lesson(student, share=1, structure=True).terms(tinted, z, 1, tinted, z, seed=0)["teacher"].item() == pytest.approx(0, abs=1e-5)
    striped = student.decoder(z) + torch.tensor([-0.3, 0.3]).repeat_interleave(8).repeat(4)
    for means, term in ((8, 0), (32, 0.3)):
        found = lesson(student, share=1, structure=True, means=means)
        assert found.terms(striped, z, 1, striped, z, seed=0)["teacher"].item() == pytest.approx(term, rel=1e-3, abs=1e-5)


def test_attention_maps_tell_networks_of_other_widths_apart() -> None:
    student = SubpixelDecoder(widths=[16, 8, 8], blocks=[1, 1, 1], convs=1)
    found = lesson(student, features=1, share=1)
    z = torch.randn(2, 4, 8, 8)
    term = found.terms(student.decoder(z), z, 1, z, z, seed=0)["teacher_maps"]
    assert 0 < term.item() < 2
    term.backward()
    assert all(parameter.grad is not None for parameter in student.decoder.layers[0].parameters())
