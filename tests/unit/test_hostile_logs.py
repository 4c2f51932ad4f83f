"""What a log shows of a bug: where it is, and nothing that was in a variable."""

import logging
from collections.abc import Iterator

import pytest
import structlog

from shared.process import configure_logging

PASSWORD = "a-secret-password"


@pytest.fixture(autouse=True)
def _logging_is_put_back() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def break_down(password: str) -> None:
    raise RuntimeError(f"a bug with a password of {len(password)} characters")


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_bug_is_logged_with_its_place_and_without_the_values_of_variables(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOG_FORMAT", form)
    configure_logging("test")
    try:
        break_down(PASSWORD)
    except RuntimeError:
        structlog.get_logger("a.logger").exception("a bug")
    said = capsys.readouterr().err
    assert "break_down" in said
    assert "a bug with a password of 17 characters" in said
    assert PASSWORD not in said
