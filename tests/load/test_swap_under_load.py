"""A swap loses no request and reaches nobody late; a reload of the edge, on the same box, does lose some."""

import asyncio

import pytest
from swap_runs import run_reloads, run_swaps, write_report


# A loss that comes only now and then is a loss: no second try.
@pytest.mark.flaky(reruns=0)
def test_swaps_lose_no_request_and_none_reaches_the_old_colour(host, load_settings, count, pause_s, reports):
    summary = asyncio.run(run_swaps(host, load_settings, count, pause_s))
    write_report(reports / "swap_under_load.json", "swaps under load", summary, url=load_settings.url)

    assert summary.switch_count == count
    assert summary.requests > 10 * count, "too little load to prove anything"
    assert summary.failed == 0, summary.failures
    assert summary.wrong_colour == 0, [s for s in summary.switches if s["wrong_after_done"]]
    assert all(s["first_new_ms"] is not None for s in summary.switches)


def test_reloads_lose_requests_so_this_client_can_see_a_loss(
    host, load_settings, count, pause_s, reports, reload_command
):
    summary = asyncio.run(run_reloads(host, load_settings, count, pause_s, command=reload_command))
    write_report(
        reports / "reload_control.json", "reloads under load", summary, url=load_settings.url, command=reload_command
    )

    assert summary.lost() > 0, "no loss seen across reloads: this client can't tell whether a swap loses requests"
    assert len(summary.colours) == 1, "the live colour changed during the control"
