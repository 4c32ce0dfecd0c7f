"""What is killed comes back, and it is the same colour that serves."""

import pytest


@pytest.fixture
def serving(edge, live, engine, eventually):
    """Check, after the test's fault, that the colour that was live is live again without a hand."""

    def check():
        def healthy():
            answer = edge.predict()
            return answer.status == 200 and answer.headers["x-model-colour"] == live

        eventually(healthy, seconds=120, what=f"{live} serving again")
        eventually(lambda: engine("status")["rc"] == 0, seconds=60, what="the live colour healthy")
        assert engine("status")["live"] == live

    return check


def workers(host, colour):
    """Process ids of a colour's workers, as the host sees them: the children of the container's first process."""
    parent = host.check_output(f"docker inspect --format '{{{{.State.Pid}}}}' model-{colour}").strip()
    return host.check_output(f"pgrep -P {parent}").split()


def test_killed_workers(host, live, serving, engine):
    for process in workers(host, live):
        host.check_output(f"kill -9 {process}")
    serving()
    assert engine("status")["colours"][live]["workers"]["restarts"] > 0


def test_killed_container(host, live, serving):
    host.check_output(f"docker kill model-{live}")
    serving()


def test_killed_main_process(host, live, serving):
    host.check_output(f"kill -9 $(docker inspect --format '{{{{.State.Pid}}}}' model-{live})")
    serving()


def test_docker_restarted(host, serving):
    host.check_output("systemctl restart docker")
    serving()


def test_docker_stopped_and_started(host, serving):
    host.check_output("systemctl stop docker.socket docker.service")
    host.check_output("systemctl start docker.service")
    serving()


def test_docker_killed(host, serving):
    host.check_output("kill -9 $(pgrep -x dockerd)")
    serving()


def test_nginx_killed(host, serving):
    host.check_output("pkill -9 -x nginx")
    serving()


def test_site_fails_where_production_is_down(host, live, serving, playbook):
    host.check_output(f"systemctl stop model@{live}.service")
    # No task has this tag: only what always runs.
    result = playbook("site", "--tags", "nothing")
    assert result.returncode != 0
    told = " ".join(result.stdout.split())
    assert f"Production doesn't serve: {live} doesn't answer" in told, told[-2000:]
    advice = f"sudo systemctl restart model@{live}.service"
    assert advice in told
    host.check_output(advice)
    serving()


def test_both_colours_are_up_in_the_end(engine, eventually):
    def both():
        return all(colour["status"] == "ready" for colour in engine("status")["colours"].values())

    eventually(both, seconds=120, what="both colours ready")
