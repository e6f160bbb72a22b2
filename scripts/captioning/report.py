"""What is said about the choice of tags, and the table at the end: what the captions of the data set say."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from captioning.captions import comparable, words_of
from captioning.journal import UnusableCaptionError, text_of
from captioning.tag_selection import TagChoice
from captioning.traits import WORTH_SUGGESTING, Pruning
from common.clip_tokens import CHUNK_TOKENS, ClipTokens
from common.dataset_layout import DatasetFolder, ImageFile, name_in

FEW_TAGS = 3
"""An image that is described with fewer tags teaches the trigger word all that is in it."""


_TAGS_SHOWN, _NAMES_SHOWN = 20, 5


def choice(choice: TagChoice, pruning: Pruning) -> str:
    """Lines about entries that no tag answers to, and about the person's traits: left out, kept, or worth leaving out."""
    lines = []
    if unknown := choice.without_effect():
        lines.append(f"this model has no such tags: {', '.join(unknown)}")
    if pruning.least:
        lines.append(f"left out, because at least {pruning.least:.0%} of the images have it: {_shares(choice, pruning.pruned)}")
        lines.append(f"the person's traits that stay: {_shares(choice, pruning.kept)}")
    elif suggested := pruning.suggested():
        lines.append(f"the person's traits in nearly all images: {_shares(choice, suggested)}")
        lines.append(
            f"  CAPTION_PRUNE_TRAITS={WORTH_SUGGESTING} leaves them out of the captions, so that the trigger word learns them"
        )
    return "".join(f"{line}\n" for line in lines)


def traits(choice: TagChoice, pruning: Pruning) -> dict:
    """The same about traits for the record `traits.json`: share of the images by tag."""
    pruned, kept = (
        {choice.word(index): round(share, 4) for index, share in shares.items()} for shares in (pruning.pruned, pruning.kept)
    )
    return {"pictures": pruning.images, "caption_prune_traits": pruning.least, "pruned": pruned, "kept": kept}


def table(captions: Mapping[str, str], trigger: str, chunks: int, tokens: ClipTokens | None) -> str:
    """`captions` (name -> text) in a few lines: tags by frequency, captions that training cuts off, captions of few tags.

    Training reads at most `chunks` chunks of CLIP's tokens; without `tokens` nothing is said about length.
    """
    of_each = {
        name: [word for word in words_of(text) if comparable(word) != comparable(trigger)] for name, text in captions.items()
    }
    frequency = Counter(word for words in of_each.values() for word in dict.fromkeys(words))
    lines = [f"tags by frequency, in {len(captions)} captions with {len(frequency)} different tags:"]
    lines += _frequent(frequency, len(captions))
    few = [name for name, words in of_each.items() if len(words) < FEW_TAGS]
    if few:
        lines.append(f"{len(few)} captions have fewer than {FEW_TAGS} tags: {_some(few)}")
    most = chunks * CHUNK_TOKENS
    if tokens is None:
        lines.append("lengths in tokens are not counted: no model in MODELS_DIR has a tokenizer")
    elif long := [name for name, text in captions.items() if tokens.count(text) > most]:
        lines.append(f"{len(long)} captions are longer than the {most} tokens that training reads: {_some(long)}")
        lines.append("  their ends are cut off; set CAPTION_MAX_TAGS, or raise CAPTION_CHUNKS")
    return "\n".join(lines)


def texts(images: Sequence[ImageFile], folder: DatasetFolder) -> dict[str, str]:
    """Name -> text of every caption that is there and can be read."""
    found = {}
    for image in images:
        if not image.caption_path.is_file():  # a pipe would be waited for
            continue
        with contextlib.suppress(UnusableCaptionError):
            found[name_in(folder.images, image.caption_path)] = text_of(image.caption_path)
    return found


def _frequent(frequency: Counter[str], captions: int) -> Iterator[str]:
    for word, count in frequency.most_common(_TAGS_SHOWN):
        yield f"  {word:30} {count:5}  {count / captions:4.0%}"
    rest = len(frequency) - _TAGS_SHOWN
    if rest > 0:
        yield f"  and {rest} more"


def _shares(choice: TagChoice, shares: Mapping[int, float]) -> str:
    return ", ".join(f"{choice.word(index)} {share:.0%}" for index, share in shares.items()) or "none"


def _some(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
