"""How the engine's own requests are told from those of clients: by a word in their ids that nobody else knows.

The word is made once per boot. A client may begin its ids with `appliance-`, too, but never with this.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from pathlib import Path

from rollout import files

_WORD = re.compile(r"[0-9a-f]{16}")


@functools.cache
def of(directory: Path) -> str:
    """What the ids of all of the engine's own requests begin with; `directory` is the one that each boot empties.

    Raises nothing: where the word can't be had, which takes root, it is one of this process's own. Then its requests
    count as clients'.
    """
    path = directory / "request-mark"
    word = _read(path)
    if word is None and os.geteuid() == 0:
        with contextlib.suppress(OSError):
            word = _make(path)
    return f"appliance-{word or _new()}-"


def _new() -> str:
    return os.urandom(8).hex()


def _read(path: Path) -> str | None:
    content = files.read_untrusted(path)
    text = content.decode(errors="replace").strip() if content else ""
    return text if _WORD.fullmatch(text) else None


def _make(path: Path) -> str | None:
    """Write a new word, unless another process was faster: not every command holds the lock. Raises OSError."""
    temporary = path.parent / f".{path.name}.{_new()}"
    files.write_new(temporary, _new().encode() + b"\n", 0o600)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        if _read(path) is None:
            os.rename(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return _read(path)
