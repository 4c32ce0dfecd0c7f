"""Unpack an archive into a directory, or say in one line on standard error why not: find_bundle.yml calls it.

Arguments: the archive, the directory. Exit status 1 where the archive holds anything but files and directories of its
own, or can't be read to its end. Each member is judged before it is written; what was written until then is the
caller's to remove.
"""

from __future__ import annotations

import errno
import lzma
import sys
import tarfile
import zlib
from pathlib import Path

_PIECE_BYTES = 1 << 20
_UNREADABLE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)


def unpack(archive: Path, directory: Path) -> None:
    """Raises ValueError with a whole sentence."""
    member = ""
    try:
        with tarfile.open(archive) as opened:
            for about in opened:
                member = about.name
                _judge(archive, about)
                _write(archive, opened, about, directory)
            # Behind its last member an archive has zeros, and then the checksum of all that was compressed.
            while piece := opened.fileobj.read(_PIECE_BYTES):
                if piece.strip(b"\0"):
                    raise tarfile.ReadError("something else follows")
    except (*_UNREADABLE, OSError) as error:
        # gzip and bz2 report damage as an OSError of their own.
        if not member:
            raise ValueError(f"{archive} can't be read to its end: it isn't an archive of tar's, or damaged") from None
        raise ValueError(
            f"{archive} can't be read to its end: it is damaged or cut off at its member {member!r} or behind it "
            f"({' '.join(str(error).split())}); copy it again"
        ) from None


def _judge(archive: Path, about: tarfile.TarInfo) -> None:
    if about.name.startswith("/"):
        fault = "has an absolute name"
    elif ".." in about.name.split("/"):
        fault = "has '..' in its name"
    elif about.issym() or about.islnk():
        fault = "is a link (tar --dereference --hard-dereference packs what it leads to)"
    elif not (about.isreg() or about.isdir()):
        fault = "is neither a file nor a directory"
    else:
        return
    raise ValueError(f"{archive} can't be a bundle: its member {about.name!r} {fault}; nothing of it is used")


def _write(archive: Path, opened: tarfile.TarFile, about: tarfile.TarInfo, directory: Path) -> None:
    # No way leads out of the directory: no link is ever written, and the names are judged.
    target = directory / about.name
    try:
        (target if about.isdir() else target.parent).mkdir(parents=True, exist_ok=True)
        # Without a buffer: what a full disk doesn't take is told by the write itself.
        file = None if about.isdir() else target.open("wb", buffering=0)
    except (OSError, ValueError) as error:
        raise _unwritable(archive, about, directory, error) from None
    if file is None:
        return
    with file, opened.extractfile(about) as source:
        while piece := source.read(_PIECE_BYTES):
            try:
                while piece:
                    piece = piece[file.write(piece) :]
            except OSError as error:
                raise _unwritable(archive, about, directory, error) from None


def _unwritable(archive: Path, about: tarfile.TarInfo, directory: Path, error: Exception) -> ValueError:
    reason = getattr(error, "strerror", None) or error
    if getattr(error, "errno", None) == errno.ENOSPC:
        reason = f"{reason}; free some space there, or set TMPDIR to another place for it"
    return ValueError(f"{archive} can't be unpacked to {directory}: its member {about.name!r}: {reason}")


if __name__ == "__main__":
    try:
        unpack(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as fault:
        sys.exit(str(fault))
