"""What is told over time at one rate: the share in both SLOs by arrival, beside what happened to workers. Decides which
rate that is."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from simulator.sweep import is_good

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.report import Report
    from simulator.result import ArrivalWindow
    from simulator.setup import Change, ChangeKind


def shown_rate(report: Report) -> float | None:
    """The highest of the rates asked for at which some variant is still good, for beyond it all are always busy. It is
    one that all have run."""
    asked = [{c.rate for c in report.of(v.label) if not c.is_searched} for v in report.experiment.variants]
    common = set.intersection(*asked)
    good = {case.rate for case in report.cases if is_good(case)} & common
    return max(good, default=min(common, default=None))


def attainments(report: Report, label: str, rate: float) -> list[tuple[float, float]]:
    """Beginning of each window, and the share in both SLOs, the mean over ring seeds; all see the same arrivals."""
    by_seed = [case.windows for case in report.of(label) if case.rate == rate]
    return [
        (windows[0].start_s, fmean(window.attainment for window in windows)) for windows in zip(*by_seed, strict=True)
    ]


def over_time_table(report: Report, rate: float) -> Table:
    """A row per window of arrivals, a column per variant."""
    table = Table(title=f"In both SLOs by arrival, at {rate:.4g} requests/s", title_justify="left", box=box.SIMPLE)
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("requests", justify="right", no_wrap=True)
    is_elastic = report.experiment.setup.autoscaler.enabled
    for variant in report.experiment.variants:
        table.add_column(escape(variant.label), justify="right", overflow="fold")
        if is_elastic:
            table.add_column("prefill+decode\nworkers", justify="right", no_wrap=True)
    table.add_column("what happened", overflow="fold")
    columns: list[list[str]] = []
    for variant in report.experiment.variants:
        shares = attainments(report, variant.label, rate)
        columns.append(["-" if math.isnan(share) else f"{share:.1%}" for _, share in shares])
        if is_elastic:
            columns.append(_workers(report, variant.label, rate))
    first = next(case for case in report.cases if case.rate == rate)
    for window, *texts in zip(first.windows, *columns, strict=True):
        table.add_row(f"{window.start_s:.1f}", str(window.num_requests), *texts, _events(report, window))
    return table


def _workers(report: Report, label: str, rate: float) -> list[str]:
    """Those that load or drain, too; means over ring seeds."""
    by_seed = [case.workers for case in report.of(label) if case.rate == rate]
    means = ((fmean(each) for each in zip(*windows, strict=True)) for windows in zip(*by_seed, strict=True))
    return ["+".join(f"{mean:.1f}" for mean in window) for window in means]


def _events(report: Report, window: ArrivalWindow) -> str:
    end_s = window.start_s + window.width_s
    changes = [change for change in report.experiment.setup.changes if window.start_s <= change.at_s < end_s]
    kinds = {change.kind: None for change in changes}
    return "; ".join(f"{kind.value} {_names(changes, kind)}" for kind in kinds)


def _names(changes: Sequence[Change], kind: ChangeKind) -> str:
    return ", ".join(change.worker_id for change in changes if change.kind is kind)
