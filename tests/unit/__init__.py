# SPDX-License-Identifier: GPL-2.0-or-later
"""What needs no root, no network namespaces and no compiler, and is over in seconds (make unit)."""
