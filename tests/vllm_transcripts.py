"""What vLLM answers to the requests that this project makes: asked anew by `make test-server`, stored in tests/goldens/server, played by TinyServer.

    python -m tests.vllm_transcripts http://127.0.0.1:8000/v1 CHECKPOINT FOLDER > tests/goldens/server/vllm-0.32.0.json

CHECKPOINT is `zoo.build("llava", CHECKPOINT, width=128, heads=2)`, served as "tiny" (tests/test_vllm.py says how); FOLDER takes the adapter.
"""

import common.compat  # noqa: F401  isort: skip  (must come before transformers)
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from base.loading import load_model
from common.openai_client import Body, OpenAIClient, Refused, chat_body
from models import core_mapper_for
from tests import zoo

QUESTION = [{"role": "user", "content": "What is in this image?"}]
CHOICE = "a red square"
CHANGING = ("id", "created", "system_fingerprint")  # of a reply


def adapter(checkpoint: str, folder: Path) -> Path:
    """A LoRA adapter on the checkpoint that changes its answers; the same one everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = get_peft_model(
            load_model(checkpoint, dtype=torch.float32),
            LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)"),
        )
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def requests(checkpoint: str, folder: Path) -> list[tuple[str, str, Body]]:
    """(name, path, body) of every request, in an order that matters."""
    processor = core_mapper_for(checkpoint).processor(checkpoint)
    image = folder / "image.png"
    zoo.image(0).save(image)
    messages = processor.api_messages(QUESTION, [str(image)])
    ids = processor.encode_conversations([QUESTION], [[str(image)]])[0][0]
    fields = processor.api_fields(QUESTION, ids)

    def chat(model: str = "tiny", **more: Any) -> Body:
        return chat_body(model, messages, **{"max_tokens": 6, **fields, **more})

    likelihood = chat_body(
        "tiny",
        [*messages, {"role": "assistant", "content": CHOICE}],
        max_tokens=1,
        continue_final_message=True,
        add_generation_prompt=False,
        prompt_logprobs=0,
        allowed_token_ids=processor.template.answer_end_ids,
        **fields,
    )
    load = {"lora_name": "policy", "lora_path": str(folder / "adapter")}
    sampling: dict[str, Any] = {"temperature": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    return [
        ("greedy", "chat/completions", chat()),
        ("without <s>", "chat/completions", chat(add_special_tokens=False)),
        ("two samples", "chat/completions", chat(num_answers=2, seed=3, stop_token_ids=[2], logit_bias={"4": -100}, **sampling)),
        ("likelihood", "chat/completions", likelihood),
        ("another model", "chat/completions", chat("policy")),
        ("an adapter that is not there", "load_lora_adapter", load | {"lora_path": str(folder / "nothing")}),
        ("an adapter", "load_lora_adapter", load),
        ("again", "load_lora_adapter", load),
        ("greedy with the adapter", "chat/completions", chat("policy")),
        ("unload", "unload_lora_adapter", {"lora_name": "policy"}),
        ("unload again", "unload_lora_adapter", {"lora_name": "policy"}),
    ]  # fmt: skip


def transcript(ask: Callable[[str, Body], tuple[int, Any]], checkpoint: str, folder: Path) -> list[dict[str, Any]]:
    """{name, path, body, status, reply} of every request; `ask` gives status and reply. FOLDER stands for the folder."""
    adapter(checkpoint, folder)
    found = []
    for name, path, body in requests(checkpoint, folder):
        status, reply = ask(path, body)
        if isinstance(reply, dict):
            reply = {key: value for key, value in reply.items() if key not in CHANGING}
        found.append({"name": name, "path": path, "body": body, "status": status, "reply": reply})
    return json.loads(json.dumps(found).replace(str(folder), "FOLDER"))


def of_server(url: str) -> Callable[[str, Body], tuple[int, Any]]:
    """`ask` for `transcript`."""
    client = OpenAIClient(url, attempts=1)

    def ask(path: str, body: Body) -> tuple[int, Any]:
        try:
            response = client.post(path, body, lambda response: response)
        except Refused as error:
            return error.status, {"error": {"message": error.said}}
        json_reply = "json" in response.headers.get("Content-Type", "")
        return response.status_code, response.json() if json_reply else response.text

    return ask


if __name__ == "__main__":
    url, checkpoint, folder = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    print(json.dumps(transcript(of_server(url), checkpoint, Path(folder)), indent=1))
