"""The contract's processor methods, tested on their meaning with LLaVA-1.5 (every family: test_models.py)."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from base.images import load_image
from base.loading import load_model
from base.processor import IGNORE_INDEX, VLProcessor, answer_start
from base.sampling import cut_after_end, end_token_ids
from common.errors import InputError
from models import core_mapper_for
from tests import zoo

TURNS = [
    {"role": "user", "content": "<image>\nWhat is in this image?"},
    {"role": "assistant", "content": "A red square."},
    {"role": "user", "content": "Anything else?"},
    {"role": "assistant", "content": "A blue circle"},
]


@pytest.fixture
def processor(llava: str) -> VLProcessor:
    return core_mapper_for(llava).processor(llava)


def test_prompt_is_the_published_format(processor: VLProcessor):
    text = processor.render(TURNS[:1], add_generation_prompt=True)
    assert text == "USER: <image>\nWhat is in this image? ASSISTANT:"


@pytest.mark.parametrize(
    "train_on, trained", [("all", ["A red square.", "A blue circle"]), ("last", ["A blue circle"])]
)
def test_labels_are_the_assistants_text_and_its_end_token(processor: VLProcessor, train_on: str, trained: list[str]):
    encoded = processor.process_batch_conv([TURNS], [[zoo.image()]], train_on=train_on)
    ids, labels = encoded["input_ids"][0], encoded["labels"][0]
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    spans = [[]]
    for label in labels:
        if label == IGNORE_INDEX:
            spans += [[]] * bool(spans[-1])
        else:
            spans[-1] = [*spans[-1], label]
    assert [processor.tokenizer.decode(s).strip() for s in spans if s] == [t + "</s>" for t in trained]


def test_a_conversation_starts_with_its_prompt_and_then_the_response(processor: VLProcessor):
    """What SFT trains on is what DPO scores and what generation continues."""
    conversation = processor.process_batch_conv([TURNS[:2]], [[zoo.image()]])["input_ids"][0]
    prompt = processor.encode_prompts([processor.render(TURNS[:1], True)], [[zoo.image()]])[0][0]
    assert conversation == prompt + processor.encode_response("A red square.")
    tokens = processor.tokenizer.convert_ids_to_tokens(processor.encode_response("A red square."))
    assert tokens[0].startswith("▁A") and tokens[-1] == "</s>"  # one space, as in "ASSISTANT: A red square.</s>"


def test_placeholder_methods_are_inverse(processor: VLProcessor):
    prompt = "What is this?"
    assert not processor.is_multimodal_prompt_valid(prompt)
    formatted = processor.format_multimodal_prompt(prompt, ["a.png", "b.png"])
    assert processor.is_multimodal_prompt_valid(formatted)
    assert formatted.count("<image>") == 2
    assert processor.remove_image_placeholder(formatted) == prompt


def test_images_as_path_bytes_row_and_pil(processor: VLProcessor, image_dir):
    path = image_dir / "0.png"
    pixels = [
        processor(texts=["USER: <image>\nHi ASSISTANT:"], images=[[image]])["pixel_values"]
        for image in (str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, Image.open(path))
    ]
    assert all(torch.equal(pixels[0], other) for other in pixels[1:])


def test_odd_images():
    grey16 = Image.fromarray(np.array([[0, 65535], [32768, 16384]], dtype=np.uint16))
    assert np.asarray(load_image(grey16))[:, :, 0].tolist() == [[0, 255], [127, 63]]
    rotated, buffer = Image.new("RGB", (4, 2)), io.BytesIO()
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(buffer, "JPEG", exif=exif)
    assert load_image(buffer.getvalue()).size == (2, 4)
    with pytest.raises(InputError, match=r"nothing\.png"):
        load_image("nothing.png")


def test_train_pads_right_and_infer_pads_left(processor: VLProcessor):
    convs = [TURNS[:1], [{"role": "user", "content": "Hi"}]]
    processor.train()
    assert processor(texts=["a", "a a a a"])["attention_mask"][0].tolist()[-1] == 0
    processor.infer()
    batch = processor(convs=convs, images=[[zoo.image()], []])
    assert batch["attention_mask"][1, 0] == 0 and batch["attention_mask"][1, -1] == 1
    assert "labels" not in batch


def test_generation_of_a_left_padded_batch_equals_row_by_row(processor: VLProcessor, llava: str):
    model = load_model(llava, dtype=torch.float32).eval()
    processor.infer()
    convs = [
        TURNS[:1],
        [{"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "<image>\nphoto " * 1 + "of a dog " * 6}],
    ]
    images = [[zoo.image(1)], [], [zoo.image(2)]]
    settings = model.prepare_default_generation_kwargs() | {"max_new_tokens": 8, "min_new_tokens": 8}
    batch = model.generate(**processor(convs=convs, images=images), **settings)[:, -8:]
    for b in range(3):
        row = model.generate(**processor(convs=convs[b : b + 1], images=images[b : b + 1]), **settings)[:, -8:]
        assert torch.equal(batch[b], row[0])
    assert model.config.image_token_id not in batch


def test_marks_and_images_must_agree(processor: VLProcessor):
    with pytest.raises(InputError, match=r"1 image mark\(s\) for 2 image\(s\)"):
        processor(convs=[TURNS], images=[[zoo.image(), zoo.image()]])
    with pytest.raises(InputError, match=r"2 image placeholder\(s\) for 1 image\(s\)"):
        processor(texts=["<image> and <image>"], images=[[zoo.image()]])


def test_saved_processor_loads_again(processor: VLProcessor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = VLProcessor(str(tmp_path))
    assert again.chat_template == processor.chat_template
    assert again.encode_response("A dog") == processor.encode_response("A dog")


@pytest.mark.parametrize(
    "family, end",
    [
        ("gemma3", ["<end_of_turn>"]),
        ("gemma4", ["<turn|>"]),
        ("aya_vision", ["<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"]),
    ],
)
def test_an_answer_ends_in_special_tokens_and_not_at_a_line_break(family: str, end: list[str]):
    """Added tokens that are not special, as Gemma's line breaks are, end no answer; before a special one they belong to the end."""
    path = zoo.checkpoint(family)
    processor, model = core_mapper_for(path).processor(path), load_model(path)
    tokenizer = processor.tokenizer
    ids = processor.encode_response("one\ntwo\n\nthree")
    assert tokenizer.convert_ids_to_tokens(ids)[-len(end) :] == end
    assert not {*tokenizer.convert_tokens_to_ids(end)} & {*ids[: -len(end)]}
    assert cut_after_end(ids, end_token_ids(processor, model)) == ids
    assert processor.decode_response(ids) == "one\ntwo\n\nthree"


def test_where_the_last_answer_begins():
    """Behind the last token that is not trained; tokens behind its end are not part of it."""
    no = IGNORE_INDEX
    assert (
        answer_start([no, no, 5, 6]) == 2 and answer_start([no, 5, 6, no, 7, no, no]) == 4 and answer_start([5, 6]) == 0
    )
    with pytest.raises(InputError, match="has no trained token"):
        answer_start([no, no])
