"""Mistakes in an inventory are refused before anything is touched."""

import pytest


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("edge_max_body_byte=5", ["edge_max_body_byte", "roles/edge/defaults"]),
        ("model_wokers=3", ["model_wokers", "roles/model/defaults"]),
        ("appliance_worker=4", ["appliance_worker:", "inventory/wiring.yml"]),
        ("rollout_initial_colour=red", ["rollout_initial_colour", "red"]),
        ("model_workers=many", ["model_workers", "many"]),
    ],
)
def test_a_mistake_is_named(playbook, setting, words):
    result = playbook("site", "-e", setting, "--check")
    assert result.returncode != 0
    for word in words:
        assert word in result.stdout + result.stderr


def test_an_unreachable_grafana_repository_is_an_error_with_a_way_out(playbook):
    wanted = '{"grafana_enabled": true, "grafana_apt_repository": "http://127.0.0.1:9"}'
    result = playbook("site", "-e", wanted, "--check", "--tags", "grafana")
    assert result.returncode != 0
    assert "http://127.0.0.1:9/dists/stable/InRelease" in result.stdout
    assert "grafana_enabled" in result.stdout
