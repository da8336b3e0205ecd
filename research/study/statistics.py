"""pass@k, tails of the covariance, and differences between arms over seeds with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TAILS = {"0.01%": 1e-4, "1%": 0.01, "20%": 0.2, "40%": 0.4, "100%": 1.0}  # of the paper's table
RESAMPLES = 20_000
FEW = 6  # seeds: of fewer a bootstrap has too few different samples, and Student's t is used


def pass_at_k(right: Tensor, samples: int, k: int) -> Tensor:  # [...] int64 -> [...] float64
    """The probability that of k responses one is right, of each problem for which ``right`` of ``samples`` were:
    1 - C(samples - right, k) / C(samples, k), unbiased (arXiv 2107.03374). Raises ValueError for k > samples."""
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to the number of samples, {samples}, got {k}")
    wrong, drawn = (samples - right).double().unsqueeze(-1), torch.arange(k)  # [..., 1], [k]
    return 1 - ((wrong - drawn) / (samples - drawn)).prod(-1)


def tail_means(covariance: Tensor) -> dict[str, float]:  # [N]
    """Means of the largest and of the smallest covariances: of so many per cent of all tokens, at least one."""
    ordered, n = covariance.double().sort().values, len(covariance)
    sizes = {name: max(round(share * n), 1) for name, share in TAILS.items()}
    top = {f"top {name}": ordered[n - size :].mean().item() for name, size in sizes.items()}
    return top | {f"bottom {name}": ordered[:size].mean().item() for name, size in sizes.items()}


@dataclass(frozen=True)
class Difference:
    """A mean over seeds, with intervals that hold it with 95% probability: on its own, and together with the others of
    its table."""

    mean: float
    low: float
    high: float
    low_all: float
    high_all: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves no doubt of it, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    @property
    def survives(self) -> bool:
        """Whether that is so with all comparisons of the table in mind."""
        return self.low_all > 0 or self.high_all < 0


def difference(values: Tensor, comparisons: int, seed: int = 0) -> Difference:  # [seeds]
    """Of paired differences. Bootstrap-t: seeds are drawn anew, and how many standard errors their mean is away is what
    the interval is made from; the plain percentile interval of eight values holds the mean in 90% of cases only, not
    in 95%. Of a few seeds that number has Student's distribution, as if the differences were normal. With
    ``comparisons`` in a table each gets its share of the 5% (Bonferroni). Raises ValueError for fewer than two."""
    n = len(values)
    if n < 2:
        raise ValueError(f"values must be of two seeds at least, got {n}")
    x = values.double()
    centre, error = x.mean(), _standard_error(x)
    if error == 0:
        return Difference(*[centre.item()] * 5)
    ends = []
    if n < FEW:
        for share in (0.05, 0.05 / comparisons):
            away = students_quantile(1 - share / 2, n - 1)
            ends += [(centre - error * away).item(), (centre + error * away).item()]
        return Difference(centre.item(), *ends)
    drawn = x[torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))]
    # Where one seed was drawn n times there is nothing to measure by: infinitely far.
    resampled = ((drawn.mean(1) - centre) / _standard_error(drawn)).sort().values
    for share in (0.05, 0.05 / comparisons):
        tail = int(share / 2 * RESAMPLES)
        ends += [(centre - error * resampled[-1 - tail]).item(), (centre - error * resampled[tail]).item()]
    return Difference(centre.item(), *ends)


def students_quantile(share: float, degrees: int) -> float:
    """What Student's t is below with this probability, to three digits. With t = sqrt(degrees) tan(u) the density of u
    is proportional to cos(u)^(degrees - 1), which is added up."""
    u = torch.linspace(-math.pi / 2, math.pi / 2, 1_000_001, dtype=torch.float64)
    below = u.cos().pow(degrees - 1).cumsum(0)
    place = torch.searchsorted(below, share * below[-1])
    return degrees**0.5 * u[place].tan().item()


def _standard_error(x: Tensor) -> Tensor:  # [..., n] -> [...]
    return x.std(-1) / x.shape[-1] ** 0.5
