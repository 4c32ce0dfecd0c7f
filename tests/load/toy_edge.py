#!/usr/bin/env python3
"""A real nginx in front of two toy colours, without Docker or root, to prove the load client by itself.

It switches as the appliance does (flag files behind one link that is renamed into place) and understands the three
commands that the load tests send to a host:

    python toy_edge.py serve DIR --port 18480 &
    pytest tests/load --appliance-url http://127.0.0.1:18480 --host-command "python tests/load/toy_edge.py on DIR"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

COLOURS = ("blue", "green")
CONFIGURATION = """
daemon off;
{user}
worker_processes 2;
pid {dir}/nginx.pid;
error_log {dir}/error.log notice;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    upstream blue {{ server unix:{dir}/blue.sock; keepalive 32; keepalive_timeout 60s; }}
    upstream green {{ server unix:{dir}/green.sock; keepalive 32; keepalive_timeout 60s; }}
    server {{
        listen 127.0.0.1:{port};
        keepalive_requests 1000000;
        location = /predict {{
            set $colour "";
            if (-f {dir}/routing/current/blue) {{ set $colour blue; }}
            if (-f {dir}/routing/current/green) {{ set $colour green; }}
            if ($colour = "") {{ return 503; }}
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_pass http://$colour;
        }}
    }}
}}
"""


async def answer_as(colour: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A model of 3 ms, and of 100 ms for one request in fifty so that some are in flight at any switch."""
    body = b'{"output": 0.65}'
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    await reader.readexactly(int(line.split(b":")[1]))
            await asyncio.sleep(0.1 if random.random() < 0.02 else 0.003)
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Model-Version: 1.0.0\r\n"
                b"X-Model-Colour: %s\r\nContent-Length: %d\r\n\r\n%s" % (colour.encode(), len(body), body)
            )
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


def switch(directory: Path, to: str) -> float:
    """Make `to` live by one rename; the wall-clock instant of it, in epoch seconds."""
    routing = directory / "routing"
    number = 1 + max((int(path.name) for path in (routing / "states").iterdir()), default=0)
    state = routing / "states" / str(number)
    state.mkdir()
    (state / to).touch()
    link = routing / "current.new"
    link.symlink_to(f"states/{number}")
    instant = time.time()
    link.rename(routing / "current")
    return instant


def live_colour(directory: Path) -> str:
    return next(colour for colour in COLOURS if (directory / "routing" / "current" / colour).exists())


async def serve(directory: Path, port: int) -> int:
    """Run until a signal comes; exit status of nginx."""
    shutil.rmtree(directory / "routing", ignore_errors=True)
    (directory / "routing" / "states").mkdir(parents=True)
    switch(directory, COLOURS[0])
    # nginx gives its workers another user only when it runs as root, and they have to reach the sockets.
    user = "user root;" if os.geteuid() == 0 else ""
    configuration = directory / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(dir=directory, port=port, user=user))
    servers = []
    for colour in COLOURS:
        path = directory / f"{colour}.sock"
        path.unlink(missing_ok=True)
        servers.append(await asyncio.start_unix_server(lambda r, w, c=colour: answer_as(c, r, w), path))
    nginx = await asyncio.create_subprocess_exec("nginx", "-p", str(directory), "-c", str(configuration))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, nginx.terminate)
    return await nginx.wait()


def on(directory: Path, words: list[str]) -> int:
    """Stand in for the host: `sudo appliance status|swap --json` and a reload of nginx."""
    if words[-2:] == ["reload", "nginx"] or words[-3:] == ["nginx", "-s", "reload"]:
        os.kill(int((directory / "nginx.pid").read_text()), signal.SIGHUP)
        return 0
    live = live_colour(directory)
    idle = COLOURS[1 - COLOURS.index(live)]
    if "status" in words:
        ready = {colour: {"status": "ready"} for colour in COLOURS}
        print(json.dumps({"ok": True, "changed": False, "message": "", "live": live, "idle": idle, "colours": ready}))
        return 0
    if "swap" in words:
        at = switch(directory, idle)
        print(json.dumps({"ok": True, "changed": True, "message": f"{idle} is live", "switched_at": at}))
        return 0
    print(f"not understood: {words}", file=sys.stderr)
    return 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="run nginx and both colours until SIGTERM")
    serving.add_argument("directory", type=Path)
    serving.add_argument("--port", type=int, default=18480, help="on 127.0.0.1 (default: %(default)s)")
    doing = commands.add_parser("on", help="run one of the host's commands")
    doing.add_argument("directory", type=Path)
    doing.add_argument("words", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    directory = given.directory.resolve()
    if given.command == "on":
        return on(directory, given.words)
    directory.mkdir(parents=True, exist_ok=True)
    return asyncio.run(serve(directory, given.port))


if __name__ == "__main__":
    sys.exit(main())
