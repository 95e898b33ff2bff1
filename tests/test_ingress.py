"""Who may ask the ingress for pictures: keys, and the clients of its own machine where there are none."""

import asyncio

import pytest
from starlette.requests import Request

from serve.ingress import LOOPBACK, _authorized
from serve.schemas import ApiError

HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}


def refusal(monkeypatch, client: str, variables: dict[str, str], key: str = "") -> str | None:
    """Why a client is refused, if it is."""
    for name in (LOOPBACK, "PAELLA_API_KEYS", *HAPROXY):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    headers = [(b"authorization", f"Bearer {key}".encode())]
    try:
        asyncio.run(_authorized(Request({"type": "http", "client": (client, 1), "headers": headers})))
    except ApiError as error:
        return error.code
    return None


def test_keys(monkeypatch):
    keys = {"PAELLA_API_KEYS": "one, two"}
    for variables in (keys, keys | HAPROXY, keys | HAPROXY | {LOOPBACK: "1"}):
        assert refusal(monkeypatch, "203.0.113.5", variables, "two") is None
        assert refusal(monkeypatch, "127.0.0.1", variables, "three") == "invalid_api_key"


@pytest.mark.parametrize(
    "client, variables, expected",
    [
        ("127.0.0.1", {}, None),
        ("::1", {}, None),
        ("203.0.113.5", {}, "permission_denied"),
        ("203.0.113.5", {LOOPBACK: "1"}, "permission_denied"),
        ("127.0.0.1", HAPROXY, "permission_denied"),  # it is HAProxy's own address
        ("127.0.0.1", HAPROXY | {LOOPBACK: "0"}, "permission_denied"),
        ("127.0.0.1", HAPROXY | {LOOPBACK: "1"}, None),
        ("203.0.113.5", HAPROXY | {LOOPBACK: "1"}, "permission_denied"),  # past HAProxy
    ],
)
def test_no_keys(monkeypatch, client, variables, expected):
    assert refusal(monkeypatch, client, variables) == expected
