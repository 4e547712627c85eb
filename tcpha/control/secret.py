# SPDX-License-Identifier: GPL-2.0-or-later
"""The secret that front ends and back ends share."""
from __future__ import annotations

import os
import stat

SHORTEST, LONGEST = 16, 4096  # bytes


def read_secret(path: str) -> bytes:
    """The content of a file, less white space around it. Raises ValueError, which says what is
    wrong with it and how to mend that."""
    try:
        mode = os.stat(path).st_mode
        with open(path, "rb") as f:
            secret = f.read(LONGEST + 1).strip()
    except PermissionError:
        raise ValueError(f"{path} cannot be read by the user that we run as; 'chgrp tcpha {path}; "
                         f"chmod 640 {path}'") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; make one with 'openssl rand -hex 32' and give "
                         "all hosts the same") from None
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ValueError(f"{path} can be read by everybody; 'chmod o= {path}'")
    if len(secret) < SHORTEST:
        raise ValueError(f"{path} holds {len(secret)} bytes, too few; make one with "
                         "'openssl rand -hex 32'")
    if len(secret) > LONGEST:
        raise ValueError(f"{path} holds more than {LONGEST} bytes; is it the right file?")
    return secret
