"""The notebook of examples/ runs from its first cell to its last, with two workers."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tiny import write_corpus

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "two_workers.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_runs(tmp_path: Path) -> None:
    """On a small corpus instead of the registry's; every cell as it stands."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    corpus = write_corpus(tmp_path / "tales.jsonl")
    code = book.cells[1]
    assert 'source = "chitchat"' in code.source
    code.source = code.source.replace('source = "chitchat"', f"source = {str(corpus)!r}")
    NotebookClient(book, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(each.get("text", "") for cell in book.cells for each in cell.get("outputs", []))
    assert "step 20 of 20" in said and "one worker and two differ by at most" in said
    assert any("image/png" in each.get("data", {}) for each in book.cells[-3]["outputs"])
