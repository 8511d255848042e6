"""The kernels compile for the GPUs that they are meant for, with what they are launched with: types, shared memory,
registers and instructions; and what one step has compiled, others use. In a process of its own, where Triton does not
interpret; it needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SHARED_NBYTES = {80: 163 << 10, 90: 227 << 10}  # that one program may have
MAX_SPILLED_NBYTES = {80: 256, 90: 0}  # of registers, in what serves; prefill on the older one spills 140

PROGRAM = """
import re, subprocess, sys, tempfile
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from bench import _gpu_kernels
from bench._gpu_card import Card
from bench._gpu_kernels import KernelCase
from engine import triton_attention, triton_layers

capability = int(sys.argv[1])

class NoCard:  # kernels are chosen and compiled for it, and not launched
    def get_current_target(self): return GPUTarget("cuda", capability, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(NoCard())
run_it = JITFunction.run

def spilled_nbytes(ptx):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = "sm_90a" if capability == 90 else "sm_80"
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=" + target, file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(n) for n in re.findall("([0-9]+) bytes spill", told))

def run(kernel, *args, **kwargs):
    made = run_it(kernel, *args, **kwargs | {"warmup": True})
    if made not in seen:
        seen.append(made)
        ptx = made.asm["ptx"]
        wide = len(re.findall("cp.async.cg.shared.global .*, 0x10", ptx))
        wgmma = ptx.count("wgmma.mma_async")
        print(kernel.__name__, made.metadata.shared, wgmma, wide, spilled_nbytes(ptx), flush=True)

JITFunction.run = run
seen = []
FIRST = ((20, 1), (3, 200))
cases = [KernelCase(FIRST, head_dim=128), KernelCase(FIRST, head_dim=256, softcap=30.0)]
cases += [KernelCase(FIRST, "float32", head_dim=256 if capability == 90 else 128)]
LATER = (((9, 1),), ((9000, 1), (5, 1), (700, 1), (40, 33)), ((1, 1), (63, 1), (1100, 129), (0, 2)))

def launch(case):
    pool = _gpu_kernels._Pool(case, Card(torch.device("cpu")))
    rows = torch.zeros(pool.num_rows, case.num_heads, case.head_dim, dtype=_gpu_kernels.DTYPES[case.dtype])
    new = pool.new_rows()
    triton_layers.gated_silu(rows.flatten(1))
    angles = torch.zeros(pool.num_rows, case.head_dim, dtype=rows.dtype)
    triton_layers.rotate_and_write(rows, new[1], angles, angles, pool.cache, 1, pool.step.slot_mapping)
    triton_attention.write_and_attend(rows, *new, 1, pool.step, pool.cache, 0.1, case.window, case.softcap)

for case in cases:
    launch(case)
print("later")
for requests in LATER:
    launch(KernelCase(requests, head_dim=128))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_NBYTES)
def test_every_launch_compiles(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(capability)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, later = done.stdout.split("later\n")
    assert not later, "other steps of the same model had to wait for these"
    compiled = [(name, *map(int, numbers)) for name, *numbers in map(str.split, first.splitlines())]
    names = ("_write_rows", "_decode_split", "_join_splits", "_prefill_tile", "_rotate_and_write", "_gated_silu")
    assert {name for name, *_ in compiled} == set(names)
    assert all(shared <= SHARED_NBYTES[capability] for _, shared, *_ in compiled)
    serving = {name: numbers for name, *numbers in compiled[: len(names)]}  # bfloat16, heads of 128
    assert set(serving) == set(names)
    assert max(spilled for *_, spilled in serving.values()) <= MAX_SPILLED_NBYTES[capability]
    for name in ("_decode_split", "_prefill_tile"):
        assert serving[name][2] > 0, "keys and values are not read 16 bytes at a time"
    if capability == 90:
        assert serving["_prefill_tile"][1] > 0, "without the tensor cores' own instructions"
