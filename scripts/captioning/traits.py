"""Tags that describe the person, and which of them nearly every image has: the trigger word should learn those. Pure.

A trait that is in every caption is learned as the meaning of its tag, and the trigger word alone does not reproduce it. A
trait that is left out of the captions can only be learned as part of the trigger word. Whatever a person can change between
two images stays in the captions: clothing, jewellery, hair ornaments, make-up, expression, gaze, pose, background, light,
framing.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from captioning.captions import Tag, normalized, split_tags
from captioning.tag_selection import match_tags

SUGGESTED_MIN_SHARE = 0.8
"""Traits in at least this share of the images are pruned by "auto", and suggested for pruning while it is off."""
SUGGESTED_MIN_IMAGES = 8
"""With fewer images, a share is too uncertain for a suggestion, and for pruning by itself."""
CLASS_TAGS = frozenset({"1girl", "1boy", "1other"})
"""Traits that "auto" keeps: the word for the kind of subject, which sample images and prior preservation need."""

WORDS = {
    "COLOUR": """
        aqua, black, blonde, blue, brown, green, grey, orange, pink, purple, red, silver, white, yellow, amber, golden,
        hazel, light blue, light brown, light green, light purple, dark blue, dark brown, dark green, dark red,
        dark grey, platinum blonde, strawberry blonde, multicolored, two-tone, gradient, rainbow
    """,
    "LENGTH": "short, medium, long, very short, very long, absurdly long",
    "SIDE": "high, low, side, short, long, front, folded, split",
    "ANIMAL": """
        animal, bat, bear, bird, cat, cow, deer, demon, dog, dragon, fox, goat, horse, lion, monkey, mouse, pig, rabbit,
        raccoon, sheep, squirrel, tiger, wolf
    """,
    "SIZE": "flat, small, medium, large, huge, gigantic",
    "SEX": "female, male, woman, man, girl, boy",
}
"""What the words in capitals in TRAITS stand for: each of these in turn."""
TRAITS = {
    "hair colour": "COLOUR hair, split-color hair, streaked hair, colored inner hair, colored tips, roots (hair)",
    "hair length": "LENGTH hair, big hair, bald, bald SEX, buzz cut",
    "hair style": """
        curly hair, wavy hair, straight hair, messy hair, spiked hair, drill hair, antenna hair, flipped hair,
        parted hair, thick hair, slicked back hair, hair slicked back, undone hair, pixie cut, bob cut, bowl cut,
        hime cut, wolf cut, undercut, mullet, mohawk, afro, dreadlocks, cornrows, topknot, updo, half updo, hair up,
        hair down, hair pulled back, bangs, blunt bangs, parted bangs, swept bangs, crossed bangs, asymmetrical bangs,
        choppy bangs, curtained hair, widow's peak, ponytail, SIDE ponytail, twintails, SIDE twintails, tri tails,
        quad tails, one side up, two side up, ahoge, huge ahoge, braid, single braid, twin braids, side braid,
        side braids, french braid, crown braid, multiple braids, low-braided long hair, braided bun, braided ponytail,
        braided bangs, hair bun, single hair bun, double bun, cone hair bun, single side bun, hair rings, sidelocks,
        asymmetrical sidelocks, drill sidelocks, twin drills, ringlets, hair intakes, hair flaps, hair between eyes,
        hair over one eye, hair over eyes, asymmetrical hair
    """,
    "eyes": """
        COLOUR eyes, heterochromia, tareme, tsurime, sanpaku, slit pupils, COLOUR pupils, symbol-shaped pupils,
        star-shaped pupils, cross-shaped pupils, no pupils, ringed eyes, COLOUR sclera, colored sclera, eyelashes,
        long eyelashes, COLOUR eyelashes, colored eyelashes, bags under eyes, third eye
    """,
    "face": """
        thick eyebrows, short eyebrows, forked eyebrows, COLOUR eyebrows, thick lips, full lips, big nose, pointy nose,
        freckles, body freckles, dimples, wrinkled skin, facial mark, forehead mark, cheek mark, whisker markings, mole,
        mole above *, mole under *, mole on *, multiple moles, scar, scar on *, scar across *, burn scar, fang, fangs,
        skin fang, sharp teeth, buck teeth
    """,
    "facial hair": """
        facial hair, beard, full beard, long beard, thick beard, mustache, thick mustache, goatee, stubble, sideburns,
        long sideburns, thick sideburns, COLOUR beard, COLOUR mustache
    """,
    "skin": """
        COLOUR skin, dark skin, pale skin, tan, very dark skin, colored skin, dark-skinned SEX, tattoo, *tattoo, albino,
        vitiligo
    """,
    "body": """
        breasts, SIZE breasts, flat chest, pectorals, large pectorals, muscular, muscular SEX, abs, toned, toned SEX,
        biceps, thick thighs, thick arms, wide hips, narrow waist, broad shoulders, curvy, plump, fat, fat SEX, slim,
        skinny, petite, tall, tall SEX, short SEX, giant, giantess, chest hair, arm hair, leg hair, armpit hair
    """,
    "age and sex": """
        1girl, 1boy, 1other, SEX, SEX focus, mature SEX, old, old SEX, young SEX, adult, teenage, child, male child,
        female child, aged down, aged up, androgynous, bishounen, otoko no ko, loli, shota
    """,
    "not human": """
        ANIMAL ears, ANIMAL ear fluff, pointy ears, long pointy ears, elf, ANIMAL girl, ANIMAL boy, tail, ANIMAL tail,
        multiple tails, horns, single horn, ANIMAL horns, wings, ANIMAL wings, feathered wings, low wings, head wings,
        halo, monster girl, monster boy, robot, android, extra ears, extra eyes, extra arms
    """,
}
"""Aspect of the person -> the tags that describe it. `*` matches any text."""


@dataclass(frozen=True)
class TraitPruning:
    """The person's traits in a data set: tag index -> share of the images that have it, the most frequent first."""

    images: int
    min_share: float
    """Traits in at least this share of the images are pruned; 0: off."""
    pruned: dict[int, float]
    kept: dict[int, float]
    suggested: dict[int, float]
    """Traits worth pruning, while pruning is off."""


def prune_common_traits(tags: Sequence[Tag], selected: Sequence[Collection[int]], setting: float | Literal["auto"]) -> TraitPruning:
    """Prune the traits that at least a share of the images have; `selected` are the tags (as indices) of each image."""
    is_auto = setting == "auto"
    min_share = setting if not is_auto else SUGGESTED_MIN_SHARE if len(selected) >= SUGGESTED_MIN_IMAGES else 0.0
    aspects = find_traits([tag.name for tag in tags])
    traits = {index for index, tag in enumerate(tags) if normalized(tag.name) in aspects}
    stays = {index for index in traits if is_auto and normalized(tags[index].name) in CLASS_TAGS}
    counts = Counter(index for of_image in selected for index in of_image if index in traits)
    shares = {index: count / len(selected) for index, count in counts.most_common()}
    pruned = {index: share for index, share in shares.items() if min_share and share >= min_share and index not in stays}
    kept = {index: share for index, share in shares.items() if index not in pruned}
    may_suggest = not min_share and len(selected) >= SUGGESTED_MIN_IMAGES
    suggested = {index: share for index, share in kept.items() if may_suggest and share >= SUGGESTED_MIN_SHARE}
    return TraitPruning(len(selected), min_share, pruned, kept, suggested)


def earlier_share(record: Any) -> float | None:
    """The share with which an earlier version, which did not have "auto", captioned the data set of this `traits.json`; None if
    it was captioned later. "auto" keeps to it, so that the captions of a half trained data set stay as they are."""
    record = record if isinstance(record, dict) else {}
    concepts = record.get("concepts")
    of_any = next(iter(concepts.values()), None) if isinstance(concepts, dict) else record
    share = of_any.get("caption_prune_traits") if isinstance(of_any, dict) and "setting" not in of_any else None
    return float(share) if type(share) in (int, float) and 0 <= share <= 1 else None


def find_traits(names: Collection[str]) -> dict[str, str]:
    """Those of the tags `names` that describe the person, in normalized spelling -> the aspect in TRAITS."""
    known = {normalized(name) for name in names}
    aspects = {}
    for aspect, listed in TRAITS.items():
        patterns = []
        for entry in split_tags(listed):
            choices = [split_tags(WORDS[word]) if word in WORDS else [word] for word in entry.split()]
            patterns += [" ".join(words) for words in product(*choices)]
        aspects |= dict.fromkeys(match_tags(known, patterns), aspect)
    return aspects
