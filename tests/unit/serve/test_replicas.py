"""Replicas that are killed or hang under load: no request fails, and no answer changes."""

from __future__ import annotations

import os
import signal
import threading
import time

import httpx

from conftest import NAME, Served


def ask(served: Served, *, count: int, fault: int | None) -> dict[int, str]:
    """Answers to `count` requests at once; after some tokens a replica gets the signal `fault`."""
    found: dict[int, str] = {}

    def one(number: int) -> None:
        body = {
            "model": NAME,
            "prompt": f"The river {number}",
            "max_tokens": 200,
            "seed": number,
            "ignore_eos": True,
            "logprobs": 0,
        }
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=100)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        found[number] = choice["text"] + str(choice["logprobs"]["token_logprobs"])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    made = sum(each.get("made_tokens", 0) for each in served.fleet.states().values())
    for each in threads:
        each.start()
    if fault is not None:
        now = made
        while now < made + 10 * count:
            time.sleep(0.01)
            states = served.fleet.states().values()
            now = sum(each.get("made_tokens", 0) for each in states)
        busy = max(served.fleet.states().items(), key=lambda pair: pair[1].get("running", 0))[0]
        pid = served.fleet.workers()[busy]
        assert pid is not None
        os.kill(pid, fault)
    for each in threads:
        each.join()
    return found


def test_a_killed_replica_changes_no_answer(served: Served) -> None:
    wanted = ask(served, count=6, fault=None)
    restarts, replays = served.fleet.restarts, served.fleet.replays
    assert ask(served, count=6, fault=signal.SIGKILL) == wanted
    assert served.fleet.restarts == restarts + 1 and served.fleet.replays > replays
    served.fleet.wait_ready(timeout_seconds=60)
