"""From runs to a table and to JSON (its shape: docs/simulator.md). Decides how seeds are brought together: means, but
the longest of all waits, and for goodput also the least and the greatest."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from simulator.sweep import Goodput, goodput_of
from simulator.transforms import ideal_hit_rate, rate_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from simulator.limits import Reference
    from simulator.result import Summary
    from simulator.sweep import CaseResult, Experiment

FORMAT = "twinring-simulate"
FORMAT_VERSION = 1
MIN_NAME_WIDTH = 14
BOUND_SIGNS = {"found": "", "at least": ">= ", "below": "< "}


@dataclass(frozen=True, slots=True)
class Report:
    """All that is shown of an experiment."""

    experiment: Experiment
    source: str  # the trace's file name, or the preset
    hardware: str
    reference: Reference
    cases: tuple[CaseResult, ...]
    notes: tuple[str, ...] = ()

    def of(self, label: str) -> list[CaseResult]:
        return [case for case in self.cases if case.label == label]

    def goodputs(self, label: str) -> list[Goodput]:
        """One per ring seed that has run."""
        by_seed: dict[int, list[CaseResult]] = defaultdict(list)
        for case in self.of(label):
            by_seed[case.ring_seed].append(case)
        return [goodput_of(cases) for _, cases in sorted(by_seed.items())]


@dataclass(frozen=True, slots=True)
class Point:
    """One variant at one rate, over its ring seeds."""

    rate: float
    goodput: float
    attainment: float
    ttft_attainment: float  # effective request capacity: the share within the TTFT SLO at this rate
    hit_rate: float
    ideal_hit_rate: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    longest_wait_s: float
    load_cv: float


def points_of(cases: Iterable[CaseResult]) -> list[Point]:
    by_rate: dict[float, list[Summary]] = defaultdict(list)
    for case in cases:
        by_rate[case.rate].append(case.summary)
    return [_point(rate, summaries) for rate, summaries in sorted(by_rate.items())]


def _point(rate: float, summaries: Sequence[Summary]) -> Point:
    def mean(value_of: Callable[[Summary], float]) -> float:
        return fmean(map(value_of, summaries))

    return Point(
        rate=rate,
        goodput=mean(lambda s: s.goodput),
        attainment=mean(lambda s: s.attainment),
        ttft_attainment=mean(lambda s: s.ttft_attainment),
        hit_rate=mean(lambda s: s.hit_rate),
        ideal_hit_rate=mean(lambda s: s.ideal_hit_rate),
        ttft_p50_s=mean(lambda s: s.ttft_p50_s),
        ttft_p90_s=mean(lambda s: s.ttft_p90_s),
        ttft_p99_s=mean(lambda s: s.ttft_p99_s),
        longest_wait_s=max(s.longest_wait_s for s in summaries),
        load_cv=mean(lambda s: s.load_cv),
    )


# --- tables ---------------------------------------------------------------------------------------------------------


def rates_table(report: Report) -> Table:
    """A row per variant and rate that was asked for."""
    router = report.experiment.setup.router
    title = f"Requests/s in both SLOs (TTFT {router.ttft_slo_s:g} s, TPOT {router.tpot_slo_s * 1e3:g} ms) by rate"
    columns: dict[str, Callable[[Point], str]] = {
        "rate": lambda p: f"{p.rate:.3g}",
        "goodput": lambda p: f"{p.goodput:.2f}",
        "in both\nSLOs": lambda p: f"{p.attainment:.1%}",
        "in TTFT\nSLO": lambda p: f"{p.ttft_attainment:.1%}",
        "hit\nrate": lambda p: f"{p.hit_rate:.1%}",
        "ideal\nhit rate": lambda p: f"{p.ideal_hit_rate:.1%}",
        "load\nCV": lambda p: "-" if math.isnan(p.load_cv) else f"{p.load_cv:.2f}",
    }
    return _points_table(title, report, columns)


def waits_table(report: Report) -> Table:
    columns: dict[str, Callable[[Point], str]] = {
        "rate": lambda p: f"{p.rate:.3g}",
        "p50": lambda p: f"{p.ttft_p50_s:.2f}",
        "p90": lambda p: f"{p.ttft_p90_s:.2f}",
        "p99": lambda p: f"{p.ttft_p99_s:.2f}",
        "longest\nwait": lambda p: f"{p.longest_wait_s:.1f}",
    }
    return _points_table("Seconds to the first token by rate", report, columns)


def _points_table(title: str, report: Report, columns: dict[str, Callable[[Point], str]]) -> Table:
    table = _table(title, report)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for variant in report.experiment.variants:
        for point in points_of(case for case in report.of(variant.label) if not case.is_searched):
            table.add_row(escape(variant.label), *(text_of(point) for text_of in columns.values()))
        table.add_section()
    return table


def _table(title: str, report: Report) -> Table:
    """Its first column names the variants, over several lines where that makes room for figures."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    longest = max(len(variant.label) for variant in report.experiment.variants)
    table.add_column("policy", overflow="fold", min_width=min(longest, MIN_NAME_WIDTH))
    return table


def goodput_table(report: Report) -> Table:
    title = f"Highest rate with 90 % in both SLOs; reference {report.reference.rate:.2f} requests/s"
    table = _table(title, report)
    for name in ("requests/s", "over\nring seeds", "of the\nreference"):
        table.add_column(name, justify="right", no_wrap=True)
    for variant in report.experiment.variants:
        goodputs = report.goodputs(variant.label)
        if goodputs:
            table.add_row(escape(variant.label), *_goodput_texts(goodputs, report.reference))
    return table


def _goodput_texts(goodputs: Sequence[Goodput], reference: Reference) -> tuple[str, ...]:
    rates = [goodput.rate for goodput in goodputs]
    sign = BOUND_SIGNS[_bound(goodputs)]
    return (
        f"{sign}{fmean(rates):.2f}",
        f"{min(rates):.2f}..{max(rates):.2f}",
        f"{sign}{fmean(rates) / reference.rate:.2f}",
    )


def _bound(goodputs: Sequence[Goodput]) -> str:
    """Of their mean: found only where all are."""
    bounds = {goodput.bound for goodput in goodputs}
    return next((bound for bound in ("below", "at least") if bound in bounds), "found")


# --- JSON -----------------------------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """Nothing in it is infinite or not a number: null stands for those."""
    experiment = report.experiment
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "notes": list(report.notes),
        "trace": _trace_json(report),
        "setup": _setup_json(report),
        "reference": {**asdict(report.reference), "rate": report.reference.rate},
        "goodput": {v.label: _goodput_json(report, v.label) for v in experiment.variants if report.of(v.label)},
        "cases": [_case_json(case) for case in report.cases],
    }
    finite = _finite(document)
    assert isinstance(finite, dict)
    return finite


def _trace_json(report: Report) -> dict[str, Any]:
    requests = report.experiment.offered.own
    return {
        "source": report.source,
        "num_requests": len(requests),
        "rate": rate_of(requests),
        "num_prompt_tokens_mean": fmean(request.num_prompt_tokens for request in requests),
        "num_output_tokens_mean": fmean(request.num_output_tokens for request in requests),
        "ideal_hit_rate": ideal_hit_rate(requests),
    }


def _setup_json(report: Report) -> dict[str, Any]:
    """Of each variant's router only what differs from the router's own defaults."""
    setup = report.experiment.setup
    plain = {field.name: getattr(setup, field.name) for field in fields(setup)}
    del plain["router"], plain["changes"]
    return {
        "warmup_s": report.experiment.offered.warmup_s,
        "changes": [asdict(change) for change in setup.changes],
        **{name: value if isinstance(value, int | float) else asdict(value) for name, value in plain.items()},
        "hardware_name": report.hardware,
        "variants": {variant.label: _changed(variant.router) for variant in report.experiment.variants},
    }


def _changed(router: Any) -> dict[str, Any]:
    default, settings = asdict(type(router)()), asdict(router)
    return {name: value for name, value in settings.items() if value != default[name]}


def _goodput_json(report: Report, label: str) -> dict[str, Any]:
    goodputs = report.goodputs(label)
    rate = fmean(goodput.rate for goodput in goodputs)
    return {
        "rate": rate,
        "bound": _bound(goodputs),
        "share_of_reference": rate / report.reference.rate,
        "by_ring_seed": [asdict(goodput) for goodput in goodputs],
    }


def _case_json(case: CaseResult) -> dict[str, Any]:
    return {
        "variant": case.label,
        "rate": case.rate,
        "ring_seed": case.ring_seed,
        "is_searched": case.is_searched,
        "summary": asdict(case.summary),
        "attainment": [
            [round(w.start_s, 4), w.num_requests, round(w.attainment, 4), round(w.ttft_attainment, 4)]
            for w in case.windows
        ],
        "worker_s": {role.value: round(seconds, 4) for role, seconds in case.worker_s.items()},
        "workers": [
            [round(number, 4) for number in (window.start_s, *counts)]
            for window, counts in zip(case.windows, case.workers, strict=True)
        ],
        "resizes": [[round(event.at_s, 4), event.reason] for event in case.events],
        "load": [[round(number, 4) for number in (load.at_s, load.least, load.mean, load.most)] for load in case.loads],
    }


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
