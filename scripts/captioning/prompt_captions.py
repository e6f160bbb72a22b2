"""The prompts in manifest.jsonl -> sentences for captions: what the image was made to show, with the trigger word for the person.

`PromptRules` is pure. A sentence that it makes has no line breaks, no emphasis of ComfyUI and no instructions.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.captions import caption_text
from captioning.image_audit import IndexedImage
from common.captions import in_one_line, leads_with_trigger
from common.dataset_layout import DatasetFolder, name_in
from common.files import read_json_lines

MAX_PROMPT_LENGTH = 5_000
"""Characters. A longer text is not a prompt, nor a caption: training reads at most 600 tokens."""
_END = r"[.!?](?:\s|$)"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufeff]")
_MARK = re.compile(r"\s*([,;]|[.!?]+(?=\s|$))\s*")
"""What separates the pieces of a text. The point in f/1.8 does not."""


@dataclass(frozen=True)
class ImagePrompt:
    """What the manifest knows of how an image was made."""

    texts: tuple[str, ...]
    """The prompts that lead to the image, the nearest first."""
    person: str
    """How they describe the person; empty if that is not known."""


def read_prompts(folder: DatasetFolder, indexed: Mapping[Path, IndexedImage]) -> dict[Path, ImagePrompt]:
    """The prompts of the images whose content the manifest lists; a line with the image's own name comes first.

    An image that was changed after it was collected has no prompt: it may show something else.
    """
    lines: dict[str, dict[str, Any]] = {}
    for line in read_json_lines(folder.manifest):
        name, sha256 = line.get("file"), line.get("sha256")
        if isinstance(name, str) and isinstance(sha256, str):
            lines[f"{sha256} {name}"] = line
            lines.setdefault(sha256, line)
    prompts = {}
    for path, image in indexed.items():
        named = f"{image.sha256} {folder.images.name}/{name_in(folder.images, path)}"
        if image.sha256 and (line := lines.get(named) or lines.get(image.sha256)) and (prompt := _parse_prompt(line)):
            prompts[path] = prompt
    return prompts


def _parse_prompt(line: dict[str, Any]) -> ImagePrompt | None:
    """The prompts of a line; one that an earlier version wrote has them as the lines of `prompt`, in parts."""
    texts, prompt, person = line.get("texts"), line.get("prompt"), line.get("person")
    if not isinstance(texts, list):
        texts = [prompt, *prompt.splitlines()[:1]][::-1] if isinstance(prompt, str) else []
    texts = tuple(text for text in texts if isinstance(text, str) and text.strip() and len(text) <= MAX_PROMPT_LENGTH)
    return ImagePrompt(texts, person if isinstance(person, str) else "") if texts else None


class PromptRules:
    """The settings that make a sentence of a prompt."""

    def __init__(self, trigger: str, person: Sequence[str], remove: Sequence[str]):
        """`person` are the phrases that the trigger word replaces, `remove` those that are left out; `*` stands for any text
        within a sentence, and what is left out stands between punctuation marks."""
        self._trigger = trigger
        self._person = _any_of(person)
        self._remove = re.compile(rf"(?:(?<=[,.;!?\n])|^)\s*(?:{_any_of(remove).pattern})\s*(?=[,;\n]|{_END}|$)", re.IGNORECASE)

    def sentence(self, prompt: ImagePrompt) -> str:
        """What the nearest prompt says of the scene; "" if the prompts say nothing but instructions and the person."""
        sentences = (self._sentence(text, prompt.person) for text in prompt.texts)
        return next((text for text in sentences if 0 < len(text) <= MAX_PROMPT_LENGTH), "")

    def _sentence(self, text: str, person: str) -> str:
        text, person = _plain(text), _plain(person).strip().rstrip(".!?,;")
        if person:
            text = re.sub(_pattern(person), lambda _: self._trigger, text, flags=re.IGNORECASE)
        before = None
        while text != before:  # two phrases side by side share the mark between them
            before, text = text, self._remove.sub("", text)
        text = self._person.sub(lambda _: self._trigger, text)
        return self._joined(in_one_line(text))

    def _joined(self, text: str) -> str:
        """The pieces of the text that say something, with one punctuation mark after each."""
        pieces = _MARK.split(text)
        kept: list[list[str]] = []
        for piece, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            if re.search(r"\w", piece) and piece.casefold() != self._trigger.casefold():
                kept.append([piece, mark[:1]])
            elif kept and kept[-1][1] in (",", ";", "") and mark not in ("", ",", ";"):
                kept[-1][1] = mark[:1]
        if kept and kept[-1][1] in (",", ";"):
            kept[-1][1] = ""
        return " ".join("".join(piece) for piece in kept)


def prompt_caption(trigger: str, tags: Collection[str], sentence: str) -> str:
    """The caption of the trigger word, `tags` and a sentence. The trigger word is not repeated if the sentence begins with it."""
    if not tags and leads_with_trigger(sentence, trigger):
        return sentence
    # Not a name or an abbreviation: those have other capitals, or none after the first letter.
    lowered = re.sub(r"^[A-Z](?=[a-z-]* ?[a-z])", lambda found: found[0].lower(), sentence)
    return caption_text(trigger, [*tags, lowered])


def _plain(text: str) -> str:
    """The text without ComfyUI's emphasis `(word:1.2)`, LoRA tags, embeddings and characters that no caption may have."""
    text = _UNPRINTABLE.sub("", text)
    text = re.sub(r"<[^<>\n]*>|\bembedding:\S+|\bBREAK\b", ",", text)
    text = re.sub(r":\s*-?\d*\.?\d+\s*(?=\))", "", text)
    return re.sub(r"(?<!\\)[()]", "", text)


def _any_of(phrases: Sequence[str]) -> re.Pattern[str]:
    """Any of the phrases as words of their own, the longest that fits; nothing for no phrases."""
    patterns = [_pattern(phrase) for phrase in sorted(phrases, key=len, reverse=True)]
    return re.compile("|".join(patterns) or r"(?!)", re.IGNORECASE)


def _pattern(phrase: str) -> str:
    """The phrase with any white space between its words; `*` matches up to the end of the sentence."""
    parts = [r"\s+".join(re.escape(word) for word in part.split()) for part in phrase.split("*")]
    spaced = [(r"\s+" if part[:1].isspace() else "", r"\s+" if part[-1:].isspace() else "") for part in phrase.split("*")]
    any_text = rf"(?:(?!{_END})[^\n])*"
    pieces = [
        (before if number else "") + part + (after if number < len(parts) - 1 and part else "")
        for number, (part, (before, after)) in enumerate(zip(parts, spaced, strict=True))
    ]
    return rf"(?<!\w)(?:{any_text.join(pieces)})(?!\w)"
