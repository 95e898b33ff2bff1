"""Fetching from a real web server: every failure by its name, and nothing fetched that should not be."""

import hashlib
import itertools
import socket
import threading
import time

import pytest
from web import Answer, site

from pipelines import fetch
from pipelines.fetch import Request, fetch_all, is_public
from pipelines.robots import opted_out
from pipelines.source_contract import FetchConfig, Reject, Sample, SourceConfig

IMAGE = b"\xff\xd8 an image"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.01)


def get(*urls, hashes=None, max_image_bytes=1000, **settings):
    """The rows of URLs, from this machine too."""
    config = FetchConfig(**{"allow_private_addresses": True, "timeout_s": 5.0} | settings)
    requests = [(n, Request(f"id{n}", url, f"caption {n}", {"width": n}, hashes or {})) for n, url in enumerate(urls)]
    rows = list(fetch_all(requests, SourceConfig(max_image_bytes=max_image_bytes, fetch=config)))
    assert [number for number, _ in rows] == list(range(len(urls)))
    return [row for _, row in rows]


def reasons(rows):
    assert all(row.stage == "fetch" and row.detail for row in rows if isinstance(row, Reject))
    assert all(len(row.detail.encode()) < 1500 and "\n" not in row.detail for row in rows if isinstance(row, Reject))
    return [row.reason if isinstance(row, Reject) else "ok" for row in rows]


def test_an_image_comes_with_its_hash_and_url():
    with site({"/a": Answer(IMAGE), "/moved": Answer(status=302, headers=[("Location", "/a")])}) as web:
        first, moved = get(web.url("/a"), web.url("/moved"), user_agent="my-robot")
    meta = {"width": 0, "url": web.url("/a"), "sha256": hashlib.sha256(IMAGE).hexdigest()}
    assert first == Sample("id0", IMAGE, "caption 0", meta)
    assert isinstance(moved, Sample) and moved.image == IMAGE
    assert web.agents == {"Mozilla/5.0 (compatible; my-robot)"}


def test_failures_by_name():
    pages = {
        "/big": Answer(bytes(1001)),
        "/endless": lambda: Answer([bytes(400)] * 1000),
        "/empty": Answer(b""),
        "/loop": Answer(status=301, headers=[("Location", "/loop")]),
        "/file": Answer(status=302, headers=[("Location", "file:///etc/passwd")]),
        "/packed": Answer(IMAGE, headers=[("Content-Encoding", "gzip")]),
        "/gone": Answer(status=410),
        "/bytes": Answer(IMAGE, headers=[("X-Robots-Tag", "\xff\xfe" * 500 + ", noai")]),
    }
    with socket.socket() as closed, site(pages) as web:
        closed.bind(("127.0.0.1", 0))  # nothing listens
        expected = {
            web.url("/nothing"): "http-404",
            web.url("/gone"): "http-410",
            web.url("/big"): "too-large",
            web.url("/endless"): "too-large",
            web.url("/empty"): "empty-response",
            web.url("/loop"): "too-many-redirects",
            web.url("/file"): "bad-url",
            web.url("/packed"): "content-encoding",
            web.url("/bytes"): "opted-out",
            f"http://127.0.0.1:{closed.getsockname()[1]}/": "connection",
            "ftp://127.0.0.1/a.jpg": "bad-url",
            "not a url": "bad-url",
            "http://": "bad-url",
            "http://[::1/": "bad-url",
            "file:///etc/passwd": "bad-url",
            "ws://127.0.0.1/": "bad-url",
            "http+unix://a/": "bad-url",
            "http://127.0.0.1:99999/": "bad-url",
        }
        assert dict(zip(expected, reasons(get(*expected, retries=1)), strict=True)) == expected
        assert web.asked["/nothing"] == web.asked["/gone"] == web.asked["/big"] == 1  # 4xx and refusals are not asked again


def test_what_may_pass_is_tried_again():
    answers = itertools.chain([Answer(status=503), Answer(status=429)], itertools.repeat(Answer(IMAGE)))
    with site({"/later": lambda: next(answers), "/never": Answer(status=500)}) as web:
        assert reasons(get(web.url("/later"), web.url("/never"), retries=2)) == ["ok", "http-500"]
        assert web.asked == {"/later": 3, "/never": 3}


def test_a_slow_site_is_left_and_does_not_hold_up_the_others():
    held = threading.Event()

    def slow():
        held.wait(10)
        return Answer(IMAGE)

    with site({"/slow": slow, "/a": Answer(IMAGE)}) as web:
        began = time.monotonic()
        assert reasons(get(web.url("/slow"), *[web.url("/a")] * 20, timeout_s=0.5, retries=0)) == ["timeout"] + ["ok"] * 20
        held.set()
        assert time.monotonic() - began < 8 and web.asked["/a"] == 20


def test_images_are_fetched_at_the_same_time_and_come_in_order():
    together = threading.Barrier(8)

    def page(number):
        def answer():
            together.wait(timeout=10)  # nobody gets an answer before all have asked
            time.sleep(0.02 * (8 - number))
            return Answer(IMAGE + bytes([number]))

        return answer

    with site({f"/{n}": page(n) for n in range(8)}) as web:
        rows = get(*[web.url(f"/{n}") for n in range(8)], concurrency=8)
    assert [row.image[-1] for row in rows] == list(range(8))


def test_no_more_is_read_ahead_than_the_window():
    held, taken = threading.Event(), []

    def requests(web):
        for number in range(1000):
            taken.append(number)
            yield number, Request(str(number), web.url("/slow" if number == 0 else "/a"), "x", {}, {})

    def slow():
        held.wait(20)
        return Answer(IMAGE)

    with site({"/slow": slow, "/a": Answer(IMAGE)}) as web:
        threading.Timer(1.0, held.set).start()
        config = FetchConfig(concurrency=2, allow_private_addresses=True)
        rows = fetch_all(requests(web), SourceConfig(fetch=config))
        assert next(rows)[0] == 0 and len(taken) <= 2 * fetch.WINDOW + 1
        rows.close()  # what is under way is given up


def test_images_wait_for_room_in_memory(monkeypatch):
    monkeypatch.setattr(fetch, "MAX_HELD_BYTES", 3 * len(IMAGE))
    with site({"/a": Answer(IMAGE)}) as web:
        assert reasons(get(*[web.url("/a")] * 50, concurrency=2)) == ["ok"] * 50


def test_hashes_are_checked():
    known = {"md5": hashlib.md5(IMAGE).hexdigest().upper(), "sha256": hashlib.sha256(IMAGE).hexdigest()}
    with site({"/a": Answer(IMAGE)}) as web:
        assert reasons(get(web.url("/a"), hashes=known)) == ["ok"]
        (row,) = get(web.url("/a"), hashes={"md5": "0" * 32})
    assert row.reason == "hash-mismatch" and known["md5"].lower() in row.detail


def test_private_addresses_are_refused_before_they_are_asked():
    with site({"/a": Answer(IMAGE)}) as web:
        urls = [web.url("/a"), web.url("/a", "localhost"), web.url("/a", "[::ffff:127.0.0.1]"), web.url("/a", "0.0.0.0")]
        assert reasons(get(*urls, allow_private_addresses=False)) == ["private-address"] * 4
        assert not web.asked


def test_a_redirect_does_not_lead_into_a_private_network(monkeypatch):
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    with site({"/secret": Answer(IMAGE)}, host="127.0.0.2") as inside:
        away = Answer(status=302, headers=[("Location", inside.url("/secret", "127.0.0.2"))])
        with site({"/away": away, "/a": Answer(IMAGE)}) as web:
            assert reasons(get(web.url("/away"), web.url("/a"), allow_private_addresses=False)) == ["private-address", "ok"]
        assert not inside.asked


def test_a_name_that_resolves_otherwise_later_does_not_either(monkeypatch):
    """The address is looked at where it is connected to: there is no second look-up to be told something else by."""
    real, answers = socket.getaddrinfo, iter(["127.0.0.1", "127.0.0.2"])

    def rebinding(host, *rest, **more):
        return real(next(answers, "127.0.0.2") if host == "rebind.test" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    with site({"/a": lambda: Answer(IMAGE, headers=[("Connection", "close")])}, host="0.0.0.0") as web:
        url = web.url("/a", "rebind.test")
        assert reasons(get(url, allow_private_addresses=False)) == ["ok"]
        assert reasons(get(url, allow_private_addresses=False)) == ["private-address"]
        assert web.asked == {"/a": 1}


def test_names_that_do_not_resolve(monkeypatch):
    asked = []

    def resolve(host, *_, **__):
        asked.append(host)
        code = socket.EAI_AGAIN if host == "busy.test" else socket.EAI_NONAME
        raise socket.gaierror(code, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert reasons(get("http://busy.test/a", "http://no.test/a", retries=2)) == ["dns", "dns"]
    assert asked.count("no.test") == 1 and asked.count("busy.test") == 3  # only what may pass is tried again


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1",
     "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe"],
)  # fmt: skip
def test_other_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    ("header", "says_no"),
    [
        ("noai", True),
        ("NoIndex, NoFollow", True),
        ("nofollow, noimageai", True),
        ("paella-ray: noai", True),
        ("Paella-Ray: nofollow, noml", True),
        ("otherbot: nofollow, paella-ray: noai", True),
        ("*: noai", True),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST, noindex", True),
        ("googlebot: noindex", False),
        ("googlebot: nofollow, noindex", False),
        ("max-image-preview: large", False),
        ("all", False),
        ("nofollow", False),
        ("noaixyz", False),
        ("", False),
    ],
)
def test_opt_out_headers(header, says_no):
    assert (opted_out([header], FetchConfig()) is not None) == says_no
    assert (opted_out(["all", header], FetchConfig()) is not None) == says_no
    assert opted_out([header], FetchConfig(opt_out=())) is None


def test_sites_that_opt_out_are_heeded():
    pages = {
        "/no": Answer(IMAGE, headers=[("X-Robots-Tag", "all"), ("X-Robots-Tag", "noai")]),
        "/not-you": Answer(IMAGE, headers=[("X-Robots-Tag", "my-robot: noindex")]),
        "/moved": Answer(status=302, headers=[("Location", "/yes"), ("X-Robots-Tag", "noimageai")]),
        "/yes": Answer(IMAGE, headers=[("X-Robots-Tag", "otherbot: noai")]),
    }
    with site(pages) as web:
        urls = [web.url(path) for path in pages]
        assert reasons(get(*urls, user_agent="my-robot")) == ["opted-out", "opted-out", "opted-out", "ok"]
        assert reasons(get(*urls)) == ["opted-out", "ok", "opted-out", "ok"]
        assert reasons(get(*urls, opt_out=())) == ["ok"] * 4


def test_settings_that_are_not_allowed():
    for settings in ({"timeout_s": 0}, {"retries": -1}, {"concurrency": 0}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"fetch.{name}=.* is not allowed"):
            FetchConfig(**settings)
    with pytest.raises(ValueError, match="max_image_bytes=0 is not allowed"):
        SourceConfig(max_image_bytes=0)
