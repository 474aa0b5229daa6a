"""Hypothesis profiles: the default one is quick and always tries the same examples; `all` tries the same and three times as many more (`make test-all`);
`long` searches for many minutes; `fuzz` is what `make fuzz` runs, with a fresh seed each round (`--hypothesis-seed`)."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

_PHASES = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def register() -> None:
    """Makes the profiles known; the default one counts until pytest loads another."""
    settings.register_profile("default", deadline=None, derandomize=True, database=None, phases=_PHASES, report_multiple_bugs=False, suppress_health_check=_SLOW)
    settings.register_profile("all", deadline=None, derandomize=True, database=None, max_examples=400, phases=_PHASES, report_multiple_bugs=False,
                              suppress_health_check=_SLOW)
    settings.register_profile("long", deadline=None, derandomize=False, max_examples=3000, phases=_PHASES, report_multiple_bugs=False, suppress_health_check=_SLOW, print_blob=True)
    settings.register_profile("fuzz", deadline=None, derandomize=False, database=None, max_examples=1600, phases=_PHASES, report_multiple_bugs=False,
                              suppress_health_check=_SLOW, print_blob=True)
    settings.load_profile("default")
