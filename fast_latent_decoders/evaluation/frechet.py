"""Distances of two sets of feature vectors: Frechet from streamed moments, and the unbiased kernel distance for small sets.

Features are (N, d) tensors of any float type, one row per picture or clip, in the order of the pictures. Everything is summed
in float64. What the features are, and so whether a distance may be called FID, KID, FVD or KVD, is features.py's to say.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


class Moments:
    """Streaming mean and centred covariance of d-dimensional features (Chan, Golub and LeVeque 1979), mergeable and resumable.

    Blocks are centred on their own mean before anything is squared, so that a large common mean costs no digits.
    Memory: d x d float64, whatever the number of features.
    """

    def __init__(self, d: int) -> None:
        self.d = d
        self.n = 0
        self.mean = torch.zeros(d, dtype=torch.float64)
        self.scatter = torch.zeros(d, d, dtype=torch.float64)  # sum of (x - mean) (x - mean)^T

    def update(self, features: Tensor) -> None:
        """Adds features (N, d).

        Raises:
            ValueError: of another shape, or not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.d:
            raise ValueError(f"expected features (N, {self.d}), got {tuple(features.shape)}")
        x = features.detach().to("cpu", torch.float64)
        if not x.isfinite().all():
            raise ValueError("expected finite features, got NaN or infinite ones")
        if len(x):
            mean = x.mean(0)
            self._add(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: "Moments") -> None:
        """Adds what another has seen."""
        if other.d != self.d:
            raise ValueError(f"expected moments of {self.d} dimensions, got {other.d}")
        if other.n:
            self._add(other.n, other.mean, other.scatter)

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.n + n
        delta = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(delta, delta) * (self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    @property
    def covariance(self) -> Tensor:
        """(d, d), of n - 1 degrees of freedom.

        Raises:
            ValueError: fewer than two features have been seen.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 features, got {self.n}")
        return self.scatter / (self.n - 1)

    def arrays(self) -> dict[str, np.ndarray]:
        """For np.savez: going on from `from_arrays` of these equals one go."""
        return {"n": np.array(self.n), "mean": self.mean.numpy().copy(), "scatter": self.scatter.numpy().copy()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Moments":
        moments = cls(len(arrays["mean"]))
        moments.n = int(arrays["n"])
        moments.mean, moments.scatter = (torch.from_numpy(np.array(arrays[key], dtype=np.float64)) for key in ("mean", "scatter"))
        return moments


@dataclass(frozen=True)
class Distance:
    """A Frechet distance; `n` is the smaller set, `d` the features' dimension. With n < d the covariances are singular and the
    value, biased upwards, is no basis for a comparison: `comparable` is False and str() says so."""

    value: float
    n: int
    d: int

    @property
    def comparable(self) -> bool:
        return self.n >= self.d

    def __str__(self) -> str:
        return f"{self.value:.4g} (n = {self.n}, d = {self.d}{'' if self.comparable else '; not comparable: n < d'})"


def frechet(a: Moments, b: Moments) -> Distance:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), the squared 2-Wasserstein distance of two Gaussians.

    The trace of the root is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric and so has real ones,
    singular or not; no matrix root is iterated for.
    """
    if a.d != b.d:
        raise ValueError(f"expected moments of the same features, got {a.d} and {b.d} dimensions")
    first, second = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ second @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    value = (a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * cross
    return Distance(max(value.item(), 0.0), min(a.n, b.n), a.d)  # equal sets: rounding may leave -1e-12


class Reservoir:
    """Keeps a uniform sample of up to `size` of the features that pass (Vitter's algorithm R), for the kernel distance.

    Which ones are kept depends on seed and order only: two decoders' reservoirs of one seed hold the same pictures, row by row.
    """

    def __init__(self, d: int, size: int = 2048, seed: int = 0) -> None:
        self.kept = torch.zeros(0, d)
        self.size, self.seen = size, 0
        self._random = np.random.default_rng(seed)

    def update(self, features: Tensor) -> None:
        """Passes features (N, d)."""
        rows = features.detach().to("cpu", torch.float32)
        room = self.size - len(self.kept)
        self.kept = torch.cat([self.kept, rows[:room]])
        self.seen += min(room, len(rows))
        for row in rows[room:]:
            self.seen += 1
            place = int(self._random.integers(self.seen))
            if place < self.size:
                self.kept[place] = row


@dataclass(frozen=True)
class KernelDistance:
    """An unbiased squared MMD with its bootstrap interval; equal distributions give 0 in expectation, so it may be negative.

    `n` counts the smaller set. `resampled` are the bootstrap's values: of two decoders measured with one seed on the same
    pictures, the differences of these give the interval of the difference.
    """

    value: float
    low: float
    high: float
    n: int
    d: int
    resampled: np.ndarray = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n}, d = {self.d})"


def kernel_distance(
    x: Tensor, y: Tensor, *, paired: bool = False, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> KernelDistance:
    """Unbiased squared MMD of features (n, d) and (m, d) with KID's kernel (x.y / d + 1)^3 (Binkowski et al. 2018), over all of them.

    `paired`: row i of both is of the same picture, as decoded against truth. Then k(x_i, y_i) is left out too (Gretton et al.
    2012, equation 4): decoding a picture is not an independent draw, and the published form calls identical sets better than perfect.
    The interval is a percentile bootstrap over pictures, drawn together when paired; pairs of two copies of one picture do not
    count, as they would make every resample look further away. Memory: three kernel matrices in float64, 34 MB each at 2048.
    """
    n, m, d = len(x), len(y), x.shape[1]
    if min(n, m) < 2 or y.shape[1] != d or (paired and n != m):
        raise ValueError(f"expected two sets of at least 2 features each, equal in number if paired, got {tuple(x.shape)} and {tuple(y.shape)}")
    a, b = (t.detach().to("cpu", torch.float64) for t in (x, y))
    k_xx, k_yy, k_xy = ((left @ right.T / d + 1) ** 3 for left, right in ((a, a), (b, b), (a, b)))
    for kernel in (k_xx, k_yy, *([k_xy] if paired else [])):
        kernel.fill_diagonal_(0)

    def value(u: Tensor, v: Tensor) -> Tensor:
        """Of counts (resamples, n) and (resamples, m)."""
        pairs_x, pairs_y = (w.sum(1).square() - w.square().sum(1) for w in (u, v))
        pairs_xy = pairs_x if paired else u.sum(1) * v.sum(1)
        within = ((u @ k_xx) * u).sum(1) / pairs_x + ((v @ k_yy) * v).sum(1) / pairs_y
        return within - 2 * ((u @ k_xy) * v).sum(1) / pairs_xy

    rng = np.random.default_rng(seed)
    u = torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n), resamples).astype(np.float64))
    v = u if paired else torch.from_numpy(rng.multinomial(m, np.full(m, 1 / m), resamples).astype(np.float64))
    resampled = value(u, v).numpy()
    resampled = resampled[np.isfinite(resampled)]  # of 2 pictures a resample may hold one only
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2]).tolist() if len(resampled) else (math.nan, math.nan)
    whole = value(torch.ones(1, n, dtype=torch.float64), torch.ones(1, m, dtype=torch.float64))
    return KernelDistance(whole.item(), low, high, min(n, m), d, resampled)
