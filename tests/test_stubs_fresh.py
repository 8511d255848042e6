"""The checked-in stubs are those of the checked-in .proto files: scripts/gen_protos would change nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUB_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def stubs_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for pattern in STUB_PATTERNS for path in folder.glob(pattern)}


def test_stubs_are_fresh(tmp_path: Path) -> None:
    protos = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "protos").glob("*.proto"))
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *protos], cwd=ROOT, check=True, timeout=60
    )
    made, kept = stubs_in(tmp_path / "protos"), stubs_in(ROOT / "protos")
    stale = sorted(name for name in made.keys() | kept.keys() if made.get(name) != kept.get(name))
    assert not stale, f"run scripts/gen_protos: {', '.join(stale)}"
