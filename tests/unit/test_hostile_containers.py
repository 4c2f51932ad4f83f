"""What somebody who breaks into a container finds: no root, nothing to write to, nothing to become."""

import re

import pytest

from local.process import ROOT

COMPOSE = (ROOT / "docker-compose.yml").read_text()
OURS = ("topics", "gateway", "ingestor", "projector")


def block(head: str, *, indent: int) -> str:
    found = re.search(rf"^{' ' * indent}{head}\n((?:{' ' * (indent + 2)}.*\n|\n)+)", COMPOSE, re.MULTILINE)
    assert found is not None, f"docker-compose.yml has no {head}"
    return found[1]


def test_our_containers_can_neither_write_nor_become_more() -> None:
    ours = block("x-service: &service", indent=0)
    for line in (
        "read_only: true",
        'tmpfs: ["/tmp"]',
        'cap_drop: ["ALL"]',
        'security_opt: ["no-new-privileges:true"]',
    ):
        assert f"  {line}\n" in ours
    assert "\nUSER episodes\n" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("suffix", ["", "-cluster"])
@pytest.mark.parametrize("name", OURS)
def test_each_of_ours_is_so_and_none_takes_it_back(name: str, suffix: str) -> None:
    service = block(f"{name}{suffix}:", indent=2)
    assert "    <<: *service\n" in service
    for word in ("privileged", "user:", "cap_add", "read_only", "security_opt", "network_mode", "pid:", "docker.sock"):
        assert word not in service


def test_only_the_gateway_is_reached_from_outside() -> None:
    services = COMPOSE.partition("\nservices:\n")[2]
    names = re.findall(r"^  ([\w-]+):\n", services.partition("\nvolumes:\n")[0], re.MULTILINE)
    assert len(names) > len(OURS)
    published = {name for name in names if "    ports:" in block(f"{name}:", indent=2)}
    assert published == {"gateway", "gateway-cluster"}


@pytest.mark.parametrize("anchor", ["x-kafka: &kafka", "x-mongodb: &mongodb"])
def test_the_servers_become_no_more_than_they_are(anchor: str) -> None:
    assert 'security_opt: ["no-new-privileges:true"]' in block(anchor, indent=0)
