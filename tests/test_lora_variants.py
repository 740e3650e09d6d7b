"""DoRA, rsLoRA and the starts of --init_lora_weights: peft's numbers and files, whatever trains around them."""

import copy
import json

import pytest
import torch
import transformers
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from torch import nn
from transformers import set_seed

import args
import merge_lora
import train_dpo
import train_ppo
import train_rm
import train_sft
from args import LoraArguments
from base.adapters import adapter_active
from base.fast_lora import use_fast_lora
from base.loading import load_model, load_weights
from base.lora_start import LoraOnChangedBase, keep_start, start_as_rounding_error
from base.reward import VLRewardModel
from common.errors import InputError
from data import DataSplits
from models.assemble import add_lora
from tests import zoo
from tests.processes import history
from tests.test_dpo import dpo_trainer

LORA = "--use_lora True --lora_r 4 --lora_alpha 6 --lora_dropout 0"
VARIANTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
}
EVA = {"eva": {"init_lora_weights": "eva"}}  # reads rows first
QUICK = ("pissa rslora",)
each_variant = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in VARIANTS | EVA]
)


def flags_of(name: str) -> str:
    return f"{LORA} {' '.join(f'--{flag} {value}' for flag, value in (VARIANTS | EVA)[name].items())}"


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Logits, the gradients of all that trains, and the weights after a step of SGD."""
    model.train()
    ids = torch.arange(70, 94).repeat(2, 1)
    logits = model(input_ids=ids).logits
    logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {"logits": logits.detach()} | {f"gradient of {name}": p.grad.clone() for name, p in trained.items()}
    torch.optim.SGD(trained.values(), 0.5).step()
    return found | {f"new {name}": p.detach().clone() for name, p in trained.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_numbers_and_files_are_those_of_peft(llava, tmp_path, name: str):
    """Plain transformers and peft with the same seed; peft itself subtracts the start of PiSSA and OLoRA when it saves."""
    set_seed(3)
    ours = add_lora(
        load_model(llava, dtype=torch.float32),
        LoraArguments(use_lora=True, lora_r=4, lora_alpha=6, lora_dropout=0.0, **VARIANTS[name]),
    )
    use_fast_lora(ours)
    config = copy.copy(ours.peft_config["default"])
    init = VARIANTS[name].get("init_lora_weights", True)
    plain = transformers.LlavaForConditionalGeneration.from_pretrained(llava)
    set_seed(3)
    theirs = get_peft_model(
        plain,
        LoraConfig(r=4, lora_alpha=6, target_modules=config.target_modules, task_type="CAUSAL_LM", **VARIANTS[name]),
    )
    changes_base = str(init).startswith(("pissa", "olora"))
    assert isinstance(ours, LoraOnChangedBase) == changes_base
    if changes_base:
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = init
    mine, peft_numbers = numbers(ours), numbers(theirs)
    assert mine.keys() == peft_numbers.keys() and any("lora_B" in key for key in mine)
    for key, value in peft_numbers.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")

    ours.save_pretrained(tmp_path / "ours")
    start = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")} if changes_base else {}
    theirs.save_pretrained(tmp_path / "theirs", **start)
    files = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    for key, value in files[1].items():
        torch.testing.assert_close(files[0][key], value, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    settings = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs")]
    names = ("r", "lora_alpha", "use_dora", "use_rslora", "init_lora_weights", "target_modules", "inference_mode")
    assert {n: settings[0][n] for n in names} == {n: settings[1][n] for n in names}

    # On the untouched base the file is the trained model.
    loaded = PeftModel.from_pretrained(
        transformers.LlavaForConditionalGeneration.from_pretrained(llava), tmp_path / "ours"
    )
    ids = torch.arange(70, 94).repeat(2, 1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-3, atol=1e-5)


@each_variant
def test_a_dpo_run_its_reference_resumption_and_merge(command, llava, tmp_path, name: str):
    """The first loss is ln 2, the reference is the base as it is on disk, live or cached; resumed or not, the run is the same."""
    flags = f"{flags_of(name)} --max_steps 3 --save_strategy steps --save_steps 2 --gradient_checkpointing True"
    run, cached, again = tmp_path / "run", tmp_path / "cached", tmp_path / "again"
    train_dpo.main(command("dpo", flags, out=run))
    whole = history(run)
    assert whole[0]["loss"] == pytest.approx(0.6931472, abs=2e-6)
    assert whole[-1]["loss"] != pytest.approx(whole[0]["loss"], abs=1e-4)
    trained = load_file(run / "adapter_model.safetensors")

    precompute = f"--precompute_ref_log_probs True --ref_log_probs_dir {tmp_path / 'logps'}"
    train_dpo.main(command("dpo", f"{flags} {precompute}", out=cached))
    assert [e["loss"] for e in history(cached) if "loss" in e] == pytest.approx(
        [e["loss"] for e in whole if "loss" in e], abs=1e-5
    )

    again.mkdir()
    (run / "checkpoint-2").rename(again / "checkpoint-2")
    (again / "run.json").write_text((run / "run.json").read_text())
    train_dpo.main(command("dpo", f"{flags} --resume_from_checkpoint True", out=again))
    resumed = load_file(again / "adapter_model.safetensors")
    assert resumed.keys() == trained.keys()
    assert all(torch.equal(resumed[key], weight) for key, weight in trained.items())

    merge_lora.main([llava, str(run), str(tmp_path / "merged")])
    merged = load_model(str(tmp_path / "merged"), dtype=torch.float32)
    policy = load_model(str(run), dtype=torch.float32)
    ids = torch.arange(70, 94).repeat(2, 1)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, policy(input_ids=ids).logits, rtol=1e-3, atol=1e-5)
        moved = merged(input_ids=ids).logits - load_model(llava, dtype=torch.float32)(input_ids=ids).logits
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_the_reference_is_the_base_as_it_was(llava, preference_data, tmp_path, name: str):
    trainer = dpo_trainer(llava, preference_data, tmp_path, flags_of(name))
    base = load_model(llava, dtype=torch.float32)
    ids = torch.arange(70, 94).repeat(2, 1)
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        with adapter_active(trainer.model, None):
            changed = trainer.model(input_ids=ids).logits
        with trainer.reference_context() as reference:
            found = reference(input_ids=ids).logits
    assert (changed - expected).abs().max() > 1e-2, "without any adapter the base lacks what the adapter started with"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_start_found_by_another_processor(llava, tmp_path):
    """Singular vectors are known up to their sign: with those of the file the base is changed, too."""
    arguments = LoraArguments(use_lora=True, lora_r=4, lora_alpha=6, init_lora_weights="pissa")
    models = [add_lora(load_model(llava, dtype=torch.float32), arguments) for _ in range(2)]
    with torch.no_grad():
        for name, p in models[0].named_parameters():  # a start that SVD might have found, with another base
            if ".lora_A." in name:
                p.mul_(1.5)
        for layer in (m for m in models[0].modules() if hasattr(m, "lora_A") and "ref" in m.lora_A):
            product = layer.lora_B["ref"].weight @ layer.lora_A["ref"].weight  # A is 1.5 times what it was
            layer.get_base_layer().weight -= layer.scaling["ref"] * product / 3
    models[0].save_pretrained(tmp_path)
    load_weights(models[1], str(tmp_path))
    for (name, here), there in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_an_adapter_that_holds_a_part_of_its_base_is_not_trained_on(llava, tmp_path):
    """Saved by peft without the start: peft would change the base under the reference when it loads it."""
    model = get_peft_model(
        transformers.LlavaForConditionalGeneration.from_pretrained(llava),
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="path_initial_model_for_weight_conversion"):
        load_model(str(tmp_path), dtype=torch.float32, is_trainable=True)


# ---------------------------------------------------------------------------------------------------------------------
# EVA, whose start is read from the data
# ---------------------------------------------------------------------------------------------------------------------


def trainer_of(script, command, name: str, flags: str, model: str):
    """The trainer that a script builds, before its first step."""
    config = {train_sft: args.SFTConfig, train_dpo: args.DPOConfig, train_rm: args.RMConfig}[script]
    kinds = (args.ModelArguments, args.DataArguments, args.LoraArguments, config)
    return script.build(*args.parse(*kinds, argv=command(name, f"{LORA} --init_lora_weights eva {flags}", model)))[0]


def starts(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_A." in name}


def test_eva_is_that_of_peft(command, llava):
    """peft's own call, on a plain model and the same padded batches with their labels."""
    trainer = trainer_of(train_sft, command, "sft", "", llava)
    plain = transformers.LlavaForConditionalGeneration.from_pretrained(llava)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=trainer.model.peft_config["default"].target_modules,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(plain, config)
    order = torch.utils.data.DataLoader(
        range(len(trainer.train_dataset)), 4, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    next(iter(order))  # peft's first look, at which layers read the same
    batches = []
    for rows in order:
        batch = trainer.data_collator([trainer.train_dataset[i] for i in rows.tolist()])
        batches.append({name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
        batches[-1] |= batch["img_input_dict"]
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    drawn, state = starts(trainer.model), torch.get_rng_state()
    trainer._start_from_data(trainer.model)
    assert torch.equal(state, torch.get_rng_state()), "a random number of the run's own was drawn"
    found, expected = starts(trainer.model), starts(theirs)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        assert not torch.allclose(drawn[name], weight, atol=1e-2)
    assert not any(p.any() for name, p in trainer.model.named_parameters() if ".lora_B." in name)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mllama", "qwen_vl", "instructblip"])
@pytest.mark.parametrize(("script", "name"), [(train_sft, "sft"), (train_dpo, "dpo"), (train_rm, "rm")])
def test_eva_of_other_rows_and_families(command, script, name: str, family: str):
    """Packed rows, cross-attention to pictures, layers of the tower: rows of A are orthonormal and not those drawn."""
    flags = "--lora_vision True" if family in ("llava", "qwen2_5_vl") else ""
    trainer = trainer_of(script, command, name, flags, zoo.checkpoint(family))
    drawn = starts(trainer.model)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0
    policy = next(m for m in trainer.model.modules() if isinstance(m, PeftModel))
    assert policy.peft_config["default"].init_lora_weights is True
    again = trainer_of(script, command, name, flags, zoo.checkpoint(family))
    again._start_from_data(next(m for m in again.model.modules() if isinstance(m, PeftModel)))
    found = starts(again.model)
    for weight_name, weight in found.items():
        assert not torch.allclose(drawn[weight_name], weight, atol=1e-2), weight_name
        torch.testing.assert_close(weight @ weight.T, torch.eye(4), rtol=1e-3, atol=1e-3, msg=weight_name)


def test_eva_says_what_it_lacks(command, llava):
    """Five tokens of an answer have no 32 principal components."""
    trainer = trainer_of(train_sft, command, "sft", "--per_device_train_batch_size 1 --lora_r 32", llava)
    with pytest.raises(InputError, match=r"eva finds no start: .* more tokens of answers than --lora_r 32"):
        trainer.train()


@pytest.mark.slow
def test_an_adapter_that_peft_began_with_eva_goes_on(command, llava, tmp_path):
    model = get_peft_model(
        transformers.LlavaForConditionalGeneration.from_pretrained(llava),
        LoraConfig(
            r=4, target_modules=["q_proj"], init_lora_weights="eva", eva_config=EvaConfig(), task_type="CAUSAL_LM"
        ),
    )
    model.save_pretrained(tmp_path / "theirs")
    train_sft.main(command("sft", "--use_lora True --learning_rate 0", str(tmp_path / "theirs")))
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "theirs", tmp_path / "sft")
    )
    assert before.keys() == after.keys() and all(torch.equal(after[name], weight) for name, weight in before.items())


# ---------------------------------------------------------------------------------------------------------------------
# The other algorithms, and a quantised base
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pissa", pytest.param("dora rslora", marks=pytest.mark.slow)])
def test_a_reward_model_loads_as_it_was_trained(llava, preference_data, tmp_path, name: str):
    """Its adapter, on the untouched base, gives the rewards of the model in memory; the frozen start is not saved beside it."""
    parsed = args.parse(
        *(args.ModelArguments, args.DataArguments, args.LoraArguments, args.RMConfig),
        argv=f"--model_name_or_path {llava} --dataset_name x --output_dir {tmp_path} --max_steps 2 --learning_rate 1e-2 "
        f"--save_strategy no --disable_tqdm True {flags_of(name)}".split(),
    )
    trainer, _ = train_rm.build(*parsed, data=DataSplits(preference_data, None, {}))
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "ref").exists()
    loaded, trained = VLRewardModel.from_pretrained(str(tmp_path)), trainer.model
    assert loaded.backbone.peft_config["default"].r == (8 if name == "pissa" else 4)
    ids, last = torch.arange(70, 94).repeat(2, 1), torch.tensor([23, 47])
    with torch.no_grad():
        expected, found = (
            model.apply_head(model.head, model.backbone.eval()(input_ids=ids, completion_index=last).hidden)
            for model in (trained, loaded)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_start_is_not_saved_beside_a_reward_model(llava, tmp_path):
    model = add_lora(load_model(llava, dtype=torch.float32), LoraArguments(use_lora=True, lora_r=4))
    keep_start(model)
    VLRewardModel(model).save_pretrained(str(tmp_path))
    assert not (tmp_path / "ref").exists() and (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora rslora", "orthogonal"])
def test_ppo_with_a_value_adapter_of_the_same_kind(command, rewards, tmp_path, name: str):
    flags = f"{flags_of(name)} --reward_fn {rewards} --response_length 4 --lora_dropout 0 --max_steps 2"
    train_ppo.main(command("ppo", flags))
    first, *_ = history(tmp_path / "ppo")
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5), "policy and reference are one at first"
    for folder in (tmp_path / "ppo", tmp_path / "ppo" / "value_function"):
        weights = load_file(folder / "adapter_model.safetensors")
        assert any("magnitude" in key for key in weights) == ("dora" in name)
        assert any(weight.any() for key, weight in weights.items() if ".lora_B." in key)


QUANTISED = {"dora": VARIANTS["dora"], "rslora": VARIANTS["rslora"], "loftq": {"init_lora_weights": "loftq"}}


@pytest.mark.parametrize(
    "name", ["loftq", pytest.param("dora", marks=pytest.mark.slow), pytest.param("rslora", marks=pytest.mark.slow)]
)
def test_on_four_bits_the_reference_is_the_start_and_the_merged_model_is_the_trained_one(
    command, llava, tmp_path, name: str
):
    flags = f"{LORA} --q_lora True {' '.join(f'--{flag} {value}' for flag, value in QUANTISED[name].items())}"
    train_dpo.main(command("dpo", flags))
    steps = history(tmp_path / "dpo")
    assert steps[0]["loss"] == pytest.approx(0.6931472, abs=2e-6) != steps[-1]["loss"]
    merge_lora.main([llava, str(tmp_path / "dpo"), str(tmp_path / "merged")])
    merged = load_model(str(tmp_path / "merged"), dtype=torch.float32)
    trained = load_model(str(tmp_path / "dpo"), dtype=torch.float32, bits=4)
    ids = torch.arange(70, 94).repeat(2, 1)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, trained(input_ids=ids).logits, rtol=1e-2, atol=1e-3)


def test_loftq_makes_up_for_the_largest_part_of_the_rounding(llava):
    """What is left of W - Q(W) - s B A are its smaller singular values (Eckart-Young), at any scale."""
    arguments = LoraArguments(use_lora=True, lora_r=4, lora_alpha=6, init_lora_weights="loftq")
    model, exact = (
        add_lora(load_model(llava, dtype=torch.float32, bits=4), arguments),
        load_model(llava, dtype=torch.float32),
    )
    start_as_rounding_error(model, exact)
    layers = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert layers
    for name, layer in layers.items():
        lost = exact.get_submodule(name).weight - dequantize_module_weight(layer.get_base_layer())
        update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        left = torch.linalg.svdvals(lost)[4:].square().sum().sqrt()
        assert left < lost.norm()
        torch.testing.assert_close((lost - update).norm(), left, rtol=1e-4, atol=1e-6, msg=name)
