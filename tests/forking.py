"""Processes for tests that kill or connect them: forked from one that has already imported everything.

The test calls `serve`, which runs one of its module's functions in a fresh interpreter: a fork of the test's own
process, whose thread pools have run, could hang.
"""

import importlib
import os
import subprocess
import sys
import traceback
from pathlib import Path


def serve(function: str, *arguments: str, timeout: float = 580) -> None:
    """Run "module:function" of the tests' folder in a fresh process; its errors are shown."""
    code = f"import forking; forking._call({function!r}, {arguments!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


def _call(function: str, arguments: tuple[str, ...]) -> None:
    import torch

    torch.set_num_threads(1)  # no thread pool that a fork would lack
    from star import cli
    from star.reports import figures  # noqa: F401
    from star.shapes.model import load_pipeline

    cli.quiet_third_parties()
    load_pipeline()  # the libraries' own caches are then warm in every child
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(*arguments)


def fork(function, *arguments, output: Path | None = None, environment: dict[str, str] | None = None) -> int:
    """Call a function in a child whose exit code is what it returns. Returns the child's id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.environ.update(environment or {})
        if output is not None:
            descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
        code = function(*arguments) or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """A child's exit code; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ranks(count: int, function, *arguments, port: int, output: Path | None = None) -> list[int]:
    """Call a function in `count` connected processes, as `accelerate launch --cpu` starts them. Returns exit codes."""
    children = [
        fork(
            function,
            *arguments,
            output=output and output.with_suffix(f".{rank}"),
            environment={
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
                **{"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                "ACCELERATE_USE_CPU": "true",
            },
        )
        for rank in range(count)
    ]
    return [wait(child) for child in children]


def free_port() -> int:
    import socket

    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]
