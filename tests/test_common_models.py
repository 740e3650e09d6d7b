"""What transformers asks of every model of its own, asked of the two families that are ported here.

transformers tests its models with ModelTesterMixin, GenerationTesterMixin and VLMModelTest (tests/test_modeling_common.py,
tests/generation/test_utils.py, tests/vlm_tester.py); its wheel ships none of them. These tests follow their meaning, under
their names where there is one. The numbers of the two models are tested against the original code in test_legacy.py.

What does not apply:
- tied weights (tied_weights_keys, tie_model_weights, load_save_without_tied_weights): neither release ties its embeddings,
  and there is no head to tie: `_tied_weights_keys` is empty (tested).
- reverse_loading_mapping: there is none; the original layout is converted once, by a command (test_legacy.py).
- flash attention, CPU and disk offload, model parallelism, compiled kernels: transformers runs them on accelerators only.
- torch_export, compile with a full graph: a row's placeholders are counted against its images, which depends on data.
- problem_types, load_with_mismatched_shapes of a classifier, question answering: there are no such heads.
- feed_forward_chunking, head pruning, resize_position_embeddings: the libraries' modules underneath have none of them.
- generate with a quantised cache, DoLa, group and constrained beam search: they live in packages or on the hub now.
- videos, audio: neither family reads any.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from models import core_mapper_for
from models.image_text import ImageTextModel
from tests import zoo

FAMILIES = ["qwen_vl", "internlm_xcomposer2"]
CLOSE = dict(atol=1e-5, rtol=1e-5)  # two ways of computing one float32 number; magnitudes are about 1
NEW = 6


@pytest.fixture(scope="module", params=FAMILIES)
def it(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A tiny model in float32 and two rows with an image each, the first padded on the left."""
    path = zoo.checkpoint(request.param)
    core_mapper_for(path)  # registers the family
    processor = AutoProcessor.from_pretrained(path)
    mark = processor.image_token
    processor.tokenizer.padding_side = "left"
    inputs = processor(
        text=[f"{mark} one", f"{mark} what is in this image"],
        images=[[zoo.image(0)], [zoo.image(1)]],
        padding=True,
        return_tensors="pt",
    )
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert inputs["attention_mask"][0, 0] == 0
    text = processor.tokenizer(["a red square on the table"], return_tensors="pt", return_token_type_ids=False)
    return SimpleNamespace(
        family=request.param, path=path, model=load(path), processor=processor, inputs=inputs, text=dict(text)
    )


def load(path: str | Path, **kwargs) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(path, **{"dtype": torch.float32} | kwargs).eval()


def row(inputs: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    """Row i of a batch with one image a row, without its padding."""
    real = inputs["attention_mask"][i].bool()
    return {
        "input_ids": inputs["input_ids"][i : i + 1, real],
        "attention_mask": inputs["attention_mask"][i : i + 1, real],
        "pixel_values": inputs["pixel_values"][i : i + 1],
    }


def logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    """Of the real tokens, (tokens, V)."""
    with torch.no_grad():
        found = model(**inputs, **kwargs).logits
    return found[inputs["attention_mask"].bool()] if found.shape[:2] == inputs["attention_mask"].shape else found


def parts(model: PreTrainedModel) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    return model.config.text_config, model.config.vision_config


# ---------------------------------------------------------------------------------------------------------------------
# Configurations (ConfigTester)


def test_config_survives_json_and_folders(it: SimpleNamespace, tmp_path: Path):
    config = it.model.config
    kind = type(config)
    config.to_json_file(tmp_path / "config.json")
    config.save_pretrained(tmp_path / "a" / "b")
    for again in (
        kind(**json.loads(config.to_json_string())),
        kind.from_json_file(tmp_path / "config.json"),
        kind.from_pretrained(tmp_path / "a", subfolder="b"),
        AutoConfig.from_pretrained(tmp_path / "a" / "b"),
    ):
        assert type(again) is kind
        assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


def test_parts_of_a_config_load_alone(it: SimpleNamespace, tmp_path: Path):
    """create_and_test_config_from_and_save_pretrained_composite"""
    it.model.config.save_pretrained(tmp_path)
    for part in parts(it.model):
        alone = type(part).from_pretrained(tmp_path)
        assert alone.to_diff_dict() == part.to_diff_dict()


def test_config_without_and_with_arguments(it: SimpleNamespace):
    """Defaults exist, keyword arguments that every configuration has are kept, and labels follow their number."""
    kind = type(it.model.config)
    assert {type(part) for part in parts(SimpleNamespace(config=kind()))} == {type(part) for part in parts(it.model)}
    given = dict(return_dict=False, output_hidden_states=True, dtype="float16", name_or_path="x", architectures=["A"])
    config = kind(**given)
    assert {name: getattr(config, name) for name in given} == given | {"dtype": torch.float16}
    config.num_labels = 5
    assert len(config.id2label) == len(config.label2id) == 5


def test_configs_of_the_parts_are_those_of_the_whole(it: SimpleNamespace):
    """internal_model_config_and_subconfig_are_same"""
    config, core = it.model.config, it.model.model
    assert core.config is config
    assert core.language_model.config is config.text_config and core.vision_tower.config is config.vision_config


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def test_saved_weights_give_the_same_numbers(it: SimpleNamespace, tmp_path: Path):
    it.model.save_pretrained(tmp_path)
    again, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not it.model._tied_weights_keys
    assert set(load_file(tmp_path / "model.safetensors")) == set(it.model.state_dict())
    torch.testing.assert_close(logits(again.eval(), it.inputs), logits(it.model, it.inputs), **CLOSE)


def test_saved_in_another_precision(it: SimpleNamespace, tmp_path: Path):
    """load_save with dtype: parameters and persistent buffers have the type that was asked for."""
    load(it.path, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
    for dtype, expected in (("auto", torch.bfloat16), (torch.float16, torch.float16)):
        again = load(tmp_path, dtype=dtype)
        assert {tensor.dtype for tensor in again.state_dict().values()} == {expected}
    with torch.no_grad():
        assert load(tmp_path, dtype="auto")(**it.inputs).logits.isfinite().all()


def test_missing_weights_are_initialised_as_a_new_model(it: SimpleNamespace):
    """can_init_all_missing_weights, init_weights_can_init_buffers: no tensor keeps whatever memory held."""
    torch.manual_seed(0)
    new = type(it.model)(it.model.config).state_dict()
    torch.manual_seed(0)
    missing = type(it.model).from_pretrained(None, config=it.model.config, state_dict={}).state_dict()
    assert new.keys() == missing.keys()
    for name, tensor in new.items():
        other = missing[name]
        assert other.isfinite().all(), name
        if "vision_tower.encoder" in name and other.ndim == 2:
            # transformers skips CLIP's own deviations when the whole model is not of its package: 0.02 everywhere
            assert float(other.std()) == pytest.approx(0.02, rel=0.2), name
            continue
        assert float(other.std(correction=0)) == pytest.approx(float(tensor.std(correction=0)), rel=0.5), name
        assert float(other.mean()) == pytest.approx(float(tensor.mean()), abs=0.1), name


def test_initialization(it: SimpleNamespace):
    """Where the standard deviation is almost 0, every weight is 0 or 1: none is initialised by torch's own default."""
    config = type(it.model.config)(**it.model.config.to_dict())
    for part in (config, *parts(SimpleNamespace(config=config))):
        part.initializer_range = part.initializer_factor = 1e-10  # 0 stands for the default
    for name, weight in type(it.model)(config).named_parameters():
        if name.endswith(("position_embedding", "attn_pool.query")):
            continue  # a width of their own, as released
        assert float(weight.detach().mean().round(decimals=6)) in (0.0, 1.0), name


def test_a_model_is_born_on_any_device(it: SimpleNamespace):
    """can_be_initialized_on_meta, can_load_with_device_context_manager"""
    with torch.device("meta"):
        born = type(it.model)(it.model.config)
    assert {tensor.device.type for tensor in [*born.parameters(), *born.buffers()]} == {"meta"}
    with torch.device("cpu"):
        torch.testing.assert_close(logits(load(it.path), it.inputs), logits(it.model, it.inputs), **CLOSE)


def test_weights_of_other_shapes_are_refused_or_drawn_anew(it: SimpleNamespace):
    """can_load_ignoring_mismatched_shapes"""
    config = AutoConfig.from_pretrained(it.path)
    config.text_config.vocab_size += 3
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(it.path, config=config)
    config = AutoConfig.from_pretrained(it.path)
    config.text_config.vocab_size += 3
    model = load(it.path, config=config, ignore_mismatched_sizes=True)
    assert model.get_output_embeddings().weight.shape[0] == config.text_config.vocab_size
    with torch.no_grad():
        assert model(**it.inputs).logits.isfinite().all()


def test_no_split_modules_exist(it: SimpleNamespace):
    names = {type(module).__name__ for module in it.model.modules()}
    assert set(type(it.model)._no_split_modules) <= names


def test_every_tensor_is_a_parameter_or_a_buffer(it: SimpleNamespace):
    """all_tensors_are_parameter_or_buffer: what is neither does not move with `to`."""
    for name, module in it.model.named_modules():
        registered = {id(t) for t in [*module._parameters.values(), *module._buffers.values()] if t is not None}
        for attribute, value in vars(module).items():
            assert not isinstance(value, torch.Tensor) or id(value) in registered, f"{name}.{attribute}"


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings


def test_embeddings_are_read_and_replaced(it: SimpleNamespace):
    """model_get_set_embeddings"""
    model = load(it.path)
    for kind in ("input", "output"):
        old = getattr(model, f"get_{kind}_embeddings")()
        assert isinstance(old, torch.nn.Embedding if kind == "input" else torch.nn.Linear)
    new = torch.nn.Embedding(*model.get_input_embeddings().weight.shape)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new and model.model.get_input_embeddings() is new
    assert model.model.language_model.get_input_embeddings() is new
    head = torch.nn.Linear(2, 3)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head


@pytest.mark.parametrize("change", [10, 16, -5])
def test_resize_tokens_embeddings(it: SimpleNamespace, change: int):
    """resize_tokens_embeddings, resize_embeddings_untied: old rows stay, the configuration follows, and the model runs."""
    model = load(it.path)
    before, text = model.get_input_embeddings().weight.clone(), model.config.text_config
    size = text.vocab_size + change
    model.resize_token_embeddings(size)
    kept = min(size, len(before))
    assert text.vocab_size == model.config.get_text_config().vocab_size == size
    assert model.get_output_embeddings().weight.shape[0] == size == model.get_input_embeddings().num_embeddings
    assert torch.equal(model.get_input_embeddings().weight[:kept], before[:kept])
    inputs = it.inputs
    ordinary = inputs["input_ids"] != model.config.image_token_id
    if it.family == "qwen_vl" and change < 0:  # its last ids are special: the rows must not hold what is gone
        inputs = it.text
        ordinary = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    inputs = inputs | {"input_ids": inputs["input_ids"].where(~ordinary, inputs["input_ids"].clamp(max=kept - 1))}
    assert model(**inputs).logits.shape[-1] == size
    torch.testing.assert_close(
        logits(model, inputs)[..., :kept], logits(it.model, inputs)[..., :kept], **CLOSE
    )  # the rest of the model is what it was


def test_inputs_embeds_matches_input_ids(it: SimpleNamespace):
    embeds = it.model.get_input_embeddings()(it.text["input_ids"])
    with torch.no_grad():
        found = it.model(inputs_embeds=embeds, attention_mask=it.text["attention_mask"]).logits
    torch.testing.assert_close(found[0], logits(it.model, it.text), **CLOSE)


def test_inputs_embeds_with_an_image(it: SimpleNamespace):
    """Where the placeholder has an embedding, rows of embeddings take images too; the other family says that it cannot."""
    single = row(it.inputs, 1)
    if it.family == "internlm_xcomposer2":
        embeds = it.model.get_input_embeddings()(single.pop("input_ids").clamp(max=5))
        with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
            it.model(inputs_embeds=embeds, **single)
        return
    expected = logits(it.model, single)
    embeds = it.model.get_input_embeddings()(single.pop("input_ids"))
    torch.testing.assert_close(logits(it.model, single, inputs_embeds=embeds), expected, **CLOSE)


@pytest.mark.parametrize("given", ["neither", "both"])
def test_exactly_one_of_ids_and_embeddings(it: SimpleNamespace, given: str):
    ids = it.text["input_ids"]
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        it.model(
            **{} if given == "neither" else {"input_ids": ids, "inputs_embeds": it.model.get_input_embeddings()(ids)}
        )


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass


def test_main_input_and_signature(it: SimpleNamespace):
    import inspect

    assert next(iter(inspect.signature(it.model.forward).parameters)) == it.model.main_input_name == "input_ids"
    assert it.model.model.vision_tower.main_input_name == "pixel_values"
    assert isinstance(it.model.model, ImageTextModel)


def test_determinism(it: SimpleNamespace):
    assert torch.equal(logits(it.model, it.inputs), logits(it.model, it.inputs))


def test_batching_equivalence(it: SimpleNamespace):
    """Every number of a padded batch is that of its row alone."""
    with torch.no_grad():
        whole = it.model(**it.inputs, output_hidden_states=True)
        for i in range(2):
            single = row(it.inputs, i)
            alone = it.model(**single, output_hidden_states=True)
            real = it.inputs["attention_mask"][i].bool()
            for name in ("logits", "hidden_states"):
                of_batch, of_row = getattr(whole, name), getattr(alone, name)
                pairs = zip(of_batch, of_row, strict=True) if name == "hidden_states" else [(of_batch, of_row)]
                for n, (b, r) in enumerate(pairs):
                    torch.testing.assert_close(b[i, real], r[0], **CLOSE, msg=lambda m, x=(name, n): f"{x}: {m}")
            k = len(alone.image_hidden_states)
            torch.testing.assert_close(
                whole.image_hidden_states[i * k : (i + 1) * k], alone.image_hidden_states, **CLOSE
            )


def test_model_outputs_equivalence(it: SimpleNamespace):
    """A tuple holds what the output with names holds, in its order."""
    with torch.no_grad():
        for kwargs in ({}, {"output_hidden_states": True}, {"labels": it.inputs["input_ids"].clamp(max=5)}):
            named = it.model(**it.inputs, **kwargs)
            plain = it.model(**it.inputs, **kwargs, return_dict=False)
            assert isinstance(named, ModelOutput) and type(plain) is tuple
            flat = list(named.to_tuple())
            assert len(flat) == len(plain)
            for one, other in zip(flat, plain, strict=True):
                if isinstance(one, torch.Tensor):
                    assert torch.equal(one, other)
                elif isinstance(one, tuple):
                    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_hidden_states_and_attentions_have_their_shapes(it: SimpleNamespace):
    """attention_outputs, hidden_states_output: of the decoder, of every layer, and of the vision tower when asked."""
    model = load(it.path, attn_implementation="eager")
    text, vision = parts(model)
    B, L = it.inputs["input_ids"].shape
    with torch.no_grad():
        output = model(**it.inputs, output_hidden_states=True, output_attentions=True)
        features = model.get_image_features(
            it.inputs["pixel_values"], output_hidden_states=True, output_attentions=True, return_dict=True
        )
    assert [h.shape for h in output.hidden_states] == [(B, L, text.hidden_size)] * (text.num_hidden_layers + 1)
    assert [a.shape for a in output.attentions] == [(B, text.num_attention_heads, L, L)] * text.num_hidden_layers
    for i, real in enumerate(it.inputs["attention_mask"].bool()):
        weights = torch.stack([of_layer[i] for of_layer in output.attentions])[:, :, real]  # (layers, heads, tokens, L)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **CLOSE)
        sees = torch.ones(L, L).tril().bool() & real
        assert torch.equal(weights > 0, sees[real].expand_as(weights))
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits, **CLOSE)
    patches = (vision.image_size // vision.patch_size) ** 2 + (it.family == "internlm_xcomposer2")  # CLIP's class token
    assert [h.shape for h in features.hidden_states] == [(B, patches, vision.hidden_size)] * (
        vision.num_hidden_layers + 1
    )
    shape = (B, vision.num_attention_heads, patches, patches)
    assert [a.shape for a in features.attentions] == [shape] * vision.num_hidden_layers


def test_get_image_features_output(it: SimpleNamespace):
    """One tensor per image, and the numbers that the forward pass uses."""
    with torch.no_grad():
        features = it.model.get_image_features(it.inputs["pixel_values"], return_dict=True)
        output = it.model(**it.inputs)
        tokens = int((it.inputs["input_ids"] == it.model.config.image_token_id).sum()) // 2
        given = it.model(
            input_ids=it.inputs["input_ids"],
            attention_mask=it.inputs["attention_mask"],
            mm_encoder_outputs={"image": features},
        )
    width = it.model.config.text_config.hidden_size
    assert [f.shape for f in features.pooler_output] == [(tokens, width)] * 2
    assert torch.equal(torch.cat(features.pooler_output), output.image_hidden_states)
    assert torch.equal(given.logits, output.logits)
    as_tuple = it.model.get_image_features(it.inputs["pixel_values"], return_dict=False)
    assert type(as_tuple) is tuple and torch.equal(as_tuple[0], features.last_hidden_state)


def test_retain_grad_of_hidden_states_and_attentions(it: SimpleNamespace):
    model = load(it.path, attn_implementation="eager")
    output = model(**it.inputs, output_hidden_states=True, output_attentions=True)
    kept = [output.hidden_states[0], output.attentions[0], output.hidden_states[-1]]
    for tensor in kept:
        tensor.retain_grad()
    output.logits.flatten()[0].backward(retain_graph=True)
    assert all(tensor.grad is not None for tensor in kept)


@pytest.mark.parametrize("where", ["all", "text_config", "vision_config"])
def test_eager_matches_sdpa_inference(it: SimpleNamespace, where: str):
    """also sdpa_can_dispatch_composite_models, can_set_attention_dynamically: each part takes the one it is given."""
    chosen = "eager" if where == "all" else {where: "eager"}
    model = load(it.path, attn_implementation=chosen)
    found = {part.base_config_key: part._attn_implementation for part in parts(model)}
    assert found == {name: "eager" if where in ("all", name) else "sdpa" for name in found}
    torch.testing.assert_close(logits(model, it.inputs), logits(it.model, it.inputs), **CLOSE)
    model.set_attn_implementation("sdpa")
    assert {part._attn_implementation for part in parts(model)} == {"sdpa"}
    assert model.model.language_model.layers[0].self_attn.config._attn_implementation == "sdpa"


def test_custom_4d_attention_mask(it: SimpleNamespace):
    """Two rows that begin alike, as one row whose mask and positions keep their endings apart, give the same logits."""
    ids = it.text["input_ids"][0, :6]
    first, second = ids[[0, 1, 2, 3]], ids[[0, 1, 4, 5]]
    joined = torch.cat([first, second[2:]])[None]
    sees = torch.ones(6, 6).tril().bool()
    sees[4:, 2:4] = False
    mask = torch.zeros(1, 1, 6, 6).masked_fill(~sees, torch.finfo(torch.float32).min)
    positions = torch.tensor([[0, 1, 2, 3, 2, 3]])
    with torch.no_grad():
        alone = [it.model(input_ids=row[None]).logits[0] for row in (first, second)]
        shared = it.model(input_ids=joined, attention_mask=mask, position_ids=positions).logits[0]
    torch.testing.assert_close(shared, torch.cat([alone[0], alone[1][2:]]), **CLOSE)


def test_logits_to_keep(it: SimpleNamespace):
    with torch.no_grad():
        whole = it.model(**it.inputs).logits
        torch.testing.assert_close(it.model(**it.inputs, logits_to_keep=3).logits, whole[:, -3:], **CLOSE)
        places = torch.tensor([0, 5])
        torch.testing.assert_close(it.model(**it.inputs, logits_to_keep=places).logits, whole[:, places], **CLOSE)


def test_mismatching_num_image_tokens(it: SimpleNamespace):
    """An image too few or too many is an error; rows may hold several images or none."""
    pixels = it.inputs["pixel_values"]
    for wrong in (pixels[:1], torch.cat([pixels, pixels[:1]])):
        with pytest.raises(ValueError, match="image placeholders in the rows"):
            it.model(**it.inputs | {"pixel_values": wrong})
    two = torch.cat([row(it.inputs, i)["input_ids"] for i in (1, 0)], dim=1)
    with torch.no_grad():
        one_way = it.model(input_ids=two, pixel_values=pixels[[1, 0]]).logits
        other_way = it.model(input_ids=two, pixel_values=pixels).logits
        assert it.model(**it.text).logits.isfinite().all()
    assert not torch.allclose(one_way, other_way, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_training(it: SimpleNamespace, checkpointing: bool | None):
    """Every parameter gets a gradient; with checkpointing (reentrant or not) the same one."""

    def gradients(of: PreTrainedModel) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        labels = it.inputs["input_ids"].masked_fill(it.inputs["input_ids"] == of.config.image_token_id, -100)
        of.train()(**it.inputs, labels=labels).loss.backward()
        return {name: weight.grad for name, weight in of.named_parameters()}

    plain = gradients(load(it.path))
    unused = {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}
    without = {name for name, gradient in plain.items() if gradient is None or not gradient.any()}
    assert without == (unused if it.family == "internlm_xcomposer2" else set()) | {
        name for name in plain if name.endswith("k_proj.bias") and name in without
    }  # keys' biases cancel in the softmax; the release drops CLIP's last norm
    if checkpointing is not None:
        model = load(it.path)
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        for name, gradient in gradients(model).items():
            if gradient is not None:
                torch.testing.assert_close(gradient, plain[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_gradient_checkpointing_enable_disable(it: SimpleNamespace):
    model = load(it.path)
    can = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    assert {type(m).__name__ for m in can} >= {type(model.model.language_model.layers[0]).__name__}
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and all(m.gradient_checkpointing for m in can)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing and not any(m.gradient_checkpointing for m in can)


def test_enable_input_require_grads(it: SimpleNamespace):
    model = load(it.path)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(it.text["input_ids"]).requires_grad
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()(it.text["input_ids"]).requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Generation (GenerationTesterMixin)


def generate(it: SimpleNamespace, inputs: dict[str, torch.Tensor] | None = None, **kwargs):
    """The model's own greedy answer of exactly NEW tokens, unless kwargs say otherwise."""
    settings = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, top_k=None, top_p=None, temperature=None)
    return it.model.generate(**(it.inputs if inputs is None else inputs), **settings | kwargs)


def test_greedy_generate_is_the_argmax_of_every_step(it: SimpleNamespace):
    """greedy_generate: against a loop without a cache; dict_outputs with use_cache have the documented shapes."""
    ends = it.model.generation_config.eos_token_id
    ends = torch.tensor([ends] if isinstance(ends, int) else ends)
    ids, mask, by_hand = it.inputs["input_ids"], it.inputs["attention_mask"], []
    for _ in range(NEW):
        with torch.no_grad():
            last = it.model(
                input_ids=ids, attention_mask=mask, pixel_values=it.inputs["pixel_values"], use_cache=False
            ).logits[:, -1]
        last[:, ends] = -torch.inf  # min_new_tokens
        by_hand.append(last.argmax(-1, keepdim=True))
        ids, mask = torch.cat([ids, by_hand[-1]], 1), torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    output = generate(
        it, return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True
    )
    assert torch.equal(output.sequences, ids)
    text = it.model.config.text_config
    B, L = it.inputs["input_ids"].shape
    assert [s.shape for s in output.scores] == [s.shape for s in output.logits] == [(B, text.vocab_size)] * NEW
    for step, of_layers in enumerate(output.hidden_states):
        assert [h.shape for h in of_layers] == [(B, 1 if step else L, text.hidden_size)] * (text.num_hidden_layers + 1)
    assert output.past_key_values.get_seq_length() == L + NEW - 1
    layer = output.past_key_values.layers[0]
    head = text.hidden_size // text.num_attention_heads
    assert layer.keys.shape == layer.values.shape == (B, text.num_key_value_heads, L + NEW - 1, head)


def test_left_padding_compatibility(it: SimpleNamespace):
    whole = generate(it)[:, it.inputs["input_ids"].shape[1] :]
    for i in range(2):
        single = row(it.inputs, i)
        alone = generate(it, single)[:, single["input_ids"].shape[1] :]
        assert torch.equal(whole[i], alone[0])


def test_no_cache_and_static_cache_give_the_same_answers(it: SimpleNamespace):
    """generate with use_cache=False, generate_with_static_cache"""
    expected = generate(it)
    assert torch.equal(generate(it, use_cache=False), expected)
    assert torch.equal(generate(it, cache_implementation="static", disable_compile=True), expected)


def test_sampling_is_seeded_and_follows_its_settings(it: SimpleNamespace):
    """sample_generate"""

    def sample(seed: int, **kwargs) -> torch.Tensor:
        torch.manual_seed(seed)
        return generate(it, do_sample=True, temperature=3.0, **kwargs)

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))
    assert torch.equal(sample(0, top_k=1), generate(it))
    assert len(sample(0, num_return_sequences=3)) == 6


def test_beam_search_finds_likelier_answers(it: SimpleNamespace):
    """beam_search_generate, dict_outputs, use_cache; beam_sample_generate runs"""

    def score(ids: torch.Tensor) -> torch.Tensor:
        new = ids[:, it.inputs["input_ids"].shape[1] :]
        mask = torch.cat([it.inputs["attention_mask"], torch.ones_like(new)], 1)
        with torch.no_grad():
            logps = it.model(input_ids=ids, attention_mask=mask, pixel_values=it.inputs["pixel_values"]).logits
        return logps[:, -NEW - 1 : -1].log_softmax(-1).gather(-1, new[..., None])[..., 0].sum(-1)

    free = dict(min_new_tokens=None, eos_token_id=-1, max_new_tokens=NEW)  # no end: scores are sums of NEW log-probs
    beams = generate(it, num_beams=4, num_return_sequences=2, return_dict_in_generate=True, output_scores=True, **free)
    assert len(beams.sequences) == 4 and torch.equal(
        generate(it, num_beams=4, num_return_sequences=2, use_cache=False, **free), beams.sequences
    )
    found = torch.cat([score(beams.sequences[n::2]) for n in range(2)]).view(2, 2).T.flatten()
    torch.testing.assert_close(found, beams.sequences_scores * NEW, atol=1e-4, rtol=1e-4)
    assert (score(beams.sequences[::2]) >= score(generate(it, **free)) - 1e-4).all()
    torch.manual_seed(0)
    assert generate(it, num_beams=2, do_sample=True).shape == generate(it).shape


def test_speculative_decoding_matches_greedy_search(it: SimpleNamespace):
    """assisted_decoding_matches_greedy_search, prompt_lookup_decoding_matches_greedy_search: rows one at a time."""
    single = row(it.inputs, 1)
    expected = generate(it, single)
    assert torch.equal(generate(it, single, prompt_lookup_num_tokens=2), expected)
    other = SimpleNamespace(model=load(zoo.checkpoint(it.family, seed=1)))
    for assistant in (it.model, other.model):
        assistant.generation_config.num_assistant_tokens = 2
        assert torch.equal(generate(it, single, assistant_model=assistant), expected)


def test_generate_from_inputs_embeds(it: SimpleNamespace):
    """Text alone; where the placeholder has an embedding, with an image too."""
    rows = [it.text] + ([row(it.inputs, 1)] if it.family == "qwen_vl" else [])
    for inputs in rows:
        expected = generate(it, inputs)[:, inputs["input_ids"].shape[1] :]
        others = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
        embeds = it.model.get_input_embeddings()(inputs["input_ids"])
        assert torch.equal(generate(it, others | {"inputs_embeds": embeds}), expected)
        random_embeds = generate(
            it, others | {"inputs_embeds": embeds + torch.randn_like(embeds)} if len(others) == 1 else inputs
        )
        assert random_embeds.shape[0] == 1


def test_generate_continue_from_past_key_values(it: SimpleNamespace):
    """Three tokens, then three more from the cache that came with them, are six tokens at once."""
    whole = generate(it)
    half = generate(it, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    mask = torch.cat([it.inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    # `min_new_tokens` of the second call counts from its own prompt
    rest = generate(
        it,
        {"input_ids": half.sequences, "attention_mask": mask},
        past_key_values=half.past_key_values,
        max_new_tokens=NEW - 3,
        min_new_tokens=NEW - 3,
    )
    assert torch.equal(rest, whole)


def test_generate_without_input_ids(it: SimpleNamespace):
    """From the beginning of sequence alone, where the family has such a token."""
    start = it.processor.tokenizer.bos_token_id
    if start is None:
        with pytest.raises(ValueError, match="bos_token_id"):
            it.model.generate(max_new_tokens=2, do_sample=False)
    else:
        found = it.model.generate(bos_token_id=start, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert found.shape == (1, 3) and found[0, 0] == start


def test_generated_in_another_attention(it: SimpleNamespace):
    """eager_matches_sdpa_generate"""
    eager = SimpleNamespace(model=load(it.path, attn_implementation="eager"), inputs=it.inputs)
    assert torch.equal(generate(eager), generate(it))


def test_pixels_are_encoded_once(it: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """prepare_inputs_for_generation: images go in with the prompt, not with every token."""
    calls, encode = [], it.model.model.get_image_features

    def count(*args, **kwargs):
        calls.append(1)
        return encode(*args, **kwargs)

    monkeypatch.setattr(it.model.model, "get_image_features", count)
    generate(it)
    assert len(calls) == 1
