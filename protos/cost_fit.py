"""A cost model from what steps took: weighted least squares over the sums of protos/step_moments.py. Knows no metrics,
no files.

Every bin of steps weighs as the inverse square of its mean time: short steps count as much as long ones, in errors
relative to what they take. No coefficient is negative. Prefill, [s] = t0 + max(w, a x) + b y, is not linear: bins below
the crossing w / a are fitted as (t0 + w) + b y, bins above as t0 + a x + b y, both at once, and the bin in which the
crossing lies is left out, since sums cannot say which of its steps are on which side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from protos.cost_model import CostModel
from protos.step_moments import PREFILL_KINDS, StepKind, StepMoments, prefill_bin

Matrix = NDArray[np.float64]

DECODE_NAMES = ("decode_base_s", "decode_s_per_seq", "decode_s_per_kv_token")
PREFILL_NAMES = ("prefill_base_s", "prefill_s_per_token", "prefill_s_per_token_pair")
FLOOR_NAMES = (*PREFILL_NAMES, "prefill_floor_s")
WHAT_MUST_VARY = {
    "prefill_base_s": "steps that only prefill",
    "prefill_s_per_token": "prefill steps of different numbers of tokens",
    "prefill_s_per_token_pair": "prefill steps of as many tokens behind caches or chunks of different lengths",
    "decode_base_s": "steps that only decode",
    "decode_s_per_seq": "decode steps of different numbers of sequences",
    "decode_s_per_kv_token": "decode steps of as many sequences with contexts of different lengths",
}

MIN_STEPS = 20  # fewer say nothing that can be relied on
# The share of a column's square sum that the columns before it must leave over, for its coefficient to be determined.
# The sums are good to about 1e-12 of themselves.
MIN_OWN_SHARE = 1e-9
# A floor is taken for one where leaving it out makes the squared error larger by this many standard errors, squared.
MIN_FLOOR_EVIDENCE = 16.0

# Columns that a step contributes to the regression, as rows over its (1, x, y, s). The last row is what is explained.
LINEAR = np.eye(4)
UNDER_FLOOR = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=float)
OVER_FLOOR = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=float)


@dataclass(frozen=True, slots=True)
class PhaseFit:
    """Coefficients in seconds, by the names of CostModel's fields."""

    coefficients: dict[str, float]
    standard_errors: dict[str, float]  # 0 for a coefficient that would be negative and is held at 0
    relative_error: float  # root mean square over the steps that were fitted, of error / mean time of their bin
    num_steps: int
    is_floor_known: bool = False


@dataclass(frozen=True, slots=True)
class CostFit:
    cost: CostModel
    prefill: PhaseFit
    decode: PhaseFit
    num_mixed_steps: int  # prefill and decode in one, in neither fit


class Undetermined(ValueError):
    """The steps leave a coefficient open."""


def fit_costs(moments: Iterable[StepMoments]) -> CostFit:
    """ValueError where there are too few steps, or where they leave a coefficient open; it names that."""
    by_kind = {each.kind: matrix_of(each) for each in moments}
    decode = fit_decode(by_kind.get(StepKind.DECODE, np.zeros((4, 4))))
    prefill = fit_prefill([by_kind.get(kind, np.zeros((4, 4))) for kind in PREFILL_KINDS])
    cost = CostModel(**prefill.coefficients, **decode.coefficients)
    mixed = by_kind.get(StepKind.MIXED)
    return CostFit(cost, prefill, decode, 0 if mixed is None else round(mixed[0, 0]))


def matrix_of(moments: StepMoments) -> Matrix:
    """Sums of v v^T over v = (1, x, y, s)."""
    matrix = np.zeros((4, 4))
    matrix[np.triu_indices(4)] = moments.sums
    return np.maximum(matrix, matrix.T)  # none of the sums is negative


def fit_decode(bin_: Matrix) -> PhaseFit:
    _require_steps([bin_], "decode")
    return _regress([(bin_, LINEAR)], DECODE_NAMES)


def fit_prefill(bins: Sequence[Matrix]) -> PhaseFit:
    """bins in the order of PREFILL_KINDS. Without evidence of a floor it is 0, and the whole is a plain line."""
    _require_steps(bins, "prefill")
    return _with_floor(bins) or fit_prefill_line(bins)


def fit_prefill_line(bins: Sequence[Matrix]) -> PhaseFit:
    """Without a floor: in a tenth of the time, and as good for prompts that are longer than where it ends."""
    _require_steps(bins, "prefill")
    plain = _regress([(each, LINEAR) for each in bins], PREFILL_NAMES)
    return replace(
        plain,
        coefficients={**plain.coefficients, "prefill_floor_s": 0.0},
        standard_errors={**plain.standard_errors, "prefill_floor_s": 0.0},
    )


# --- the floor ----------------------------------------------------------------------------------------------------


def _with_floor(bins: Sequence[Matrix]) -> PhaseFit | None:
    """The crossing between two bins that explains most; then without the bin that it turns out to lie in. None where
    nothing speaks for a floor."""
    fits = [fit for edge in range(1, len(bins)) if (fit := _try_floor(bins[:edge], bins[edge:])) is not None]
    best = min(fits, key=_squared_error, default=None)
    if best is None or not _is_told_from_none(best, bins):
        return None
    for _ in bins:
        crossing = _crossing_bin(best)
        better = _try_floor(bins[:crossing], bins[crossing + 1 :])
        if better is None or not better.coefficients["prefill_floor_s"]:
            break
        settled = _crossing_bin(better) == crossing
        best = better
        if settled:
            break
    return replace(best, is_floor_known=True)


def _try_floor(below: Sequence[Matrix], above: Sequence[Matrix]) -> PhaseFit | None:
    parts = [*((each, UNDER_FLOOR) for each in below), *((each, OVER_FLOOR) for each in above)]
    if _num_steps(below) < MIN_STEPS or _num_steps(above) < MIN_STEPS:
        return None
    try:
        fit = _regress(parts, FLOOR_NAMES)
    except Undetermined:
        return None
    return fit if fit.coefficients["prefill_s_per_token"] > 0 else None


def _is_told_from_none(floored: PhaseFit, bins: Sequence[Matrix]) -> bool:
    if floored.coefficients["prefill_floor_s"] == 0:
        return False
    try:
        plain = _regress([(each, LINEAR) for each in bins], PREFILL_NAMES)
    except Undetermined:
        return True
    noise = _squared_error(floored) / floored.num_steps
    return _squared_error(plain) - _squared_error(floored) > MIN_FLOOR_EVIDENCE * noise


def _crossing_bin(fit: PhaseFit) -> int:
    crossing = fit.coefficients["prefill_floor_s"] / fit.coefficients["prefill_s_per_token"]
    return prefill_bin(max(1.0, crossing))


def _squared_error(fit: PhaseFit) -> float:
    return fit.num_steps * fit.relative_error**2


# --- least squares ------------------------------------------------------------------------------------------------


def _regress(parts: Sequence[tuple[Matrix, Matrix]], names: Sequence[str]) -> PhaseFit:
    """parts: a bin's sums, and the columns its steps contribute. Undetermined names the first column that those before
    it explain."""
    parts = [(each, columns) for each, columns in parts if each[0, 0] > 0]
    num_steps = _num_steps([each for each, _ in parts])
    gram = sum((columns @ each @ columns.T * _weight(each) for each, columns in parts), np.zeros(2 * [len(names) + 1]))
    _require_determined(gram[:-1, :-1], names)
    solution, squared_error = _solve_non_negative(gram)
    held = np.flatnonzero(solution > 0)
    variance = squared_error / max(1, num_steps - len(held))
    errors = np.zeros(len(names))
    errors[held] = np.sqrt(variance * np.diag(np.linalg.inv(gram[np.ix_(held, held)]))) if len(held) else 0.0
    return PhaseFit(
        coefficients=dict(zip(names, map(float, solution), strict=True)),
        standard_errors=dict(zip(names, map(float, errors), strict=True)),
        relative_error=float(np.sqrt(squared_error / num_steps)),
        num_steps=num_steps,
    )


def _weight(bin_: Matrix) -> float:
    mean_s = bin_[0, 3] / bin_[0, 0]
    return float(mean_s**-2)


def _require_determined(gram: Matrix, names: Sequence[str]) -> None:
    """By the steps of a Cholesky factorization of the columns scaled to length 1."""
    lengths = np.sqrt(np.diag(gram))
    scale = np.where(lengths > 0, lengths, 1.0)
    left = gram / np.outer(scale, scale)
    for index, name in enumerate(names):
        if left[index, index] < MIN_OWN_SHARE:
            raise Undetermined(f"{name} is not determined: there must be {WHAT_MUST_VARY.get(name, name)}")
        left = left - np.outer(left[:, index], left[index]) / left[index, index]


def _solve_non_negative(gram: Matrix) -> tuple[Matrix, float]:
    """The coefficients, none negative, with the least squared error, and that error. There are so few that every set
    of them that may be positive is tried."""
    num = len(gram) - 1
    scale = np.sqrt(np.diag(gram))
    scaled = gram / np.outer(scale, scale)
    best, least = np.zeros(num), float(scaled[-1, -1])
    for size in range(1, num + 1):
        for chosen in combinations(range(num), size):
            part = np.linalg.solve(scaled[np.ix_(chosen, chosen)], scaled[list(chosen), -1])
            error = float(scaled[-1, -1] - part @ scaled[list(chosen), -1])
            if np.all(part >= 0) and error < least:
                best, least = np.zeros(num), error
                best[list(chosen)] = part
    return best * scale[-1] / scale[:-1], max(0.0, least) * float(gram[-1, -1])


# --- small things -------------------------------------------------------------------------------------------------


def _num_steps(bins: Iterable[Matrix]) -> int:
    return round(float(sum(each[0, 0] for each in bins)))


def _require_steps(bins: Sequence[Matrix], phase: str) -> None:
    if _num_steps(bins) < MIN_STEPS:
        raise ValueError(f"{_num_steps(bins)} steps that only {phase} were measured, at least {MIN_STEPS} are needed")
