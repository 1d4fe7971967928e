"""What ``/healthz`` says: whether frames are labelled, and of which sources."""

from __future__ import annotations

from typing import Any

from zsseg_rt.server.hub import Hub


def describe_health(
    hub: Hub, *, stale_seconds: float, strict: bool, with_names: bool
) -> tuple[bool, dict[str, Any]]:
    """Whether the server does its work, and why not.

    A source is dead if no frame of it was labelled for ``stale_seconds``, unless it is a recording
    that came to its end.
    """
    sources: list[dict[str, Any]] = []
    silences = hub.silences()
    for number, (name, stats) in enumerate(hub.stream.stats().items(), 1):
        since = silences[name]
        has_ended = stats.state == "ended" and stats.error is None
        sources.append({
            "source": name if with_names else number,
            "state": stats.state,
            "seconds_since_frame": since and round(since, 3),
            "dead": (since is None or since > stale_seconds) and not has_ended,
        })  # fmt: skip
    newest = hub.seconds_since_frame()
    reason = _why_failing(newest, stale_seconds)
    dead = sum(source["dead"] for source in sources)
    is_well = reason is None and not (strict and dead)
    if reason is None and dead:
        reason = f"{dead} of {len(sources)} sources give no frames"
    return is_well, {
        "status": "failing" if not is_well else "degraded" if dead else "ok",
        "reason": reason,
        "seconds_since_frame": newest and round(newest, 3),
        "sources": sources,
    }


def _why_failing(since: float | None, stale_seconds: float) -> str | None:
    if since is None:
        return "no frame has been labelled yet"
    if since > stale_seconds:
        return f"no frame was labelled for {since:.0f} s"
    return None
