"""Recommendation: what somebody may want next, each with a reason that is true."""
