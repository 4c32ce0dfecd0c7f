"""After the swap: green is production, and nginx was not reloaded for it."""


def test_green_is_live(edge, engine):
    status = engine("status")
    assert (status["live"], status["previous"], status["rc"]) == ("green", "blue", 0)
    assert edge.predict("/predict").headers["x-model-colour"] == "green"
    assert edge.predict("/test/predict").headers["x-model-colour"] == "blue"


def test_the_switch_is_one_link(host, engine):
    state = engine("status")["state"]
    assert host.file("/var/lib/appliance/routing/current").linked_to == f"/var/lib/appliance/routing/states/{state}"
    assert host.file(f"/var/lib/appliance/routing/states/{state}/green").exists


def test_a_swap_does_not_reload_nginx(host, engine):
    workers = "pgrep -P $(cat /run/nginx.pid) | sort"
    before = host.check_output(workers)
    assert engine("swap")["rc"] == 0
    assert engine("swap")["rc"] == 0
    assert host.check_output(workers) == before


def test_the_history_tells_it(engine):
    entries = engine("history")["entries"]
    assert any(entry["command"] == "swap" and entry["outcome"] == "done" for entry in entries)


def test_swapping_to_the_live_colour_does_nothing(playbook):
    result = playbook("swap", "-e", "to=green")
    assert result.returncode == 0
    assert "changed=0" in result.stdout
