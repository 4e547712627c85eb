# SPDX-License-Identifier: GPL-2.0-or-later
"""The tcphabe command."""
import sys

from tcpha.cli import daemon
from tcpha.cli.ending import plain_ending


def main() -> None:
    with plain_ending("tcphabe"):
        sys.exit(daemon.main("tcphabe"))


if __name__ == "__main__":
    main()
