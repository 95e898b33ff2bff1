"""Command lines from dataclasses, for every program: `--help` from the docstrings, one-sentence errors with exit code 2."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

import tyro

C = TypeVar("C")


def main(program: Callable[[C], object], config: type[C] | Mapping[str, C], description: str) -> None:
    """Run a program: a config class becomes flags, a mapping becomes presets to choose from (each with flags).

    A ValueError or an output that cannot be written is the user's: one sentence on stderr, exit code 2.
    """
    values = _parse(config, description)
    try:
        program(values)
    except (ValueError, FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        _exit(str(error))


def _parse(config: type[C] | Mapping[str, C], description: str) -> C:
    if isinstance(config, Mapping) and len(sys.argv) > 1 and not sys.argv[1].startswith("-") and sys.argv[1] not in config:
        _exit(f"there is no preset {sys.argv[1]!r}; presets are {', '.join(config)}")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            if not isinstance(config, Mapping):
                return tyro.cli(config, description=description)
            presets = {name: (f"{name} preset", value) for name, value in config.items()}
            return tyro.extras.overridable_config_cli(presets, description=description)
    except SystemExit as end:
        if end.code == 2:
            _exit(f"{_sentence(box.getvalue())} (--help lists all options)")
        raise


def _sentence(box: str) -> str:
    """What tyro's framed message of several paragraphs says first, unknown options before missing ones, without options' help."""
    lines = [line.strip("│").rstrip() for line in box.splitlines() if line.startswith("│")]
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip(" ─"):
            paragraphs[-1].append(line)
        elif "─" in line:
            paragraphs.append([])
    chosen = next((paragraph for paragraph in paragraphs if paragraph and "Unrecognized" in paragraph[0]), paragraphs[0])
    text = " ".join(line.strip() for line in chosen if not line.startswith(" " * 9))
    return re.sub(r"^Error parsing (?!--)\S+: ", "", text) or box.strip()


def _exit(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2) from None
