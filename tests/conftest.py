"""Fixtures every test room shares."""
from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")        # no test reaches for the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Under nohup, or behind a script's &, signals are ignored, and would be by every command that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Speed is measured by benchmarks, never by tests; the same examples every time, so that a red run can be repeated.
settings.register_profile("minilora", deadline=None, derandomize=True)
settings.load_profile("minilora")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real artefacts (stories260K, the Llama 2 tokenizer) that lie beside the checkout on the project's machines."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is absent: it holds real checkpoints and lies beside the project's own checkouts only")
    return folder
