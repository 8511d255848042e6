"""Linear layers whose weights oneDNN has laid out for its own kernels. These give a row the same bits whatever the
number of rows, where MKL has other kernels for one to three of them; and nothing is packed anew in every call."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


def pack_linears(model: PreTrainedModel) -> None:
    """Replace the float32 layers of a model on the CPU, in place; one at a time, so that only one is there twice."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.dtype is torch.float32:
                setattr(module, name, PackedLinear(child))
                child.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # free, unless it is tied


class PackedLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._out_features = linear.out_features

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if not rows.numel():
            return rows.new_empty(*rows.shape[:-1], self._out_features)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return out
