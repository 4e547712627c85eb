# SPDX-License-Identifier: GPL-2.0-or-later
"""Side-by-side benchmarks: ours, nginx reached directly, and HAProxy, in one run."""
