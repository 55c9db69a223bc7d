"""A worker that takes some steps, and tells what it then has of what both ends of a line have."""

from __future__ import annotations

from typing import Any

from one_rank import built
from shoal.engine.membership.digest import hash_of
from shoal.engine.step import Votes
from shoal.observe.events import Report


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one worker: after each step the hash of every shared tensor."""
    hashes = []
    with built(payload, descriptor) as training:
        state, holdings = training.state, training.replica.holdings
        shared = [name for name, each in holdings.items() if "pipeline" in each.copies]
        for number in range(payload["steps"]):
            training.policy.before_step(number)
            share = training.share()
            batch = training.batches(number, share)
            counted = training.step.count(batch, votes=Votes())
            result = training.step.train(batch, share=share, counted=counted, step=number)
            training.update.apply(result)
            training.policy.after_step(number, targets=result.targets)
            kinds = {kind: state.named(kind) for kind in state.vectors}
            hashes.append(
                {f"{kind} {n}": f"{hash_of(kinds[kind][n]):x}" for kind in kinds for n in shared}
            )
    Report(descriptor).say("stepped", found={"rank": payload["rank"], "hashes": hashes})
    return 0
