# SPDX-License-Identifier: GPL-2.0-or-later
"""Which rules match a request-target."""
from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpha._fast.match import Matcher, PatternError

PATTERNS = ["jpg$", ".*", "^/a", r"\.(css|js)$", "x{2,3}", "[0-9]+", "^$", "a|b", "(?i)PNG"]


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60))
def test_matches_like_re(target: str) -> None:
    want = [n for n, p in enumerate(PATTERNS) if re.search(p, target)]
    assert MATCHER.matches(target.encode()) == want


MATCHER = Matcher(PATTERNS)


def test_many_patterns() -> None:
    matcher = Matcher([f"^/site{n}/" for n in range(5000)] + [".*"])
    assert matcher.matches(b"/site4321/x") == [4321, 5000]


def test_bad_pattern_names_its_position() -> None:
    with pytest.raises(PatternError, match="index 3") as error:
        Matcher(["ok", "jpg("])
    assert error.value.pattern == 1
