"""What benchmarks of an appliance have in common, without one."""

import asyncio

import pytest

from benchmarks import on_appliance, releases, swaps
from benchmarks.report import BenchError

BOTH = pytest.mark.parametrize("bench", [swaps, releases])


def test_a_canary_is_nobodys_to_end(pretend_host):
    with pytest.raises(BenchError, match="a canary is under way; end it first"):
        asyncio.run(on_appliance.without_rollout(pretend_host(rollout="canary")))


def test_what_is_left_is_said(pretend_host):
    def left(live):
        return on_appliance.left(asyncio.run(pretend_host(live).status()), [("digits", "2.0.0")])

    text = left(("digits", "2.0.0"))
    assert "live blue: digits 2.0.0, ready; idle green: simplemodel 1.1.0, ready" in text
    assert "playbooks/site.yml --tags releases" in text
    assert "site.yml" not in left(("digits", "1.0.0"))


def test_what_goes_on_is_said(pretend_host):
    status = asyncio.run(pretend_host(rollout="bake").status())
    text = on_appliance.left(status | {"split": 5, "shadow": 100}, [])
    assert text.endswith("; 5 % of users go to the idle colour; 100 % of requests are copied; a bake is under way.")
    assert on_appliance.left(status | {"rollout": None}, []).endswith("simplemodel 1.1.0, ready.")


@BOTH
def test_an_interrupt_is_told_with_what_is_left(pretend_host, capsys, monkeypatch, bench):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(on_appliance, "Host", lambda _: pretend_host())
    monkeypatch.setattr(on_appliance, "host_facts", lambda _: {})
    monkeypatch.setattr(on_appliance.report, "measure", interrupted)
    assert bench.main(["--host-command", "env"]) == 130
    told = capsys.readouterr()
    assert "interrupted" in told.err and "Left on the host: live blue" in told.out


@BOTH
def test_without_an_appliance_it_says_what_to_do(capsys, monkeypatch, tmp_path, bench):
    monkeypatch.setattr(on_appliance, "recorded_lab", dict)
    monkeypatch.delenv("APPLIANCE_HOST_COMMAND", raising=False)
    with pytest.raises(SystemExit) as ended:
        bench.main([])
    assert ended.value.code == 2 and "make up" in capsys.readouterr().err
    words = ["--host-command", "false", "--reports", str(tmp_path), "--document", str(tmp_path / "benchmarks.md")]
    assert bench.main(words) == 2
    assert "isn't fit to be measured" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_load_goes_to_this_machine_only(capsys, bench):
    with pytest.raises(SystemExit):
        bench.main(["--host-command", "env", "--appliance-url", "http://192.0.2.1"])
    assert "loopback" in capsys.readouterr().err
