"""What an answer of /metrics says about the costs and the memory of workers. Reads files and URLs; fits nothing."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from protos.step_moments import TERMS, StepKind, StepMoments

SCRAPE_TIMEOUT_S = 30.0
MOMENTS = "twinring_step_moments_total"
BLOCKS = "twinring_worker_kv_blocks"
BLOCK_BYTES = "twinring_worker_kv_block_bytes"
BLOCK_TOKENS = "twinring_kv_block_tokens"

Samples = list[tuple[dict[str, str], float]]  # labels and value of each


@dataclass(frozen=True, slots=True)
class Scrape:
    moments: tuple[StepMoments, ...]  # of all workers together
    num_kv_tokens: int  # that the smallest worker holds
    kv_nbytes_per_token: int


def scrape_at(place: str, token: str | None, ca: str | None) -> Scrape:
    """place: a URL, or a file that holds what such a URL answered. ValueError or OSError names it."""
    text = _fetched(place, token, ca) if place.startswith(("http://", "https://")) else Path(place).read_text()
    try:
        return read_scrape(text)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _fetched(url: str, token: str | None, ca: str | None) -> str:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    context = ssl.create_default_context(cafile=ca) if url.startswith("https://") else None
    try:
        with urllib.request.urlopen(request, timeout=SCRAPE_TIMEOUT_S, context=context) as response:
            body: bytes = response.read()
    except urllib.error.HTTPError as error:
        with error:
            raise OSError(f"{url}: {error}") from None
    except OSError as error:
        raise OSError(f"{url}: {error}") from error
    return body.decode()


def read_scrape(text: str) -> Scrape:
    """ValueError where it is no answer of our /metrics, where no worker is up, or where none has run a step."""
    samples = _samples_of(text)
    if BLOCK_TOKENS not in samples:
        raise ValueError(f"no metrics of Twinring: {BLOCK_TOKENS} is missing")
    if MOMENTS not in samples:
        raise ValueError(f"nothing was measured: {MOMENTS} is missing, no worker has run a step")
    [(_, num_block_tokens)] = samples[BLOCK_TOKENS]
    num_blocks: dict[str, float] = defaultdict(float)
    for labels, value in samples[BLOCKS]:
        num_blocks[labels["worker"]] += value
    block_nbytes = max((value for _, value in samples[BLOCK_BYTES]), default=0.0)
    least = min(num_blocks.values(), default=0.0)
    if not (least and block_nbytes):
        raise ValueError(f"{BLOCKS} and {BLOCK_BYTES} tell of no memory: no worker is up")
    moments = _moments_of(samples[MOMENTS])
    return Scrape(moments, round(least * num_block_tokens), round(block_nbytes / num_block_tokens))


def _samples_of(text: str) -> defaultdict[str, Samples]:
    samples: defaultdict[str, Samples] = defaultdict(list)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name].append((sample.labels, sample.value))
    except ValueError as error:
        raise ValueError(f"not in Prometheus' text format: {error}") from error
    return samples


def _moments_of(samples: Samples) -> tuple[StepMoments, ...]:
    sums: dict[StepKind, dict[str, float]] = defaultdict(dict)
    for labels, value in samples:
        sums[StepKind(labels["kind"])][labels["term"]] = value
    for kind, by_term in sums.items():
        if by_term.keys() != set(TERMS):
            raise ValueError(f"{MOMENTS} of kind {kind} has the terms {', '.join(by_term)}, not {', '.join(TERMS)}")
    return tuple(StepMoments(kind, tuple(sums[kind][term] for term in TERMS)) for kind in sorted(sums))
