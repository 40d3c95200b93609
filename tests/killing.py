"""Runs that are killed, or whose disk fails: a process that has imported everything forks a child for each, at no cost.

The child trains by the configuration it is given, and is killed by SIGKILL either after some seconds, or just before its n-th
call that changes a file (Python's audit events: opened for writing, renamed, removed, made, truncated).  Or that call, and if
asked for every one after it, is refused with an error of the system.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

FORKING = r"""
import json, os, signal, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from minilora import TrainConfig
from minilora.errors import MiniloraError
from minilora.train import train

CHANGING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod")

def count(order):
    done = [0]
    def hook(event, arguments):
        written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (written or event in CHANGING) and isinstance(arguments[0], (str, os.PathLike)) and \
                os.fspath(arguments[0]).startswith(order["config"]["out"]):
            done[0] += 1
            if done[0] - 1 == order["at"] or (order["lasting"] and done[0] > order["at"]):
                if order["errno"]:
                    raise OSError(order["errno"], os.strerror(order["errno"]))
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    return done

for line in sys.stdin:
    order = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        done, said = count(order), ""
        try:
            train(TrainConfig(**order["config"]))
        except MiniloraError as error:
            said = str(error)
        except BaseException as error:
            said = repr(error)
        os.write(write, json.dumps({"changes": done[0], "error": said}).encode())
        os._exit(0)
    os.close(write)
    if order["after"] is not None:
        time.sleep(order["after"])
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(read) as pipe:
        report = json.loads(pipe.read() or "{}")
    print(json.dumps({"killed": os.WIFSIGNALED(status), **report}), flush=True)
"""


class Runs:
    """Context manager: `run` trains in a child of a process that lives as long as the block."""

    def __enter__(self) -> Runs:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen([sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=environment)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def run(self, config: dict[str, Any], at: int = -1, after: float | None = None, errno: int = 0, lasting: bool = False
            ) -> dict[str, Any]:
        """Train; killed before change number `at` (from 0), or `after` some seconds, or not at all.

        Args: errno: refuse that change with this error instead. lasting: and all that come after it.

        Returns: "killed"; of a run that ended, how many "changes" it made to files, and its "error", or "".
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {"config": config, "at": at, "after": after, "errno": errno, "lasting": lasting}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def gone_on_with(config: dict[str, Any], overwrite: bool = False) -> dict[str, Any]:
    """How a user starts a killed run again: --resume, or, where it had not come as far as its settings, from the beginning."""
    begun = (Path(config["out"]) / "config.toml").is_file()
    return {**config, "resume": begun and not overwrite, "overwrite": overwrite}
