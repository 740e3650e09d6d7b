"""--rollout_url: updates whose answers an inference server samples, and servers that misbehave."""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

import args
import losses
import train_ppo
from base import server_rollouts
from base.collator import VLPPODataCollator
from base.rollout import Prompts
from base.server_rollouts import ServerRollouts
from common.errors import InputError
from common.openai_client import Answer, ChatReply
from common.seeds import stable_seed
from models import core_mapper_for
from tests import zoo
from tests.tiny_server import TinyServer
from tests.vllm_transcripts import transcript

GRPO = (
    "--use_lora True --lora_r 4 --advantage_estimator grpo --rollouts_per_prompt 2 --per_device_train_batch_size 4 "
    "--response_length 5 --learning_rate .05 --max_steps 2 --logging_steps 1 --lr_scheduler_type constant"
)
RECORDED = Path(__file__).parent / "goldens" / "server" / "vllm-0.32.0.json"
REWARD = f"--reward_fn {__file__}:number_of_bytes"


def number_of_bytes(responses: list[str], **_: object) -> list[float]:
    return [float(len(r.encode()) % 7) for r in responses]


@pytest.fixture
def server(llava: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    tiny = TinyServer(llava)
    yield tiny
    tiny.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client sends one request at a time, and gives up at once."""
    plain = server_rollouts.OpenAIClient
    monkeypatch.setattr(
        server_rollouts,
        "OpenAIClient",
        lambda url, **kw: plain(url, **kw | {"pause": 0.01, "attempts": 2, "at_once": 1}),
    )


def train(out: Path, llava: str, pairs_json: Path, image_dir: Path, more: str = "") -> list[dict]:
    """The log of a run."""
    line = f"--model_name_or_path {llava} --dataset_name plain_dpo --data_path {pairs_json} --image_root {image_dir} --output_dir {out}"
    train_ppo.main(f"{line} --report_to none --seed 1 {GRPO} {REWARD} {more}".split())
    return [entry for entry in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in entry]


def test_updates_through_a_server(server, llava, pairs_json, image_dir, tmp_path, caplog):
    """The server samples from the policy that is trained: it gets every step's adapter, and drops the one before."""
    log = train(tmp_path / "out", llava, pairs_json, image_dir, f"--rollout_url {server.url} --max_steps 3")
    first, second, third = server.loaded
    run = first.removesuffix("-0")
    assert [first, second, third] == [f"{run}-0", f"{run}-1", f"{run}-2"] and set(server.adapters) == {third}
    assert [path.name for path in (tmp_path / "out" / "rollout_adapter").iterdir()] == [third]
    asked = [body for path, body in zip(server.paths, server.requests, strict=True) if path.endswith("completions")]
    assert [body["model"] for body in asked] == [first] * 2 + [second] * 2 + [third] * 2
    assert len({body["seed"] for body in asked}) == 6 and {body["n"] for body in asked} == {2}
    for entry in log:
        assert entry["first/ratio_deviation"] < 1e-4
        assert entry["sampling/sampling_logp_difference/mean"] < 1e-4
        assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    assert "samples from another policy" not in caplog.text
    server.forget()
    server.ignores_adapters = True
    with caplog.at_level(logging.WARNING):
        log = train(tmp_path / "stale", llava, pairs_json, image_dir, f"--rollout_url {server.url} --max_steps 3")
    assert log[0]["first/ratio_deviation"] < 1e-4 < 0.1 < log[-1]["first/ratio_deviation"]
    assert caplog.text.count("samples from another policy") == 1


def test_a_dead_server_loses_nothing(server, impatient, llava, pairs_json, image_dir, tmp_path):
    """It dies in the second update, after one of two prompts; resumed, the run asks for the other one and ends as one that met no trouble."""
    rollouts = f"--rollout_url {server.url} --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    whole = train(tmp_path / "whole", llava, pairs_json, image_dir, rollouts)
    server.script = [None] * (1 + 2) + [None, None, None] + [500] * 9  # load, ask twice; load, unload, ask
    server.adapters.clear()
    with pytest.raises(
        InputError,
        match=r"the rollout server http://127.* failed 2 times, last with HTTP 500 \(no\)\. The answers are kept in .*out: --resume",
    ):
        train(tmp_path / "out", llava, pairs_json, image_dir, f"{rollouts} --dataloader_num_workers 0")
    kept = json.loads((tmp_path / "out" / "unscored_answers_0.json").read_text())["answers"]
    assert len(kept) == 1 and (tmp_path / "out" / "checkpoint-1").is_dir()
    server.script, before = [], len(server.requests)
    resumed = train(tmp_path / "out", llava, pairs_json, image_dir, f"{rollouts} --resume_from_checkpoint True")
    assert [path.rpartition("/")[2] for path in server.paths[before:]] == ["load_lora_adapter", "completions"]
    for name in ("loss", "objective/scores", "val/response_length"):
        assert [entry[name] for entry in resumed] == pytest.approx([entry[name] for entry in whole], abs=1e-5), name
    assert not (tmp_path / "out" / "unscored_answers_0.json").exists()


def test_a_server_that_was_started_anew_gets_the_adapter_again(server, llava, pairs_json, image_dir, tmp_path):
    plain, forgot = server.route, []

    def restarts(path: str, body: dict) -> object:
        if path.endswith("completions") and server.loaded[-1:] and server.loaded[-1].endswith("-1") and not forgot:
            forgot.append(True)
            with server.lock:
                server.forget()
        return plain(path, body)

    server.reply = restarts
    log = train(tmp_path, llava, pairs_json, image_dir, f"--rollout_url {server.url}")
    assert server.loaded[-2] == server.loaded[-1] and len(server.loaded) == 3
    assert log[-1]["first/ratio_deviation"] < 1e-4


def test_servers_that_read_another_prompt(server, llava, pairs_json, image_dir, tmp_path):
    def without_bos(path: str, body: dict) -> object:
        return server.route(path, body | {"add_special_tokens": False})

    server.reply = without_bos  # vLLM's chat route, where it is not asked for <s>
    with pytest.raises(
        InputError,
        match=r"pairs\.json.*the prompt has \d+ tokens, \d+ here, as http.* says: serve the checkpoint that is trained",
    ):
        train(tmp_path / "count", llava, pairs_json, image_dir, f"--rollout_url {server.url}")

    def another_word(path: str, body: dict) -> object:
        reply = server.route(path, body)
        if isinstance(reply, dict):
            reply["prompt_token_ids"][-1] -= 1
        return reply

    server.forget()
    server.reply = another_word
    with pytest.raises(InputError, match=r"the prompt has '.*' as token \d+, '.*' here"):
        train(tmp_path / "word", llava, pairs_json, image_dir, f"--rollout_url {server.url}")


def test_adapters_that_it_does_not_take(server, llava, pairs_json, image_dir, tmp_path):
    """vLLM says why with 500, which is not tried again; a path that it does not see with 404."""
    server.refuses = "LoRA rank 4 is greater than max_lora_rank 2."
    with pytest.raises(
        InputError, match=r"answered 500 .*\(LoRA rank 4 is greater than max_lora_rank 2\.\): .*--max-lora-rank"
    ):
        train(tmp_path / "rank", llava, pairs_json, image_dir, f"--rollout_url {server.url}")
    assert server.paths == ["/v1/load_lora_adapter"]
    server.refuses = None
    server.reply = lambda path, body: server.route(path, body | {"lora_path": str(tmp_path / "elsewhere")})
    with pytest.raises(InputError, match=r"sees no .*policy-\w+-0: the server and the training must see the same disk"):
        train(tmp_path / "disk", llava, pairs_json, image_dir, f"--rollout_url {server.url}")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"has modules of its own \(lm_head\)"),
        ({"bias": "all"}, "has biases"),
        ({"init_lora_weights": "pissa"}, r"starts from a changed base \(pissa\)"),
        ({}, "has weights in the vision tower"),
    ],
)
def test_adapters_that_vllm_does_not_serve(changes: dict, said: str) -> None:
    """Of training that continues an adapter, whose flags stand in its folder."""
    config = LoraConfig(**changes)
    with pytest.raises(InputError, match=f"The adapter {said}.*, which vLLM does not serve"):
        server_rollouts.refuse_unserved(config, in_vision=not changes)
    for kind in ({}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"rank_pattern": {"q_proj": 2}}):
        server_rollouts.refuse_unserved(LoraConfig(**kind), in_vision=False)


@pytest.mark.parametrize(
    "tokens, said",
    [
        ([10**6], "answers with token 1000000, none of the checkpoint's"),
        ("images", r"answers with token \d+, an image's place \(it takes no logit_bias\)"),
    ],
)
def test_answers_of_another_vocabulary(server, llava, pairs_json, image_dir, tmp_path, tokens, said: str):
    strange = [server.base.config.image_token_id] if tokens == "images" else tokens

    def reply(path: str, body: dict) -> object:
        found = server.route(path, body)
        for choice in found["choices"] if isinstance(found, dict) else []:
            choice |= {"token_ids": strange, "finish_reason": "length", "message": {"content": ""}}
            choice["logprobs"]["content"] = [{"token": "x", "logprob": -1.0}] * len(strange)
        return found

    server.reply = reply
    with pytest.raises(InputError, match=said):
        train(tmp_path / "out", llava, pairs_json, image_dir, f"--rollout_url {server.url}")


@pytest.mark.slow
def test_a_server_without_log_probs(server, llava, pairs_json, image_dir, tmp_path):
    """Its texts are tokenised again, without importance weights; and that has to be asked for."""
    server.gives_tokens = False
    with pytest.raises(InputError, match=r"gives no token ids with log-probs.*--rollout_importance_cap 0"):
        train(tmp_path / "refused", llava, pairs_json, image_dir, f"--rollout_url {server.url}")
    log = train(
        tmp_path / "taken", llava, pairs_json, image_dir, f"--rollout_url {server.url} --rollout_importance_cap 0"
    )
    assert len(log) == 2 and "sampling/sampling_logp_difference/mean" not in log[0]


def test_what_is_asked_and_taken_by_hand(llava, tmp_path):
    """The flags, the seed of the prompt's place and what log-probs do not contain; tokens up to the first end, with their log-probs."""
    flags = SimpleNamespace(
        rollout_url="http://127.0.0.1:1/v1", output_dir=str(tmp_path), rollout_timeout=5, rollouts_per_prompt=3, response_length=4,
        temperature=0.6, top_p=0.9, rollout_importance_cap=2.0,
    )  # fmt: skip
    collator = VLPPODataCollator(core_mapper_for(llava).processor(llava))
    server = ServerRollouts(flags, collator, "run", end_ids=[2, 9], never=[5], vocabulary=100)
    server.step = 7
    row = {"prompt": [{"role": "user", "content": "What?"}], "images": []}
    prompts = Prompts([row, row], [[1, 20], [1, 21]], {}, {}, places=[4, 6])
    expected = {
        "model": "policy-run-7", "n": 3, "max_tokens": 4, "temperature": 0.6, "top_p": 0.9, "top_k": -1, "min_p": 0.0,
        "repetition_penalty": 1.0, "stop_token_ids": [2, 9], "logit_bias": {"5": -100}, "seed": stable_seed(3, 6) % 2**31,
    }  # fmt: skip
    asked = server._body(prompts, 1, seed=3)
    assert {name: asked[name] for name in expected} == expected
    said = [Answer("", ids, [-0.1, -0.2, -0.3, -0.4, -0.5], True) for ids in ([7, 9, 2, 8, 8], [7, 7, 7, 7, 7])]
    ids, logps = server._answers([ChatReply(said, None, None)])
    assert ids == [[[7, 9], [7, 7, 7, 7]]] and logps == [[[-0.1, -0.2], [-0.1, -0.2, -0.3, -0.4]]]


def test_importance_weights_by_hand():
    ours, theirs = torch.tensor([[0.5, 0.2, 0.9]]).log(), torch.tensor([[0.25, 0.4, 0.1]]).log()
    weights = losses.truncated_importance_weights(ours, theirs, cap=3.0)
    assert weights.tolist() == [pytest.approx([2.0, 0.5, 3.0])]


def test_importance_weights_weigh_the_loss(server, llava, pairs_json, image_dir, tmp_path):
    """A server that says half the probabilities: every token's gradient counts twice, and with a cap of 1 once."""

    def half(path: str, body: dict) -> object:
        reply = server.route(path, body)
        for token in [t for c in reply["choices"] for t in c["logprobs"]["content"]] if isinstance(reply, dict) else []:
            token["logprob"] -= math.log(2)
        return reply

    def gradient(name: str, more: str = "") -> float:
        log = train(tmp_path / name, llava, pairs_json, image_dir, f"--rollout_url {server.url} --max_steps 1 {more}")
        return log[0]["grad_norm"]

    plain = gradient("plain")
    server.reply = half
    assert plain > 1e-4 and gradient("twice") == pytest.approx(2 * plain, rel=1e-3)
    assert gradient("capped", "--rollout_importance_cap 1") == pytest.approx(plain, rel=1e-3)


def test_flags(tmp_path, llava, pairs_json, image_dir, monkeypatch):
    line = f"--model_name_or_path m --dataset_name d --output_dir {tmp_path} --reward_fn exact_answer"
    kinds = (args.ModelArguments, args.DataArguments, args.LoraArguments, args.PPOConfig)

    def parsed(more: str) -> args.PPOConfig:
        return args.parse(*kinds, argv=f"{line} {more}".split())[3]

    served = parsed("--use_lora True --rollout_url http://x/v1")
    assert served.rollout_importance_cap == 3 and served.reads_old_logps
    assert (
        parsed("--use_lora True --rollout_url http://x/v1 --vllm_importance_sampling_cap 2").rollout_importance_cap == 2
    )
    for more, message in {
        "--use_lora True --rollout_url http://x/v1 --use_dora True": "--use_dora makes an adapter that vLLM does not serve",
        "--use_lora True --rollout_url http://x/v1 --modules_to_save lm_head": "--modules_to_save makes an adapter",
        "--use_lora True --q_lora True --rollout_url http://x/v1 --init_lora_weights loftq": "--init_lora_weights loftq belongs to a rounded",
        "--rollout_url http://x/v1": r"needs --use_lora True: the server gets an adapter in every update",
        "--rollout_importance_cap 2": "need --rollout_url",
        "--rollout_timeout 5": "need --rollout_url",
        "--use_lora True --rollout_url http://x/v1 --rollout_timeout 0": "--rollout_timeout is above 0",
        "--use_lora True --rollout_url http://x/v1 --rollout_importance_cap .5": "is 1 or more, or 0",
    }.items():
        with pytest.raises(InputError, match=message):
            parsed(more)
    with pytest.raises(InputError, match="--rollout_url x:8000 is not an address"):
        train(tmp_path, llava, pairs_json, image_dir, "--rollout_url x:8000")
    monkeypatch.setattr(args.PPOConfig, "world_size", 2)
    with pytest.raises(InputError, match=r"--rollout_timeout 900 lets one process wait .*: add --ddp_timeout 1950"):
        parsed("--use_lora True --rollout_url http://x/v1 --rollout_timeout 900")


# ---------------------------------------------------------------------------------------------------------------------
# The server of these tests is held to vLLM
# ---------------------------------------------------------------------------------------------------------------------


def same_form(found: dict, recorded: dict) -> None:
    """A step of a transcript is the recorded one: status, refusals word by word, prompts and greedy answers token by token, log-probs nearly."""
    name, theirs = recorded["name"], recorded["reply"]
    ours = found["reply"]
    assert (found["name"], found["body"], found["status"]) == (name, recorded["body"], recorded["status"])
    if isinstance(theirs, str):
        assert ours == theirs
    elif "error" in theirs:
        assert ours["error"]["message"] == theirs["error"]["message"]
    else:
        assert ours.keys() <= theirs.keys() and ours["usage"].items() <= theirs["usage"].items()
        assert ours["prompt_token_ids"] == theirs["prompt_token_ids"]
        assert _numbers(ours.get("prompt_logprobs")) == pytest.approx(_numbers(theirs["prompt_logprobs"]), abs=1e-3)
        for one, other in zip(ours["choices"], theirs["choices"], strict=True):
            assert one.keys() <= other.keys()
            if recorded["body"]["temperature"] == 0:  # samples come from random numbers of its own
                assert (one["token_ids"], one["finish_reason"]) == (other["token_ids"], other["finish_reason"])
                logps = [[token["logprob"] for token in c["logprobs"]["content"]] for c in (one, other)]
                assert logps[0] == pytest.approx(logps[1], abs=1e-3)
                assert one["message"]["content"] == other["message"]["content"]


def _numbers(prompt_logps: list | None) -> list[float]:
    return [entry["logprob"] for of in prompt_logps or [] if of is not None for entry in of.values()]


def test_the_server_of_these_tests_answers_as_vllm_did(tmp_path: Path) -> None:
    checkpoint = str(zoo.build("llava", tmp_path / "llava", width=128, heads=2))
    tiny = TinyServer(checkpoint)

    def ask(path: str, body: dict) -> tuple[int, object]:
        reply = tiny.route(f"/v1/{path}", body)
        status, reply = reply if isinstance(reply, tuple) else (200, reply)
        return status, reply.decode() if isinstance(reply, bytes) else reply

    tiny.close()
    for one, recorded in zip(transcript(ask, checkpoint, tmp_path), json.loads(RECORDED.read_text()), strict=True):
        same_form(one, recorded)
