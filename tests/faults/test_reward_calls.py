"""Reward functions that raise, return nothing or hang; the answers they were asked about are kept."""

import json

import pytest

import train_ppo
from base.reward_calls import UnscoredAnswers, call_in_time
from base.sampling import Sampler
from common.errors import InputError

HEAD = "import os, time\n\ndef f(images, prompts, responses, **columns):\n    "
FAULTS = {
    "raises": ("{}['label']", r"Reward f raised KeyError: 'label' \(.*fn\.py, line 4\) for .*pairs\.json.*row \d"),
    "raises for one": (
        "return [1 / (0 if 'photo photo' in p[0]['content'] else 1) for p in prompts]",
        r"raised ZeroDivisionError: .*pairs\.json.*row [25]",
    ),
    "returns None": ("pass", "Reward f returned NoneType: return a list of one number per answer"),
    "returns a number": ("return 3.0", "Reward f returned float"),
    "too few": ("return [1.0]", "returned 1 numbers for 4 answers"),
    "text": ("return ['good'] * len(responses)", "must return numbers"),
    "NaN": ("return [float('nan')] * len(responses)", r"is not finite for .*pairs\.json"),
    "all None": ("return [None] * len(responses)", "Every reward function returned None"),
    "hangs": ("time.sleep(60)", r"has not returned within 0\.3 seconds for 4 answers \(.*pairs\.json"),
    "spins": ("while True: pass", r"has not returned within 0\.3 seconds"),
    "hangs and swallows errors": (
        "try:\n        time.sleep(60)\n    except Exception:\n        return [0.0] * len(responses)",
        r"has not returned within 0\.3 seconds",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_sentence(command, tmp_path, fault: str):
    body, message = FAULTS[fault]
    file = tmp_path / "fn.py"
    file.write_text(HEAD + body + "\n")
    with pytest.raises(InputError, match=message):
        train_ppo.main(
            command("ppo", f"--use_lora True --lora_r 4 --reward_fn {file}:f --reward_timeout 0.3 --response_length 4")
        )


def test_failed_update_goes_on_with_its_answers(command, tmp_path, monkeypatch):
    """The third update's function fails; resumed, the run samples nothing for it, and ends as one that never failed."""
    file, broken = tmp_path / "fn.py", tmp_path / "broken"
    body = f"""if os.path.exists({str(broken)!r}) and next_call() == 3:
        raise OSError("judge is down")
    return [float(len(r)) for r in responses]

calls = []

def next_call():
    calls.append(1)
    return len(calls)
"""
    file.write_text(HEAD + body)
    flags = f"--use_lora True --lora_r 4 --reward_fn {file}:f --response_length 5 --max_steps 4"
    whole, out = tmp_path / "whole", tmp_path / "out"
    train_ppo.main(command("ppo", flags, out=whole))
    broken.touch()
    with pytest.raises(InputError, match=r"judge is down.*answers are kept in .*out: --resume_from_checkpoint True"):
        train_ppo.main(command("ppo", flags, out=out))
    assert (out / "checkpoint-2").is_dir() and (out / "unscored_answers_0.json").is_file()
    broken.unlink()
    sample, sampled = Sampler.sample, []

    def counted(self, *args):
        sampled.append(1)
        return sample(self, *args)

    monkeypatch.setattr(Sampler, "sample", counted)
    train_ppo.main(command("ppo", f"{flags} --resume_from_checkpoint True", out=out))
    assert len(sampled) == 1  # the fourth update's
    assert not (out / "unscored_answers_0.json").exists()
    monkeypatch.undo()
    assert [
        e.get("objective/scores") for e in json.loads((out / "trainer_state.json").read_text())["log_history"][:4]
    ] == [e.get("objective/scores") for e in json.loads((whole / "trainer_state.json").read_text())["log_history"][:4]]


def test_answers_of_another_update_are_not_taken(tmp_path):
    one = UnscoredAnswers(str(tmp_path), 0)
    one.begin(seed=1, step=3)
    one.put([[5, 6]], [0], [[[7]]], [[[-0.5]]])
    one.write()
    for key, expected in (
        ({"seed": 1, "step": 3}, ([[[7]]], [[[-0.5]]])),
        ({"seed": 1, "step": 4}, None),
        ({"seed": 2, "step": 3}, None),
    ):
        other = UnscoredAnswers(str(tmp_path), 0)
        other.begin(**key)
        assert other.get([[5, 6]], [0]) == expected and other.get([[5]], [0]) is None


def test_the_alarm_is_off_afterwards():
    assert call_in_time(lambda x: x, {"x": [1, 2]}, "f", ["a", "b"], 0.2) == [1, 2]
    import time

    time.sleep(0.3)  # an alarm that was left on would end the tests
