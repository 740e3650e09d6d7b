"""PPO and eval.generate on every family: images joined to a batch, in rollouts, passes and evaluation, are those of each prompt alone."""

from pathlib import Path

import pytest
import torch

from eval.generate import Answerer, EncodedBatches
from models import MODEL_NICKNAME_MAP
from tests import zoo
from tests.test_ppo import LORA, ppo_trainer, rolled_out, to_alone

NAMES = [*MODEL_NICKNAME_MAP.values(), "pixtral"]
FEW = ["llava_next", "qwen3_vl", "mllama", "instructblip", "ovis2", "lfm2_vl"]  # each with a layout of its own
SIZES = [(40, 30), (20, 60)]  # different numbers of image tokens in some families


def no_reward(responses: list[str], **_) -> list[float]:
    return [float(len(r)) for r in responses]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Two prompts of different lengths, with pictures of different shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    questions = ["What is this?", "Describe the photo, red or blue?"]
    for i, size in enumerate(SIZES):
        zoo.image(i, *size).save(folder / f"{i}.png")
    return [
        {"images": [str(folder / f"{i}.png")], "prompt": [{"role": "user", "content": text}], "where": f"row {i}"}
        for i, text in enumerate(questions)
    ]


def trainer_of(family: str, rows: list[dict], out: Path, flags: str = ""):
    """A LoRA PPO trainer whose adapters of policy and value are different from zero."""
    flags = f"{LORA} --reward_fn {__file__}:no_reward --response_length 12 --num_ppo_epochs 1 {flags}"
    trainer = ppo_trainer(zoo.checkpoint(family), rows, out, flags)
    torch.manual_seed(0)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return trainer


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("family", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_prompts_read_their_own_images(family: str, share_prefix: bool, rows: list[dict], tmp_path: Path):
    """Two prompts with two answers each in one micro batch: sampled answers are those of each prompt alone, log-probs those of each
    answer in a row without padding and with pixels; and an update runs."""
    trainer = trainer_of(family, rows, tmp_path, f"--share_prefix {share_prefix}")
    (together,), alone = rolled_out(trainer, rows, size=2), rolled_out(trainer, rows, size=1)
    assert together.by_prompt(together.texts) == [r.by_prompt(r.texts)[0] for r in alone]
    assert len(set(together.texts)) > 2
    single = to_alone(trainer, together)
    for i, (b, k) in enumerate(together.order):
        n = int(together.mask[i].sum())
        other = alone[b].order.index((0, k))
        for name in ("logps", "ref_logps", "values", "entropy"):
            close(getattr(together, name)[i, :n], getattr(alone[b], name)[other, :n])
        answer = together.batch["completion_ids"][i, :n]
        inputs, start = single(i, answer.tolist())
        index = torch.arange(start - 1, start + n - 1)
        with torch.no_grad():
            out = trainer.model.backbone(
                **inputs, completion_index=index, completion_ids=answer, temperature=trainer.args.temperature
            )
        close(together.logps[i, :n], out.logps)
    trainer.train()
    step = next(entry for entry in trainer.state.log_history if "objective/kl" in entry)
    assert step["first/ratio_deviation"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("family", NAMES)
def test_generate_answers_a_batch_as_each_row_alone(family: str, rows: list[dict]):
    answerer = Answerer(zoo.checkpoint(family), None, torch.device("cpu"), bf16=False)
    batch = [{"id": row["where"], "images": row["images"], "prompt": row["prompt"][0]["content"]} for row in rows]
    encoded = EncodedBatches([batch], answerer.prompt_collator)[0][1]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = answerer.answer(encoded, settings, seed=0)
    assert together == [answerer.answer([item], settings, seed=0)[0] for item in encoded]
    assert answerer.tower_runs == 2
