"""Every seeded bug fits the present code: what it replaces is there once, and the result is Python."""

import ast
from collections import Counter

import pytest

from local.process import ROOT
from tests.chaos.bugs import BUGS, Bug, patched
from tests.chaos.checker import KINDS as FINDINGS
from tests.chaos.faults import KINDS as FAULTS


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_fits_the_code(bug: Bug) -> None:
    source = (ROOT / bug.file).read_text()
    changed = ast.parse(patched(bug, source))
    assert ast.dump(changed) != ast.dump(ast.parse(source))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_names_findings_and_faults_that_there_are(bug: Bug) -> None:
    assert bug.findings
    assert {*bug.findings} <= {*FINDINGS}
    assert {*bug.faults} <= {*FAULTS}


def test_there_are_enough_of_them_with_names_of_their_own() -> None:
    assert len(BUGS) >= 25
    assert not [name for name, count in Counter(bug.name for bug in BUGS).items() if count > 1]
