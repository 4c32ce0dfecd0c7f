"""``python -m model_server.serve BUNDLE``: serve a bundle on a TCP port of this machine, without Docker."""

import argparse
import os
import sys
import tempfile

from model_server.__main__ import main as serve


def main() -> int:
    """Serve until Ctrl+C; the exit status is the service's own."""
    parser = argparse.ArgumentParser(
        prog="python -m model_server.serve",
        description="Serve a bundle on a TCP port of this machine, with the code that the host runs.",
        epilog="Further settings are environment variables, as in the container: MODEL_QUEUE_LIMIT=64 and so on.",
    )
    parser.add_argument("bundle", help="directory of the bundle")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="TCP port (%(default)s)")
    parser.add_argument("--workers", type=int, help="worker processes (as many as there are cores)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="model-") as sockets:
        os.environ |= {
            "MODEL_BUNDLE_DIR": given.bundle,
            "MODEL_HOST": given.host,
            "MODEL_PORT": str(given.port),
            "MODEL_SOCKET_DIR": sockets,
        }
        if given.workers is not None:
            os.environ["MODEL_WORKERS"] = str(given.workers)
        print(
            f"http://{given.host}:{given.port}/docs shows what can be asked once it is ready; Ctrl+C ends it.",
            flush=True,
        )
        return serve()


if __name__ == "__main__":
    # Where this was called from is no place to import a model's modules from: the host hasn't got it.
    if not sys.flags.safe_path:
        del sys.path[0]
    sys.exit(main())
