"""A clone of the repository in a separate folder, with the demo environment in it, run through Compose as a user would.

Needs a Docker engine, Compose (1.29 or 2), access to the package index, and BASE_IMAGE in the environment; `make container-test`
starts it. When started as root, it can also change the owner of files.
"""

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

BASE_IMAGE = os.environ.get("BASE_IMAGE", "")
IMAGE = "loracat-container-test"
OWNER = os.getuid() or 1234
"""Owner of the clone: not root, and a user that the base image does not have."""
PATIENCE_S = 900
"""Timeout of a build or a run."""
OTHER_IMAGE = f"{IMAGE}-other"
OTHER_BASE = f"{IMAGE}-base"
NAMED_IMAGES = "services:\n  loracat:\n    image: ${TEST_IMAGE}\n  loracat-cpu:\n    image: ${TEST_IMAGE}\n"
"""A second Compose file, so that the user's image `loracat` is not replaced."""
ONE_THREAD = ("-e", "OMP_NUM_THREADS=1")
"""Tiny networks gain nothing from more threads, and lose much on a busy machine."""
COMPOSE_MESSAGES = ("Creating ", "Building ", " Container ", " Network ", " Image ")
MOUNTED = ("dataset", "output", "models")


def docker(*arguments: str, check: bool = True) -> str:
    """Run a Docker command and return its output."""
    done = subprocess.run(["docker", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0 or not check, done.stdout
    return done.stdout


def in_image(image: str, *command: str) -> str:
    """Run `command` in `image` instead of the entrypoint and return its output."""
    return docker("run", "--rm", "--entrypoint", command[0], image, *command[1:])


def compose_command() -> list[str]:
    """The Compose command that is installed."""
    has_plugin = subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    return ["docker", "compose"] if has_plugin else ["docker-compose"]


@dataclass
class Clone:
    """A clone as a user has it after following README.md, and the environment variables that the user sets."""

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
        """Run `docker compose run loracat-cpu` to its end; `stdout` has both streams, without the messages of Compose itself."""
        how = self.compose("run", "--rm", *ONE_THREAD, *options, "loracat-cpu", *flags, **variables)
        done = subprocess.run(**how, timeout=PATIENCE_S)
        done.stdout = "".join(line for line in done.stdout.splitlines(keepends=True) if not line.startswith(COMPOSE_MESSAGES))
        return done

    def start(self, *flags: str, name: str, **variables: str) -> subprocess.Popen:
        """Start the same in the background, in a container called `name`."""
        return subprocess.Popen(**self.compose("run", "--rm", *ONE_THREAD, "--name", name, "loracat-cpu", *flags, **variables))

    def give_to(self, owner: int, *names: str) -> None:
        """Make `owner` the owner of these files and folders of the clone (none: all of it) and of their contents."""
        for name in names or (".",):
            for path in [self.folder / name, *(self.folder / name).rglob("*")]:
                os.chown(path, owner, owner, follow_symlinks=False)

    def files(self, *names: str) -> list[str]:
        """Paths of all files under these folders (none: all of the clone), relative to the clone, sorted."""
        found = (path for name in names or (".",) for path in (self.folder / name).rglob("*"))
        return sorted(path.relative_to(self.folder).as_posix() for path in found if not path.is_dir())

    def owners(self) -> set[int]:
        """The owners of the mounted folders and of their contents."""
        roots = [self.folder / name for name in MOUNTED]
        return {path.lstat().st_uid for root in roots for path in [root, *root.rglob("*")]}

    @property
    def lora(self) -> Path:
        return self.folder / "output" / "lora" / "demo_person.safetensors"
