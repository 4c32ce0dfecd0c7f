"""Memory of the process: what loading needed and serving doesn't is given back, what batches need again is kept."""

import ctypes
import mmap
import re
from pathlib import Path

# From malloc.h, and the largest that glibc takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_KEPT = 32 << 20
_MOST_KEPT = 256 << 20
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+) *(.*)")


def release_library_pages() -> None:
    """Unmap the pages of libraries that only the loading needed; what is needed again comes back from the page cache.

    PyTorch's libraries are large, and importing them touches most of their pages once. Only mappings that can't be
    written to and have no page of the process's own are touched, since such a page would be lost. To be called before
    the fork, by a process without other threads; where the kernel doesn't tell enough, nothing happens.
    """
    library = ctypes.CDLL(None)
    # Also what loading has freed: as much as the weights, where they were read into a buffer first.
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    try:
        smaps = Path("/proc/self/smaps").read_text(errors="replace")
    except OSError:
        return
    for start, size in _clean_mappings(smaps):
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def keep_batch_memory() -> None:
    """Have malloc keep what a batch has freed for the next one.

    By default it is given back to the kernel after each batch where another than the main thread runs the model, and
    the page faults of taking it again cost a ResNet18 a tenth of its rate. Children inherit this. To be called before
    there are threads.
    """
    library = ctypes.CDLL(None)
    # Not every libc has it; then batches are a little slower.
    if hasattr(library, "mallopt"):
        # Threads get no arenas of their own, which are given back whole whatever the thresholds are.
        library.mallopt(_M_ARENA_MAX, 1)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        library.mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)


def _clean_mappings(smaps: str) -> list[tuple[int, int]]:
    """Address and size in bytes of the read-only mappings of files that hold nothing but what is in the file."""
    found: list[tuple[int, int]] = []
    candidate: tuple[int, int] | None = None
    for line in smaps.splitlines():
        if head := _MAPPING.fullmatch(line):
            start, end, permissions, inode = int(head[1], 16), int(head[2], 16), head[3], int(head[4])
            candidate = (start, end - start) if inode and "w" not in permissions and permissions[3] == "p" else None
        elif candidate and line.startswith("Anonymous:"):
            if int(line.split()[1]) == 0:
                found.append(candidate)
            candidate = None
    return found
