"""What an episode's text speaks of: a small extractor that always finds the same in the same text.

It runs in the gateway and its findings are recorded in the event, so a better version changes the future only.
It reads a bounded part of the text, so that it never delays a write by more than a few milliseconds.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import itemgetter
from typing import NamedTuple, Protocol

from shared.commands import Entity
from shared.ids import entity_id

MAX_PER_ITEM = 50
LONGEST_NAME = 255
_SCANNED_PER_ITEM = 2_000
_SCANNED_PER_REQUEST = 100_000


class Mention(NamedTuple):
    """A thing by its type and its name, as it stands in the text."""

    type: str
    name: str


class EntityExtractor(Protocol):
    """Finds mentions in a text. The same version finds the same in the same text."""

    version: str

    def mentions(self, text: str) -> Iterable[Mention]:
        """The mentions, in the order of the text; the same thing may come twice."""


class EntityFinder:
    """Finds the entities of one request's items: the caller's own first, then the extractor's, each thing once.

    Every item gets a fair share of the text that one request may have read.
    """

    def __init__(self, extractor: EntityExtractor, tenant_id: str, items: int) -> None:
        self._extractor = extractor
        self._tenant_id = tenant_id
        self._scanned = min(_SCANNED_PER_ITEM, _SCANNED_PER_REQUEST // max(items, 1))
        self._known: dict[Mention, Entity] = {}

    def entities(self, given: Sequence[Mention], text: str) -> tuple[Entity, ...]:
        found: dict[str, Entity] = {}
        for mention in chain(given, self._extractor.mentions(text[: self._scanned])):
            entity = self._known.get(mention) or self._make(mention)
            found.setdefault(entity.id, entity)
            if len(found) == MAX_PER_ITEM:
                break
        return tuple(found.values())

    def _make(self, mention: Mention) -> Entity:
        identity = entity_id(self._tenant_id, mention.type, mention.name)
        entity = self._known[mention] = Entity(identity, mention.name, mention.type)
        return entity


_TECHNOLOGIES = (
    "Airflow Angular Ansible Argo Aurora AWS Azure BigQuery Cassandra Celery ClickHouse Cloudflare CockroachDB "
    "Consul Datadog Debezium Django Docker DuckDB DynamoDB Elasticsearch Envoy FastAPI Firebase Flask Flink GCP "
    "GitHub GitLab Go Grafana GraphQL gRPC Hadoop HAProxy Helm Istio Java JavaScript Jenkins Kafka Kotlin "
    "Kubernetes Lambda Linux LMDB MariaDB Memcached MongoDB MySQL NATS Neo4j Nginx Node.js OAuth OpenSearch Oracle "
    "Pandas PostgreSQL Postgres Prometheus Pulsar Pulumi Python PyTorch RabbitMQ Rails React Redis Redshift ROS "
    "Ruby Rust S3 Scala Sentry Snowflake Spark SQLite Swift TensorFlow Terraform TypeScript Vault Vue.js "
    "WebAssembly WebSocket ZooKeeper "
)
TECHNOLOGIES = frozenset(_TECHNOLOGIES.split())

_CAPITALISED = re.compile(r"[A-Z][\w+#]*(?:[.-]\w+)*(?: [A-Z][\w+#]*(?:[.-]\w+)*)*")
_GROUP = re.compile(r"([a-z][a-z0-9-]*) (service|team)\Z")
_PERSON = re.compile(r"(?<![\w@.])@([A-Za-z0-9_](?:[\w.-]*\w)?)")
_HOST = re.compile(r"https?://(?:[^\s/?#@]*@)?([^\s/?#:@<>\"')]+)")
_ARTICLES = frozenset(
    {"a", "an", "the", "this", "that", "our", "my", "your", "their", "his", "her", "its", "new", "each"}
)


class WordListExtractor:
    """Capitalised names of several words, known technologies, ``… service`` and ``… team``, @names, hosts of URLs."""

    version = "1"

    def mentions(self, text: str) -> Iterable[Mention]:
        found: list[tuple[int, Mention]] = []
        for match in _CAPITALISED.finditer(text):
            run = match[0]
            if run in TECHNOLOGIES:
                found.append((match.start(), Mention("technology", run)))
            elif " " in run:
                found.extend(_names(match.start(), run))
        for noun in (" service", " team"):
            if noun in text:
                found.extend(_groups(text, noun))
        if "@" in text:
            found.extend((match.start(), Mention("person", match[1])) for match in _PERSON.finditer(text))
        if "://" in text:
            found.extend((match.start(), Mention("host", match[1].lower())) for match in _HOST.finditer(text))
        found.sort(key=_place)
        return [mention for _, mention in found if len(mention.name) <= LONGEST_NAME]


_place = itemgetter(0)


def _names(start: int, run: str) -> Iterable[tuple[int, Mention]]:
    """What several capitalised words in a row name."""
    known = [word for word in run.split(" ") if word in TECHNOLOGIES]
    if known:
        return [(start + run.index(word), Mention("technology", word)) for word in known]
    first, _, rest = run.partition(" ")
    if first.lower() not in _ARTICLES:
        return [(start, Mention("name", run))]
    return [(start, Mention("name", rest))] if " " in rest else []


def _groups(text: str, noun: str) -> Iterable[tuple[int, Mention]]:
    end = 0
    while (at := text.find(noun, end)) >= 0:
        end = at + len(noun)
        match = _GROUP.search(text, max(0, text.rfind(" ", 0, at)), end)
        if match and match[1] not in _ARTICLES and not text[end : end + 1].isalnum():
            yield match.start(), Mention(match[2], match[0])
