"""Every requirement and its dependencies have a wheel for the container's Python 3.12 on ARM64, or are pure Python.

So has OpenCV, which users of FACE_MODEL=sface add to them.
"""

import json
import subprocess
import sys

import pytest

from common.settings import REPOSITORY

BASE_PACKAGES = ["numpy==2.1.0"]
"""NVIDIA's image has this numpy from the package index. Its torch is a build of NVIDIA; the newest public one replaces it here."""
GLIBC_MINORS = range(17, 40)
"""Ubuntu 24.04 has glibc 2.39; a wheel names the oldest glibc that it runs with."""


@pytest.mark.package_index
@pytest.mark.timeout(900)
def test_every_requirement_has_a_wheel_for_the_container(tmp_path):
    report = tmp_path / "report.json"
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in GLIBC_MINORS] + ["manylinux2014_aarch64"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--only-binary", ":all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", *(f"--platform={name}" for name in platforms)]
    command += ["--target", str(tmp_path / "nowhere"), "--report", str(report)]
    (opencv,) = [line for line in (REPOSITORY / "requirements-dev.txt").read_text().splitlines() if line.startswith("opencv")]
    command += ["--requirement", str(REPOSITORY / "requirements.txt"), opencv, *BASE_PACKAGES]
    resolved = subprocess.run(command, capture_output=True, text=True)
    assert resolved.returncode == 0, resolved.stderr
    wheels = [package["download_info"]["url"].rpartition("/")[2] for package in json.loads(report.read_text())["install"]]
    pinned = [line for line in (REPOSITORY / "requirements.txt").read_text().splitlines() if "==" in line]
    assert len(wheels) > len(pinned) + len(BASE_PACKAGES)
    assert not [wheel for wheel in wheels if not wheel.endswith(("-any.whl", "aarch64.whl"))]
