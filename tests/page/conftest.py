"""A real browser for the page: Chromium, driven by playwright; without them these tests skip."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shoal_page import PageServer, Screen, served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for a module's tests; while it is there, asyncio.run works nowhere else."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed: apt-get install chromium fonts-noto-cjk")
    with playwright.sync_playwright() as driver:
        # --no-sandbox: root has none; QUIC, sync and so on would ask the network
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"]
        running = driver.chromium.launch(executable_path=program, args=options)
        yield running
        running.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    """`shoal page` over an empty-handed folder: tests of a module add their runs to it."""
    with served(tmp_path_factory.mktemp("page") / "runs") as running:
        yield running


@pytest.fixture
def screen(browser: Any, server: PageServer) -> Iterator[Screen]:
    """A window on the server's page; anything that its console calls an error fails the test."""
    window = Screen(browser, server)
    yield window
    window.close()


@pytest.fixture
def runs(server: PageServer) -> Path:
    """Where the server looks for runs."""
    return server.runs
