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


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LocalHost:9", "127.0.0.1:8000", "[::1]:8000", "[::1]"]
)
def test_names_of_this_machine_are_let_in(host):
    rules().check_host(host)


@pytest.mark.parametrize(
    "host",
    [
        None, "", "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil",
        "127.0.0.2", "10.0.0.7:8000", "localhost:8000:9", "localhost:port", "a@localhost",
        "localhost/", "[::2]", "::1", "127.0.0.1:8000, evil.example",
    ],
)  # fmt: skip
def test_other_names_are_refused(host):
    with pytest.raises(Refused, match="--allow-host") as refused:
        rules().check_host(host)
    assert (refused.value.status, refused.value.kind) == (400, "HostError")


def test_a_proxy_s_name_is_let_in_once_it_is_allowed():
    allowed = rules(allowed_hosts=("Cam.example", "[fe80::1]"))
    allowed.check_host("cam.example:443")
    allowed.check_host("[fe80::1]:8000")
    with pytest.raises(Refused):
        allowed.check_host("other.example")


def test_on_all_addresses_any_number_is_a_name_but_no_other_site_s():
    everywhere = rules(host="0.0.0.0", token=TOKEN)
    everywhere.check_host("192.168.1.7:8000")
    everywhere.check_host("[fe80::7]:8000")
    with pytest.raises(Refused):
        everywhere.check_host("evil.example:8000")


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (None, "localhost:8000"),
        ("http://localhost:8000", "localhost:8000"),
        ("http://LOCALHOST:9000", "localhost:9000"),
        ("http://localhost", "localhost:80"),
        ("https://localhost:443", "localhost"),
        ("https://cam.example", "127.0.0.1:8000"),
        ("https://cam.example:8443", "127.0.0.1:8000"),
    ],
)
def test_the_server_s_own_page_may_ask(origin, host):
    rules(allowed_hosts=("cam.example",)).check_origin(origin, host)


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example", "http://localhost:3000", "http://localhost", "null", "", "*",
        "file://", "http://localhost:8000.evil.example", "http://localhost:8000@evil.example",
        "http://localhost:8000/", "ftp://localhost:8000",
    ],
)  # fmt: skip
def test_other_pages_may_not(origin):
    with pytest.raises(Refused) as refused:
        rules().check_origin(origin, "localhost:8000")
    assert (refused.value.status, refused.value.close_code) == (403, 4403)


@pytest.mark.parametrize(
    "shown",
    [
        {"authorization": f"Bearer {TOKEN}"},
        {"authorization": f"bearer {TOKEN}"},
        {"authorization": None, "protocols": ["zsseg.v1", f"token.{TOKEN}"]},
        {"authorization": None, "query": f"token={TOKEN}".encode()},
    ],
)
def test_the_token_is_accepted(shown):
    rules(token=TOKEN).check_token(**shown)


@pytest.mark.parametrize(
    "shown",
    [
        {"authorization": None},
        {"authorization": ""},
        {"authorization": TOKEN},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer \xff\u20ac"},
        {"authorization": None, "protocols": [TOKEN]},
        {"authorization": None, "protocols": ["token."]},
        {"authorization": None, "query": b"token="},
        {"authorization": None, "query": b"other=1&token=%ff"},
    ],
)
def test_anything_else_is_not_and_the_refusal_does_not_tell_it(shown):
    with pytest.raises(Refused) as refused:
        rules(token=TOKEN).check_token(**shown)
    assert (refused.value.status, refused.value.close_code) == (401, 4401)
    assert TOKEN not in str(refused.value)


def test_no_representation_holds_the_token():
    settings = ServerSettings(token=TOKEN)
    assert TOKEN not in repr(settings)
    assert TOKEN not in repr(AccessRules.of(settings))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_others_need_a_token_and_the_error_says_how_to_get_one(host):
    with refused(ArgumentError, "token"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, token=TOKEN).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.3", "localhost", "::1"])
def test_this_machine_needs_none(host):
    assert ServerSettings(host=host).token is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token": "short"}, "token"),
        ({"token": "spaces are no part of it"}, "token"),
        ({"token": "x" * 129}, "token"),
        ({"allowed_hosts": ("http://cam.example",)}, "allow-host"),
        ({"allowed_hosts": ("cam.example:80",)}, "allow-host"),
        ({"stale_seconds": 0.0}, "stale-after"),
        ({"stale_seconds": float("nan")}, "stale-after"),
        ({"host": ""}, "host"),
        ({"host": "no such host"}, "host"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with refused(ArgumentError, message):
        ServerSettings(**settings)


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


@pytest.mark.parametrize(
    "network", ["", "proxy.example", "10.0.0.7/24", "10.0.0.0/33", "fd00::1/8"]
)
def test_a_proxy_is_an_address_or_a_network(network):
    with refused(ArgumentError, "proxy"):
        ServerSettings(proxies=(network,))
