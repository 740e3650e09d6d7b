"""KTO: single answers with a label, from the files on, against TRL's KTOTrainer and against numbers worked out by hand.

`torchrun --nproc_per_node 2 -m tests.test_kto CHECKPOINT ROWS OUT` trains ours and TRL's on every rank, and writes what both logged.
"""

import tests.conftest  # noqa: F401  isort: skip  (must come before transformers, where this file is the program)
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image

import args
import losses
import train_dpo
from base.preference_inputs import ModelPass
from base.run_warnings import unbalanced
from base.trainer import VLDPOTrainer
from base.views import fixed_mismatches, with_mismatched
from common.errors import InputError
from losses import UnpairedBatch
from tests import zoo
from tests.conftest import ANSWERS, QUESTION
from tests.processes import history
from tests.test_distributed import LAUNCH, assert_same_curve, finish, free_port, job, launch, start  # noqa: F401  job: a fixture
from tests.test_dpo import LORA, trl_llava  # noqa: F401  a fixture

LABELS = [True, False, False, True, True, False, True, True]


@pytest.fixture(scope="module")
def unpaired(image_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows in TRL's unpaired layout, and the file that they stand in."""
    path = tmp_path_factory.mktemp("unpaired") / "rows.jsonl"
    rows = [
        {
            "images": [str(image_dir / f"{i}.png")],
            "prompt": [{"role": "user", "content": QUESTION + " photo" * (i % 3)}],
            "completion": [{"role": "assistant", "content": ANSWERS[i % 4] + " yes" * (i // 4)}],
            "label": label,
        }
        for i, label in enumerate(LABELS)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def trainer_for(checkpoint: str, file: Path, out: Path, flags: str = ""):
    """The trainer that train_dpo.py builds from the file."""
    parsed = args.parse(
        args.ModelArguments,
        args.DataArguments,
        args.LoraArguments,
        args.DPOConfig,
        argv=f"--model_name_or_path {checkpoint} --dataset_name {file} --allow_outside_image_root True --output_dir {out} --max_steps 2 "
        "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --learning_rate 1e-3 --lr_scheduler_type constant --seed 0 "
        f"--save_strategy no --disable_tqdm True --train_sampling_strategy sequential --loss_type kto {flags}".split(),
    )
    return train_dpo.build(*parsed)[0]


def logged(trainer) -> list[dict[str, float]]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def trl_trainer(checkpoint: str, file: Path, out: Path, lora: peft.LoraConfig | None, **settings):
    """TRL's KTOTrainer on the same rows."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {"images": [Image.open(row["images"][0]).convert("RGB")]} for row in rows]
    return trl.KTOTrainer(
        model=transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint),
        processing_class=transformers.AutoProcessor.from_pretrained(checkpoint),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        peft_config=lora,
        args=trl.KTOConfig(
            output_dir=str(out),
            **{
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 4,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "constant",
                "max_length": None,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "disable_tqdm": True,
            }
            | settings,
        ),
    )


METRICS = ["grad_norm", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"]


WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.25, "beta": 0.3}  # all answers become likelier: KL grows


def both_trainers(checkpoint: str, file: Path, out: Path, flags: str, **settings):
    """Ours and TRL's, with the same start; `settings` are those of both."""
    given = WEIGHTS | settings
    ours = trainer_for(
        checkpoint, file, out / "ours", f"{flags} --max_steps 4 {' '.join(f'--{k} {v}' for k, v in given.items())}"
    )
    lora = ours.model.peft_config["default"] if "lora" in flags else None
    theirs = trl_trainer(
        checkpoint,
        file,
        out / "trl",
        lora and peft.LoraConfig(r=4, lora_alpha=8, target_modules=lora.target_modules, task_type="CAUSAL_LM"),
        max_steps=4,
        **given,
    )
    initial = dict(ours.model.named_parameters())
    with torch.no_grad():  # both adapters start from the same random A
        for name, parameter in theirs.model.named_parameters():
            if parameter.requires_grad and lora:
                parameter.copy_(initial[name])
    return ours, theirs


def assert_same_log(expected: list[dict[str, float]], found: list[dict[str, float]]) -> None:
    """What TRL has logged, and what ours has."""
    assert len(expected) == len(found) == 4
    assert max(entry["kl"] for entry in expected) > 0.01  # else agreement would mean little
    for theirs_at, ours_at in zip(expected, found, strict=True):
        assert ours_at["loss"] == pytest.approx(theirs_at["loss"], abs=1e-4)
        assert {name: ours_at[name] for name in METRICS if name in theirs_at} == pytest.approx(
            {name: theirs_at[name] for name in METRICS if name in theirs_at}, abs=2e-3
        )


@pytest.mark.parametrize(
    "flags",
    [
        LORA,
        pytest.param(f"{LORA} --share_prefix False", marks=pytest.mark.slow),
        pytest.param("--freeze_vision_tower False", marks=pytest.mark.slow),
    ],
)
def test_losses_kl_and_metrics_are_trls(trl_llava, unpaired, tmp_path, flags: str):  # noqa: F811
    ours, theirs = both_trainers(trl_llava, unpaired, tmp_path, flags)
    expected, found = logged(theirs), logged(ours)
    assert_same_log(expected, found)
    ours.eval_dataset = ours.train_dataset
    expected, found = theirs.evaluate(), ours.evaluate()
    names = ["eval_loss", "eval_kl"]  # TRL's other metrics are means of batches' means
    assert [found[name] for name in names] == pytest.approx([expected[name] for name in names], abs=2e-3)


def test_kto_by_hand():
    """Log-ratios 2 and -1, KL 0.5, beta 0.4, weights 3 and 5."""
    batch = UnpairedBatch(
        policy=torch.tensor([-3.0, -6.0]),
        ref=torch.tensor([-5.0, -5.0]),
        desirable=torch.tensor([True, False]),
        kl=torch.tensor(0.5),
    )
    weights = {"beta": 0.4, "desirable_weight": 3.0, "undesirable_weight": 5.0}
    found = losses.get_loss("kto")(batch, **weights)
    assert found.tolist() == pytest.approx([3 * (1 - 1 / (1 + math.exp(-0.6))), 5 * (1 - 1 / (1 + math.exp(-0.6)))])
    found = losses.get_loss("apo_zero_unpaired")(batch, **weights)
    assert found.tolist() == pytest.approx([3 * (1 - 1 / (1 + math.exp(-0.8))), 5 * (1 / (1 + math.exp(0.4)))])
    with pytest.raises(ValueError, match="reads kl"):
        losses.get_loss("kto")(UnpairedBatch(policy=batch.policy, ref=batch.ref, desirable=batch.desirable))


def test_kl_over_devices_by_hand():
    """Mismatched log-ratios 3 and -1 here and one of the other device: -8 gives a mean below 0, which becomes 0, and 4 the mean 2."""
    policy = ModelPass(torch.tensor([[9.0, 9.0], [1.0, 2.0], [0.0, -1.0]], requires_grad=True))
    reference, batch = ModelPass(torch.zeros(3, 2)), {"mismatched": torch.tensor([1, 2])}
    for other, expected in ((-8.0, 0.0), (4.0, 2.0)):
        accelerator = SimpleNamespace(reduce=lambda total, reduction, other=other: total + torch.tensor([other, 1.0]))
        found = VLDPOTrainer.kl_to_reference(SimpleNamespace(accelerator=accelerator), policy, reference, batch)
        assert found.item() == expected and not found.requires_grad


def test_answers_move_on_by_one_within_a_batch():
    rows = [{"responses": [text]} for text in "abc"]
    assert [row["responses"] for row in with_mismatched(rows)] == [["a", "c"], ["b", "a"], ["c", "b"]]
    again = {"responses": ["a"], "repeated": True}  # fills up an evaluation: it neither gives nor takes an answer
    assert [row["responses"] for row in with_mismatched([*rows, again])] == [["a", "c"], ["b", "a"], ["c", "b"], ["a"]]
    assert [row["responses"] for row in with_mismatched(rows[:1])] == [["a"]]
    assert with_mismatched([rows[0] | {"mismatched": "z"}])[0]["responses"] == ["a", "z"]
    assert fixed_mismatches("abcdefg", 3) == ["c", "a", "b", "f", "d", "e", "f"]


def test_cached_reference_is_the_live_one(llava, unpaired, tmp_path):
    """In the order of the file, whose batches the pairing of the cache follows; the KL rows have cached log-probs, too."""
    live = logged(trainer_for(llava, unpaired, tmp_path / "live", f"{LORA} --max_steps 3 --undesirable_weight 0.1"))
    flags = f"--precompute_ref_log_probs True --ref_log_probs_dir {tmp_path / 'cache'}"
    trainer = trainer_for(
        llava, unpaired, tmp_path / "cached", f"{LORA} --max_steps 3 --undesirable_weight 0.1 {flags}"
    )
    cached = logged(trainer)
    assert "reference_logps" in trainer.train_dataset.column_names
    for name in ("loss", "kl", "rewards/margins"):
        assert [entry[name] for entry in cached] == pytest.approx([entry[name] for entry in live], abs=1e-5)
    assert live[-1]["kl"] > 0.01


def test_evaluation_counts_every_answer_once(llava, unpaired, tmp_path):
    """Six rows in batches of four, filled up with two that are repeated: as one batch of the loss without a KL."""
    out = []
    for fill in (True, False):
        trainer = trainer_for(
            llava, unpaired, tmp_path, f"{LORA} --loss_type apo_zero_unpaired --dataloader_drop_last {fill}"
        )
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
        trainer.eval_dataset = trainer.train_dataset.select(range(6))
        out.append(trainer.evaluate())
    whole = trainer._prepare_inputs(trainer.data_collator([trainer.eval_dataset[i] for i in range(6)]))
    trainer.model.eval()
    with torch.no_grad():
        assert out[0]["eval_loss"] == pytest.approx(trainer.compute_loss(trainer.model, whole).item(), abs=1e-5)
    assert out[0] == pytest.approx({**out[1], **{k: v for k, v in out[0].items() if "per_second" in k or "time" in k}})
    assert "kl" not in {name.removeprefix("eval_") for name in out[0]}


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--per_device_train_batch_size 1", "batch_size 1 leaves no other answer in a batch"),
        ("--pairs adjacent", "--pairs chooses pairs, and --loss_type kto reads single answers"),
        ("--loss_type kto sft", "kto reads single answers and sft pairs"),
        ("--loss_type kto --undesirable_weight -1", "neither is below 0"),
        (
            "--loss_type sigmoid",
            "holds unpaired rows .*, which train_dpo.py --loss_type kto can train on, not preference",
        ),
        ("--loss_type sigmoid --desirable_weight 2", "--desirable_weight does nothing with --loss_type sigmoid"),
    ],
)
def test_flags_that_do_not_fit_are_refused(llava, unpaired, tmp_path, flags: str, message: str):
    with pytest.raises(InputError, match=message):
        trainer_for(llava, unpaired, tmp_path, f"{LORA} {flags}")


def test_pairs_are_no_single_answers(llava, pairs_json, tmp_path):
    with pytest.raises(InputError, match="holds preference rows"):
        trainer_for(llava, pairs_json, tmp_path, LORA)


def test_weights_that_the_paper_does_not_take_are_said():
    """Six good and two bad answers: 3 : 1; a third of the weight for good ones makes 1 : 1."""
    labels = [True] * 6 + [False] * 2
    said = unbalanced(labels, 1.0, 1.0)
    assert (
        "weigh 3 : 1" in said
        and "--desirable_weight 0.333 to 0.444" in said
        and "--undesirable_weight 2.25 to 3." in said
    )
    assert unbalanced(labels, 0.34, 1.0) is None and unbalanced(labels, 1.0, 2.5) is None
    assert "weigh 0.333 : 1" in unbalanced([not label for label in labels], 1.0, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks, other families, other flags
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_estimate_the_kl_of_trls_two_ranks(trl_llava, unpaired, tmp_path):  # noqa: F811
    """Each pairs answers within its own half of a batch; the KL is that of both halves."""
    log = tmp_path / "log"
    command = ["torchrun", "--nproc_per_node", "2", "--master_port", free_port(), "-m", "tests.test_kto"]
    finish(start([*command, trl_llava, str(unpaired), str(tmp_path)], log), log)
    expected, found = json.loads((tmp_path / "logs.json").read_text())
    assert_same_log(expected, found)


def on_both_sides(checkpoint: str, file: str, folder: str) -> None:
    """On a rank of `torchrun`."""
    both = both_trainers(
        checkpoint,
        Path(file),
        Path(folder),
        f"{LORA} --use_cpu True",
        ddp_backend="gloo",
        per_device_train_batch_size=2,
    )
    logs = [logged(trainer) for trainer in reversed(both)]
    if torch.distributed.get_rank() == 0:
        (Path(folder) / "logs.json").write_text(json.dumps(logs))


@pytest.fixture
def unpaired_job(job, unpaired):  # noqa: F811
    """job(...) of test_distributed, on the unpaired rows."""

    def build(mode: str, folder: str, batch: int, flags: str, **more) -> dict:
        data = f"--dataset_name {unpaired} --data_path {unpaired} --allow_outside_image_root True"
        return job("dpo", mode, folder, batch, f"{data} --undesirable_weight 0.1 {flags}", **more)

    return build


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["ddp", "zero2", "zero3", "fsdp"])
def test_two_ranks_equal_one(unpaired_job, tmp_path, setup: str):
    """Without a KL, that of one process with the whole batch; KTO itself with a cached reference, that with a live one."""
    launcher, flags = LAUNCH[setup]
    apo = "--loss_type apo_zero_unpaired"
    cached = f"--precompute_ref_log_probs True --ref_log_probs_dir {tmp_path / 'cache'}"
    ordered = "--loss_type kto --train_sampling_strategy sequential"
    cells = [("full", apo), ("lora", apo)]
    alone = [unpaired_job(mode, "one", 4, extra) for mode, extra in cells]
    two = [unpaired_job(mode, "two", 2, f"{extra} {flags}") for mode, extra in cells]
    live = unpaired_job("lora", "two", 2, f"{ordered} {flags}", name="live")
    stored = unpaired_job("lora", "two", 2, f"{ordered} {flags} {cached}", name="stored")
    for one in alone:
        train_dpo.main(one["argv"])
    launch(launcher, [*two, live, stored], tmp_path)
    for one, other in [*zip(alone, two, strict=True), (live, stored)]:
        assert_same_curve(Path(one["out"]), Path(other["out"]))
    assert "kl" in history(Path(live["out"]))[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mllama", "qwen_vl", "internvl", "instructblip"])
def test_families(unpaired, tmp_path, family: str):
    """Every answer, the mismatched ones included, has the log-prob that it has in a batch of its own."""
    trainer = trainer_for(zoo.checkpoint(family), unpaired, tmp_path, f"{LORA} --undesirable_weight 0.1")
    rows = [trainer.train_dataset[i] for i in range(4)]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer.model.eval()

    def scores(batch: dict) -> torch.Tensor:
        with torch.no_grad():
            return trainer.response_scores(trainer.model, batch)

    found, alone = scores(batch), []
    for i, row in enumerate(rows):
        for answer in (row["responses"], rows[i - 1]["responses"]):
            single = trainer.data_collator([row | {"responses": answer}])
            alone.append(scores(trainer._prepare_inputs(single)))
    assert found.tolist() == pytest.approx(torch.cat(alone).tolist(), abs=1e-4)
    assert batch["answers"].tolist() == [0, 2, 4, 6] and batch["mismatched"].tolist() == [1, 3, 5, 7]
    trainer.model.train()
    steps = logged(trainer)
    assert all(math.isfinite(entry["loss"]) for entry in steps) and "kl" in steps[0]


@pytest.mark.slow
def test_resumed_runs_go_on_as_they_were(llava, unpaired_job, tmp_path):
    """Rows in random order, whose pairs are drawn in every batch."""
    flags = (
        "--loss_type kto apo_zero_unpaired --loss_weights 0.75 0.25 --max_steps 4 --save_strategy steps --save_steps 2"
    )
    whole, again = (unpaired_job("lora", name, 4, flags) for name in ("whole", "again"))
    train_dpo.main(whole["argv"])
    folder = Path(again["out"])
    shutil.copytree(Path(whole["out"]) / "checkpoint-2", folder / "checkpoint-2")
    shutil.copy(Path(whole["out"]) / "run.json", folder)
    train_dpo.main([*again["argv"], "--resume_from_checkpoint", "True"])
    assert_same_curve(Path(whole["out"]), folder, 1e-6)


def test_a_mixture_and_the_sensitivity_to_images(llava, unpaired, tmp_path):
    """0.75 KTO and 0.25 APO-zero, part by part; a model that reads its images says another answer's log-prob without them."""
    flags = "--loss_type kto apo_zero_unpaired --loss_weights 0.75 0.25 --log_image_sensitivity True --eval_ratio 0.25"
    trainer = trainer_for(llava, unpaired, tmp_path, f"{LORA} {flags}")
    for entry in logged(trainer):
        parts = 0.75 * entry["loss/kto"] + 0.25 * entry["loss/apo_zero_unpaired"]
        assert entry["loss"] == pytest.approx(parts, abs=1e-6)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(
        0.75 * found["eval_loss/kto"] + 0.25 * found["eval_loss/apo_zero_unpaired"], abs=1e-6
    )
    assert found["eval_image_sensitivity"] > 1e-3


if __name__ == "__main__":
    on_both_sides(*sys.argv[1:])
