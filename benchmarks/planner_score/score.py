"""Scores the cost model on a table of published measurements: time, memory, ranking, what fits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from planner_score.table import Case, cases, read_rows
from shoal.plan.cost.constants import DEFAULT, Constants
from shoal.plan.cost.step import Estimator, Prediction
from shoal.plan.hardware import GIB
from shoal.plan.workload import Candidate, flops_per_token

LOW_UTILISATION = 0.10
"""Rows slower than this share of the peak measure a broken layout, and are scored apart."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A case with its prediction."""

    case: Case
    prediction: Prediction
    is_low: bool

    @property
    def time_error(self) -> float:
        """Signed relative error of the step time."""
        return self.prediction.step_seconds / self.case.step_seconds - 1

    def memory_pair(self) -> tuple[float, float] | None:
        """(predicted, measured) GiB of the same quantity, or None where none was measured."""
        case, prediction = self.case, self.prediction
        memory = prediction.first if case.is_first_rank else prediction.peak
        if case.allocated_gib:
            live = memory.update if case.software.resets_peak else memory.live
            return live / GIB, case.allocated_gib
        if case.reserved_gib:
            held = memory.total if case.includes_context else memory.reserved
            return held / GIB, case.reserved_gib
        return None


@dataclass
class SourceScore:
    """What is known of one source."""

    scored: list[Scored] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    assumed: Counter[str] = field(default_factory=Counter)


def score_table(path: Path, *, constants: Constants = DEFAULT) -> dict[str, SourceScore]:
    """Score every source of a table; raises UserError for one that cannot be read."""
    return score_cases(cases(read_rows(path), path=str(path)), constants=constants)


def score_cases(
    found: Iterable[Case | tuple[str, str]], *, constants: Constants = DEFAULT
) -> dict[str, SourceScore]:
    """Predict each case and collect by source."""
    sources: dict[str, SourceScore] = defaultdict(SourceScore)
    for case in found:
        if isinstance(case, tuple):
            sources[case[0]].skipped[case[1]] += 1
            continue
        score = sources[case.source]
        score.scored.append(score_case(case, constants=constants))
        score.assumed.update(case.assumed)
    return dict(sources)


def score_case(case: Case, *, constants: Constants = DEFAULT) -> Scored:
    """Predict one case. A row silent on recompute gets the least that fits.

    Of software that is not known either, how many bytes a parameter needs is unknown as well: a
    misfit then says nothing about recompute, and none is assumed.
    """
    estimator = Estimator(case.workload, case.cluster, case.software, constants)
    prediction = estimator.predict(case.candidate)
    silent = not case.recompute_is_stated and "software" not in case.assumed
    if silent and not prediction.fits:
        prediction = _with_least_recompute(estimator, candidate=case.candidate)
    return Scored(case=case, prediction=prediction, is_low=_is_low(case, prediction))


def _with_least_recompute(estimator: Estimator, *, candidate: Candidate) -> Prediction:
    """The smallest share of recomputed blocks that fits, in quarters.

    Where all of them are not enough, memory was saved in some other way, and none is assumed.
    """
    for share in (0.25, 0.5, 0.75, 1.0):
        tried = replace(candidate, recompute="full", recompute_share=share)
        if estimator.fits(tried):
            return estimator.predict(tried)
    return estimator.predict(candidate)


def _is_low(case: Case, prediction: Prediction) -> bool:
    if not case.step_seconds:
        return False
    flops = flops_per_token(case.workload.facts, sequence_tokens=case.workload.sequence_tokens)
    rate = flops * case.workload.tokens / case.step_seconds / prediction.workers
    peaks = case.cluster.slowest.peak
    return rate < LOW_UTILISATION * (peaks.get("bf16") or peaks.get("fp16") or peaks["fp32"])


def quantile(values: Sequence[float], *, share: float) -> float:
    """The value below which `share` of the sorted values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _errors(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"rows": 0, "median_absolute_error": None, "p90_absolute_error": None}
    absolute = [abs(value) for value in values]
    return {
        "rows": len(values),
        "median_absolute_error": median(absolute),
        "p90_absolute_error": quantile(absolute, share=0.9),
        "median_signed_error": median(list(values)),
    }


def kendall_tau(first: Sequence[float], *, second: Sequence[float]) -> float:
    """Share of concordant minus share of discordant pairs (Kendall's tau-a), in -1..1."""
    total = agreed = 0
    for at in range(len(first)):
        for other in range(at):
            total += 1
            product = (first[at] - first[other]) * (second[at] - second[other])
            agreed += (product > 0) - (product < 0)
    return agreed / total if total else 0.0


def _ranking(scored: Sequence[Scored]) -> dict[str, Any]:
    groups: dict[tuple[str, ...], list[Scored]] = defaultdict(list)
    for one in scored:
        if one.case.step_seconds:
            groups[one.case.group].append(one)
    # Three layouts are the least that can be ranked better or worse than by a coin.
    taus = [
        kendall_tau(
            [one.prediction.step_seconds for one in group],
            second=[one.case.step_seconds for one in group],
        )
        for group in groups.values()
        if len({one.case.candidate for one in group}) >= 3
    ]
    return {"groups": len(taus), "kendall_tau": sum(taus) / len(taus) if taus else None}


def _fits(scored: Sequence[Scored]) -> dict[str, Any]:
    """Precision and recall of "does not fit", over sources that report at least one failure."""
    if not any(one.case.failed for one in scored):
        return {"rows": 0, "precision": None, "recall": None}
    hit = sum(one.case.failed and not one.prediction.fits for one in scored)
    said = sum(not one.prediction.fits for one in scored)
    true = sum(one.case.failed for one in scored)
    return {
        "rows": len(scored),
        "precision": hit / said if said else None,
        "recall": hit / true,
    }


def summary(sources: dict[str, SourceScore]) -> dict[str, Any]:
    """The scores as JSON-able data, errors as fractions (docs/guide/planner.md)."""
    result = {}
    for name, score in sorted(sources.items()):
        timed = [one for one in score.scored if one.case.step_seconds]
        pairs = [pair for one in score.scored if (pair := one.memory_pair())]
        memory = _errors([guess / real - 1 for guess, real in pairs])
        if pairs:
            memory["median_absolute_error_gib"] = median([abs(a - b) for a, b in pairs])
        result[name] = {
            "step_time": _errors([one.time_error for one in timed if not one.is_low]),
            "low_utilisation": _errors([one.time_error for one in timed if one.is_low]),
            "memory": memory,
            "ranking": _ranking(score.scored),
            "fits": _fits(score.scored),
            "skipped": dict(sorted(score.skipped.items())),
            "assumed": dict(sorted(score.assumed.items())),
        }
    errors = [
        source["step_time"]["median_absolute_error"]
        for source in result.values()
        if source["step_time"]["rows"]
    ]
    return {
        "sources": result,
        "median_over_sources": median(errors) if errors else None,
    }


def text(result: dict[str, Any]) -> str:
    """The scores as a table for a terminal."""
    lines = [
        f"{'source':40} {'rows':>5} {'median':>7} {'p90':>7} {'memory':>7} {'tau':>6} "
        f"{'precision':>9} {'recall':>7} {'noise':>6}  skipped"
    ]

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    for name, source in result["sources"].items():
        time, memory = source["step_time"], source["memory"]
        tau = source["ranking"]["kendall_tau"]
        skipped = sum(source["skipped"].values())
        lines.append(
            f"{name[:40]:40} {time['rows']:5d} {percent(time['median_absolute_error']):>7} "
            f"{percent(time['p90_absolute_error']):>7} "
            f"{percent(memory['median_absolute_error']):>7} "
            f"{'-' if tau is None else format(tau, '.2f'):>6} "
            f"{percent(source['fits']['precision']):>9} {percent(source['fits']['recall']):>7} "
            f"{percent(noise_floor(name)):>6}  {skipped}"
        )
    middle = result["median_over_sources"]
    lines.append(f"median over sources: {percent(middle)}")
    for name, error in result.get("left_out", {}).items():
        lines.append(f"  fitted without {name[:50]}: {percent(error)}")
    return "\n".join(lines)


# How far repeated measurements of one configuration lie apart: the three published versions of
# NeMo's 24.07 table, and releases of the same recipe in Megatron-Bridge (medians).
_NOISE = {"NeMo (24": 0.018, "Megatron-Bridge": 0.059}


def noise_floor(source: str) -> float | None:
    """Spread of repeats within a source, as a fraction, where repeats were published."""
    return next((value for mark, value in _NOISE.items() if mark in source), None)
