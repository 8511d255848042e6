"""The three workers of test_worker_core_stateful.py, each with a second tier of its prefix cache: copies between the
tiers end late, in any order, or fail, and everything that holds there holds here."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from engine.config import HostTierConfig
from engine.events import Copied, CopyLost
from protos.block_hash import chain_hashes, chain_root, fold_links
from tests.engine.fake_worker import KEY, FakeWorker, digest, generate
from tests.engine.test_worker_core_stateful import WORKERS, HandoffMachine


class TwoTierMachine(HandoffMachine):
    HOST = HostTierConfig(num_blocks=9, s_per_token=0.1, max_saving_blocks=3)

    @rule(worker=WORKERS, data=st.data(), is_lost=st.booleans())
    def end_copy(self, worker: int, data: st.DataObject, is_lost: bool) -> None:
        each = self.workers[worker]
        if each.copies:
            copy_id = data.draw(st.sampled_from(sorted(each.copies)))
            self.delivered.append((each, CopyLost(copy_id, "again") if is_lost else Copied(copy_id)))
            self.network.note(each, each.end_copy(copy_id, is_lost))

    @invariant()
    def what_is_found_is_what_its_hash_says(self) -> None:
        """In both memories, for every prompt."""
        for name, prompt in self.prompts.items():
            links = chain_hashes(generate(name, prompt).token_ids, 2, chain_root(KEY, "model"), KEY)
            for place, block_hash in enumerate(fold_links(links, 2)):
                expected = [digest(prompt[: 4 * place + i + 1]) for i in range(4)]
                for each in self.workers:
                    self.check(each, block_hash, expected)

    def check(self, each: FakeWorker, block_hash: bytes, expected: list[int]) -> None:
        for pool, kv in ((each.core._manager._pool, each.kv), (each.core._host._pool, each.host_kv)):
            assert pool is not None
            block_id = pool.find(block_hash)
            assert block_id is None or kv[block_id] == expected

    def teardown(self) -> None:
        super().teardown()
        for each in self.workers:
            ledger = each.core.ledger()
            assert not each.copies and ledger.host_leased == 0
            assert ledger.host_total == 9

    def move_anything(self) -> bool:
        for each in self.workers:
            if each.copies:
                self.network.note(each, each.end_copy(min(each.copies)))
                return True
        return super().move_anything()


TestTwoTierMachine = TwoTierMachine.TestCase
TestTwoTierMachine.settings = settings(max_examples=60, stateful_step_count=50)
