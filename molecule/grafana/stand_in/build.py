#!/usr/bin/env python3
"""Build a signed apt repository that holds one package: `grafana`, version 0.0.0+standin, the stand-in for Grafana.

    build.py DIRECTORY        makes DIRECTORY/dists, DIRECTORY/pool and DIRECTORY/gpg.key

The layout and the signature are those of the vendor's repository, so that the role takes the same path through apt as
in production. The key is made here and thrown away. Needs dpkg-deb and gpg.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
VERSION = "0.0.0+standin"
ARCHITECTURES = ("amd64", "arm64")

CONTROL = f"""\
Package: grafana
Version: {VERSION}
Architecture: all
Maintainer: nobody <nobody@localhost>
Depends: adduser, python3, python3-yaml
Section: misc
Priority: optional
Description: stand-in for Grafana, for tests
 Checks what Grafana would be provisioned with. It isn't Grafana.
"""

# What the vendor's package does that a role can notice: a user, the owners and modes below /etc/grafana, no start.
POSTINST = """\
#!/bin/sh
set -e
if [ "$1" = configure ]; then
    getent group grafana >/dev/null || addgroup --system --quiet grafana
    getent passwd grafana >/dev/null || adduser --system --quiet --home /usr/share/grafana --no-create-home \\
        --ingroup grafana --disabled-password --shell /bin/false grafana
    mkdir -p /var/lib/grafana /var/log/grafana
    chown -R grafana:grafana /var/lib/grafana /var/log/grafana
    mkdir -p /etc/grafana/provisioning/dashboards /etc/grafana/provisioning/datasources
    for kind in dashboards datasources; do
        sample=/etc/grafana/provisioning/$kind/sample.yaml
        [ -e "$sample" ] || cp /usr/share/grafana/conf/sample.yaml "$sample"
    done
    [ -e /etc/grafana/grafana.ini ] || cp /usr/share/grafana/conf/sample.ini /etc/grafana/grafana.ini
    chown -Rh root:grafana /etc/grafana
    find /etc/grafana -type f -exec chmod 0640 {} +
    find /etc/grafana -type d -exec chmod 0755 {} +
    if [ -n "$2" ] && [ -d /run/systemd/system ]; then
        systemctl daemon-reload
        systemctl try-restart grafana-server.service || true
    fi
fi
"""

PRERM = """\
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl stop grafana-server.service || true
fi
"""

UNIT = """\
[Unit]
Description=Grafana instance (stand-in for tests)
Wants=network-online.target
After=network-online.target

[Service]
User=grafana
Group=grafana
UMask=0027
ExecStart=/usr/sbin/grafana-server --config=/etc/grafana/grafana.ini --packaging=deb \\
    cfg:default.paths.data=/var/lib/grafana cfg:default.paths.provisioning=/etc/grafana/provisioning
Restart=on-failure

[Install]
WantedBy=multi-user.target
"""


def write(path: Path, content: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    path.chmod(mode)


def build_package(pool: Path) -> Path:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "grafana"
        write(root / "DEBIAN/control", CONTROL)
        write(root / "DEBIAN/postinst", POSTINST, 0o755)
        write(root / "DEBIAN/prerm", PRERM, 0o755)
        write(root / "usr/lib/systemd/system/grafana-server.service", UNIT)
        write(root / "usr/share/grafana/conf/sample.ini", "; Everything is left at its default.\n")
        write(root / "usr/share/grafana/conf/sample.yaml", "# Nothing is provisioned.\napiVersion: 1\n")
        # The distribution's Python, because that is the one for which python3-yaml is installed.
        program = (HERE / "grafana_stand_in.py").read_text(encoding="utf-8")
        program = program.replace("#!/usr/bin/env python3", "#!/usr/bin/python3", 1)
        write(root / "usr/sbin/grafana-server", program, 0o755)
        write(root / "usr/sbin/grafana-cli", program, 0o755)
        for path in [root, *root.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
        pool.mkdir(parents=True, exist_ok=True)
        package = pool / f"grafana_{VERSION}_all.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "--build", root, package], check=True)
    return package


def write_index(repository: Path, package: Path) -> None:
    content = package.read_bytes()
    stanza = CONTROL + "".join(
        f"{key}: {value}\n"
        for key, value in (
            ("Filename", package.relative_to(repository)),
            ("Size", len(content)),
            ("SHA256", hashlib.sha256(content).hexdigest()),
        )
    )
    suite = repository / "dists/stable"
    for architecture in ARCHITECTURES:
        write(suite / f"main/binary-{architecture}/Packages", stanza)
        compressed = suite / f"main/binary-{architecture}/Packages.gz"
        compressed.write_bytes(gzip.compress(stanza.encode(), mtime=0))
    files = sorted(path for path in (suite / "main").rglob("*") if path.is_file())
    checksums = "".join(
        f" {hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_size} {path.relative_to(suite)}\n"
        for path in files
    )
    write(
        suite / "Release",
        f"Origin: grafana stand-in\nLabel: grafana stand-in\nSuite: stable\nCodename: stable\n"
        f"Date: {datetime.now(UTC):%a, %d %b %Y %H:%M:%S} UTC\n"
        f"Architectures: {' '.join(ARCHITECTURES)}\nComponents: main\nSHA256:\n{checksums}",
    )


def sign(repository: Path) -> None:
    release = repository / "dists/stable/Release"
    home = tempfile.mkdtemp()
    gpg = ["gpg", "--homedir", home, "--batch", "--yes", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
    try:
        subprocess.run([*gpg, "--quick-generate-key", "grafana stand-in", "rsa3072", "sign", "never"], check=True)
        subprocess.run([*gpg, "--clearsign", "--output", release.with_name("InRelease"), release], check=True)
        subprocess.run([*gpg, "--armor", "--export", "--output", repository / "gpg.key"], check=True)
    finally:
        subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=False)
        shutil.rmtree(home, ignore_errors=True)


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    os.umask(0o022)
    wanted = Path(sys.argv[1]).resolve()
    # Made beside its place and renamed into it: a repository that exists is complete.
    unfinished = wanted.with_name(wanted.name + ".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    package = build_package(unfinished / "pool")
    write_index(unfinished, package)
    sign(unfinished)
    shutil.rmtree(wanted, ignore_errors=True)
    unfinished.rename(wanted)
    print(f"{wanted}: {package.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
