"""Who is let in: names, origins, tokens; and the page's policy."""

import base64
import hashlib
import re
import socket

import pytest

from support.errors import refused
from zsseg_rt.errors import ArgumentError
from zsseg_rt.server.access import AccessRules, Refused
from zsseg_rt.server.api import load_page
from zsseg_rt.server.settings import ServerSettings, listen

TOKEN = "0123456789abcdefghij"


def rules(**settings):
    return AccessRules.of(ServerSettings(**settings))


ALLOWED = {"allowed_hosts": ("Cam.example", "[fe80::1]")}
EVERYWHERE = {"host": "0.0.0.0", "token": TOKEN}
HOSTS = [
    *((host, {}, True) for host in (
        "localhost", "localhost:8000", "LocalHost:9", "127.0.0.1:8000", "[::1]:8000", "[::1]",
    )),
    *((host, {}, False) for host in (
        None, "", "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil",
        "127.0.0.2", "10.0.0.7:8000", "localhost:8000:9", "localhost:port", "a@localhost",
        "localhost/", "[::2]", "::1", "127.0.0.1:8000, evil.example",
    )),
    ("cam.example:443", ALLOWED, True), ("[fe80::1]:8000", ALLOWED, True),
    ("other.example", ALLOWED, False), ("192.168.1.7:8000", EVERYWHERE, True),
    ("[fe80::7]:8000", EVERYWHERE, True), ("evil.example:8000", EVERYWHERE, False),
]  # fmt: skip


@pytest.mark.parametrize(("host", "settings", "is_let_in"), HOSTS)
def test_the_server_s_own_names_are_let_in_and_no_others(host, settings, is_let_in):
    if is_let_in:
        rules(**settings).check_host(host)
        return
    with pytest.raises(Refused, match="--allow-host") as refused:
        rules(**settings).check_host(host)
    assert (refused.value.status, refused.value.kind) == (400, "HostError")


OWN = "localhost:8000"
ORIGINS = [
    (None, OWN, True), ("http://localhost:8000", OWN, True),
    ("http://LOCALHOST:9000", "localhost:9000", True), ("http://localhost", "localhost:80", True),
    ("https://localhost:443", "localhost", True), ("https://cam.example", "127.0.0.1:8000", True),
    ("https://cam.example:8443", "127.0.0.1:8000", True),
    *((origin, OWN, False) for origin in (
        "http://evil.example", "http://localhost:3000", "http://localhost", "null", "", "*",
        "file://", "http://localhost:8000.evil.example", "http://localhost:8000@evil.example",
        "http://localhost:8000/", "ftp://localhost:8000",
    )),
]  # fmt: skip


@pytest.mark.parametrize(("origin", "host", "is_let_in"), ORIGINS)
def test_the_server_s_own_page_may_ask_and_no_other(origin, host, is_let_in):
    if is_let_in:
        rules(**ALLOWED).check_origin(origin, host)
        return
    with pytest.raises(Refused) as refused:
        rules(**ALLOWED).check_origin(origin, host)
    assert (refused.value.status, refused.value.close_code) == (403, 4403)


TOKENS = [
    *(({"authorization": text}, True) for text in (f"Bearer {TOKEN}", f"bearer {TOKEN}")),
    ({"protocols": ["zsseg.v1", f"token.{TOKEN}"]}, True),
    ({"query": f"token={TOKEN}".encode()}, True),
    *(({"authorization": text}, False) for text in (
        None, "", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer ",
        "Bearer \xff\u20ac",
    )),
    *(({"protocols": [text]}, False) for text in (TOKEN, "token.")),
    *(({"query": text}, False) for text in (b"token=", b"other=1&token=%ff")),
]  # fmt: skip


@pytest.mark.parametrize(("shown", "is_let_in"), TOKENS)
def test_who_shows_the_token_is_let_in_and_the_refusal_does_not_tell_it(shown, is_let_in):
    shown = {"authorization": None} | shown
    if is_let_in:
        rules(token=TOKEN).check_token(**shown)
        return
    with pytest.raises(Refused) as refused:
        rules(token=TOKEN).check_token(**shown)
    assert (refused.value.status, refused.value.close_code) == (401, 4401)
    assert TOKEN not in str(refused.value)


def test_no_representation_holds_the_token():
    settings = ServerSettings(token=TOKEN)
    assert TOKEN not in repr(settings)
    assert TOKEN not in repr(AccessRules.of(settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"host": host}, "token") for host in ("0.0.0.0", "::", "192.0.2.1")),
        *(({"token": text}, "token") for text in ("short", "spaces are no part of it", "x" * 129)),
        *(({"allowed_hosts": (name,)}, "allow-host")
          for name in ("http://cam.example", "cam.example:80")),
        *(({"proxies": (network,)}, "proxy")
          for network in ("", "proxy.example", "10.0.0.7/24", "10.0.0.0/33", "fd00::1/8")),
        *(({"stale_seconds": seconds}, "stale-after") for seconds in (0.0, float("nan"))),
        *(({"host": host}, "host") for host in ("", "no such host")),
    ],
)  # fmt: skip
def test_settings_outside_their_range_are_refused(settings, message):
    with refused(ArgumentError, message):
        ServerSettings(**settings)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.3", "localhost", "::1"])
def test_this_machine_needs_no_token_and_others_one(host):
    assert ServerSettings(host=host).token is None
    assert ServerSettings(host="192.0.2.1", token=TOKEN).host == "192.0.2.1"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_wildcard_of_ipv6_takes_ipv4_too():
    with listen("::", 0) as listener:
        port = listener.getsockname()[1]
        for address in ("127.0.0.1", "::1"):
            with socket.create_connection((address, port), timeout=30):
                listener.accept()[0].close()


def test_the_policy_lets_the_page_s_own_style_and_script_run_and_nothing_else():
    html, policy = load_page()
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
