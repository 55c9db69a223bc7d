#!/usr/bin/env python3
"""llama.cpp's server, as its package of Python has it, with the arguments of `llama-server`."""

import argparse
import os
import threading

import xllamacpp

parser = argparse.ArgumentParser()
for name in ("--model", "--alias", "--host"):
    parser.add_argument(name, required=True)
for name, usual in (("--port", 0), ("--threads", 1), ("--ctx-size", 256), ("--parallel", 1)):
    parser.add_argument(name, type=int, default=usual)
given = parser.parse_args()
asked = xllamacpp.CommonParams()
asked.model.path, asked.model_alias = given.model, {given.alias}
asked.hostnames, asked.port = [given.host], given.port
asked.cpuparams.n_threads = given.threads
asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = given.ctx_size, given.parallel, 0
assert "PYTHONPATH" not in os.environ, "it has an environment of its own"
server = xllamacpp.Server(asked)
print(f"listening at {server.listening_address}", flush=True)
threading.Event().wait()
