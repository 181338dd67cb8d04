"""Renaming state-dict keys both ways by a few rules."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What the fields of a rule may stand for.
_FIELDS = {"i": r"\d+", "j": r"\d+", "p": r"[a-z_]+", "rest": r".+"}


class KeyMap:
    """A two-way renaming; the first rule that matches a whole key decides.

    Args:
        rules: pairs (our name, their name) with the fields ``{i}`` and ``{j}`` (a number), ``{p}`` (the last part, such
            as ``weight``) and ``{rest}`` (anything); both names of a pair have the same fields.
    """

    def __init__(self, rules: Iterable[tuple[str, str]]) -> None:
        self._rules = [(_pattern(ours), ours, _pattern(theirs), theirs) for ours, theirs in rules]

    def from_ours(self, key: str) -> str | None:
        """Their name of our ``key``, or None where no rule knows it."""
        for pattern, _, _, theirs in self._rules:
            if match := pattern.fullmatch(key):
                return theirs.format(**match.groupdict())
        return None

    def to_ours(self, key: str) -> str | None:
        """Our name of their ``key``, or None where no rule knows it."""
        for _, ours, pattern, _ in self._rules:
            if match := pattern.fullmatch(key):
                return ours.format(**match.groupdict())
        return None


def _pattern(rule: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda field: f"(?P<{field[1]}>{_FIELDS[field[1]]})", re.escape(rule)))
