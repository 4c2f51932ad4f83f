"""Requests that no honest client sends: each gets a clear no, at once, and the service goes on."""

import contextlib
import gzip
import json
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.client import HTTPResponse
from itertools import product
from typing import NamedTuple

import cramjam
import psutil
import pytest

from tests.cluster import Cluster, wait_until
from tests.e2e.client import MAX_BODY_BYTES, unique
from tests.e2e.hostile import assert_headers_are_safe, assert_tells_nothing_internal

WITHIN = 30.0
"""Seconds for any answer. An honest request takes milliseconds; a hang takes for ever."""
EPISODES = b"/namespaces/%s/projects/robotics/episodes"
MIB = 1024 * 1024


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class Wire:
    """Sends bytes as they are, on a connection of their own, and reads one answer."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.username = unique("mallory")
        self.episodes = EPISODES % self.username.encode()
        self.bearer = b"Authorization: Bearer %s\r\n" % cluster.token(self.username).encode()
        self.key = b"Authorization: Bearer %s\r\n" % cluster.api_key.encode()

    def connect(self) -> socket.socket:
        gateway = self._cluster.processes["gateway"]
        return socket.create_connection(("127.0.0.1", gateway.port), timeout=WITHIN)

    def send(self, request: bytes) -> Answer:
        with self.connect() as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has heard enough, and answered
                connection.sendall(request)
            with contextlib.closing(
                HTTPResponse(connection, method=request.partition(b" ")[0].decode("latin-1"))
            ) as response:
                response.begin()
                headers = {name.lower(): value for name, value in response.getheaders()}
                answer = Answer(response.status, headers, response.read())
        assert_tells_nothing_internal(answer.body.decode(), request[:MIB].decode("latin-1"))
        assert_headers_are_safe(answer.headers)
        assert answer.status < HTTPStatus.INTERNAL_SERVER_ERROR or "retry-after" in answer.headers, answer
        if answer.status >= HTTPStatus.BAD_REQUEST and answer.body:
            assert answer.headers["content-type"] == "application/problem+json"
            assert json.loads(answer.body)["status"] == answer.status
        return answer

    def get(self, target: bytes, *headers: bytes, method: bytes = b"GET") -> Answer:
        return self.send(b"%s %s HTTP/1.1\r\nHost: x\r\n%s\r\n" % (method, target, b"".join(headers)))

    def post(self, target: bytes, body: bytes, *headers: bytes) -> Answer:
        head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n"
        return self.send(head % (target, len(body), b"".join(headers)) + body)

    def write(self, body: bytes) -> Answer:
        return self.post(self.episodes, body, self.bearer)

    @property
    def memory(self) -> int:
        """Of the gateway, in bytes."""
        return int(psutil.Process(self._cluster.processes["gateway"].pid).memory_info().rss)


@pytest.fixture
def wire(cluster: Cluster) -> Iterator[Wire]:
    wire = Wire(cluster)
    wait_until(lambda: wire.write(b'{"name": "before"}').status == HTTPStatus.CREATED)
    yield wire
    assert wire.get(b"/healthz").status == HTTPStatus.OK
    wait_until(lambda: wire.write(b'{"name": "after"}').status in {HTTPStatus.CREATED, HTTPStatus.OK})


# ---- HTTP itself -----------------------------------------------------------------------------------------------------

NO_HTTP = {
    "TLS": bytes.fromhex("16030100ff010000fb0303") + b"\x05" * 250,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown method": b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a NUL in the path": b"GET /a\x00b HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes in the path": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "a NUL in a header": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: a\x00b\r\n\r\n",
    "a folded header": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: a\r\n b\r\n\r\n",
    "a space before the colon": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A : a\r\n\r\n",
    "line feeds alone": b"GET /healthz HTTP/1.1\nHost: x\n\n",
    "two lengths": b"POST /v1/episodes HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 4\r\n\r\n{}{}",
    "a length and chunks": (
        b"POST /v1/episodes HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "a negative length": b"POST /v1/episodes HTTP/1.1\r\nHost: x\r\nContent-Length: -4\r\n\r\n{}",
    "a length of 23 digits": b"POST /v1/episodes HTTP/1.1\r\nHost: x\r\nContent-Length: %s\r\n\r\n{}" % (b"9" * 23),
    "a length that is none": b"POST /v1/episodes HTTP/1.1\r\nHost: x\r\nContent-Length: \xb2\r\n\r\n{}",
    "a path of 100 kB": b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 100_000),
    "a header of 5 MB": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: %s\r\n\r\n" % (b"a" * 5_000_000),
    "100,000 headers": (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n%s\r\n" % b"".join(b"X-%d: a\r\n" % number for number in range(100_000))
    ),
    "a head without end": b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X-A: a\r\n" * 1_000_000,
}


@pytest.mark.parametrize("request_", list(NO_HTTP.values()), ids=list(NO_HTTP))
def test_what_is_no_http_is_400_and_the_end_of_the_connection(wire: Wire, request_: bytes) -> None:
    answer = wire.send(request_)
    assert answer.status == HTTPStatus.BAD_REQUEST
    assert answer.headers["connection"] == "close"


def test_many_headers_and_a_long_path_are_no_harm(wire: Wire) -> None:
    assert wire.get(b"/healthz", *(b"X-%d: a\r\n" % number for number in range(4_000))).status == HTTPStatus.OK
    assert wire.get(b"/" + b"a" * 50_000).status == HTTPStatus.NOT_FOUND
    assert wire.get(b"/healthz", b"X-A: %s\r\n" % (b"a" * 50_000)).status == HTTPStatus.OK


def test_upgrades_are_not_offered(wire: Wire) -> None:
    for protocol in (b"websocket", b"h2c", b"TLS/1.2"):
        answer = wire.get(b"/healthz", b"Connection: Upgrade\r\nUpgrade: %s\r\n" % protocol)
        assert answer.status == HTTPStatus.OK


def test_what_follows_a_chunked_body_is_no_header_and_takes_no_memory(wire: Wire) -> None:
    """Else anybody could fill the memory, and get a header past whatever stands before the gateway."""
    head = b"POST /v1/episodes HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    body = json.dumps({"tenant_id": "acme", "episodes": [{"content": "A word."}]}).encode()
    smuggled = b"%s\r\n%x\r\n%s\r\n0\r\n%s\r\n" % (head, len(body), body, wire.key)
    assert wire.send(smuggled).status == HTTPStatus.UNAUTHORIZED

    before = wire.memory
    with wire.connect() as connection:
        connection.sendall(head + b"\r\n0\r\n")
        for _ in range(40):
            connection.sendall(b"X-A: b\r\n" * 100_000)
    assert wire.memory - before < 100 * MIB


def test_a_body_that_is_announced_too_large_is_refused_before_it_comes(wire: Wire) -> None:
    for size in (MAX_BODY_BYTES + 1, 10**18):
        head = b"POST %s HTTP/1.1\r\nHost: x\r\n%sContent-Type: application/json\r\nExpect: 100-continue\r\n"
        announced = head % (wire.episodes, wire.bearer) + b"Content-Length: %d\r\n\r\n" % size
        assert wire.send(announced).status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE


def test_a_chunk_of_an_impossible_size_is_400(wire: Wire) -> None:
    head = b"POST %s HTTP/1.1\r\nHost: x\r\n%sContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = wire.send(head % (wire.episodes, wire.bearer) + b"ffffffffffffffffff\r\n{}\r\n0\r\n\r\n")
    assert answer.status == HTTPStatus.BAD_REQUEST


def test_a_query_that_is_very_long_is_400(wire: Wire) -> None:
    for target in (b"/readyz", b"/docs", b"/v1/episodes/x", wire.episodes):
        assert wire.get(target + b"?" + b"a&" * 25_000, wire.bearer).status == HTTPStatus.BAD_REQUEST
    assert wire.get(wire.episodes + b"?" + b"a&" * 5_000, wire.bearer).status == HTTPStatus.OK


@pytest.mark.parametrize("query", [b"%ff=%fe", b"page[$gt]=1", b"page=1&page=2", b"&&&=&", b"%00=%00", b"page=1%00"])
def test_an_odd_query_is_ignored_or_400(wire: Wire, query: bytes) -> None:
    answer = wire.get(wire.episodes + b"?" + query, wire.bearer)
    assert answer.status in {HTTPStatus.OK, HTTPStatus.BAD_REQUEST}


# ---- bombs -----------------------------------------------------------------------------------------------------------

BOMB = b'{"name": "bomb", "description": "%s"}' % (b"0" * (64 * MIB))
PACKED: Mapping[str, Callable[[], bytes]] = {
    "gzip": lambda: gzip.compress(BOMB),
    "x-gzip": lambda: gzip.compress(BOMB),
    "deflate": lambda: zlib.compress(BOMB),
    "zstd": lambda: bytes(cramjam.zstd.compress(BOMB)),
    "br": lambda: bytes(cramjam.brotli.compress(BOMB, level=1)),
    "gzip, gzip": lambda: gzip.compress(gzip.compress(BOMB)),
    "identity, gzip": lambda: gzip.compress(BOMB),
}


@pytest.mark.parametrize("coding", list(PACKED))
def test_a_packed_body_is_415_and_is_not_unpacked(wire: Wire, coding: str) -> None:
    before = wire.memory
    answer = wire.post(wire.episodes, PACKED[coding](), wire.bearer, b"Content-Encoding: %s\r\n" % coding.encode())
    assert answer.status == HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    assert wire.memory - before < 32 * MIB


def test_a_packed_transfer_is_refused(wire: Wire) -> None:
    packed = gzip.compress(b'{"name": "bomb"}')
    head = (
        b"POST %s HTTP/1.1\r\nHost: x\r\n%sContent-Type: application/json\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
    )
    request = head % (wire.episodes, wire.bearer) + b"%x\r\n%s\r\n0\r\n\r\n" % (len(packed), packed)
    assert wire.send(request).status == HTTPStatus.BAD_REQUEST


def a_million_keys() -> bytes:
    """An object with 1,000,000 different keys of 3 bytes, in less than 8 MiB."""
    ascii_ = [code for code in range(0x21, 0x7F) if chr(code) not in '"\\']
    of_ascii = (bytes(codes) for codes in product(ascii_, repeat=3))
    others = [(chr(code).encode(), bytes([one])) for code in range(0x80, 0x800) for one in ascii_]
    keys = [*of_ascii, *(a + b for a, b in others), *(b + a for a, b in others)][:1_000_000]
    assert len(keys) == 1_000_000
    return b"{" + b",".join(b'"%s":0' % key for key in keys) + b"}"


LARGE: Mapping[str, Callable[[], bytes]] = {
    "a million keys": a_million_keys,
    "four million numbers": lambda: b'{"a":[' + b"0," * 4_000_000 + b"0]}",
    "two million objects": lambda: b'{"a":[' + b"{}," * 2_000_000 + b"{}]}",
    "half a million arrays, side by side and 100 deep": lambda: (
        b'{"a":[' + b"[" * 100 + b"]" * 100 + b",[]" * 500_000 + b"]}"
    ),
    "the same key a million times": lambda: b"{" + b'"a":0,' * 1_000_000 + b'"a":0}',
    "100,000 levels": lambda: b'{"a":' * 100_000 + b"0" + b"}" * 100_000,
    "100,000 levels without end": lambda: b'{"a":[' * 100_000,
    "a number of 100,000 digits": lambda: b'{"a":1' + b"0" * 100_000 + b"}",
    "a number with a million digits behind the point": lambda: b'{"a":0.' + b"1" * 1_000_000 + b"}",
    "a number past all numbers": lambda: b'{"a":1e400}',
    "a number with a very long exponent": lambda: b'{"a":1e' + b"9" * 100_000 + b"}",
    "a number next to nothing": lambda: b'{"a":1e-999999999}',
    "a text of a million escapes": lambda: b'{"a":"' + b"\\u0000" * 1_000_000 + b'"}',
    "a text of a million halves of characters": lambda: b'{"a":"' + b"\\ud800" * 1_000_000 + b'"}',
}


@pytest.mark.parametrize("what", list(LARGE))
def test_large_and_deep_json_is_kept_or_refused_wherever_it_stands(wire: Wire, what: str) -> None:
    value = LARGE[what]()
    tenant = unique("mallory").encode()
    for target, bearer, body in (
        (wire.episodes, wire.bearer, b'{"name":"a","metadata":%s}'),
        (wire.episodes, wire.bearer, b'{"name":"b","ignored":%s}'),
        (wire.episodes, wire.bearer, b'{"name":"c","tags":[%s]}'),
        (b"/v1/episodes", wire.key, b'{"tenant_id":"' + tenant + b'","episodes":[{"content":"A.","metadata":%s}]}'),
        (b"/v1/episodes", wire.key, b'{"tenant_id":"' + tenant + b'","episodes":[{"content":%s}]}'),
    ):
        answer = wire.post(target, body % value, bearer, b"Idempotency-Key: %s\r\n" % unique("key").encode())
        assert answer.status in {
            HTTPStatus.OK,
            HTTPStatus.CREATED,
            HTTPStatus.BAD_REQUEST,
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            HTTPStatus.SERVICE_UNAVAILABLE,
        }


@pytest.mark.parametrize("number", ["1e400", "1" + "0" * 5_000, "-1", "0x10", "1.0", "٣", "NaN", "true", ""])
def test_numbers_in_queries_and_headers_are_numbers_or_400(wire: Wire, number: str) -> None:
    text = number.encode()
    escaped = b"".join(b"%%%02X" % byte for byte in text)
    for target in (b"?page=%s", b"?pageSize=%s"):
        assert wire.get(wire.episodes + target % escaped, wire.bearer).status == HTTPStatus.BAD_REQUEST
    answer = wire.get(wire.episodes, wire.bearer, b"X-Min-Event-Id: %s\r\n" % text)
    assert answer.status == HTTPStatus.BAD_REQUEST
    answer = wire.get(wire.episodes, wire.bearer, b"X-Min-Event-Id: 1\r\nPrefer: wait=%s\r\n" % text)
    assert answer.status == HTTPStatus.OK


# ---- names and paths -------------------------------------------------------------------------------------------------

NAMES = {
    "an operator": "$where",
    "an operator with braces": '{"$gt": ""}',
    "dots": "a.b..c",
    "a dotted operator": "metadata.$set",
    "a prototype": "__proto__",
    "right to left": "\u202etxt.exe\u202c",
    "Arabic": "\u0645\u0631\u062d\u0628\u0627",
    "a joined family": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "a byte order mark": "\ufeffname",
    "not a character": "\uffff\ufdd0",
    "a combining flood": "e" + "\u0301" * 200,
    "quotes": "'; DROP TABLE episodes; --",
    "markup": "<script>alert(1)</script>",
    "a template": "${jndi:ldap://evil}{{7*7}}%s%n",
    "a path": "../../etc/passwd",
    "a path for others": "..\\..\\windows",
    "a URL": "http://evil.example/?a=b#c",
    "percent signs": "%2e%2e%2f%00%zz",
    "a line separator": "a\u2028b",
}


@pytest.mark.parametrize("name", list(NAMES.values()), ids=list(NAMES))
def test_a_name_is_a_name_and_nothing_else(wire: Wire, name: str) -> None:
    metadata = {name: {name: [name]}, "$set": {"a.b": 1}, "": None}
    body = {"name": name, "metadata": metadata, "tags": [name], "description": name}
    escaped = b"".join(b"%%%02X" % byte for byte in name.encode())
    episodes = EPISODES.replace(b"robotics", b"%b") % (wire.username.encode(), escaped)
    answer = wire.post(episodes, json.dumps(body).encode(), wire.bearer, b"X-Min-Event-Id: 1\r\n")
    assert answer.status == HTTPStatus.CREATED
    fresh = b"X-Min-Event-Id: %s\r\n" % answer.headers["x-event-id"].encode()
    seen = json.loads(wire.get(episodes + b"/" + escaped, wire.bearer, fresh).body)
    assert {key: seen[key] for key in body} == body
    assert [episode["name"] for episode in json.loads(wire.get(episodes, wire.bearer, fresh).body)["episodes"]] == [
        name
    ]

    batch = {
        "tenant_id": name,
        "namespace": name,
        "episodes": [{"content": name, "source": name, "metadata": metadata}],
    }
    answer = wire.post(b"/v1/episodes", json.dumps(batch).encode(), wire.key)
    assert answer.status == HTTPStatus.CREATED
    (episode_id,) = json.loads(answer.body)["episode_ids"]
    fresh = b"X-Min-Event-Id: %s\r\n" % answer.headers["x-event-id"].encode()
    target = b"/v1/episodes/%s?tenant_id=%s" % (episode_id.encode(), escaped)
    seen = json.loads(wire.get(target, wire.key, fresh).body)
    assert (seen["content"], seen["source"], seen["metadata"]) == (name, name, metadata)


TRICKS = [
    b"/namespaces/%(me)s/../%(victim)s/projects/robotics/episodes",
    b"/namespaces/%(me)s/%%2e%%2e/%(victim)s/projects/robotics/episodes",
    b"/namespaces/%(me)s%%2F..%%2F%(victim)s/projects/robotics/episodes",
    b"/namespaces/%(me)s%%252F..%%252F%(victim)s/projects/robotics/episodes",
    b"/namespaces/%(me)s..%%2f%(victim)s/projects/robotics/episodes",
    b"/namespaces/%(me)s%%5C..%%5C%(victim)s/projects/robotics/episodes",
    b"/namespaces/%(me)s%%c0%%ae%%c0%%ae%%c0%%af%(victim)s/projects/robotics/episodes",
    b"/namespaces/%(me)s%%00%(victim)s/projects/robotics/episodes",
    b"/namespaces/%(me)s;%(victim)s/projects/robotics/episodes",
    b"/namespaces//%(victim)s/projects/robotics/episodes",
    b"//namespaces/%(victim)s/projects/robotics/episodes",
    b"/./namespaces/%(victim)s/projects/robotics/episodes",
    b"/healthz/../namespaces/%(victim)s/projects/robotics/episodes",
    b"/healthz%%2F..%%2Fnamespaces/%(victim)s/projects/robotics/episodes",
    b"http://evil.example/namespaces/%(victim)s/projects/robotics/episodes",
    b"/namespaces/%(upper)s/projects/robotics/episodes",
    b"/namespaces/%(victim)s%%20/projects/robotics/episodes",
    b"/namespaces/%%20%(victim)s/projects/robotics/episodes",
    b"/namespaces/%(victim)s/projects/robotics/episodes/..",
    b"/namespaces/%(victim)s/projects/robotics/episodes?slug=%(me)s",
    b"/namespaces/%(victim)s/projects/robotics/episodes#/namespaces/%(me)s",
    b"/namespaces/%(victim)s/projects/robotics/episodes%%3F/%(me)s",
    b"/%%6eamespaces/%(victim)s/projects/robotics/episodes",
]


@pytest.mark.parametrize("trick", TRICKS, ids=bytes.decode)
def test_no_path_leads_to_somebody_elses(cluster: Cluster, wire: Wire, trick: bytes) -> None:
    victim = Wire(cluster)
    assert victim.write(b'{"name": "secret"}').status == HTTPStatus.CREATED
    me, other = wire.username.encode(), victim.username.encode()
    target = trick % {b"me": me, b"victim": other, b"upper": other.upper()}
    for answer in (
        wire.get(target, wire.bearer),
        wire.get(target + b"/secret", wire.bearer),
        wire.get(target, wire.bearer, b"X-Original-URL: /healthz\r\nX-Forwarded-Prefix: /\r\n"),
        wire.post(target, b'{"name": "planted"}', wire.bearer),
    ):
        assert answer.status in {
            HTTPStatus.BAD_REQUEST,
            HTTPStatus.FORBIDDEN,
            HTTPStatus.NOT_FOUND,
            HTTPStatus.METHOD_NOT_ALLOWED,
        }, answer
        assert b"secret" not in answer.body.replace(b"/secret", b"")
    fresh = b"X-Min-Event-Id: 3\r\n"
    assert json.loads(victim.get(victim.episodes, victim.bearer, fresh).body)["total"] == 1


# ---- what browsers hear ----------------------------------------------------------------------------------------------


def test_cors_is_off(wire: Wire) -> None:
    origin = b"Origin: https://evil.example\r\n"
    asked = b"Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization\r\n"
    for target in (b"/healthz", b"/v1/episodes", wire.episodes, b"/openapi.json"):
        assert wire.get(target, origin, asked, method=b"OPTIONS").status == HTTPStatus.METHOD_NOT_ALLOWED
        wire.get(target, origin, wire.bearer)  # no answer has a header of CORS: see `Wire.send`


@pytest.mark.parametrize("target", [b"/healthz", b"/readyz", b"/docs", b"/openapi.json", b"/nowhere"])
def test_every_page_has_the_headers_for_browsers(wire: Wire, target: bytes) -> None:
    wire.get(target)
    wire.get(target, method=b"HEAD")
    wire.get(target, method=b"DELETE")
