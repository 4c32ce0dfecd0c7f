"""The load client isn't an installed package: its folder is put on the path here. And what benchmarks are tried on."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from model_server.bundle import read

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "load"))

from swap_runs import Completed, Host  # noqa: E402

from benchmarks import on_appliance  # noqa: E402


class PretendHost(Host):
    """An engine that knows what its colours hold, and that a swap begins a bake."""

    def __init__(self, live=("simplemodel", "1.0.0"), idle=("simplemodel", "1.1.0"), rollout=None):
        super().__init__()
        self.colours = {"blue": live, "green": idle}
        self.live, self.idle = "blue", "green"
        self.rollout = rollout
        self.words = []

    async def run(self, *words, **_):
        self.words.append(words[2])
        if words[2] == "swap":
            self.live, self.idle = self.idle, self.live
            self.rollout = "bake"
        elif words[2] == "promote":
            self.rollout = None
        colours = {
            name: {"status": "ready", "model": model, "version": version}
            for name, (model, version) in self.colours.items()
        }
        rollout = self.rollout and {"phase": self.rollout, "text": f"a {self.rollout} is under way"}
        answer = {"ok": True, "live": self.live, "idle": self.idle, "colours": colours, "rollout": rollout}
        answer |= {"split": 0, "shadow": 0}
        return Completed(words, 0, json.dumps(answer), "", 0.0, 0.0)


@pytest.fixture
def pretend_host():
    return PretendHost


@pytest.fixture
def deploys(monkeypatch):
    """Deploys that go to the idle colour of the host that the test sets; what was deployed, in their order."""
    done = SimpleNamespace(host=None, versions=[])

    def deploy(command, *_, **__):
        assert done.host.rollout is None, "a deploy during a rollout is refused"
        bundle = read(Path(command[-1].removeprefix("bundle=")))
        done.versions.append(bundle.version)
        done.host.colours[done.host.idle] = (bundle.name, bundle.version)

    async def no_pause(_):
        pass

    monkeypatch.setattr(on_appliance.report, "run", deploy)
    monkeypatch.setattr(on_appliance.asyncio, "sleep", no_pause)
    return done
