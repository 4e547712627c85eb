# SPDX-License-Identifier: GPL-2.0-or-later
"""Work that takes seconds and cannot be stopped, beside the loop."""
from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def beside(work: Callable[[], T]) -> T:
    """Run it in a thread of its own. When the daemon stops nobody waits for that, as it would for
    those of asyncio.to_thread()."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)
    threading.Thread(target=run, name="beside", daemon=True).start()
    return await asyncio.wrap_future(result)
