"""One worker process: waits for calls, runs each inside a fresh gloo process group, answers, waits for the next."""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import os
import pickle
import random
import signal
import sys
import traceback
from multiprocessing.connection import Connection

import numpy as np
import psutil
import torch
import torch.distributed as dist

from megatron_m1.runtime.pool.messages import Answer, Call, pickled_exception

STACK_SIGNAL = signal.SIGUSR2
"""Asks a worker for its stacks; SIGTERM and SIGUSR1 stay free for what the function does with them."""
GROUP_TIMEOUT_MARGIN = 60.0
"""Seconds by which the group's own time-out exceeds the call's, so that a hang is reported by the pool, with stacks."""


def serve(connection: Connection, rank: int, stack_path: str) -> None:
    """Answer calls as ``rank`` until the calling process closes its end of ``connection``.

    Args:
        connection: receives ``(sys.path, pickled Call)``, sends a pickled ``Answer``.
        rank: rank of this worker in every call.
        stack_path: file to which the stacks of all threads go on ``STACK_SIGNAL``.
    """
    with open(stack_path, "w") as stack_file:
        faulthandler.register(STACK_SIGNAL, file=stack_file, all_threads=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
        while True:
            try:
                search_path, payload = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            sys.path[:] = search_path
            answer = dataclasses.replace(_answer(rank, payload), threads=psutil.Process().num_threads())
            try:
                connection.send_bytes(pickle.dumps(answer))
                # Leaving the group early would close connections that slower ranks still read from.
                connection.recv_bytes()
            except (EOFError, BrokenPipeError):
                return
            _clean_up()


def _answer(rank: int, payload: bytes) -> Answer:
    try:
        call: Call = pickle.loads(payload)
        _prepare(rank, call)
        return Answer(value=pickle.dumps(call.function(rank, call.world_size, *call.arguments)))
    # SystemExit too: a function that ends its process must not end the pool's.
    except BaseException as error:
        return Answer(error=pickled_exception(error), traceback=traceback.format_exc())


def _prepare(rank: int, call: Call) -> None:
    """Give the call the environment that torchrun gives, the default process group and a fixed seed."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(call.world_size),
        "LOCAL_WORLD_SIZE": str(call.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(call.store_port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if call.process_group:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=call.timeout + GROUP_TIMEOUT_MARGIN))


def _clean_up() -> None:
    """Leave nothing of a call that could reach the next one."""
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
