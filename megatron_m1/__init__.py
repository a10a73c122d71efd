"""megatron-m1: pretraining of MiniMax-M1-class models on megatron-core."""

import os
import sys

if not os.path.exists("/dev/nvidiactl"):
    # A transformer-engine that is installed but finds no GPU raises RuntimeError inside every megatron-core import.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
