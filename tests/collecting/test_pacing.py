"""When a server gets its next prompt, and how often it is polled."""

import pytest

from collecting.pacing import MAX_WAITING, Pacing, poll_interval_s, should_submit


@pytest.mark.parametrize(
    ("waiting", "typical_s", "since_last_s", "delay_s", "expected"),
    [
        (-1, None, 0.0, 60.0, True),  # idle
        (0, None, 0.0, 60.0, True),  # one runs, none waits
        (1, None, 99.0, 0.0, False),  # no duration is known yet: one that waits is enough
        (0, 30.0, 0.0, 60.0, True),
        (1, 30.0, 99.0, 0.0, False),  # long prompts: never more than one waits
        (1, 3.0, 0.0, 2.0, False),  # work for 3 s waits: the delay applies
        (1, 3.0, 2.0, 2.0, True),
        (2, 3.0, 99.0, 2.0, False),
        (2, 0.5, 0.0, 2.0, True),  # short prompts: the server is about to become idle
        (3, 0.5, 0.0, 2.0, False),
        (3, 0.5, 2.0, 2.0, True),
        (MAX_WAITING, 0.001, 99.0, 0.0, False),
        (MAX_WAITING - 1, 0.0, 0.0, 2.0, True),
    ],
)
def test_next_prompt_is_submitted_when_the_server_could_become_idle(waiting, typical_s, since_last_s, delay_s, expected):
    assert should_submit(waiting, typical_s, since_last_s, delay_s) is expected


@pytest.mark.parametrize(
    ("typical_s", "running_s", "expected"),
    [(None, 0.0, 0.05), (None, 8.0, 1.0), (0.5, 0.1, 0.0625), (3.0, 0.0, 0.375), (60.0, 0.0, 2.0), (0.1, 9.0, 1.125)],
)
def test_polling_is_fast_for_short_prompts_and_slow_for_long_ones(typical_s, running_s, expected):
    assert poll_interval_s(typical_s, running_s) == expected


def test_pacing_uses_the_median_of_the_last_five_durations():
    pacing = Pacing(delay_s=60.0)
    pacing.note_submission(is_only=True)
    assert not pacing.should_submit(2)
    for duration_s in (99.0, 99.0, 99.0, 0.5, 0.5, None, 0.5, 99.0):
        pacing.note_end(duration_s)
    # The last five are 99, 0.5, 0.5, 0.5 and 99: short prompts, of which more may wait.
    assert pacing.should_submit(3)
    pacing.note_end(99.0)
    pacing.note_end(99.0)
    assert not pacing.should_submit(3)
