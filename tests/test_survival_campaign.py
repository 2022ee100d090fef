"""A short campaign of accidents (tests/campaign.py)."""

import pytest

from tests.campaign import KILL, LEAVE, Campaign


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_short_campaign(tmp_path) -> None:
    campaign = Campaign(tmp_path, kills=6, terms=2, seconds=900, seed=1)
    campaign.run()
    assert campaign.wrong == []
    assert (campaign.done[KILL], campaign.done[LEAVE]) == (6, 2), campaign.table()
    assert all(campaign.done[f"ended with the same bytes ({who})"] for who in ("1 process", "2 processes")), campaign.table()
