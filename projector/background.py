"""Verifies the read models in use again and again, in a process of its own and at the lowest priority."""

import asyncio
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog

from shared.probes import Status

_LOWEST_PRIORITY = 19
_MOST_SHOWN = 5

_log = structlog.get_logger(__name__)


async def verify_on(every: float, status: Status) -> None:
    """Run ``python -m projector verify`` every so many seconds, until cancelled; log and show what it finds."""
    while True:
        await asyncio.sleep(every)
        found = await _verify()
        status.details["verified"] = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **found}
        if found["good"]:
            _log.info("verified", **found)
        else:
            _log.error("verification failed: `python -m projector verify` shows all of it", **found)


async def _verify() -> Mapping[str, Any]:
    process = await asyncio.create_subprocess_exec(
        *("nice", "-n", str(_LOWEST_PRIORITY), sys.executable, "-m", "projector", "verify", "--json", "--workers", "1"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        said, complained = await process.communicate()
    except asyncio.CancelledError:
        process.terminate()
        await process.wait()
        raise
    if not said:
        last = complained.decode(errors="replace").strip().rpartition("\n")[2]
        return {"good": False, "reason": last or f"it ended with status {process.returncode}"}
    verdict = msgspec.json.decode(said)
    return {
        "good": process.returncode == 0,
        "generation": verdict["generation"],
        "events": verdict["events"],
        "different": verdict["different"],
        "differences": [f"{each['kind']} {each['collection']}/{each['key']}" for each in verdict["differences"]][
            :_MOST_SHOWN
        ],
        "findings": verdict["findings"][:_MOST_SHOWN],
    }
