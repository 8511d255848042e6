"""Which workers there should be: their names and roles, pool by pool, and who comes and goes when a pool gets another
size. Starts and ends nobody; what a size may be is handed in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import count

from protos.types import Role

COLOCATED = {"worker": Role.PREFILL}  # colocated workers are prefill workers that nobody asks to hand off
DISAGGREGATED = {"prefill": Role.PREFILL, "decode": Role.DECODE}

Check = Callable[[Mapping[str, int]], None]  # of the sizes of all pools: ValueError where they cannot be


@dataclass(frozen=True, slots=True)
class Turn:
    """A worker that becomes another one, of the other role, without loading the model again."""

    worker_id: str
    becomes: str
    role: Role


@dataclass(frozen=True, slots=True)
class Changes:
    starts: tuple[str, ...] = ()
    drains: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()


class Pools:
    """Invariant: `slots` are the workers that there should be, with their roles, in each pool oldest first; a worker's
    name begins with its pool's. As many of them as `check` allows."""

    def __init__(
        self, roles: Mapping[str, Role], slots: Iterable[tuple[str, Role]], may_turn: bool, check: Check
    ) -> None:
        """may_turn: a worker can change its pool without loading the model again."""
        self.slots = dict(slots)
        self.may_turn = may_turn
        self._roles = roles
        self._check_sizes = check

    @property
    def num_expected(self) -> tuple[int, int]:
        """Workers that prefill, workers that decode only."""
        roles = list(self.slots.values())
        return roles.count(Role.PREFILL), roles.count(Role.DECODE)

    def settled(self, serving: Collection[str], changing: Iterable[str]) -> dict[Role, int]:
        """Sizes of the pools in which everybody serves who should, and nobody comes or goes."""
        unsettled = {self.role_of(worker_id) for worker_id in [*changing, *(self.slots.keys() - set(serving))]}
        return {role: len(self.members(pool)) for pool, role in self._roles.items() if role not in unsettled}

    def role_of(self, worker_id: str) -> Role:
        return self._roles[worker_id.rpartition("-")[0]]

    def pool_of(self, role: Role) -> str:
        return next(pool for pool, its_role in self._roles.items() if its_role is role)

    def members(self, pool: str) -> list[str]:
        return [worker_id for worker_id in self.slots if worker_id.rpartition("-")[0] == pool]

    def without(self, worker_id: str) -> None:
        """It is not to be there any more. ValueError where its pool cannot do without."""
        pool = worker_id.rpartition("-")[0]
        self._check({pool: len(self.members(pool)) - 1})
        del self.slots[worker_id]

    def scale(self, sizes: Mapping[str, int], taken: Collection[str]) -> Changes:
        """The newest go first. `taken`: further names that nobody may get. ValueError says what cannot be, and then
        nothing has changed."""
        self._check(sizes)
        leaving: list[str] = []
        coming: list[str] = []
        for pool, size in sizes.items():
            members = self.members(pool)
            leaving += reversed(members[size:])
            coming += self._new_names(pool, size - len(members), taken)
        for worker_id in leaving:
            del self.slots[worker_id]
        for worker_id in coming:
            self.slots[worker_id] = self.role_of(worker_id)
        num_turns = min(len(leaving), len(coming)) if self.may_turn else 0
        turns = [Turn(one, other, self.slots[other]) for one, other in zip(leaving, coming[:num_turns], strict=False)]
        return Changes(tuple(coming[num_turns:]), tuple(leaving[num_turns:]), tuple(turns))

    def _check(self, sizes: Mapping[str, int]) -> None:
        for pool, size in sizes.items():
            if pool not in self._roles:
                raise ValueError(f"there is no pool {pool!r}; pools are {' and '.join(self._roles)}")
            if size < 0:
                raise ValueError(f"pool {pool} cannot have {size} workers")
        self._check_sizes({pool: len(self.members(pool)) for pool in self._roles} | dict(sizes))

    def _new_names(self, pool: str, num: int, taken: Collection[str]) -> list[str]:
        """The lowest numbers that are free: a home that comes back under its old name gets its old keys."""
        names = (f"{pool}-{number}" for number in count())
        free = (name for name in names if name not in self.slots and name not in taken)
        return [next(free) for _ in range(num)]
