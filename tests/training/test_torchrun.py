from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import free_port

from palm_pytorch.cli import main
from palm_pytorch.training.logging import read_metrics

ROOT = Path(__file__).parents[2]
# Runs train.py, but that rank 1 is killed twice: in its fifth step, when the checkpoint of the second is
# certain to be there, and then, started again, while it writes its part of a checkpoint.
KILLED = """
import os, runpy, signal, sys
from pathlib import Path
from palm_pytorch.training import loop

in_step, in_write = Path({folder!r}, "killed-in-step"), Path({folder!r}, "killed-in-write")

def fatal_once(call, mark, is_due):
    def wrapped(*args):
        if os.environ["RANK"] == "1" and not mark.exists() and is_due(*args):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args)
    return wrapped

loop.train_step = fatal_once(loop.train_step, in_step, lambda run, batches: run.state.step == 4)
os.fsync = fatal_once(os.fsync, in_write, lambda file: in_step.exists())
sys.argv[0] = {train!r}
runpy.run_path({train!r}, run_name="__main__")
"""


def flags(options: dict[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]


def test_two_machines_recover_from_the_loss_of_a_process(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Two agents that meet by c10d, as on two machines; what they train is what one process would."""
    tiny |= {"grad_accum": 2}
    assert main(["train", *flags({**tiny, "out": tmp_path / "alone"})]) == 0
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(train=str(ROOT / "train.py"), folder=str(tmp_path)))
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-id", "test"]
    meeting += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(
            [*command, *flags(tiny), "--parallel", "fsdp"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        said = [machine.communicate(timeout=240)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(said)
    assert (tmp_path / "killed-in-step").exists() and (tmp_path / "killed-in-write").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial-*"))

    def scores(run: Path) -> dict[tuple[str, int], float]:
        rows = [row for row in read_metrics(run / "metrics.jsonl") if "split" in row]
        losses = {(row["split"], row["step"]): row["loss"] for row in rows}
        assert len(losses) == len(rows)  # no step twice
        return losses

    events = [row["event"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "event" in row]
    assert events == ["resume"]
    assert scores(tmp_path / "run") == pytest.approx(scores(tmp_path / "alone"), rel=1e-5)
