"""Print what a delivery must know of the bundle in a directory as JSON, or say what is wrong: check.yml calls it.

Exit status 1, and one line on standard error that names the file and the field, where they can't be told.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

# Far more than a manifest or the checksums of many files need.
LARGEST_BYTES = 4 << 20
# What file systems give to files.
_BLOCK_BYTES = 4096

# Both become a path on the host.
FIELDS = {
    "name": (r"[A-Za-z][A-Za-z0-9_-]{0,62}", "letters, digits, hyphens and underscores, beginning with a letter"),
    "version": (
        r"[0-9A-Za-z][0-9A-Za-z.+-]{0,62}",
        "letters, digits, dots, plus signs and hyphens, in quotes where it looks like a number",
    ),
}


def describe(directory: Path) -> dict[str, Any]:
    """The bundle's name, version, the SHA-256 of its SHA256SUMS, and its size and that of its largest file on a disk.

    Raises ValueError with a whole sentence.
    """
    manifest, sums = directory / "manifest.yaml", directory / "SHA256SUMS"
    text = _read(manifest, "a bundle has its manifest there: docs/ml-engineers.md")
    try:
        fields = yaml.safe_load(text)
    # ValueError: what looks like a date and isn't one.
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{manifest} isn't valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        shown = json.dumps(fields, default=str)[:100]
        raise ValueError(f"{manifest} must hold fields such as 'name: simplemodel', not {shown}")
    found = {}
    for field, (pattern, words) in FIELDS.items():
        if fields.get(field) is None:
            raise ValueError(f"{manifest}: {field} is missing: it must be {words}")
        value = fields[field]
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f"{manifest}: {field} must be {words}; it is {json.dumps(value, default=str)[:100]}")
        found[field] = value
    # Not with this directory, which may be what an archive was unpacked to for a moment.
    text = _read(sums, '`make bundle ARGS="sums DIRECTORY"` writes it, for the directory that the bundle was made in')
    sizes = list(_sizes(directory))
    return found | {"digest": hashlib.sha256(text.encode()).hexdigest(), "size": sum(sizes), "largest": max(sizes)}


def _sizes(directory: Path) -> Iterator[int]:
    """What each file takes on a disk, in bytes."""
    for parent, _, names in os.walk(directory):
        for name in names:
            yield -(-os.lstat(os.path.join(parent, name)).st_size // _BLOCK_BYTES) * _BLOCK_BYTES


def _read(path: Path, advice: str) -> str:
    try:
        # Nothing is read through a link: it may lead to a file of the controller, and what is wrong with that would be
        # shown. Nor is a pipe waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError(f"{path} must be a regular file")
            # Not as text: the digest is of the bytes as they are.
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(LARGEST_BYTES + 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {advice}") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} must be a regular file; it is a link") from None
        raise ValueError(f"{path} can't be read: {error.strerror}") from None
    if len(content) > LARGEST_BYTES:
        raise ValueError(f"{path} is larger than {LARGEST_BYTES >> 20} MiB: {advice}")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} isn't text in UTF-8: {advice}") from None


if __name__ == "__main__":
    try:
        print(json.dumps(describe(Path(sys.argv[1]))))
    except ValueError as fault:
        sys.exit(str(fault))
