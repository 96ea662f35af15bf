"""All checks, in the order in which they are cheap: `python -m tests [pytest arguments]`.

The type check runs on the package as it is installed, from outside the root: the package directory map puts
`drafters/` and `verifiers/` inside `specdec`, which a checker that reads the source tree would not see.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(title: str, *command: str, cwd: Path = ROOT, **environment: str) -> None:
    print(f"== {title}", flush=True)
    code = subprocess.run([sys.executable, "-m", *command], cwd=cwd, env={**os.environ, **environment}).returncode
    if code:
        sys.exit(code)


def main() -> None:
    run("lint", "ruff", "check", ".")
    run("format", "ruff", "format", "--check", ".")
    with tempfile.TemporaryDirectory() as folder:
        install = ("pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", folder, str(ROOT))
        run("install for the type check", *install, SPECDEC_NATIVE="0")  # types need no compiled kernels
        config = str(ROOT / "pyproject.toml")
        run("types", "mypy", "--config-file", config, "-p", "specdec", cwd=Path(folder))
    # As many processes as cores, each on one thread: tiny models have no use for more.
    spread = ("-n", "auto", "--dist", "worksteal")
    run("tests", "pytest", *spread, *sys.argv[1:], OMP_NUM_THREADS="1")
    if not sys.argv[1:]:
        run(
            "contracts on the stock step",
            "pytest",
            "-q",
            *spread,
            "tests/contracts",
            SPECDEC_NATIVE="0",
            OMP_NUM_THREADS="1",
        )


if __name__ == "__main__":
    main()
