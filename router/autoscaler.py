"""How many workers each pool should have, from how well it does: whether requests meet their SLO, how long work waits,
how much of the pool is in use. Pure: values and the time in, wanted sizes and the reason in words out. Who starts and
drains workers is not known here.

A pool grows where it has missed its goals for a while, and shrinks by one worker where the rest would clearly have done
over a longer one. A worker that one pool can spare may go over to the other. What makes it calm under a constant load
is a memory: a size that was too small for some load is not tried again before the load is clearly less."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from protos.types import Role

MAX_GROWTH = 2.0  # times its size, at once
CLEARLY_LESS = 0.8  # of the load under which a size was too small
LESS = 0.9  # of it, where the other pool is short and a change of role can be taken back in seconds


@dataclass(frozen=True, slots=True)
class PoolLimits:
    min_workers: int = 1  # the pool has at least; of prefill 1 or more
    max_workers: int = 8  # it has at most
    max_queue: float = 0.4  # work that waits for each worker, in router.ttft_slo_s; more makes the pool grow
    max_use: float = 0.85  # of time spent computing, or of KV in use, whichever the pool is short of; likewise

    def __post_init__(self) -> None:
        if not 0 <= self.min_workers <= self.max_workers:
            raise ValueError(f"min_workers must be within 0 and max_workers {self.max_workers}, got {self.min_workers}")
        if not self.max_queue > 0:
            raise ValueError(f"max_queue must be positive, got {self.max_queue}")
        if not 0 < self.max_use <= 1:
            raise ValueError(f"max_use must be in (0, 1], got {self.max_use}")


@dataclass(frozen=True, slots=True)
class AutoscalerConfig:
    enabled: bool = False  # pools then change their sizes by themselves
    prefill: PoolLimits = field(default_factory=PoolLimits)  # of this pool
    decode: PoolLimits = field(default_factory=PoolLimits)  # likewise
    min_attainment: float = 0.95  # share of requests that must meet the pool's SLO: TTFT for prefill, TPOT for decode
    window_s: float = 60.0  # in which requests are counted for that, and busy prefill workers; anew after a change
    grow_after_s: float = 10.0  # in which a pool has missed its goals without a break
    shrink_after_s: float = 120.0  # over which one worker less would have done, on average
    cool_down_s: float = 30.0  # after a change, before the same pool changes again
    changes_roles: bool = False  # a worker that one pool can spare goes over where the other is short, or nearly so

    def __post_init__(self) -> None:
        if self.prefill.min_workers < 1:
            raise ValueError(f"prefill.min_workers must be at least 1, got {self.prefill.min_workers}")
        if not 0 < self.min_attainment <= 1:
            raise ValueError(f"min_attainment must be in (0, 1], got {self.min_attainment}")
        if not self.window_s > 0:
            raise ValueError(f"window_s must be positive, got {self.window_s}")
        for name in ("grow_after_s", "shrink_after_s", "cool_down_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """What waits is of the time since the last look, the others of a longer one."""

    num_workers: int  # there are, or are about to be
    attainment: float  # share of requests that met the SLO; 1 where few ended
    queue: float  # work that waits, per worker, as a share of the TTFT SLO
    use: float  # share of the pool that is in use; of decode above 1 where its requests decode elsewhere

    @property
    def load(self) -> float:
        """In workers that it would keep busy."""
        return self.use * self.num_workers


@dataclass(frozen=True, slots=True)
class Resize:
    role: Role
    num_workers: int
    reason: str


class Autoscaler:
    """Invariant: what it wants lies within the limits, and it wants a change of a pool at most once in cool_down_s."""

    def __init__(self, config: AutoscalerConfig, may_turn: bool) -> None:
        """may_turn: a worker can change its role without loading the model again."""
        self._changes_roles = may_turn and config.changes_roles
        self._pools = {
            Role.PREFILL: _Pool(Role.PREFILL, config, config.prefill),
            Role.DECODE: _Pool(Role.DECODE, config, config.decode),
        }

    def decide(self, loads: Mapping[Role, PoolLoad], now: float) -> list[Resize]:
        """At regular looks, seconds apart. `loads`: of the pools that may change. Where one gets less and the other
        more, workers go over."""
        wanted = [self._pools[role].decide(load, now) for role, load in loads.items()]
        found = [resize for resize in wanted if resize is not None]
        if len(found) == 1 and self._changes_roles:
            found += self._answers(found[0], loads, now)
        return found

    def _answers(self, resize: Resize, loads: Mapping[Role, PoolLoad], now: float) -> list[Resize]:
        """What the other pool gives, where this one grows, or takes, where this one shrinks."""
        num_more = resize.num_workers - loads[resize.role].num_workers
        others = [(self._pools[role], load) for role, load in loads.items() if role != resize.role]
        found = [pool.spare(load, num_more, now) if num_more > 0 else pool.take(load, now) for pool, load in others]
        return [other for other in found if other is not None]


class _Pool:
    """Invariant: `_loads` has the latest looks, since the pool grew at the longest; `_too_small` is
    the largest size that has missed its goals, and the load under which it did."""

    def __init__(self, role: Role, config: AutoscalerConfig, limits: PoolLimits) -> None:
        self._role = role
        self._config = config
        self._limits = limits
        self._changed_at = -math.inf
        self._short_since: float | None = None
        self._loads: deque[tuple[float, float]] = deque()  # when, and how many workers were kept busy
        self._loads_since = math.inf
        self._too_small = (0, math.inf)

    def decide(self, load: PoolLoad, now: float) -> Resize | None:
        self._note(load, now)
        wanted, reason = self._wanted(load, now)
        wanted = min(max(wanted, self._limits.min_workers), self._limits.max_workers)
        return None if wanted == load.num_workers else self._resize(load, wanted, reason, now)

    def spare(self, load: PoolLoad, num: int, now: float) -> Resize | None:
        """Up to so many workers, where the rest would have been enough for window_s."""
        mean, rest = self._mean_load(self._config.window_s, now), load.num_workers
        while mean is not None and load.num_workers - rest < num and self._would_do(mean, rest - 1, LESS):
            rest -= 1
        if mean is None or rest == load.num_workers or self._short_since is not None:
            return None
        return self._resize(load, rest, f"{mean / load.num_workers:.0%} in use, and the other pool is short", now)

    def take(self, load: PoolLoad, now: float) -> Resize | None:
        """One worker, which else would end, where it may soon be wanted here."""
        wanted = load.num_workers + 1
        if load.use <= CLEARLY_LESS * self._limits.max_use or wanted > self._limits.max_workers:
            return None
        return self._resize(load, wanted, f"{load.use:.0%} in use, and the other pool has one too many", now)

    def _note(self, load: PoolLoad, now: float) -> None:
        is_short = bool(self._short_of(load))
        if self._loads and now - self._loads[-1][0] > self._config.window_s:  # who knows what was in between
            self._short_since = None
            self._loads.clear()
            self._loads_since = math.inf
        self._short_since = (now if self._short_since is None else self._short_since) if is_short else None
        self._loads_since = min(self._loads_since, now)
        self._loads.append((now, load.load))
        while self._loads[0][0] < now - max(self._config.shrink_after_s, self._config.window_s):
            self._loads.popleft()

    def _resize(self, load: PoolLoad, wanted: int, reason: str, now: float) -> Resize | None:
        if now - self._changed_at < self._config.cool_down_s:
            return None
        self._changed_at, self._short_since = now, None
        if wanted > load.num_workers:
            self._loads.clear()  # what came before it was enough is no reason to take it back
            self._loads_since = math.inf
        return Resize(self._role, wanted, f"{self._role.value} {load.num_workers} -> {wanted}: {reason}")

    def _wanted(self, load: PoolLoad, now: float) -> tuple[int, str]:
        config, size = self._config, load.num_workers
        if self._short_since is not None and now - self._short_since >= config.grow_after_s:
            self._remember(load)
            needed = math.ceil(load.load / self._limits.max_use)
            return min(max(size + 1, needed), max(size + 1, int(MAX_GROWTH * size))), self._short_of(load)
        mean = self._mean_load(config.shrink_after_s, now)
        if self._short_since is None and mean is not None and self._would_do(mean, size - 1):
            return size - 1, f"{mean / size:.0%} in use, which is {mean / (size - 1):.0%} of the rest"
        return size, "limits"

    def _mean_load(self, over_s: float, now: float) -> float | None:
        """A look is a few seconds, in which chance is large. None where it has not been looked at for so long."""
        if now - self._loads_since < over_s:
            return None
        found = [load for at, load in self._loads if at >= now - over_s]
        return sum(found) / len(found)

    def _short_of(self, load: PoolLoad) -> str:
        """What it lacks; empty: it meets its goals."""
        if load.num_workers == 0:
            return "no worker" if load.queue > 0 else ""
        if load.attainment < self._config.min_attainment:
            slo = "TTFT" if self._role is Role.PREFILL else "TPOT"
            return f"{load.attainment:.1%} of requests meet the {slo} SLO, {self._config.min_attainment:.1%} should"
        if load.queue > self._limits.max_queue:
            return f"{load.queue:.0%} of the TTFT SLO wait for each worker, {self._limits.max_queue:.0%} are allowed"
        if load.use > self._limits.max_use:
            return f"{load.use:.0%} in use, {self._limits.max_use:.0%} are allowed"
        return ""

    def _would_do(self, load: float, size: int, share: float = CLEARLY_LESS) -> bool:
        """Clearly, and by what is known of that size."""
        if size < max(1, self._limits.min_workers):
            return False
        known_size, known_load = self._too_small
        is_known_to_fail = size <= known_size and load >= share * known_load
        return not is_known_to_fail and load <= share * self._limits.max_use * size

    def _remember(self, load: PoolLoad) -> None:
        """A larger size says more; of one size, the least load."""
        known_size, known_load = self._too_small
        if load.num_workers > known_size or load.load < CLEARLY_LESS * known_load:
            self._too_small = (load.num_workers, load.load)
        elif load.num_workers == known_size:
            self._too_small = (known_size, min(known_load, load.load))
