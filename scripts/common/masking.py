"""Passwords in what is printed. An address with a login may be malformed in any way, so where its login ends is not parsed: all
that comes before the last at sign is masked, and what a library says about such an address is searched for its parts."""

import json
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote, unquote

MASK = "***"
_AT = "(?:[@\uff20\ufe6b]|%(?:25)*40)"
"""An at sign, its full-width and small forms, which Unicode normalization turns into it, and its escape in URLs."""
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*:[/\\]+"
_ADDRESS_VARIABLE = re.compile(r"(PROXY|ENDPOINT|URL|URI|HOST|INDEX)$", re.IGNORECASE)
_LEAST_SECRET = 4
"""Characters of a password that is searched for in messages on its own: a shorter one would be found everywhere."""

_known: set[str] = set()


def learn_secrets(environment: Mapping[str, str], secret_names: tuple[str, ...] = ()) -> None:
    """From now on `mask_secrets` knows the logins in the addresses of `environment`, and the values of the secret variables."""
    for name, value in environment.items():
        if name in secret_names:
            _known.update(part for part in _strings_in(value) if len(part) >= _LEAST_SECRET)
        elif "://" in value or _ADDRESS_VARIABLE.search(name):
            parts = [part for address in _ADDRESS_SEPARATOR.split(value) for part in _secrets_in(address)]
            spellings = {spelling for part in parts for spelling in (part, unquote(part), quote(part))}
            _known.update(each for each in spellings if len(each) >= _LEAST_SECRET)


def mask_secrets(text: str) -> str:
    """Any text that may be about an address, with `***` for logins in addresses and for every secret that is known."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return re.sub(rf"((?:{_SCHEME}|//))(?:(?!,{_SCHEME})[^\s'\"])*{_AT}", rf"\1{MASK}@", text)


def mask_address(text: str) -> str:
    """A setting that consists of one or several addresses, separated by commas, without logins, queries and fragments."""
    return "".join(part if index % 2 else _mask_one(part) for index, part in enumerate(_ADDRESS_SEPARATOR.split(text)))


_ADDRESS_SEPARATOR = re.compile(rf"(\s*,\s*(?={_SCHEME}))")


def _mask_one(address: str) -> str:
    scheme, rest = _without_scheme(address)
    if login := _login_of(address):
        rest = MASK + re.sub(f"^{_AT}", "@", rest[len(login) :])
    host, mark, _ = re.match(r"([^?#]*)([?#]?)(.*)", rest, re.DOTALL).groups()
    authority, path = re.match(r"([^/\\]*)(.*)", host, re.DOTALL).groups()
    if not re.fullmatch(r"(?:\*\*\*@)?(\[[^\]]*\]|[^:\[\]\uff1a\ufe55]*)(:\d*)?", authority):
        authority = re.split("[:\uff1a\ufe55]", authority, maxsplit=1)[0] + f":{MASK}"  # a password without a host, or no port
    return f"{scheme}{authority}{path}{mark}{MASK if mark else ''}"


def _without_scheme(address: str) -> tuple[str, str]:
    scheme = re.match(rf"\s*(?:{_SCHEME}|[/\\]{{2,}})?", address)[0]
    return scheme, address[len(scheme) :]


def _login_of(address: str) -> str:
    """All before the last at sign, without the scheme; empty without an at sign."""
    found = re.match(rf"(.*){_AT}", _without_scheme(address)[1], re.DOTALL)
    return found[1] if found else ""


def _secrets_in(address: str) -> list[str]:
    """The login of an address, its password, and the parts of it that a parser may take for a host, a port or a path."""
    login = _login_of(address)
    password = re.split("[:\uff1a\ufe55]", login, maxsplit=1)[-1]
    if not login and not re.fullmatch(r"(\[[^\]]*\]|[^:]*)(:\d*)?([/?#].*)?", _without_scheme(address)[1], re.DOTALL):
        password = _without_scheme(address)[1].partition(":")[2]  # there is no host: what follows the user name is not a port
    return [login, password, *re.split(rf"(?:{_AT}|[/?#:,\s\[\]])+", password)]


def _strings_in(value: str) -> Iterator[str]:
    """A secret, and if it is a JSON object, every string in it: headers are shown one by one."""
    yield value
    try:
        content = json.loads(value)
    except (ValueError, RecursionError):
        return
    if isinstance(content, dict):
        yield from (each for each in content.values() if isinstance(each, str))
