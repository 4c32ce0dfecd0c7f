"""After a restart of the host: the same colour is production, and it was checked, not assumed."""


def test_green_is_live_again(edge, engine, eventually):
    eventually(lambda: engine("status")["rc"] == 0, seconds=90, what="the live colour healthy after the restart")
    status = engine("status")
    assert status["live"] == "green"
    assert edge.predict("/predict").headers["x-model-colour"] == "green"


def test_the_boot_checked_it(host, eventually):
    eventually(
        lambda: host.run("systemctl is-active appliance-verify.service").stdout.strip() == "active",
        seconds=120,
        what="the check at boot",
    )
    entered = host.check_output("systemctl show -p ActiveEnterTimestampMonotonic --value appliance-verify.service")
    assert int(entered) > 0
    assert "green" in host.check_output("journalctl -b -u appliance-verify.service -o cat --no-pager")


def test_prometheus_is_back(host, eventually):
    eventually(
        lambda: host.run("curl -sf http://127.0.0.1:9090/-/ready").rc == 0,
        seconds=60,
        what="Prometheus after the restart",
    )


def test_jobs_and_their_results_are_still_there(edge):
    # The same request with the same key is the same job: 200, where a new one would be 202.
    again = edge.predict("/v1/jobs", **{"Idempotency-Key": "over-the-restart"})
    assert again.status == 200, again.text
    result = edge.request("GET", f"{again.headers['location']}/result")
    assert result.status == 200 and list(result.json) == ["output"]
