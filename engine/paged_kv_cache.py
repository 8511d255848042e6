"""The KV tensors of one worker: one pool of blocks, read and written by slot, copied out and in by block.

Which block belongs to whom is not known here: ids come from the scheduler and from transfers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from protos.types import KVLayout


def num_blocks_for(memory_bytes: int, layout: KVLayout, setting: str = "kv_cache_bytes") -> int:
    """How many KV blocks fit into memory_bytes; ValueError, which names the setting, where not one does."""
    num_blocks = memory_bytes // layout.block_nbytes
    if num_blocks < 1:
        raise ValueError(f"{setting} of {memory_bytes} bytes holds no block: one takes {layout.block_nbytes} bytes")
    return num_blocks


def torch_dtype(name: str) -> torch.dtype:
    """ "float32" -> torch.float32; ValueError for what no KV cache is kept in."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"unsupported dtype {name!r}: choose one of {', '.join(dtypes)}")
    return dtypes[name]


class PagedKVCache:
    """Block-major pool, so that a block is one contiguous run and moves as one.

    Token `offset` of a block has its layer-0 key in slot `slot_stride * block_id + offset`. The key and value views of
    every other layer begin that much later in the same memory, so one slot number serves all layers.

    Invariant: every view shares the memory of `tensor`; nothing here allocates after construction."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: str | torch.device = "cpu") -> None:
        dtype = torch_dtype(layout.dtype)
        assert layout.itemsize == dtype.itemsize, (layout.itemsize, layout.dtype)
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_numel = layout.block_nbytes // dtype.itemsize
        self.slot_stride = 2 * layout.num_layers * layout.block_size
        shape = (num_blocks, layout.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        slots = self.tensor.view(-1, layout.num_kv_heads, layout.head_dim)
        runs = [slots[run * layout.block_size :] for run in range(2 * layout.num_layers)]
        self._keys, self._values = runs[0::2], runs[1::2]  # per layer: [num_slots from there, num_kv_heads, head_dim]
        self._key_rows = [keys.view(-1, layout.head_dim) for keys in self._keys]
        self._value_rows = [values.view(-1, layout.head_dim) for values in self._values]
        self.blocks = self.tensor.view(num_blocks, -1).view(torch.int64)  # [num_blocks, block_nbytes / 8]

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Store one layer's keys and values, [num_tokens, num_kv_heads, head_dim] each, at their slots."""
        self._keys[layer].index_copy_(0, slot_mapping, keys)
        self._values[layer].index_copy_(0, slot_mapping, values)

    def read(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of one layer's keys and values, [num_rows, head_dim] each. Row = slot * num_kv_heads + head, so the
        caller may order by head first: attention then reads contiguous memory."""
        return self._key_rows[layer].index_select(0, rows), self._value_rows[layer].index_select(0, rows)

    def gather(self, block_ids: Sequence[int], out: torch.Tensor) -> None:
        """Copy whole blocks to out, contiguous, [len(block_ids), block_numel] of the cache's dtype (or the same bytes
        under another), on this device or in host memory. Over when it returns. Safe in any thread, as long as nobody
        computes on these blocks; on a GPU it is done on the thread's own stream."""
        select_rows(self.blocks, self._index(block_ids), out.view(torch.int64))

    def scatter(self, block_ids: Sequence[int], staged: torch.Tensor) -> None:
        """The inverse of gather, under the same terms: staged replaces the contents of the blocks."""
        self.blocks.index_copy_(0, self._index(block_ids), staged.view(torch.int64).to(self.blocks.device))
        if self.blocks.is_cuda:
            torch.cuda.current_stream(self.blocks.device).synchronize()

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.int64, device=self.tensor.device)


def select_rows(source: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """Copy rows of source to out, wherever the two are. Over when it returns."""
    if source.device == out.device:
        torch.index_select(source, 0, index, out=out)
    else:
        out.copy_(source.index_select(0, index))
    for each in (source, out):
        if each.is_cuda:
            torch.cuda.current_stream(each.device).synchronize()
