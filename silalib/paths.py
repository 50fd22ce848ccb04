"""Where the project's files live: next to the package in a checkout, else in the current folder."""

import os
from pathlib import Path

_checkout = Path(__file__).resolve().parent.parent
ROOT = _checkout if (_checkout / "pyproject.toml").exists() else Path.cwd()


def results_folder(profile):
    """results/<profile>, or <profile> in the folder of the environment variable SILALIB_RESULTS."""
    return Path(os.environ.get("SILALIB_RESULTS") or ROOT / "results") / profile
