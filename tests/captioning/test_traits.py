"""Tags that describe the person are distinguished from tags of clothing, actions and surroundings."""

import pytest

from captioning.captions import GENERAL, Tag
from captioning.traits import TRAITS, WORDS, earlier_share, find_traits, prune_common_traits

OF_THE_PERSON = """
long_hair very_long_hair short_hair medium_hair black_hair light_brown_hair blonde_hair platinum_blonde_hair
multicolored_hair two-tone_hair streaked_hair gradient_hair colored_inner_hair curly_hair wavy_hair spiked_hair bangs
blunt_bangs parted_bangs swept_bangs ponytail high_ponytail side_ponytail twintails low_twintails short_twintails braid
single_braid twin_braids french_braid hair_bun double_bun single_hair_bun bob_cut hime_cut ahoge sidelocks
hair_between_eyes hair_over_one_eye drill_hair hair_intakes one_side_up two_side_up bald blue_eyes brown_eyes green_eyes
red_eyes aqua_eyes heterochromia slit_pupils symbol-shaped_pupils eyelashes thick_eyebrows freckles mole mole_under_eye
mole_under_mouth mole_on_breast scar scar_on_face scar_across_eye facial_mark fang facial_hair beard stubble mustache
goatee sideburns dark_skin dark-skinned_female dark-skinned_male pale_skin tan colored_skin blue_skin tattoo arm_tattoo
breasts large_breasts medium_breasts small_breasts flat_chest huge_breasts muscular muscular_male abs toned thick_thighs
wide_hips curvy plump petite tall_female 1girl 1boy male_focus mature_female old_man child aged_down animal_ears
cat_ears pointy_ears tail cat_tail horns wings halo cat_girl
""".split()  # noqa: SIM905
CAN_CHANGE = """
solo 2girls multiple_girls smile open_mouth closed_mouth closed_eyes half-closed_eyes one_eye_closed blush
looking_at_viewer looking_back tears expressionless v-shaped_eyebrows parted_lips tongue_out teeth sitting standing
holding lying kneeling arms_up hand_on_hip hand_in_own_hair adjusting_hair hair_ornament hair_ribbon hair_bow hairband
hairclip hair_flower hair_scrunchie hair_tubes floating_hair wet_hair hat dress shirt school_uniform bikini gloves
long_sleeves skirt thighhighs glasses earrings necklace jewelry makeup lipstick nail_polish piercing eyepatch
fake_animal_ears cat_ear_headphones collarbone cleavage navel bare_shoulders thighs midriff upper_body full_body
portrait close-up cowboy_shot from_side from_behind profile outdoors indoors white_background simple_background
blurry_background sky beach night tree realistic photorealistic depth_of_field sweat wet red_bow black_dress
brown_footwear white_gloves blue_sky red_rose cat dog tail_ornament horn_ornament wing_collar eyes_visible_through_hair
mature_content animal_print black_bow grey_background pink_lips
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", OF_THE_PERSON)
def test_tags_of_the_person(name):
    assert find_traits([name])


@pytest.mark.parametrize("name", CAN_CHANGE)
def test_tags_that_stay(name):
    assert not find_traits([name])


def test_every_trait_has_its_aspect():
    assert find_traits(["blue eyes", "Long Hair", "1girl"]) == {
        "blue eyes": "eyes",
        "long hair": "hair length",
        "1girl": "age and sex",
    }


def test_lists_are_written_cleanly():
    for listed in (*WORDS.values(), *TRAITS.values()):
        entries = [entry.strip() for entry in listed.split(",")]
        assert all(entries)
        assert len(entries) == len(set(entries))
    words = " ".join(TRAITS.values()).replace(",", " ").split()
    assert {word for word in words if word.isupper() and word.isalpha()} == set(WORDS)


NAMES = ["1girl", "brown_hair", "blue_eyes", "smile", "white_shirt", "freckles"]


def pruned_names(min_share, images):
    tags = [Tag(name, GENERAL) for name in NAMES]
    pruning = prune_common_traits(tags, [[NAMES.index(name) for name in image.split()] for image in images], min_share)
    return [
        {NAMES[index]: share for index, share in shares.items()} for shares in (pruning.pruned, pruning.kept, pruning.suggested)
    ]


IMAGES = [
    "1girl brown_hair smile white_shirt",
    "1girl brown_hair blue_eyes white_shirt",
    "1girl brown_hair blue_eyes white_shirt smile",
    "1girl freckles white_shirt",
]


def test_traits_of_enough_images_are_pruned_and_nothing_else_is():
    pruned, kept, _ = pruned_names(0.75, IMAGES)
    assert pruned == {"1girl": 1.0, "brown_hair": 0.75}
    assert kept == {"blue_eyes": 0.5, "freckles": 0.25}
    assert pruned_names(0.76, IMAGES)[0] == {"1girl": 1.0}


def test_off_prunes_nothing_and_suggests_what_nearly_all_of_enough_images_have():
    assert pruned_names(0, IMAGES)[0] == {}
    assert pruned_names(0, IMAGES)[2] == {}
    assert pruned_names(0, IMAGES * 2)[2] == {"1girl": 1.0}
    assert pruned_names(0.5, IMAGES * 2)[2] == {}


def test_no_images():
    assert pruned_names(0.8, []) == [{}, {}, {}]


def test_auto_prunes_what_nearly_all_of_enough_images_have_but_not_the_class():
    images = ["1girl brown_hair smile"] * 8 + ["1girl blue_eyes smile"] * 2
    assert pruned_names("auto", images)[0] == {"brown_hair": 0.8}
    assert pruned_names("auto", images[:7])[0] == {}
    assert pruned_names("auto", images)[1] == {"1girl": 1.0, "blue_eyes": 0.2}


@pytest.mark.parametrize(
    ("record", "share"),
    [
        ({"pictures": 9, "caption_prune_traits": 0.0, "pruned": {}, "kept": {}}, 0.0),
        ({"concepts": {"a": {"caption_prune_traits": 0.8}, "b": {}}}, 0.8),
        ({"pictures": 9, "caption_prune_traits": 0.8, "setting": "auto"}, None),
        ({"concepts": {"a": {"caption_prune_traits": 0.0, "setting": 0.0}}}, None),
        *[(record, None) for record in ({}, [], None, {"concepts": []}, {"concepts": {}}, {"concepts": {"a": 1}})],
        *[({"caption_prune_traits": value}, None) for value in ("0.8", 2, -1, None, True, float("nan"))],
    ],
)
def test_the_share_of_an_earlier_version_is_found_in_its_record(record, share):
    assert earlier_share(record) == share
