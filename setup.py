"""What pyproject.toml cannot say: the dependencies, the files that are copied into the package, and the addresses of the repository.

- Dependencies are the lines of requirements.txt. TensorFlow has several builds, and a package cannot require one of two. `pip install .`
  requires the ordinary one; `make install` and the Dockerfile name the build that they install by DLFER_TENSORFLOW, so that `pip check`
  passes with it.
- The models of saved_models/ up to `MAX_BYTES`, the default one among them, and the files of experiments/ become dlfer/saved_models/ and dlfer/experiments/
  of the wheel. An editable installation reads them from the checkout, the larger models, too.
- DLFER_REPOSITORY is the address of the repository (https://github.com/OWNER/dlfer): with it the metadata has the project's addresses, and
  the links and pictures of the README are absolute, as an index of packages needs them. Releases are built with it.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
BUILD = os.environ.get("DLFER_TENSORFLOW") or "tensorflow"
REPOSITORY = (os.environ.get("DLFER_REPOSITORY") or "").rstrip("/")
LINES = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
REQUIREMENTS = [line for line in LINES if line and not line.startswith("#")]


MAX_BYTES = 20_000_000
"""Of a model that is in the package: an index takes packages of 100 MB, and most users need none but the default model."""


class BuildWithShippedFiles(build_py):
    """Builds the package with the shipped models and the experiments in it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        shipped = list_shipped_files()
        if not any(file.startswith("saved_models/") for file in shipped):
            print("warning: saved_models/ has no model; the package is built without one.", file=sys.stderr)
        for file in shipped:
            target = Path(self.build_lib, "dlfer", file)
            self.mkpath(str(target.parent))
            self.copy_file(file, str(target))

    def get_source_files(self) -> list[str]:
        """Return the files that a source distribution needs for the build."""
        return [*super().get_source_files(), *list_shipped_files()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        shipped = [] if self.editable_mode else list_shipped_files()
        return [*super().get_outputs(include_bytecode), *(f"{self.build_lib}/dlfer/{file}" for file in shipped)]


def list_shipped_files() -> list[str]:
    """Return the files of the shipped models that are small enough and of the experiments, relative to the root, as far as they are there."""
    folders = [path.parent for path in sorted(Path("saved_models").glob("*/artifact.json"))]
    of_models = [[path for path in sorted(folder.iterdir()) if path.is_file()] for folder in folders]
    files = [
        path for of_one in of_models if sum(path.stat().st_size for path in of_one) <= MAX_BYTES for path in of_one
    ]
    files += [*sorted(Path("experiments").glob("*.yaml")), *Path("experiments").glob("schema.json")]
    return [path.as_posix() for path in files]


def write_readme() -> str:
    """Return the README; with DLFER_REPOSITORY, links and pictures that lead into the repository are absolute."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if not REPOSITORY:
        return text
    text = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:|#)", rf"\1{REPOSITORY}/raw/HEAD/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?![a-z]+:|#)", rf"\1{REPOSITORY}/blob/HEAD/", text)


PAGES = {
    "Source": "",
    "Documentation": "/blob/HEAD/docs/index.md",
    "Changes": "/blob/HEAD/CHANGELOG.md",
    "Issues": "/issues",
}

setup(
    install_requires=[line.replace("tensorflow==", f"{BUILD}==") for line in REQUIREMENTS],
    long_description=write_readme(),
    long_description_content_type="text/markdown",
    project_urls={name: REPOSITORY + page for name, page in PAGES.items()} if REPOSITORY else {},
    cmdclass={"build_py": BuildWithShippedFiles},
)
