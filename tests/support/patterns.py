# SPDX-License-Identifier: GPL-2.0-or-later
"""Patterns that take a second to compile, or more."""

MANY = [f"^/site{n}/(.*[.]jpg|[a-z]+{n})$" for n in range(700)]
