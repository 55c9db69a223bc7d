"""Large pages: what Linux agrees to lies in them, and values stay what they were."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from shoal.serve.pages import hold_in_large_pages

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"AnonHugePages:\s+(\d+) kB", text)
    return int(found[1]) << 10 if found else 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's pages")
def test_memory_that_linux_agrees_to_lies_in_large_pages() -> None:
    held = torch.arange(8 << 20)  # 64 MiB
    before = huge_bytes()
    agreed = hold_in_large_pages(least=32 << 20)
    assert torch.equal(held, torch.arange(8 << 20))
    if not agreed or "[never]" in _SETTING.read_text():
        pytest.skip("this kernel gives no large pages when asked")
    assert huge_bytes() >= before + (32 << 20)


def test_small_memory_is_left_alone() -> None:
    assert hold_in_large_pages(least=1 << 50) == 0
