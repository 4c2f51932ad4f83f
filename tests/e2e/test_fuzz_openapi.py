"""Every route, with what its own document calls good and what it does not: never a 500, never what is not documented.

``FUZZ_EXAMPLES`` says how many requests are made of each operation in each way, 30 if it says nothing.
"""

import os
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway import openapi
from tests.cluster import Cluster
from tests.e2e.hostile import assert_headers_are_safe, assert_tells_nothing_internal

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))
WITHIN = 45
"""Seconds for an answer; a write has given up by then, and a read has waited as long as it may be told to."""
OWN = "fuzz"
NAMES = {"slug": OWN, "projectSlug": "robotics", "episodeName": "run-042"}
"""Parts of paths that lead somewhere, so that not all requests end with 404."""
OPERATIONS = [
    (path, method, mode)
    for path, operations in openapi.document()["paths"].items()
    for method, operation in operations.items()
    if method != "parameters"
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or "parameters" in operation  # else nothing of it can be wrong
]
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def schema(cluster: Cluster, session: requests.Session) -> schemathesis.BaseSchema:
    url = "{}/namespaces/{slug}/projects/{projectSlug}/episodes".format(cluster.url, **NAMES)
    authorization = {"Authorization": f"Bearer {cluster.token(OWN)}"}
    session.post(url, json={"name": NAMES["episodeName"]}, headers=authorization, timeout=WITHIN).raise_for_status()
    return schemathesis.openapi.from_url(f"{cluster.url}/openapi.json")


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS, ids=str)
def test_every_route_answers_as_documented_whatever_it_is_sent(
    cluster: Cluster,
    schema: schemathesis.BaseSchema,
    session: requests.Session,
    path: str,
    method: str,
    mode: GenerationMode,
) -> None:
    operation = schema[path][method]
    leads_somewhere = {part: name for part, name in NAMES.items() if f"{{{part}}}" in path}
    credentials = cluster.api_key if path.startswith("/v1/") else cluster.token(OWN, namespaces=["*"])

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # a request that failed is told as it was: to find a smaller one would take minutes
        suppress_health_check=list(HealthCheck),  # slow is what this is, and many cases are filtered out on purpose
    )
    @given(
        case=st.one_of(
            operation.as_strategy(generation_mode=mode),
            operation.as_strategy(generation_mode=mode, path_parameters=leads_somewhere or None),
        )
    )
    def send(case: Any) -> None:
        if "X-Min-Event-Id" in case.headers:
            case.headers["Prefer"] = "wait=0"  # nothing is coming that would be worth waiting for
        response = case.call(session=session, headers={"Authorization": f"Bearer {credentials}"}, timeout=WITHIN)
        case.validate_response(response, checks=CHECKS)
        request = response.request
        waited_in_vain = response.status_code == HTTPStatus.SERVICE_UNAVAILABLE and "X-Min-Event-Id" in request.headers
        assert response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR or waited_in_vain, response.text
        assert_tells_nothing_internal(response.text, f"{request.url} {request.headers} {request.body!r}")
        assert_headers_are_safe({name.lower(): ", ".join(values) for name, values in response.headers.items()})

    send()
