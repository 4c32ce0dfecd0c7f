#!/usr/bin/env python3
"""A stand-in for Grafana, for hosts of tests that can't reach the vendor's repository.

It isn't Grafana and draws nothing. It reads what Grafana would read at its start (grafana.ini, data sources, dashboard
providers, dashboards), ends with a clear message where Grafana would fail, or would go on with less than was asked for,
and then answers the few requests that the role and its tests make. Where Grafana is lenient in a way that has hurt
people (a data source without a uid, two dashboards with one title), the stand-in is strict.

Called as grafana-cli it resets the administrator's password, as Grafana's own command does.
"""

from __future__ import annotations

import argparse
import base64
import configparser
import hashlib
import hmac
import json
import os
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import yaml

VERSION = "0.0.0+standin"
UID = re.compile(r"^[a-zA-Z0-9_-]{1,40}$")
EXPANSION = re.compile(r"\$__(\w+)\{([^}]+)\}")
PANEL_TYPES = {
    *("timeseries", "stat", "gauge", "bargauge", "table", "heatmap", "histogram", "state-timeline", "status-history"),
    *("barchart", "piechart", "logs", "text", "row", "alertlist", "dashlist"),
}
DATASOURCE_KEYS = {
    *("name", "type", "access", "uid", "url", "orgId", "user", "database", "basicAuth", "basicAuthUser", "isDefault"),
    *("withCredentials", "jsonData", "secureJsonData", "editable", "version", "readOnly"),
}
PROVIDER_KEYS = {
    *("name", "orgId", "folder", "folderUid", "type", "disableDeletion", "allowUiUpdates", "updateIntervalSeconds"),
    *("options", "editable"),
}


class Refused(Exception):
    """Something that was provisioned is wrong; the message says where and what."""


@dataclass
class Settings:
    address: str
    port: int
    admin_user: str
    admin_password: str
    data: Path
    provisioning: Path
    home: Path | None


@dataclass
class Provisioned:
    datasources: dict[str, dict] = field(default_factory=dict)
    providers: list[dict] = field(default_factory=list)
    dashboards: dict[str, dict] = field(default_factory=dict)


def require(condition: object, message: str) -> None:
    if not condition:
        raise Refused(message)


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} can't be read: {error}") from error


def expand(where: str, value: str) -> str:
    """Replace $__file{...} and $__env{...}, as Grafana does in every value of grafana.ini."""

    def replacement(match: re.Match[str]) -> str:
        kind, argument = match.groups()
        if kind == "file":
            content = read(Path(argument)).strip()
            require(content, f"{where}: {argument} is empty")
            return content
        require(kind == "env", f"{where}: there is no $__{kind}{{}}")
        return os.environ.get(argument, "")

    return EXPANSION.sub(replacement, value)


def load_settings(config: Path, overrides: dict[str, str]) -> Settings:
    parser = configparser.RawConfigParser(comment_prefixes=(";", "#"), interpolation=None, default_section="")
    try:
        parser.read_string("[top]\n" + read(config))
    except configparser.Error as error:
        raise Refused(f"{config}: {error}") from error

    def get(section: str, key: str, default: str) -> str:
        override = overrides.get(f"{section}.{key}")
        return expand(f"{config}: [{section}] {key}", override or parser.get(section, key, fallback="") or default)

    for section in parser.sections():
        for key, value in parser.items(section):
            expand(f"{config}: [{section}] {key}", value)
    port = get("server", "http_port", "3000")
    require(port.isdigit() and 0 < int(port) < 65536, f"{config}: [server] http_port is {port!r}, which is no port")
    return Settings(
        address=get("server", "http_addr", "0.0.0.0"),
        port=int(port),
        admin_user=get("security", "admin_user", "admin"),
        admin_password=get("security", "admin_password", "admin"),
        data=Path(get("paths", "data", "/var/lib/grafana")),
        provisioning=Path(get("paths", "provisioning", "/etc/grafana/provisioning")),
        home=Path(home) if (home := get("dashboards", "default_home_dashboard_path", "")) else None,
    )


def yaml_files(directory: Path, key: str) -> list[tuple[Path, list[dict]]]:
    """The entries under `key` of every file of a provisioning directory; a file of comments has none."""
    found = []
    for path in sorted([*directory.glob("*.yml"), *directory.glob("*.yaml")]):
        try:
            content = yaml.safe_load(read(path))
        except yaml.YAMLError as error:
            raise Refused(f"{path} isn't YAML: {error}") from error
        if content is None:
            continue
        require(isinstance(content, dict), f"{path}: a mapping is expected")
        require(content.get("apiVersion") == 1, f"{path}: apiVersion has to be 1, it is {content.get('apiVersion')!r}")
        entries = content.get(key) or []
        require(isinstance(entries, list), f"{path}: {key} has to be a list")
        for number, entry in enumerate(entries):
            require(isinstance(entry, dict), f"{path}: {key}[{number}] has to be a mapping")
        found.append((path, entries))
    return found


def load_datasources(directory: Path) -> dict[str, dict]:
    datasources: dict[str, dict] = {}
    names: set[str] = set()
    defaults = 0
    for path, entries in yaml_files(directory, "datasources"):
        for entry in entries:
            where = f"{path}: the data source {entry.get('name', '(without a name)')}"
            for key in ("name", "type", "access", "uid"):
                require(isinstance(entry.get(key), str) and entry[key], f"{where} has no {key}")
            require(UID.match(entry["uid"]), f"{where}: {entry['uid']!r} can't be a uid")
            require(entry["access"] in ("proxy", "direct"), f"{where}: access is neither proxy nor direct")
            require(entry["uid"] not in datasources, f"{where}: the uid {entry['uid']!r} is taken")
            require(entry["name"] not in names, f"{where}: the name is taken")
            unknown = sorted(set(entry) - DATASOURCE_KEYS)
            require(not unknown, f"{where}: unknown keys: {', '.join(unknown)}")
            defaults += bool(entry.get("isDefault"))
            require(defaults <= 1, f"{where}: only one data source can be the default")
            names.add(entry["name"])
            datasources[entry["uid"]] = entry
    return datasources


def load_providers(directory: Path) -> list[dict]:
    providers: list[dict] = []
    for path, entries in yaml_files(directory, "providers"):
        for entry in entries:
            where = f"{path}: the provider {entry.get('name', '(without a name)')}"
            require(isinstance(entry.get("name"), str) and entry["name"], f"{where} has no name")
            require(entry["name"] not in [other["name"] for other in providers], f"{where}: the name is taken")
            require(entry.get("type", "file") == "file", f"{where}: the type has to be file")
            unknown = sorted(set(entry) - PROVIDER_KEYS)
            require(not unknown, f"{where}: unknown keys: {', '.join(unknown)}")
            options = entry.get("options")
            require(isinstance(options, dict) and options.get("path"), f"{where} has no options.path")
            require(Path(options["path"]).is_dir(), f"{where}: {options['path']} is no directory")
            providers.append(entry)
    return providers


def panels_of(dashboard: dict) -> list[dict]:
    panels: list[dict] = []
    for panel in dashboard["panels"]:
        panels += [panel, *panel.get("panels", [])]
    return panels


def check_dashboard(path: Path, dashboard: dict, datasources: dict[str, dict]) -> None:
    require(isinstance(dashboard, dict), f"{path}: an object is expected")
    require("__inputs" not in dashboard, f"{path} is an export for sharing (__inputs), not a dashboard")
    for key in ("uid", "title"):
        require(isinstance(dashboard.get(key), str) and dashboard[key], f"{path} has no {key}")
    require(UID.match(dashboard["uid"]), f"{path}: {dashboard['uid']!r} can't be a uid")
    require(dashboard.get("id") is None, f"{path}: id has to be null, it belongs to one database")
    schema = dashboard.get("schemaVersion")
    require(isinstance(schema, int) and 36 <= schema <= 41, f"{path}: schemaVersion is {schema!r}, not 36 to 41")
    require(isinstance(dashboard.get("panels"), list) and dashboard["panels"], f"{path} has no panels")
    ids: set[int] = set()
    for panel in panels_of(dashboard):
        where = f"{path}: the panel {panel.get('title', '(without a title)')}"
        require(isinstance(panel.get("id"), int), f"{where} has no id")
        require(panel["id"] not in ids, f"{where}: the id {panel['id']} is taken")
        ids.add(panel["id"])
        require(panel.get("type") in PANEL_TYPES, f"{where}: the type {panel.get('type')!r} isn't known")
        sources = [panel.get("datasource"), *(target.get("datasource") for target in panel.get("targets", []))]
        for source in filter(None, sources):
            uid = source.get("uid") if isinstance(source, dict) else source
            known = uid in datasources or str(uid).startswith("-- ")
            require(known, f"{where} asks the data source {uid!r}, which isn't provisioned")


def load_dashboards(providers: list[dict], datasources: dict[str, dict]) -> dict[str, dict]:
    dashboards: dict[str, dict] = {}
    titles: dict[tuple[str, str], Path] = {}
    for provider in providers:
        folder = provider.get("folderUid") or provider.get("folder") or ""
        for path in sorted(Path(provider["options"]["path"]).rglob("*.json")):
            try:
                dashboard = json.loads(read(path))
            except json.JSONDecodeError as error:
                raise Refused(f"{path} isn't JSON: {error}") from error
            check_dashboard(path, dashboard, datasources)
            uid, title = dashboard["uid"], dashboard["title"]
            require(uid not in dashboards, f"{path}: the uid {uid!r} is taken by another dashboard")
            taken = titles.get((folder, title))
            require(taken is None, f"{path}: the title {title!r} is taken by {taken} in the same folder")
            titles[folder, title] = path
            dashboards[uid] = {"folder": provider.get("folder", ""), "folderUid": folder, "dashboard": dashboard}
    return dashboards


def load_provisioned(directory: Path) -> Provisioned:
    datasources = load_datasources(directory / "datasources")
    providers = load_providers(directory / "dashboards")
    return Provisioned(datasources, providers, load_dashboards(providers, datasources))


def load_home(path: Path) -> dict:
    """The home page, which Grafana reads from its file each time that somebody asks for it."""
    try:
        return json.loads(read(path))
    except json.JSONDecodeError as error:
        raise Refused(f"the home page {path} isn't JSON: {error}") from error


class Users:
    """The table of users: like Grafana's it is filled once, from then on grafana.ini's password counts for nothing."""

    def __init__(self, settings: Settings) -> None:
        self.path = settings.data / "stand-in-users.json"
        if not self.path.exists():
            self.set(settings.admin_user, settings.admin_password)

    def set(self, name: str, password: str) -> None:
        salt = os.urandom(16).hex()
        text = json.dumps({"name": name, "salt": salt, "hash": self.digest(salt, password)})
        unfinished = self.path.with_suffix(".new")
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.chmod(0o600)
            unfinished.replace(self.path)
        except OSError as error:
            raise Refused(f"{self.path} can't be written: {error}") from error

    @staticmethod
    def digest(salt: str, password: str) -> str:
        return hashlib.scrypt(password.encode(), salt=bytes.fromhex(salt), n=2**12, r=8, p=1).hex()

    def admits(self, authorization: str | None) -> bool:
        kind, _, credentials = (authorization or "").partition(" ")
        if kind.lower() != "basic":
            return False
        try:
            name, _, password = base64.b64decode(credentials, validate=True).decode().partition(":")
        except ValueError:
            return False
        user = json.loads(read(self.path))
        return name == user["name"] and hmac.compare_digest(self.digest(user["salt"], password), user["hash"])


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, settings: Settings, provisioned: Provisioned, users: Users) -> None:
        self.provisioned = provisioned
        self.home = settings.home
        self.users = users
        self.lock = threading.Lock()
        super().__init__((settings.address, settings.port), Handler)

    def dashboards(self) -> dict[str, dict]:
        """The dashboards as they are on disk; Grafana looks every few seconds and keeps what it had if one is bad."""
        with self.lock:
            try:
                found = load_dashboards(self.provisioned.providers, self.provisioned.datasources)
            except Refused as error:
                print(f"level=error msg={json.dumps(str(error))}", flush=True)
            else:
                self.provisioned.dashboards = found
            return self.provisioned.dashboards


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version = f"grafana-stand-in/{VERSION}"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/metrics":
            status, content, kind = 200, b"grafana_up 1\n", "text/plain; version=0.0.4"
        else:
            status, body = self.answer(url.path, parse_qs(url.query))
            content, kind = json.dumps(body).encode(), "application/json"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, object]:
        if path == "/api/health":
            return 200, {"database": "ok", "version": VERSION, "commit": "stand-in"}
        if not self.server.users.admits(self.headers.get("Authorization")):
            return 401, {"message": "Invalid username or password"}
        if path == "/api/user":
            return 200, {"login": "admin", "isGrafanaAdmin": True}
        if path == "/api/datasources":
            return 200, list(self.server.provisioned.datasources.values())
        if path == "/api/dashboards/home" and self.server.home:
            return 200, {"meta": {"isHome": True}, "dashboard": load_home(self.server.home)}
        kind, _, uid = path.rpartition("/")
        if kind == "/api/datasources/uid" and uid in self.server.provisioned.datasources:
            return 200, self.server.provisioned.datasources[uid]
        if path == "/api/search":
            wanted = {uid for value in query.get("folderUIDs", []) for uid in value.split(",")}
            return 200, [
                {"uid": uid, "title": found["dashboard"]["title"], "type": "dash-db", "folderUid": found["folderUid"]}
                for uid, found in self.server.dashboards().items()
                if not wanted or found["folderUid"] in wanted
            ]
        if kind == "/api/dashboards/uid" and uid in (dashboards := self.server.dashboards()):
            return 200, {"meta": {"provisioned": True}, "dashboard": dashboards[uid]["dashboard"]}
        return 404, {"message": "not found"}

    def log_message(self, format: str, *args: object) -> None:
        print(f"level=info path={urlsplit(self.path).path} {format % args}", flush=True)


def serve(settings: Settings) -> None:
    provisioned = load_provisioned(settings.provisioning)
    if settings.home:
        load_home(settings.home)
    users = Users(settings)
    try:
        server = Server(settings, provisioned, users)
    except OSError as error:
        raise Refused(f"{settings.address}:{settings.port} can't be listened on: {error}") from error
    print(
        f'level=info msg="stand-in for Grafana listens on {settings.address}:{settings.port}: '
        f'{len(provisioned.datasources)} data sources, {len(provisioned.dashboards)} dashboards"',
        flush=True,
    )
    server.serve_forever()


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = argparse.ArgumentParser(description="A stand-in for Grafana, for tests")
    parser.add_argument("-v", "--version", action="version", version=f"stand-in for Grafana, {VERSION}")
    parser.add_argument("--config", type=Path, default=Path("/etc/grafana/grafana.ini"))
    parser.add_argument("--homepath", type=Path, help="accepted and not used")
    parser.add_argument("--pidfile", type=Path, help="accepted and not used")
    parser.add_argument("--packaging", help="accepted and not used")
    parser.add_argument("--password-from-stdin", action="store_true", help="for grafana-cli")
    parser.add_argument("words", nargs="*", help="cfg:default.<section>.<key>=<value>, or the command of grafana-cli")
    known = parser.parse_intermixed_args(arguments)
    overrides = {}
    for word in known.words:
        name, separator, value = word.removeprefix("cfg:").removeprefix("default.").partition("=")
        if word.startswith("cfg:") and separator:
            overrides[name] = value
    return known, overrides


def main(program: str, arguments: list[str]) -> int:
    known, overrides = parse(arguments)
    try:
        settings = load_settings(known.config, overrides)
        if program == "grafana-cli":
            commands = [word for word in known.words if not word.startswith("cfg:")]
            require(commands == ["admin", "reset-admin-password"], "grafana-cli can only: admin reset-admin-password")
            require(known.password_from_stdin, "the stand-in takes the password from standard input only")
            Users(settings).set(settings.admin_user, sys.stdin.readline().strip())
            return 0
        serve(settings)
    except Refused as error:
        print(f"stand-in for Grafana: refused: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[0]).name, sys.argv[1:]))
