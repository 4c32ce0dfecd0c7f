"""Settings, all from environment variables named ``MODEL_*``."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_COLOURS = ("blue", "green", "none")
# sun_path holds 108 bytes, the closing zero included.
_LONGEST_SOCKET_PATH = 107


class ConfigError(ValueError):
    """A setting that can't be used; the message names the variable, its value and what is accepted."""


@dataclass(frozen=True)
class JobsConfig:
    """The settings of jobs. Sizes are in bytes, times in seconds."""

    directory: Path
    limit: int
    attempts: int
    keep_seconds: int
    longest_seconds: int
    max_bytes: int

    @property
    def file(self) -> Path:
        """The SQLite database."""
        return self.directory / "jobs.db"


@dataclass(frozen=True)
class Config:
    """The settings of one container. Sizes are in bytes, times in seconds."""

    colour: str
    release: str
    workers: int
    bundle_dir: Path
    socket_dir: Path
    max_body_bytes: int
    queue_limit: int
    drain_seconds: int
    hang_seconds: int
    host: str
    port: int | None
    cors_origins: tuple[str, ...]
    # Whether the log has what exceptions say of requests, which may hold parts of inputs.
    log_error_messages: bool
    # None where there are no jobs.
    jobs: JobsConfig | None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Config":
        """Read the settings; an unset or empty variable takes its default. Raises ConfigError."""
        colour = environ.get("MODEL_COLOUR") or "none"
        if colour not in _COLOURS:
            raise ConfigError(f"MODEL_COLOUR is {colour!r}; it must be one of {', '.join(_COLOURS)}")
        config = cls(
            colour=colour,
            release=environ.get("MODEL_RELEASE") or "",
            workers=_whole(environ, "MODEL_WORKERS", min(64, len(os.sched_getaffinity(0))), 1, 64),
            bundle_dir=Path(environ.get("MODEL_BUNDLE_DIR") or "/bundle"),
            socket_dir=Path(environ.get("MODEL_SOCKET_DIR") or "/run/appliance"),
            max_body_bytes=_whole(environ, "MODEL_MAX_BODY_BYTES", 8_388_608, 1, 1 << 30),
            queue_limit=_whole(environ, "MODEL_QUEUE_LIMIT", 128, 1, 100_000),
            drain_seconds=_whole(environ, "MODEL_DRAIN_SECONDS", 25, 0, 3600),
            hang_seconds=_whole(environ, "MODEL_HANG_SECONDS", 60, 1, 3600),
            host=environ.get("MODEL_HOST") or "127.0.0.1",
            port=_whole(environ, "MODEL_PORT", 0, 1, 65535) if environ.get("MODEL_PORT") else None,
            cors_origins=tuple((environ.get("MODEL_CORS_ORIGINS") or "").replace(",", " ").split()),
            log_error_messages=_whole(environ, "MODEL_LOG_ERROR_MESSAGES", 0, 0, 1) == 1,
            jobs=_jobs(environ),
        )
        longest = os.fsencode(config.worker_socket(config.workers - 1))
        if len(longest) > _LONGEST_SOCKET_PATH:
            raise ConfigError(
                f"MODEL_SOCKET_DIR is {config.socket_dir}; socket paths in it are longer than "
                f"{_LONGEST_SOCKET_PATH} bytes, choose a shorter directory"
            )
        return config

    @property
    def control_socket(self) -> Path:
        """Where health and metrics are answered."""
        return self.socket_dir / "control.sock"

    @property
    def startup_error_file(self) -> Path:
        """Where the reason goes when a bundle is rejected."""
        return self.socket_dir / "startup_error.json"

    def worker_socket(self, index: int) -> Path:
        """Where worker ``index`` (from 0) answers predictions."""
        return self.socket_dir / f"worker-{index}.sock"


def _jobs(environ: Mapping[str, str]) -> JobsConfig | None:
    if not environ.get("MODEL_JOBS_DIR"):
        return None
    return JobsConfig(
        directory=Path(environ["MODEL_JOBS_DIR"]),
        limit=_whole(environ, "MODEL_JOBS_LIMIT", 1000, 1, 10_000),
        attempts=_whole(environ, "MODEL_JOBS_ATTEMPTS", 3, 1, 100),
        keep_seconds=_whole(environ, "MODEL_JOBS_KEEP_SECONDS", 86_400, 1, 31_536_000),
        longest_seconds=_whole(environ, "MODEL_JOBS_LONGEST_SECONDS", 3600, 1, 86_400),
        max_bytes=_whole(environ, "MODEL_JOBS_MAX_BYTES", 1 << 30, 1, 1 << 40),
    )


def _whole(environ: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = environ.get(name) or str(default)
    # isascii too: int() would also take digits of other scripts.
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise ConfigError(f"{name} is {text!r}; it must be a whole number from {low} to {high}")
    return int(text)
