"""Triton's kernels run under its interpreter here: it must be chosen before the modules that define them are imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
