"""The page, and the policy under which browsers run it."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib import resources

from zsseg_rt.errors import SourceError


@dataclass(frozen=True, kw_only=True)
class Page:
    """The page.

    Attributes:
        html: All of it.
        policy: Its Content-Security-Policy: nothing runs but its own script and style, and nothing
            is loaded from elsewhere.
    """

    html: str
    policy: str


def load_page() -> Page:
    """Read the page that ships with the package."""
    try:
        html = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SourceError(
            f"page.html: expected it to ship with the package: {exc}. Install again."
        ) from exc
    return Page(html=html, policy=policy_for(html))


def policy_for(html: str) -> str:
    """The Content-Security-Policy of a page."""
    hashes = {}
    for tag in ("style", "script"):
        found = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        if len(found) != 1:
            raise SourceError(f"page.html: expected one <{tag}>, got {len(found)}")
        digest = hashlib.sha256(found[0].encode()).digest()
        hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
