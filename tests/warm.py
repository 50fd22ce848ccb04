"""Preloaded by the fork server of test_faults: a training, so that its processes begin with everything loaded."""

import tempfile
from pathlib import Path

import killable

with tempfile.TemporaryDirectory() as folder:
    killable.train(Path(folder) / "run", Path(folder) / "log", {})
