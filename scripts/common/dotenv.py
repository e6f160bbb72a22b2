"""The variables of a file `.env`, by the rules of Docker Compose, for `run.sh` outside a container. Standard library only.

https://docs.docker.com/compose/how-tos/environment-variables/variable-interpolation/#env-file-syntax
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

_NAME = re.compile(r"(?:export[ \t]+)?([^\s=:#'\"]+)[ \t]*")
_UNQUOTED = re.compile(r"[^\n]*")
_QUOTED = {"'": re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL), '"': re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)}
_REST_OF_LINE = re.compile(r"[ \t]*(?:#[^\n]*)?(?=\n|$)")
_COMMENT = re.compile(r"(?:^|[ \t]+)#.*")
_ESCAPE = re.compile(r'\\([abfnrtv"\\$])')
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", '"': '"', "\\": "\\", "$": "$$"}
_REFERENCE = re.compile(r"\$(?:(?P<escaped>\$)|(?P<named>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)(?P<operator>:?[-+?])?)", re.ASCII)


class DotenvError(ValueError):
    """A line that Compose would refuse. The message has its number and the problem, never its value, which may be a secret."""


def parse_dotenv(text: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that `text` adds to `environment`, whose own variables win. Raises DotenvError.

    Names that a shell cannot export, which Compose permits, are left out.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    found: dict[str, str] = {}
    position = 0
    while position < len(text):
        if text[position].isspace() or text[position] == "#":
            position = text.find("\n", position) if text[position] == "#" else position + 1
            if position == -1:
                break
            continue
        try:
            if "\0" in text:
                raise ValueError("contains a null character")
            name, value, position = _statement(text, position, environment | found if found else environment)
        except ValueError as error:
            raise DotenvError(f"line {text.count(chr(10), 0, position) + 1}: {error}") from None
        if value is not None and name not in environment and re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            found[name] = value
    return found


def _statement(text: str, start: int, variables: Mapping[str, str]) -> tuple[str, str | None, int]:
    """Name, value (None: the variable is only named) and end of the statement at `start`. Raises ValueError with the problem."""
    name = _NAME.match(text, start)
    following = text[name.end()] if name and name.end() < len(text) else "\n"
    if name is None or following not in "=:\n" or not re.fullmatch(r"[\w.\-\[\]]+", name[1]):
        raise ValueError("must have the form NAME=value")
    if following == "\n":
        return name[1], None, name.end()
    value_start = name.end() + 1
    while value_start < len(text) and text[value_start] in " \t":
        value_start += 1
    quote = text[value_start : value_start + 1]
    if quote not in _QUOTED:
        value = _UNQUOTED.match(text, value_start)
        return name[1], _expanded(_COMMENT.sub("", value[0]).rstrip(), variables), value.end()
    value = _QUOTED[quote].match(text, value_start)
    if value is None:
        raise ValueError(f"the value of {name[1]} has no closing quote")
    end = _REST_OF_LINE.match(text, value.end())
    if end is None:
        raise ValueError(f"{name[1]} has more than a comment after its closing quote")
    if quote == "'":
        return name[1], value[1].replace("\\'", "'"), end.end()
    return name[1], _expanded(_ESCAPE.sub(lambda match: _ESCAPES[match[1]], value[1]), variables), end.end()


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """`text` with its references to variables replaced: $NAME, ${NAME}, and ${NAME:-default} and the like, which may be nested."""
    parts, position = [], 0
    while (dollar := text.find("$", position)) != -1:
        parts.append(text[position:dollar])
        reference = _REFERENCE.match(text, dollar)
        if reference is None:
            raise ValueError("a $ must be written as $$, or be followed by the name of a variable")
        position = reference.end()
        if reference["escaped"]:
            parts.append("$")
        elif reference["named"]:
            parts.append(variables.get(reference["named"], ""))
        else:
            end = _closing_brace(text, position)
            parts.append(_substituted(reference["braced"], reference["operator"], text[position:end], variables))
            position = end + 1
    return "".join([*parts, text[position:]])


def _closing_brace(text: str, start: int) -> int:
    """Where the reference ends whose braces were opened before `start`."""
    depth = 1
    for position in range(start, len(text)):
        if text.startswith("${", position):
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return position
    raise ValueError("${ has no closing brace")


def _substituted(name: str, operator: str | None, word: str, variables: Mapping[str, str]) -> str:
    value = variables.get(name)
    if operator is None:
        if word:
            raise ValueError("a reference must have a form such as ${NAME} or ${NAME:-default}")
        return value or ""
    is_set = bool(value) if operator.startswith(":") else value is not None
    match operator[-1]:
        case "-":
            return value if is_set else _expanded(word, variables)
        case "+":
            return _expanded(word, variables) if is_set else ""
    if not is_set:
        raise ValueError(f"{name} is required: {_expanded(word, variables)}")
    return value


def main() -> None:
    """Read the environment from standard input as `env -0` prints it, and print the variables of the file in the same form."""
    path = Path(sys.argv[1])
    given = (line.partition("=") for line in sys.stdin.buffer.read().decode("utf-8", "surrogateescape").split("\0"))
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DotenvError("is not a regular file")  # reading a pipe may never end
        found = parse_dotenv(path.read_text(encoding="utf-8"), {name: value for name, _, value in given})
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error if isinstance(error, DotenvError) else "it is not UTF-8"
        sys.exit(f"run.sh: {path.resolve()}: {reason}")
    lines = (f"{name}={value}\0" for name, value in found.items())
    sys.stdout.buffer.write("".join(lines).encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    main()
