"""What the simulated part of the relief benchmark runs: workers with the memory of Llumnix's, requests with lengths as
heavy-tailed, and pools with and without relief."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from random import Random

from engine.config import SchedulerConfig
from protos.cost_model import CostModel, Hardware
from protos.types import Role
from router.config import RouterConfig
from router.policies.config import PolicyConfig
from router.relief import ReliefConfig
from simulator.requests import SimRequest
from simulator.result import RequestRecord, percentile
from simulator.run import simulate
from simulator.setup import NO_LIMIT, Change, ChangeKind, Setup, default_router

BLOCK = 16
MAX_LEN = 6144  # of a prompt or an output: together they fit a worker
# LLaMA-7B, fp16, on an A10, as Llumnix had it: 24 GB less the weights, and the time that 600 GB/s and 125 TFLOPS take
# at 80 % and 50 %. An estimate of ours: nothing was measured on one.
A10 = Hardware(CostModel(2e-3, 28e-3, 0.216e-3, 8.4e-9, 30e-3, 0.02e-3, 1.09e-6), 13_600, 524_288)
LINK_NBYTES_PER_S = 2e9  # 64 Gb/s for four of them
TTFT_SLO_S, TPOT_SLO_S = 5.0, 0.06


@dataclass(frozen=True, slots=True)
class Load:
    rate: float  # requests/s, at random (Poisson)
    num_requests: int
    mean_prompt: int
    mean_output: int
    seed: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run, or several taken together, came to."""

    ttfts_s: tuple[float, ...]  # sorted, as tpots_s
    tpots_s: tuple[float, ...]  # of those that finished
    num_good: int  # in both SLOs
    num_requests: int
    num_preemptions: int
    num_local: int  # decoded where they prefilled: no decode worker had room
    num_migrations: int
    duration_s: float  # in which they came
    num_failed_migrations: int = 0  # where that is known

    @property
    def goodput(self) -> float:
        return self.num_good / self.duration_s

    @property
    def attainment(self) -> float:
        return self.num_good / max(1, self.num_requests)

    def ttft_s(self, share: float) -> float:
        return percentile(self.ttfts_s, share)

    def tpot_s(self, share: float) -> float:
        return percentile(self.tpots_s, share)


def merged(parts: list[Measured]) -> Measured:
    return Measured(
        ttfts_s=tuple(sorted(one for part in parts for one in part.ttfts_s)),
        tpots_s=tuple(sorted(one for part in parts for one in part.tpots_s)),
        num_good=sum(part.num_good for part in parts),
        num_requests=sum(part.num_requests for part in parts),
        num_preemptions=sum(part.num_preemptions for part in parts),
        num_local=sum(part.num_local for part in parts),
        num_migrations=sum(part.num_migrations for part in parts),
        duration_s=sum(part.duration_s for part in parts),
        num_failed_migrations=sum(part.num_failed_migrations for part in parts),
    )


# --- requests ---------------------------------------------------------------------------------------------------------


def requests_of(load: Load) -> list[SimRequest]:
    """Prompts share nothing: Llumnix has no prefix cache."""
    rng, at_s, found = Random(load.seed), 0.0, []
    for number in range(load.num_requests):
        num_prompt, num_output = (power_law(rng, mean) for mean in (load.mean_prompt, load.mean_output))
        first = number * (MAX_LEN // BLOCK)
        hash_ids = tuple(range(first, first - (-num_prompt // BLOCK)))
        found.append(SimRequest(at_s, num_output, hash_ids, num_prompt, BLOCK))
        at_s += rng.expovariate(load.rate)
    return found


TAIL = 0.7  # of the power law: with a mean of 256 half lie below 70 and one in a hundred above 3,600


def power_law(rng: Random, mean: int) -> int:
    """Bounded Pareto on [shortest, MAX_LEN]."""
    shortest = _shortest(mean)
    share = rng.random() * (1 - math.pow(shortest / MAX_LEN, TAIL))
    return min(MAX_LEN, round(shortest * math.pow(1 - share, -1 / TAIL)))


@cache
def _shortest(mean: int) -> float:
    """That gives this mean, by halving."""
    low, high = 1.0, float(mean)
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if _mean(middle) > mean else (middle, high)
    return low


def _mean(shortest: float) -> float:
    """Of lengths with density ~ length ** -(TAIL + 1)."""
    rest = 1 - TAIL
    total = (math.pow(MAX_LEN, rest) - math.pow(shortest, rest)) / rest
    return TAIL * math.pow(shortest, TAIL) * total / (1 - math.pow(shortest / MAX_LEN, TAIL))


# --- pools ------------------------------------------------------------------------------------------------------------


def setup_of(router: RouterConfig, **changes: object) -> Setup:
    return replace(
        Setup(
            hardware=A10,
            router=replace(router, block_size=BLOCK, hash_block_size=BLOCK, cost=A10.cost),
            scheduler=SchedulerConfig(
                max_model_len=NO_LIMIT,
                max_num_batched_tokens=2048,
                max_num_seqs=256,
                block_size=BLOCK,
                hash_block_size=BLOCK,
            ),
            link_nbytes_per_s=LINK_NBYTES_PER_S,
        ),
        **changes,  # type: ignore[arg-type]
    )


def router_of(relief: ReliefConfig | None, policy: PolicyConfig | None = None, **changes: object) -> RouterConfig:
    config = replace(default_router(), ttft_slo_s=TTFT_SLO_S, tpot_slo_s=TPOT_SLO_S, pull_s_per_token=0.0)
    if policy is not None:
        config = replace(config, policy=policy)
    if relief is not None:
        config = replace(config, relieves=True, relief=relief)
    return replace(config, **changes)  # type: ignore[arg-type]


def hot_and_cool(relief: ReliefConfig | None, join_at_s: float) -> Setup:
    """One decode worker has all the load until three more join."""
    names = (f"decode-{number}" for number in range(1, 4))
    joins = tuple(Change(join_at_s, ChangeKind.JOIN, name, Role.DECODE) for name in names)
    return setup_of(router_of(relief), num_prefill=2, num_decode=1, changes=joins)


def split_pool(relief: ReliefConfig | None) -> Setup:
    return setup_of(router_of(relief), num_prefill=4, num_decode=16)


def colocated_pool(relief: ReliefConfig | None, policy: PolicyConfig) -> Setup:
    """As Llumnix's: every worker does both."""
    return setup_of(router_of(relief, policy, mode="colocated"), num_prefill=16, num_decode=0)


# --- runs -------------------------------------------------------------------------------------------------------------


def measured(setup: Setup, load: Load, at_s: float | None = None) -> Measured:
    """at_s: only what was there at that time counts."""
    result = simulate(setup, requests_of(load))
    records = [record for record in result.records if at_s is None or record.at_s <= at_s <= (record.ended_at or at_s)]
    return Measured(
        ttfts_s=tuple(sorted(ttft_s for record in records if (ttft_s := record.ttft_s) is not None)),
        tpots_s=tuple(sorted(tpot_s for record in records if (tpot_s := record.tpot_s) is not None)),
        num_good=sum(record.meets(TTFT_SLO_S, TPOT_SLO_S) for record in records),
        num_requests=len(records),
        num_preemptions=sum(record.num_preemptions for record in records),
        num_local=sum(_is_local(record) for record in records),
        num_migrations=result.router.num_migrations,
        duration_s=result.records[-1].at_s,
        num_failed_migrations=result.router.num_failed_migrations,
    )


def _is_local(record: RequestRecord) -> bool:
    return record.decode_worker == record.prefill_worker
