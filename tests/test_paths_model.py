"""What the model says of tokens, against transformers' own classes: temperature, soft caps, placeholders."""

import json
import shutil

import pytest
import torch

from base import logps, self_check
from base.loading import load_model
from base.logps import token_logits, token_logps, vocabulary_kl
from base.self_check import check_log_probs
from common.errors import InputError
from models import core_mapper_for
from tests import zoo


@pytest.fixture(scope="module")
def capped(tmp_path_factory) -> str:
    """A tiny Gemma 4 whose logits are capped at 1, as Gemma 2 caps its own at 30."""
    folder = tmp_path_factory.mktemp("capped") / "gemma4"
    shutil.copytree(zoo.checkpoint("gemma4"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["final_logit_softcapping"] = 1.0
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(params=["plain", "in chunks"])
def chunks(request, monkeypatch) -> None:
    if request.param == "in chunks":
        monkeypatch.setattr(logps, "MAX_LOGITS", 1)
        monkeypatch.setattr(logps, "VOCAB_CHUNK", 64)


IDS = torch.tensor([[1, 20, 30, 40, 50, 60, 70, 80]])


@pytest.mark.parametrize("temperature", [1.0, 1.3, 0.5])
@pytest.mark.parametrize("which", ["llava", "capped"])
def test_log_probs_are_those_of_the_native_logits(chunks, capped, which: str, temperature: float):
    """Softmax of transformers' logits by hand; the forward with `completion_index` is what every trainer calls."""
    model = load_model(capped if which == "capped" else zoo.checkpoint("llava"), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits[0, :-1].double() / temperature
        expected = logits.log_softmax(-1)
        out = model(
            input_ids=IDS,
            completion_index=torch.arange(IDS.shape[1] - 1),
            completion_ids=IDS[0, 1:],
            temperature=temperature,
            with_entropy=True,
        )
    assert logits.abs().max() > 0.8 / temperature  # the cap is felt
    of_tokens = expected.gather(-1, IDS[0, 1:, None])[:, 0]
    assert out.logps.tolist() == pytest.approx(of_tokens.tolist(), abs=1e-4)
    assert out.entropy.tolist() == pytest.approx((-expected.exp() * expected).sum(-1).tolist(), abs=1e-4)


def test_divergences_and_logits_are_of_the_capped_logits(capped):
    """CHiP's KL and TPO's logits are those that the model samples from."""
    model = load_model(capped, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        hidden = model.last_hidden_state(input_ids=IDS)[0]
        other = hidden.flip(0)
        native = model(input_ids=IDS).logits[0]
        torch.testing.assert_close(torch.tanh(head(hidden)), native, atol=1e-5, rtol=1e-5)
        own, flipped = native.log_softmax(-1), native.flip(0).log_softmax(-1)
        expected = (own.exp() * (own - flipped)).sum(-1)
        torch.testing.assert_close(vocabulary_kl(model, hidden, model, other), expected, atol=1e-5, rtol=1e-4)
        raw = native.gather(-1, IDS[0][:, None])[:, 0]
        torch.testing.assert_close(token_logits(model, hidden, IDS[0]), raw, atol=1e-5, rtol=1e-5)
        assert (head(hidden).gather(-1, IDS[0][:, None])[:, 0] - raw).abs().max() > 1e-2


@pytest.mark.parametrize("trained", ["states", "head", "states and head"])
def test_gradients_of_divergences(capped, monkeypatch, trained: str):
    """Against autograd through all logits at once, the cap by hand; each token with a weight of its own, of either sign."""
    monkeypatch.setattr(logps, "TOKEN_CHUNK", 2)
    model = load_model(capped, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    weight = head.weight.requires_grad_("head" in trained)
    head.bias = bias = torch.nn.Parameter(torch.linspace(-1, 1, len(weight)), requires_grad="head" in trained)
    with torch.no_grad():
        states = model.last_hidden_state(input_ids=IDS)[0]
        expected = (states.flip(0) @ weight.T + bias).tanh().log_softmax(-1)
    outer = torch.linspace(-1, 2, len(states))
    found = []
    for by_hand in (False, True):
        own = states.clone().requires_grad_("states" in trained)
        if by_hand:
            kl = (expected.exp() * (expected - (own @ weight.T + bias).tanh().log_softmax(-1))).sum(-1)
        else:
            kl = vocabulary_kl(model, states.flip(0), model, own)
        inputs = [t for t in (own, weight, bias) if t.requires_grad]
        found.append([kl.detach(), *torch.autograd.grad(kl, inputs, outer)])
    assert len(found[0]) == 1 + ("states" in trained) + 2 * ("head" in trained) and all(
        part.abs().max() > 1e-3 for part in found[1]
    )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_gradients_of_chunked_log_probs_at_a_temperature(llava, monkeypatch):
    model = load_model(llava, dtype=torch.float32).eval()
    hidden = model.last_hidden_state(input_ids=IDS)[0, :-1].detach()
    found = []
    for in_chunks in (False, True):
        if in_chunks:
            monkeypatch.setattr(logps, "MAX_LOGITS", 1)
            monkeypatch.setattr(logps, "VOCAB_CHUNK", 64)
        states = hidden.clone().requires_grad_()
        token_logps(model, states, IDS[0, 1:], temperature=1.3)[0].sum().backward()
        found.append(states.grad)
    by_hand = hidden.clone().requires_grad_()
    logits = model.lm_head(by_hand) / 1.3
    logits.log_softmax(-1).gather(-1, IDS[0, 1:, None]).sum().backward()
    for gradient in found:
        torch.testing.assert_close(gradient, by_hand.grad, atol=1e-5, rtol=1e-4)


# What transformers names the tokens that stand for features
PLACEHOLDERS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")


@pytest.mark.parametrize(
    "family", ["llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"]
)
def test_no_placeholder_of_an_image_or_a_video_is_generated(family: str):
    """The likeliest token by far at every step, and still not said: its features would be missing."""
    path = zoo.checkpoint(family)
    model = load_model(path, dtype=torch.float32).eval()
    named = {getattr(model.config, name, None) for name in PLACEHOLDERS} - {None}
    size = model.get_output_embeddings().out_features
    assert named
    for token in (t for t in named if t < size):
        bias = torch.zeros(size)
        bias[token] = 1e4
        handle = model.get_output_embeddings().register_forward_hook(lambda _, __, out, bias=bias: out + bias)
        said = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
        handle.remove()
        assert token not in said[0, 3:].tolist(), token


# -- the check before the first step


def scaled(method, by: float):
    """The method, with every floating-point tensor that it returns multiplied."""

    def change(found):
        if isinstance(found, dict):
            return type(found)({name: change(value) for name, value in found.items()})
        if isinstance(found, list | tuple):
            return type(found)(change(value) for value in found)
        return found * by if isinstance(found, torch.Tensor) and found.is_floating_point() else found

    return lambda *args, **kwargs: change(method(*args, **kwargs))


@pytest.mark.parametrize(
    "wrong", ["last_hidden_state", "encode_images", "packed_attention_mask or packed_position_ids"]
)
def test_the_check_sees_and_names_the_method_that_is_wrong(llava, monkeypatch, wrong: str):
    model, processor = load_model(llava, dtype=torch.float32), core_mapper_for(llava).processor(llava)
    if wrong.startswith("packed"):  # wrong by far: a tiny model hardly looks at positions

        def positions(self, input_ids, segment_ids, img_inputs):
            return 7 * torch.arange(input_ids.shape[1]).expand_as(input_ids)

        monkeypatch.setattr(type(model), "packed_position_ids", positions, raising=False)
    elif wrong == "encode_images":
        monkeypatch.setattr(model, wrong, lambda images: moved_features(type(model).encode_images(model, images)))
    else:
        monkeypatch.setattr(model, wrong, scaled(model.last_hidden_state, 1.5))
    model.train()
    with torch.no_grad(), pytest.raises(InputError, match=f"differ from the own forward .* override {wrong}"):
        check_log_probs(model, processor, share_prefix=True)
    assert model.training


def moved_features(images: dict) -> dict:
    (features,) = [value for name, value in images.items() if name == "mm_encoder_outputs"]
    features["image"].pooler_output = [feature * 3 for feature in features["image"].pooler_output]
    return images


def test_the_check_sees_differences_of_both_signs(llava, monkeypatch):
    model, processor = load_model(llava, dtype=torch.float32), core_mapper_for(llava).processor(llava)
    right = self_check._logps

    def alternating(*args):
        found = right(*args)
        return found + 1 - 2 * (torch.arange(len(found)) % 2)  # its mean is 0

    monkeypatch.setattr(self_check, "_logps", alternating)
    with torch.no_grad(), pytest.raises(InputError, match="differ from the own forward"):
        check_log_probs(model, processor, share_prefix=True)
