"""The decode workers and what runs on them, as relief.py looks at them: from the view and the requests in flight.
Decides when it is asked; nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from protos.types import Role
from router.cluster_view import ClusterView, WorkerView
from router.config import RouterConfig
from router.decode_placement import DecodePlacement
from router.events import MigrationWanted
from router.freeness import DecodeLoad, WorkerLoad
from router.in_flight import Attempt, InFlight
from router.relief import Relief


class Reliever:
    """Without `relieves` only workers that drain are relieved."""

    def __init__(self, config: RouterConfig, view: ClusterView, decode: DecodePlacement) -> None:
        self._config = config
        self._view = view
        self._decode = decode
        self._relief = Relief(config.relief, config.block_size, only_leaving=not config.relieves)

    def failed(self, source_id: str, destination_id: str, now: float) -> None:
        """A migration between the two came to nothing."""
        self._relief.failed(source_id, destination_id, now)

    def wanted(self, in_flight: Iterable[InFlight], now: float) -> list[MigrationWanted]:
        if not (self._config.relieves or self._view.draining):
            return []
        return self._relief.decide(worker_loads(self._config, self._view, self._decode, in_flight), now)


def worker_loads(
    config: RouterConfig, view: ClusterView, decode: DecodePlacement, in_flight: Iterable[InFlight]
) -> list[WorkerLoad]:
    """Of the workers that are there to decode, and of those that are to end, where something may decode. A request on
    its way to another worker counts there, and only there."""
    here: dict[WorkerView, list[DecodeLoad]] = defaultdict(list)
    going: dict[WorkerView, list[DecodeLoad]] = defaultdict(list)  # they still hold their memory there
    num_coming: dict[WorkerView, int] = defaultdict(int)
    for one in in_flight:
        if one.attempt is None:
            continue
        load, place = _load(one, one.attempt, config.block_size, decode), one.attempt.plan.decoding_worker
        if one.attempt.migration is None:
            here[place].append(load)
        else:
            going[place].append(load)
            here[one.attempt.migration.to].append(load)
            num_coming[one.attempt.migration.to] += 1
    return [
        _worker_load(each, here[each], going[each], num_coming[each], each.worker_id in view.draining)
        for each in view.workers.values()
        if config.mode == "colocated" or each.ref.role is Role.DECODE or each.worker_id in view.draining
    ]


def _load(in_flight: InFlight, attempt: Attempt, block_size: int, decode: DecodePlacement) -> DecodeLoad:
    return DecodeLoad(
        request_id=in_flight.request_id,
        num_blocks=-(-in_flight.num_tokens // block_size),
        num_remaining_tokens=decode.num_expected_tokens(in_flight),
        priority=in_flight.template.priority,
        may_move=attempt.migration is None and attempt.plan.decoding_worker.worker_id in attempt.reported,
    )


def _worker_load(
    view: WorkerView, here: list[DecodeLoad], going: list[DecodeLoad], num_coming: int, is_leaving: bool
) -> WorkerLoad:
    """What it reports beyond its requests of this router is of others. Reports are some tenths of a second old: what
    has just ended counts as others' until the next one."""
    stats, own = view.stats, [*here, *going]
    num_used_blocks = stats.num_blocks - stats.num_free_blocks - stats.num_cached_blocks
    return WorkerLoad(
        worker_id=view.worker_id,
        num_blocks=stats.num_blocks,
        requests=tuple(here),
        num_other_blocks=max(0, num_used_blocks - sum(one.num_blocks for one in own)),
        num_other_requests=max(0, stats.num_running + stats.num_waiting - len(own)),
        num_migrations=num_coming + len(going),
        block_nbytes=stats.transfers.block_nbytes,
        is_leaving=is_leaving,
        max_num_seqs=stats.max_num_seqs,
    )
