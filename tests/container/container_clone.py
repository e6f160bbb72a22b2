"""A clone of the repository in a folder of its own, with the demo environment in it, run through Compose as a user would.

Needs a Docker engine, Compose (1.29 or 2), the package index, and BASE_IMAGE in the environment. `make container-test` is how it
is started. Started by root, it can also give files to other users.
"""

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

BASE_IMAGE = os.environ.get("BASE_IMAGE", "")
IMAGE = "loracat-container-test"
OWNER = os.getuid() or 1234
"""Who owns the clone: not root, and nobody that the base knows."""
PATIENCE_S = 900
"""For a build or a run."""
OTHER_IMAGE = f"{IMAGE}-other"
OTHER_BASE = f"{IMAGE}-base"
NAMED_IMAGES = "services:\n  loracat:\n    image: ${TEST_IMAGE}\n  loracat-cpu:\n    image: ${TEST_IMAGE}\n"
"""A second Compose file: the image called `loracat` stays the user's."""
ONE_THREAD = ("-e", "OMP_NUM_THREADS=1")
"""Tiny networks gain nothing by more, and lose much on a machine that has other work."""
COMPOSE_SAYS = ("Creating ", "Building ", " Container ", " Network ", " Image ")
MOUNTED = ("dataset", "output", "models")


def docker(*arguments: str, check: bool = True) -> str:
    """What the Docker command prints."""
    done = subprocess.run(["docker", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0 or not check, done.stdout
    return done.stdout


def in_image(image: str, *command: str) -> str:
    """What a command prints that runs in `image` instead of the program."""
    return docker("run", "--rm", "--entrypoint", command[0], image, *command[1:])


def compose_command() -> list[str]:
    """The Compose that is installed."""
    has_plugin = subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    return ["docker", "compose"] if has_plugin else ["docker-compose"]


@dataclass
class Clone:
    """A clone as somebody has it who follows the README, and the variables that somebody sets."""

    folder: Path
    image: str = IMAGE
    variables: dict[str, str] = field(default_factory=dict)

    def compose(self, *arguments: str, **variables: str) -> dict:
        """Keyword arguments of subprocess for one Compose command."""
        files = ("--file", str(self.folder / "docker-compose.yml"), "--file", str(self.folder / "test.yml"))
        return {
            "args": [*compose_command(), "--project-name", IMAGE, *files, *arguments],
            "env": {**os.environ, "TEST_IMAGE": self.image, **self.variables, **variables},
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }

    def build(self, base: str = BASE_IMAGE, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            **self.compose("build", "--force-rm", "loracat-cpu", BASE_IMAGE=base, **variables), timeout=PATIENCE_S
        )

    def run(self, *flags: str, options: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess:
        """`docker compose run loracat-cpu`, to its end; both streams, without Compose's own words, are in `stdout`."""
        how = self.compose("run", "--rm", *ONE_THREAD, *options, "loracat-cpu", *flags, **variables)
        done = subprocess.run(**how, timeout=PATIENCE_S)
        done.stdout = "".join(line for line in done.stdout.splitlines(keepends=True) if not line.startswith(COMPOSE_SAYS))
        return done

    def start(self, *flags: str, name: str, **variables: str) -> subprocess.Popen:
        """The same, in the background, in a container called `name`."""
        return subprocess.Popen(**self.compose("run", "--rm", *ONE_THREAD, "--name", name, "loracat-cpu", *flags, **variables))

    def give_to(self, owner: int, *names: str) -> None:
        """Let `owner` own these files and folders of the clone (none: all of it) and what is in them."""
        for name in names or (".",):
            for path in [self.folder / name, *(self.folder / name).rglob("*")]:
                os.chown(path, owner, owner, follow_symlinks=False)

    def files(self, *names: str) -> list[str]:
        """Paths of all files under these folders (none: all of the clone), relative to the clone, sorted."""
        found = (path for name in names or (".",) for path in (self.folder / name).rglob("*"))
        return sorted(path.relative_to(self.folder).as_posix() for path in found if not path.is_dir())

    def owners(self) -> set[int]:
        """Who owns the mounted folders and what is in them."""
        roots = [self.folder / name for name in MOUNTED]
        return {path.lstat().st_uid for root in roots for path in [root, *root.rglob("*")]}

    @property
    def lora(self) -> Path:
        return self.folder / "output" / "lora" / "demo_person.safetensors"
