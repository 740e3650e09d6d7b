"""eval.generate: shared features change nothing, a killed run ends like one without a kill, settings are recorded."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

import models
from args import LoraArguments
from base.loading import load_model
from common.errors import InputError
from eval import generate
from eval.benchmark_files import read_task
from eval.generate import Answerer, EncodedBatches, answer_rows, generation_settings, plan, processor_for
from eval.results import meta_path
from models.assemble import add_lora
from tests import zoo

CPU = torch.device("cpu")
WORDS = ["dog", "cat", "red square", "table"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A POPE file with 4 images and 1, 2, 3 and 4 questions about them."""
    folder = tmp_path_factory.mktemp("pope")
    rows = []
    for i in range(4):
        zoo.image(i).save(folder / f"{i}.png")
        for word in WORDS[: i + 1]:
            rows.append(
                {
                    "question_id": len(rows),
                    "image": f"{i}.png",
                    "text": f"Is there a {word} in the image?",
                    "label": "yes",
                }
            )
    file = folder / "coco_pope_random.json"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def arguments(data: Path, output: Path, model: str, **changes: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    generate.add_generation_arguments(parser)
    args = parser.parse_args(["--batch_size", "4", "--max_new_tokens", "6", "--num_workers", "0"])
    vars(args).update(
        task="pope", data_path=str(data), output=str(output), model_name_or_path=model, adapter=None, image_root=None
    )
    vars(args).update(changes)
    return args


def run(args: argparse.Namespace) -> dict:
    rows = read_task(args.task, args.data_path, args.image_root, args.limit)
    return answer_rows(args, rows, Answerer(args.model_name_or_path, args.adapter, CPU, args.bf16), 0, 1)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# llava-style lists, tiles, M-RoPE grids, deepstack, cross-attention, a Q-Former that reads the question
QUICK = (
    "llava",
    "llava_next",
    "qwen2_5_vl",
    "qwen3_vl",
    "idefics3",
    "mllama",
    "instructblip",
    "ovis2",
    "granite4_vision",
)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in sorted(zoo.BUILDERS)]
)
@pytest.mark.parametrize("beams", [1, 2])
def test_shared_features_give_the_answers_of_a_plain_batch(family: str, beams: int) -> None:
    answerer = Answerer(zoo.checkpoint(family), None, CPU, bf16=False)
    images = [zoo.image(0), zoo.image(0), zoo.image(1, 30, 44), zoo.image(0)]
    texts = ["What is in this image?", "Is there a dog?", "Is there a dog?", "describe the photo"]
    batch = [
        {"id": str(i), "images": [image], "prompt": t} for i, (image, t) in enumerate(zip(images, texts, strict=True))
    ]
    encoded = EncodedBatches([batch], answerer.prompt_collator)[0][1]
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    rows = []  # of every step of the decoder
    hook = answerer.core.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(next(x for x in map(kwargs.get, ("inputs_embeds", "input_ids")) if x is not None))),
        with_kwargs=True,
    )  # fmt: skip
    shared = answerer.answer(encoded, settings, seed=0)
    hook.remove()
    assert rows[0] == 4 and set(rows[1:]) == {4 * beams}  # beams share the prefill

    convs = [[{"role": "user", "content": t}] for t in texts]
    inputs = answerer.processor(convs=convs, images=[[i] for i in images])
    with torch.inference_mode():
        out = answerer.model.generate(**inputs, **settings, pad_token_id=answerer.processor.tokenizer.pad_token_id)
    length = inputs["input_ids"].shape[1]
    out = out[:, length:] if torch.equal(out[:, :length], inputs["input_ids"]) else out
    plain = [answerer.processor.decode_response(ids) for ids in out.tolist()]
    assert shared == plain
    if family in QUICK:  # if all answers were equal, as in some tiny checkpoints, the comparison would show little
        assert len(set(shared)) > 1
    assert answerer.tower_runs == (4 if family == "instructblip" else 2)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mllama", "instructblip"])
def test_several_samples_of_every_row(family: str, questions: Path, tmp_path: Path) -> None:
    """Almost without temperature all of them are the greedy answer; with it they differ, and one seed gives the same ones."""
    model = zoo.checkpoint(family)
    greedy, cold = tmp_path / "greedy.jsonl", tmp_path / "cold.jsonl"
    run(arguments(questions, greedy, model, limit=6))
    run(arguments(questions, cold, model, limit=6, num_samples=3, temperature=1e-7))
    assert [[row["answer"]] * 3 for row in lines(greedy)] == [row["answers"] for row in lines(cold)]
    found = []
    for name in ("a", "b"):
        run(arguments(questions, tmp_path / name, model, limit=6, num_samples=3, temperature=1.0))
        found.append([row["answers"] for row in lines(tmp_path / name)])
    assert found[0] == found[1] and all(len(set(answers)) > 1 for answers in found[0])
    with pytest.raises(InputError, match="--num_samples 3 needs --temperature above 0"):
        run(arguments(questions, tmp_path / "c", model, num_samples=3))


def test_vision_tower_sees_every_image_once(questions: Path, tmp_path: Path, llava: str) -> None:
    answerer = Answerer(llava, None, CPU, bf16=False)
    seen = []
    answerer.core.get_vision_tower().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(args[0])), with_kwargs=True
    )
    args = arguments(questions, tmp_path / "a.jsonl", llava, batch_size=3)  # smaller than the largest group
    facts = answer_rows(args, read_task("pope", questions), answerer, 0, 1)
    assert sum(seen) == 4 == facts["images"] and facts["rows"] == 10


def test_plan_keeps_groups_together_and_rows_without_image_apart() -> None:
    def row(number: int, *images: str) -> dict:
        return {"id": number, "images": list(images)}

    rows = [row(0, "a"), row(1, "b"), row(2, "a"), row(3), *(row(4 + i, "c") for i in range(5)), row(9, "d")]
    runs = [[[r["id"] for r in batch] for batch in batches] for batches in plan(rows, 3)]
    assert runs == [[[0, 2, 1]], [[3]], [[4, 5, 6], [7, 8]], [[9]]]
    embedded = [{"id": n, "images": [{"bytes": picture}]} for n, picture in enumerate((b"one", b"two", b"one"))]
    assert [[r["id"] for r in batch] for batch in plan(embedded, 2)[0]] == [[0, 2]]  # equal bytes, not equal lengths


def test_resumed_equals_uninterrupted(
    questions: Path, tmp_path: Path, llava: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = {"temperature": 1.0, "seed": 3}
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    run(arguments(questions, whole, llava, **sampling))
    calls, real = [], Answerer.answer

    def dies(self: Answerer, *args: object) -> list[str]:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Answerer, "answer", dies)
    with pytest.raises(KeyboardInterrupt):
        run(arguments(questions, broken, llava, **sampling))
    part = tmp_path / "broken.jsonl.part-0"
    kept = lines(part)
    assert 0 < len(kept) < 10 and not broken.exists()
    last = part.read_text().splitlines()[-1]
    part.write_text("".join(json.dumps(r) + "\n" for r in kept[:-1]) + last[: len(last) // 2])  # cut off by the kill
    monkeypatch.setattr(Answerer, "answer", real)
    facts = run(arguments(questions, broken, llava, **sampling))
    assert facts["rows"] == 10 - len(kept) + 1
    assert broken.read_bytes() == whole.read_bytes()
    assert [r["id"] for r in lines(broken)] == [f"random/{i}" for i in range(10)]
    assert not part.exists()
    before = broken.stat().st_mtime_ns
    assert run(arguments(questions, broken, llava, **sampling))["rows"] == 0  # nothing left to do
    assert broken.read_bytes() == whole.read_bytes() and broken.stat().st_mtime_ns >= before


def test_ranks_share_the_rows_and_any_number_of_them_can_go_on(
    questions: Path, tmp_path: Path, llava: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "barrier", lambda world: None)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run(arguments(questions, one, llava))
    answerer = Answerer(llava, None, CPU, bf16=False)
    second = answer_rows(arguments(questions, two, llava), read_task("pope", questions), answerer, 1, 2)
    assert 0 < second["rows"] < 10
    first = answer_rows(arguments(questions, two, llava), read_task("pope", questions), answerer, 0, 1)  # alone, later
    assert first["rows"] + second["rows"] == 10
    assert two.read_bytes() == one.read_bytes()


def test_other_settings_do_not_go_into_the_same_file(questions: Path, tmp_path: Path, llava: str) -> None:
    output = tmp_path / "a.jsonl"
    run(arguments(questions, output, llava, limit=2))
    meta = json.loads(meta_path(output).read_text())
    assert meta["generation"] == {
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": 1,
        "use_cache": True,
        "dtype": "float32",
    }
    assert (meta["limit"], meta["checkpoint"], meta["adapter"]) == (2, llava, None)
    with pytest.raises(InputError, match=r"generation .*'num_beams': 1.* now it is .*'num_beams': 2.*--overwrite"):
        run(arguments(questions, output, llava, limit=2, num_beams=2))
    with pytest.raises(InputError, match=r"prompt .*'suffix': None.* now it is .*'suffix': 'In one word\.'"):
        run(arguments(questions, output, llava, limit=2, suffix="In one word."))
    run(arguments(questions, output, llava, limit=2, num_beams=2, overwrite=True))
    assert json.loads(meta_path(output).read_text())["generation"]["num_beams"] == 2


@pytest.fixture
def settings_of(monkeypatch, tmp_path: Path, llava: str):
    """Flags and what a family says -> the settings of an evaluation and what is recorded of them."""
    shutil.copytree(llava, tmp_path / "model")
    config = GenerationConfig.from_pretrained(llava)
    config.update(repetition_penalty=1.3, do_sample=True, temperature=0.2, eos_token_id=[2, 3])
    config.save_pretrained(tmp_path / "model")

    def settings(family: dict, **flags: object) -> tuple[dict, dict, GenerationConfig]:
        answerer = Answerer(str(tmp_path / "model"), None, CPU, bf16=False)
        own = {"max_new_tokens": 9} | family
        monkeypatch.setattr(type(answerer.core), "prepare_default_generation_kwargs", classmethod(lambda cls: own))
        args = arguments(tmp_path, tmp_path, llava, **{"max_new_tokens": None} | flags)
        return *generation_settings(args, answerer), answerer.core.generation_config

    return settings


def test_flags_come_before_the_family_before_greedy_search(settings_of) -> None:
    family = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    settings, recorded, config = settings_of({})
    assert (settings["do_sample"], settings["temperature"], recorded["max_new_tokens"]) == (False, None, 9)
    assert "repetition_penalty" not in recorded and config.repetition_penalty in (None, 1.0)
    assert config.eos_token_id == [2, 3]  # special tokens stay the checkpoint's
    _, recorded, _ = settings_of(family, seed=4)
    assert recorded == family | {"max_new_tokens": 9, "top_k": 0, "seed": 4, "dtype": "float32"}
    _, recorded, _ = settings_of(family, temperature=0.5, max_new_tokens=3)
    assert (recorded["temperature"], recorded["top_p"], recorded["max_new_tokens"]) == (0.5, 0.9, 3)
    _, recorded, _ = settings_of(family, temperature=0.0)
    assert recorded == {"max_new_tokens": 9, "do_sample": False, "dtype": "float32"}
    _, recorded, _ = settings_of(family, checkpoint_settings=True)
    assert (recorded["temperature"], recorded["top_p"], recorded["repetition_penalty"]) == (0.2, 0.9, 1.3)
    with pytest.raises(InputError, match="--top_p belongs to sampling"):
        settings_of({}, top_p=0.5)


def test_what_evaluation_decides_a_family_cannot(settings_of) -> None:
    """What was common in such dictionaries says what is done anyway; another number of answers or another type is refused."""
    harmless = {
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "pad_token_id": 0,
        "generation_config": None,
    }
    settings, recorded, _ = settings_of(harmless | {"compile_config": CompileConfig()})
    assert not settings.keys() & harmless.keys()
    assert recorded["compile_config"] == "CompileConfig"
    for name, value in {"num_return_sequences": 2, "return_dict_in_generate": True, "generation_config": {}}.items():
        with pytest.raises(InputError, match=f"LlavaForConditionalGeneration says {name}=.*, which evaluation decides"):
            settings_of({name: value})


def test_a_family_may_stop_at_a_text(monkeypatch, questions: Path, tmp_path: Path, llava: str) -> None:
    core = models.core_mapper_for(llava).model
    greedy = {"max_new_tokens": 8, "do_sample": False}
    texts = []
    for own in (greedy, greedy | {"stop_strings": [chr(code) for code in range(97, 123)]}):
        monkeypatch.setattr(core, "prepare_default_generation_kwargs", classmethod(lambda cls, own=own: own))
        output = tmp_path / f"{len(texts)}.jsonl"
        run(arguments(questions, output, llava, limit=2, max_new_tokens=None))
        texts.append([json.loads(line)["answer"] for line in output.read_text().splitlines()])
    assert all(long.startswith(short) and len(short) < len(long) for long, short in zip(*texts, strict=True))


def test_a_checkpoints_settings_reach_generation_when_asked_for(settings_of) -> None:
    """What generate is called with and what the model still has."""
    settings, _, config = settings_of({}, checkpoint_settings=True)
    assert settings["repetition_penalty"] == 1.3 and config.repetition_penalty in (None, 1.0)


def test_missing_image_names_the_row(questions: Path, tmp_path: Path, llava: str) -> None:
    args = arguments(questions, tmp_path / "a.jsonl", llava, image_root=str(tmp_path))
    with pytest.raises(InputError, match=r"row 'random/0': the image .*0\.png does not exist; pass --image_root"):
        run(args)
    for i in range(4):
        (tmp_path / f"{i}.png").write_text("no image")
    with pytest.raises(InputError, match=r"row 'random/0': Cannot read .*0\.png"):
        run(args)


def test_adapter_answers_as_an_adapter(questions: Path, tmp_path: Path, llava: str) -> None:
    torch.manual_seed(0)
    policy = add_lora(load_model(llava), LoraArguments(use_lora=True, lora_r=4))
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapter = str(tmp_path / "checkpoint-7")
    policy.save_pretrained(adapter)
    files = [tmp_path / f"{n}.jsonl" for n in ("base", "both", "folder")]
    run(arguments(questions, files[0], llava))
    run(arguments(questions, files[1], llava, adapter=adapter))
    run(arguments(questions, files[2], adapter))
    assert files[1].read_bytes() == files[2].read_bytes() != files[0].read_bytes()
    for file in files[1:]:
        meta = json.loads(meta_path(file).read_text())
        assert (meta["checkpoint"], meta["adapter"], meta["step"]) == (llava, adapter, 7)
    with pytest.raises(InputError, match="is an adapter already; pass its base there"):
        run(arguments(questions, tmp_path / "x.jsonl", adapter, adapter=adapter))
    assert processor_for(llava, adapter).chat_template == processor_for(llava).chat_template  # the base's
    own = processor_for(llava)
    own.processor.chat_template += "{# its own #}"
    own.save_pretrained(adapter)
    assert processor_for(llava, adapter).chat_template == processor_for(llava).chat_template + "{# its own #}"


def test_likelihood_is_the_mean_loss_of_each_choice(tmp_path: Path, llava: str) -> None:
    zoo.image(0).save(tmp_path / "0.png")
    row = {
        "question_id": "1",
        "question": "What is in this image?",
        "answer": "A",
        "data_id": "0.png",
        "question_type_id": 1,
        "data_type": "image",
    }
    row |= {
        f"choice_{c}": text
        for c, text in zip("abcd", ("a dog", "two blue circles on a table", "no", "red"), strict=True)
    }
    data = tmp_path / "SEED-Bench.json"
    data.write_text(
        json.dumps({"questions": [row, row | {"question_id": "2", "choice_a": "cat"}], "question_type": {"Scene": 1}})
    )
    args = arguments(data, tmp_path / "losses.jsonl", llava, task="seed")
    answerer = Answerer(llava, None, CPU, bf16=False)
    rows = read_task("seed", data)
    generate.choice_losses(args, rows, answerer, 0, 1)
    written = lines(tmp_path / "losses.jsonl")
    assert [r["id"] for r in written] == ["1", "2"]

    processor = answerer.processor
    for choice, loss in zip(rows[0]["choices"].values(), written[0]["losses"], strict=True):
        conv = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": choice}]
        inputs = processor(convs=[conv], images=[[str(tmp_path / "0.png")]])
        with torch.inference_mode():
            assert loss == pytest.approx(answerer.model(**inputs).loss.item(), abs=1e-4)
