"""Draws a comparison: goodput and hit rate by rate, the load of the prefill workers and the share in both SLOs over
time. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from simulator.over_time import attainments, shown_rate
from simulator.report import points_of
from simulator.sweep import MIN_ATTAINMENT

if TYPE_CHECKING:
    from pathlib import Path

    from simulator.report import Report

SUFFIXES = (".svg", ".png", ".pdf")


def check_drawable(path: Path) -> None:
    """ValueError before runs whose figure could not be drawn after them."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"figure must end in {', '.join(SUFFIXES)}, not {str(path)!r}")
    if find_spec("matplotlib") is None:
        raise ValueError("a figure needs matplotlib: pip install 'twinring[plot]'")


def draw(report: Report, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    (goodput, hits), (load, in_slo) = figure.subplots(2, 2)
    for index, variant in enumerate(report.experiment.variants):
        points = points_of(report.of(variant.label))
        rates, style = [point.rate for point in points], {"color": f"C{index}", "label": variant.label}
        goodput.plot(rates, [point.goodput for point in points], "o-", markersize=3, **style)
        hits.plot(rates, [point.hit_rate for point in points], "o-", markersize=3, **style)
    _finish_goodput(goodput, report)
    ideal = points_of(report.cases)
    ideal_style = {"color": "0.5", "label": "infinite cache", "markersize": 3}
    hits.plot([point.rate for point in ideal], [point.ideal_hit_rate for point in ideal], "o:", **ideal_style)
    hits.set(ylabel="hit rate", ylim=(0, 1), xlabel="requests/s")
    rate = shown_rate(report)
    if rate is not None:
        _draw_load(load, report, rate)
        _draw_attainment(in_slo, report, rate)
    for axes in (goodput, hits, load, in_slo):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def _finish_goodput(axes: Any, report: Report) -> None:
    rates = sorted({case.rate for case in report.cases})
    axes.plot(rates, [MIN_ATTAINMENT * rate for rate in rates], color="0.5", linestyle="--", label="90 % of the rate")
    axes.axvline(report.reference.rate, color="0.5", linestyle=":", label="reference")
    axes.set(ylabel="requests/s in both SLOs", xlabel="requests/s", ylim=(0, None))


def _draw_load(axes: Any, report: Report, rate: float) -> None:
    """Mean, and the band from least to most busy."""
    for index, variant in enumerate(report.experiment.variants):
        case = next(case for case in report.of(variant.label) if case.rate == rate)
        times = [load.at_s for load in case.loads]
        axes.plot(times, [load.mean for load in case.loads], color=f"C{index}", label=variant.label)
        least, most = [load.least for load in case.loads], [load.most for load in case.loads]
        axes.fill_between(times, least, most, color=f"C{index}", alpha=0.2, linewidth=0)
    _mark_changes(axes, report)
    axes.set(ylabel=f"busy share, at {rate:.4g} requests/s", xlabel="s", ylim=(0, 1.05))


def _draw_attainment(axes: Any, report: Report, rate: float) -> None:
    for index, variant in enumerate(report.experiment.variants):
        starts, shares = zip(*attainments(report, variant.label, rate), strict=True)
        axes.step(starts, shares, where="post", color=f"C{index}", label=variant.label)
    axes.axhline(MIN_ATTAINMENT, color="0.5", linestyle="--")
    _mark_changes(axes, report)
    axes.set(ylabel=f"in both SLOs, at {rate:.4g} requests/s", xlabel="s of arrival", ylim=(0, 1.05))


def _mark_changes(axes: Any, report: Report) -> None:
    """Those of one kind at one instant together."""
    changes = report.experiment.setup.changes
    for at_s, kind in dict.fromkeys((change.at_s, change.kind) for change in changes):
        num_workers = sum((change.at_s, change.kind) == (at_s, kind) for change in changes)
        axes.axvline(at_s, color="0.3", linestyle=":", label=f"{kind.value} of {num_workers} at {at_s:g} s")
