"""What is legal: which layout, policy and codec a model family supports, from config.json alone."""

from shoal.legal.facts import ModelFacts
from shoal.legal.families.family import HEADS, Family
from shoal.legal.families.table import axes_of, facts_from_config, family_of, known_families
from shoal.legal.rules import (
    CODECS,
    IMPLEMENTED_AXES,
    IMPLEMENTED_CODECS,
    IMPLEMENTED_POLICIES,
    POLICIES,
    RECOMPUTE,
    SHARD_LEVELS,
    not_yet,
    problems,
    tensor_degrees,
)
from shoal.legal.shrink import shrunk

__all__ = [
    "CODECS",
    "HEADS",
    "IMPLEMENTED_AXES",
    "IMPLEMENTED_CODECS",
    "IMPLEMENTED_POLICIES",
    "POLICIES",
    "RECOMPUTE",
    "SHARD_LEVELS",
    "Family",
    "ModelFacts",
    "axes_of",
    "facts_from_config",
    "family_of",
    "known_families",
    "not_yet",
    "problems",
    "shrunk",
    "tensor_degrees",
]
