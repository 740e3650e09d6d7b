"""scripts/slurm.sbatch under stand-ins for Slurm's commands: ranks, address, port, and another start after status 75."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "slurm.sbatch"
# Four tasks on two machines; the exit status is the highest, as srun's
SRUN = """#!/usr/bin/env bash
shift
status=0 pids=()
for id in 0 1 2 3; do SLURM_PROCID=$id SLURM_LOCALID=$((id % 2)) SLURM_NTASKS=4 "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait $pid; code=$?; [ $code -gt $status ] && status=$code; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$LOG/scontrol"
[ "$1" = show ] && printf 'node7\\nnode8\\n'
exit 0
"""
PYTHON = """#!/usr/bin/env bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" > "$LOG/task-$RANK"
trap 'exit 75' TERM
echo $$ > "$LOG/pid-$RANK"
[ -n "$WAIT" ] && for i in $(seq 100); do sleep 0.1; done
exit ${CODE:-0}
"""


@pytest.fixture
def start(tmp_path: Path):
    """Start the script; returns the process, whose files lie in tmp_path."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "LOG": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "1234567",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }

    def run(**more: str) -> subprocess.Popen:
        command = ["bash", str(SCRIPT), "train_dpo.py", "--output_dir", "a b"]
        return subprocess.Popen(command, env=environment | more, stdout=subprocess.DEVNULL)

    return run


def test_every_task_has_its_rank(start, tmp_path: Path):
    assert start().wait(timeout=60) == 0
    said = [(tmp_path / f"task-{rank}").read_text().strip() for rank in range(4)]
    flags = "train_dpo.py --output_dir a b --resume_from_checkpoint True"
    port = 20000 + 1234567 % 20000
    assert said == [f"{rank} {rank % 2} 4 node7 {port} {flags}" for rank in range(4)]
    assert (tmp_path / "scontrol").read_text() == "show hostnames node[7-8]\n"


@pytest.mark.parametrize(("code", "again"), [("75", True), ("2", False)])
def test_only_status_75_asks_for_another_start(start, tmp_path: Path, code: str, again: bool):
    assert start(CODE=code).wait(timeout=60) == int(code)
    assert ("requeue 1234567" in (tmp_path / "scontrol").read_text()) == again


def test_a_signal_to_the_tasks_and_the_batch_shell(start, tmp_path: Path):
    job = start(WAIT="1")
    pids = [tmp_path / f"pid-{rank}" for rank in range(4)]
    while not all(file.exists() and file.read_text().strip() for file in pids):
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert job.poll() is None  # the shell waits for its tasks
    for file in pids:
        os.kill(int(file.read_text()), signal.SIGTERM)
    assert job.wait(timeout=60) == 75
    assert "requeue 1234567" in (tmp_path / "scontrol").read_text()
