"""Dependencies are the lines of requirements.txt; everything else about the package is in pyproject.toml.

TensorFlow has several builds, and a package cannot require one of two. `pip install .` requires the ordinary one; `make
install` and the Dockerfile name the build that they install by DLFER_TENSORFLOW, so that `pip check` passes with it.
"""

import os
from pathlib import Path

from setuptools import setup

BUILD = os.environ.get("DLFER_TENSORFLOW") or "tensorflow"
LINES = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").splitlines()
REQUIREMENTS = [line for line in LINES if line and not line.startswith("#")]

setup(install_requires=[line.replace("tensorflow==", f"{BUILD}==") for line in REQUIREMENTS])
