"""Which LoRA is recommended, and at which strength, from numbers that are computed by hand."""

import pytest

from training.callbacks.recommendation import Recommendation, Save, choose, lowest_strength, standard_error

FLAT = (0.5, 0.5, 0.5, 0.5)
SPREAD = (0.4, 0.5, 0.6, 0.7)
"""Mean 0.55; squared differences 0.0225 + 0.0025 + 0.0025 + 0.0225 = 0.05, so the standard error is sqrt(0.05 / 3 / 4) = 0.0645."""


def around(mean: float, count: int = 4) -> tuple[float, ...]:
    return (mean,) * count


def chosen(*saves: Save) -> str:
    return choose(saves)[0].file


def test_standard_error_of_the_mean():
    assert standard_error(SPREAD) == pytest.approx(0.064550, abs=1e-6)
    assert standard_error((0.2, 0.4)) == pytest.approx(0.1)
    assert standard_error(FLAT) == 0


def test_among_those_within_one_standard_error_of_the_best_the_smallest_distance_wins():
    best = Save("b", 10, SPREAD, 0.9)
    within, below = 0.55 - 0.0645, 0.55 - 0.0646
    assert chosen(Save("a", 5, around(within), 0.4), best, Save("c", 15, around(0.5), 0.8)) == "a"
    assert chosen(Save("a", 5, around(below), 0.4), best, Save("c", 15, around(0.5), 0.8)) == "c"
    assert chosen(Save("a", 5, around(below), 0.4), best) == "b"


def test_the_standard_error_is_that_of_the_best():
    """Not that of the one that is compared with it."""
    assert chosen(Save("a", 5, SPREAD, 0.1), Save("b", 10, around(0.56), 0.9)) == "b"
    assert chosen(Save("a", 5, around(0.5), 0.1), Save("b", 10, SPREAD, 0.9)) == "a"


def test_exactly_one_standard_error_is_within():
    """Scores 0.5 +- 0.1: a variance of 4 * 0.01 / 3, a standard error of 0.1 / sqrt(3)."""
    best = (0.4, 0.6, 0.4, 0.6)
    assert chosen(Save("a", 5, around(0.5 - 0.1 / 3**0.5), 0.1), Save("b", 10, best, 0.9)) == "a"


def test_ties_go_to_the_earlier():
    assert chosen(Save("a", 5, FLAT, 0.3), Save("b", 10, FLAT, 0.3), Save("c", 15, FLAT, 0.4)) == "a"
    assert chosen(Save("a", 5, FLAT), Save("b", 10, FLAT)) == "a"  # prompts of the user without a class word
    assert chosen(Save("a", 5, FLAT), Save("b", 10, FLAT, 0.9)) == "b"


def test_samples_of_which_it_cannot_be_told_are_left_out():
    """The means are of 5 and of 4 samples; a LoRA with 3 is not compared, however high they are."""
    assert chosen(Save("a", 5, around(0.9, 3), 0.1), Save("b", 10, around(0.5, 5), 0.5), Save("c", 15, FLAT, 0.4)) == "c"


def test_with_too_few_scores_the_lowest_validation_loss_decides():
    saves = [Save("a", 5, around(0.6, 3), 0.1, 0.21), Save("b", 10, around(0.7, 2), 0.2, 0.19), Save("c", 15, (), 0.3, 0.20)]
    save, reason = choose(saves)
    assert save.file == "b"
    assert reason == (
        "It has the lowest validation loss: 0.1900 (smoothed). Likeness was not compared: no LoRA has 4 samples whose likeness can "
        "be told (at most 3)."
    )
    assert choose([Save("a", 5), Save("b", 10, (), None, 0.3), Save("c", 15)])[0].file == "b"
    assert choose([Save("a", 5, (), None, 0.3), Save("b", 10, (), None, 0.3)])[0].file == "a"


def test_with_nothing_to_compare_the_last_one_is_chosen_and_the_reason_says_so():
    save, reason = choose([Save("a", 5), Save("b", 10)], "FACE_MODEL=off")
    assert save.file == "b"
    assert reason == "It is the last one; nothing could be compared: there is no validation loss, and no likeness (FACE_MODEL=off)."
    assert choose([Save("b", 10)])[1].startswith("It is the only one; nothing could be compared: ")


@pytest.mark.parametrize(
    ("saves", "file", "reason"),
    [
        (
            [Save("a", 5, SPREAD, 0.2), Save("b", 10, FLAT, 0.1)],
            "b",
            "Its likeness, 0.500 (4 samples), is within one standard error (0.065) of the best, 0.550, and it changes images "
            "without the trigger word least (0.100).",
        ),
        (
            [Save("a", 5, SPREAD, 0.1), Save("b", 10, FLAT, 0.2)],
            "a",
            "Its likeness, 0.550 (4 samples), is the best, and of the 2 within one standard error (0.065) of it, it changes images "
            "without the trigger word least (0.100).",
        ),
        (
            [Save("a", 5, FLAT, 0.1), Save("b", 10, (*SPREAD, 1.8), 0.9), Save("c", 15, around(0.9), 0.8)],
            "c",
            "Its likeness, 0.900 (4 samples), is the best; no other is within one standard error (0.000).",
        ),
        ([Save("a", 5, SPREAD)], "a", "It is the only one whose likeness could be measured: 0.550 (4 samples)."),
        (
            [Save("a", 5, FLAT), Save("b", 10, SPREAD)],
            "a",
            "Its likeness, 0.500 (4 samples), is within one standard error (0.065) of the best, 0.550, and it is the earliest of "
            "these.",
        ),
    ],
)
def test_the_reason_is_one_line_with_the_numbers(saves, file, reason):
    save, why = choose(saves)
    assert (save.file, why) == (file, reason)


def test_the_lowest_strength_within_one_standard_error_of_strength_1():
    assert lowest_strength({0.6: around(0.48), 0.8: around(0.49), 1.0: SPREAD}) == (
        0.8,
        "0.8 is the lowest strength whose likeness, 0.490, is within one standard error (0.065) of that at 1, 0.550.",
    )
    assert lowest_strength({0.6: around(0.49), 0.8: around(0.3), 1.0: SPREAD})[0] == 0.6
    assert lowest_strength({0.6: around(0.9), 0.8: around(0.3), 1.0: SPREAD})[0] == 0.6
    assert lowest_strength({0.6: FLAT, 0.8: around(0.59), 1.0: around(0.6)}) == (
        1.0,
        "Likeness is lower at smaller strengths, by more than one standard error (0.000).",
    )


def test_strengths_with_too_few_scores_are_not_compared():
    assert lowest_strength({0.6: around(0.6, 3), 0.8: around(0.6), 1.0: around(0.6)})[0] == 0.8
    assert lowest_strength({0.6: FLAT, 0.8: FLAT, 1.0: around(0.5, 3)}) == (1.0, "")
    assert lowest_strength({}) == (1.0, "")


def test_metadata_of_the_recommended_file():
    assert Recommendation("mia-000005.safetensors", 5, 0.8, "Because.").metadata == {
        "loracat_recommended_file": "mia-000005.safetensors",
        "loracat_recommended_strength": "0.8",
        "loracat_recommended_reason": "Because.",
    }
