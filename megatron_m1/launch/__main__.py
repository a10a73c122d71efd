"""torchrun as a command; see ``megatron_m1.launch.processes``."""

import sys

from megatron_m1.launch.processes import run_agent
from megatron_m1.printing import guard_streams, keep_output

if __name__ == "__main__":
    guard_streams()
    keep_output()
    sys.exit(run_agent(sys.argv[1:]))
