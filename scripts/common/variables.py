"""Environment variables whose names are probably misspelt, and addresses in variables of other programs that are not valid."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from common.files import read_file

OTHER_VARIABLES = ("COMFYUI_HEADERS", "COMFYUI_API_KEY", "WANDB_API_KEY", "REVIEW", "STRICT", "PYTHON", "BASE_IMAGE")
"""Variables that are not in the settings file: the secrets, and those of run.sh and Docker Compose."""
_OWN_PREFIXES = ("CAPTION_", "LORA", "SAMPLE_", "TRAIN_")
"""Beginnings of names that hardly any other program uses, unlike COMFYUI_."""
_OWN_NAME = "LORACAT"
"""Beginning of the names that are not settings."""
_OTHER_NAMES = {
    "COMFYUI_URL": "COMFYUI_ENDPOINT",
    "COMFYUI_ADDRESS": "COMFYUI_ENDPOINT",
    "COMFYUI_SERVER": "COMFYUI_ENDPOINT",
    "LORA_DIM": "LORA_RANK",
    "NETWORK_DIM": "LORA_RANK",
    "NETWORK_ALPHA": "LORA_ALPHA",
    "NUM_EPOCHS": "NUM_TRAIN_EPOCHS",
    "LORA_NAME": "OUTPUT_NAME",
}
"""Names that resemble none of LoRACat, but are often used for the same."""
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
"""HTTP libraries read them in either case."""
_SCHEMES = ("http", "https")
_PROXY_SCHEMES = (*_SCHEMES, "socks4", "socks4a", "socks5", "socks5h")
_WITHOUT_LOGIN = ("WANDB_BASE_URL",)
"""Weights & Biases prints the login of its address, and does not use it."""
_SIMILAR, _SIMILAR_OWN = 0.88, 0.75
"""Of difflib's ratio: one letter of eight is missing, added, or has changed places with its neighbour. A name with one of the
beginnings is wrong anyway, and may differ more."""


def known_variables(settings_file: Path, keys: Iterable[str]) -> set[str]:
    """The names of all variables of LoRACat: those of `keys`, and of every key in the settings file, even a commented one."""
    in_file = re.findall(r"^(?:# )?([a-z]\w*)\s*=", _text_of(settings_file), re.MULTILINE)
    return {*OTHER_VARIABLES, *(name.upper() for name in (*in_file, *keys))}


def find_unknown_variables(known: set[str], environment: Mapping[str, str], env_file: Path) -> Iterator[str]:
    """A line for each name that is not one of `known`, but resembles one or begins like one.

    Docker Compose passes on only those variables in `env_file` that it knows, so the names in it are read as well.
    """
    targets = known - {"PYTHON"}  # PYTHON3 is a variable of other programs
    prefixes = tuple(prefix for prefix in _OWN_PREFIXES if any(name.startswith(prefix) for name in known))
    names = dict.fromkeys(_names_in(env_file), env_file.name)
    names |= {name: "the environment" for name, value in environment.items() if value}
    for name in sorted(names.keys() - known):
        is_own = name.upper().startswith(prefixes) and not name.upper().startswith(_OWN_NAME)
        similar = difflib.get_close_matches(name.upper(), targets, 1, _SIMILAR_OWN if is_own else _SIMILAR)
        similar = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else similar
        if similar or is_own:
            hint = f"did you mean {similar[0]}?" if similar else "docs/settings.md lists all of them"
            yield f"unknown variable {name} in {names[name]}: it has no effect; {hint}"


def _names_in(env_file: Path) -> list[str]:
    """The names that the file gives values to. The values are not read."""
    return re.findall(r"^\s*(?:export\s+)?(\w+)\s*=\s*\S", _text_of(env_file), re.MULTILINE)


def _text_of(file: Path) -> str:
    """The text of a file that others read and report on; "" if it cannot be read."""
    try:
        return read_file(file).decode("utf-8", "replace")
    except OSError:
        return ""


def find_address_problems(environment: Mapping[str, str], names: Iterable[str]) -> Iterator[str]:
    """A line for each of the variables `names` whose value is not the address of a server. The value is not in it: it may hold a
    login."""
    for name in names:
        is_proxy = name in PROXY_VARIABLES
        value = environment.get(name, "").strip()
        if value and is_proxy and "://" not in value:
            value = f"http://{value}"
        if value and (problem := _address_problem(value, _PROXY_SCHEMES if is_proxy else _SCHEMES)):
            yield f"{name} is not a valid address: {problem}"
        elif name in _WITHOUT_LOGIN and "@" in urlsplit(value).netloc:
            yield f"{name} must not contain a login, which would appear in logs"


def _address_problem(address: str, schemes: Iterable[str]) -> str:
    """What is wrong with the address; "" if it is valid."""
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
    except ValueError:
        return "its host is not valid"
    if parts.scheme not in schemes:
        return "it must begin with http:// or https://"
    try:
        if not host or re.search(r"[\s/\\]", parts.netloc) or not host.encode("idna"):
            return "it has no valid host"
    except UnicodeError:
        return "it has no valid host"
    try:
        return "its port must be a number from 1 to 65535" if parts.port == 0 else ""
    except ValueError:
        return "its port must be a number from 1 to 65535"
