"""The word by which the engine knows its own requests."""

from __future__ import annotations

import json
import os
import re

import pytest
from rollout import plan, requestmark


@pytest.fixture(autouse=True)
def each_call_a_process(monkeypatch):
    monkeypatch.setattr(requestmark, "of", requestmark.of.__wrapped__)
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def test_all_processes_of_a_boot_have_the_same_word(tmp_path):
    mark = requestmark.of(tmp_path)
    assert re.fullmatch(r"appliance-[0-9a-f]{16}-", mark)
    assert requestmark.of(tmp_path) == mark
    assert [(path.name, path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == [("request-mark", 0o600)]
    (tmp_path / "request-mark").unlink()
    assert requestmark.of(tmp_path) != mark


def test_the_first_of_two_decides(tmp_path, monkeypatch):
    link = os.link

    def late(source, target):
        target.write_text("0123456789abcdef\n")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert requestmark.of(tmp_path) == "appliance-0123456789abcdef-"
    assert os.listdir(tmp_path) == ["request-mark"]


def test_a_file_that_cant_be_used_is_replaced(tmp_path):
    (tmp_path / "request-mark").write_text(".*\n")
    mark = requestmark.of(tmp_path)
    assert re.fullmatch(r"appliance-[0-9a-f]{16}-", mark) and requestmark.of(tmp_path) == mark


def test_without_root_or_without_the_directory_it_is_anyones(tmp_path, monkeypatch):
    assert requestmark.of(tmp_path / "none") != requestmark.of(tmp_path / "none")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert requestmark.of(tmp_path) != requestmark.of(tmp_path)
    assert os.listdir(tmp_path) == []


def test_all_requests_of_the_engine_bear_it(box):
    box.configure(bake_seconds=60)
    box.live_on_blue()
    assert box.run("swap").status == 0 and box.run("rollback").status == 0 and box.run("verify").status == 0
    mark = requestmark.of(box.runtime_dir)
    ids = [json.loads(line)["request_id"] for line in box.door.access_log.read_text().splitlines()]
    assert len(ids) > 20 and {request_id[: len(mark)] for request_id in ids} == {mark}
    assert plan.read(box.state_dir / "rollout.json").mark.startswith(mark)
