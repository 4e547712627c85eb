# SPDX-License-Identifier: GPL-2.0-or-later
"""The tcphafe command."""
import sys

from tcpha.cli import daemon


def main() -> None:
    sys.exit(daemon.main("tcphafe"))


if __name__ == "__main__":
    main()
