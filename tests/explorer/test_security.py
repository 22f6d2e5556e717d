"""Who is answered: hosts, origins, tokens, bodies, addresses, headers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from explorer.common import Client, client_of, pieces, source_of, text_study
from tracin.errors import OptionError
from tracin.explorer import security
from tracin.explorer.security import CSP

TOKEN = "a-token-of-some-length"
DECISION = {"id": "0123456789", "row": 1, "action": "keep", "seen": None}


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "10.0.0.7",
        "",
        "localhost@evil.example",
        "a b",
    ],
)
def test_a_foreign_host_is_refused(client, host):
    """A name that was bound anew to this machine still names itself in the header."""
    found = client.get("/api/study", headers={"Host": host})
    assert found.status_code == 421
    assert "Host" in found.json()["error"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999", "[::1]:8000", "127.0.0.1:8000", "LOCALHOST"])
def test_this_machine_is_answered_at_any_port(client, host):
    assert client.get("/api/study", headers={"Host": host}).status_code == 200


def test_two_host_headers_are_refused(client):
    headers = [("Host", "127.0.0.1"), ("Host", "evil.example")]
    assert client.get("/api/study", headers=headers).status_code == 421


def test_a_proxys_name_can_be_allowed(source, tmp_path):
    client = client_of(source, tmp_path, names=("hub.example",))
    assert client.get("/api/study", headers={"Host": "hub.example"}).status_code == 200
    assert client.get("/api/study", headers={"Host": "evil.example"}).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "http://localhost:8000"},
        {"Origin": "null"},
        {"Origin": "file://"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "cross-site"},
    ],
)
def test_a_post_of_another_origin_is_refused(client, headers):
    assert client.post("/api/decisions", DECISION, headers=headers).status_code == 403
    assert client.json("/api/decisions")["seq"] == 0


def test_a_post_of_this_page_is_taken(client):
    headers = {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/api/decisions", DECISION, headers=headers).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_page_fetches_nothing_but_may_link_here(client, site):
    headers = {"Sec-Fetch-Site": site}
    for path in ("/api/study", "/face/train/1.png", "/api/explain/test/1", "/static/api.js"):
        assert client.get(path, headers=headers).status_code == 403
    assert client.get("/", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_a_form_cannot_post_a_decision(client, kind):
    found = client.post("/api/decisions", DECISION, headers={"Content-Type": kind})
    assert found.status_code == 415


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods_are_refused(client, method):
    assert client.ask(method, "/api/study").status_code == 405


def test_another_address_needs_a_token(source, tmp_path):
    for host in ("0.0.0.0", "::", "192.168.1.5", "hub.example"):
        with pytest.raises(OptionError, match="--token"):
            client_of(source, tmp_path, host=host)
    for token in ("short", "a" * 15, "with a space in it", "ünsigned-and-long-enough", "a+b+c+d+e+f+g+h+i+j"):
        with pytest.raises(OptionError, match="16"):
            client_of(source, tmp_path, host="0.0.0.0", token=token)


@pytest.fixture
def guarded(source, tmp_path: Path) -> Client:
    client = client_of(source, tmp_path, host="0.0.0.0", token=TOKEN)
    return Client(client.app, client.log, "http://192.168.1.5:8000")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong-token-of-length"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Cookie": f"tracin_8000={TOKEN}"},
        {"Cookie": "tracin_8000="},
        {"Cookie": "\x01;;;=="},
    ],
)
def test_without_the_token_nothing_is_answered(guarded, headers):
    for path in (
        "/",
        "/api/study",
        "/static/api.js",
        "/face/train/1.png",
        f"/api/study?token={TOKEN}",
        "/?token=wrong",
    ):
        found = guarded.get(path, headers=headers)
        assert found.status_code == 401
        assert TOKEN not in found.text
    assert guarded.post("/api/decisions", DECISION, headers=headers).status_code == 401


def test_the_token_opens_by_header_and_by_a_first_visit(guarded):
    assert guarded.get("/api/study", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    first = guarded.get(f"/?token={TOKEN}")
    assert first.status_code == 200
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert TOKEN not in cookie
    assert TOKEN not in first.text
    assert first.headers["cache-control"] == "no-store"
    pair = cookie.partition(";")[0]
    for other in ("other=1", "bad[name]=1", 'a="open', "é", "", "=", "x" * 3000):
        for cookies in (f"{other}; {pair}", f"{pair};{other}"):
            headers = [("Cookie", cookies.encode("latin-1"))]
            assert guarded.get("/api/study", headers=headers).status_code == 200, other


def test_a_token_stands_in_the_address_as_it_is(source, tmp_path):
    """The address that is told is opened with the token behind it."""
    token = "a.b~c_d-e" * 2
    assert client_of(source, tmp_path, token=token).get(f"/?token={token}").status_code == 200
    for other in ("%41" * 6, "a&b" * 6, "a#b" * 6, "a+b" * 6, "a=b/" * 5):
        with pytest.raises(OptionError, match="A to Z"):
            client_of(source, tmp_path, token=other)


def test_with_a_token_addresses_are_answered_and_names_are_not(guarded):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert guarded.get("/api/study", headers={**headers, "Host": "evil.example"}).status_code == 421
    assert guarded.get("/api/study", headers={**headers, "Host": "10.1.2.3:8000"}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static/%2e%2e%2fapp.py",
        "/static/..%5capp.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/",
        "/static/api.js%00.html",
        "/static/....//app.py",
        "/face/train/..%2f..%2fapp.py.png",
        "/face/..%2ftrain/1.png",
        "/face/train/%2e%2e.png",
        "/face/upload/..%2f..%2fsecret.png",
        "/face/train/١.png",
        "/face/train/99999999999999999999.png",
    ],
)
def test_no_address_leaves_the_page(client, path):
    found = client.get(path)
    assert found.status_code in {403, 404}
    assert "import" not in found.text
    assert "root:" not in found.text


def test_every_answer_has_the_policy(client):
    answers = [
        client.get("/"),
        client.get("/api/study"),
        client.get("/nothing"),
        client.get("/api/study", headers={"Host": "evil.example"}),
        client.post("/api/decisions", {}),
        client.ask("PUT", "/"),
    ]
    for found in answers:
        assert found.headers["content-security-policy"] == CSP
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["referrer-policy"] == "no-referrer"
        assert found.headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in found.headers
        assert "cache-control" in found.headers
    for part in ("default-src 'none'", "script-src 'self'", "base-uri 'none'", "frame-ancestors 'none'"):
        assert part in CSP
    assert "unsafe" not in CSP


def test_a_body_that_is_too_large_is_refused_before_it_is_read(client):
    headers = {"Content-Type": "application/json", "Content-Length": str(10**9)}
    found = client.ask("POST", "/api/decisions", content=pieces(b"{}"), headers=headers)
    assert found.status_code == 413


def test_a_body_without_a_length_is_counted(client):
    parts = [b" " * 1024] * 65
    found = client.ask(
        "POST", "/api/decisions", content=pieces(*parts), headers={"Content-Type": "application/json"}
    )
    assert found.status_code == 413
    assert "64 KiB" in found.json()["error"]


@pytest.mark.parametrize("length", ["-1", "1e3", "2 2", "0x10", "1" * 20, "²"])
def test_a_length_that_is_no_number_is_refused(client, length):
    headers = httpx.Headers({"Content-Type": "application/json"})
    raw = [*headers.raw, (b"Content-Length", length.encode("utf-8"))]
    found = client.ask("POST", "/api/decisions", content=pieces(b"{}"), headers=raw)
    assert found.status_code == 400
    assert "Content-Length" in found.json()["error"]


@pytest.mark.parametrize("length", ["1", "100"])
def test_a_length_that_lies_is_refused(client, length):
    headers = {"Content-Type": "application/json", "Content-Length": length}
    found = client.ask("POST", "/api/decisions", content=pieces(b"{", b"}"), headers=headers)
    assert found.status_code == 400
    assert "Content-Length" in found.json()["error"]


def test_a_body_that_does_not_arrive_is_given_up(client, monkeypatch):
    monkeypatch.setattr(security, "PATIENCE", 0.01)

    async def never():
        yield b"{"
        await asyncio.Event().wait()

    found = client.ask(
        "POST", "/api/decisions", content=never(), headers={"Content-Type": "application/json"}
    )
    assert found.status_code == 408


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 60_000])
def test_what_is_no_json_is_refused(client, body):
    found = client.ask("POST", "/api/decisions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 400


def test_an_address_may_not_be_long(client):
    assert client.get("/api/test?search=" + "x" * 9000).status_code == 414
    assert client.get("/api/test?search=" + "x" * 600).status_code == 400


def test_markup_in_rows_stays_text(tmp_path):
    """Texts and class names come back as JSON text; nothing of them is ever in a page of HTML."""
    source = source_of(text_study())
    client = client_of(source, tmp_path)
    answered = client.get("/api/test")
    assert answered.headers["content-type"] == "application/json"
    items = answered.json()["items"]
    assert items[1]["face"] == {"kind": "text", "text": "<script>alert('1')</script>"}
    assert items[1]["label"] == "<b>cow</b>"
    assert "alert" not in client.get("/").text
    found = client.json("/api/test", search="alert('2')")
    assert [item["label"] for item in found["items"]] == ["dog"] * 3
    assert client.get("/face/test/1.png").status_code == 404
    refused = client.get("/api/test?label=<script>alert(1)</script>")
    assert refused.headers["content-type"] == "application/json"
    source.answers.close()
