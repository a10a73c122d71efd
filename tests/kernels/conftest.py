"""Triton's kernels run under its interpreter here, which must be chosen before they are imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
