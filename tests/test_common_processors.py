"""What transformers asks of every processor of its own, asked of the two families that are ported here.

After the meaning of ProcessorTesterMixin and ImageProcessingTestMixin (tests/test_processing_common.py,
tests/test_image_processing_common.py), which transformers' wheel does not ship. Ids, pixels and formats are tested against
the original code in test_legacy.py.

What does not apply:
- videos and audio: neither processor reads any.
- `_get_num_multimodal_tokens`: inference servers ask for it; images here are always `num_image_tokens` tokens.
- a fast image processor that equals a slow one, image processors compiled or on a GPU: there is one, and it uses PIL, whose
  filter is that of the release.
- assistant masks of a chat template: the templates have no `generation` marks; this project finds answers itself
  (base/template.py).
- an own model_max_length of padding in `_defaults`: the processors set no defaults.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from models import core_mapper_for
from tests import zoo

FAMILIES = ["qwen_vl", "internlm_xcomposer2"]
TALK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


@pytest.fixture(scope="module", params=FAMILIES)
def it(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A processor and its folder. Read only."""
    path = zoo.checkpoint(request.param)
    core_mapper_for(path)  # registers the family
    return SimpleNamespace(family=request.param, path=path, processor=AutoProcessor.from_pretrained(path))


def a_call(processor, **kwargs) -> dict:
    return processor(text=[f"{processor.image_token} what is this"], images=[[zoo.image(0)]], **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_saved_and_loaded(it: SimpleNamespace, tmp_path: Path):
    """save_load_pretrained_default: as a whole, and each part alone."""
    it.processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(it.processor)
    one, other = it.processor.to_dict(), again.to_dict()
    assert one == other and one["num_image_tokens"] == it.processor.num_image_tokens
    assert again.chat_template == it.processor.chat_template
    for part, kind in (("tokenizer", AutoTokenizer), ("image_processor", AutoImageProcessor)):
        alone, whole = kind.from_pretrained(tmp_path), getattr(it.processor, part)
        assert type(alone) is type(whole)
        if part == "tokenizer":
            assert alone.get_vocab() == whole.get_vocab()
            assert alone.special_tokens_map == whole.special_tokens_map
        else:
            assert alone.to_dict() == whole.to_dict() and json.loads(alone.to_json_string())["size"] == zoo.SQUARE
    for name, value in a_call(it.processor, return_tensors="pt").items():
        assert torch.equal(a_call(again, return_tensors="pt")[name], value), name


def test_arguments_at_loading_win(it: SimpleNamespace):
    """save_load_pretrained_additional_features"""
    size = {"height": 14, "width": 14}
    other = AutoProcessor.from_pretrained(it.path, num_image_tokens=7, size=size, pad_token="no", bos_token="[BOS]")
    assert other.num_image_tokens == 7 and other.tokenizer.pad_token == "no" and other.tokenizer.bos_token == "[BOS]"
    assert dict(other.image_processor.size) == size
    assert a_call(other, return_tensors="pt")["pixel_values"].shape == (1, 3, 14, 14)
    count = (a_call(other)["input_ids"][0].count(other.image_token_id), other.image_token_id)
    assert count == (7, it.processor.image_token_id)


def test_a_template_of_ones_own_is_saved(it: SimpleNamespace, tmp_path: Path):
    """chat_template_save_loading: in a file of its own, which the next one reads."""
    mine = AutoProcessor.from_pretrained(it.path)
    mine.chat_template = "{{ messages[0]['role'] }}!"
    mine.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == mine.chat_template
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.chat_template == mine.chat_template
    assert again.apply_chat_template(TALK) == "user!"
    given = AutoProcessor.from_pretrained(it.path, chat_template="{{ 'given' }}")
    assert given.apply_chat_template(TALK) == "given"


def test_a_processor_needs_its_parts_in_order(it: SimpleNamespace):
    kind, image_processor, tokenizer = type(it.processor), it.processor.image_processor, it.processor.tokenizer
    assert kind.get_attributes() == ["image_processor", "tokenizer"]
    with pytest.raises(TypeError, match="image_processor"):
        kind(tokenizer, tokenizer)
    assert kind(image_processor, tokenizer).chat_template == it.processor.chat_template


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def test_names_of_what_a_model_reads(it: SimpleNamespace):
    """model_input_names"""
    found = set(a_call(it.processor))
    assert found <= set(it.processor.model_input_names) and {"input_ids", "attention_mask", "pixel_values"} <= found


def test_text_alone_is_the_tokenizers(it: SimpleNamespace):
    """tokenizer, processor_text_has_no_visual"""
    text = ["one two", "three"]
    found = it.processor(text=text, padding=True)
    assert dict(found) == dict(it.processor.tokenizer(text, padding=True))
    assert it.processor(text=text[0])["input_ids"] == [it.processor.tokenizer(text[0])["input_ids"]]


def test_images_alone_are_the_image_processors(it: SimpleNamespace):
    images = [zoo.image(0), zoo.image(1, 17, 90)]
    found = it.processor(images=images, return_tensors="pt")
    assert set(found) == {"pixel_values"}
    assert torch.equal(found["pixel_values"], it.processor.image_processor(images, return_tensors="pt")["pixel_values"])


def test_nothing_and_wrong_numbers_are_refused(it: SimpleNamespace):
    mark = it.processor.image_token
    with pytest.raises(ValueError, match="at least one input"):
        it.processor()
    with pytest.raises(ValueError, match="no images were passed"):
        it.processor(text=f"{mark} what")
    with pytest.raises(ValueError, match="should be the same as the number of images"):
        it.processor(text=[mark + mark], images=[zoo.image(0)])


def test_placeholders_are_as_many_as_features(it: SimpleNamespace):
    """Several images in a row and rows of different numbers, in their order; their places are marked by type."""
    mark, n = it.processor.image_token, it.processor.num_image_tokens
    images = [zoo.image(i) for i in range(3)]
    found = it.processor(
        text=[f"{mark} a {mark} b", "c", f"d {mark}"],
        images=[images[:2], [], images[2:]],
        return_mm_token_type_ids=True,
    )
    at = [[int(i == it.processor.image_token_id) for i in ids] for ids in found["input_ids"]]
    assert [sum(row) for row in at] == [2 * n, 0, n] and found["mm_token_type_ids"] == at
    for pixels, image in zip(found["pixel_values"], images, strict=True):
        np.testing.assert_array_equal(pixels, it.processor.image_processor(image)["pixel_values"][0])
    ids = it.processor.tokenizer(f"d {mark * n}")["input_ids"]
    assert found["input_ids"][2] == ids


def test_defaults_of_the_parts_and_arguments_of_the_call(it: SimpleNamespace):
    """kwargs: a tokenizer's or an image processor's own setting stands until a call gives another; nested or flat."""
    size = {"height": 14, "width": 21}
    mine = AutoProcessor.from_pretrained(it.path, size=size, rescale_factor=-1.0)
    mine.tokenizer.padding_side = "right"
    found = a_call(mine, return_tensors="pt")
    assert found["pixel_values"].shape[2:] == (14, 21) and found["pixel_values"].mean() < -100
    long = len(found["input_ids"][0]) + 5
    flat = a_call(mine, return_tensors="pt", padding="max_length", max_length=long, size=zoo.SQUARE, rescale_factor=1.0)
    nested = a_call(
        mine,
        text_kwargs={"padding": "max_length", "max_length": long},
        images_kwargs={"size": zoo.SQUARE, "rescale_factor": 1.0},
        common_kwargs={"return_tensors": "pt"},
    )
    for found in (flat, nested):
        assert found["input_ids"].shape == (1, long) and found["attention_mask"][0, -5:].tolist() == [0] * 5
        assert found["pixel_values"].shape[2:] == (28, 28) and found["pixel_values"].mean() > 100
    again = a_call(mine, return_tensors="pt")  # a call leaves nothing behind
    assert again["input_ids"].shape[1] == long - 5 and again["pixel_values"].shape[2:] == (14, 21)
    with pytest.raises(ValueError, match="padding"):
        a_call(mine, padding=True, text_kwargs={"padding": "max_length"})


def test_a_cut_through_an_image_is_refused(it: SimpleNamespace):
    """special_mm_token_truncation"""
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        a_call(it.processor, truncation=True, max_length=3)
    whole = a_call(it.processor)["input_ids"][0]
    cut = a_call(it.processor, truncation=True, max_length=len(whole) - 1)["input_ids"][0]
    assert cut == whole[:-1]


def test_decoding_is_the_tokenizers(it: SimpleNamespace):
    ids = it.processor.tokenizer(["one two", "three"])["input_ids"]
    assert it.processor.batch_decode(ids) == it.processor.tokenizer.batch_decode(ids)
    assert it.processor.decode(ids[0]) == it.processor.tokenizer.decode(ids[0])
    said = it.processor.post_process_image_text_to_text(ids, skip_special_tokens=True)
    assert [text.strip() for text in said] == ["one two", "three"]


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates


def test_conversations_become_inputs(it: SimpleNamespace, tmp_path: Path):
    """apply_chat_template_image: as text, as ids, one and several, with pictures as objects and as files."""
    zoo.image(0).save(tmp_path / "0.png")
    n = it.processor.num_image_tokens
    text = it.processor.apply_chat_template(TALK, add_generation_prompt=True)
    assert it.processor.apply_chat_template([TALK, TALK], add_generation_prompt=True) == [text, text]
    settings = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    expected = it.processor(text=[text], images=[[zoo.image(0)]], add_special_tokens=False, return_tensors="pt")
    for image in ({"image": zoo.image(0)}, {"path": str(tmp_path / "0.png")}, {"url": str(tmp_path / "0.png")}):
        talk = [{"role": "user", "content": [{"type": "image", **image}, TALK[0]["content"][1]]}]
        for conversations in (talk, [talk], [talk, talk]):
            found = it.processor.apply_chat_template(conversations, **settings)
            rows = 2 if len(conversations) == 2 else 1
            assert found["pixel_values"].shape == (rows, 3, 28, 28)
            for name in ("input_ids", "pixel_values"):
                assert all(torch.equal(row, expected[name][0]) for row in found[name]), name
            assert (found["input_ids"] == it.processor.image_token_id).sum() == rows * n


def test_a_conversation_goes_on(it: SimpleNamespace):
    """continue_final_message: the last turn stays open"""
    begun = [*TALK, {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    text = it.processor.apply_chat_template(begun, continue_final_message=True)
    assert text.endswith("It is")
    assert text.startswith(it.processor.apply_chat_template(TALK, add_generation_prompt=True))
    with pytest.raises(ValueError, match=r"continue_final_message.*add_generation_prompt"):
        it.processor.apply_chat_template(begun, continue_final_message=True, add_generation_prompt=True)


# ---------------------------------------------------------------------------------------------------------------------
# Image processors


def test_pictures_in_any_form_are_the_same_pixels(it: SimpleNamespace):
    """call_pil, call_numpy, call_pytorch: one or a batch; channels first or last; the result is channels first."""
    of, images = it.processor.image_processor, [zoo.image(0), zoo.image(1)]
    expected = of(images, return_tensors="pt")["pixel_values"]
    assert expected.shape == (2, 3, 28, 28) and expected.dtype == torch.float32
    arrays = [np.asarray(image) for image in images]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    for form in (arrays, tensors, [array.transpose(2, 0, 1) for array in arrays]):
        assert torch.equal(of(form, return_tensors="pt")["pixel_values"], expected)
        assert torch.equal(of(form[0], return_tensors="pt")["pixel_values"], expected[:1])
    np.testing.assert_array_equal(np.stack(of(images, return_tensors="np")["pixel_values"]), expected.numpy())


def test_settings_of_an_image_processor_can_be_given(it: SimpleNamespace):
    """do_resize, do_rescale, do_normalize, image_mean and image_std: by hand"""
    of, image = it.processor.image_processor, zoo.image(0, 28, 28)
    raw = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()
    plain = of(image, do_resize=False, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(plain.float(), raw)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 0.125]
    found = of(image, do_resize=False, image_mean=mean, image_std=std, return_tensors="pt")["pixel_values"][0]
    expected = (raw / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert of(zoo.image(0), return_tensors="pt")["pixel_values"].shape[2:] == (28, 28)  # nothing stays behind
