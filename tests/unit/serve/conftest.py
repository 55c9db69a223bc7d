"""One server with two replicas for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from served import NAME, Served, serving, write_model

from shoal.config.serve import serve_settings
from shoal.launch.pool import WorkerPool


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> Iterator[Served]:
    folder = write_model(tmp_path_factory.mktemp("served") / NAME)
    settings = serve_settings(["port=0", "replicate=2", "threads=1", "queue_requests=8"])
    yield from serving(folder, settings=settings, pool=pool)
