"""Live tensor storage is counted as it is made and freed."""

from __future__ import annotations

import torch

from shoal.observe.memory import LiveStorage, private_bytes


def test_the_peak_is_what_lived_at_once() -> None:
    base = torch.zeros(1000)
    with LiveStorage(base_bytes=base.nbytes) as live:
        first = torch.ones(500)
        second = first + 1  # 2000 bytes more
        view = second[:10]
        del first
        third = torch.ones(250)
    assert live.peak_bytes == 4000 + 2000 + 2000
    assert live.live_bytes == 4000 + 2000 + 1000
    del second
    assert live.live_bytes == 7000, "a view keeps the storage"
    del view, third
    assert live.live_bytes == 4000


def test_what_is_part_of_the_base_is_not_counted_twice() -> None:
    base = torch.zeros(1000)
    with LiveStorage.above([base]) as live:
        base.add_(1)
        base.view(10, 100).t()
    assert live.peak_bytes == 4000


def test_private_memory_is_a_number_where_the_system_tells() -> None:
    found = private_bytes()
    assert found is None or found > 2**20
