"""Online DPO: TRL's loss and gradients on the same answers, pairs, invariants over layouts and accumulation, rewards, wrong input."""

from pathlib import Path

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

import args
import train_dpo
from base.adapters import Role
from base.online_dpo import scored_pairs
from base.reward import VLRewardModel
from base.rollout import Sampled, Scored
from common.errors import InputError
from data import DataSplits
from tests import zoo
from tests.test_ppo import prompt_rows, reward_adapters  # noqa: F401  a fixture

LORA = "--use_lora True --lora_r 4 --lora_alpha 8 --lora_dropout 0"


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rewards") / "rewards.py"
    file.write_text(
        "import zlib\n"
        "def any_order(responses, **_):\n    return [zlib.crc32(r.encode()) % 1000 / 1000 for r in responses]\n"
        "def same(responses, **_):\n    return [1.0] * len(responses)\n"
        "def even(completion_ids, **_):\n    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]\n"
        "def some(responses, **_):\n    return [None if i % 3 == 0 else float(i) for i in range(len(responses))]\n"
    )
    return str(file)


def online_trainer(
    checkpoint: str, rows: list[dict], out: Path, flags: str, eval_rows: list[dict] | None = None, parsed_only=False
):
    """What train_dpo.py builds with --online, for prompts in memory."""
    parsed = args.parse(
        args.ModelArguments,
        args.DataArguments,
        args.LoraArguments,
        args.DPOConfig,
        argv=f"--model_name_or_path {checkpoint} --dataset_name x --output_dir {out} --max_steps 2 --per_device_train_batch_size 4 "
        "--online True --response_length 6 --learning_rate 1e-2 --lr_scheduler_type constant --save_strategy no --seed 0 "
        f"--disable_tqdm True --num_sample_generations 0 {flags}".split(),
    )
    if parsed_only:
        return parsed
    eval_data = Dataset.from_list(eval_rows) if eval_rows else None
    return train_dpo.build(*parsed, data=DataSplits(Dataset.from_list(rows), eval_data, {}))[0]


def away_from_reference(model: torch.nn.Module) -> None:
    """Move the policy: at the start it is its own reference."""
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "lora" not in name):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ------------------------------------------------------------------------------------------------ against TRL


@pytest.mark.parametrize("flags", [LORA, ""], ids=["lora", "full"])
def test_loss_and_gradients_are_trls(llava, image_dir, tmp_path, reward_file, monkeypatch, flags: str):
    """The same prompts, answers and scores: TRL's OnlineDPOTrainer makes the same step."""
    rows = prompt_rows(image_dir, 4)
    ours = online_trainer(llava, rows, tmp_path / "ours", f"{flags} --reward_fn {reward_file}:any_order --beta 0.3")
    away_from_reference(ours.model)
    sampled, lay_out = [], ours._lay_out

    def keep(prompts, answers) -> Sampled:
        sampled.append((prompts.tokens, answers))
        return lay_out(prompts, answers)

    monkeypatch.setattr(ours, "_lay_out", keep)
    collated = ours.data_collator(rows)
    (batch,) = ours.answered([collated])
    assert len(batch["chosen"]) == 4  # no ties, so TRL has the same pairs
    loss = ours.compute_loss(ours.model, batch)
    loss.backward()

    model = transformers.LlavaForConditionalGeneration.from_pretrained(llava)
    config = {}
    if flags:
        targets = ours.model.peft_config["default"].target_modules
        config["peft_config"] = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0, target_modules=targets)
    theirs = OnlineDPOTrainer(
        model=model,
        processing_class=transformers.AutoProcessor.from_pretrained(llava),
        train_dataset=Dataset.from_list([{"prompt": "x"}]),
        reward_funcs=lambda completions, **_: ours.rewards[0].function(responses=completions),
        args=OnlineDPOConfig(
            output_dir=str(tmp_path / "trl"), beta=0.3, report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False, per_device_train_batch_size=4,
        ),
        **config,
    )  # fmt: skip
    initial = dict(ours.model.named_parameters())
    for name, parameter in theirs.model.named_parameters():
        parameter.data.copy_(initial[name].data)
        parameter.requires_grad_(initial[name].requires_grad)

    (prompts, answers) = sampled[0]
    ends = [answer for k in range(2) for answer in (of_prompt[k] for of_prompt in answers)]
    length, width = max(map(len, prompts)), max(map(len, ends))
    prompt_ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts * 2])
    prompt_mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts * 2])
    completion_ids = torch.tensor([a + [0] * (width - len(a)) for a in ends])
    completion_mask = torch.tensor([[1] * len(a) + [0] * (width - len(a)) for a in ends])
    pixels = torch.cat([collated["img_input_dict"]["pixel_values"]] * 2)
    texts = [ours.data_collator.processor.decode_response(a) for a in ends]
    monkeypatch.setattr(theirs.processing_class, "batch_decode", lambda *_, **__: texts)
    monkeypatch.setattr(
        theirs,
        "_generate",
        lambda *_: (prompt_ids, prompt_mask, completion_ids, completion_mask, {"pixel_values": pixels}),
    )
    theirs.model.zero_grad()
    expected = theirs.training_step(theirs.model, {"prompt": ["x"] * 4})
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(loss.item() - 0.6931) > 1e-3  # the policy is not the reference
    gradients = {n: p.grad for n, p in theirs.model.named_parameters() if p.grad is not None}
    mine = {n: p.grad for n, p in ours.model.named_parameters() if p.grad is not None}
    assert mine.keys() == gradients.keys() and mine
    for name, gradient in gradients.items():
        assert (gradient - mine[name]).norm() <= 1e-3 * gradient.norm() + 1e-7, name


# ------------------------------------------------------------------------------------------------ pairs


def test_pairs_by_score():
    nan = float("nan")
    assert scored_pairs([1.0, 3.0, 2.0], "all", None) == [(1, 2), (1, 0), (2, 0)]
    assert scored_pairs([1.0, 3.0, 2.0], "best_worst", None) == [(1, 0)]
    assert scored_pairs([2.0, 2.0], "all", None) == []
    assert scored_pairs([nan, 3.0, nan, 4.0], "all", None) == [(3, 1)]
    assert scored_pairs([1.0, 3.0, 2.5], "all", 1.0) == [(1, 0), (2, 0)]
    assert scored_pairs([nan, nan], "best_worst", None) == []


def test_batches_hold_the_pairs_of_their_prompts(llava, image_dir, tmp_path, reward_file):
    """With both layouts chosen and rejected answer one prompt, and the chosen one has the higher score."""
    rows = prompt_rows(image_dir, 4)
    found = []
    for share in ("True", "False"):
        flags = f"{LORA} --reward_fn {reward_file}:any_order --rollouts_per_prompt 3 --share_prefix {share}"
        trainer = online_trainer(llava, rows, tmp_path / share, flags)
        seen, preferences = [], trainer.preferences
        trainer.preferences = lambda r, seen=seen, preferences=preferences: (seen.append(r), preferences(r))[1]
        (batch,) = trainer.answered([trainer.data_collator(rows)])
        (r,) = seen
        pairs = list(zip(batch["chosen"].tolist(), batch["rejected"].tolist(), strict=True))
        assert len(pairs) == 4 * 3
        assert all(r.prompt_of[c] == r.prompt_of[j] and r.scores[c] > r.scores[j] for c, j in pairs)
        away_from_reference(trainer.model)
        found.append(
            (
                {(r.prompt_of[c], r.texts[c], r.texts[j]) for c, j in pairs},
                trainer.compute_loss(trainer.model, batch).item(),
            )
        )
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5)


def test_pairs_and_metrics_of_flags_by_hand(llava, image_dir, tmp_path, reward_file):
    """Neighbours at least 1 apart: of 3, 2.5 and 1 the last two. A prompt that fills up an evaluation gives nothing."""
    rows = prompt_rows(image_dir, 2)
    flags = "--rollouts_per_prompt 3 --pairs adjacent --score_margin 1"
    trainer = online_trainer(llava, rows, tmp_path, f"{LORA} --reward_fn {reward_file}:any_order {flags}")
    rows[1]["repeated"] = True
    batch = trainer.data_collator(rows)
    laid_out = trainer._lay_out(trainer._prompts(batch, [0, 1]), [[[5], [6, 7], [8]], [[9], [10], [11, 12, 13]]])
    scores = torch.tensor([3.0, 2.5, 1.0, 9.0, 5.0, 0.0])
    found = trainer.preferences(Scored(**vars(laid_out), parts={"any_order": scores}, scores=scores))
    assert found["chosen"].tolist() == [1] and found["rejected"].tolist() == [2]
    of_train = {name: torch.stack(sums).sum(0).tolist() for name, sums in trainer._metrics["train"].items()}
    assert of_train["objective/scores_margin"] == [1.5, 1] and of_train["objective/scores"] == [6.5, 3]
    assert of_train["val/response_length"] == [4, 3]

    def answers(step: int) -> list[list[int]]:
        trainer.state.global_step = step
        return trainer.answered([batch])[0]["completion_ids"].tolist()

    assert answers(0) == answers(0) != answers(1)  # every step has random numbers of its own
    assert trainer.model.training


# ------------------------------------------------------------------------------------------------ invariants


@pytest.mark.parametrize("flags", [LORA, pytest.param("", marks=pytest.mark.slow)], ids=["lora", "full"])
def test_accumulation_is_a_larger_batch(llava, image_dir, tmp_path, reward_file, flags: str):
    rows = prompt_rows(image_dir, 8)
    runs = []
    for sizes in ("--per_device_train_batch_size 4", "--per_device_train_batch_size 2 --gradient_accumulation_steps 2"):
        trainer = online_trainer(
            llava, rows, tmp_path / str(len(runs)), f"{flags} --reward_fn {reward_file}:any_order {sizes}"
        )
        losses = losses_of(trainer)
        runs.append((losses, [p.detach() for p in trainer.model.parameters() if p.requires_grad]))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-5) and len(runs[0][0]) == 2
    assert runs[0][0][0] == pytest.approx(0.693147, abs=1e-5)  # the policy is the reference
    assert runs[0][0][1] != pytest.approx(0.693147, abs=1e-4)  # and then no more
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_ties_move_nothing(llava, image_dir, tmp_path, reward_file):
    trainer = online_trainer(llava, prompt_rows(image_dir), tmp_path, f"{LORA} --reward_fn {reward_file}:same")
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    assert losses_of(trainer) == [0, 0]
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1


@pytest.mark.slow
def test_scores_rise(llava, image_dir, tmp_path, reward_file):
    """The reward is the share of even token ids, which the policy can learn."""
    flags = f"--reward_fn {reward_file}:even --rollouts_per_prompt 4 --max_steps 12"
    trainer = online_trainer(llava, prompt_rows(image_dir), tmp_path, flags)
    trainer.train()
    scores = [e["objective/scores"] for e in trainer.state.log_history if "objective/scores" in e]
    assert len(scores) == 12 and sum(scores[-6:]) / 6 > sum(scores[:5]) / 5 + 0.08


def test_a_paper_s_own_loss_is_taken(llava, image_dir, tmp_path, reward_file, monkeypatch):
    """`preference_loss` of a family's DPO trainer holds online as well."""
    called = []
    trainer_class = train_dpo.core_mapper_for(llava).dpo_trainer
    loss = trainer_class.preference_loss
    monkeypatch.setattr(trainer_class, "preference_loss", lambda self, *a: (called.append(1), loss(self, *a))[1])
    online_trainer(llava, prompt_rows(image_dir), tmp_path, f"{LORA} --reward_fn {reward_file}:any_order").train()
    assert len(called) == 2


# ------------------------------------------------------------------------------------------------ rewards


def test_reward_adapters(llava, image_dir, tmp_path, reward_adapters):  # noqa: F811
    """An adapter on the policy's base gives what the same folder gives as a model of its own; the result holds the policy alone."""
    rows, folder = prompt_rows(image_dir, 4), reward_adapters("llava")
    trainer = online_trainer(llava, rows, tmp_path, f"{LORA} --reward_adapter {folder} --max_steps 1")
    trainer.train()
    (r,) = trainer.score(trainer.rollout([trainer.data_collator(rows)], 0, [[0, 1, 2, 3]]))
    reward_model = VLRewardModel.from_pretrained(folder)
    with torch.no_grad():
        alone = reward_model(**trainer._inputs(r, Role.POLICY), completion_index=r.batch["last_tokens"])
    assert r.scores.std() > 1e-3
    torch.testing.assert_close(r.scores, alone, atol=2e-4, rtol=1e-3)
    trainer.save_model()
    (saved,) = tmp_path.rglob("*.safetensors")
    assert not [name for name in load_file(saved) if "reward" in name] and saved.parent == tmp_path


@pytest.mark.parametrize(
    "family", ["mllama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2_5_vl", "gemma3", "instructblip"))]
)
def test_families(family: str, image_dir, tmp_path, reward_file):
    """The first loss is ln 2: the packed rollouts are what the reference reads, too."""
    flags = f"{LORA} --reward_fn {reward_file}:any_order --max_steps 1 --rollouts_per_prompt 2"
    trainer = online_trainer(zoo.checkpoint(family), prompt_rows(image_dir, 4), tmp_path, flags)
    assert losses_of(trainer) == [pytest.approx(0.693147, abs=1e-4)]


def test_trained_vision_and_answers_without_a_score(llava, image_dir, tmp_path, reward_file):
    """With a vision side that trains, pixels go through the model; an answer whose reward is None is in no pair."""
    flags = f"--freeze_vision_tower False --reward_fn {reward_file}:some --rollouts_per_prompt 3 --max_steps 1"
    trainer = online_trainer(llava, prompt_rows(image_dir, 4), tmp_path, flags)
    tower = next(trainer.base_model(trainer.model).get_vision_tower().parameters())
    before = tower.detach().clone()
    assert losses_of(trainer) == [pytest.approx(0.693147, abs=1e-5)]
    assert not torch.equal(tower, before)
    (batch,) = trainer.answered([trainer.data_collator(prompt_rows(image_dir, 4))])
    assert len(batch["chosen"]) == 4  # of answers 1 and 2 to each prompt


def test_evaluation_samples_the_same_answers(llava, image_dir, tmp_path, reward_file):
    rows = prompt_rows(image_dir, 8)
    flags = f"{LORA} --reward_fn {reward_file}:any_order --per_device_eval_batch_size 2 --num_sample_generations 1"
    trainer = online_trainer(llava, rows, tmp_path, flags, eval_rows=rows[:3])
    places, preferences = [], trainer.preferences
    trainer.preferences = lambda r: places.extend(r.places) or preferences(r)
    first = trainer.evaluate()
    trainer.state.global_step = 1
    again = trainer.evaluate()
    trainer.state.global_step = 0
    assert places[:3] == places[3:] and len({*places}) == 3  # random numbers of its own for every prompt
    names = ["eval_loss", "eval_objective/scores", "eval_rewards/accuracies", "eval_val/response_length"]
    assert [first[name] for name in names] == [again[name] for name in names]
    trainer.args.per_device_eval_batch_size = 3
    other = trainer.evaluate()
    assert [first[name] for name in names] == pytest.approx([other[name] for name in names], abs=1e-5)
    trainer.train()
    assert "reward" in (tmp_path / "samples" / "step-000001.html").read_text()


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "Online DPO needs a reward"),
        ("--online False --reward_fn x", r"--reward_fn needs --online True"),
        ("--online False --response_length 7", r"--response_length needs --online True"),
        ("--reward_fn x --rollouts_per_prompt 1", "2 at least"),
        ("--reward_fn x --loss_type mdpo", "mdpo reads corrupted_image"),
        ("--reward_fn x --loss_type mmdpo", "reads margin"),
        ("--reward_fn x --precompute_ref_log_probs True", "leave it out"),
        ("--reward_fn x --log_image_sensitivity True --eval_ratio 0.5", "leave it out"),
        ("--reward_fn x --temperature 0", "above 0"),
    ],
)
def test_wrong_flags(tmp_path, flags: str, message: str):
    with pytest.raises(InputError, match=message):
        online_trainer("x", [], tmp_path, flags.replace("--online False", "--response_length 53 --online False"), parsed_only=True)  # fmt: skip
