"""Files from the Hugging Face hub: the only module that calls huggingface_hub, which is imported when it is used.

A caller checks `file_size_bytes` first: it sends one request, while a download without a network retries for minutes.
"""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import DISK_ERRNOS
from common.settings import IN_CONTAINER, REPOSITORY, address_problem
from common.variables import PROXY_VARIABLES

_REPOSITORY_ID = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w-][\w.-]*/[\w-][\w.-]*)/?", re.ASCII)


class HubError(Exception):
    """The hub cannot be reached, refuses the request or breaks the transfer off; the message says why."""


class MissingFileError(HubError):
    """The repository does not have the file."""


def repository_id(name: str) -> str | None:
    """`owner/name` if `name` is that, or the address of a repository on huggingface.co; None for anything else."""
    found = _REPOSITORY_ID.fullmatch(name.strip())
    return found[1] if found else None


def file_size_bytes(repository: str, file: str) -> int:
    """Size of `file` in `repository` on the hub, 0 if the hub does not report it. One request, no retries. Raises HubError."""
    with _as_hub_error():
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        return get_hf_file_metadata(hf_hub_url(repository, file)).size or 0


def download(repository: str, files: Sequence[str], folder: Path, optional: Sequence[str] = ()) -> None:
    """Download those of `optional` that `repository` has into `folder`, then `files`: with the last one, all are there. Files that
    are there already are not transferred again.

    huggingface_hub downloads to a temporary name and checks the size, so a file that has its final name is complete.
    Raises HubError, and OSError if the disk is full or may not be written to.
    """
    with _as_hub_error():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

        for file in optional if files else ():
            with suppress(RemoteEntryNotFoundError, RepositoryNotFoundError):
                hf_hub_download(repository, file, local_dir=folder)
        for file in files:
            hf_hub_download(repository, file, local_dir=folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # partial files of runs that were killed


def download_command(repository: str, folder: Path, files: Sequence[str] = (), patterns: Sequence[str] = ()) -> str:
    """The shell command that downloads `files`, or all files that match `patterns`, of `repository` into `folder`.

    Its `hf` is that of this environment, and its paths are valid where the user types it.
    """
    base = REPOSITORY if IN_CONTAINER else Path.cwd()  # the same folder on the host has another path
    if folder.is_relative_to(base):
        folder = folder.relative_to(base)
    includes = [part for pattern in patterns for part in ("--include", pattern)]
    return shlex.join([*_hf(), "download", repository, *files, "--local-dir", str(folder), *includes])


def _hf() -> list[str]:
    """How the program `hf` is started: in a new container, by its name, or from where this Python is installed."""
    if IN_CONTAINER:
        return ["docker", "compose", "run", "--rm", "loracat-cpu", "hf"]  # this service starts on every machine
    beside_python, in_path = Path(sys.executable).with_name("hf"), shutil.which("hf")
    if beside_python.exists() and (in_path is None or not beside_python.samefile(in_path)):
        return [str(beside_python)]  # another one may belong to a version that does not have the command
    return ["hf"] if in_path else [sys.executable, "-m", "huggingface_hub.cli.hf"]


@contextmanager
def _as_hub_error() -> Iterator[None]:
    """Turn whatever huggingface_hub raises for a failed request into a HubError."""
    # HTTPError is the HTTP library's base class for network failures, under the name by which huggingface_hub imports it. The
    # library's error for a malformed address is in the same module, and has another base class.
    from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError

    malformed_address = vars(sys.modules[HTTPError.__module__])["InvalidURL"]
    try:
        import huggingface_hub.file_download  # noqa: F401 - reads HF_ENDPOINT; the package's own import prints it if it is malformed

        yield
    except RepositoryNotFoundError:
        raise HubError("the hub has no such repository, or it is private") from None
    except RemoteEntryNotFoundError:
        raise MissingFileError("the repository does not have that file") from None
    except (HTTPError, malformed_address, ImportError, OSError, RuntimeError, ValueError) as error:  # a SOCKS proxy needs a package
        if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
            raise
        if problem := address_problem("HF_ENDPOINT", *PROXY_VARIABLES):
            raise HubError(problem) from None
        lines = str(error).strip().splitlines()
        raise HubError(lines[0].rstrip(".") if lines else type(error).__name__) from None
