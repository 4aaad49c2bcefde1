"""A plugin of pytest: the CPU kernels are the library that GBLM_EMULATED names."""

from __future__ import annotations

import os
from pathlib import Path

from gblm.kernels import native

native.LIBRARY = Path(os.environ["GBLM_EMULATED"])
