"""What transformers does with the same shape on the same card: `generate` over a padded batch, and its own continuous
batching. Random weights, random prompts of one length."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from bench._gpu_card import Card
from bench._gpu_models import Shape, plain_model

PEER_BLOCK_SIZE = 32  # no larger than its own: more blocks than it needs do no harm
MAX_BATCH_TOKENS = 2048
MAX_SILENCE_S = 150.0
NUM_NEW = 33  # the first of them is the prompt's; the rest are decode steps


def random_prompts(shape: Shape, batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, shape.vocab_size, (batch, length), generator=torch.Generator().manual_seed(batch))


def generate_rate(card: Card, model: PreTrainedModel, shape: Shape, batch: int, length: int, runs: int) -> float:
    """Tokens per second of the decode steps alone: a run of NUM_NEW tokens less a run of one."""
    peer: Any = model
    prompts = random_prompts(shape, batch, length).to(card.device)
    mask = torch.ones_like(prompts)

    def run(num_new: int) -> None:
        with torch.inference_mode():
            peer.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=num_new, pad_token_id=0)

    step_s = (card.median_s(lambda: run(NUM_NEW), runs, 1) - card.median_s(lambda: run(1), runs, 1)) / (NUM_NEW - 1)
    return batch / step_s


def continuous_rates(card: Card, shape: Shape, dtype: str, batches: Sequence[int], length: int) -> Iterator[float]:
    """Likewise, in a process of its own: its manager may hang, and a process can be killed. RuntimeError where it does,
    or where this version of transformers has no generate_batch of this form."""
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(
        target=_continuous, args=(theirs, str(card.device), shape, dtype, batches, length), daemon=True
    )
    process.start()
    theirs.close()
    try:
        for batch in batches:
            if not pipe.poll(MAX_SILENCE_S):
                raise RuntimeError(f"generate_batch of {batch} prompts did not end within {MAX_SILENCE_S:.0f} s")
            yield pipe.recv()
    except EOFError:
        raise RuntimeError("the process that runs generate_batch ended; its own words are above") from None
    finally:
        process.kill()
        process.join()


def _continuous(pipe: Connection, device: str, shape: Shape, dtype: str, batches: Sequence[int], length: int) -> None:
    from transformers import ContinuousBatchingConfig  # not in every version

    card = Card(torch.device(device))
    model: Any = plain_model(shape, dtype, card.device, "sdpa")
    make: Any = GenerationConfig  # untyped
    for batch in batches:
        prompts: list[list[int]] = random_prompts(shape, batch, length).tolist()
        num_blocks = batch * (length + 2 * NUM_NEW) // PEER_BLOCK_SIZE + 64

        def run(num_new: int, prompts: list[list[int]] = prompts, num_blocks: int = num_blocks) -> None:
            settings = make(max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0)
            sizes = ContinuousBatchingConfig(num_blocks=num_blocks, max_batch_tokens=MAX_BATCH_TOKENS)
            model.generate_batch(prompts, generation_config=settings, continuous_batching_config=sizes)

        step_s = (card.median_s(lambda: run(NUM_NEW), 1, 1) - card.median_s(lambda: run(1), 1, 1)) / (NUM_NEW - 1)
        pipe.send(batch / step_s)
