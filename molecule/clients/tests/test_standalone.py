"""The image by itself, as another orchestrator or a laptop runs it: a bundle, a port, and nothing of the host."""

import json

import pytest

NAME = "standalone"
LOCKED_DOWN = (
    "--read-only --tmpfs /tmp --tmpfs /run/appliance:mode=1777 --cap-drop ALL --security-opt no-new-privileges"
)


@pytest.fixture(params=["", LOCKED_DOWN], ids=["plain", "locked down"])
def ask(request, host, eventually):
    """Run the image on port 8099 of the host; a function that asks it."""
    status = json.loads(host.check_output("appliance status --json").splitlines()[-1])
    colour = status["colours"][status["idle"]]
    host.check_output(
        f"docker run --detach --name {NAME} --publish 127.0.0.1:8099:8000 --env MODEL_PORT=8000 {request.param} "
        f"--volume {colour['bundle']}:/bundle:ro {colour['image']}"
    )
    try:
        ready = "curl -fsS http://127.0.0.1:8099/v1/ready"
        eventually(lambda: host.run(ready).rc == 0, what="the container's readiness")
        yield lambda path, options="": json.loads(host.check_output(f"curl -fsS {options} http://127.0.0.1:8099{path}"))
    finally:
        host.run(f"docker rm --force {NAME}")


def test_serves_the_same_api(host, ask, edge):
    asked = ask("/predict", """--data '{"data": [0.2, 0.6]}'""")
    assert asked == edge.predict("/predict").json or asked == edge.predict("/test/predict").json
    assert ask("/health")["status"] == "ready"
    assert ask("/v2/models/simplemodel")["name"] == "simplemodel"
    assert "predictions_total" in host.check_output("curl -fsS http://127.0.0.1:8099/metrics")
    assert host.run(f"docker stop {NAME}").rc == 0
    assert host.check_output(f"docker inspect --format '{{{{.State.ExitCode}}}}' {NAME}").strip() == "0"


def test_says_why_it_cannot_serve(host):
    status = json.loads(host.check_output("appliance status --json").splitlines()[-1])
    image = status["colours"][status["idle"]]["image"]
    refused = host.run(f"docker run --rm --env MODEL_PORT=8000 {image}")
    assert refused.rc == 78
    assert json.loads(refused.stdout.splitlines()[-1])["message"] == "bundle: /bundle is not a directory"
