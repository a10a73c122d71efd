"""The console command ``megatron-m1``: one file of ``megatron_m1.commands`` a sub-command, imported when asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

import megatron_m1
from megatron_m1.config.fields import unknown
from megatron_m1.launch import report_error
from megatron_m1.library.quiet import silence_libraries
from megatron_m1.printing import guard_streams, keep_output

COMMANDS = {
    "pretrain": "train a model from tokenised text, or continue a run",
    "tokenize": "turn JSONL, text or Parquet files into .bin/.idx token files",
    "convert": "from our checkpoints to Hugging Face folders, and back",
    "generate": "continue prompts with a checkpoint, a run or a Hugging Face folder",
    "evaluate": "perplexity, needle retrieval and standard tasks of a checkpoint, on any mesh",
    "inspect": "parameter counts of a preset, contents of a checkpoint or of a run folder",
    "plan": "memory, messages and time of a configuration on GPUs that you need not have",
    "report": "one HTML page of what runs have recorded",
    "translate": "a command line of Megatron-LM into YAML for pretrain --config",
}


def usage() -> str:
    """Return the text of ``megatron-m1 --help``."""
    lines = [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: megatron-m1 COMMAND [options]",
            "",
            "Pretrain MiniMax-M1-class models on megatron-core.",
            "",
            "commands:",
            *lines,
            "",
            "megatron-m1 COMMAND --help explains every option; megatron-m1 --version names the versions.",
        ]
    )


def versions() -> str:
    """Return the line of ``megatron-m1 --version``: what is installed, asked without importing it."""
    found = [f"megatron-m1 {megatron_m1.__version__}"]
    for package in ("megatron-core", "torch"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} (not installed)")
    return ", ".join(found)


def run(arguments: Sequence[str]) -> int:
    """Run one sub-command and return the exit status.

    Raises:
        ValueError: the user's input is wrong; the message is one line that names the value and the fix.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(versions())
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        raise unknown("command", command, list(COMMANDS))
    module = importlib.import_module(f"megatron_m1.commands.{command}")
    status: int = module.run(list(arguments[1:]))
    return status


def exit_status(command: Callable[[], int]) -> int:
    """Run ``command`` and return its status; wrong input ends in one line on stderr and status 2."""
    guard_streams()
    silence_libraries()
    try:
        status = command()
        sys.stdout.flush()
        return status
    except ValueError as error:
        report_error(error)
        return 2
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT's number, which shells report for a program that Ctrl-C ended
    except BrokenPipeError:
        return 0  # the reader (head, less) went away: not a fault
    finally:
        keep_output()


def main() -> int:
    """Entry point of the console command."""
    return exit_status(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
