"""Reward models of other programs, in the files that those write: our scores are what those programs compute."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers
import trl
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from base.other_heads import other_head
from base.reward import VLRewardModel, score_rows
from base.value import VLModelWithValueHead
from common.errors import InputError
from models import core_mapper_for
from tests import zoo

ANSWERS = ["A red square.", "no"]


@pytest.fixture(scope="module")
def rows(image_dir: Path) -> list[dict]:
    """Two rows with two answers each, of different lengths."""
    return [
        {
            "images": [str(image_dir / f"{i}.png")],
            "prompt": [{"role": "user", "content": "What is this?" + " Say it." * i}],
            "responses": ANSWERS,
        }
        for i in range(2)
    ]


def checkpoint_of(family: str, folder: Path) -> str:
    """The family's tiny checkpoint, its processor in `folder`."""
    source = zoo.checkpoint(family)
    folder.mkdir()
    for file in Path(source).iterdir():
        if not file.name.startswith(("model", "config")):
            shutil.copy(file, folder)
    return source


def inputs_of(checkpoint: str, rows: list[dict]) -> Iterator[dict]:
    """What the family's own class takes, one answer after the other, without padding."""
    family = core_mapper_for(checkpoint)
    collator = family.reward_collator(family.processor(checkpoint), share_prefix=False)
    for row in rows:
        for response in row["responses"]:
            batch = collator.responses_only([row | {"responses": [response]}])
            ids = batch["input_ids"]
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), **batch["img_input_dict"]}


def check(folder: Path, checkpoint: str, rows: list[dict], theirs: Callable[[dict], Tensor]) -> None:
    """Our scores are theirs, and they differ from answer to answer."""
    with torch.no_grad():
        expected = [theirs(inputs).item() for inputs in inputs_of(checkpoint, rows)]
    model = core_mapper_for(str(folder)).reward_model.from_pretrained(str(folder))
    scores = score_rows(model, core_mapper_for(str(folder)).processor(str(folder)), rows)
    found = [score for row in scores for score in row]
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-2


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Path, str, nn.Module]:
    """Folder, base and model of TRL's RewardTrainer: AutoModelForSequenceClassification with one label."""
    source = checkpoint_of("gemma3", tmp_path / "rm")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32)
    nn.init.normal_(model.score.weight)
    return tmp_path / "rm", source, model.eval()


def test_sequence_classification_of_transformers_and_trl(classifier, rows):
    folder, source, model = classifier
    model.save_pretrained(folder)
    assert "Gemma3ForSequenceClassification" in (folder / "config.json").read_text()
    check(folder, source, rows, lambda inputs: model(**inputs).logits)


def test_lora_of_sequence_classification(classifier, rows):
    """peft keeps the head in the adapter, under modules_to_save."""
    folder, source, model = classifier
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["score"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(folder)
    assert "base_model.model.score.weight" in load_file(folder / "adapter_model.safetensors")
    check(folder, source, rows, lambda inputs: model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_trained_by_trl(tmp_path, rows, lora: bool):
    """A step of TRL's RewardTrainer, which saves the folder itself."""
    source, folder = checkpoint_of("gemma3", tmp_path / "rm"), tmp_path / "rm"
    said = [{"prompt": f"What is {i}?", "chosen": "A red square.", "rejected": "no"} for i in range(4)]
    trainer = trl.RewardTrainer(
        model=source,
        args=trl.RewardConfig(
            output_dir=str(folder), max_steps=1, learning_rate=0.05, use_cpu=True, bf16=False, report_to="none"
        ),
        train_dataset=datasets.Dataset.from_list(said),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
        if lora
        else None,
    )
    trainer.train()
    trainer.save_model()
    assert (folder / "adapter_config.json").is_file() == lora
    model = trainer.model.eval()
    check(folder, source, rows, lambda inputs: model(**inputs).logits)


def by_ms_swift(source: str) -> nn.Module:
    """ms-swift 4.6 hangs `score` beside an lm_head that passes on the hidden states. Its own code gave these names and numbers."""
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    torch.manual_seed(0)
    model.score = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False)
    nn.init.normal_(model.score.weight)
    model.lm_head = nn.Identity()
    model.config.num_labels = 1
    return model


def test_ms_swift(tmp_path, rows):
    source, folder = checkpoint_of("qwen2_5_vl", tmp_path / "rm"), tmp_path / "rm"
    model = by_ms_swift(source)
    model.config.problem_type, model.config.hidden_size = "regression", model.config.get_text_config().hidden_size
    model.save_pretrained(folder)
    config = folder / "config.json"  # where it renames the architecture
    config.write_text(config.read_text().replace("VLForConditionalGeneration", "VLForSequenceClassification"))
    check(folder, source, rows, lambda inputs: model.score(model(**inputs).logits)[:, -1])


def test_lora_of_ms_swift(tmp_path, rows):
    source, folder = checkpoint_of("qwen2_5_vl", tmp_path / "rm"), tmp_path / "rm"
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["q_proj"], modules_to_save=["score"], init_lora_weights=False
    )
    model = peft.get_peft_model(by_ms_swift(source), config).eval()
    model.save_pretrained(folder)
    (folder / "additional_config.json").write_text('{"lora_dtype": null, "lorap_lr_ratio": null}')
    saved = load_file(folder / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in saved and len(saved) == 5
    score = model.base_model.model.score
    check(folder, source, rows, lambda inputs: score(model.base_model.model(**inputs).logits)[:, -1])


def with_bias(source: str) -> tuple[nn.Module, nn.Linear]:
    """A model and a head with a bias on its last hidden states, as VL-RLHF and LLaMA-Factory have them."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    head = nn.Linear(model.config.get_text_config().hidden_size, 1)
    nn.init.normal_(head.weight)
    nn.init.constant_(head.bias, 3.0)
    return model, head


def test_vl_rlhf(tmp_path, rows):
    source, folder = checkpoint_of("llava", tmp_path / "rm"), tmp_path / "rm"
    model, head = with_bias(source)
    model.save_pretrained(folder)
    torch.save(head.state_dict(), folder / "rm_head.bin")
    check(
        folder, source, rows, lambda inputs: head(model(**inputs, output_hidden_states=True).hidden_states[-1])[:, -1]
    )

    # Saved again, and taken over by a value function, the head keeps its bias.
    VLRewardModel.from_pretrained(str(folder)).save_pretrained(str(tmp_path / "again"))
    assert load_file(tmp_path / "again" / "reward_head.safetensors")["bias"].item() == 3.0
    policy = VLModelWithValueHead(core_mapper_for(source).model.from_pretrained(source, dtype=torch.float32))
    policy.add_value_function(str(folder))
    assert policy.head.bias.item() == 3.0 and torch.equal(policy.head.weight, head.weight)


def test_llama_factory(tmp_path, rows):
    source, folder = checkpoint_of("llava", tmp_path / "rm"), tmp_path / "rm"
    model, head = with_bias(source)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=r".*language_model.*q_proj", init_lora_weights=False
    )
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(folder)
    save_file(
        {f"v_head.summary.{name}": tensor for name, tensor in head.state_dict().items()},
        folder / "value_head.safetensors",
    )
    check(
        folder, source, rows, lambda inputs: head(model(**inputs, output_hidden_states=True).hidden_states[-1])[:, -1]
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"score.weight": (2, 32)}, "a head with 2 outputs: a reward model has one"),
        ({"score.0.weight": (32, 32), "score.2.weight": (1, 32)}, "a head of several layers"),
        ({"score.weight": (1, 8)}, "a head for hidden size 8, the model has 32"),
        ({}, r"has no reward_head\.safetensors"),
    ],
)
def test_heads_that_are_no_reward_heads_are_refused(llava, tmp_path, names: dict[str, tuple], message: str):
    shutil.copytree(llava, tmp_path / "rm")
    weights = load_file(tmp_path / "rm" / "model.safetensors")
    weights |= {name: torch.ones(shape) for name, shape in names.items()}
    save_file(weights, tmp_path / "rm" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message):
        VLRewardModel.from_pretrained(str(tmp_path / "rm"))


def test_a_pickled_head_runs_no_code(llava, tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "ran").touch, ())

    shutil.copytree(llava, tmp_path / "rm")
    torch.save({"weight": Bomb()}, tmp_path / "rm" / "rm_head.bin")
    with pytest.raises(InputError, match=r"rm_head\.bin .*not read"):
        VLRewardModel.from_pretrained(str(tmp_path / "rm"))
    assert not (tmp_path / "ran").exists()


def test_a_value_head_goes_before_what_the_weights_hold(tmp_path):
    save_file({"score.weight": torch.zeros(1, 4)}, tmp_path / "model.safetensors")
    assert other_head(str(tmp_path)).tensors["weight"].tolist() == [[0, 0, 0, 0]]
    save_file({"v_head.summary.weight": torch.ones(1, 4)}, tmp_path / "value_head.safetensors")
    assert other_head(str(tmp_path)).tensors["weight"].tolist() == [[1, 1, 1, 1]]
