"""What is legal: which layout, policy and codec a model family supports, from config.json alone."""

from shoal.legal.combination import Combination
from shoal.legal.facts import ModelFacts
from shoal.legal.families.table import axes_of, facts_from_config, family_of
from shoal.legal.rules import (
    CHOSEN_AXES,
    OWN_PARAMETERS,
    not_yet,
    of_two,
    open_axes,
    problems,
    tensor_degrees,
)
from shoal.legal.schedules import SCHEDULES, ZERO_BUBBLE, fits_schedule, schedule_takes
from shoal.legal.shrink import shrunk

__all__ = [
    "CHOSEN_AXES",
    "OWN_PARAMETERS",
    "SCHEDULES",
    "ZERO_BUBBLE",
    "Combination",
    "ModelFacts",
    "axes_of",
    "facts_from_config",
    "family_of",
    "fits_schedule",
    "not_yet",
    "of_two",
    "open_axes",
    "problems",
    "schedule_takes",
    "shrunk",
    "tensor_degrees",
]
