"""What sample images show: prompts that the user wrote, or six that are made from the captions. Pure but for reading a file."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.captions import has_trigger
from common.errors import SettingsError, bullet_list
from common.files import parse_json
from common.settings import places_of_path
from training.config import SampleSettings

MAX_PROMPTS = 32
"""Each prompt costs an image for every saved LoRA."""
SIDE_STEP_PX = 64
CLASS_WORDS = tuple(
    """
    1girl 1boy woman man girl boy lady person child baby cat dog horse bird fox wolf dragon robot car motorcycle house building
    landscape chair shoe bag
    """.split()  # noqa: SIM905 - a list of that many strings is harder to read
)
"""Tags and words that say what kind of subject an image shows; of those in as many captions, the earlier one."""
SCENES = {
    "standing on a beach at sunset": ("beach", "sunset", "sea", "ocean"),
    "in a snowy forest": ("snow", "forest"),
    "in a library": ("library", "book", "bookshelf"),
    "in a city street at night": ("city", "street", "night"),
    "in a desert": ("desert", "sand"),
    "in a flower garden": ("garden", "flower", "flowers"),
    "in a kitchen": ("kitchen",),
    "on a mountain top": ("mountain", "mountains"),
    "in a medieval castle": ("castle",),
    "in a spaceship": ("spaceship", "spacecraft"),
    "under water": ("underwater", "under water"),
    "in a neon-lit bar": ("neon", "bar"),
}
"""Scenes, and the words by which a caption that has the scene is recognized."""
_OPTION = re.compile(r"(?:^|\s+)--(?=[A-Za-z]+(?:\s|$))")
_KOHYA = {"n": "negative", "w": "width", "h": "height", "d": "seed", "l": "guidance", "s": "steps"}
"""kohya's options. Its others, such as --ss for the sampler, have no effect."""
_JSON_NAMES = {
    "prompt": "text",
    "negative_prompt": "negative",
    "negative": "negative",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "scale": "guidance",
    "cfg_scale": "guidance",
    "guidance": "guidance",
    "sample_steps": "steps",
    "steps": "steps",
}
_LIMITS = {"width": (64, 4096), "height": (64, 4096), "seed": (0, 2**63 - 1), "guidance": (1.0, 100.0), "steps": (1, 1000)}


@dataclass(frozen=True)
class SamplePrompt:
    """One column of the sample images. `None`: as the settings say."""

    text: str
    kind: str
    """`trigger`, `scene` or `class` (without the trigger word) if it is made from the captions, `user` if it was written."""
    negative: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    guidance: float | None = None
    steps: int | None = None


def sample_prompts(
    settings: SampleSettings, captions: Mapping[str, Sequence[str]], classes: Mapping[str, str], quality_tags: str = ""
) -> list[SamplePrompt]:
    """The prompts of a run with these `captions` by trigger word, and the class words of those trigger words that have one.
    `quality_tags` are those of the base model's family, with which default prompts begin. Raises SettingsError with everything
    that is wrong with prompts that the user wrote."""
    if not settings.sample_prompts.strip():
        prompts = default_prompts(captions, classes, settings.subject_class)
        return [replace(prompt, text=f"{quality_tags}, {prompt.text}") for prompt in prompts] if quality_tags else prompts
    origin, content = _read(settings.sample_prompts)
    prompts, problems = parse_json_prompts(content) if content.lstrip()[:1] in ("[", "{") else parse_kohya_prompts(content)
    if not prompts and not problems:
        problems = ["there is no prompt in it; write one, or leave SAMPLE_PROMPTS empty"]
    if len(prompts) > MAX_PROMPTS:
        problems.append(f"{len(prompts)} prompts are too many; keep at most {MAX_PROMPTS}")
    if problems:
        raise SettingsError(bullet_list(f"{origin}:", problems))
    return prompts


def default_prompts(
    captions: Mapping[str, Sequence[str]], classes: Mapping[str, str], subject_class: str = ""
) -> list[SamplePrompt]:
    """Each trigger word alone, with three seeds, and in two scenes that no caption has (or the fewest have); and the class words
    without a trigger. Several trigger words have one scene each, and if they are many, one seed and no scene."""
    words = {word: classes.get(word) or subject_class.strip() or class_word(word, texts) for word, texts in captions.items()}
    of_classes = [SamplePrompt(word, "class") for word in dict.fromkeys(words.values())]
    scenes = unseen_scenes([text for texts in captions.values() for text in texts])
    scenes, seeds = scenes if len(captions) == 1 else scenes[:1], 3
    if len(captions) * (seeds + len(scenes)) + len(of_classes) > MAX_PROMPTS:
        scenes, seeds = (), 1
    prompts = []
    for trigger in captions:
        prompts += [SamplePrompt(trigger, "trigger")] * seeds  # fewer than `recommendation.MIN_SCORED` in all are not compared
        prompts += [SamplePrompt(f"{trigger}, {scene}", "scene") for scene in scenes]
    return [*prompts, *of_classes][:MAX_PROMPTS]


def class_word(trigger: str, captions: Sequence[str]) -> str:
    """The class word that most captions have; without any, that in the trigger word, else the most frequent tag, else "person"."""
    counts = {word: sum(has_trigger(caption, word) for caption in captions) for word in CLASS_WORDS}
    counts = {word: count - _within(trigger, word, captions) for word, count in counts.items()}
    best = max(counts, key=counts.get)  # the first of several
    if counts[best] > 0:
        return best
    parts = re.split(r"[\W_]+", trigger.lower())
    if named := [word for word in CLASS_WORDS if word in parts]:
        return named[0]
    tags = Counter(tag for caption in captions for tag in {piece.strip() for piece in caption.split(",")} if tag)
    others = [tag for tag, _ in sorted(tags.items(), key=lambda item: (-item[1], item[0])) if not has_trigger(tag, trigger)]
    return others[0] if others and len(others[0].split()) <= 3 else "person"


def _within(trigger: str, word: str, captions: Sequence[str]) -> int:
    """In how many captions `word` occurs only as a part of a trigger word of several words, such as "my woman"."""
    if not has_trigger(trigger, word):
        return 0
    pattern = re.compile(r"[\s_]+".join(map(re.escape, re.split(r"[\s_]+", trigger))), re.IGNORECASE)
    return sum(has_trigger(caption, word) and not has_trigger(pattern.sub(" ", caption), word) for caption in captions)


def unseen_scenes(captions: Sequence[str]) -> tuple[str, str]:
    """Two of SCENES: the first ones among those whose words the fewest captions have."""
    seen = {scene: sum(any(has_trigger(text, word) for word in words) for text in captions) for scene, words in SCENES.items()}
    first, second, *_ = sorted(SCENES, key=seen.get)  # a stable sort
    return first, second


def _read(setting: str) -> tuple[str, str]:
    """What messages call the prompts, and their text: the content of the file `setting` if it names one, else `setting`."""
    is_one_word_path = "\n" not in setting and re.search(r"\.(txt|json)\s*$", setting) is not None
    if not is_one_word_path:
        return "SAMPLE_PROMPTS", setting
    path = next((place for place in places_of_path(setting.strip()) if place.is_file()), None)
    if path is None:
        raise SettingsError(f"SAMPLE_PROMPTS: {setting.strip()} is not a file; write the prompts into it, or leave it empty")
    try:
        return str(path), path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise SettingsError(f"SAMPLE_PROMPTS: {path} cannot be read: {reason}; save it as text in UTF-8") from None


def parse_json_prompts(content: str) -> tuple[list[SamplePrompt], list[str]]:
    """The prompts of a JSON list of texts or objects (`prompt`, `negative_prompt`, `width`, `height`, `seed`, `scale`,
    `sample_steps`), and what is wrong with it."""
    try:
        entries = parse_json(content.encode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        return [], [f"not valid JSON: {error}"]
    prompts, problems = [], []
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        fields = {"prompt": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
            problems.append(f'prompt {number}: must be a text, or an object with a "prompt"')
            continue
        known = {_JSON_NAMES[name]: value for name, value in fields.items() if name in _JSON_NAMES and value is not None}
        prompts.append(_prompt(known, f"prompt {number}", problems))
    return prompts, problems


def parse_kohya_prompts(content: str) -> tuple[list[SamplePrompt], list[str]]:
    """The prompts of a text with one prompt a line and kohya's options behind it (`--n` negative prompt, `--w` width, `--h` height,
    `--d` seed, `--l` guidance, `--s` steps), and what is wrong with it. Empty lines and lines that begin with # are skipped."""
    prompts, problems = [], []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        text, *options = _OPTION.split(line.strip())
        fields: dict[str, Any] = {"text": text}
        for name, _, value in (option.partition(" ") for option in options):
            if name.lower() in _KOHYA:
                fields[_KOHYA[name.lower()]] = value.strip()
        prompts.append(_prompt(fields, f"line {number}", problems))
    return prompts, problems


def _prompt(fields: dict[str, Any], where: str, problems: list[str]) -> SamplePrompt:
    """The prompt with these fields; what is wrong with them is added to `problems`. Sides are rounded down to SIDE_STEP_PX."""
    values: dict[str, Any] = {name: fields.get(name, "") for name in ("text", "negative")}
    for name, value in values.items():
        if not isinstance(value, str):
            problems.append(f"{where}: the {name} must be a text")
    for name, (least, most) in _LIMITS.items():
        if name not in fields:
            continue
        number, kind = fields[name], type(least)
        try:
            if isinstance(number, bool):
                raise ValueError
            values[name] = kind(number) if kind is float or not isinstance(number, float) else int(str(number).removesuffix(".0"))
            if not least <= values[name] <= most:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{where}: {name} must be a number from {least:g} to {most:g} (is {str(number)[:40]!r})")
            values[name] = None
    for side in ("width", "height"):
        if values.get(side):
            values[side] = max(SIDE_STEP_PX, values[side] // SIDE_STEP_PX * SIDE_STEP_PX)
    return SamplePrompt(**values, kind="user")
