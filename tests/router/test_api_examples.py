"""The Python examples of docs/api.md run as they stand, but for the ports."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "api.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.mark.parametrize(("index", "words"), [(0, "disaggregated 100"), (1, "INVALID_ARGUMENT text: the prompt must")])
async def test_an_example_runs(launch: Any, capsys: pytest.CaptureFixture[str], index: int, words: str) -> None:
    service = await launch("p-0", "d-0")
    assert len(EXAMPLES) == 2
    source = EXAMPLES[index]
    for address, ours in (("127.0.0.1:8000", service.server.http_port), ("127.0.0.1:50051", service.port)):
        source = source.replace(address, f"127.0.0.1:{ours}")
    await asyncio.to_thread(exec, source, {})
    assert words in capsys.readouterr().out
