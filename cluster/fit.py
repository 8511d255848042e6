"""`twinring fit` as it is typed: a cluster's metrics in, a hardware file for the simulator out. Fits nothing itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from protos.cost_fit import CostFit, PhaseFit
    from protos.cost_model import Hardware

console = Console(stderr=True)

MIN_TABLE_WIDTH = 56  # so that the columns of both tables stand below each other


def fit(
    metrics: Annotated[str, typer.Argument(help="http://HOST:8000/metrics, or a file that holds its answer.")],
    since: Annotated[str | None, typer.Option(help="An earlier answer: fit what happened after it.")] = None,
    json: Annotated[str | None, typer.Option(help="File for `simulate --hardware`; - is standard output.")] = None,
    token: Annotated[str | None, typer.Option(envvar="TWINRING_TOKEN", help="An operator's.", show_envvar=True)] = None,
    ca: Annotated[str | None, typer.Option(envvar="TWINRING_CA", help="PEM file to trust.", show_envvar=True)] = None,
) -> None:
    """Fit the simulator's cost model to the steps that a running cluster's workers have run."""
    from protos.hardware_file import hardware_to_json  # here, because other commands need not wait for it

    try:
        hardware, fitted = fitted_from(metrics, since, token, ca)
        show(hardware, fitted)
        if json is not None:
            phases: dict[str, object] = {"prefill": asdict(fitted.prefill), "decode": asdict(fitted.decode)}
            write(json, hardware_to_json(hardware, phases))
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


def fitted_from(metrics: str, since: str | None, token: str | None, ca: str | None) -> tuple[Hardware, CostFit]:
    """ValueError or OSError says what cannot be read, or what the steps leave open."""
    from cluster.scrape import scrape_at
    from protos.cost_fit import fit_costs
    from protos.cost_model import Hardware
    from protos.step_moments import between

    after = scrape_at(metrics, token, ca)
    moments = after.moments
    if since is not None:
        moments = between(scrape_at(since, token, ca).moments, moments)
    fitted = fit_costs(moments)
    return Hardware(fitted.cost, after.num_kv_tokens, after.kv_nbytes_per_token), fitted


def show(hardware: Hardware, fitted: CostFit) -> None:
    console.print(phase_table("prefill", fitted.prefill), phase_table("decode", fitted.decode))
    notes = [f"{hardware.num_kv_tokens} KV tokens per worker, {hardware.kv_nbytes_per_token} bytes each"]
    if not fitted.prefill.is_floor_known:
        notes.append("no floor was seen, below which fewer tokens do not make a prefill step shorter")
    if fitted.num_mixed_steps:
        notes.append(f"{fitted.num_mixed_steps} steps that did both are in neither fit")
    console.print("\n".join(notes), highlight=False)


def phase_table(name: str, phase: PhaseFit) -> Table:
    title = f"{name}: {phase.num_steps} steps, {phase.relative_error:.1%} off"
    table = Table(title, "ms", "+-", min_width=MIN_TABLE_WIDTH, box=SIMPLE_HEAD)
    for field, value_s in phase.coefficients.items():
        shown = field.removeprefix(f"{name}_").removesuffix("_s").removeprefix("s_")
        table.add_row(shown.replace("_", " "), f"{value_s * 1e3:.4g}", f"{phase.standard_errors[field] * 1e3:.1g}")
    return table


def write(path: str, text: str) -> None:
    if path == "-":
        print(text, end="")
    else:
        Path(path).write_text(text)
