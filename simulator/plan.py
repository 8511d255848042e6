"""From what a user types to what is simulated, checked. Runs nothing; randomness is handed in."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from protos.cost_model import HARDWARE, Hardware
from protos.hardware_file import hardware_from_json
from router.policies.config import PolicyConfig
from simulator.autoscale import autoscaler_of
from simulator.changes import changes_of, check_in_time
from simulator.generator import preset, without_longer_contexts
from simulator.limits import check_slos, reference_for
from simulator.offered import WARMUP_S, Compressed, Generated, OfferedLoad, Regrouped
from simulator.setup import Setup, default_router, default_scheduler
from simulator.sweep import DEFAULT_SHARES, MIN_ATTAINMENT, Experiment, Variant, contender, parse_rates
from simulator.traces import Trace, read_trace
from simulator.transforms import jittered, renumbered, truncated, with_sessions, without_longer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

    from _typeshed import DataclassInstance

    from simulator.requests import SimRequest

Mode = Literal["disaggregated", "colocated"]
C = TypeVar("C", bound="DataclassInstance")

WORKERS = re.compile(r"(\d+)p(?:(\d+)d)?|(\d+)c")
DEFAULT_NUM_GENERATED = 2000
SHARES_OF_KEPT = (0.05, 0.1, 0.2, 0.4, 0.8)  # of the reference: caches do not hold all sessions that it would take
NUM_STEP_BUDGETS = 2  # of tokens sent to a worker ahead of its work, where nothing else is asked for
SECTIONS = ("router", "scheduler", "transfer")  # of a Setup, in the names of settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The options of `twinring simulate`, as they were given."""

    trace: str | None
    generate: str | None
    num_requests: int | None
    policy: str
    queue_order: str
    workers: str
    hardware: str
    num_kv_tokens: int | None
    rate: str | None
    sessions: str | None
    num_seeds: int
    seed: int
    slo_ttft_s: float
    slo_tpot_s: float
    jitter_s: float
    cut: int | None
    drop: int | None
    num_warmup: int | None
    dispatch_tokens: int | None
    settings: Sequence[str]
    joins: Sequence[str]
    leaves: Sequence[str]
    drains: Sequence[str]
    fails: Sequence[str]
    autoscale: str | None
    window_s: float | None
    skips_bad_lines: bool

    @property
    def warmup_s(self) -> float:
        """Of kept sessions, where nothing else is asked for."""
        return WARMUP_S if self.num_warmup is None else 0.0

    @property
    def source(self) -> str:
        return Path(self.trace).name if self.trace is not None else str(self.generate)


def experiment_of(plan: Plan, rng_of: Callable[[str], Random]) -> tuple[Experiment, list[str]]:
    """The experiment, and notes on its requests. ValueError names the option that cannot be."""
    if plan.num_seeds < 1:
        raise ValueError(f"seeds must be positive, not {plan.num_seeds}")
    offered, notes = offered_of(plan, rng_of)
    setup = setup_of(plan)
    check_slos(offered.own, setup, MIN_ATTAINMENT)
    seeds = tuple(range(plan.seed, plan.seed + plan.num_seeds))
    rates = parse_rates(plan.rate) if plan.rate else default_rates(offered, setup)
    fewest = offered.at(max(rates))  # at lower rates there are no fewer, and they take longer
    if setup.num_warmup >= len(fewest):
        raise ValueError(f"warmup {setup.num_warmup} leaves none of {len(fewest)} requests at {max(rates):g} a second")
    check_in_time(setup.changes, fewest[-1].at_s, max(rates))
    return Experiment(offered, setup, variants_of(plan, setup), rates, seeds, window_s=plan.window_s), notes


def default_rates(offered: OfferedLoad, setup: Setup) -> tuple[float, ...]:
    shares = DEFAULT_SHARES if isinstance(offered, Compressed) else SHARES_OF_KEPT
    reference = reference_for(offered, setup).rate
    return tuple(float(f"{reference * share:.3g}") for share in shares)


# --- requests -------------------------------------------------------------------------------------------------------


def offered_of(plan: Plan, rng_of: Callable[[str], Random]) -> tuple[OfferedLoad, list[str]]:
    """And notes on it."""
    if (plan.trace is None) == (plan.generate is None):
        raise ValueError("give exactly one of --trace and --generate")
    if plan.sessions not in (None, "keep", "compress"):
        raise ValueError(f"sessions must be keep or compress, not {plan.sessions!r}")
    if plan.num_requests is not None and plan.num_requests < 1:
        raise ValueError(f"requests must be positive, not {plan.num_requests}")
    if plan.generate is not None:
        generated = generated_of(plan, rng_of)
        return (Compressed(generated.own) if plan.sessions == "compress" else generated), []
    trace = trace_of(plan)
    requests = prepared(plan, trace, rng_of)
    if plan.sessions == "keep":
        return Regrouped(with_sessions(requests), plan.num_requests, plan.warmup_s), trace.notes()
    return Compressed(requests[: plan.num_requests]), trace.notes()


def generated_of(plan: Plan, rng_of: Callable[[str], Random]) -> Generated:
    if plan.jitter_s:
        raise ValueError(f"jitter is for traces with coarse ticks; what is generated has none, not {plan.jitter_s:g}")
    workload = preset(str(plan.generate))
    if plan.drop is not None:
        workload = without_longer_contexts(workload, plan.drop)
    num_requests = plan.num_requests or DEFAULT_NUM_GENERATED
    _require_several(num_requests)
    return Generated(workload, num_requests, rng_of, f"{plan.seed}/{plan.generate}", plan.cut, plan.warmup_s)


def trace_of(plan: Plan) -> Trace:
    trace = read_trace(Path(str(plan.trace)))
    if trace.bad_lines and not plan.skips_bad_lines:
        raise ValueError(f"{trace.bad_lines_text()}; --skip-bad-lines goes on without")
    return trace


def prepared(plan: Plan, trace: Trace, rng_of: Callable[[str], Random]) -> tuple[SimRequest, ...]:
    """Jittered, then without or with shortened long prompts."""
    requests = trace.requests
    if plan.jitter_s:
        requests = jittered(requests, plan.jitter_s, rng_of(f"{plan.seed}/jitter"))
    if plan.drop is not None:
        requests = without_longer(requests, plan.drop)
    if plan.cut is not None:
        requests = truncated(requests, plan.cut)
    _require_several(min(len(requests), plan.num_requests or len(requests)))
    return renumbered(requests)


def _require_several(num_requests: int) -> None:
    if num_requests < 2:
        raise ValueError(f"{num_requests} requests have no rate; at least 2 are needed")


# --- the cluster ----------------------------------------------------------------------------------------------------


def setup_of(plan: Plan) -> Setup:
    num_prefill, num_decode, mode = parse_workers(plan.workers)
    scheduler = default_scheduler()
    hardware = hardware_of(plan.hardware, plan.num_kv_tokens)
    router = replace(default_router(), mode=mode, ttft_slo_s=plan.slo_ttft_s, tpot_slo_s=plan.slo_tpot_s)
    setup = Setup(
        hardware=hardware,
        num_prefill=num_prefill,
        num_decode=num_decode,
        router=replace(router, cost=hardware.cost),
        scheduler=scheduler,
        num_warmup=plan.num_warmup or 0,
    )
    for setting in plan.settings:
        setup = with_setting(setup, setting)
    dispatch_tokens = plan.dispatch_tokens
    if dispatch_tokens is None:
        dispatch_tokens = NUM_STEP_BUDGETS * setup.scheduler.max_num_batched_tokens
    if plan.autoscale is not None:
        setup = replace(setup, autoscaler=autoscaler_of(plan.autoscale))
    changes = changes_of(plan.joins, plan.leaves, plan.drains, plan.fails, setup)
    return replace(setup, router=replace(setup.router, dispatch_tokens=dispatch_tokens), changes=changes)


def parse_workers(text: str) -> tuple[int, int, Mode]:
    """8p8d: prefill and decode workers; 8p: prefill alone, every request ends with its first token; 8c: colocated."""
    match = WORKERS.fullmatch(text)
    if match is None:
        raise ValueError(f"workers must be like 8p8d, 8p (prefill alone) or 8c (colocated), not {text!r}")
    prefill, decode, colocated = match.groups()
    if 0 in (int(count) for count in (prefill, decode, colocated) if count is not None):
        raise ValueError(f"workers must be positive, not {text!r}")
    if colocated is not None:
        return int(colocated), 0, "colocated"
    return int(prefill), int(decode or 0), "disaggregated"


def hardware_of(name: str, num_kv_tokens: int | None) -> Hardware:
    """A row's name, or a file that `twinring fit` has written."""
    hardware = HARDWARE.get(name) or hardware_in(Path(name))
    if num_kv_tokens is None:
        return hardware
    if num_kv_tokens < 1:
        raise ValueError(f"kv-tokens must be positive, not {num_kv_tokens}")
    return replace(hardware, num_kv_tokens=num_kv_tokens)


def hardware_in(path: Path) -> Hardware:
    if not path.is_file():
        raise ValueError(f"hardware must be one of {', '.join(HARDWARE)}, or a file of `twinring fit`, not '{path}'")
    try:
        return hardware_from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"hardware {path}: {error}") from error


def with_setting(setup: Setup, text: str) -> Setup:
    """`router.rebalances=true`, `scheduler.max_num_seqs=64`, or a setting of the Setup itself."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"set must be name=value, not {text!r}")
    section, dot, inner = name.partition(".")
    if not dot:
        return _changed(setup, name, value, "")
    if section not in SECTIONS:
        raise ValueError(f"unknown setting {name}; sections are {', '.join(SECTIONS)}")
    return replace(setup, **{section: _changed(getattr(setup, section), inner, value, f"{section}.")})


def variants_of(plan: Plan, setup: Setup) -> tuple[Variant, ...]:
    """Each policy under each queue order."""
    orders = plan.queue_order.split(",")
    variants = []
    for policy, order in product(plan.policy.split(","), orders):
        label = policy if len(orders) == 1 else f"{policy}, {order}"
        router = _changed(replace(setup.router, policy=policy_of(policy)), "queue_order", order, "")
        variants.append(contender(label, router, setup))
    return tuple(variants)


def policy_of(text: str) -> PolicyConfig:
    """`home_pair`, or with settings of its own: `home_pair:num_sampled=4`."""
    name, *knobs = text.split(":")
    config = _changed(PolicyConfig(), "name", name, "policy ")
    for knob in knobs:
        knob_name, equals, value = knob.partition("=")
        if not equals:
            raise ValueError(f"policy {text!r}: {knob!r} is not name=value")
        config = _changed(config, knob_name, value, f"policy {name}: ")
    return config


def _changed(config: C, name: str, text: str, prefix: str) -> C:
    """A copy of a frozen dataclass with one field read from text. ValueError names the field and what it takes."""
    known = [field.name for field in fields(config) if not is_dataclass(getattr(config, field.name))]
    if name not in known:
        raise ValueError(f"unknown setting {prefix}{name}; known: {', '.join(known)}")
    try:
        value = TypeAdapter(get_type_hints(type(config))[name]).validate_python(yaml.safe_load(text))
    except ValidationError as error:
        raise ValueError(f"{prefix}{name} cannot be {text!r}: {error.errors()[0]['msg']}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{prefix}{name} cannot be {text!r}") from error
    return replace(config, **{name: value})
