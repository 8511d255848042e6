"""Makes cluster/demo_model: a byte-level Llama small enough to live in the repository, so that a first run shows words.

Decides the corpus, the shape and the training of that model. Same seed, same files and same torch on the same kind of
CPU give the same weights. Knows nothing of serving: what it writes is an ordinary Hugging Face model folder.

    .venv/bin/python scripts/train_demo_model.py [--out FOLDER] [--steps N]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
LICENSES = Path("/usr/share/common-licenses")  # Debian's base-files package
TRAINING_TEXTS = (
    *("Apache-2.0", "Artistic", "BSD", "GFDL-1.2", "GFDL-1.3", "GPL-1", "GPL-2", "GPL-3"),
    *("LGPL-2", "LGPL-2.1", "LGPL-3", "MPL-1.1", "MPL-2.0"),
)
VALIDATION_TEXT = "CC0-1.0"  # shares no paragraph with the others, so its loss is not that of text seen before

EOS, PAD = 256, 257
VOCAB_SIZE = 272  # 256 bytes, two specials, and padding to a multiple of 16
MAX_MODEL_LEN = 4096
DOCUMENT_BYTES = 1200  # a document closes at the first paragraph that ends past this

SEED = 20
NUM_THREADS = 2
NUM_TOKENS_PER_STEP = 1024
SHORT_WINDOW, LONG_WINDOW = 256, 2048
LONG_EVERY = 16  # steps; the long windows teach positions past the short ones
PEAK_LEARNING_RATE = 5e-3
NUM_WARMUP_STEPS = 100

# One message after another, a blank line behind each: the texts know paragraphs and no speakers.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ '\\n\\n' }}{% endfor %}"


# --- corpus -------------------------------------------------------------------------------------------------------


def read_paragraphs(path: Path) -> list[str]:
    """Paragraphs of a text file, each on one line."""
    text = path.read_text(encoding="utf-8")
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.split()]


def read_documents(names: tuple[str, ...]) -> list[str]:
    """Documents of a few paragraphs. A paragraph that several licences share counts once."""
    seen: set[str] = set()
    documents: list[str] = []
    for name in names:
        document = ""
        for paragraph in read_paragraphs(LICENSES / name):
            if paragraph in seen:
                continue
            seen.add(paragraph)
            document += ("\n\n" if document else "") + paragraph
            if len(document) > DOCUMENT_BYTES:
                documents.append(document)
                document = ""
        if document:
            documents.append(document)
    return documents


def to_tokens(documents: list[str]) -> torch.Tensor:
    """All documents in one row, EOS behind each: [num_tokens]."""
    token_ids = [token_id for document in documents for token_id in (*document.encode(), EOS)]
    return torch.tensor(token_ids)


# --- model and tokenizer ------------------------------------------------------------------------------------------


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def byte_symbols() -> list[str]:
    """The symbol that the byte-level pre-tokenizer writes for each byte: printable bytes stand for themselves, the
    others are moved up past 255 (the GPT-2 convention)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte value. No merges, nothing put before or behind the text."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|eos|>", "<|pad|>"])
    assert tokenizer.token_to_id("<|eos|>") == EOS and tokenizer.token_to_id("<|pad|>") == PAD
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        model_max_length=MAX_MODEL_LEN,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


# --- training -----------------------------------------------------------------------------------------------------


def sample_windows(tokens: torch.Tensor, num_steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """One batch a step, [num_windows, window], each window from a random place."""
    for step in range(num_steps):
        window = LONG_WINDOW if step % LONG_EVERY == LONG_EVERY - 1 else SHORT_WINDOW
        num_windows = max(1, NUM_TOKENS_PER_STEP // window)
        starts = torch.randint(len(tokens) - window, (num_windows, 1), generator=generator)
        yield tokens[starts + torch.arange(window)]


def learning_rate_at(step: int, num_steps: int) -> float:
    """Linear warm-up, then straight down to zero."""
    warmed_up = (step + 1) / NUM_WARMUP_STEPS
    left = (num_steps - step) / max(1, num_steps - NUM_WARMUP_STEPS)
    return PEAK_LEARNING_RATE * min(warmed_up, left)


@torch.no_grad()
def loss_over(model: LlamaForCausalLM, tokens: torch.Tensor, window: int) -> float:
    """Mean loss in nats per byte over consecutive windows."""
    rows = tokens[: len(tokens) // window * window].view(-1, window)
    return float(model(input_ids=rows, labels=rows, use_cache=False).loss)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, validation: torch.Tensor, num_steps: int) -> None:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    started_at = time.perf_counter()
    for step, batch in enumerate(sample_windows(tokens, num_steps, torch.Generator().manual_seed(SEED))):
        model.zero_grad()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, num_steps)
        optimizer.step()
        if (step + 1) % 200 == 0 or step + 1 == num_steps:
            short, long = loss_over(model, validation, SHORT_WINDOW), loss_over(model, validation, LONG_WINDOW)
            elapsed_s = time.perf_counter() - started_at
            print(
                f"step {step + 1}/{num_steps}  {elapsed_s:.0f} s  training loss {loss.item():.3f}  validation loss "
                f"{short:.3f} at {SHORT_WINDOW}, {long:.3f} at {LONG_WINDOW} nats per byte",
                flush=True,
            )


def print_sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    input_ids = torch.tensor([tokenizer.encode(prompt)])
    output = model.generate(input_ids, do_sample=True, temperature=0.7, max_new_tokens=400)
    print(f"--- sample at temperature 0.7\n{tokenizer.decode(output[0].tolist())}")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written for its owner alone
    # The template stays inside tokenizer_config.json: one file fewer, and every version of transformers reads it there.
    (out / "chat_template.jinja").unlink(missing_ok=True)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": CHAT_TEMPLATE}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "cluster" / "demo_model")
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(True)
    tokens, validation = to_tokens(read_documents(TRAINING_TEXTS)), to_tokens(read_documents((VALIDATION_TEXT,)))
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
    model, tokenizer = build_model(), build_tokenizer()
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters:,} parameters; {len(validation):,} validation tokens")
    print(f"{len(tokens):,} training tokens, sha256 {digest}")
    train(model, tokens, validation, arguments.steps)
    save(model.eval(), tokenizer, arguments.out)
    for prompt in ("The licence ", "You may copy and distribute"):
        print_sample(model, tokenizer, prompt)


if __name__ == "__main__":
    main()
