"""Pages that are given back come back, and none that the process has changed is lost."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

SERVICE = Path(__file__).resolve().parents[3] / "service"
PAGES = 64
SIZE = PAGES * mmap.PAGESIZE

# In a process of its own: the function is for processes without threads.
SCRIPT = """
import ctypes, mmap, re, sys
from pathlib import Path
from model_server.memory import release_library_pages

PATH, changed = sys.argv[1], sys.argv[2] == "changed"
file = open(PATH, "rb")
library = ctypes.CDLL(None, use_errno=True)
library.mmap.restype = ctypes.c_void_p
library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
size = Path(PATH).stat().st_size
address = library.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, file.fileno(), 0)
if changed:
    ctypes.memmove(address, b"changed", 7)
assert library.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.PROT_READ) == 0
before = ctypes.string_at(address, size)

def resident():
    text = Path("/proc/self/smaps").read_text()
    part = text[text.index(PATH):]
    return int(re.search(r"^Rss: +([0-9]+) kB", part, re.MULTILINE)[1]) * 1024

touched = resident()
release_library_pages()
left = resident()
assert ctypes.string_at(address, size) == before
print(touched, left)
"""


@pytest.mark.parametrize("state", ["clean", "changed"])
def test_pages_are_given_back_unless_they_were_changed(tmp_path, state):
    path = tmp_path / "library"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    environment = {**os.environ, "PYTHONPATH": str(SERVICE)}
    command = [sys.executable, "-c", SCRIPT, str(path), state]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    touched, left = map(int, done.stdout.split())
    assert touched == SIZE
    assert left == (0 if state == "clean" else SIZE)


FAULTS = """
import resource, sys, threading
from model_server.memory import keep_batch_memory
import torch
torch.set_num_threads(1)

if "kept" in sys.argv:
    keep_batch_memory()

def batches():
    for number in range(60):
        # 30 and 5 MiB: together more than malloc keeps by itself.
        kept = [torch.ones(size << 18) for size in (30, 5)]
        del kept
        if number == 9:
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

faults = []
thread = threading.Thread(target=batches)
thread.start()
thread.join()
print(faults[1] - faults[0])
"""


def test_a_batch_gets_the_memory_of_the_one_before():
    def faults(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(SERVICE)}
        command = [sys.executable, "-W", "ignore", "-c", FAULTS, *arguments]
        return int(subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout)

    assert faults("kept") * 10 < faults()
