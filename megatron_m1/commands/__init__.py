"""One file per sub-command of ``megatron-m1``; each has ``run(arguments) -> exit status``."""
