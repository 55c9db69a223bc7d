"""The policies by kind: what `sync.kind` of a recipe names."""

from __future__ import annotations

from shoal.config.sync import SyncSection
from shoal.sync.diloco import DiLoCo
from shoal.sync.every_step import EveryStep
from shoal.sync.gossip import Gossip
from shoal.sync.hogwild import Hogwild
from shoal.sync.local_sgd import LocalSGD
from shoal.sync.policy import Given, Policy
from shoal.sync.server.policy import Server
from shoal.sync.streaming_diloco import StreamingDiLoCo

KINDS: dict[str, type[Policy]] = {
    "every-step": EveryStep,
    "local-sgd": LocalSGD,
    "diloco": DiLoCo,
    "streaming-diloco": StreamingDiLoCo,
    "gossip": Gossip,
    "server": Server,
    "hogwild": Hogwild,
}
"""Every policy under its `sync.kind`."""

KEEPS_EQUAL_STATE = frozenset(kind for kind, policy in KINDS.items() if policy.keeps_equal_state)
"""Policies under which all replicas have the same optimizer state."""


def create(section: SyncSection, given: Given) -> Policy:
    """The policy of a recipe's section."""
    policy = KINDS[section.kind].of(section, given)
    policy.shares.measured = getattr(section, "shares", "equal") == "measured"
    return policy
