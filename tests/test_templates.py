"""base/template.py on published chat templates and on odd ones. (Formats of each family: test_models.py.)"""

import argparse
import datetime
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

import models.assemble
import train_dpo
from base.loading import load_model
from base.processor import IGNORE_INDEX, VLProcessor
from base.sampling import end_token_ids
from base.template import Messages
from common.errors import InputError
from eval.generate import rendering_of
from models import core_mapper_for
from tests import zoo
from tests.real import templates, tiny_processor

SYSTEM = {"role": "system", "content": "You are terse."}
TALK = [
    {"role": "user", "content": "<image>\nWhat is this?"},
    {"role": "assistant", "content": "A red square."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "A dog, 3 cats.\n\nYes."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "  I see <b>them</b>. "},
]


# Published templates that print a system message given in parts as Python source
WANTS_STRINGS = {"gemma4_v2", "gemma4_v3"}


def rendered(processor: VLProcessor, messages: Messages, string_system: bool) -> str:
    """What transformers prints to ask for an answer."""
    parts = processor.as_parts(messages, None)
    if string_system and messages[0]["role"] == "system":
        parts[0] = messages[0]
    return processor.processor.apply_chat_template(parts, add_generation_prompt=True, **processor.template.facts)


def trained(processor: VLProcessor, messages: Messages) -> list[str]:
    """Text of each run of labels."""
    labels = processor.process_batch_conv([messages], [[zoo.image()]])["labels"][0]
    spans: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORE_INDEX:
            spans += [[]] * bool(spans[-1])
        else:
            spans[-1].append(label)
    return [processor.tokenizer.decode(span) for span in spans if span]


@pytest.mark.parametrize("name", templates())
def test_published_templates(name: str, tmp_path: Path):
    """Prompts are what transformers prints; a conversation starts with the prompt of its last answer and ends in that answer."""
    processor = tiny_processor(tmp_path / "it", *templates()[name])
    for system in ([], [SYSTEM]):
        for k in (2, 4, 6):
            talk = [*system, *TALK[:k]]
            prompt = processor.encode_conversations([talk[:-1]], [[zoo.image()]])[0][0]
            whole = processor.process_batch_conv([talk], [[zoo.image()]])["input_ids"][0]
            assert whole == prompt + processor.encode_response(talk[-1]["content"])
            text = processor.render(talk[:-1], add_generation_prompt=True, images=1)
            expected = rendered(processor, talk[:-1], name in WANTS_STRINGS)
            if processor.answer_end not in expected:  # LLaVA's has no end token, and white space in its place
                expected = expected.replace("A red square. ", "A red square.</s>").replace("Yes. ", "Yes.</s>")
            assert text == expected
            answers = [m["content"] for m in talk if m["role"] == "assistant"]
            texts = [span.removesuffix(processor.answer_end).strip() for span in trained(processor, talk)]
            assert texts == [answer.strip() for answer in answers]


def test_answers_are_trimmed_where_the_template_trims(tmp_path: Path):
    answer = [*TALK[:1], {"role": "assistant", "content": "\n  A dog. \n"}]
    for family, text in {"gemma3": "A dog.", "qwen3_5": "A dog.", "qwen3_vl": "\n  A dog. \n"}.items():
        processor = core_mapper_for(zoo.checkpoint(family)).processor(zoo.checkpoint(family))
        assert trained(processor, answer) == [text + processor.answer_end]
        assert processor.tokenizer.decode(processor.encode_response("\n  A dog. \n")) == text + processor.answer_end


STRINGS = (  # a template that wants strings, as some of Gemma 4 are for the system message; users' texts come in parts
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ '<|turn>system\n' }}{{ messages[0]['content'] | trim }}{{ '<turn|>\n' }}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{{ '<|turn>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ m['content'] + '' }}{% else %}{% for part in m['content'] %}"
    "{{ '<|image|>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "system",
    [
        "messages[0]['content'] | trim",  # of parts Python source
        "messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'] | tojson",
    ],
    ids=["trim", "tojson"],
)
def test_contents_are_strings_where_the_template_prints_no_parts(system: str, tmp_path: Path):
    template = STRINGS.replace("messages[0]['content'] | trim", system)
    processor = tiny_processor(tmp_path / "it", "gemma4", template)
    text = processor.render([SYSTEM, *TALK[:3]], add_generation_prompt=True, images=1)
    assert text == (
        "<bos><|turn>system\nYou are terse.<turn|>\n<|turn>user\n<|image|>What is this?<turn|>\n<|turn>assistant\nA red square.<turn|>\n"
        "<|turn>user\nAnd now?<turn|>\n<|turn>assistant\n"
    )


def test_a_message_that_the_template_leaves_out_is_refused(tmp_path: Path):
    """A system message that nobody reads, and a template that prints no answers."""
    no_system = (
        "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}" + zoo.GEMMA4_TEMPLATE
    )
    processor = tiny_processor(tmp_path / "it", "gemma4", no_system)
    processor.render(TALK, images=1)
    with pytest.raises(InputError, match=r"leaves out the text of a system message, 'You are terse\.'"):
        processor.render([SYSTEM, *TALK], images=1)
    with pytest.raises(InputError, match="does not print a question and its answer"):
        tiny_processor(tmp_path / "it", "gemma4", "{{ messages[0]['content'][0]['text'] }}")
    of_text = "{% for m in messages %}{{ '<|turn>' + m['role'] + '\n' + m['content'] + '<turn|>\n' }}{% endfor %}"
    with pytest.raises(InputError, match="takes no images, as those of text models"):
        tiny_processor(tmp_path / "it", "gemma4", of_text)
    with pytest.raises(InputError, match="changes the text of answers"):
        tiny_processor(tmp_path / "it", "gemma4", zoo.GEMMA4_TEMPLATE.replace("| trim", "| replace(' ', '')"))


def test_pixtral_says_the_system_message_in_every_row():
    path = zoo.checkpoint("pixtral")
    processor = core_mapper_for(path).processor(path)
    text = processor.render([SYSTEM, *TALK[:4]], images=1)
    assert text == (
        "<s>[INST][IMG]What is this?[/INST]A red square.</s>[INST]You are terse.\n\nAnd now?[/INST]A dog, 3 cats.\n\nYes.</s>"
    )
    assert (
        processor.render([SYSTEM, *TALK[:2]], images=1)
        == "<s>[INST]You are terse.\n\n[IMG]What is this?[/INST]A red square.</s>"
    )


@pytest.mark.parametrize("family, end", [("glm4v", "<|user|>"), ("glm46v", "<|user|>"), ("molmo2", "<|im_end|>")])
def test_a_history_is_the_templates_where_an_answer_ends_in_the_next_turn(family: str, end: str, tmp_path: Path):
    """GLM stops at `<|user|>`, which stands behind earlier answers in its template; it is trained as their end."""
    folder = str(shutil.copytree(zoo.checkpoint(family), tmp_path / "it"))
    processor = core_mapper_for(folder).processor(folder)
    assert processor.answer_end == end
    assert set(processor.template.answer_end_ids) <= set(end_token_ids(processor, load_model(folder)))
    for k in (1, 3, 5):
        assert processor.render(TALK[:k], True, images=1) == rendered(processor, TALK[:k], False)
    answers = [message["content"] for message in TALK if message["role"] == "assistant"]
    assert [text.removesuffix(end) for text in trained(processor, TALK)] == answers


def test_glm_ends_in_eos_where_the_checkpoint_does_not_stop_at_the_next_turn(tmp_path: Path):
    folder = shutil.copytree(zoo.checkpoint("glm4v"), tmp_path / "it")
    eos = core_mapper_for(str(folder)).processor(str(folder)).tokenizer.eos_token_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert core_mapper_for(str(folder)).processor(str(folder)).answer_end == "<|endoftext|>"
    for damaged in ("{", "[1]"):
        (folder / "generation_config.json").write_text(damaged)
        with pytest.raises(InputError, match=r"generation_config\.json is damaged"):
            core_mapper_for(str(folder)).processor(str(folder))


# -- thinking ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zoo", "qwen3_5_think", "qwen3_5_nothink"])
@pytest.mark.parametrize("thinking", [False, True])
def test_prompts_end_behind_the_empty_block_or_inside_thoughts_as_asked(name: str, thinking: bool, tmp_path: Path):
    template = zoo.QWEN3_5_TEMPLATE if name == "zoo" else templates()[name][1]
    processor = tiny_processor(tmp_path / "it", "qwen3_5", template, enable_thinking=thinking)
    assert processor.template.facts == {"enable_thinking": thinking}
    prompt = processor.render(TALK[:1], add_generation_prompt=True, images=1)
    assert prompt.endswith("assistant\n<think>\n" if thinking else "assistant\n<think>\n\n</think>\n\n")
    lead = "\n</think>\n\n" if thinking else ""
    assert trained(processor, TALK[:2]) == [lead + "A red square.<|im_end|>"]
    # Earlier answers have no block, whatever is asked
    assert trained(processor, TALK[:4]) == ["A red square.<|im_end|>", lead + "A dog, 3 cats.\n\nYes.<|im_end|>"]
    thoughts = [*TALK[:1], {"role": "assistant", "content": "<think>\nIt has corners.\n</think>\n\nA square."}]
    if not thinking:
        with pytest.raises(InputError, match=r"holds thoughts.*--enable_thinking True"):
            trained(processor, thoughts)
        return
    assert trained(processor, thoughts) == ["It has corners.\n</think>\n\nA square.<|im_end|>"]
    assert trained(processor, [*thoughts, *TALK[2:4]])[0] == "A square.<|im_end|>"


def test_thinking_is_refused_where_the_template_has_no_such_switch(llava: str):
    with pytest.raises(InputError, match="--enable_thinking does nothing here"):
        core_mapper_for(llava).processor(llava, enable_thinking=True)


# -- dates ---------------------------------------------------------------------------------------------------------------

DATED = "{{ strftime_now('%d %b %Y') + '. ' }}" + zoo.LLAVA_TEMPLATE


def test_templates_print_the_date_that_they_are_given(tmp_path: Path):
    date = datetime.date(2026, 11, 1)
    processor = tiny_processor(tmp_path / "it", "llava", DATED, date=date)
    assert processor.render(TALK[:1], True, images=1) == "01 Nov 2026. USER: <image>\nWhat is this? ASSISTANT:"
    assert processor.template.facts == {"date": "2026-11-01"}
    today = tiny_processor(tmp_path / "it", "llava", DATED)
    assert today.template.facts["date"] == datetime.datetime.now().date().isoformat()


class Clock(datetime.datetime):
    """A clock that stands still."""

    today_is = datetime.datetime(2026, 11, 1)

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return cls.today_is


@pytest.fixture
def dated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A checkpoint whose template prints the date; it is the first of November."""
    monkeypatch.setattr(models.assemble, "datetime", SimpleNamespace(datetime=Clock, date=datetime.date))
    monkeypatch.setattr(Clock, "today_is", datetime.datetime(2026, 11, 1))
    folder = shutil.copytree(zoo.checkpoint("llava"), tmp_path / "dated")
    (folder / "chat_template.jinja").write_text(DATED)
    return str(folder)


def recorded_date(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["plan"]["date"]


def test_a_run_has_one_date_also_when_it_goes_on(dated: str, tmp_path: Path, command, monkeypatch: pytest.MonkeyPatch):
    run = "--use_lora True --save_strategy steps --save_steps 1"
    train_dpo.main(command("dpo", f"{run} --max_steps 1", model=dated))
    assert recorded_date(tmp_path / "dpo") == "2026-11-01"
    monkeypatch.setattr(Clock, "today_is", datetime.datetime(2026, 11, 2))
    train_dpo.main(command("dpo", f"{run} --resume_from_checkpoint True", model=dated))
    assert recorded_date(tmp_path / "dpo") == "2026-11-01"
    assert (tmp_path / "dpo" / "checkpoint-2").is_dir()
    train_dpo.main(command("dpo", run, model=dated, out=tmp_path / "new"))
    assert recorded_date(tmp_path / "new") == "2026-11-02"


def test_the_cached_reference_knows_the_date(dated: str, tmp_path: Path, command, monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / "cache"
    flags = f"--use_lora True --precompute_ref_log_probs True --ref_log_probs_dir {cache} --max_steps 1"

    def rows() -> int:
        return sum(len(load_file(path)) for path in cache.rglob("*.safetensors"))

    train_dpo.main(command("dpo", flags, model=dated, out=tmp_path / "first"))
    computed = rows()
    train_dpo.main(command("dpo", flags, model=dated, out=tmp_path / "again"))
    assert rows() == computed > 0  # the same day: nothing is computed anew
    monkeypatch.setattr(Clock, "today_is", datetime.datetime(2026, 11, 2))
    train_dpo.main(command("dpo", flags, model=dated, out=tmp_path / "later"))
    assert rows() == 2 * computed


def test_an_evaluation_goes_on_with_the_date_on_which_it_began(tmp_path: Path):
    meta = tmp_path / "answers.meta.json"
    args = argparse.Namespace(output=str(tmp_path / "answers.jsonl"), overwrite=False, enable_thinking=False)
    assert rendering_of(args)["date"] is None
    meta.write_text(json.dumps({"prompt": {"suffix": None, "date": "2026-11-01"}}))
    assert rendering_of(args)["date"] == datetime.date(2026, 11, 1)
    args.overwrite = True
    assert rendering_of(args)["date"] is None
