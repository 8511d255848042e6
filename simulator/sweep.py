"""Which runs make up a comparison, and the goodput that follows from them: the highest rate at which nine requests in
ten meet both SLOs. Decides rates; who carries the runs out, and in how many processes, is the caller's affair."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from engine.config import PullConfig
from protos.types import Role
from simulator.limits import num_before
from simulator.run import simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from router.config import RouterConfig
    from simulator.offered import OfferedLoad
    from simulator.result import ArrivalWindow, LoadSample, PoolEvent, Result, Summary
    from simulator.setup import Setup

MIN_ATTAINMENT = 0.9
MAX_RETURNS = 4  # to each worker at once, and from each
PULLING_POLICIES = ("home_pair", "min_ttft", "exploit_explore")
DEFAULT_SHARES = (0.4, 0.6, 0.8, 1.0, 1.2)  # of the reference rate, where no rates are asked for
MAX_RATES = 1000
MAX_STEPS = 20  # of a search that begins with a guess
NUM_POINTS = 20  # over the time of arrivals, of what is told over time; loads are sampled more often in long runs


@dataclass(frozen=True, slots=True)
class Variant:
    """One contender: a router's settings under a name. Workers pull KV exactly where `pulls` is set."""

    label: str
    router: RouterConfig
    pulls: PullConfig | None = None


def contender(label: str, router: RouterConfig, setup: Setup) -> Variant:
    """Its workers pull where its policy counts on that, at what a token's KV takes on an idle link."""
    if router.policy.name not in PULLING_POLICIES or not router.policy.pulls:
        return Variant(label, replace(router, pull_s_per_token=0.0))
    s_per_token = setup.hardware.kv_nbytes_per_token / setup.link_nbytes_per_s
    pulls = PullConfig(s_per_token=s_per_token, max_returns=MAX_RETURNS if router.returns else 0, returns_answers=False)
    return Variant(label, replace(router, pull_s_per_token=s_per_token), pulls)


@dataclass(frozen=True, slots=True)
class Experiment:
    """Every variant sees the same requests on the same cluster."""

    offered: OfferedLoad
    setup: Setup  # its router is each variant's in turn
    variants: tuple[Variant, ...]
    rates: tuple[float, ...]
    ring_seeds: tuple[int, ...]
    tolerance: float = 0.01  # a search ends when a good and a bad rate are this close
    window_s: float | None = None  # of arrivals, for what is told over time; None: by the length of the run

    def __post_init__(self) -> None:
        if self.window_s is not None and not self.window_s > 0:
            raise ValueError(f"window must be positive, not {self.window_s:g}")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, not {self.tolerance}")
        for rate in self.rates:
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"rate must be positive, not {rate:g}")
        for name in ("variants", "rates", "ring_seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        labels = [variant.label for variant in self.variants]
        if len(set(labels)) < len(labels):
            raise ValueError(f"every variant is to be named once, but they are {', '.join(labels)}")


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """Busy shares of the prefill workers in one interval that ended at at_s."""

    at_s: float
    least: float
    mean: float
    most: float


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One run. is_searched: its rate was chosen by the search, not asked for; where that is not a good one, the run was
    given up, and the summary is of the requests until then."""

    label: str
    rate: float
    ring_seed: int
    summary: Summary
    loads: tuple[LoadPoint, ...]
    windows: tuple[ArrivalWindow, ...] = ()
    is_searched: bool = False
    span_s: float = 0.0  # until the last request came
    num_good: int = 0  # requests in both SLOs, of all
    worker_s: Mapping[Role, float] = field(default_factory=dict)  # how long workers were there in that time
    workers: tuple[tuple[float, ...], ...] = ()  # how many of each role, the mean over each window
    events: tuple[PoolEvent, ...] = ()  # what the autoscaler did


def run_case(
    experiment: Experiment, variant: Variant, rate: float, ring_seed: int, gives_up: bool = False
) -> CaseResult:
    """gives_up: as soon as the rate cannot be good any more, which takes much of the time of an overloaded run."""
    requests = experiment.offered.at(rate)
    num_warmup = max(experiment.setup.num_warmup, num_before(requests, experiment.offered.warmup_s))
    point_s = (requests[-1].at_s - requests[num_warmup].at_s) / NUM_POINTS or 1.0
    setup = replace(
        experiment.setup,
        num_warmup=num_warmup,
        load_interval_s=min(experiment.setup.load_interval_s, point_s),
        router=replace(variant.router, ring_seed=ring_seed),
        scheduler=replace(experiment.setup.scheduler, pulls=variant.pulls),
    )
    num_measured = len(requests) - num_warmup
    max_missed = num_measured - math.ceil(MIN_ATTAINMENT * num_measured) if gives_up else None
    result = simulate(setup, requests, max_missed)
    windows = result.windows(experiment.window_s or point_s)
    span_s = requests[-1].at_s
    return CaseResult(
        variant.label,
        rate,
        ring_seed,
        result.summary(),
        tuple(map(_load_point, result.loads)),
        windows,
        span_s=span_s,
        num_good=sum(window.num_good for window in windows),
        worker_s={role: result.worker_s(role, 0.0, span_s) for role in Role},
        workers=tuple(_workers(result, window) for window in windows),
        events=result.events,
    )


def _workers(result: Result, window: ArrivalWindow) -> tuple[float, ...]:
    end_s = window.start_s + window.width_s
    return tuple(result.worker_s(role, window.start_s, end_s) / window.width_s for role in Role)


def _load_point(load: LoadSample) -> LoadPoint:
    shares = load.busy_shares or (0.0,)
    return LoadPoint(load.at_s, min(shares), fmean(shares), max(shares))


# --- the search for goodput -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Goodput:
    """Of one variant and one ring seed. `at least`: the highest rate that was tried was still good; `below`: the lowest
    one was not."""

    rate: float
    bound: Literal["found", "at least", "below"]


def search(experiment: Experiment, variant: Variant, known: Sequence[CaseResult]) -> list[CaseResult]:
    """Further runs, between the highest good rate of `known` (one variant and ring seed) and the next higher one."""

    def run(rate: float) -> CaseResult:
        case = run_case(experiment, variant, rate, known[0].ring_seed, gives_up=True)
        return replace(case, is_searched=True)

    return bisect(run, known, experiment.tolerance)


def bisect(run: Callable[[float], CaseResult], known: Sequence[CaseResult], tolerance: float) -> list[CaseResult]:
    """Narrows the bracket down to a ratio of 1 + tolerance, each time at the geometric mean."""
    found: list[CaseResult] = []
    low, high = bracket(known)
    while low is not None and high is not None and high > low * (1 + tolerance):
        found.append(run(math.sqrt(low * high)))
        if is_good(found[-1]):
            low = found[-1].rate
        else:
            high = found[-1].rate
    return found


def search_around(experiment: Experiment, variant: Variant, ring_seed: int, guess: float) -> list[CaseResult]:
    """Where no rates were asked for: from a guess."""
    return outward(
        partial(run_case, experiment, variant, ring_seed=ring_seed, gives_up=True), guess, experiment.tolerance
    )


def outward(run: Callable[[float], CaseResult], guess: float, tolerance: float) -> list[CaseResult]:
    """From the guess outward, in steps that grow, until one rate is good and one is not; then narrowed down. ValueError
    where MAX_STEPS do not find both."""
    cases: list[CaseResult] = []
    rate, step = guess, 1 + 2 * tolerance
    for _ in range(MAX_STEPS):
        cases.append(run(rate))
        low, high = bracket(cases)
        if low is not None and high is not None:
            return cases + bisect(run, cases, tolerance)
        rate, step = (rate * step if high is None else rate / step), min(2.0, step**1.5)
    raise ValueError(f"{cases[0].label}: no goodput between {guess:g} and {cases[-1].rate:g} requests/s")


def is_good(case: CaseResult) -> bool:
    return case.summary.attainment >= MIN_ATTAINMENT


def bracket(cases: Iterable[CaseResult]) -> tuple[float | None, float | None]:
    """The highest good rate, and the lowest rate above it; None where there is none."""
    cases = list(cases)
    low = max((case.rate for case in cases if is_good(case)), default=None)
    return low, min((case.rate for case in cases if low is None or case.rate > low), default=None)


def goodput_of(cases: Sequence[CaseResult]) -> Goodput:
    """From all runs of one variant and ring seed, those of the search included."""
    low, high = bracket(cases)
    if low is None:
        assert high is not None, "no runs"
        return Goodput(high, "below")
    return Goodput(low, "at least" if high is None else "found")


# --- rates as they are written --------------------------------------------------------------------------------------


def parse_rates(text: str) -> tuple[float, ...]:
    """'1,2.5,4', '1..40:3' or '1..40' (nine rates, evenly spaced). ValueError names what is wrong."""
    rates: list[float] = []
    for part in text.split(","):
        rates += _parse_range(part) if ".." in part else [_number(part)]
    return tuple(sorted(set(rates)))


def _parse_range(text: str) -> list[float]:
    span, _, step_text = text.partition(":")
    first, last = (_number(end) for end in span.split("..", 1))
    if last < first:
        raise ValueError(f"rate {text!r} ends below its beginning")
    step = _number(step_text) if step_text else max((last - first) / 8, 1e-9)
    num_rates = int((last - first) / step + 1e-6) + 1
    if num_rates > MAX_RATES:
        raise ValueError(f"rate {text!r} makes {num_rates} rates, at most {MAX_RATES} are taken")
    return [round(first + index * step, 9) for index in range(num_rates)]


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"rate must be numbers, e.g. 1,2,4 or 1..40:3, not {text!r}") from None
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"rate must be positive, not {text!r}")
    return number
