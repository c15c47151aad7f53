"""Two gloo ranks that wait for programs: torchrun starts this file once a session, which saves many starts.

A program is box/N.py; each rank runs it with `folder`, the text of box/N.folder, and writes "ok" or what went wrong to
box/N.RANK. box/stop ends the ranks.
"""

import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from engine.distributed import leave, start_process


def main(box):
    rank, *_ = start_process()
    n = 0
    while True:
        program = [None]
        while rank == 0 and program == [None] and not (box / "stop").exists():
            if (box / f"{n}.py").exists():
                program = [((box / f"{n}.py").read_text(), (box / f"{n}.folder").read_text())]
            time.sleep(0.02)
        dist.broadcast_object_list(program)
        if program == [None]:
            return leave()
        text, folder = program[0]
        outcome = "ok"
        try:
            exec(compile(text, f"program {n}", "exec"), {"folder": Path(folder), "__name__": "program"})
        except BaseException:
            outcome = traceback.format_exc()
        (box / f"{n}.{rank}").write_text(outcome)
        n += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
