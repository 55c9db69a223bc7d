"""Rule: a web page is for who has its key, from itself alone, on this machine only."""

from __future__ import annotations

import http.client
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.errors import UserError
from shoal.page import web
from web_servers import WebServer, web_server

APP = """
import itertools, sys
from pathlib import Path
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from shoal.page import web

async def hello(request):
    body = await request.body()
    return PlainTextResponse(f"hello {request.method} {len(body)}")

async def stream(request):
    first = int(web.resumed_from(request) or 0)
    numbers = itertools.count(first + 1)
    def poll():
        number = next(numbers)
        return [web.Event({"number": number}, id=str(number))]
    return web.EventStream(poll, every_seconds=0.02)

app = Starlette(routes=[
    Route("/", hello, methods=["GET", "POST", "PUT"]),
    Route("/deep/page", hello),
    Route("/healthy", hello),
    Route("/stream", stream),
    Mount("/static", web.static_files(Path(sys.argv[1]))),
])
web.serve(app, title="test", say=lambda text: print(text, flush=True), open_paths=["/healthy"],
          body_bytes=1000)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    folder = tmp_path_factory.mktemp("static")
    (folder / "a.js").write_text("1;\n")
    (folder / "out.txt").symlink_to("/etc/hostname")
    with web_server(sys.executable, "-c", APP, str(folder)) as running:
        yield running


def test_the_token_becomes_a_cookie_and_leaves_the_address(server: WebServer) -> None:
    found = server.ask(f"/deep/page?run=a&token={server.token}")
    assert (found.status, found.headers["location"]) == (303, "/deep/page?run=a")
    cookie = found.headers["set-cookie"]
    assert cookie.startswith(f"shoal-{server.port}={server.token};")
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert server.ask("/deep/page?run=a", **server.cookie).status == 200


def test_a_path_of_two_slashes_leads_to_no_other_host(server: WebServer) -> None:
    found = server.ask(f"//elsewhere.org/?token={server.token}")
    assert (found.status, found.headers["location"]) == (303, "/elsewhere.org/")


@pytest.mark.parametrize("path", ["/", "/deep/page", "/stream", "/static/a.js", "/none"])
def test_without_a_key_nothing_is_told(server: WebServer, path: str) -> None:
    assert server.ask(path).status == 403
    wrong = server.ask(path, Cookie=f"shoal-{server.port}=guessed")
    assert wrong.status == 403 and "open the address that was printed" in wrong.body
    assert server.ask(path, Cookie=f"shoal-1={server.token}").status == 403  # another port's
    assert server.ask(path, Authorization="Bearer guessed").status == 403


def test_a_wrong_token_is_refused(server: WebServer) -> None:
    found = server.ask("/?token=guessed", **server.cookie)
    assert found.status == 403 and "not the token of this server" in found.body
    assert "set-cookie" not in found.headers
    assert server.ask(f"/?token={server.token}", method="POST").status == 403


def test_an_open_path_needs_no_key_to_be_read(server: WebServer) -> None:
    assert server.ask("/healthy").status == 200
    assert server.ask("/healthy", Host="elsewhere.org").status == 400


@pytest.mark.parametrize(
    "host", ["elsewhere.org", "elsewhere.org:80", "127.0.0.1.elsewhere.org", "10.1.2.3", ""]
)
def test_a_foreign_host_is_refused_though_the_key_is_right(server: WebServer, host: str) -> None:
    found = server.ask("/", **server.cookie, Host=host)
    assert found.status == 400 and "not a name of this server" in found.body


@pytest.mark.parametrize("host", ["localhost:9", "LOCALHOST", "127.0.0.1:1", "[::1]:80"])
def test_own_names_at_any_port_will_do(server: WebServer, host: str) -> None:
    """A tunnel (ssh -L) has another port at its other end."""
    assert server.ask("/", **server.cookie, Host=host).status == 200


SAME = {"Sec-Fetch-Site": "same-origin", "X-Shoal": "1"}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Shoal": "1"},
        {"Sec-Fetch-Site": "same-origin"},
        {"X-Shoal": "1", "Sec-Fetch-Site": "same-site"},
        {"X-Shoal": "1", "Sec-Fetch-Site": "cross-site"},
        {"X-Shoal": "1", "Sec-Fetch-Site": "none"},
    ],
)
def test_changes_come_from_the_page_alone(
    server: WebServer, method: str, headers: dict[str, str]
) -> None:
    found = server.ask("/", method=method, **server.cookie, **headers)
    assert found.status == 403 and "changes come from this page alone" in found.body
    assert server.ask("/", method=method, **SAME).status == 403  # without the cookie


def test_the_page_itself_and_programs_may_change(server: WebServer) -> None:
    found = server.ask("/", method="POST", body=b"abc", **server.cookie, **SAME)
    assert (found.status, found.body) == (200, "hello POST 3")
    bearer = {"Authorization": f"Bearer {server.token}"}
    assert server.ask("/", method="POST", body=b"abc", **bearer).status == 200


def test_another_site_cannot_read_with_the_cookie(server: WebServer) -> None:
    """Another port of this machine is the same site, and gets the cookie sent."""
    foreign = {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}
    found = server.ask("/static/a.js", **server.cookie, **foreign)
    assert found.status == 403 and "asked for by another site" in found.body
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert server.ask("/", **server.cookie, **link).status == 200


def test_a_large_body_is_not_read(server: WebServer) -> None:
    found = server.ask("/", method="POST", body=b"x" * 1001, **server.cookie, **SAME)
    assert found.status == 413 and "larger than 1000 bytes" in found.body


@pytest.mark.timed
def test_a_slow_body_is_not_waited_for(server: WebServer) -> None:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=20)
    connection.putrequest("POST", "/")
    for name, value in {**server.cookie, **SAME, "Content-Length": "10"}.items():
        connection.putheader(name, value)
    connection.endheaders(b"abc")
    found = connection.getresponse()
    assert found.status == 408 and b"did not come within 10 s" in found.read()
    connection.close()


@pytest.mark.parametrize("path", ["/", "/none", "/static/a.js"])
def test_every_answer_has_the_policy(server: WebServer, path: str) -> None:
    for headers in ({}, server.cookie, {"Host": "elsewhere.org"}):
        found = server.ask(path, **headers).headers
        policy = found["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert found["x-content-type-options"] == "nosniff"
        assert found["referrer-policy"] == "no-referrer"
        assert "server" not in found and "access-control-allow-origin" not in found


def test_static_files_stay_in_their_folder(server: WebServer) -> None:
    found = server.ask("/static/a.js", **server.cookie)
    assert found.status == 200 and "javascript" in found.headers["content-type"]
    for path in ("/static/../secret", "/static/%2e%2e/%2e%2e/etc/passwd", "/static/out.txt"):
        assert server.ask(path, **server.cookie).status == 404


def test_a_stream_goes_on_where_it_was(server: WebServer) -> None:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
    connection.request("GET", "/stream", headers={**server.cookie, "Last-Event-ID": "41"})
    answer = connection.getresponse()
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [answer.readline().decode().strip() for _ in range(8)]
    connection.close()
    first = ["event: message", "id: 42", 'data: {"number": 42}', ""]
    assert lines == [*first, *(line.replace("42", "43") for line in first)]


def test_only_loopback_is_listened_to(server: WebServer) -> None:
    from test_sockets import listening  # beside this file

    found = listening([server.process.pid])
    assert [(address, port) for _, address, port in found] == [("127.0.0.1", server.port)]


@pytest.mark.timed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_within_two_seconds_though_a_stream_is_open(
    number: int, tmp_path: Path
) -> None:
    with web_server(sys.executable, "-c", APP, str(tmp_path)) as server:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
        connection.request("GET", "/stream", headers=server.cookie)
        answer = connection.getresponse()
        assert answer.readline() == b"event: message\n"
        began = time.monotonic()
        os.kill(server.process.pid, number)
        assert server.process.wait(timeout=10) == 0
        assert time.monotonic() - began < 2.0
        assert server.process.stdout is not None and server.process.stdout.read() == ""
        connection.close()


def test_other_machines_are_listened_to_with_a_key_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0: other machines could reach it"):
        web.listen("0.0.0.0", 0, key=None)
    web.listen("0.0.0.0", 0, key="a" * 16).close()


def test_an_address_that_cannot_be_had_is_said() -> None:
    with web.listen("127.0.0.1", 0, key=None) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}: cannot be had: .*in use"):
            web.listen("127.0.0.1", port, key=None)
    with pytest.raises(UserError, match=r"no\.such\.name\.invalid:0: not an address"):
        web.listen("no.such.name.invalid", 0, key=None)


@pytest.mark.parametrize("text", ["", "short\n", "with spaces in the line\n", "ab;cd" * 5])
def test_a_key_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(UserError, match="expected 16 or more letters"):
        web.read_key(file)


def test_a_key_is_the_first_line_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0123456789abcdef-_\nmore\n")
    assert web.read_key(tmp_path / "key") == "0123456789abcdef-_"
    with pytest.raises(UserError, match="cannot be read"):
        web.read_key(tmp_path / "none")
