"""What operators order through this router: to drain somebody, or to change the size of pools. Whether and how an order
is carried out, whoever keeps the workers says (cluster/); this keeps the callers waiting for that word."""

from __future__ import annotations

import asyncio
from itertools import count

from router.published_view import Order, PlacedOrder


class Orders:
    """Invariant: every order is told of once, and its caller waits until it is answered."""

    def __init__(self) -> None:
        self.has_news = asyncio.Event()  # set as soon as there is something to tell; others may set it, too
        self._untold: list[PlacedOrder] = []
        self._open: dict[int, asyncio.Future[str]] = {}
        self._ids = count()

    async def place(self, order: Order) -> str:
        """Why it is refused; empty: it is being carried out."""
        order_id = next(self._ids)
        self._open[order_id] = asyncio.get_running_loop().create_future()
        self._untold.append(PlacedOrder(order_id, order))
        self.has_news.set()
        try:
            return await self._open[order_id]
        finally:
            del self._open[order_id]

    def take(self) -> tuple[PlacedOrder, ...]:
        untold, self._untold = tuple(self._untold), []
        return untold

    def answer(self, order_id: int, refusal: str) -> None:
        """Nothing happens where nobody waits any more."""
        waiting = self._open.get(order_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(refusal)
