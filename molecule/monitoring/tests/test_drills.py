"""A drill, as an operator runs it: its fault raises the alert, and the alert goes with the fault.

This is the shortest one; docs/monitoring.md has all of them.
"""

import re


def test_a_live_colour_that_stops_raises_its_alert(host, playbook, live, engine):
    told = playbook("drill", "-e", "drill=live-colour-down")
    text = " ".join(told.stdout.split())
    assert told.returncode == 0, text[-3000:]
    assert re.search(r"LiveColourDown fired \d+ seconds after the fault, and was gone \d+ seconds after its end", text)
    status = engine("status")
    assert (status["rc"], status["live"]) == (0, live)
    assert host.run("systemctl is-active appliance-drill.service").rc != 0
    assert not host.file("/run/appliance-drill").exists
