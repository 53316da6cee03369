"""Intervals, and distances of distributions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fast_latent_decoders.evaluation.frechet import Moments, Reservoir, frechet, kernel_distance
from fast_latent_decoders.evaluation.intervals import by_group, interval, paired, spearman

# ---------------------------------------------------------------- intervals


def test_interval_covers_what_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(150):
        mean, low, high, n = interval(rng.normal(3, 2, 40).tolist(), seed=trial)
        assert low < mean < high and n == 40
        covered += low <= 3 <= high
    assert 0.89 <= covered / 150 <= 0.99


def test_interval_is_about_the_normal_one_and_repeats() -> None:
    values = np.random.default_rng(0).normal(0, 1, 400)
    found = interval(values.tolist())
    assert found == interval(values.tolist())
    half = 1.96 * values.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    wider = interval(values.tolist(), level=0.99)
    assert wider.low < found.low and wider.high > found.high


def test_interval_counts_what_is_there() -> None:
    nan = math.nan
    assert interval([1.0, nan, 3.0, nan])[::3] == (2.0, 2)
    assert interval([4.0, 4.0, nan]) == (4.0, 4.0, 4.0, 2)
    one = interval([5.0])
    assert (one.mean, one.n) == (5.0, 1) and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(interval([nan]).mean) and interval([]).n == 0
    with pytest.raises(ValueError, match="infinite"):
        interval([1.0, math.inf])


def test_paired_sees_what_two_intervals_cannot() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(25, 4, 60)  # pictures differ by 4 dB, decoders by 0.3
    ours, theirs = (hard + 0.3 + rng.normal(0, 0.2, 60)).tolist(), hard.tolist()
    assert interval(ours).low < interval(theirs).high
    difference = paired(ours, theirs)
    assert 0.2 < difference.low < difference.mean < difference.high < 0.4
    assert paired([1.0, math.nan, 2.0], [0.0, 0.0, math.nan])[::3] == (1.0, 1)
    with pytest.raises(ValueError, match="same pictures"):
        paired([1.0], [1.0, 2.0])


def test_by_group_and_spearman() -> None:
    assert by_group([1.0, 3.0, 5.0, math.nan], ["a", "a", "b", "b"]) == {"a": 2.0, "b": 5.0}
    assert spearman([1, 2, 3, math.nan], [10, 100, 1000, 0]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


# ---------------------------------------------------------------- Frechet


def moments(mean: Tensor, covariance: Tensor, n: int = 1000) -> Moments:
    made = Moments(len(mean))
    made.n, made.mean, made.scatter = n, mean.double(), covariance.double() * (n - 1)
    return made


def spd(d: int, rank: int | None = None) -> Tensor:
    root = torch.randn(d, rank or d, dtype=torch.float64)
    return root @ root.T / d


def test_frechet_closed_forms() -> None:
    d = 6
    mean, covariance = torch.randn(d), spd(d)
    assert frechet(moments(mean, covariance), moments(mean, covariance)).value == pytest.approx(0, abs=1e-10)
    shift = torch.randn(d)  # a pure shift counts once
    assert frechet(moments(mean, covariance), moments(mean + shift, covariance)).value == pytest.approx(shift.square().sum().item(), rel=1e-5)
    a, b = (moments(torch.zeros(d), s**2 * torch.eye(d)) for s in (1.5, 0.5))
    assert frechet(a, b).value == pytest.approx(d * (1.5 - 0.5) ** 2)
    one, other = moments(torch.tensor([2.0]), torch.tensor([[9.0]])), moments(torch.tensor([-1.0]), torch.tensor([[4.0]]))
    assert frechet(one, other).value == pytest.approx(3**2 + (3 - 2) ** 2)


@pytest.mark.parametrize("rank", [None, 4])
def test_frechet_equals_the_matrix_root(rank: int | None) -> None:
    from scipy.linalg import sqrtm

    a, b = spd(12, rank), spd(12)
    wanted = torch.trace(a + b).item() - 2 * np.trace(sqrtm((a @ b).numpy())).real
    ours = [frechet(moments(torch.zeros(12), x), moments(torch.zeros(12), y)).value for x, y in ((a, b), (b, a))]
    assert ours == pytest.approx([wanted] * 2, rel=1e-5)


def test_frechet_of_samples_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.fid import _compute_fid

    x, y = torch.randn(300, 8) + 5, 1.3 * torch.randn(200, 8) + 5.2
    a, b = Moments(8), Moments(8)
    a.update(x)
    b.update(y)
    wanted = _compute_fid(x.double().mean(0), x.double().T.cov(), y.double().mean(0), y.double().T.cov()).item()
    found = frechet(a, b)
    assert found.value == pytest.approx(wanted, rel=1e-6)
    assert (found.n, found.d, found.comparable) == (200, 8, True) and str(found).endswith("(n = 200, d = 8)")


def test_too_few_are_not_comparable() -> None:
    a = Moments(8)
    a.update(torch.randn(7, 8))
    found = frechet(a, a)
    assert not found.comparable and "n = 7, d = 8; not comparable" in str(found)
    with pytest.raises(ValueError, match="at least 2"):
        frechet(Moments(8), a)


def test_moments_stream_merge_and_resume(tmp_path: Path) -> None:
    x = torch.randn(101, 5) * torch.arange(1, 6)
    whole = Moments(5)
    whole.update(x)
    assert torch.allclose(whole.mean, x.double().mean(0)) and torch.allclose(whole.covariance, x.double().T.cov())
    parts = Moments(5)
    for part in x[:60].split(7):
        parts.update(part)
    np.savez(tmp_path / "moments.npz", **parts.arrays())  # type: ignore[arg-type]
    resumed = Moments.from_arrays(dict(np.load(tmp_path / "moments.npz")))
    for part in x[60:].split(7):
        resumed.update(part)
        parts.update(part)
    assert resumed.n == 101 and torch.equal(resumed.mean, parts.mean) and torch.equal(resumed.scatter, parts.scatter)
    first, second = Moments(5), Moments(5)
    first.update(x[:30])
    second.update(x[30:])
    first.merge(second)
    first.merge(Moments(5))
    for other in (resumed, first):
        assert torch.allclose(other.mean, whole.mean) and torch.allclose(other.covariance, whole.covariance)
    with pytest.raises(ValueError, match="finite"):
        first.update(torch.full((1, 5), math.nan))
    with pytest.raises(ValueError, match="expected features"):
        first.update(torch.zeros(1, 6))


def test_a_large_mean_costs_no_digits() -> None:
    x = torch.randn(500, 3, dtype=torch.float64)
    far = Moments(3)
    for part in (x + 1e7).split(50):
        far.update(part)
    assert torch.allclose(far.covariance, x.T.cov(), rtol=1e-6)


# ---------------------------------------------------------------- kernel distance


def test_kernel_distance_is_kid() -> None:
    from torchmetrics.image.kid import poly_mmd

    x, y = torch.randn(40, 16, dtype=torch.float64), torch.randn(40, 16, dtype=torch.float64) * 1.2
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(poly_mmd(x, y).item(), rel=1e-9)
    assert found.low < found.value < found.high and (found.n, found.d) == (40, 16)
    by_hand = sum((x[i] @ x[j] / 16 + 1) ** 3 for i in range(40) for j in range(40) if i != j) / (40 * 39)
    assert kernel_distance(x, x).value == pytest.approx(2 * (by_hand - ((x @ x.T / 16 + 1) ** 3).mean()).item())


def test_kernel_distance_is_unbiased_and_its_interval_holds() -> None:
    rng = torch.Generator().manual_seed(3)
    same = [kernel_distance(*torch.randn(2, 30, 4, generator=rng), resamples=2).value for _ in range(300)]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(300)
    big = [torch.randn(2000, 4, generator=rng, dtype=torch.float64) + shift for shift in (0, 1)]
    truth = kernel_distance(*big, resamples=2).value
    held = 0
    for trial in range(60):
        rows = torch.randint(2000, (2, 60), generator=rng)
        found = kernel_distance(big[0][rows[0]], big[1][rows[1]], resamples=300, seed=trial)
        held += found.low <= truth <= found.high
    assert 0.85 <= held / 60 <= 1


def test_paired_kernel_distance() -> None:
    x = torch.randn(50, 8)
    exact = kernel_distance(x, x.clone(), paired=True)
    assert exact.value == pytest.approx(0, abs=1e-12) and exact.low == pytest.approx(0, abs=1e-12)
    near, far = (kernel_distance(x + s * torch.randn(50, 8), x, paired=True, seed=7) for s in (0.3, 1.0))
    assert near.value < far.value
    assert np.quantile(far.resampled - near.resampled, 0.025) > 0  # one seed: the resamples are the same pictures
    with pytest.raises(ValueError, match="equal in number"):
        kernel_distance(x, x[1:], paired=True)


def test_reservoir_is_bounded_uniform_and_repeats() -> None:
    counts = torch.zeros(60)
    for seed in range(300):
        kept = Reservoir(1, size=15, seed=seed)
        for part in torch.arange(60.0)[:, None].split(7):
            kept.update(part)
        assert kept.kept.shape == (15, 1) and kept.seen == 60 and len(kept.kept.unique()) == 15
        counts[kept.kept[:, 0].long()] += 1
    assert (counts - 75).abs().max() < 5 * math.sqrt(300 * 0.25 * 0.75)
    a, b = Reservoir(1, 5), Reservoir(1, 5)
    a.update(torch.arange(40.0)[:, None])
    b.update(-torch.arange(40.0)[:, None])
    assert torch.equal(a.kept, -b.kept)  # the same pictures of two decoders
