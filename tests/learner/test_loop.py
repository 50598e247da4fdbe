from __future__ import annotations

import asyncio
from pathlib import Path

from services.learner.loop import _unanswered


async def test_a_caller_that_gave_up_waiting_for_a_checkpoint_is_not_answered() -> None:
    loop = asyncio.get_running_loop()
    patient: asyncio.Future[Path] = loop.create_future()
    gone: asyncio.Future[Path] = loop.create_future()
    gone.cancel()
    for future in _unanswered([gone, patient]):
        future.set_result(Path("step-000001"))
    assert patient.result() == Path("step-000001")
    assert gone.cancelled()
