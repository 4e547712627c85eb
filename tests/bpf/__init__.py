# SPDX-License-Identifier: GPL-2.0-or-later
"""What BPF programs run: they themselves, packet by packet (BPF_PROG_TEST_RUN), of daemons that
root starts; and headers that they share with user space, for which there must be a compiler."""
