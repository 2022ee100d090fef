"""A short campaign of accidents (tests/campaign.py)."""

import pytest

from tests.accidents import KILL, LEAVE
from tests.accidents_of_data import OTHERS
from tests.campaign import Campaign
from tests.detours import DETOURS


@pytest.mark.timeout(600)
def test_a_few_kills_at_random(tmp_path) -> None:
    """Of a run of one process and of one of two, and an order to leave."""
    campaign = Campaign(tmp_path, kills=2, terms=1, seconds=240, seed=1, jobs=2)
    campaign.others = {1: [], 2: []}
    campaign.detours.clear()
    campaign.run()
    assert campaign.result() == 0, campaign.table()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_short_campaign(tmp_path) -> None:
    campaign = Campaign(tmp_path, kills=6, terms=2, seconds=2400, seed=1)
    campaign.run()
    assert campaign.result() == 0, campaign.table()


def test_a_campaign_succeeds_only_with_all_that_was_asked_for(tmp_path) -> None:
    campaign = Campaign(tmp_path, kills=1, terms=1, seconds=0, seed=0)
    assert campaign.wanted == {(KILL, 1): 0, (KILL, 2): 1, (LEAVE, 1): 0, (LEAVE, 2): 1}
    everything = [f"1 x {KILL} (2)", f"1 x {LEAVE} (2)", *(f"{other} ({n})" for n in (1, 2) for other in OTHERS[n])]
    nothing_ended = [f"no run of {n} ended with the same bytes" for n in (1, 2)]
    assert campaign.missing() == [*everything, *DETOURS, *nothing_ended] and campaign.result() == 1
    campaign.detours.clear()
    for n in (1, 2):
        while other := campaign._next_other(n):
            campaign._happen(n, "", lambda other=other: ("", other), other)
        campaign.count["ended with the same bytes", n] += 1
    for kind in (KILL, LEAVE):
        assert campaign.result() == 1
        campaign._happen(2, kind, lambda kind: ("", ""))  # the run was over before: nothing has happened
        assert campaign.left(kind, 2) == 1
        campaign._happen(2, kind, lambda kind: (kind, kind))
    assert (campaign.missing(), campaign.result()) == ([], 0)
    campaign.check(True, "all is well")
    assert campaign.result() == 0
    campaign.check(False, "other bytes")
    assert campaign.result() == 1 and campaign.table().endswith("wrong: 1\nother bytes")
