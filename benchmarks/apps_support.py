"""Customer service on the help of LibreOffice: what is found, what is answered, how soon.

    python benchmarks/apps_support.py [--model runs/support-001] [--language zh] [--questions 400]

Recall at 1 and 5 and the coverage at 90 % precision of the application's own search, beside BM25
alone, on questions whose article is known (the held-out terms of the help's index); coverage is the
embedding task's. Then through HTTP: 20 people who ask at once, every shown line looked up in its
article, and how many requests fail while the model's server is killed and articles are replaced.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where apps/ is

from apps.command import application
from apps.served import Served, fetched
from apps.support.__main__ import E5, LANGUAGES, routes
from apps.support.articles import read_articles, read_questions
from apps.support.desk import Desk, Prefixes
from apps.support.search import Threshold, right_of, sureness
from apps.support.store import Store
from shoal.tasks.embedding_scores import coverage

ASKERS, EACH = 20, 10


def ranks_of(scores: Any, right: Any) -> Any:
    """Place from 0 of the first right article of each question; of equal scores the middle."""
    own = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    return (scores > own).sum(axis=1) + ((scores == own).sum(axis=1) - 1) // 2


def answered(scores: Any, right: Any, gone: Any) -> float:
    """Coverage at 90 % precision with some right articles taken out."""
    scores, right = scores[:, ~gone], right[:, ~gone]
    best = scores.argmax(axis=1)
    return coverage([(sureness(scores), right[np.arange(len(best)), best], right.any(axis=1))])


def found(desk: Desk, pairs: list[tuple[str, str]], *, most: int) -> None:
    """Print a row for words alone and one for words and encoder."""
    questions, right = right_of(desk.index, pairs)
    kept = np.random.default_rng(0).permutation(len(questions))[:most]
    asked, right = [questions[n] for n in kept], right[kept]
    vectors = desk._vectors([desk._read(each) for each in asked])
    gone = right.any(axis=0) & (np.random.default_rng(1).random(right.shape[1]) < 0.2)
    for name, given in (("BM25", None), ("BM25 + encoder", vectors)):
        scores = np.stack(
            [desk.index.scores(q, None if given is None else given[n]) for n, q in enumerate(asked)]
        )
        ranks = ranks_of(scores, right)
        print(
            f"{name}: R@1 {(ranks < 1).mean():.3f}, R@5 {(ranks < 5).mean():.3f}, coverage at 90 % "
            f"precision {answered(scores, right, gone):.3f} ({len(asked)} questions, "
            f"{right.shape[1]:,} articles)",
            flush=True,
        )


class Web:
    """The application behind uvicorn, in a thread."""

    def __init__(self, desk: Desk) -> None:
        import uvicorn

        chosen = uvicorn.Config(application(routes(desk)), log_level="warning", port=0)
        self._server = uvicorn.Server(chosen)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.05)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def close(self) -> None:
        """Stop."""
        self._server.should_exit = True
        self._thread.join()


def load(web: Web, desk: Desk, questions: list[str], *, trouble: Any = None) -> None:
    """Ask by ASKERS at once, while `trouble` happens; print times and failures."""
    texts = {each.id: each.text.splitlines() for each in desk.index.articles}
    times, failed, lines, strange = [], [], [0], []

    def asker(number: int) -> None:
        with httpx.Client(base_url=web.url, timeout=120) as client:
            for at in range(EACH):
                start = time.monotonic()
                answer = client.post(
                    "/ask", json={"question": questions[(number * EACH + at) % len(questions)]}
                )
                times.append(time.monotonic() - start)
                if answer.status_code != 200:
                    failed.append(answer.text)
                    continue
                told = answer.json()
                for line in told["passage"].splitlines():
                    lines[0] += 1
                    if line not in [each.strip() for each in texts.get(told["id"], [])]:
                        strange.append(line)

    threads = [threading.Thread(target=asker, args=(n,)) for n in range(ASKERS)]
    for each in threads:
        each.start()
    if trouble is not None:
        trouble()
    for each in threads:
        each.join()
    order = sorted(times)
    print(
        f"{ASKERS} askers, {len(times)} questions: median {statistics.median(times):.2f} s, p95 "
        f"{order[int(0.95 * len(order))]:.2f} s; failed {len(failed)}; {lines[0]} shown lines, "
        f"{len(strange)} of them not in their article",
        flush=True,
    )


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a run; the encoder as it comes without it")
    parser.add_argument("--language", choices=sorted(LANGUAGES), default="en")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--state", type=Path, default=Path("runs/apps/bench-support"))
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--no-load", action="store_true")
    given = parser.parse_args()
    articles, asked, encoder = LANGUAGES[given.language]
    given.state.mkdir(parents=True, exist_ok=True)
    with ExitStack() as ending:
        store = Store(given.state / f"{given.language}.sqlite3")
        ending.callback(store.close)
        if not store.articles():
            store.put(read_articles(articles))
        model = given.model or str(fetched(encoder, say=print))
        prefixes = Prefixes.of(model) if given.model else E5 if given.language == "zh" else None
        settings = [f"replicate={given.replicas}", "threads=1"]
        served = Served(model, settings=settings, say=print)
        ending.callback(served.close)
        desk = Desk(store, encoder=served, model=model, prefixes=prefixes, say=print)
        ending.callback(desk.close)
        pairs = read_questions(asked)
        found(desk, pairs, most=given.questions)
        if given.no_load:
            return
        for precision in (0.9, 0.8, 0.7):
            print(f"asked for {precision:.0%}: {desk.calibrate(pairs, precision=precision)}")
        desk.threshold = Threshold()  # from here on every question gets a passage
        web = Web(desk)
        ending.callback(web.close)
        questions = [question for question, _ in pairs[:: max(1, len(pairs) // 200)]]
        load(web, desk, questions)

        def trouble() -> None:
            time.sleep(1)
            if served.pid is not None:
                os.kill(served.pid, signal.SIGKILL)
            for number in range(2):
                desk.put("bench", title="Bench", text=f"Text {number}.", link="")

        print("while the model's server is killed and articles are replaced:")
        load(web, desk, questions, trouble=trouble)


if __name__ == "__main__":
    main()
