# SPDX-License-Identifier: GPL-2.0-or-later
"""The tcphabe command."""
import sys

from tcpha.cli import daemon


def main() -> None:
    sys.exit(daemon.main("tcphabe"))


if __name__ == "__main__":
    main()
