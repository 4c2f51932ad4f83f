"""Two minutes of the chaos suite, for every change: short faults of many kinds on a real service, and nothing found."""

import pytest

from tests.chaos.faults import QUICK
from tests.chaos.stack import Layout
from tests.chaos.suite import Options, run

KINDS = (
    "kill-gateway",
    "kill-ingestor",
    "kill-projector",
    "term-ingestor",
    "stop-ingestor",
    "clock-ingestor",
    "kill-kafka",
    "kill-mongodb",
    "cut-gateway",
    "cut-mongodb",
    "half-open-kafka",
    "late-kafka",
    "reset-gateway",
    "full-disk-state",
    "state-cut",
    "state-swapped",
    "rebuild",
    "scale-gateway",
)


@pytest.mark.timeout(900)
async def test_nothing_is_found_after_each_of_these_faults() -> None:
    options = Options(seed=20, clients=4, only=KINDS, once_each=True, pace=QUICK, layout=Layout())
    report = await run(options)
    assert not report.findings, f"{len(report.findings)} findings, see {report.kept}: {report.findings[:5]}"
    assert {fault.kind for fault in report.faults} == set(KINDS) - report.skipped.keys()
    assert report.calls.acknowledged > 100
