"""One prefill for all answers to a prompt, in one row where the cache allows, gives the tokens of K prefills, on every family."""

import pytest
import torch
from transformers import LogitsProcessorList

from base.features import join_image_inputs
from base.loading import load_model
from base.rollout_cache import rollout_cache
from base.sampling import SeededSampling, cut_after_end
from base.shared_prefill import answers_of_one_prefill
from common.tensors import to_device
from tests import zoo
from tests.test_ppo import LORA, ppo_trainer, prompt_rows

QUICK = ("gemma3", "llava", "mllama", "qwen2_5_vl", "qwen3_5", "qwen_vl", "instructblip")
PACKED = {"llava", "qwen2_5_vl", "qwen_vl", "instructblip"}


def families() -> list[object]:
    return [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in sorted(zoo.BUILDERS)]


def with_k_prefills(trainer, core, prompts, images, seed: int):
    """The same answers from K copies of every prompt, prefilled one by one."""
    sampler, args = trainer.sampler, trainer.args
    K = args.rollouts_per_prompt
    copies = [p for p in prompts for _ in range(K)]
    per_token = [sampler.collator.per_token(p.img_inputs) for p in copies]
    inputs = sampler.collator.pad_for_generation(
        [tokens for p in copies for tokens in p.tokens],
        {k: [v for t in per_token for v in t[k]] for k in per_token[0]},
    )
    inputs = to_device(inputs, args.device) | join_image_inputs([i for i in images for _ in range(K)])
    uniforms = torch.cat(
        [torch.stack([sampler._uniforms(place, seed)[k] for place in p.places]) for p in prompts for k in range(K)]
    )
    sequences = core.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=args.response_length,
        eos_token_id=sampler.end_ids,
        pad_token_id=sampler.collator.processor.tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([SeededSampling(uniforms, args.temperature, args.top_p)]),
        past_key_values=rollout_cache(core, inputs["input_ids"].shape[1], args.response_length),
        disable_compile=True,
    )
    if sequences.shape[1] > args.response_length:
        sequences = sequences[:, inputs["input_ids"].shape[1] :]
    rows = iter(cut_after_end(row, sampler.end_ids) for row in sequences.tolist())
    rounds = [[[next(rows) for _ in p.tokens] for _ in range(K)] for p in prompts]
    return [[[of_p[k][b] for k in range(K)] for b in range(len(of_p[0]))] for of_p in rounds]


@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_one_prefill_samples_what_k_prefills_sample(family: str, image_dir, tmp_path, rewards):
    """Two micro batches of two prompts each in one call: padded on the left, their own images, 20 tokens."""
    rows = prompt_rows(image_dir, 4)
    flags = f"{LORA} --reward_fn {rewards} --rollouts_per_prompt 3 --per_device_train_batch_size 6 --response_length 20 --temperature 1.3"
    trainer = ppo_trainer(zoo.checkpoint(family), rows, tmp_path, flags)
    torch.manual_seed(3)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    trainer.model.eval()
    prompts = [trainer._prompts(trainer.data_collator(rows[i : i + 2]), [i, i + 1]) for i in (0, 2)]
    lengths = []
    with trainer._generating_model() as core:
        images = [trainer._images_to_read(core, p) for p in prompts]
        core.get_decoder().register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append((kwargs.get("input_ids"), kwargs.get("inputs_embeds"))),
            with_kwargs=True,
        )
        found = trainer.sampler.sample(core, prompts, images, seed=7)
        prefill, step = (next(x for x in found if x is not None) for found in lengths[:2])
        assert len(prefill) == 4  # rows of the prefill: prompts, not answers
        assert step.shape[:2] == ((4, 3) if core.decodes_packed else (12, 1))
        assert found == with_k_prefills(trainer, core, prompts, images, seed=7)
        even = [trainer._prompts(trainer.data_collator([rows[0], rows[3]]), [5, 6])]  # of one length: without padding
        images = [trainer._images_to_read(core, p) for p in even]
        assert trainer.sampler.sample(core, even, images, 7) == with_k_prefills(trainer, core, even, images, 7)
        assert core.decodes_packed == (family in PACKED) or family not in QUICK
    answers = [tuple(ids) for of_p in found for of_prompt in of_p for ids in of_prompt]
    assert len(set(answers)) > 8 and max(map(len, answers)) > 10


@torch.no_grad()
def test_nothing_but_padding_follows_the_end_of_an_answer(llava):
    """Evaluation decodes the whole row: what came behind the end would be part of the answer."""
    core = load_model(llava, dtype=torch.float32).eval()
    vocabulary = core.config.text_config.vocab_size
    ends = {*range(3, vocabulary, 3)}
    torch.manual_seed(0)
    out = core.generate(
        input_ids=torch.tensor([[1, 7, 8], [1, 9, 10]]), custom_generate=answers_of_one_prefill, num_answers=4, do_sample=True,
        temperature=3.0, top_k=0, max_new_tokens=8, eos_token_id=sorted(ends), pad_token_id=0,
    )[:, 3:]  # fmt: skip
    behind = 0
    for row in out.tolist():
        end = next((n for n, token in enumerate(row) if token in ends), len(row))
        assert not any(row[end + 1 :])
        behind += len(row[end + 1 :])
    assert len(out) == 8 and behind > 8
