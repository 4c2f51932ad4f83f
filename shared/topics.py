"""Creates the topics, or says how those that exist differ from what this service needs: ``python -m shared.topics``."""

import asyncio
from dataclasses import dataclass

import structlog
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import TopicAlreadyExistsError, for_code
from pydantic_settings import SettingsConfigDict

from shared.errors import EpisodesError, Unavailable
from shared.kafka import open_admin, translated
from shared.process import configure_logging, run_process
from shared.settings import COMMANDS, DEAD_LETTERS, EVENTS, REPLIES, KafkaSettings, Settings
from shared.supervisor import backoff

_DAY_MS = 24 * 60 * 60 * 1000
_MIB = 1024 * 1024
REPLY_PARTITIONS = 16

_log = structlog.get_logger(__name__)


class TopicSettings(Settings):
    """How the topics are laid out. ``partitions`` cannot change later: streams would move."""

    model_config = SettingsConfigDict(env_prefix="TOPICS_")

    partitions: int = 4
    replication_factor: int = 1
    min_insync_replicas: int = 1


class TopicMismatchError(EpisodesError):
    """A topic exists with a layout that would break the service."""


@dataclass(frozen=True)
class Topic:
    name: str
    partitions: int
    config: dict[str, str]


def topics(settings: TopicSettings) -> list[Topic]:
    """The topics of this service, with what matters of their configuration."""
    common = {
        "cleanup.policy": "delete",
        "min.insync.replicas": str(settings.min_insync_replicas),
        "unclean.leader.election.enable": "false",
    }
    return [
        Topic(
            COMMANDS,
            settings.partitions,
            common
            | {
                "retention.ms": str(7 * _DAY_MS),
                "message.timestamp.type": "LogAppendTime",
                "max.message.bytes": str(16 * _MIB),
            },
        ),
        Topic(
            EVENTS,
            settings.partitions,
            common | {"retention.ms": "-1", "retention.bytes": "-1", "max.message.bytes": str(32 * _MIB)},
        ),
        Topic(
            REPLIES,
            REPLY_PARTITIONS,
            common | {"retention.ms": str(_DAY_MS // 24), "max.message.bytes": str(64 * _MIB)},
        ),
        Topic(
            DEAD_LETTERS,
            settings.partitions,
            common | {"retention.ms": str(30 * _DAY_MS), "max.message.bytes": str(32 * _MIB)},
        ),
    ]


async def create_topics(kafka: KafkaSettings, settings: TopicSettings) -> None:
    """Create what is missing and check what exists.

    Raises:
        TopicMismatchError: a topic exists with another number of partitions or a configuration that loses data.
        Unavailable: Kafka does not answer.
    """
    async with open_admin(kafka) as admin:
        with translated("creating the topics"):
            for topic in topics(settings):
                await _create(admin, topic, settings.replication_factor)


async def _create(admin: AIOKafkaAdminClient, topic: Topic, replication_factor: int) -> None:
    new = NewTopic(
        topic.name,
        num_partitions=topic.partitions,
        replication_factor=replication_factor,
        topic_configs=topic.config,
    )
    response = await admin.create_topics([new])
    [(_, code, message)] = response.topic_errors
    if code == TopicAlreadyExistsError.errno:
        await _check(admin, topic)
    elif code:
        raise Unavailable(f"creating {topic.name}: {for_code(code).__name__}: {message}")
    else:
        _log.info("topic created", topic=topic.name, partitions=topic.partitions)


async def _check(admin: AIOKafkaAdminClient, topic: Topic) -> None:
    [described] = await admin.describe_topics([topic.name])
    if (found := len(described["partitions"])) != topic.partitions:
        raise TopicMismatchError(
            f"{topic.name} has {found} partitions, TOPICS_PARTITIONS wants {topic.partitions}: "
            "streams stay in their partition for ever, so set TOPICS_PARTITIONS to what exists"
        )
    resource = ConfigResource(ConfigResourceType.TOPIC, topic.name, configs=topic.config)
    [response] = await admin.describe_configs([resource])
    [(_, _, _, _, entries)] = response.resources
    found_config = {entry[0]: entry[1] for entry in entries}
    wrong = {key: found_config.get(key) for key, value in topic.config.items() if found_config.get(key) != value}
    if wrong:
        wanted = {key: topic.config[key] for key in wrong}
        raise TopicMismatchError(f"{topic.name} is configured with {wrong}, this service needs {wanted}")


async def _main() -> None:
    attempt = 0
    while True:
        try:
            return await create_topics(KafkaSettings(), TopicSettings())
        except Unavailable as error:
            attempt += 1
            _log.warning("waiting for Kafka", reason=str(error))
            await asyncio.sleep(backoff(attempt))


if __name__ == "__main__":
    configure_logging("topics")
    try:
        run_process(_main)
    except TopicMismatchError as error:
        raise SystemExit(f"python -m shared.topics: {error}") from None
