"""How many workers each pool should have, from how well it does: whether requests meet their SLO, how long work waits,
how much of the pool is in use. Pure: values and the time in, wanted sizes and the reason in words out. Who starts and
drains workers is not known here.

A pool grows where it misses its goals, and shrinks by one worker where the rest would clearly do, each only after that
has held for a while. What makes it calm under a constant load is a memory: a size that was too small for some load is
not tried again before the load is clearly less."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from protos.types import Role

MAX_GROWTH = 2.0  # times its size, at once
CLEARLY_LESS = 0.8  # of the load under which a size was too small


@dataclass(frozen=True, slots=True)
class PoolLimits:
    min_workers: int = 1  # the pool has at least; of prefill 1 or more
    max_workers: int = 8  # it has at most
    max_queue_s: float = 1.0  # of work that waits for each worker; more makes the pool grow
    max_use: float = 0.85  # of time spent computing, or of KV in use, whichever the pool is short of; likewise

    def __post_init__(self) -> None:
        if not 0 <= self.min_workers <= self.max_workers:
            raise ValueError(f"min_workers must be within 0 and max_workers {self.max_workers}, got {self.min_workers}")
        if not self.max_queue_s > 0:
            raise ValueError(f"max_queue_s must be positive, got {self.max_queue_s}")
        if not 0 < self.max_use <= 1:
            raise ValueError(f"max_use must be in (0, 1], got {self.max_use}")


@dataclass(frozen=True, slots=True)
class AutoscalerConfig:
    enabled: bool = False  # pools then change their sizes by themselves
    prefill: PoolLimits = field(default_factory=PoolLimits)  # of this pool
    decode: PoolLimits = field(default_factory=PoolLimits)  # likewise
    min_attainment: float = 0.95  # share of requests that must meet the pool's SLO: TTFT for prefill, TPOT for decode
    grow_after_s: float = 10.0  # in which a pool has missed its goals without a break
    shrink_after_s: float = 120.0  # in which one worker less would have done, likewise
    cool_down_s: float = 30.0  # after a change, before the same pool changes again

    def __post_init__(self) -> None:
        if self.prefill.min_workers < 1:
            raise ValueError(f"prefill.min_workers must be at least 1, got {self.prefill.min_workers}")
        if not 0 < self.min_attainment <= 1:
            raise ValueError(f"min_attainment must be in (0, 1], got {self.min_attainment}")
        for name in ("grow_after_s", "shrink_after_s", "cool_down_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """Of the time since the last look."""

    num_workers: int  # there are, or are about to be
    attainment: float  # share of requests that met the SLO; 1 where none ended
    queue_s: float  # work that waits, per worker
    use: float  # share of the pool that is in use; what waits may bring it above 1

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

    def __init__(self, config: AutoscalerConfig) -> None:
        self._pools = {
            Role.PREFILL: _Pool(Role.PREFILL, config, config.prefill),
            Role.DECODE: _Pool(Role.DECODE, config, config.decode),
        }

    def decide(self, loads: dict[Role, PoolLoad], now: float) -> list[Resize]:
        """At regular looks, seconds apart."""
        found = [self._pools[role].decide(load, now) for role, load in loads.items()]
        return [resize for resize in found if resize is not None]


class _Pool:
    """Invariant: of `_short_since` and `_ample_since` one at least is None; `_too_small` is the largest size that has
    missed its goals, and the load under which it did."""

    def __init__(self, role: Role, config: AutoscalerConfig, limits: PoolLimits) -> None:
        self._role = role
        self._config = config
        self._limits = limits
        self._changed_at = -math.inf
        self._short_since: float | None = None
        self._ample_since: float | None = None
        self._too_small = (0, math.inf)

    def decide(self, load: PoolLoad, now: float) -> Resize | None:
        short = self._short_of(load)
        if short:
            self._remember(load)
        is_ample = not short and self._would_do(load, load.num_workers - 1)
        self._short_since = (now if self._short_since is None else self._short_since) if short else None
        self._ample_since = (now if self._ample_since is None else self._ample_since) if is_ample else None
        wanted, reason = self._wanted(load, short, now)
        wanted = min(max(wanted, self._limits.min_workers), self._limits.max_workers)
        if wanted == load.num_workers or now - self._changed_at < self._config.cool_down_s:
            return None
        self._changed_at, self._short_since, self._ample_since = now, None, None
        return Resize(self._role, wanted, f"{self._role.value} {load.num_workers} -> {wanted}: {reason}")

    def _wanted(self, load: PoolLoad, short: str, now: float) -> tuple[int, str]:
        config, size = self._config, load.num_workers
        if self._short_since is not None and now - self._short_since >= config.grow_after_s:
            needed = math.ceil(load.load / self._limits.max_use)
            return min(max(size + 1, needed), max(size + 1, int(MAX_GROWTH * size))), short
        if self._ample_since is not None and now - self._ample_since >= config.shrink_after_s:
            rest = f"{load.load / (size - 1):.0%} of the rest" if size > 1 else "none"
            return size - 1, f"{load.use:.0%} in use, which is {rest}"
        return size, "limits"

    def _short_of(self, load: PoolLoad) -> str:
        """What it lacks; empty: it meets its goals."""
        if load.num_workers == 0:
            return "no worker" if load.queue_s > 0 else ""
        if load.attainment < self._config.min_attainment:
            slo = "TTFT" if self._role is Role.PREFILL else "TPOT"
            return f"{load.attainment:.1%} of requests meet the {slo} SLO, {self._config.min_attainment:.1%} should"
        if load.queue_s > self._limits.max_queue_s:
            return f"{load.queue_s:.2f} s of work wait for each worker, {self._limits.max_queue_s:g} s are allowed"
        if load.use > self._limits.max_use:
            return f"{load.use:.0%} in use, {self._limits.max_use:.0%} are allowed"
        return ""

    def _would_do(self, load: PoolLoad, size: int) -> bool:
        """Clearly, and by what is known of that size."""
        if size < max(1, self._limits.min_workers):
            return False
        known_size, known_load = self._too_small
        is_known_to_fail = size <= known_size and load.load >= CLEARLY_LESS * known_load
        return not is_known_to_fail and load.load <= CLEARLY_LESS * self._limits.max_use * size

    def _remember(self, load: PoolLoad) -> None:
        """A larger size says more; of one size, the least load."""
        known_size, known_load = self._too_small
        if load.num_workers > known_size or load.load < CLEARLY_LESS * known_load:
            self._too_small = (load.num_workers, load.load)
        elif load.num_workers == known_size:
            self._too_small = (known_size, min(known_load, load.load))
