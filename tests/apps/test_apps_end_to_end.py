"""Each application as a stranger starts it: the command, its model's server, the page's routes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from receivers import post_office
from small_models import write_classifier, write_encoder, write_items
from transformers import GPTNeoXForCausalLM

from apps.recommend.catalogue import Catalogue
from apps.recommend.taste import Transformer
from apps.served import free_port
from apps_recommend import Truth

ROOT = Path(__file__).resolve().parents[2]
slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(400)  # each starts a server or two, which import torch


@contextmanager
def application(*command: str, log: list[str] | None = None) -> Iterator[httpx.Client]:
    """Start `python -m COMMAND`, and end it by SIGTERM."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    said = [] if log is None else log
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.rstrip())
            found = re.search(r"(http://[\d.]+:\d+)/\?token=([\w-]+)", line)
            if found:
                rest = threading.Thread(target=lambda: said.extend(process.stdout or ()))
                rest.start()
                headers = {"authorization": f"Bearer {found[2]}"}
                with httpx.Client(base_url=found[1], headers=headers, timeout=60) as client:
                    yield client
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0, said
                rest.join()
                return
        raise AssertionError(f"it did not start: {said}")
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def servers_below(parent: int) -> list[int]:
    """The `shoal serve` of an application, and all its replicas."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()[1:]]
    below, left = [], [parent]
    while left:
        left = [int(pid) for pid, above, _ in rows if int(above) in left]
        below += left
    serving = [int(pid) for pid, _, line in rows if " serve " in line and int(pid) in below]
    children = [int(pid) for pid, above, _ in rows if int(above) in serving]
    return serving + children


def write_articles(folder: Path) -> Path:
    folder.mkdir()
    (folder / "borders.md").write_text("# Borders\n\nDraw a border around cells with Format.\n")
    (folder / "print.md").write_text("# Printing\n\nPrint 3 copies of a page from the File menu.\n")
    (folder / "slide.html").write_text("<title>Slides</title><p>Delete a slide with Delete.</p>")
    return folder


@slow
def test_customer_service_survives_kills_and_swaps(tmp_path: Path) -> None:
    """No question fails while replicas are killed and the index is swapped."""
    folder, model = write_articles(tmp_path / "articles"), write_encoder(tmp_path / "encoder")
    command = ["apps.support", "--articles", str(folder), "--model", str(model), "--replicas", "2"]
    log: list[str] = []
    with application(*command, "--state", str(tmp_path / "state"), log=log) as client:
        assert any("no threshold yet" in line for line in log)
        sources = {path.read_text() for path in folder.iterdir()}
        questions = {"border cells": "borders.md", "print copies": "print.md"}
        wrong: list[str] = []
        stop = threading.Event()

        def asks() -> None:
            while not stop.is_set():
                for question, name in questions.items():
                    found = client.post("/ask", json={"question": question})
                    told = found.json()
                    quoted = any(told.get("passage", "?") in text for text in sources)
                    if found.status_code != 200 or told["id"] != name or not quoted:
                        wrong.append(found.text)

        askers = [threading.Thread(target=asks) for _ in range(4)]
        for each in askers:
            each.start()
        killed = 0
        for number in range(3):
            text = f"Zebras have {number} stripes."
            put = client.put("/articles/zebra", json={"title": "Zebra", "text": text})
            assert put.json() == {"id": "zebra", "articles": 4}
            assert client.post("/ask", json={"question": "zebra"}).json()["passage"] == text
            if number == 1:
                for pid in servers_below(os.getpid()):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
            time.sleep(0.5)
        stop.set()
        for each in askers:
            each.join()
        assert killed and not wrong, wrong[:3]
        assert client.get("/").status_code == 200 and client.get("/queue").status_code == 200
        long = client.post("/ask", json={"question": "x" * 100_000})
        assert long.status_code == 400 and "at most 2,000" in long.json()["error"]


@slow
def test_a_conversation_streams(tmp_path: Path) -> None:
    folder, model = write_articles(tmp_path / "articles"), write_encoder(tmp_path / "encoder")
    command = ["apps.support", "--articles", str(folder), "--model", str(model)]
    with application(
        *command, "--state", str(tmp_path / "state"), "--join-seconds", "0.5"
    ) as client:
        with client.stream("GET", "/conversations/one/events") as stream:
            lines = stream.iter_lines()
            for text in ("print", "copies"):
                client.post("/conversations/one/messages", json={"text": text})
            told = []
            for line in lines:
                if line.startswith("data: "):
                    told.append(json.loads(line[6:]))
                if told and told[-1]["who"] == "service":
                    break
        assert [each["text"] for each in told[:-1]] == ["print", "copies"]
        assert json.loads(told[-1]["text"])["id"] == "print.md"


@slow
@pytest.mark.skipif(
    not (shutil.which("redis-server") and shutil.which("prometheus-alertmanager")),
    reason="needs redis-server and prometheus-alertmanager (apt-get install)",
)
def test_from_a_redis_stream_to_a_mail_within_five_seconds(tmp_path: Path) -> None:
    """Through real programs: Redis, Alertmanager and a mail server; one mail for the burst."""
    import redis

    model, ports = write_classifier(tmp_path / "classifier"), [free_port() for _ in range(4)]
    topics = tmp_path / "topics.yaml"
    topics.write_text("delays: [delayed]\n")
    with (
        program("redis-server", "--port", str(ports[0]), "--save", "", "--dir", str(tmp_path)),
        alertmanager(tmp_path, port=ports[1], cluster=ports[3]),
        post_office(ports[2]) as post,
        application(
            *("apps.opinion", "--model", str(model), "--state", str(tmp_path / "state")),
            *("--source", f"redis://127.0.0.1:{ports[0]}/0?stream=messages"),
            *("--topics", str(topics), "--tell", post.address()),
            *("--tell", f"alertmanager+http://127.0.0.1:{ports[1]}"),
        ) as client,
    ):
        stream = redis.Redis(port=ports[0])
        eventually(lambda: stream.ping())
        draw, at = random.Random(0), time.time() - 2000 * 30
        time.sleep(1.5)  # until it listens

        def send(count: int, share: float, *, first: int) -> None:
            for number in range(first, first + count):
                words = "".join("abcdefghij"[int(each)] for each in str(number))
                mood = "awful" if draw.random() < share else "fine"
                text = f"{mood} delayed flight {words}"
                stream.xadd("messages", {"text": text, "at": at + number * 30})

        def mails() -> list[str]:
            return [each for each in post.mails if "Subject: Report" not in each]

        def seen() -> int:
            return sum(each["seen"] for each in client.get("/topics").json())

        send(1000, 0.2, first=0)
        eventually(lambda: seen() == 1000, seconds=60)
        assert client.get("/alerts").json() == [] and not mails()
        send(60, 0.95, first=1000)
        began = time.monotonic()
        send(1, 1.0, first=1060)
        eventually(mails, seconds=20)
        took = time.monotonic() - began
        eventually(lambda: seen() == 1061, seconds=20)
        api = f"http://127.0.0.1:{ports[1]}/api/v2/alerts"
        (alert,) = eventually(lambda: httpx.get(api).json())
        assert alert["labels"]["topic"] == "delays" and alert["status"]["state"] == "active"
        send(600, 0.1, first=1061)
        eventually(lambda: len(mails()) == 2, seconds=60)
        eventually(lambda: not httpx.get(api).json(), seconds=20)
        (row,) = client.get("/alerts").json()
        assert row["ended"] and len(mails()) == 2
        print(f"from the last message of the burst to the mail: {took:.2f} s")
        assert took < 5


@contextmanager
def program(*command: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def alertmanager(folder: Path, *, port: int, cluster: int) -> Iterator[None]:
    config = folder / "alertmanager.yml"
    config.write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
    command = [
        "prometheus-alertmanager",
        f"--config.file={config}",
        f"--storage.path={folder / 'alerts'}",
        f"--web.listen-address=127.0.0.1:{port}",
        f"--cluster.listen-address=127.0.0.1:{cluster}",
    ]
    with program(*command):
        eventually(lambda: answers(f"http://127.0.0.1:{port}/-/ready"), seconds=30)
        yield


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def eventually(what: Callable[[], Any], *, seconds: float = 40.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)
    return found


def write_shop(folder: Path) -> Path:
    draw, rows = random.Random(0), ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(30):
        for at, item in enumerate(draw.sample(range(40), 12)):
            rows.append(f"u{user}\ti{item}\t{at}")
    (folder / "shop.inter").write_text("\n".join(rows) + "\n")
    lines = [f"i{n}\tFilm {n}\t{('War', 'Comedy')[n % 2]}" for n in range(40)]
    (folder / "shop.item").write_text("item_id\tmovie_title\tclass\n" + "\n".join(lines) + "\n")
    return folder / "shop.inter"


@slow
def test_recommendation_with_a_served_transformer(tmp_path: Path) -> None:
    """Its scores are transformers' own logits; events, unknown users and reasons over HTTP."""
    run = write_items(tmp_path / "run", [f"i{n}" for n in range(40)])
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"weight": 0.5, "age": 5.0}\n')
    settings = ["replicate=1", "threads=1"]
    served = Transformer(run, scratch=tmp_path, settings=settings, say=print)
    history = ["i3", "unknown", "i7", "i11"]
    found = served.scores(history)
    served.close()
    model = GPTNeoXForCausalLM.from_pretrained(run / "model").eval()
    with torch.no_grad():
        logits = model(torch.tensor([[3, 7, 11]])).logits[0, -1].numpy()
    assert found is not None
    assert np.corrcoef(found, logits)[0, 1] > 0.99999, "the same but for a factor"
    data, state = write_shop(tmp_path), tmp_path / "state"
    command = ["apps.recommend", "--data", str(data), "--model", str(run), "--state", str(state)]
    with application(*command) as client:
        asked = {"user": "u1", "count": "5"}
        before = client.get("/recommend", params=asked).json()["items"]
        first = before[0]["id"]
        assert client.post("/events", json={"user": "u1", "item": first}).status_code == 200
        after = client.get("/recommend", params=asked).json()["items"]
        assert first not in [each["id"] for each in after]
        catalogue = Catalogue(state / "recommend.sqlite3")
        truth = Truth(catalogue)
        for each in after:
            assert truth.holds(each["reason"], user="u1", item=each["id"])
        catalogue.close()
        assert not client.get("/recommend", params={"user": "new"}).json()["known"]
        assert client.post("/events", json={"user": "u1", "item": "no"}).status_code == 404
        put = client.put("/items/x1", json={"title": "New film", "genres": ["War"]})
        assert put.status_code == 200 and put.json()["id"] == "x1"
        assert client.get("/recommend").status_code == 400
        assert client.get("/").status_code == 200


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["apps.support", "--articles", "EMPTY"], "no article with text in it"),
        (["apps.opinion", "--source", "no-such-file"], "no such file"),
        (["apps.opinion", "--tell", "carrier-pigeon"], "begins with smtp"),
        (["apps.recommend", "--data", "none.inter"], "cannot be read"),
        (["apps.support", "--precision", "nan"], "expected --precision between 0 and 1"),
    ],
)
def test_mistakes_are_one_message_and_status_2(
    tmp_path: Path, command: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    given = [str(tmp_path / "empty") if each == "EMPTY" else each for each in command]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    found = subprocess.run(
        [sys.executable, "-m", *given, "--state", str(tmp_path / "state")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert found.returncode == 2 and said in found.stderr, found
    assert "Traceback" not in found.stderr
