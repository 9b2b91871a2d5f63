"""Build the wheel and sdist of every package into its own dist/, by the command that a release uses."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

for project in sorted([*ROOT.glob("libs/*/pyproject.toml"), *ROOT.glob("apps/*/pyproject.toml")]):
    print(f"building {project.parent.relative_to(ROOT)}", flush=True)
    if subprocess.run([sys.executable, "-m", "hatch", "build"], cwd=project.parent).returncode:
        sys.exit(f"error: {project.parent} does not build")
