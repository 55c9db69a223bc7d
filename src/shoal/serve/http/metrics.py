"""Counters and histograms under vLLM's names, so that its dashboards show them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from shoal.serve.request import Event, Request

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768)


class Metrics:
    """All metrics of one served model."""

    def __init__(self, name: str, *, replicas: Any) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfReplicas(name, replicas))
        labels = ["model_name"]

        def histogram(title: str, text: str, buckets: tuple[float, ...]) -> Any:
            made = Histogram(title, text, labels, buckets=buckets, registry=self._registry)
            return made.labels(name)

        self._first = histogram("vllm:time_to_first_token_seconds", "To the first token", _SECONDS)
        self._between = histogram(
            "vllm:inter_token_latency_seconds", "From token to token", _SECONDS
        )
        self._whole = histogram("vllm:e2e_request_latency_seconds", "Whole requests", _SECONDS)
        self._prompt = histogram("vllm:request_prompt_tokens", "Tokens of prompts", _TOKENS)
        self._made = histogram("vllm:request_generation_tokens", "Tokens of answers", _TOKENS)
        self._success = Counter(
            "vllm:request_success",
            "Requests by how they ended",
            [*labels, "finished_reason"],
            registry=self._registry,
        )
        self._name = name
        self._lately = replicas.lately

    def begin(self, request: Request) -> _Watch:
        """A request has come."""
        self._lately.came += 1
        return _Watch(self, request)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)


class _Watch:
    """The times of one request, by this process's monotonic clock."""

    def __init__(self, metrics: Metrics, request: Request) -> None:
        self._metrics, self._request = metrics, request
        self._began = self._last = time.monotonic()
        self._made = 0

    def saw(self, event: Event) -> None:
        """An event has come."""
        now = time.monotonic()
        for _ in event.tokens:
            if self._made == 0:
                self._metrics._first.observe(now - self._began)
                self._metrics._lately.first_seconds.append(now - self._began)
            else:
                self._metrics._between.observe(now - self._last)
            self._last = now
            self._made += 1

    def refused(self) -> None:
        """There is no room for it."""
        self._metrics._lately.refused += 1

    def end(self, finish: str) -> None:
        """It is over."""
        metrics = self._metrics
        seconds = time.monotonic() - self._began
        metrics._whole.observe(seconds)
        metrics._lately.ended.append((seconds, finish))
        metrics._prompt.observe(len(self._request.prompt))
        metrics._made.observe(self._made)
        metrics._success.labels(metrics._name, finish).inc()


class _OfReplicas(Collector):
    """What replicas last said, and what was counted of them, summed over them."""

    def __init__(self, name: str, replicas: Any) -> None:
        self._name, self._replicas = name, replicas

    def collect(self) -> Iterator[Any]:
        """Families of metrics, read when the page is asked for."""
        states = [each for each in self._replicas.states().values() if each]
        counts = self._replicas.counts()

        def total(key: str) -> float:
            return float(sum(each.get(key, 0) for each in states))

        blocks = self._replicas.facts.get("blocks", 0) * max(1, len(states))
        used = 1 - total("free_blocks") / blocks if blocks and states else 0.0
        for title, value in (
            ("vllm:num_requests_running", total("running")),
            ("vllm:num_requests_waiting", total("waiting")),
            ("vllm:kv_cache_usage_perc", used),
            ("shoal:exact", float(bool(self._replicas.facts.get("exact")))),
        ):
            gauge = GaugeMetricFamily(title, title, labels=["model_name"])
            gauge.add_metric([self._name], value)
            yield gauge
        for title, value in (
            ("vllm:prefix_cache_queries", float(counts.get("prefix_queries", 0))),
            ("vllm:prefix_cache_hits", float(counts.get("prefix_hits", 0))),
            ("vllm:prompt_tokens", float(counts.get("prompt_tokens", 0))),
            ("vllm:generation_tokens", float(counts.get("made_tokens", 0))),
            ("vllm:num_preemptions", float(counts.get("preemptions", 0))),
            ("shoal:guessed_tokens", float(counts.get("guessed_tokens", 0))),
            ("shoal:guesses_taken", float(counts.get("taken_tokens", 0))),
            ("shoal:replays", float(self._replicas.replays)),
            ("shoal:replica_restarts", float(self._replicas.restarts)),
        ):
            counter = CounterMetricFamily(title, title, labels=["model_name"])
            counter.add_metric([self._name], value)
            yield counter
