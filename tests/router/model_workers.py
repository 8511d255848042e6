"""Workers as a Router may expect them, small enough to run thousands of times. They keep the protocol of handoffs and
compute nothing: output token i of a request is a function of its prompt and i."""

from __future__ import annotations

from dataclasses import dataclass, field

from protos.types import FinishReason, GenerateRequest, HandoffRefused, PeerRef, TokenOutput, WorkerAccount
from router.events import Send


def token_at(request: GenerateRequest, index: int) -> int:
    return (sum(request.token_ids[: request.num_prompt_tokens]) * 31 + index * 7) % 1000


def expected_output(request: GenerateRequest) -> list[int]:
    """Some end by a stop token before max_tokens."""
    length = min(request.sampling_params.max_tokens, 1 + sum(request.token_ids[: request.num_prompt_tokens]) % 12)
    return [token_at(request, index) for index in range(length)]


@dataclass
class Job:
    request: GenerateRequest
    next_index: int
    awaits_kv: bool  # at the destination, until the source has committed
    awaits_retarget: bool = False  # at the source, after a refusal
    has_handed_off: bool = False


@dataclass
class ModelWorker:
    ref: PeerRef
    jobs: dict[str, Job] = field(default_factory=dict)

    def take(self, send: Send) -> None:
        """Submits before retargets before aborts, as the contract says."""
        for request in send.submits:
            known = self.jobs.get(request.request_id)
            assert known is None or known.request.attempt < request.attempt, "an attempt is submitted once"
            self.jobs[request.request_id] = Job(
                request, request.num_committed_tokens, awaits_kv=request.handoff_from is not None
            )
        for retarget in send.retargets:
            job = self.jobs.get(retarget.request_id)
            if job is not None and job.request.attempt == retarget.attempt:
                assert job.awaits_retarget, "only after a refusal"
                job.awaits_retarget = False
                job.has_handed_off = False
                object.__setattr__(job.request, "handoff_to", retarget.handoff_to)
        for abort in send.aborts:
            job = self.jobs.get(abort.request_id)
            if job is not None and job.request.attempt == abort.attempt:
                del self.jobs[abort.request_id]

    def receive_kv(self, request_id: str, attempt: int, arrived: bool) -> bool:
        """The source has committed (or has gone: then this worker computes the prompt itself)."""
        job = self.jobs.get(request_id)
        if job is None or job.request.attempt != attempt or not job.awaits_kv:
            return False
        job.awaits_kv = False
        job.next_index = job.request.num_committed_tokens + arrived
        return True

    def refuse(self, request_id: str) -> HandoffRefused | None:
        """The destination took nothing; this source says so and waits."""
        job = self.jobs.get(request_id)
        if job is None or job.request.handoff_to is None or job.awaits_retarget or job.has_handed_off:
            return None
        job.awaits_retarget = True
        return HandoffRefused(request_id, job.request.attempt, "no room")

    def generate(self, request_id: str, num_tokens: int) -> TokenOutput | None:
        """The next tokens of one job; at a source that hands off, its single one."""
        job = self.jobs.get(request_id)
        if job is None or job.awaits_kv or job.has_handed_off:
            return None
        hands_off = job.request.handoff_to is not None or job.awaits_retarget
        first = job.request.num_committed_tokens
        if hands_off and job.next_index > first:
            return None
        whole = expected_output(job.request)
        tokens = tuple(whole[job.next_index : job.next_index + (1 if hands_off else num_tokens)])
        index = job.next_index
        job.next_index += len(tokens)
        finish = None
        if job.next_index == len(whole):
            is_full = len(whole) == job.request.sampling_params.max_tokens
            finish = FinishReason.LENGTH if is_full else FinishReason.STOP
            del self.jobs[request_id]
        return TokenOutput(request_id, job.request.attempt, index, tokens, finish, WorkerAccount())
