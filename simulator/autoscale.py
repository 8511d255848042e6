"""What `--autoscale` asks for: the settings of the autoscaler that ships, from a file as `twinring serve` takes it, or
its defaults. And what came of it, as a table."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter, ValidationError
from rich import box
from rich.markup import escape
from rich.table import Table

from protos.types import Role
from router.autoscaler import AutoscalerConfig

if TYPE_CHECKING:
    from simulator.report import Report

DEFAULT = "default"
SECTION = "autoscaler"


def autoscaler_of(text: str) -> AutoscalerConfig:
    """Enabled, whatever the file says of that. ValueError names the file, the setting and what it cannot be."""
    if text == DEFAULT:
        return AutoscalerConfig(enabled=True)
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"autoscale must be {DEFAULT!r}, or a config file with a section {SECTION}, not {text!r}")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"autoscale {text}: {error}") from error
    section = tree.get(SECTION) if isinstance(tree, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"autoscale {text}: no section {SECTION} with settings")
    _refuse_unknown(section, AutoscalerConfig(), f"autoscale {text}: unknown setting {SECTION}.")
    try:
        return replace(TypeAdapter(AutoscalerConfig).validate_python(section), enabled=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, (SECTION, *first["loc"])))
        raise ValueError(f"autoscale {text}: {name}: {first['msg']} (got {first['input']!r})") from error


def _refuse_unknown(section: dict[str, Any], defaults: Any, prefix: str) -> None:
    known = {field.name: getattr(defaults, field.name) for field in fields(defaults)}
    for name, value in section.items():
        if name not in known:
            raise ValueError(f"{prefix}{name}; known: {', '.join(known)}")
        if is_dataclass(known[name]) and isinstance(value, dict):
            _refuse_unknown(value, known[name], f"{prefix}{name}.")


def pools_table(report: Report) -> Table:
    """What each rate took, a row per variant and rate that was asked for: means over ring seeds."""
    table = Table(title="Workers, from their start to their end, by rate", title_justify="left", box=box.SIMPLE)
    table.add_column("policy", overflow="fold")
    for name in (
        "rate",
        "in both\nSLOs",
        "prefill\nworkers",
        "decode\nworkers",
        "worker-\nhours",
        "in SLOs per\nworker-hour",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for variant in report.experiment.variants:
        asked = [case for case in report.of(variant.label) if not case.is_searched]
        for rate in sorted({case.rate for case in asked}):
            cases = [case for case in asked if case.rate == rate]
            hours = {role: fmean(case.worker_s[role] for case in cases) / 3600 for role in Role}
            span_h = fmean(case.span_s for case in cases) / 3600 or math.nan  # all at once
            total_h, good = sum(hours.values()) or math.nan, fmean(case.num_good for case in cases)
            table.add_row(
                escape(variant.label),
                f"{rate:.3g}",
                f"{fmean(case.summary.attainment for case in cases):.1%}",
                *(f"{hours[role] / span_h:.2f}" for role in Role),
                f"{total_h:.2f}",
                f"{good / total_h:.0f}",
            )
        table.add_section()
    return table
