"""What is written: made-up notes of a fixed size. The same in every run."""

import json
import random
from collections.abc import Sequence

from bench.load.generators import COUNTER

BYTES = 500
"""Of an episode, as it stands in the request."""
_TEXT = (
    "the arm drifted by two degrees and was calibrated again before noon while a second run held its place on the "
    "bench with less torque than planned so we kept the old gripper cleaned every joint wrote down what moved read "
    "back each encoder found nothing odd in either log asked for more grease waited an hour tried once more at half "
    "speed saw it settle near zero then let it go on over night under load without any alarm or drop in voltage"
)
_WORDS = _TEXT.split()
_NAMES = ("Grace Hopper", "Alan Turing", "Kafka", "MongoDB", "Python", "@bob", "https://example.org/runs")


def single(number: int) -> bytes:
    """An episode of a project. Its name counts up."""
    chance = random.Random(number)  # noqa: S311 - not for secrets
    episode: dict[str, object] = {
        "name": f"run-{COUNTER}",
        "description": "",
        "tags": ["arm", "calibration"],
        "metadata": {"seed": 7, "rate": 0.5},
    }
    return _encoded(_filled(episode, "description", chance))


def batch(number: int, items: int, tenant_id: str) -> bytes:
    """A batch of a tenant's episodes."""
    chance = random.Random(number)  # noqa: S311 - not for secrets
    return _encoded({"tenant_id": tenant_id, "episodes": [item(chance) for _ in range(items)]})


def item(chance: random.Random) -> dict[str, object]:
    """One of a batch."""
    episode: dict[str, object] = {
        "content": "",
        "source": "notes",
        "author": "grace",
        "metadata": {"priority": "high"},
    }
    return _filled(episode, "content", chance)


def _filled(episode: dict[str, object], field: str, chance: random.Random) -> dict[str, object]:
    return {**episode, field: _text(chance, BYTES - len(_encoded(episode)))}


def _text(chance: random.Random, size: int) -> str:
    words: Sequence[str] = chance.choices(_WORDS, k=size // 4)
    said = " ".join(words).capitalize()
    return f"{chance.choice(_NAMES)}. {said}"[:size].strip().ljust(size, ".")


def _encoded(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
