"""How often the server is asked, and when it gets its next entry."""

import pytest

from collecting.worker import MOST_WAITING, poll_interval_s, wants_more


@pytest.mark.parametrize(
    ("waiting", "typical_s", "since_last_s", "delay_s", "expected"),
    [
        (-1, None, 0.0, 60.0, True),  # idle
        (0, None, 0.0, 60.0, True),  # one runs, none waits
        (1, None, 99.0, 0.0, False),  # nothing is known yet: one that waits is enough
        (0, 30.0, 0.0, 60.0, True),
        (1, 30.0, 99.0, 0.0, False),  # long prompts: never more than one
        (1, 3.0, 0.0, 2.0, False),  # work for 3 s waits: the delay counts
        (1, 3.0, 2.0, 2.0, True),
        (2, 3.0, 99.0, 2.0, False),
        (2, 0.5, 0.0, 2.0, True),  # short prompts: the worker is about to fall idle
        (3, 0.5, 0.0, 2.0, False),
        (3, 0.5, 2.0, 2.0, True),
        (MOST_WAITING, 0.001, 99.0, 0.0, False),
        (MOST_WAITING - 1, 0.0, 0.0, 2.0, True),
    ],
)
def test_next_entry_is_sent_when_the_worker_could_fall_idle(waiting, typical_s, since_last_s, delay_s, expected):
    assert wants_more(waiting, typical_s, since_last_s, delay_s) is expected


@pytest.mark.parametrize(
    ("typical_s", "waited_s", "expected"),
    [(None, 0.0, 0.05), (None, 8.0, 1.0), (0.5, 0.1, 0.0625), (3.0, 0.0, 0.375), (60.0, 0.0, 2.0), (0.1, 9.0, 1.125)],
)
def test_polling_is_fast_for_short_prompts_and_slow_for_long_ones(typical_s, waited_s, expected):
    assert poll_interval_s(typical_s, waited_s) == expected
