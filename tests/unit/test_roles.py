"""The roles hold to their habits: defaults and argument specs agree, names carry the role's prefix."""

import re
from pathlib import Path

import pytest
import yaml
from model_server.config import Config

PROJECT = Path(__file__).resolve().parents[2]
ROLES = sorted(path for path in (PROJECT / "roles").iterdir() if path.is_dir())
INVENTORIES = [PROJECT / "inventory/lab", PROJECT / "inventory/ec2-example"]


def load(path):
    return yaml.safe_load(path.read_text())


def spec(role):
    return load(role / "meta/argument_specs.yml")["argument_specs"]["main"]["options"]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
class TestRole:
    def test_defaults_and_argument_specs_agree(self, role):
        defaults = load(role / "defaults/main.yml")
        assert {
            name: option["default"] for name, option in spec(role).items() if not option.get("required")
        } == defaults

    def test_every_argument_is_described(self, role):
        assert all(option.get("description") and option.get("type") for option in spec(role).values())

    def test_every_default_is_explained_where_it_stands(self, role):
        lines = (role / "defaults/main.yml").read_text().splitlines()
        explained = False
        for line in lines[1:]:
            if line.startswith("#"):
                explained = True
            elif not line.strip():
                explained = False
            elif line[0].isalpha():
                # One comment may introduce several neighbours.
                assert explained, f"{role.name}: {line}"

    def test_names_carry_the_prefix(self, role):
        names = set(load(role / "defaults/main.yml"))
        assert {name for name in names if not name.startswith(f"{role.name}_")} == set()

    def test_internal_variables_are_marked(self, role):
        """What stands in vars/ must not look like a setting, or the check for misspelt settings would refuse it."""
        file = role / "vars/main.yml"
        names = set(load(file)) if file.exists() else set()
        assert {name for name in names if not name.startswith(f"__{role.name}_")} == set()


@pytest.mark.parametrize("inventory", INVENTORIES, ids=lambda inventory: inventory.name)
def test_an_inventory_is_wired(inventory):
    link = inventory / "group_vars/all/wiring.yml"
    assert link.is_symlink()
    assert link.resolve() == PROJECT / "inventory/wiring.yml"


@pytest.mark.parametrize(
    "file",
    [PROJECT / "inventory/wiring.yml", *(path / "group_vars/appliance/settings.yml" for path in INVENTORIES)],
    ids=lambda file: str(file.relative_to(PROJECT)),
)
def test_an_inventory_sets_only_what_roles_know(file):
    known = {name for role in ROLES for name in spec(role)}
    prefixes = tuple(f"{role.name}_" for role in ROLES)
    assert {name for name in load(file) if name.startswith(prefixes)} - known == set()


def test_the_check_for_misspelt_variables_covers_every_role():
    tasks = load(PROJECT / "playbooks/tasks/known_variables.yml")
    assert sorted(tasks[-1]["loop"]) == [role.name for role in ROLES]


def test_the_site_runs_every_role():
    play = load(PROJECT / "playbooks/site.yml")[0]
    assert sorted(entry["role"] for entry in play["roles"]) == [role.name for role in ROLES]


def test_a_probe_may_take_as_long_as_its_scrape_waits_and_no_longer():
    """The exporter gives up half a second before Prometheus does, and a timeout is whole seconds."""
    jobs = load(PROJECT / "inventory/wiring.yml")["prometheus_scrape_configs"]
    interval, timeout = next(
        [int(job[key].removesuffix("s")) for key in ("scrape_interval", "scrape_timeout")]
        for job in jobs
        if job["job_name"] == "probe"
    )
    assert timeout <= interval
    text = (PROJECT / "roles/probes/tasks/preflight.yml").read_text()
    allowed = re.search(r"probes_timeout is match\('(.*)'\)", text).group(1)
    assert [seconds for seconds in range(60) if re.match(allowed, f"{seconds}s")] == list(range(1, timeout))
    assert re.match(allowed, "500ms") and not re.match(allowed, "13.7s") and not re.match(allowed, "14000ms")


def test_a_colour_that_the_service_does_not_know_is_refused():
    specs = [option for role in ROLES for name, option in spec(role).items() if name == f"{role.name}_colours"]
    assert len(specs) == 4
    for option in specs:
        assert option.get("choices", []) == ["blue", "green"]
        assert all(Config.from_environment({"MODEL_COLOUR": colour}) for colour in option["choices"])
