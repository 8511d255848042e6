"""`twinring simulate` as it is typed. What loads the simulator is imported when it is called."""

from __future__ import annotations

from typing import Annotated

import typer


def simulate(
    trace: Annotated[str | None, typer.Option(help="Mooncake JSON lines, Azure CSV or a log; may end in .zst.")] = None,
    generate: Annotated[str | None, typer.Option(help="Instead of a trace: tool_agent or long_sessions.")] = None,
    requests: Annotated[int | None, typer.Option(help="The first so many. Generated: 2000.")] = None,
    policy: Annotated[str, typer.Option(help="One or several, e.g. dual_map,home_pair:num_sampled=4.")] = "dual_map",
    queue_order: Annotated[
        str, typer.Option(help="One or several: first_come, cached_first, shortest_remaining, moore_hodgson.")
    ] = "first_come",
    workers: Annotated[str, typer.Option(help="8p8d; 8p: prefill alone; 8c: colocated.")] = "8p8d",
    hardware: Annotated[str, typer.Option(help="A row of the cost model.")] = "8b-h100",
    kv_tokens: Annotated[int | None, typer.Option(help="KV tokens per worker. Default: the hardware's.")] = None,
    rate: Annotated[
        str | None, typer.Option(help="Requests/s: 1,2,4 or 1..40:3 or 1..40. Default: around the reference rate.")
    ] = None,
    sessions: Annotated[
        str | None,
        typer.Option(
            help="How a rate is reached. keep: more sessions, pauses as they are (generated); compress (traces)."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many ring seeds.")] = 4,
    seed: Annotated[int, typer.Option(help="The first ring seed; also of jitter and generator.")] = 0,
    slo_ttft: Annotated[float, typer.Option(help="Seconds to the first token.")] = 5.0,
    slo_tpot: Annotated[float, typer.Option(help="Seconds per later token.")] = 0.05,
    jitter: Annotated[float, typer.Option(help="Seconds over which arrivals are spread; 3 for coarse ticks.")] = 0.0,
    cut: Annotated[int | None, typer.Option(help="Prompts end after so many tokens.")] = None,
    drop: Annotated[int | None, typer.Option(help="Prompts of more tokens are left out.")] = None,
    warmup: Annotated[
        int | None, typer.Option(help="First requests that do not count. Default: 0; with kept sessions a minute's.")
    ] = None,
    dispatch_tokens: Annotated[
        int | None, typer.Option(help="Sent to a worker ahead of its work; 0: all. Default: two steps' worth.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="E.g. router.rebalances=true.")] = None,
    join: Annotated[list[str] | None, typer.Option(help="In mid-run: 60:prefill*4, at 60 s.")] = None,
    leave: Annotated[list[str] | None, typer.Option(help="120:prefill-3; workers are prefill-0.., decode-0...")] = None,
    drain: Annotated[list[str] | None, typer.Option(help="Likewise; they finish what they have first.")] = None,
    fail: Annotated[list[str] | None, typer.Option(help="Silently: 60:prefill-2,prefill-5.")] = None,
    autoscale: Annotated[
        str | None,
        typer.Option(help="Pools follow the load: default, or a config file with a section autoscaler."),
    ] = None,
    window: Annotated[
        float | None, typer.Option(help="Seconds of arrivals per point of the share in SLO over time.")
    ] = None,
    skip_bad_lines: Annotated[bool, typer.Option("--skip-bad-lines", help="Go on without them.")] = False,
    goodput_search: Annotated[
        bool, typer.Option("--search/--no-search", help="Narrow goodput down between the rates.")
    ] = True,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    json: Annotated[str | None, typer.Option(help="File for the results; - is standard output.")] = None,
    figure: Annotated[str | None, typer.Option(help="File for a figure: .svg, .png or .pdf.")] = None,
) -> None:
    """Compare placement policies and queue orders on a simulated cluster that runs the shipping code."""
    from simulator.plan import Plan  # here, because other commands need not wait for it
    from simulator.runs import compare

    plan = Plan(
        trace=trace,
        generate=generate,
        num_requests=requests,
        policy=policy,
        queue_order=queue_order,
        workers=workers,
        hardware=hardware,
        num_kv_tokens=kv_tokens,
        rate=rate,
        sessions=sessions,
        num_seeds=seeds,
        seed=seed,
        slo_ttft_s=slo_ttft,
        slo_tpot_s=slo_tpot,
        jitter_s=jitter,
        cut=cut,
        drop=drop,
        num_warmup=warmup,
        dispatch_tokens=dispatch_tokens,
        settings=tuple(set_ or ()),
        joins=tuple(join or ()),
        leaves=tuple(leave or ()),
        drains=tuple(drain or ()),
        fails=tuple(fail or ()),
        autoscale=autoscale,
        window_s=window,
        skips_bad_lines=skip_bad_lines,
    )
    compare(plan, jobs, goodput_search, json, figure)
