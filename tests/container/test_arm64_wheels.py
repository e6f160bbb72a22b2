"""Every requirement, and what it needs in turn, has a wheel for the container's Python 3.12 on ARM64 or is pure Python."""

import json
import subprocess
import sys

import pytest

from common.settings import REPOSITORY

OF_THE_BASE = ["numpy==2.1.0"]
"""NVIDIA's image has this one from the package index; its torch is NVIDIA's own, and the newest one stands in for it."""
GLIBC_MINORS = range(17, 40)
"""Ubuntu 24.04 has glibc 2.39; a wheel says the oldest glibc that it runs with."""


@pytest.mark.package_index
@pytest.mark.timeout(900)
def test_every_requirement_has_a_wheel_for_the_container(tmp_path):
    report = tmp_path / "report.json"
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in GLIBC_MINORS] + ["manylinux2014_aarch64"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--only-binary", ":all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", *(f"--platform={name}" for name in platforms)]
    command += ["--target", str(tmp_path / "nowhere"), "--report", str(report)]
    command += ["--requirement", str(REPOSITORY / "requirements.txt"), *OF_THE_BASE]
    resolved = subprocess.run(command, capture_output=True, text=True)
    assert resolved.returncode == 0, resolved.stderr
    wheels = [package["download_info"]["url"].rpartition("/")[2] for package in json.loads(report.read_text())["install"]]
    pinned = [line for line in (REPOSITORY / "requirements.txt").read_text().splitlines() if "==" in line]
    assert len(wheels) >= len(pinned) + len(OF_THE_BASE)
    assert not [wheel for wheel in wheels if not wheel.endswith(("-any.whl", "aarch64.whl"))]
