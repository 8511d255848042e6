from __future__ import annotations

from router.policy import Candidate, MostFreeBlocks


def test_decode_goes_where_the_room_is_then_where_fewer_requests_are() -> None:
    roomy = Candidate("d-1", num_blocks=100, num_free_blocks=60, num_requests=9)
    full = Candidate("d-0", num_blocks=100, num_free_blocks=10, num_requests=1)
    choice = MostFreeBlocks().choose(5, [full, roomy])
    assert choice.worker_id == "d-1"
    assert choice.reason == "most room: 60 of 100 blocks free, 9 requests there"
    tied = Candidate("d-2", num_blocks=100, num_free_blocks=60, num_requests=2)
    assert MostFreeBlocks().choose(5, [full, roomy, tied]).worker_id == "d-2"
