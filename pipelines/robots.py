"""X-Robots-Tag: how a site says in an answer's headers that an image is not to be used, to all or to one that it names."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.source_contract import FetchConfig

WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
"""Directives that are followed by a colon, as the name of a robot is."""


def opted_out(headers: Sequence[str], config: FetchConfig) -> str | None:
    """The header that says no to all or to `config.user_agent`, if there is one.

    A header is a list of directives between commas; `name: ` before one addresses it, and those after it, to that robot.
    """
    refused = {directive.strip().lower() for directive in config.opt_out}
    for header in headers:
        addressed = True
        for part in header.lower().split(","):
            name, colon, rest = part.partition(":")
            directive = part
            if colon and name.strip() not in WITH_VALUE:
                addressed, directive = name.strip() in ("*", config.user_agent.lower()), rest
            if addressed and directive.strip() in refused:
                return header
    return None
