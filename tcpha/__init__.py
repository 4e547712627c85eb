# SPDX-License-Identifier: GPL-2.0-or-later
"""TCPHA: content-aware request distribution by TCP handoff."""
__version__ = "1.1.0"
