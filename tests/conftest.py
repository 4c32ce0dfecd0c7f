"""What all tests share."""

import os

from lab.programs import search_path

# Where `make programs` put what this machine lacks.
os.environ["PATH"] = search_path()
