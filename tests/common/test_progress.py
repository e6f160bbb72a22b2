"""Without a terminal, what takes long logs one line a minute with the time left."""

import pytest

from common.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless the test moves it."""
    now_s = [1000.0]
    monkeypatch.setattr("common.progress.time.monotonic", lambda: now_s[0])
    return now_s


def test_a_log_gets_one_line_a_minute_with_the_time_left(clock, capsys):
    with ProgressBar(200, "tagging", "images", initial=100) as bar:
        for _ in range(60):
            clock[0] += 3.0
            bar.update()
        bar.set_postfix_str("loss 0.1")
        clock[0] += 60.0
        bar.update(20)
        bar.update(20)
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "tagging: 120/200 images, 04:00 left",
        "tagging: 140/200 images, 03:00 left",
        "tagging: 160/200 images, 02:00 left",
        "tagging: 180/200 images, 01:00 left, loss 0.1",
    ]
    assert captured.err == ""


def test_what_is_done_within_a_minute_logs_nothing(clock, capsys):
    with ProgressBar(2, "tagging", "images") as bar:
        clock[0] += 59.0
        bar.update()
        clock[0] += 2.0
        bar.update()
    assert capsys.readouterr() == ("", "")
