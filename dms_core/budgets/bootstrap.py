"""95 % percentile bootstrap intervals: over problems, or over seeds and problems.

All draws depend on the number of problems, the number of resamples and the seed alone, so that quantities measured on
the same problems share them: comparisons are paired.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

LEVELS = (2.5, 97.5)


def interval(samples: np.ndarray) -> tuple[float | None, float | None]:
    """(low, high) of resampled values (R,), NaN left out; (None, None) where nothing else is there."""
    defined = samples[~np.isnan(samples)]
    return tuple(map(float, np.percentile(defined, LEVELS))) if defined.size else (None, None)


@lru_cache(maxsize=8)
def weights(n: int, resamples: int, seed: int) -> np.ndarray:
    """Weights (1 + resamples, n) that sum to 1: row 0 weighs all ``n`` problems alike, the others draw them again."""
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.concatenate([np.ones((1, n)), draws]) / n


def indices(n: int, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Which of ``n`` problems each resample draws, (resamples, n)."""
    return np.random.default_rng(seed).integers(n, size=(resamples, n))


def mean(values: ArrayLike, resamples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high), times 100, of a share a problem (P,)."""
    values = np.asarray(values, float)
    low, high = interval(values[indices(len(values), resamples, seed)].mean(1))
    return 100 * float(values.mean()), 100 * low, 100 * high


def nested_mean(values: np.ndarray, resamples: int = 4000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high), times 100, of shares (S, P) of S seeds on the same P problems; both are drawn again.

    With few seeds it is too narrow: three draws of three seeds hold a third of the variance back.
    """
    seeds, problems = values.shape
    rng = np.random.default_rng(seed)

    def draw() -> float:
        return values[rng.integers(seeds, size=seeds)][:, rng.integers(problems, size=problems)].mean()

    low, high = interval(np.array([draw() for _ in range(resamples)]))
    return 100 * float(values.mean()), 100 * low, 100 * high
