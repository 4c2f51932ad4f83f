"""What can go wrong, by what is to be done about it.

::

    EpisodesError
    ├── Refused        the rules say no: answer the caller, note it in the log, go on
    ├── PoisonRecord   not one of our messages: dead letter (commands) or stop the partition (events)
    ├── RecordsLost    records still needed are gone from a topic: stop the partition, a person must decide
    ├── Fenced         another writer took the partition over: end the tenure, answer nobody
    └── Unavailable    Kafka or MongoDB is away: back off and try again

Anything else is a bug: the process ends and is started again.
"""

from typing import Literal

RefusalCode = Literal[
    "not_found",
    "gone",
    "write_protected",
    "conflict",
    "payload_too_large",
    "idempotency_mismatch",
]
"""Why a valid command changes nothing. The same words stand in ``code`` of the HTTP answer."""


class EpisodesError(Exception):
    """The root of everything that this service raises on purpose."""


class Refused(EpisodesError):
    """The rules say no to a valid command. Nothing changed.

    Attributes:
        code: the stable word for programs.
        detail: one sentence for the person who reads the answer.
    """

    def __init__(self, code: RefusalCode, detail: str) -> None:
        super().__init__(detail)
        self.code: RefusalCode = code
        self.detail = detail


class PoisonRecord(EpisodesError):
    """A record that is not one of ours, or one that this version cannot understand."""


class RecordsLost(EpisodesError):
    """Kafka no longer has records that were not read yet (retention, or a topic made anew)."""


class Fenced(EpisodesError):
    """An append was not acknowledged at its exact offset: another writer may own the partition."""


class Unavailable(EpisodesError):
    """Kafka or MongoDB does not answer. Trying again later is right."""
