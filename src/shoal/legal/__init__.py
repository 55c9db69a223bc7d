"""What is legal: which layout, policy and codec a model family supports, from config.json alone."""

from shoal.legal.facts import ModelFacts
from shoal.legal.families import FAMILIES, axes_of, facts_from_config
from shoal.legal.rules import (
    CODECS,
    IMPLEMENTED_AXES,
    IMPLEMENTED_CODECS,
    IMPLEMENTED_POLICIES,
    POLICIES,
    not_yet,
    problems,
    tensor_degrees,
)

__all__ = [
    "CODECS",
    "FAMILIES",
    "IMPLEMENTED_AXES",
    "IMPLEMENTED_CODECS",
    "IMPLEMENTED_POLICIES",
    "POLICIES",
    "ModelFacts",
    "axes_of",
    "facts_from_config",
    "not_yet",
    "problems",
    "tensor_degrees",
]
