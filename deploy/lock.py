"""Write the lock files in locks/, or check that they agree with what they are made from: `make lock`, `make lock-check`.

    python deploy/lock.py UV            compile each list; versions that a lock file has stay, unless the list changed
    python deploy/lock.py UV --upgrade  compile each list with the newest versions that it allows
    python deploy/lock.py UV --check    exit with 1 if a lock file does not have the packages and versions of its list

Each lock file has every package that is installed, direct or not, with its version and the sha256 of its files, for all
supported versions of Python and all platforms (`uv pip compile --universal`). dev.txt is compiled first, and the others take
its versions, so that one environment can be installed from several of them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "locks"
OLDEST_PYTHON = "3.11"
CONSTRAINTS = """
backports-strenum<1.3
"""
"""Versions that uv must not choose. It passes over upper bounds of Requires-Python, and this one is for Python 3.10 from 1.3 on."""


def list_inputs() -> dict[str, str]:
    """Return the name of each lock file and the requirements that it is compiled from, one a line."""
    read = {path.stem.removeprefix("requirements-"): path.read_text() for path in ROOT.glob("requirements*.txt")}
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = {name: "\n".join(group) + "\n" for name, group in groups.items()}
    cpu = "tensorflow-cpu==\\1; sys_platform != 'darwin'\ntensorflow==\\1; sys_platform == 'darwin'"
    builds = {
        name: re.sub(r"(?m)^tensorflow==(\S+)$", build, read["requirements"])
        for name, build in (("cpu", cpu), ("gpu", "tensorflow[and-cuda]==\\1"))
    }
    others = {name: text for name, text in read.items() if name not in ("requirements", "dev", "docs")}
    return {"dev": builds["cpu"] + read["dev"] + read["docs"], **builds, **others, **lines}


def compile_list(uv: str, requirements: str, output: Path, *options: str) -> None:
    """Let uv resolve a list of requirements into a file; versions in a file that is there already are preferred."""
    # Standard input would be named in the messages as "-"; a file of this name is not in the output.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"{output.stem}.in"
        source.write_text(requirements)
        constraints = source.with_suffix(".constraints")
        constraints.write_text(CONSTRAINTS)
        command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", OLDEST_PYTHON, "--no-annotate"]
        command += ["--custom-compile-command", "make lock", *options]
        command += ["--constraint", str(constraints), "--output-file", str(output), str(source)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def read_pins(path: Path) -> list[str]:
    """Return the pinned requirements of a lock file with their markers, without comments and hashes."""
    lines = (line.removesuffix("\\").strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith(("#", "--hash"))]


def find_drift(uv: str, name: str, requirements: str, options: list[str]) -> str:
    """Return what differs between a lock file and its list, as lines with + and -; empty if nothing does."""
    committed = LOCKS / f"{name}.txt"
    if not committed.is_file():
        return "  the file is missing"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / committed.name
        output.write_text(committed.read_text())
        compile_list(uv, requirements, output, *options)
        old, new = set(read_pins(committed)), set(read_pins(output))
    return "\n".join([*(f"  - {line}" for line in sorted(old - new)), *(f"  + {line}" for line in sorted(new - old))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("uv", help="the program uv")
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that the lists allow")
    options = parser.parse_args()
    LOCKS.mkdir(exist_ok=True)
    drifted = 0
    for name, requirements in list_inputs().items():
        constraint = [] if name == "dev" else ["--constraint", str(LOCKS / "dev.txt")]
        if not options.check:
            newest = ["--upgrade"] if options.upgrade else []
            compile_list(options.uv, requirements, LOCKS / f"{name}.txt", "--generate-hashes", *newest, *constraint)
        elif drift := find_drift(options.uv, name, requirements, constraint):
            print(f"locks/{name}.txt does not agree with its list; run make lock and commit the result:\n{drift}")
            drifted += 1
    sys.exit(1 if drifted else 0)


if __name__ == "__main__":
    main()
