"""docs/guide/layouts.md says what shoal.legal says."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("layouts_page", ROOT / "scripts" / "layouts.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    current = (ROOT / "docs" / "guide" / "layouts.md").read_text(encoding="utf-8")
    assert current == script.page(), "run python scripts/layouts.py"
