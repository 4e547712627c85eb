# SPDX-License-Identifier: GPL-2.0-or-later
"""All tests. Each folder says in its __init__.py what its tests need."""
import pytest

# their assertions tell as much as those of tests
pytest.register_assert_rewrite("tests.support")
