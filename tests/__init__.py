# SPDX-License-Identifier: GPL-2.0-or-later
"""All tests. CONTRIBUTING.md says what those of each folder need."""
import pytest

# their assertions tell as much as those of tests
pytest.register_assert_rewrite("tests.support")
