"""Scripts in processes that start at once: a server process imports them once and forks for every run."""

import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = {name: f"train_{name}" for name in ("sft", "dpo", "rm", "ppo")}

# Flags of train_ppo.py, by a name that stands for train_ppo.py with them. Groups without variance need rewards of 0 and 1.
RL = {
    "ppo": "--num_ppo_epochs 2",
    "grpo": "--advantage_estimator grpo --num_generations 2 --num_ppo_epochs 2 --kl_in_loss 0.04 --loss_type grpo",
    "rloo": "--advantage_estimator rloo --num_generations 2 --num_ppo_epochs 2 --kl_coef 0.05",
    "reinforce_plus_plus": "--advantage_estimator reinforce_plus_plus --rollouts_per_prompt 1 --gamma 0.9 --kl_coef 0.1",
    "drop_uniform_groups": "--advantage_estimator reinforce_plus_plus_baseline --num_generations 2 --drop_uniform_groups True",
    "dynamic_sampling": "--advantage_estimator grpo --num_generations 2 --scale_rewards batch --dynamic_sampling True",
}
# Flags of train_dpo.py, by a name that stands for it.
DPO = {"online_dpo": "--online True --num_generations 2"}
ON_POLICY = RL | DPO  # what samples answers and reads rewards
ZERO_OR_ONE = ("drop_uniform_groups", "dynamic_sampling")


def script_of(name: str) -> str:
    """The script that runs under a name."""
    return "ppo" if name in RL else "dpo" if name in DPO else name


def pause_before_steps(seconds: float) -> None:
    """Make every training step of this process wait, so that a signal can arrive between two steps on any machine."""
    from base.checkpoints import Preemption

    Preemption.on_step_begin = lambda *args, **kwargs: time.sleep(seconds)


def break_step(step: int, rank: int, what: str) -> None:
    """Let one process of a run break in a training step, counted from 1.

    Args:
        what: "loss" or "gradient" is NaN in the step, or a "weight" is infinite after it, behind the trainer's back.
    """
    from base import trainer
    from common.tensors import local_part

    for kind in (trainer.VLSFTTrainer, trainer.VLDPOTrainer):

        def compute_loss(self, *args, compute_loss=kind.compute_loss, **kwargs):
            loss = compute_loss(self, *args, **kwargs)
            if (self.state.global_step + 1, self.args.process_index) == (step, rank) and self.model.training:
                if what == "loss":
                    return loss * float("nan")
                if what == "gradient":
                    loss.register_hook(lambda grad: grad * float("nan"))
            return loss

        def step_end(self, *args, step_end=kind._maybe_log_save_evaluate, **kwargs):
            if (self.state.global_step, self.args.process_index, what) == (step, rank, "weight"):
                weight = next(p for p in self.model.parameters() if p.requires_grad)
                local_part(weight).view(-1)[0] = float("inf")
            step_end(self, *args, **kwargs)

        kind.compute_loss, kind._maybe_log_save_evaluate = compute_loss, step_end


def _main(script: str, argv: list[str], log: str, file_size: int | None, pause: float) -> None:
    """In the child: everything printed goes to `log`; no file grows beyond `file_size` bytes, as on a full disk."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # whoever reads the log waits for its lines
    os.chdir(ROOT)
    sys.argv = [f"{SCRIPTS[script]}.py", *argv]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as from a terminal, even if the tests run under nohup
    import torch

    import args

    torch.set_num_threads(1)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if pause:
        pause_before_steps(pause)
    module = __import__(SCRIPTS[script])
    args.run(module.main)
    sys.stdout.flush()


def context() -> multiprocessing.context.BaseContext:
    """The fork server, with the scripts imported."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.conftest", *SCRIPTS.values()])
    return server


class Run:
    """One run of a script: `Run("sft", argv, log).wait()`."""

    def __init__(self, script: str, argv: list[str], log: Path, file_size: int | None = None, pause: float = 0) -> None:
        """
        Args:
            script: of SCRIPTS, or of ON_POLICY.
            file_size: bytes beyond which no file grows.
            pause: seconds that every step waits.
        """
        self.log = log
        self.process = context().Process(target=_main, args=(script_of(script), argv, str(log), file_size, pause))
        self.process.start()

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def steps(self) -> int:
        """Steps that this process has logged."""
        return len(re.findall(r"^step ", self.output, re.MULTILINE))

    def until(self, condition: Callable[[], bool], timeout: float = 300, every: float = 0.001) -> bool:
        """Wait until the condition holds, looking `every` so many seconds; False if the process has ended before."""
        end = time.monotonic() + timeout
        while not condition():
            if not self.process.is_alive():
                return False
            assert time.monotonic() < end, f"nothing happens: {self.output[-2000:]}"
            time.sleep(every)
        return True

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal; False if the process has ended before."""
        try:
            os.kill(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def wait(self) -> int:
        """The exit status, negative for a signal."""
        self.process.join(300)
        assert self.process.exitcode is not None, self.output[-2000:]
        return self.process.exitcode


def history(out: Path) -> list[dict]:
    """The logged numbers of a run, without those that measure time."""
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [
        {k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k and "time" not in k}
        for e in entries
        if "train_runtime" not in e
    ]
