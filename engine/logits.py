"""What a request's own parameters and tokens do to its logits before a token is drawn, and what its logits say of the
token that was: penalties, bias, the ban on an early end, log probabilities. Keeps no state: all of it is computed from
the tokens that come with the step, so it is the same after a handoff, a preemption or a failover."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from engine.scheduler_output import ScheduledRequest
from protos.types import Logprobs


def adjust_logits(logits: torch.Tensor, requests: Sequence[ScheduledRequest]) -> torch.Tensor:
    """logits: [num_rows, vocab_size], one row per request. The same tensor where nobody asks for a change, else a
    changed float32 copy."""
    params = [request.sampling_params for request in requests]
    repeats = [row for row, p in enumerate(params) if p.repetition_penalty != 1.0]
    counted = [row for row, p in enumerate(params) if p.presence_penalty or p.frequency_penalty]
    biased = [row for row, p in enumerate(params) if p.logit_bias]
    unfinished = [row for row, r in enumerate(requests) if num_output_tokens(r) < r.sampling_params.min_tokens]
    if not (repeats or counted or biased or unfinished):
        return logits
    logits = logits.to(torch.float32, copy=True)
    if repeats:
        _penalise_repetition(logits, repeats, requests)
    if counted:
        _penalise_counts(logits, counted, requests)
    if biased:
        _add_bias(logits, biased, requests)
    if unfinished:
        rows, columns = _entries(logits, unfinished, (params[row].stop_token_ids for row in unfinished))
        logits[rows, columns] = -torch.inf
    return logits


def num_output_tokens(request: ScheduledRequest) -> int:
    return len(request.token_ids) - request.num_prompt_tokens


def logprobs_of(
    logits: torch.Tensor, requests: Sequence[ScheduledRequest], token_ids: Sequence[int]
) -> dict[str, tuple[Logprobs, ...]]:
    """Of the drawn token and the likeliest ones, by request id, for the requests that ask; logits: as the model gave
    them, [num_rows, vocab_size]."""
    asking = [row for row, r in enumerate(requests) if r.sampling_params.num_logprobs is not None]
    if not asking:
        return {}
    all_logprobs = logits[asking].float().log_softmax(-1)
    drawn = torch.tensor([[token_ids[row]] for row in asking], device=logits.device)
    drawn_logprobs = all_logprobs.gather(-1, drawn).squeeze(-1).tolist()
    widths = [min(requests[row].sampling_params.num_logprobs or 0, logits.shape[-1]) for row in asking]
    top = all_logprobs.topk(max(widths), dim=-1)
    found = zip(asking, widths, drawn_logprobs, top.indices.tolist(), top.values.tolist(), strict=True)
    return {
        requests[row].request_id: (Logprobs(logprob, tuple(ids[:width]), tuple(values[:width])),)
        for row, width, logprob, ids, values in found
    }


def _penalise_repetition(logits: torch.Tensor, rows: list[int], requests: Sequence[ScheduledRequest]) -> None:
    """Of tokens in prompt or output: a positive logit is divided, a negative one multiplied (Keskar et al.: CTRL, 2019,
    section 4.1, in the form that is common since)."""
    at_row, at_column = _entries(logits, rows, (requests[row].token_ids for row in rows))
    penalties = torch.ones(len(requests), device=logits.device)
    penalties[rows] = torch.tensor([requests[row].sampling_params.repetition_penalty for row in rows]).to(penalties)
    penalty = penalties[at_row]
    found = logits[at_row, at_column]
    # A token that occurs twice is written twice, with the same value: both were read before.
    logits[at_row, at_column] = torch.where(found > 0, found / penalty, found * penalty)


def _penalise_counts(logits: torch.Tensor, rows: list[int], requests: Sequence[ScheduledRequest]) -> None:
    """Frequency: for every occurrence in the output; presence: once for a token that occurs there."""
    params = [requests[row].sampling_params for row in rows]
    outputs = (requests[row].token_ids[requests[row].num_prompt_tokens :] for row in rows)
    at_row, at_column = _entries(logits, range(len(rows)), outputs)
    counts = torch.zeros(len(rows), logits.shape[-1], device=logits.device)
    counts.index_put_((at_row, at_column), torch.ones((), device=logits.device), accumulate=True)
    frequency = torch.tensor([[p.frequency_penalty] for p in params], device=logits.device)
    presence = torch.tensor([[p.presence_penalty] for p in params], device=logits.device)
    logits[rows] -= frequency * counts + presence * (counts > 0)


def _add_bias(logits: torch.Tensor, rows: list[int], requests: Sequence[ScheduledRequest]) -> None:
    biases = [requests[row].sampling_params.logit_bias for row in rows]
    at_row, at_column = _entries(logits, rows, ([token_id for token_id, _ in bias] for bias in biases))
    logits[at_row, at_column] += torch.tensor([value for bias in biases for _, value in bias], device=logits.device)


def _entries(
    logits: torch.Tensor, rows: Iterable[int], columns: Iterable[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every entry, for indexing `logits`: columns[i] belong to rows[i]."""
    # np.array copies: a view would lock the request's own array, and the scheduler appends to it.
    each = [np.array(ids, dtype=np.int64) for ids in columns]
    at_row = np.repeat(np.array(list(rows), dtype=np.int64), [len(ids) for ids in each])
    return torch.from_numpy(at_row).to(logits.device), torch.from_numpy(np.concatenate(each)).to(logits.device)
