"""What ranks agree on when a generation begins: that they are the same program, and one state.

Every rank says where it stands. The newest step that a living rank has applied counts: its
reduction was complete, so it is the step that all would have taken. Whoever is behind, or new,
gets the whole state from the lowest rank that has it, and all compare a hash of what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from shoal.comm.channel import Donor, fetch
from shoal.comm.group import Group
from shoal.comm.keys import Keys
from shoal.comm.messages import broadcast_json, gather_json
from shoal.engine.membership.digest import Move, digest_of
from shoal.engine.membership.program import code_hash
from shoal.engine.state import FlatState
from shoal.errors import ChannelError, PeersLost, RunError, WorkerError
from shoal.layout import Layout
from shoal.sync.policy import Policy

FRESH = -1
"""Step of a rank that has no state yet."""


@dataclass
class Position:
    """Where one rank stands between two steps."""

    step: int = FRESH
    round: int = 0
    """Of the policy: after one step some may have met already when a peer was lost."""
    evaluated_at: int = -1
    saved_at: int = -1
    facts: dict[str, Any] = field(default_factory=dict)
    """What else a joining rank needs: progress, the last row, the digest of the samples read."""

    def note(self, policy: Policy) -> None:
        """How far the policy is: it may have met since the last step."""
        if self.step != FRESH:
            self.round = policy.round
            self.facts["policy"] = policy.facts()


def check_same_program(group: Group, *, recipe: dict[str, Any], parameters: int) -> None:
    """All ranks run the same code on the same recipe. Raises RunError with the differences."""
    own = {"shoal": code_hash(), "torch": version("torch"), "parameters": parameters}
    everybody = gather_json(group, {**own, **{f"recipe.{k}": v for k, v in _flat(recipe).items()}})
    found = [
        f"{key}: rank 0 has {everybody[0].get(key)!r}, rank {rank} has {theirs.get(key)!r}"
        for rank, theirs in enumerate(everybody)
        for key in sorted({*everybody[0], *theirs})
        if everybody[0].get(key) != theirs.get(key)
    ]
    if found:
        raise RunError(
            "the ranks do not run the same thing; start them all from one recipe and one "
            "version of shoal:\n  " + "\n  ".join(found)
        )


def _flat(tree: dict[str, Any], at: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{at}{key}.")
        else:
            found[at + key] = value
    return found


def agree(
    group: Group,
    position: Position,
    *,
    state: FlatState,
    layout: Layout,
    keys: Keys | None = None,
    address: str = "127.0.0.1",
    generation: int = 0,
) -> Position:
    """One position for all ranks; `state` is filled where it was behind.

    A rank gets its state from one at its own position in another replica; `layout` says who that
    is. The step is FRESH when nobody has a state yet. Raises WorkerError when the states differ
    after the transfer, or when no step is there in all its parts.
    """
    own = asdict(position)
    facts = own.pop("facts")
    everybody = gather_json(group, own)
    newest, met = max((each["step"], each["round"]) for each in everybody)
    if newest == FRESH:
        return Position()
    places = [(each["step"], each["round"]) for each in everybody]
    holders = [rank for rank, place in enumerate(places) if place == (newest, met)]
    moves: list[Move] = []
    for replica_rank in range(layout.replica_workers):
        peers = layout.peers(replica_rank)
        able = [rank for rank in peers if rank in holders]
        if not able:
            raise WorkerError(
                f"nobody holds part {replica_rank} of the model at step {newest} any more"
            )
        behind = [rank for rank in peers if rank not in holders]
        if behind:
            moves.append((able[0], behind))
    if moves:
        transfer(
            group,
            state,
            layout=layout,
            moves=moves,
            keys=keys,
            address=address,
            generation=generation,
        )
    theirs = broadcast_json(group, facts, source=holders[0])
    if group.rank in holders and "policy" in facts:
        theirs["policy"] = facts["policy"]  # belongs to the state that it keeps
    known = [everybody[rank] for rank in holders]
    return Position(
        newest,
        met,
        evaluated_at=min(each["evaluated_at"] for each in known),
        saved_at=min(each["saved_at"] for each in known),
        facts=theirs,
    )


def transfer(
    group: Group,
    state: FlatState,
    *,
    layout: Layout,
    moves: Sequence[Move],
    keys: Keys | None = None,
    address: str = "127.0.0.1",
    generation: int = 0,
) -> None:
    """Give ranks the state of others, bit for bit, as `moves` says; all ranks call it.

    Over an authenticated channel at this host's `address` where there are `keys`, else by the
    group's own broadcast (one replica is then one rank). Raises PeersLost when a source goes
    meanwhile, WorkerError when states differ afterwards.
    """
    vectors = {kind: vector.tensor for kind, vector in state.vectors.items()}
    if keys is None:
        assert layout.replica_workers == 1, "a broadcast reaches every rank"
        for source, _ in moves:
            for vector in vectors.values():
                group.broadcast_(vector, source=source)
    else:
        source_of = {rank: source for source, ranks in moves for rank in ranks}
        gives = group.rank in source_of.values()
        donor = None
        if gives:
            donor = Donor(vectors, keys=keys, generation=generation, bind=address)
        try:
            addresses = gather_json(group, donor and donor.address)
            if group.rank in source_of:
                address = addresses[source_of[group.rank]]
                fetch(
                    address, keys=keys, generation=generation, timeout_seconds=600.0, into=vectors
                )
            group.barrier()
        except ChannelError as error:
            raise PeersLost(f"the state of another rank did not arrive: {error}") from None
        finally:
            if donor is not None:
                donor.close()
    digests = gather_json(group, f"{digest_of(state, everything=True):016x}")
    for source, ranks in moves:
        got = [digests[source], *(digests[rank] for rank in ranks)]
        if len(set(got)) > 1:
            raise WorkerError(f"the state that rank {source} handed on arrived changed: {got}")
        if group.rank in ranks:  # or what is owed once would be paid twice
            for own in state.vectors.values():
                if own.sums:
                    own.tensor.zero_()
