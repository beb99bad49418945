"""What an example finds when the gallery runs it. All of them share one process."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
THREADS = torch.get_num_threads()


def reset(gallery_conf: dict[str, Any], fname: str) -> None:
    """Set torch and ``__file__`` as they would be for a script of its own."""
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(THREADS)
    # The gallery does not define this name, and scripts save their figures beside themselves.
    builtins.__file__ = str(EXAMPLES / fname)
