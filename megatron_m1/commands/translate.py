"""``megatron-m1 translate``: from a command line of Megatron-LM to YAML for ``--config``."""

from __future__ import annotations

from collections.abc import Sequence

USAGE = """\
usage: megatron-m1 translate -- COMMAND LINE OF MEGATRON-LM

Print the configuration that says the same here, as YAML for pretrain --config. What could not be said, and why, stands
in comments above it; what Megatron-LM takes by default is written out. The launcher in front (torchrun ...
pretrain_gpt.py) is skipped, and so are variables that the shell has not filled in. The command may also be one quoted
word:

  megatron-m1 translate -- torchrun pretrain_gpt.py --num-layers 32 --hidden-size 4096 ... > run.yaml"""


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ValueError: nothing to translate, or a value that its flag can't have; one line.
    """
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    from megatron_m1.config.foreign.translation import translate_command

    print(translate_command(words[1:] if words[0] == "--" else words), end="")
    return 0
