"""The rules in use, with the host's objectives, pass their own tests by the host's promtool."""

import base64
import zlib
from pathlib import Path

import pytest

RULE_TESTS = Path(__file__).resolve().parents[3] / "roles/prometheus/tests"


@pytest.mark.parametrize("name", sorted(path.name for path in RULE_TESTS.glob("*_test.yml")))
def test_the_alerts_fire_when_they_should(host, name):
    folder = host.check_output("mktemp -d")
    # The file names its rules by their path in the role; on the host that path leads to the rules in use.
    host.check_output(f"mkdir {folder}/tests {folder}/files && ln -s /etc/prometheus/rules {folder}/files/rules")
    unpack = "import base64, sys, zlib; print(zlib.decompress(base64.b64decode(sys.argv[1])).decode())"
    for file in (name, "thresholds.yml", "short_windows.yml"):
        packed = base64.b64encode(zlib.compress((RULE_TESTS / file).read_bytes())).decode()
        host.check_output(f"python3 -c %s %s > {folder}/tests/{file}", unpack, packed)
    result = host.run(f"promtool test rules {folder}/tests/{name}; status=$?; rm -r {folder}; exit $status")
    assert result.rc == 0, f"{result.stdout}{result.stderr}"
