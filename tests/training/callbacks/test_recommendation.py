"""Which LoRA is recommended, and at which strength, from numbers that are computed by hand."""

from dataclasses import replace

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


def test_the_earliest_of_those_before_the_best_that_are_as_good_is_chosen():
    """Prompt by prompt: the differences 0.01, 0, -0.01 and 0.02 have a mean of 0.005 and a standard error of 0.0065, although the
    scores themselves differ by tenths."""
    close = tuple(score - lack for score, lack in zip(SPREAD, (0.01, 0, -0.01, 0.02), strict=True))
    below = tuple(score - 0.01 for score in SPREAD)
    assert chosen(Save("a", 5, around(0.3)), Save("b", 10, close), Save("c", 15, SPREAD), Save("d", 20, close)) == "b"
    assert chosen(Save("a", 5, close), Save("b", 10, below), Save("c", 15, SPREAD)) == "c"  # a is good by chance
    assert chosen(Save("a", 5, close), Save("b", 10, close), Save("c", 15, SPREAD)) == "a"


def test_exactly_one_standard_error_is_within():
    """Differences of 0.1 +- 0.2 and 0.3: a mean of 0.1, a variance of 4 * 0.03 / 3 and a standard error of 0.1."""
    lacking = (0.1 + 0.03**0.5, 0.1 - 0.03**0.5) * 2
    near = tuple(0.5 - each for each in lacking)
    assert chosen(Save("a", 5, near), Save("b", 10, FLAT)) == "a"
    assert chosen(Save("a", 5, tuple(score - 0.001 for score in near)), Save("b", 10, FLAT)) == "b"


def test_ties_go_to_the_earlier():
    assert chosen(Save("a", 5, FLAT), Save("b", 10, FLAT), Save("c", 15, around(0.4))) == "a"
    assert chosen(Save("a", 5, FLAT, 0.9), Save("b", 10, FLAT, 0.1)) == "a"


def test_samples_of_which_it_cannot_be_told_are_left_out():
    """A LoRA with 3 is not compared, however high they are, and of two only prompts of which both can be told."""
    unknown = (*around(0.9, 3), None, None)
    assert chosen(Save("a", 5, unknown), Save("b", 10, around(0.5, 5)), Save("c", 15, (None, *FLAT))) == "b"
    four, others = (*FLAT, None), (None, *around(0.51))
    assert chosen(Save("a", 5, four), Save("b", 10, others)) == "b"  # 3 prompts in common


def test_a_loss_that_has_doubled_shows_that_the_model_breaks_down():
    losses = {0: 0.10, 5: 0.05, 10: 0.09, 15: 0.101, 20: 0.06}
    scored = [Save(name, epochs, around(epochs / 50)) for name, epochs in zip("abcde", losses, strict=True)]
    save, reason = choose(scored, losses=losses)
    assert save.file == "c"
    assert reason == (
        "Its likeness, 0.200 (4 samples), is the best. d and later ones are left out: the validation loss was more than 2 times "
        "the lowest."
    )
    save, reason = choose([replace(save, scores=()) for save in scored], "FACE_MODEL=off", losses)
    assert save.file == "c"
    assert reason == (
        "It is the last one before the model broke down; likeness was not compared: FACE_MODEL=off. d and later ones are "
        "left out: the validation loss was more than 2 times the lowest."
    )
    unsaved = {2: 0.02} | losses
    assert choose(scored[1:3], losses=unsaved)[1] == (
        "All were saved after the model had broken down; it has the lowest validation loss of them."
    )
    assert choose(scored, losses=unsaved | {2: 0.06})[0].file == "c"
    falling = {5: 0.3, 15: 0.1, 20: 0.2}  # 10 was not validated
    assert choose([Save(name, 5 * number) for number, name in enumerate("abcd", 1)], losses=falling)[0].file == "d"


def test_without_likeness_the_last_one_is_chosen_and_the_reason_says_so():
    save, reason = choose([Save("a", 5), Save("b", 10)], "FACE_MODEL=off")
    assert save.file == "b"
    assert reason == "It is the last one; likeness was not compared: FACE_MODEL=off."
    assert choose([Save("b", 10)])[1].startswith("It is the only one; likeness was not compared: ")
    few = [Save("a", 5, around(0.6, 3), 0.1), Save("b", 10, (*around(0.7, 2), None), 0.2)]
    assert choose(few)[1] == (
        "It is the last one; likeness was not compared: no LoRA has 4 samples whose likeness can be told (at most 3)."
    )


@pytest.mark.parametrize(
    ("saves", "file", "reason"),
    [
        (
            [Save("a", 5, SPREAD, 0.2), Save("b", 10, (*SPREAD[:3], 0.72), 0.1)],
            "a",
            "Its likeness, 0.550 (4 samples), is within one standard error of the best, 0.555 (b). "
            "Images without the trigger word are 0.200 from the base model's.",
        ),
        (
            [Save("a", 5, FLAT, 0.1), Save("b", 10, around(0.9))],
            "b",
            "Its likeness, 0.900 (4 samples), is the best.",
        ),
        ([Save("a", 5, SPREAD)], "a", "It is the only one whose likeness could be measured: 0.550 (4 samples)."),
    ],
)
def test_the_reason_is_one_line_with_the_numbers(saves, file, reason):
    save, why = choose(saves)
    assert (save.file, why) == (file, reason)


def test_the_lowest_strength_within_one_standard_error_of_strength_1():
    """Of SPREAD, the flat scores of 0.8 lack 0.06 +- 0.065, and those of 0.6 lack 0.07."""
    assert lowest_strength({0.6: around(0.48), 0.8: around(0.49), 1.0: SPREAD}) == (
        0.8,
        "0.8 is the lowest strength whose likeness, 0.490, is within one standard error of that at 1, 0.550.",
    )
    assert lowest_strength({0.6: around(0.49), 0.8: around(0.3), 1.0: SPREAD})[0] == 0.6
    assert lowest_strength({0.6: around(0.9), 0.8: around(0.3), 1.0: SPREAD})[0] == 0.6
    assert lowest_strength({0.6: FLAT, 0.8: around(0.59), 1.0: around(0.6)}) == (
        1.0,
        "At strength 0.6 and 0.8, likeness is lower than at 1 by more than one standard error.",
    )


def test_strengths_are_compared_prompt_by_prompt_like_files():
    """Every prompt lacks 0.03 or 0.04 at 0.8, which is far less than prompts differ, and no chance."""
    below = tuple(score - lack for score, lack in zip(SPREAD, (0.03, 0.04, 0.03, 0.04), strict=True))
    assert lowest_strength({0.8: below, 1.0: SPREAD})[0] == 1.0
    assert chosen(Save("a", 5, below), Save("b", 10, SPREAD)) == "b"
    close = tuple(score - lack for score, lack in zip(SPREAD, (0.03, -0.04, 0.03, -0.04), strict=True))
    assert lowest_strength({0.6: close, 0.8: below, 1.0: SPREAD})[0] == 0.6


def test_strengths_with_too_few_scores_are_not_compared():
    three, others = (*around(0.6, 3), None), (None, *around(0.6, 4))
    assert lowest_strength({0.6: three, 0.8: around(0.6), 1.0: around(0.6)})[0] == 0.8
    assert lowest_strength({0.6: FLAT, 0.8: FLAT, 1.0: (*around(0.5, 3), None)}) == (1.0, "")
    assert lowest_strength({0.8: (*around(0.6, 4), None), 1.0: others}) == (1.0, "")  # 3 prompts in common
    assert lowest_strength({0.6: three, 0.8: around(0.3), 1.0: around(0.6)}) == (
        1.0,
        "At strength 0.8, likeness is lower than at 1 by more than one standard error.",
    )
    assert lowest_strength({1.0: FLAT}) == lowest_strength({0.8: FLAT}) == lowest_strength({}) == (1.0, "")


def test_metadata_of_the_recommended_file():
    assert Recommendation("mia-000005.safetensors", 5, 0.8, "Because.").metadata == {
        "loracat_recommended_file": "mia-000005.safetensors",
        "loracat_recommended_strength": "0.8",
        "loracat_recommended_reason": "Because.",
    }
