"""Write the dashboards: `python3 -m roles.grafana.dashboards [--check]`, from the root of the repository."""

import argparse
import json
import sys
from pathlib import Path

from roles.grafana.dashboards import colours, drift, edge, host, monitoring, overview, serving
from roles.grafana.dashboards.builder import Dashboard

DIRECTORY = Path(__file__).resolve().parents[1] / "files/dashboards"
DASHBOARDS = [module.DASHBOARD for module in (overview, serving, colours, drift, host, edge, monitoring)]


def text(dashboard: Dashboard) -> str:
    """The content of a dashboard's file."""
    return json.dumps(dashboard.model(), indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m roles.grafana.dashboards", description="Write the dashboards.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file differs")
    check = parser.parse_args(arguments).check
    wanted = {DIRECTORY / f"{dashboard.uid}.json": text(dashboard) for dashboard in DASHBOARDS}
    there = {path: path.read_text(encoding="utf-8") for path in DIRECTORY.glob("*.json")}
    differing = sorted(path for path in wanted.keys() | there.keys() if wanted.get(path) != there.get(path))
    if check:
        for path in differing:
            print(f"{path} isn't what the modules say: run python3 -m roles.grafana.dashboards", file=sys.stderr)
        return 1 if differing else 0
    for path in differing:
        if path in wanted:
            path.write_text(wanted[path], encoding="utf-8")
        else:
            path.unlink()
        print(f"{'written' if path in wanted else 'removed'}: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
