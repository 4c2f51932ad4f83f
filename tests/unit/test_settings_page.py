"""docs/settings.md names every setting there is, with its default."""

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pydantic
import pytest
from pydantic.fields import FieldInfo

import gateway.settings
import ingestor.settings
import projector.settings
import shared.deadletters.replay
import shared.topics
from local.process import ROOT
from shared.settings import Settings

HOLD_SETTINGS = (gateway.settings, ingestor.settings, projector.settings, shared.topics, shared.deadletters.replay)

PAGE = (ROOT / "docs" / "settings.md").read_text()
ROWS = dict(re.findall(r"^\| `([A-Z_]+)` \| (.+?) \|", PAGE, re.MULTILINE))


def all_settings() -> Iterator[tuple[str, FieldInfo]]:
    for kind in Settings.__subclasses__():
        if kind.__module__ not in {"shared.settings", *(module.__name__ for module in HOLD_SETTINGS)}:
            continue
        prefix = kind.model_config.get("env_prefix", "")
        yield from ((f"{prefix}{name}".upper(), field) for name, field in kind.model_fields.items())


def shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, timedelta):
        return str(pydantic.TypeAdapter(timedelta).dump_python(default, mode="json"))
    return "none" if default is None else str(default)


def test_it_names_all_settings_and_no_others() -> None:
    assert set(ROWS) == {name for name, _ in all_settings()}


@pytest.mark.parametrize(("name", "field"), [*all_settings()])
def test_it_gives_the_default(name: str, field: FieldInfo) -> None:
    if field.default_factory is None:
        assert ROWS[name].strip("`") == shown(field.default)
    else:
        assert "the host's name" in ROWS[name]
