"""Replicas that are killed or hang under load: no request fails, and no answer changes."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
from served import NAME, Served, serving, write_model

from shoal.config.serve import serve_settings
from shoal.launch.pool import WorkerPool
from tiny import shoal


def ask(served: Served, *, count: int, fault: int | None, tokens: int = 80) -> dict[int, str]:
    """Answers to `count` requests at once; after some tokens a replica gets the signal `fault`."""
    found: dict[int, str] = {}

    def one(number: int) -> None:
        body = {
            "model": NAME,
            "prompt": f"The river {number}",
            "max_tokens": tokens,
            "seed": number,
            "ignore_eos": True,
            "logprobs": 0,
        }
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=200)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        found[number] = choice["text"] + str(choice["logprobs"]["token_logprobs"])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    made = sum(each.get("made_tokens", 0) for each in served.fleet.states().values())
    for each in threads:
        each.start()
    if fault is not None:
        now = made
        while now < made + 3 * count:
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


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_replica_that_hangs_is_ended_and_changes_no_answer(
    pool: WorkerPool, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / NAME)
    settings = serve_settings(["port=0", "replicate=2", "threads=1", "silence_seconds=2"])
    for served in serving(folder, settings=settings, pool=pool):
        wanted = ask(served, count=4, fault=None)
        assert ask(served, count=4, fault=signal.SIGSTOP) == wanted
        assert served.fleet.restarts == 1 and served.fleet.replays > 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sigterm_finishes_what_is_being_answered(tmp_path: Path) -> None:
    """The real command: a stream that has begun comes to its end, and the exit status is 0."""
    folder = write_model(tmp_path / NAME)
    asked = shoal("serve", folder, "port=0", "threads=1")
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(each for each in process.stdout if "http://" in each)
        url = next(word for word in line.split() if word.startswith("http://"))
        body = {
            "model": NAME,
            "prompt": "The river",
            "max_tokens": 150,
            "stream": True,
            "ignore_eos": True,
        }
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=200) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [each for each in lines if each]
        assert rest[-1] == "data: [DONE]" and '"finish_reason": "length"' in rest[-2]
        assert process.wait(timeout=60) == 0
