"""Settings that more than one process has. Each process reads its own, once, from the environment."""

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

COMMANDS = "episodes.commands"
EVENTS = "episodes.events"
REPLIES = "episodes.replies"
DEAD_LETTERS = "episodes.dead-letters"

MAX_COMMAND_BYTES = 15 * 1024 * 1024
"""Largest command value. The commands topic takes 16 MiB records; keys and headers need room too."""


class Settings(BaseSettings):
    """Frozen; names are those of the environment variables, in any case."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")


class KafkaSettings(Settings):
    """How to reach Kafka. SASL and TLS as aiokafka takes them."""

    model_config = SettingsConfigDict(env_prefix="KAFKA_")

    bootstrap_servers: str = "127.0.0.1:9092"
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    sasl_username: str | None = None
    sasl_password: str | None = Field(default=None, repr=False)
    ssl_cafile: str | None = None


class MongoSettings(Settings):
    """How to reach MongoDB, a replica set."""

    model_config = SettingsConfigDict(env_prefix="MONGODB_")

    url: str = Field(default="mongodb://127.0.0.1:27017/?replicaSet=rs0", repr=False)


class ProbeSettings(Settings):
    """Where a process without an API of its own answers /healthz and /readyz."""

    model_config = SettingsConfigDict(env_prefix="PROBE_")

    host: str = "127.0.0.1"


class LogSettings(Settings):
    """How a process logs: ``json`` for machines, ``console`` for people."""

    model_config = SettingsConfigDict(env_prefix="LOG_")

    format: Literal["json", "console"] = "json"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
