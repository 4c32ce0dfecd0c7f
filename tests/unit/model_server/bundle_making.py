"""What tests need to make and change bundles."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "bundles" / "simplemodel"


def write_sums(directory: Path) -> None:
    """Write a right SHA256SUMS for what is in ``directory``."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(directory)}\n" for path in files]
    (directory / "SHA256SUMS").write_text("".join(lines))
