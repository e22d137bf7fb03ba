"""Which gallery images of a query's identity do not count for it; no torch, so that settings can name the rules.

Rule ──▶ [rules] ──▶ positives; the settings' choices, the columns that a rule needs, and what stands for unknown
"""

from typing import Literal

Rule = Literal["camera", "none", "camera_time"]
"""Those of its camera (the usual one), none, or those of its camera and time."""

RULES: dict[Rule, dict[str, int | str]] = {
    "camera": {"cameras": -1},
    "none": {},
    "camera_time": {"cameras": -1, "times": ""},
}
"""Which `Labels` have to be equal for an image not to count, and their value for unknown, which equals nothing."""

UNKNOWN_IDENTITIES = ("", "-1")
"""Identities, as text, that stand for unknown: those equal no identity, not even each other."""
