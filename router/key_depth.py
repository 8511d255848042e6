"""How many leading blocks make up a request's routing key, prefix by prefix (DualMap, ICLR 2026, section 4): a prefix
that many requests share is told apart by one block more, and again by one less when it has cooled down. Knows recent
chains of links and the number of workers; not the rings, not who holds what."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

MAX_EARLIER = 3  # depths to look up, each on both rings


@dataclass(frozen=True, slots=True)
class KeyDepthConfig:
    """Shares are of a full window. Without an override hot is above 2/n and cold below 1/n, for n workers."""

    min_blocks: int = 1  # hash blocks of the shortest routing key
    max_blocks: int = 64  # and of the longest
    window: int = 200  # recent requests
    hot_share: float | None = None  # of requests, above which a key grows; None: 2/n for n workers
    cold_share: float | None = None  # below which it shrinks; None: 1/n

    def __post_init__(self) -> None:
        for name in ("min_blocks", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_blocks < self.min_blocks:
            raise ValueError(f"max_blocks must be at least min_blocks {self.min_blocks}, got {self.max_blocks}")
        if (self.hot_share is None) != (self.cold_share is None):
            missing = "hot_share" if self.hot_share is None else "cold_share"
            raise ValueError(f"hot_share and cold_share go together: {missing} is not set")
        if self.hot_share is not None and self.cold_share is not None and not 0 < self.cold_share <= self.hot_share:
            raise ValueError(f"cold_share must be in (0, hot_share {self.hot_share}], got {self.cold_share}")

    def shares(self, num_workers: int) -> tuple[float, float]:
        """Hot, cold."""
        if self.hot_share is None or self.cold_share is None:
            return 2 / num_workers, 1 / num_workers
        return self.hot_share, self.cold_share


@dataclass(frozen=True, slots=True)
class DepthChange:
    """Keys that ended with this link now go one block beyond it (extends), or end with it again."""

    version: int  # of the table, after the change
    link: bytes
    extends: bool


@dataclass(frozen=True, slots=True)
class DepthSnapshot:
    """A whole table, for another router's."""

    version: int = 0
    extended: tuple[bytes, ...] = ()  # sorted
    changed: tuple[tuple[bytes, int], ...] = ()  # links of the latest changes and their versions, oldest first


EMPTY = DepthSnapshot()


class DepthTable:
    """Which prefixes are told apart by what follows them.

    Invariant: the table is a function of the changes applied to it, one for each version; so routers that have applied
    the same ones name the same depths."""

    def __init__(self, config: KeyDepthConfig, snapshot: DepthSnapshot = EMPTY) -> None:
        self.version = snapshot.version
        self._config = config
        self._extended = set(snapshot.extended)
        self._changed_at = OrderedDict(snapshot.changed)  # version by link, the latest `window` changes

    def __len__(self) -> int:
        return len(self._extended)

    def snapshot(self) -> DepthSnapshot:
        return DepthSnapshot(self.version, tuple(sorted(self._extended)), tuple(self._changed_at.items()))

    def is_extended(self, link: bytes) -> bool:
        return link in self._extended

    def apply(self, change: DepthChange) -> None:
        if change.version != self.version + 1:
            raise ValueError(f"version {change.version} does not follow version {self.version} of the table")
        self.version = change.version
        if change.extends:
            self._extended.add(change.link)
        else:
            self._extended.discard(change.link)
        self._changed_at[change.link] = change.version
        self._changed_at.move_to_end(change.link)
        if len(self._changed_at) > self._config.window:
            self._changed_at.popitem(last=False)

    def depth(self, links: Sequence[bytes]) -> int:
        """Blocks of the key; all there are where they are fewer than min_blocks. O(depth)."""
        return self._walk(links, None)

    def previous_depth(self, links: Sequence[bytes]) -> int | None:
        """What the depth was before the latest change that concerns this chain: where its KV may still lie. None where
        no recent change does."""
        depth = self.depth(links)
        on_way = [link for link in links[self._config.min_blocks - 1 : depth] if link in self._changed_at]
        if not on_way:
            return None
        previous = self._walk(links, max(on_way, key=self._changed_at.__getitem__))
        return previous if previous != depth else None

    def earlier_depths(self, links: Sequence[bytes]) -> list[int]:
        """Where else the KV of this prefix may lie, likeliest first and MAX_EARLIER at most: where its key ended before
        the latest change, and where the keys of prompts ended that were shorter than its key is."""
        depth, previous = self.depth(links), self.previous_depth(links)
        earlier = dict.fromkeys(range(depth - 1, 0, -1))
        return list(earlier if previous is None else {previous: None} | earlier)[:MAX_EARLIER]

    def _walk(self, links: Sequence[bytes], undone: bytes | None) -> int:
        """The depth, as if the last change of `undone` had not been made."""
        depth = min(self._config.min_blocks, len(links))
        last = min(self._config.max_blocks, len(links))
        while depth < last and (links[depth - 1] in self._extended) != (links[depth - 1] == undone):
            depth += 1
        return depth


class KeyDepths:
    """Invariant: `_counts` says of every link how many chains of the window carry it, and holds no zeros. Whatever is
    extended was carried within the window, so the window bounds the table too."""

    def __init__(self, config: KeyDepthConfig) -> None:
        self.table = DepthTable(config)
        self._config = config
        self._window: deque[tuple[bytes, ...]] = deque()
        self._counts: Counter[bytes] = Counter()

    def observe(self, links: Sequence[bytes], num_workers: int) -> tuple[DepthChange, ...]:
        """One more request came. The changes have been made to the table already."""
        changes: list[DepthChange] = []
        hot_share, cold_share = self._config.shares(num_workers)
        chain = tuple(links[: self._config.max_blocks])
        self._window.append(chain)
        self._counts.update(chain)
        left = self._window.popleft() if len(self._window) > self._config.window else ()
        self._forget(left)
        # The deepest first, so that no link is extended beyond one that ends the key.
        for link in dict.fromkeys((*reversed(left), *reversed(chain))):
            if self.table.is_extended(link) and self._share(link) < cold_share:
                changes.append(self._change(link, extends=False))
        depth = self.table.depth(chain)
        if self._config.min_blocks <= depth < len(chain) and self._share(chain[depth - 1]) > hot_share:
            changes.append(self._change(chain[depth - 1], extends=True))
        return tuple(changes)

    def _share(self, link: bytes) -> float:
        return self._counts[link] / self._config.window

    def _forget(self, chain: tuple[bytes, ...]) -> None:
        for link in chain:
            self._counts[link] -= 1
            if self._counts[link] == 0:
                del self._counts[link]

    def _change(self, link: bytes, extends: bool) -> DepthChange:
        change = DepthChange(self.table.version + 1, link, extends)
        self.table.apply(change)
        return change
