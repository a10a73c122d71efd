#!/usr/bin/env bash
''':'
# This file is bash and Python at once, so that both of these work:
#   bash examples/pretrain_m1.sh [overrides]
#   torchrun --nproc-per-node N examples/pretrain_m1.sh [overrides]
# To bash the line above is the command ":" (do nothing); to Python it opens a text that ends below the exec. The Python
# part is a here-document to bash.
#
# bash starts this node's processes as NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and GPUS_PER_NODE say, else as SLURM's
# variables say, else one per GPU, else 2 on the CPU. Overrides are those of "megatron-m1 pretrain --help"; without
# --config they change examples/configs/tiny.yaml, whose corpus is built on first use, or, with the --run.folder of a run
# that has checkpoints, that run's own configuration.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
if [ ! -x "$python" ]; then python=$(command -v python3 || true); fi
if [ -z "$python" ] || ! "$python" -c "import megatron_m1" 2>/dev/null; then
    echo "pretrain_m1.sh: megatron-m1 is not installed: run make install in $root" >&2
    exit 2
fi
exec "$python" "${BASH_SOURCE[0]}" "$@"
: <<'# end of the Python part'
'''

import sys
from pathlib import Path

from megatron_m1.cli import exit_status
from megatron_m1.commands.pretrain import run


def main() -> int:
    tiny = Path(__file__).resolve().parent / "configs" / "tiny.yaml"
    return exit_status(lambda: run(sys.argv[1:], default_processes=2, default_config=tiny))


if __name__ == "__main__":
    sys.exit(main())
# end of the Python part
