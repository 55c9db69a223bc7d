"""llama.cpp on a GGUF file, for the table of `serve.py`: tokens per core-second, one thread.

    python benchmarks/serve_llamacpp.py small/model.gguf [--streams 1 8] [--rounds 5]

The file: `shoal compress MODEL --quantise gguf-q8_0 --out small`. Prompts of random tokens, as
there; processor time of this process, in which llama.cpp runs (xllamacpp).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import threading
import time
import urllib.request
from pathlib import Path

import xllamacpp


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("file", type=Path)
    arguments.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--tokens", type=int, default=32)
    arguments.add_argument("--prompt", type=int, default=64)
    given = arguments.parse_args()
    most = max(given.streams)
    asked = xllamacpp.CommonParams()
    asked.model.path = str(given.file)
    asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = 256 * most, most, 0
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(asked)

    def complete(seed: int) -> None:
        drawn = random.Random(seed)
        prompt = [drawn.randrange(1_000, 40_000) for _ in range(given.prompt)]
        body = {"prompt": prompt, "n_predict": given.tokens, "temperature": 0, "top_k": 1}
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps({**body, "ignore_eos": True, "cache_prompt": False}).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request).read()

    complete(0)
    for streams in given.streams:
        found = []
        for number in range(given.rounds):
            seeds = range(number * most + 1, number * most + 1 + streams)
            clients = [threading.Thread(target=complete, args=(seed,)) for seed in seeds]
            began = time.process_time()
            for each in clients:
                each.start()
            for each in clients:
                each.join()
            found.append(streams * given.tokens / (time.process_time() - began))
        median, low, high = statistics.median(found), min(found), max(found)
        print(f"{streams} streams: {median:.1f} ({low:.1f} to {high:.1f}) tokens per core-second")
    os._exit(0)  # its threads do not end


if __name__ == "__main__":
    main()
