"""The peer of bench/peer.py, run by vLLM's own interpreter: prompts in by line, seconds out by line, JSON both.

Imports nothing of ours: that interpreter has no Twinring."""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    model, num_new_tokens, max_num_batched_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    replies, sys.stdout = sys.stdout, sys.stderr  # vLLM prints: only replies go to our stdout
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    engine = LLM(
        model=model,
        dtype="bfloat16",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_seqs=32,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    params = SamplingParams(temperature=0.0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False)
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        prompts = [{"prompt_token_ids": token_ids} for token_ids in json.loads(line)]
        started_at = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started_at
        assert all(len(each.outputs[0].token_ids) == num_new_tokens for each in outputs)
        print(json.dumps(seconds), file=replies, flush=True)


if __name__ == "__main__":
    main()
