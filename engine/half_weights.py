"""Half-precision weights on a CPU that cannot multiply them: kept as they are, widened to float32 where that is faster.

Such a CPU multiplies a row or two as fast as it reads the weights, and more rows several times slower than in float32.
Activations are float32 throughout. Which model it is, and what its layers mean, is not known here."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

MAX_NARROW_ROWS = 2  # as many rows are multiplied without widening
MAX_WIDE_NUMEL = 2 << 20  # weights widened at a time: 8 MiB, which stay in the cache until they are used


def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of that dtype."""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def keep_half_weights(model: PreTrainedModel) -> None:
    """Replace the layers of a half-precision model on the CPU, in place. It then takes and gives float32."""
    wide = torch.empty(MAX_WIDE_NUMEL)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, HalfLinear(child, wide))
            elif isinstance(child, nn.Embedding):
                setattr(module, name, HalfEmbedding(child))
    for weight in model.parameters():
        if weight.dim() == 1:  # norms and biases: small, and used in float32
            weight.data = weight.data.float()


class HalfLinear(nn.Module):
    """float32 rows times half-precision weights."""

    def __init__(self, linear: nn.Linear, wide: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._pieces = [
            (piece, wide[: piece.numel()].view(piece.shape))
            for piece in torch.split(self.weight.detach(), max(1, wide.numel() // linear.in_features))
        ]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.shape[:-1].numel() <= MAX_NARROW_ROWS:
            out = functional.linear(rows.to(self.weight.dtype), self.weight).float()
        else:
            # The pieces share one buffer: each is used before the next is widened.
            parts = [functional.linear(rows, buffer.copy_(piece)) for piece, buffer in self._pieces]
            out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return out if self.bias is None else out.add_(self.bias)


class HalfEmbedding(nn.Module):
    """float32 rows of a half-precision table."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table
        self.weight = table.weight  # transformers looks for it here

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.table(token_ids)
        return rows.float()
