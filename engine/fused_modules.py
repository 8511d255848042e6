"""Faster layers for a loaded model: fewer and larger products, norms and rotations in fewer passes.

They compute what transformers' own layers compute. Families whose layers are not listed here keep theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from engine.attention import KVMeta, paged_attention
from engine.device_steps import PagedStep


def fuse(model: PreTrainedModel, kernels: bool = False) -> None:
    """Replace the layers that have a faster form, in place. kernels: more of each layer at once, with triton_layers.py
    where steps are such as device_runner.py makes."""
    faster = _FUSED | _FUSED_WHOLE if kernels else _FUSED
    for module in reversed(list(model.modules())):  # inner ones first: the outer ones take them over
        for name, child in list(module.named_children()):
            if make := faster.get(type(child)):
                setattr(module, name, made := make(child))
                if isinstance(made, FusedAttention | FusedMLP):
                    made.kernels = kernels


class FusedRMSNorm(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self._eps: float = norm.variance_epsilon

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(rows, self.weight.shape, self.weight, self._eps)


class FusedMLP(nn.Module):
    """Gate and up in one product."""

    kernels = False

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up_proj = merged_linear(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj
        self._activation: Callable[[torch.Tensor], torch.Tensor] = mlp.act_fn
        self._is_silu: bool = mlp.config.hidden_act == "silu"

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down_proj(self.gated(rows))
        return down

    def gated(self, rows: torch.Tensor) -> torch.Tensor:
        """What down_proj multiplies. [..., intermediate_size]"""
        gate_up = self.gate_up_proj(rows)
        if self.kernels and self._is_silu:
            from engine import triton_layers

            return triton_layers.gated_silu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self._activation(gate).mul_(up)


class FusedAttention(nn.Module):
    """Queries, keys and values in one product, queries and keys rotated together."""

    kernels = False

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv_proj = merged_linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = attention.o_proj
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.layer_idx: int = attention.layer_idx
        self._head_dim: int = attention.head_dim
        self._num_heads: int = attention.q_proj.out_features // attention.head_dim
        self._num_kv_heads: int = attention.k_proj.out_features // attention.head_dim
        self._scaling: float = attention.scaling
        # Mistral's layers read it from the config, Qwen's know their own; to Llama the config's would mean nothing.
        owner = attention.config if isinstance(attention, mistral.MistralAttention) else attention
        self._sliding_window: int | None = getattr(owner, "sliding_window", None)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, num_rows, hidden_size]; position_embeddings: cosines, sines, [1, num_rows, head_dim]."""
        return self.o_proj(self.attended(hidden_states, position_embeddings, **kwargs)), None

    def attended(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        """What o_proj multiplies. [1, num_rows, num_heads * head_dim]"""
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self._head_dim))  # [1, num_rows, all heads, head_dim]
        num_rotated = self._num_heads + self._num_kv_heads
        if self.kernels and isinstance(kwargs["kv_meta"].step, PagedStep):
            return self._by_kernels(heads, position_embeddings, kwargs["kv_meta"]).flatten(1)[None]
        rotated = rotate(self._normed(heads[:, :, :num_rotated]), *position_embeddings)
        attended, _ = paged_attention(
            self,
            rotated[:, :, : self._num_heads].transpose(1, 2),
            rotated[:, :, self._num_heads :].transpose(1, 2),
            heads[:, :, num_rotated:].transpose(1, 2),
            kwargs.pop("attention_mask"),
            scaling=self._scaling,
            sliding_window=self._sliding_window,
            **kwargs,
        )
        return attended.flatten(2)

    def _by_kernels(
        self, heads: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], kv_meta: KVMeta
    ) -> torch.Tensor:
        """[num_rows, num_heads, head_dim]"""
        from engine import triton_attention, triton_layers

        step, kv_cache = kv_meta.step, kv_meta.kv_cache
        assert isinstance(step, PagedStep)
        num_rotated = self._num_heads + self._num_kv_heads
        rotated, values = self._normed(heads[:, :, :num_rotated])[0], heads[0, :, num_rotated:]
        cosines, sines = (each[0] for each in position_embeddings)
        queries = triton_layers.rotate_and_write(
            rotated, values, cosines, sines, kv_cache, self.layer_idx, step.slot_mapping
        )
        return triton_attention.attend(
            queries, self.layer_idx, step, kv_cache, self._scaling, self._sliding_window, None
        )

    def _normed(self, heads: torch.Tensor) -> torch.Tensor:
        """Qwen 3 norms queries and keys, each with weights of its own."""
        if self.q_norm is None or self.k_norm is None:
            return heads
        queries, keys = heads[:, :, : self._num_heads], heads[:, :, self._num_heads :]
        return torch.cat((self.q_norm(queries), self.k_norm(keys)), dim=2)


class FusedDecoderLayer(nn.Module):
    """The product that ends attention, and the one that ends the MLP, add to the hidden states in place: two passes
    over them less."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.self_attn: FusedAttention = layer.self_attn
        self.mlp: FusedMLP = layer.mlp

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """hidden_states: [1, num_rows, hidden_size], of nobody else; they are what is returned."""
        attended = self.self_attn.attended(self.input_layernorm(hidden_states), **kwargs)
        add_product(hidden_states[0], attended[0], self.self_attn.o_proj)
        gated = self.mlp.gated(self.post_attention_layernorm(hidden_states))
        add_product(hidden_states[0], gated[0], self.mlp.down_proj)
        return hidden_states


def add_product(rows: torch.Tensor, inputs: torch.Tensor, linear: nn.Linear) -> None:
    """rows, [num_rows, out_features], += linear(inputs); inputs: [num_rows, in_features]."""
    rows.addmm_(inputs, linear.weight.t())
    if linear.bias is not None:
        rows.add_(linear.bias)


def rotate(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021), by halves: dimension i turns with i + head_dim / 2.

    heads: [1, num_rows, num_heads, head_dim]; cosines, sines: [1, num_rows, head_dim], the two halves alike."""
    half = heads.shape[-1] // 2
    cos, sin = cosines[..., None, :half], sines[..., None, :half]
    first, second = heads[..., :half], heads[..., half:]
    out = torch.empty_like(heads, memory_format=torch.contiguous_format)
    torch.sub(first * cos, second * sin, out=out[..., :half])
    torch.add(second * cos, first * sin, out=out[..., half:])
    return out


def merged_linear(*linears: nn.Linear) -> nn.Linear:
    """One product that gives the outputs of all of them, side by side."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=linears[0].bias is not None, device="meta")
    merged.weight = nn.Parameter(weight, requires_grad=False)
    if linears[0].bias is not None:
        merged.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]), requires_grad=False)
    return merged


_FAMILIES = ((llama, "Llama"), (mistral, "Mistral"), (qwen2, "Qwen2"), (qwen3, "Qwen3"))
_Make = Callable[[nn.Module], nn.Module]


def _of_each(part: str, make: _Make) -> dict[type[nn.Module], _Make]:
    return {getattr(family, f"{name}{part}"): make for family, name in _FAMILIES}


_FUSED = _of_each("RMSNorm", FusedRMSNorm) | _of_each("MLP", FusedMLP) | _of_each("Attention", FusedAttention)
_FUSED_WHOLE = _of_each("DecoderLayer", FusedDecoderLayer)
