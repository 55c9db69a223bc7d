"""`shoal page` as a process of its own, and a window of a real browser on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from made_runs import MadeRun
from tiny import shoal
from web_servers import WebServer, web_server

WAIT_FOR_STEP = """(step) => new Promise((seen, never) => {
    const look = () => document.body.dataset.step === step && seen();
    new MutationObserver(look).observe(document.body, {attributes: true});
    setTimeout(() => never(Error(`step ${document.body.dataset.step}, not ${step}`)), 20000);
    look();
})"""
KEY = "a-key-of-the-tests-own"


@dataclass
class PageServer:
    """A running `shoal page`."""

    runs: Path
    web: WebServer


@contextmanager
def served(runs: Path, *, port: int = 0, secret: str = KEY) -> Iterator[PageServer]:
    """Serve `runs`, which gets a first run if it has none, under a key of our own."""
    if not runs.exists():
        MadeRun(runs / "first").rows(1, 4)
    key = runs.parent / "key"
    key.write_text(secret + "\n")
    command = shoal("page", runs, "--port", str(port), "--key", key)
    with web_server(*command, cwd=runs.parent) as web:
        web.token = secret
        yield PageServer(runs, web)


class Screen:
    """One window: 1200 x 800 and English unless said otherwise."""

    def __init__(self, browser: Any, server: PageServer, **options: Any) -> None:
        options = {"viewport": {"width": 1200, "height": 800}, "locale": "en-US", **options}
        self._browser, self.server = browser, server
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console",
            lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else 0,
        )

    def open(self, *names: str) -> Any:
        """The page with these runs; returns playwright's page once it has an answer."""
        mark = "&".join(quote(name, safe="") for name in names)
        self.page.goto(f"{self.server.web.address}/?token={self.server.web.token}#{mark}")
        self.page.locator("#link[data-key=connected]").wait_for()
        return self.page

    def wait_for_step(self, step: int) -> None:
        """Until this step is on the screen; the page itself tells, for playwright looks seldom."""
        self.page.evaluate(WAIT_FOR_STEP, str(step))

    def close(self, *, errors: bool = False) -> None:
        """Close the window; `errors`: the test has looked at them itself."""
        self.context.close()
        assert errors or not self.errors, self.errors


def python(*words: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *words]
