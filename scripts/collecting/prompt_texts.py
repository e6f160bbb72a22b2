"""Pure: the texts that the images of a node are made from, composed as ComfyUI's text nodes compose them.

What a node makes of its inputs is known for ComfyUI's own text nodes, and for those of custom packs that do the same under
similar names: nodes that hold a text or pass one on, joins and switches. The text of any other node is taken for the prompt.
"""

import re
from collections.abc import Iterator
from typing import Any

from collecting.graph import DISPLAYS, SEPARATORS, Graph, is_link

MAX_TEXT_LENGTH = 20_000
"""Of a composed text: joins of joins can double it at each step."""
_MAX_DEPTH = 100
"""Of text nodes behind each other."""
_PROMPT_WORDS = {"text", "prompt", "positive", "pos", "caption", "clip_l", "clip_g", "t5xxl", "llama", "bert", "mt5xl", "qwen25_7b"}
_CONDITIONING_WORDS = {"conditioning", "cond", "guider"}
_HOLDER_WORDS = {"value", "string", "source", "anything", "any", "input", "wildcard"}
"""Words in the names of the inputs that hold a prompt, that lead to a node that does, and of nodes that hold any text."""
_OTHER_WORDS = set("negative neg uncond system encoder file filename path name prefix mode format type model font url".split())  # noqa: SIM905
"""Words in the names of inputs that no positive prompt is behind."""
_JOIN = re.compile("concat|join|combine|merge|append|average", re.IGNORECASE)
_PART = re.compile(r"(text|string|str|prompt|input|value|line|part|prefix|suffix|conditioning)?s?[_. ]?([a-z]|\d+|to|from)?")
"""Names of the inputs that a join joins, such as `string_a`, `text2` or `prefix`."""
_TRUE_AND_FALSE = (("on_true", "on_false"), ("if_true", "if_false"), ("true_value", "false_value"))
_CONDITIONS = ("switch", "boolean", "condition", "bool")
_INDICES = ("select", "index", "input", "selected_index")
_CASES = {"UPPERCASE": str.upper, "lowercase": str.lower, "Capitalize": str.capitalize, "Title Case": str.title}
_STRIPS = {"Both": str.strip, "Left": str.lstrip, "Right": str.rstrip}


def prompt_texts(graph: Graph, node_id: str) -> list[str]:
    """The positive prompts that the images of a node depend on, each as one text, the nearest first."""
    reader, texts = _TextReader(graph), {}
    seen, waiting = {node_id}, [node_id]
    while waiting:
        current = waiting.pop(0)
        for text in reader.prompts_of(current):
            texts[text] = None
        for source in reader.sources(current):
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return list(texts)


class _TextReader:
    """Evaluates the text nodes of a graph."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._values: dict[str, str | None] = {}
        """Node -> its text; None if that is not known."""
        self._active: set[str] = set()
        """The nodes that are being evaluated: in a circle of nodes none has a text."""
        self._used: set[tuple[str, str]] = set()
        """(node, input) whose text is a part of another one, or has been returned."""

    def prompts_of(self, node_id: str) -> Iterator[str]:
        """The prompts in the inputs of a node, the longest first: an encoder for several text models may have several."""
        found = {}
        node = self._graph[node_id]
        chosen = self._chosen(node)
        for name, value in node["inputs"].items():
            words = _words(name)
            is_prompt = words & (_PROMPT_WORDS | _CONDITIONING_WORDS)
            if words & _OTHER_WORDS or not (is_prompt or words & _HOLDER_WORDS) or (node_id, name) in self._used:
                continue
            if chosen not in (None, name) or (_is_display(node) and not is_link(value)):
                continue
            text = self.text(value)
            # Nodes for any text may also hold the name of a sampler or a file.
            if text is not None and text.strip() and (is_prompt or len(text.split()) > 1):
                found[text] = name
        for text, name in sorted(found.items(), key=lambda item: -len(item[0])):
            self._used.add((node_id, name))
            yield text

    def sources(self, node_id: str) -> Iterator[str]:
        """The nodes whose results a node uses, except those of negative prompts and of the branches that a switch does not take."""
        node = self._graph[node_id]
        if node["class_type"] == "ConditioningZeroOut":
            return
        chosen = self._chosen(node)
        for name, value in node["inputs"].items():
            source = self._source(value)
            if source and not _words(name) & _OTHER_WORDS and chosen in (None, name):
                yield source

    def text(self, value: Any) -> str | None:
        """The text that an input receives; None if it is not a text, or cannot be known."""
        if isinstance(value, str):
            return value
        source = self._source(value)
        if source is None or source in self._active or len(self._active) >= _MAX_DEPTH:
            return None
        if source not in self._values:
            self._active.add(source)
            text = self._evaluate(source)
            self._active.remove(source)
            self._values[source] = text if text is not None and len(text) <= MAX_TEXT_LENGTH else None
        return self._values[source]

    def _source(self, value: Any) -> str | None:
        """The node that an input is connected to."""
        source = value[0] if is_link(value) and value else None
        return source if isinstance(source, str) and source in self._graph else None

    def _evaluate(self, node_id: str) -> str | None:
        node = self._graph[node_id]
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "ConditioningZeroOut":
            return None
        if (chosen := self._chosen(node)) is not None:
            return self._read(node_id, chosen)
        if kind == "StringFormat":
            return self._formatted(node_id)
        separators = [name for name in SEPARATORS if name in inputs]
        if separators or _JOIN.search(kind):
            return self._joined(node_id, self.text(inputs[separators[0]]) if separators else None)
        text = self._held(node_id)
        if text is None:
            return None
        match kind:
            case "CaseConverter":
                return _CASES.get(str(inputs.get("mode")), str)(text)
            case "StringTrim":
                return _STRIPS.get(str(inputs.get("mode")), str)(text)
            case "StringSubstring":
                ends = inputs.get("start"), inputs.get("end")
                return text[slice(*ends)] if all(type(end) is int for end in ends) else None
            case "StringReplace":
                found, new = self._read(node_id, "find"), self._read(node_id, "replace")
                return None if found is None or new is None or len(text) * len(new) > 10**7 else text.replace(found, new)
        return text

    def _held(self, node_id: str) -> str | None:
        """The text of a node that holds one or passes one on; of several inputs for text models, the longest text."""
        node = self._graph[node_id]
        names = [name for name in node["inputs"] if not _words(name) & _OTHER_WORDS]
        for words in (_PROMPT_WORDS, {"string", "value"}, _CONDITIONING_WORDS, _HOLDER_WORDS):
            found = [name for name in names if _words(name) & words]
            if _is_display(node):
                found = [name for name in found if is_link(node["inputs"][name])]
            texts = [(text, name) for name in found if (text := self.text(node["inputs"][name])) is not None]
            if texts:
                text, name = max(texts, key=lambda each: len(each[0]))
                self._used.add((node_id, name))
                return text
        links = [name for name in names if is_link(node["inputs"][name])]
        return self._read(node_id, links[0]) if len(node["inputs"]) == 1 and links else None

    def _joined(self, node_id: str, separator: str | None) -> str | None:
        """The parts of a join in the order of their names: the order of the inputs is that of the connections."""
        node = self._graph[node_id]
        names = [name for name in node["inputs"] if name and _PART.fullmatch(name.lower())]
        names = [name for name in names if isinstance(node["inputs"][name], str) or is_link(node["inputs"][name])]
        names.sort(key=_part_order)
        texts = [self.text(node["inputs"][name]) for name in names]
        if not texts or None in texts:
            return self._held(node_id) if not texts else None
        self._used.update((node_id, name) for name in names)
        if node["class_type"] == "StringConcatenate":
            return (separator or "").join(texts)
        if separator is None and any("conditioning" in name.lower() for name in names):
            separator = ", "
        return (separator or "").replace("\\n", "\n").join(text for text in texts if text)

    def _formatted(self, node_id: str) -> str | None:
        """StringFormat: `{a}` in `f_string` stands for the input `values.a`."""
        template = self._read(node_id, "f_string")
        if template is None or re.search(r"\{(?!\w+\})|(?<!\w)\}", template):
            return None
        inputs = self._graph[node_id]["inputs"]
        texts = {}
        for name in re.findall(r"\{(\w+)\}", template):
            value = inputs.get(f"values.{name}")
            texts[name] = str(value) if type(value) in (int, float) else self._read(node_id, f"values.{name}")
        return None if None in texts.values() else re.sub(r"\{(\w+)\}", lambda found: texts[found[1]], template)

    def _read(self, node_id: str, name: str) -> str | None:
        """The text of one input, which is a part of another text."""
        self._used.add((node_id, name))
        return self.text(self._graph[node_id]["inputs"].get(name))

    def _chosen(self, node: dict[str, Any]) -> str | None:
        """The name of the only input that a switch passes on; None for other nodes, and where its setting is not known."""
        inputs = node["inputs"]
        names = {name.lower(): name for name in inputs}
        for pair in _TRUE_AND_FALSE:
            present = [names[name] for name in pair if name in names]
            condition = next((names[name] for name in _CONDITIONS if name in names), None)
            if present and condition is not None and (value := self._number(inputs[condition])) is not None:
                chosen = names.get(pair[0] if value else pair[1])
                return chosen or present[0]
        if "switch" not in node["class_type"].lower():
            return None
        index = next((names[name] for name in _INDICES if name in names), None)
        if index is not None and (value := self._number(inputs[index])) is not None:
            return next((name for name in inputs if re.fullmatch(rf"\D*0*{int(value)}", name) and name != index), None)
        numbered = sorted((name for name in inputs if re.fullmatch(r"any_\d+", name)), key=_part_order)
        return numbered[0] if numbered else None  # "Any Switch" takes the first one that is connected

    def _number(self, value: Any) -> float | None:
        """The number or the truth value of an input, in a node for a number alone if it is connected to one."""
        for _ in range(_MAX_DEPTH):
            if isinstance(value, bool | int | float):
                return float(value) if abs(value) < MAX_TEXT_LENGTH else None
            source = self._source(value)
            held = self._graph[source]["inputs"] if source else {}
            if len(held) != 1:
                return None
            (value,) = held.values()
        return None


def _is_display(node: dict[str, Any]) -> bool:
    """Whether a node shows what it receives; its texts that are not links are those that it showed earlier."""
    return any(word in node["class_type"].lower() for word in DISPLAYS)


def _words(name: str) -> set[str]:
    """The words in the name of an input, without numbers, and the whole name."""
    return {name.lower(), *re.findall("[a-z]+[0-9]*[a-z]+", name.lower())}


def _part_order(name: str) -> tuple:
    """`prefix` first, `suffix` last, `conditioning_to` before `conditioning_from`, and `text_2` before `text_10`."""
    lowered = name.lower().replace("conditioning_to", "conditioning_a")
    place = {"prefix": 0, "suffix": 2}.get(lowered, 1)
    return (place, *((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", lowered)))
