"""What the projector is told by its environment."""

import socket

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from shared.settings import Settings


class ProjectorSettings(Settings):
    """``instance_id`` differs between projectors; one started again under its own has its partitions back."""

    model_config = SettingsConfigDict(env_prefix="PROJECTOR_")

    instance_id: str = Field(default_factory=lambda: f"projector-{socket.gethostname()}", min_length=1)
    probe_port: int = 8082
    verify_every: float = Field(default=0.0, ge=0.0)
    """Seconds between two verifications in the background, at the lowest priority; 0 for none."""
    max_batch_events: int = Field(default=1_000, ge=1)
    """Most events in one transaction. A command's events stay together, also when they are more."""
