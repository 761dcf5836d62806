"""What hostile and broken clients send: answered in a sentence or cut off, while others are served."""

import json
import socket
import time
from contextlib import ExitStack, suppress
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

import pytest
from tests.serve.conftest import TEXT, wait_until

from narrowkv.serve import listen
from narrowkv.serve.app import Settings
from narrowkv.serve.listen import LOOPBACK, hosts_of

JSON = {"Content-Type": "application/json"}
BODY = {"model": "demo", "prompt": "It was", "max_tokens": 3, "temperature": 0}


def call(url, path="/v1/completions", body=BODY, method="POST", headers=JSON):
    """Status, headers and JSON of an answer."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=30)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, answer.headers, json.loads(text) if text.startswith(b"{") else text
    finally:
        connection.close()


def connected(url):
    return socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=20)


def post(raw, body):
    """Send a request, and wait for nothing."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    raw.sendall(head.encode() + b"\r\n\r\n" + data)


def served(url):
    try:
        return call(url)[0] == 200
    except (OSError, HTTPException):  # too many connections yet
        return False


def test_large_bodies(serve):
    url = serve(Settings("demo", body_bytes=2000))
    assert call(url, body=b"x" * 2001)[0] == 413
    with connected(url) as raw:  # that says nothing of its length, and does not end
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        raw.sendall(b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024 + b"\r\n400\r\n" + b"x" * 1024 + b"\r\n")
        assert b" 413 " in raw.recv(4096)
    with connected(url) as raw:  # that announces 10 MB: refused before they are sent
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        raw.sendall(b"Content-Length: 10000000\r\n\r\n")
        assert b" 413 " in raw.recv(4096)
    assert served(url)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 1999, b"\xff\xfe\x00", b"null", json.dumps({**BODY, "prompt": "\ud800"}).encode()]
)
def test_bodies_that_are_no_request(serve, body):
    url = serve()
    status, _, answer = call(url, body=body)
    assert status == 400 and answer["error"]["message"].endswith(".") and served(url)


def test_text_without_end(serve):
    url = serve(most_tokens=100)
    for text in ("a\u0300" * 2000, "\U0001f642" * 50_000, " " * 200_000, "\x00" * 3000, TEXT * 1000):
        status, _, answer = call(url, body={**BODY, "prompt": text})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert served(url)


def test_a_body_and_a_header_that_do_not_come(serve, monkeypatch):
    monkeypatch.setattr(listen, "HEADER_SECONDS", 0.5)
    url = serve(Settings("demo", seconds=0.5))
    with connected(url) as silent, connected(url) as slow, connected(url) as half:
        slow.sendall(b"GET / HTTP/1.1\r\nX: ")
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        half.sendall(b"Content-Length: 100\r\n\r\n{")
        assert served(url)
        assert b" 408 " in half.recv(4096)
        for raw in (silent, slow):
            with suppress(ConnectionResetError):
                assert raw.recv(4096) == b""
    with connected(url) as second:  # the same after a first answer
        second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
        end = time.monotonic() + 10
        try:
            while second.recv(4096):
                assert time.monotonic() < end
        except ConnectionResetError:
            pass


def test_a_header_without_end(serve):
    url = serve()
    with connected(url) as raw:
        try:
            for _ in range(200):
                raw.sendall(b"X" * 1000)
            assert b" 400 " in raw.recv(4096)
        except OSError:
            pass  # cut off while it was sent
    assert served(url)


def test_a_thousand_connections(serve, monkeypatch):
    monkeypatch.setattr(listen, "MOST_CONNECTIONS", 50)
    url = serve()
    with ExitStack() as stack:
        for _ in range(1000):
            try:
                stack.enter_context(connected(url))
            except OSError:
                break
    wait_until(lambda: served(url))


def test_a_client_that_takes_nothing_of_a_stream_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr(listen, "SEND_BUFFER", 4096)
    url = serve(Settings("demo", seconds=0.5, new_tokens=1500))
    with connected(url) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        post(raw, {**BODY, "max_tokens": 1500, "stream": True, "ignore_eos": True, "logprobs": 5, "n": 8})
        wait_until(lambda: call(url, "/stats", None, "GET")[2]["running"] > 0)
        wait_until(lambda: call(url, "/stats", None, "GET")[2]["running"] == 0, 60)
    assert served(url)


def test_more_requests_than_may_wait(serve):
    url = serve(rows=1, queue=1)
    with ExitStack() as stack:
        for state in ("running", "waiting"):
            post(stack.enter_context(connected(url)), {**BODY, "max_tokens": 1900, "ignore_eos": True})
            wait_until(lambda state=state: call(url, "/stats", None, "GET")[2][state] == 1)
        status, headers, answer = call(url)
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error") and int(headers["Retry-After"]) > 0
    wait_until(lambda: served(url))


def test_keys(serve):
    url = serve(keys=["right"])
    for key in (None, "", "Bearer", "Bearer wrong", "Bearer righ", "Basic right", "Bearer \u00e9"):
        headers = {**JSON, **({"Authorization": key.encode("latin-1")} if key is not None else {})}
        for path in ("/v1/completions", "/v1/models", "/metrics", "/stats", "/v1/models/../../etc/passwd"):
            status, _, answer = call(url, path, BODY, "POST" if "completions" in path else "GET", headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key", (key, path)
    assert call(url, headers={**JSON, "Authorization": "Bearer right"})[0] == 200
    assert call(url, "/health", None, "GET")[0] == 200 and call(url, "/", None, "GET")[0] == 200


def test_pages_of_other_sites(serve):
    url = serve(hosts=LOOPBACK)
    assert call(url, headers={**JSON, "Origin": "http://evil.example"})[0] == 403
    assert call(url, headers={"Content-Type": "text/plain"})[0] == 415
    assert call(url, headers={**JSON, "Host": "evil.example"})[0] == 403  # a name that was made to lead here
    assert call(url, headers={**JSON, "Origin": url})[0] == 200
    assert hosts_of("127.0.0.1") == LOOPBACK and hosts_of("0.0.0.0") == ()


@pytest.mark.parametrize(
    "path", ["/v1/models/../../../etc/passwd", "/etc/passwd", "//", "/v1/models/%2e%2e%2f", "/v1/models/x"]
)
def test_paths_that_lead_nowhere(serve, path):
    status, _, answer = call(serve(), path, None, "GET")
    assert status == 404 and answer["error"]["type"] == "not_found_error"


def test_methods_that_are_not_served(serve):
    status, _, answer = call(serve(), method="DELETE", body=None)
    assert status == 405 and answer["error"]["message"].endswith(".")


def test_what_is_counted(serve):
    url = serve()
    assert served(url)
    text = call(url, "/metrics", None, "GET")[2].decode()
    assert "narrowkv_requests_total 1" in text and "# TYPE narrowkv_running gauge" in text
    assert "narrowkv_generated_tokens_total 3" in text
