"""Bundles on the host: checksums, and examples with their comparison."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from rollout.errors import Refused
from rollout.text import tidy

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,62}")
SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


class Bundle(NamedTuple):
    """A bundle whose checksums were right when it was looked at."""

    directory: Path
    name: str
    version: str
    digest: str
    """`sha256:` and the SHA-256 of the file SHA256SUMS."""


class Example(NamedTuple):
    """A request with the answer that it must have; `tolerance` is absolute."""

    request: Any
    response: Any
    tolerance: float


def verify(root: Path, directory: Path) -> Bundle:
    """Check that `directory` is `<root>/<name>/<version>` and holds exactly what its SHA256SUMS lists.

    Raises Refused with the first thing that is wrong.
    """
    directory = Path(os.path.abspath(directory))
    if directory.parent.parent != Path(os.path.abspath(root)):
        raise Refused(f"the bundle {directory} isn't a directory {root}/<name>/<version>: install it there first")
    name, version = directory.parent.name, directory.name
    if not NAME.fullmatch(name) or not VERSION.fullmatch(version):
        raise Refused(f"the bundle {directory}: {name}/{version} isn't a valid name and version")
    title = f"bundle {name} {version}"
    for path in (directory.parent, directory):
        if path.is_symlink():
            raise Refused(f"{title}: {path} is a symbolic link; a bundle must be a real directory")
    if not directory.is_dir():
        raise Refused(f"{title}: {directory} doesn't exist: install the bundle first")
    sums, digest = _read_sums(title, directory)
    found = set(_regular_files(title, directory))
    found.discard(SUMS)
    for path in sorted(found - sums.keys()):
        raise Refused(f"{title}: {path} isn't listed in {SUMS}: make the bundle again")
    for path in sorted(sums.keys() - found):
        raise Refused(f"{title}: {path} is listed in {SUMS} and missing: install the bundle again")
    for path, wanted in sorted(sums.items()):
        _check_sum(title, directory, path, wanted)
    return Bundle(directory, name, version, digest)


def load_examples(directory: Path, digest: str) -> list[Example]:
    """Read the examples of the bundle with `digest`; at least one. Raises Refused."""
    title = f"bundle {directory.parent.name} {directory.name}"
    sums, actual = _read_sums(title, directory)
    if actual != digest:
        raise Refused(f"{title}: {directory / SUMS} has changed since the release was made: install the bundle again")
    if "examples.json" not in sums:
        raise Refused(f"{title}: no examples.json, so nothing can be checked: add examples to the bundle")
    _check_sum(title, directory, "examples.json", sums["examples.json"])
    try:
        entries = json.loads((directory / "examples.json").read_bytes())["examples"]
        examples = [Example(e["request"], e["response"], float(e.get("tolerance", 0.0))) for e in entries]
    except OSError as error:
        raise Refused(f"{title}: {directory}/examples.json: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{title}: examples.json can't be used: {type(error).__name__}: {error}") from None
    if not examples:
        raise Refused(f"{title}: examples.json holds no example, so nothing can be checked: add one")
    return examples


def difference(wanted: Any, got: Any, tolerance: float, where: str = "response") -> str | None:
    """The first place where `got` isn't `wanted`, in words, or None. Numbers may differ by `tolerance`."""
    if _is_number(wanted) and _is_number(got):
        # Equal infinities have no difference to compare; a NaN reproduces nothing.
        if wanted == got or abs(wanted - got) <= tolerance:
            return None
        return f"{where} is {got!r} instead of {wanted!r} (tolerance {tolerance:g})"
    if isinstance(wanted, dict) and isinstance(got, dict):
        if wanted.keys() != got.keys():
            return tidy(f"{where} has the keys {sorted(got)} instead of {sorted(wanted)}", 300)
        pairs = [(f"{where}.{key}", wanted[key], got[key]) for key in wanted]
    elif isinstance(wanted, list) and isinstance(got, list):
        if len(wanted) != len(got):
            return f"{where} has {len(got)} entries instead of {len(wanted)}"
        pairs = [(f"{where}[{i}]", one, two) for i, (one, two) in enumerate(zip(wanted, got, strict=True))]
    elif type(wanted) is type(got) and wanted == got:
        return None
    else:
        return tidy(f"{where} is {got!r} instead of {wanted!r}", 300)
    for inner, one, two in pairs:
        found = difference(one, two, tolerance, inner)
        if found:
            return found
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_sums(title: str, directory: Path) -> tuple[dict[str, str], str]:
    path = directory / SUMS
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise Refused(f"{title}: {path} isn't a regular file")
        content = path.read_bytes()
        lines = content.decode().splitlines()
    except OSError as error:
        raise Refused(f"{title}: {path}: {error.strerror}: install the bundle again") from None
    except UnicodeDecodeError:
        raise Refused(f"{title}: {path} isn't text in UTF-8") from None
    # Loaded only where a bundle is read: a rollback reads none.
    import hashlib

    sums: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if not match:
            raise Refused(f"{title}: {SUMS} line {number} isn't '<sha256>  <file>': {tidy(line, 100)!r}")
        pure = PurePosixPath(match[2])
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise Refused(f"{title}: {SUMS} line {number} names {tidy(match[2], 100)!r}, which is outside the bundle")
        if str(pure) in sums:
            raise Refused(f"{title}: {SUMS} lists {pure} twice")
        sums[str(pure)] = match[1]
    return sums, "sha256:" + hashlib.sha256(content).hexdigest()


def _regular_files(title: str, directory: Path) -> list[str]:
    found = []

    def fail(error: OSError) -> None:
        raise error

    for parent, directories, names in os.walk(directory, onerror=fail):
        for name in directories + names:
            path = Path(parent) / name
            mode = os.lstat(path).st_mode
            relative = str(path.relative_to(directory))
            if stat.S_ISREG(mode):
                found.append(relative)
            elif not stat.S_ISDIR(mode):
                raise Refused(f"{title}: {tidy(relative, 100)} is a link or a special file; only regular files belong")
    return found


def _check_sum(title: str, directory: Path, path: str, wanted: str) -> None:
    import hashlib

    try:
        # Looked at again without following links: examples are read at every swap, long after `verify`.
        if not stat.S_ISREG(os.lstat(directory / path).st_mode):
            raise Refused(f"{title}: {path} isn't a regular file")
        with (directory / path).open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"{title}: {path}: {error.strerror}: install the bundle again") from None
    if actual != wanted:
        raise Refused(
            f"{title}: {path} doesn't match its checksum (sha256 {actual[:12]}…, {SUMS} says {wanted[:12]}…): "
            f"install the bundle again"
        )
