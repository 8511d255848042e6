"""Which blocks each request and each transfer uses, and which of them hold a prefix that another request can use.
Decides nothing about who runs; knows no tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from engine.block_pool import BlockPool
from engine.config import SchedulerConfig
from engine.request import Request
from protos.block_hash import chain_hashes, chain_root, fold_links


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where every block is. Balanced: free + cached + held + leased == total, no block in two places, and every
    ref_cnt equal to the uses that the tables show; in host memory the same, where no request holds any."""

    free: int
    cached: int
    held: int  # at least one request uses it
    leased: int  # only transfers and copies use it
    total: int
    balanced: bool
    host_cached: int = 0
    host_leased: int = 0
    host_total: int = 0


class KVCacheManager:
    """Invariant: ref_cnt of a block = how often it stands in the requests' tables and the transfers' leases."""

    def __init__(self, config: SchedulerConfig, num_blocks: int, hash_key: bytes, model_fingerprint: str) -> None:
        self._config = config
        self._pool = BlockPool(num_blocks)
        self._hash_key = hash_key
        self._model_fingerprint = model_fingerprint
        self._tables: dict[Request, list[int]] = {}
        self._leases: dict[bytes, list[int]] = {}
        self._unused: list[Sequence[bytes]] = []  # where there is host memory to save it to

    def __contains__(self, block_hash: bytes) -> bool:
        return self._pool.find(block_hash) is not None

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_available_blocks(self) -> int:
        return self._pool.num_available

    # --- requests -------------------------------------------------------------------------------------------------

    def block_table(self, request: Request) -> list[int]:
        """The request's own list, lent; empty where it has no blocks."""
        return self._tables.get(request, [])

    def get_computed_blocks(self, request: Request) -> list[int]:
        """The longest cached prefix in full blocks, at most num_tokens - 1 tokens: one must be left to compute."""
        return self._find_cached(request, request.num_tokens - 1)

    def prefix(self, request: Request) -> tuple[tuple[bytes, ...], int]:
        """Hashes of all blocks that get_computed_blocks could ever find, and how many of them it finds now."""
        hashes = self._block_hashes(request, 0, (request.num_tokens - 1) // self._config.block_size)
        return tuple(hashes), len(self._find_run(hashes))

    def given_prefix(self, request: Request) -> tuple[bytes, ...]:
        """Hashes of all full blocks that the request came with."""
        return tuple(self._block_hashes(request, 0, request.num_given_tokens // self._config.block_size))

    def computed_prefix(self, request: Request) -> tuple[bytes, ...]:
        """Hashes of all its full blocks that have been computed, also where it has let go of them."""
        return tuple(self._block_hashes(request, 0, request.num_computed_tokens // self._config.block_size))

    def num_cached(self, hashes: Sequence[bytes]) -> int:
        """How many of these blocks are here, from the first on."""
        return len(self._find_run(hashes))

    def can_hold(self, request: Request, computed_blocks: Sequence[int], num_spare_blocks: int) -> bool:
        """Is there room now for all tokens of the request, computed_blocks among it, and num_spare_blocks more?"""
        return self._room_for(self._config.num_blocks_for(request.num_tokens) + num_spare_blocks, computed_blocks)

    def allocate_slots(self, request: Request, num_new_tokens: int, computed_blocks: Sequence[int] = ()) -> bool:
        """Room in the request's table for its next num_new_tokens tokens; False (and no change) where there is none.

        computed_blocks: cached blocks that a request without a table starts from; num_new_tokens come after them."""
        table = self._tables.get(request, [])
        assert not (table and computed_blocks)
        num_computed = max(request.num_computed_tokens, len(computed_blocks) * self._config.block_size)
        num_missing = self._config.num_blocks_for(num_computed + num_new_tokens) - len(table)
        if table and num_missing <= 0:
            return True  # most decodes: the last block has room
        if not self._room_for(num_missing, computed_blocks):
            return False
        self._pool.acquire(computed_blocks)
        new_blocks = self._pool.allocate(num_missing - len(computed_blocks))
        assert new_blocks is not None
        self._tables.setdefault(request, table).extend([*computed_blocks, *new_blocks])
        return True

    def cache_full_blocks(self, request: Request) -> None:
        """Let others find the request's blocks that are full and computed."""
        num_full = request.num_computed_tokens // self._config.block_size
        if not self._config.enable_prefix_caching or num_full <= request.num_hashed_blocks:
            return
        hashes = self._block_hashes(request, request.num_hashed_blocks, num_full)
        new_blocks = self._tables[request][request.num_hashed_blocks : num_full]
        for block_id, block_hash in zip(new_blocks, hashes, strict=True):
            self._pool.name(block_id, block_hash)
        request.num_hashed_blocks = num_full

    def free(self, request: Request) -> None:
        """The request uses no blocks any more; what it borrowed from a home goes first where memory is short. What
        transfers lease stays leased."""
        if self._config.host is not None and not request.return_worker_id:  # else its home keeps it
            self._unused.append(self._block_hashes(request, 0, request.num_hashed_blocks))
        table = self._tables.pop(request, [])
        self._pool.release(table)
        self._pool.demote([table[place] for place in request.borrowed_blocks if place < len(table)])
        request.num_hashed_blocks = 0

    def note_unused(self, hashes: Sequence[bytes]) -> None:
        """A prefix that may be evicted from now on, for take_unused."""
        if self._config.host is not None:
            self._unused.append(hashes)

    def take_unused(self) -> list[Sequence[bytes]]:
        """The prefixes that have gone out of use since this was last asked, each from its first block on."""
        unused, self._unused = self._unused, []
        return unused

    # --- transfers ------------------------------------------------------------------------------------------------

    def lease(self, transfer_id: bytes, block_ids: Sequence[int]) -> None:
        """Keep blocks that are in use until release_lease, whatever becomes of their request."""
        assert all(self._pool.ref_cnt[block_id] for block_id in block_ids)
        self._pool.acquire(block_ids)
        self._leases.setdefault(transfer_id, []).extend(block_ids)

    def release_lease(self, transfer_id: bytes) -> None:
        """The transfer's blocks are quiet. Nothing happens where it leases none."""
        self._pool.release(self._leases.pop(transfer_id, []))

    def release_copies(self, transfer_id: bytes) -> None:
        """The same; another worker keeps these blocks from now on, so that they go first where memory is short."""
        block_ids = self._leases.pop(transfer_id, [])
        self._pool.release(block_ids)
        self._pool.demote(block_ids)

    def is_leasing(self, transfer_id: bytes) -> bool:
        return transfer_id in self._leases

    def grant(
        self, transfer_id: bytes, request: Request, num_blocks: int, max_held_tokens: int, num_spare_blocks: int
    ) -> tuple[int, list[int]] | None:
        """Lease num_blocks blocks to the transfer that brings a request's KV: (how many of the first max_held_tokens
        tokens' are held here already, ids of the blocks to write), or None (and no change) where fewer than
        num_spare_blocks were left."""
        assert transfer_id not in self._leases
        held = self._find_cached(request, max_held_tokens)
        to_write = self._lease_room(transfer_id, held, num_blocks, num_spare_blocks)
        return None if to_write is None else (len(held), to_write)

    def grant_prefix(
        self, transfer_id: bytes, hashes: Sequence[bytes], num_must_be_held: int, num_spare_blocks: int
    ) -> tuple[int, list[int]] | None:
        """The same for a prefix by the hashes of its blocks; None also where the first num_must_be_held are not all
        here."""
        assert transfer_id not in self._leases
        held = self._find_run(hashes)
        if len(held) < num_must_be_held:
            return None
        to_write = self._lease_room(transfer_id, held, len(hashes), num_spare_blocks)
        return None if to_write is None else (len(held), to_write)

    def cache_leased(self, transfer_id: bytes, hashes: Sequence[bytes]) -> None:
        """The blocks leased by grant_prefix hold what these hashes say: let others find them."""
        for block_id, block_hash in zip(self._leases[transfer_id], hashes, strict=True):
            self._pool.name(block_id, block_hash)

    def lease_cached(self, transfer_id: bytes, hashes: Sequence[bytes]) -> list[int]:
        """Lease the first of these blocks as far as they are here without a gap; empty (and no lease) where none is."""
        assert transfer_id not in self._leases
        found = self._find_run(hashes)
        if found:
            self._pool.acquire(found)
            self._leases[transfer_id] = list(found)
        return found

    def lease_found(self, lease_id: bytes, hashes: Sequence[bytes]) -> list[int]:
        """Lease these blocks, which are all here, whatever stands before them."""
        assert lease_id not in self._leases
        found = [block_id for each in hashes if (block_id := self._pool.find(each)) is not None]
        assert len(found) == len(hashes)
        self._pool.acquire(found)
        self._leases[lease_id] = found
        return list(found)

    def adopt(self, request: Request, transfer_id: bytes, num_blocks: int | None = None) -> None:
        """Make the transfer's blocks, or the first num_blocks of them, the request's table; the lease stays until it is
        released."""
        assert request not in self._tables
        block_ids = self._leases[transfer_id][:num_blocks]
        self._pool.acquire(block_ids)
        self._tables[request] = block_ids

    # --- ledger ---------------------------------------------------------------------------------------------------

    def ledger(self) -> Ledger:
        """Recomputed from the tables and leases; the pool's own facts are only compared with them."""
        held = set(chain.from_iterable(self._tables.values()))
        leased = set(chain.from_iterable(self._leases.values())) - held
        free, cached = self._pool.free, self._pool.cached
        total = len(free) + len(cached) + len(held) + len(leased)
        uses = Counter(chain(*self._tables.values(), *self._leases.values()))
        ref_cnt = {block_id: count for block_id, count in enumerate(self._pool.ref_cnt) if count}
        balanced = (
            total == self.num_blocks
            and len(held.union(leased, free, cached)) == self.num_blocks  # as many ids as places: none in two
            and ref_cnt == uses
        )
        return Ledger(len(free), len(cached), len(held), len(leased), self.num_blocks, balanced)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _room_for(self, num_wanted: int, computed_blocks: Sequence[int]) -> bool:
        """Can num_wanted blocks be had, computed_blocks among them?"""
        num_idle = sum(self._pool.ref_cnt[block_id] == 0 for block_id in computed_blocks)
        return num_wanted - len(computed_blocks) <= self._pool.num_available - num_idle

    def _lease_room(
        self, transfer_id: bytes, held: Sequence[int], num_wanted: int, num_spare_blocks: int
    ) -> list[int] | None:
        """Lease held and new blocks, num_wanted together, and return the new ones."""
        if not self._room_for(num_wanted + num_spare_blocks, held):
            return None
        self._pool.acquire(held)
        to_write = self._pool.allocate(num_wanted - len(held))
        assert to_write is not None
        self._leases[transfer_id] = [*held, *to_write]
        return to_write

    def _find_cached(self, request: Request, max_num_tokens: int) -> list[int]:
        if not self._config.enable_prefix_caching:
            return []
        return self._find_run(self._block_hashes(request, 0, max_num_tokens // self._config.block_size))

    def _find_run(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks with the first of these hashes, up to the first that is not here."""
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._pool.find(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def _block_hashes(self, request: Request, start: int, stop: int) -> list[bytes]:
        """Hashes of the request's blocks [start, stop), all of them full. Extends the request's chain where it must."""
        ratio = self._config.links_per_block
        if len(request.hash_links) < stop * ratio:
            root = chain_root(self._hash_key, self._model_fingerprint, request.cache_salt)
            request.hash_links = chain_hashes(
                request.token_ids, self._config.hash_block_size, root, self._hash_key, known=request.hash_links
            )
        return fold_links(request.hash_links[start * ratio : stop * ratio], ratio)
