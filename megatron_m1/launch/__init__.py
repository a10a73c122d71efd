"""How the processes of a run are started: by us, by torchrun, by SLURM. Nothing here imports torch by itself."""

from megatron_m1.launch.processes import (
    FORWARDED,
    SAME_PRESS_SECONDS,
    SECOND_INTERRUPT,
    Launch,
    count_gpus,
    ignore_requests_to_stop,
    launch_from_environment,
    prepare_worker,
    report_error,
    report_once,
    start_workers,
    torchrun_arguments,
    worker_world_size,
)

__all__ = [
    "FORWARDED",
    "SAME_PRESS_SECONDS",
    "SECOND_INTERRUPT",
    "Launch",
    "count_gpus",
    "ignore_requests_to_stop",
    "launch_from_environment",
    "prepare_worker",
    "report_error",
    "report_once",
    "start_workers",
    "torchrun_arguments",
    "worker_world_size",
]
