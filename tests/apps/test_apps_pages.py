"""The pages in a real Chromium: no error in its console, in English and Chinese."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from web_servers import WebServer, web_server

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

SUPPORT = """
from apps.support.__main__ import routes
from apps.support.articles import Article
from apps.support.desk import Desk
from apps.support.store import Store
store = Store(Path(sys.argv[1]) / "s")
store.put([Article("print", "Printing", "Print 3 copies <b>now</b>.", "https://help.example/x")])
desk = Desk(store, join_seconds=0.1)
command.serve(routes(desk), given, title="support")
"""
OPINION = """
from apps.opinion.__main__ import routes
from apps.opinion.monitor import TABLES, Monitor
from apps.state import State
from apps.telling import Teller
class Words:
    def classes(self, texts):
        return [("negative" if "awful" in text else "neutral", []) for text in texts]
    def labels(self):
        return ["negative", "neutral"]
state = State(Path(sys.argv[1]) / "s", tables=TABLES)
teller = Teller(state, [], say=print)
monitor = Monitor(state, labels=Words(), teller=teller, topics={"delays": ["late"]}, say=print)
command.serve(routes(monitor, teller), given, title="opinion")
"""
RECOMMEND = """
from apps.recommend.__main__ import routes
from apps.recommend.catalogue import Catalogue, Item
from apps.recommend.shop import Shop
catalogue = Catalogue(Path(sys.argv[1]) / "s")
catalogue.put([Item(f"i{n}", f"Film <i>{n}</i>", ("War",)) for n in range(9)])
for user in "abc":
    for n in range(3):
        catalogue.take(user, f"i{n + ord(user) % 4}")
command.serve(routes(Shop(catalogue)), given, title="recommend")
"""
HEAD = """
import argparse, sys
from pathlib import Path
from apps import command
given = argparse.Namespace(host="127.0.0.1", port=0, key=None)
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"]
        running = driver.chromium.launch(executable_path=program, args=options)
        yield running
        running.close()


@contextmanager
def opened(
    browser: Any, code: str, folder: Path, *, path: str = "", locale: str = "en-US"
) -> Iterator[tuple[Any, WebServer]]:
    """A page of an application; anything that its console calls an error fails the test."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", HEAD + code, str(folder)]
    with web_server(*command, env=environment, cwd=ROOT) as server:
        page = browser.new_page(viewport={"width": 390, "height": 800}, locale=locale)
        wrong: list[str] = []
        page.on("console", lambda each: wrong.append(each.text) if each.type == "error" else None)
        page.on("pageerror", lambda each: wrong.append(str(each)))
        page.goto(f"{server.address}/{path}?token={server.token}")
        yield page, server
        assert not wrong
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "it fits a phone"
        page.close()


def program(server: WebServer) -> dict[str, str]:
    return {"authorization": f"Bearer {server.token}", "content-type": "application/json"}


def test_a_customer_asks_and_a_person_answers(browser: Any, tmp_path: Path) -> None:
    with opened(browser, SUPPORT, tmp_path) as (page, server):
        page.fill("#text", "print copies")
        page.click("form button:first-of-type")
        page.locator("blockquote").wait_for()
        assert page.locator("blockquote").inner_text() == "Print 3 copies <b>now</b>."
        assert page.locator("small a").get_attribute("href") == "https://help.example/x"
        page.fill("#text", "zebra")
        page.click("form button:first-of-type")
        page.get_by_text("I do not know").wait_for()
        page.click("#person")
        page.get_by_text("A person has been asked").wait_for()
        page.goto(f"{server.address}/queue")
        page.fill("#handoffs input", "Ann")
        page.get_by_role("button", name="Take", exact=True).click()
        page.locator("#handoffs button", has_text="Solved").wait_for()
        page.fill("#handoffs input", "Zebras do not print.")
        page.get_by_role("button", name="Answer", exact=True).click()
        page.locator("blockquote", has_text="Zebras do not print.").wait_for()
        page.get_by_role("button", name="Solved", exact=True).click()
        page.get_by_role("button", name="Make it an article", exact=True).click()
        page.get_by_text("Nobody waits.").wait_for()
        page.locator("#drafts li").wait_for(state="detached")
        page.goto(server.address)
        page.locator("li.person", has_text="Zebras do not print.").wait_for()


def test_a_customer_in_chinese(browser: Any, tmp_path: Path) -> None:
    with opened(browser, SUPPORT, tmp_path, locale="zh-CN") as (page, _):
        assert page.locator("h1").inner_text() == "客户服务"
        page.fill("#text", "斑马")
        page.click("form button:first-of-type")
        page.get_by_text("我不知道").wait_for()


def test_messages_appear_as_they_come(browser: Any, tmp_path: Path) -> None:
    with opened(browser, OPINION, tmp_path) as (page, server):
        sent = '{"messages": ["late <b>again</b>, awful", "all is fine"]}'
        answer = server.ask("/messages", method="POST", body=sent, **program(server))
        assert answer.status == 200, answer
        page.locator("#stream li.negative", has_text="late <b>again</b>").wait_for()
        page.locator("#topics svg").first.wait_for()
        page.get_by_text("No alert yet.").wait_for()
        page.locator("#report", has_text="delays: 1 messages").wait_for()


def test_an_event_changes_what_is_shown(browser: Any, tmp_path: Path) -> None:
    with opened(browser, RECOMMEND, tmp_path) as (page, _):
        page.locator("#items li").first.wait_for()
        first = page.locator("#items strong").first.inner_text()
        assert first.startswith("Film <i>")
        assert "in common with Film" in page.locator("#items li").first.inner_text()
        page.locator("#items button").first.click()
        page.locator("#taken li", has_text=first).wait_for()
        assert first not in page.locator("#items strong").all_inner_texts()
        page.fill("#user", "stranger")
        page.keyboard.press("Enter")
        page.get_by_text("This user is not known yet").wait_for()
