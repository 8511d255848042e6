"""The bundled model: a folder that transformers loads as it is, whose text reads as words, near and far."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "cluster" / "demo_model"
LICENSE_TEXT = " ".join((ROOT / "LICENSE").read_text().split())  # in the words of the training text
MAX_NBYTES = 6_000_000  # the repository carries it


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@given(text=st.text())
@example(text=" two  spaces, \t\n and a blank line\n\n")
def test_tokens_are_bytes(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    token_ids = tokenizer.encode(text)
    assert token_ids == list(text.encode())
    assert tokenizer.decode(token_ids) == text


@given(data=st.binary())
def test_any_bytes_decode(tokenizer: PreTrainedTokenizerBase, data: bytes) -> None:
    assert tokenizer.decode(list(data)) == data.decode(errors="replace")


def test_a_chat_goes_on_where_its_last_turn_ended(tokenizer: PreTrainedTokenizerBase) -> None:
    """Each turn's prompt begins with the turn before and its answer: otherwise no prefix would ever be found again."""
    chat = [{"role": "user", "content": "What may I copy?"}]
    first = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    chat += [{"role": "assistant", "content": "All of it."}, {"role": "user", "content": "And sell?"}]
    second = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert second.startswith(first + "All of it.")


def test_shape(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert model.dtype == torch.float32
    assert 0 < model.config.num_key_value_heads < model.config.num_attention_heads
    assert tokenizer.bos_token_id is None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id < model.config.vocab_size
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MAX_NBYTES


@torch.no_grad()
def test_writes_words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    prompt = torch.tensor([tokenizer.encode("You may copy and distribute ")])
    output = model.generate(prompt, do_sample=True, temperature=0.7, max_new_tokens=200, min_new_tokens=200)
    words = re.findall("[a-z]+", tokenizer.decode(output[0, prompt.shape[1] :].tolist()).lower())[:-1]
    known = set(re.findall("[a-z]+", LICENSE_TEXT.lower()))
    assert len(words) > 20
    assert sum(word in known for word in words) > 0.6 * len(words), words


@torch.no_grad()
def test_far_positions_read_as_well_as_near_ones(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    token_ids = torch.tensor([tokenizer.encode(LICENSE_TEXT)[:2048]])
    logits = model(token_ids, use_cache=False).logits[0, :-1]  # [2047, vocab_size]
    losses = torch.nn.functional.cross_entropy(logits, token_ids[0, 1:], reduction="none")
    near, far = float(losses[64:512].mean()), float(losses[1536:].mean())  # nats per byte; uniform bytes are 5.5
    assert near < 2.0
    assert far < 2.0


@torch.no_grad()
def test_can_stop(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The end is far more likely behind a paragraph's end than inside a word."""
    ends = []
    for text in (LICENSE_TEXT[2000:3000].rsplit(". ", 1)[0] + ".", LICENSE_TEXT[2000:3000].rsplit(" ", 1)[0][:-2]):
        logits = model(torch.tensor([tokenizer.encode(text)]), use_cache=False).logits[0, -1]
        ends.append(float(logits.softmax(-1)[tokenizer.eos_token_id]))
    assert ends[0] > 10 * ends[1], ends
