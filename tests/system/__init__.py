# SPDX-License-Identifier: GPL-2.0-or-later
"""Stories: daemons, nginx and clients on hosts that are network namespaces, which root alone can
make."""
