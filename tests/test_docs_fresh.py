"""docs/configuration.md tells of the settings that there are: scripts/gen_docs would change nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_settings_are_documented(tmp_path: Path) -> None:
    made = tmp_path / "configuration.md"
    subprocess.run([sys.executable, "scripts/gen_docs.py", str(made)], cwd=ROOT, check=True, timeout=60)
    text = made.read_text()
    assert "| `max_in_flight` | `int` | `1024` |" in text
    assert str(ROOT) not in text
    assert text == (ROOT / "docs" / "configuration.md").read_text(), "run scripts/gen_docs"
