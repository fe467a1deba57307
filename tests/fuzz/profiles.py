"""How long the fuzzing looks: HYPOTHESIS_PROFILE=ci (the default, the same few examples each time) or deep.

    HYPOTHESIS_PROFILE=deep python -m pytest tests/fuzz/test_jsonl.py

Only the tests of this folder use the profiles: nothing is loaded for the whole process.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_ALL = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", derandomize=True, database=None, **_ALL)
settings.register_profile("deep", **_ALL)

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
_DEEPER = 10


def fuzz(examples: int) -> settings:
    """`examples` in the profile "ci", 10 times as many in "deep"."""
    times = _DEEPER if PROFILE == "deep" else 1
    return settings(settings.get_profile(PROFILE), max_examples=examples * times)
