"""vLLM's protocol over a tiny checkpoint, in this process: chat completions with pictures, adapters that are loaded while it runs.

Written with transformers and peft alone, so that what the project computes is compared with another program; tests/test_server_rollouts.py holds
its replies to those recorded from vLLM 0.32 (tests/goldens/server).
"""

import base64
import copy
import io
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.fake_server import FakeServer


class TinyServer(FakeServer):
    """Serves `checkpoint` as "tiny".

    Attributes:
        refuses: what is wrong with every adapter; None takes them.
        ignores_adapters: answer as the base, whatever adapter is named.
        gives_tokens: whether token ids and log-probs are in the replies.
        loaded: names of the adapters, as they were loaded.
    """

    def __init__(self, checkpoint: str) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        base = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.adapters: dict[str, Any] = {}  # name -> the base with that adapter merged
        self.base: Any = base
        self.refuses: str | None = None
        self.ignores_adapters, self.gives_tokens = False, True
        self.loaded: list[str] = []
        super().__init__(self.route)

    def forget(self) -> None:
        """What a restart does."""
        self.adapters.clear()

    def route(self, path: str, body: dict) -> Any:
        """The reply to a POST."""
        with self.lock:
            if path == "/v1/load_lora_adapter":
                return self.load(body["lora_name"], body["lora_path"])
            if path == "/v1/unload_lora_adapter":
                return self.unload(body["lora_name"])
            return self.chat(body)

    # -- adapters ------------------------------------------------------------------------------------------------------

    def load(self, name: str, path: str) -> Any:
        if name in self.adapters:
            said = f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."
            return error(400, said, "InvalidUserInput")
        if self.refuses is not None:
            return error(500, self.refuses, "InternalServerError")
        if not Path(path, "adapter_config.json").is_file():
            return error(404, f"Loading lora {name} failed: No adapter found for <path>", "NotFoundError")
        self.adapters[name] = PeftModel.from_pretrained(copy.deepcopy(self.base), path).merge_and_unload().eval()
        self.loaded.append(name)
        return f"Success: LoRA adapter '{name}' added successfully.".encode()

    def unload(self, name: str) -> Any:
        if name not in self.adapters:
            return error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        del self.adapters[name]
        return f"Success: LoRA adapter '{name}' removed successfully.".encode()

    # -- answers -------------------------------------------------------------------------------------------------------

    def chat(self, body: dict) -> Any:
        if body["model"] not in {"tiny", *self.adapters}:
            aliases = ", ".join(["tiny", *sorted(self.adapters)])
            return error(404, f"The model `{body['model']}` does not exist. Valid aliases: {aliases}.", "NotFoundError")
        inputs = self.inputs(body)
        (prompt,) = inputs["input_ids"].tolist()
        model = self.base if self.ignores_adapters else self.adapters.get(body["model"], self.base)
        answers = self.answers(model, inputs, body)
        tokens = sum(len(ids) for ids, _ in answers)
        reply = {
            "object": "chat.completion",
            "model": body["model"],
            "choices": [self.choice(n, ids, logps, body) for n, (ids, logps) in enumerate(answers)],
            "usage": {"prompt_tokens": len(prompt), "total_tokens": len(prompt) + tokens, "completion_tokens": tokens},
        }
        if "prompt_logprobs" in body:
            reply["prompt_logprobs"] = self.prompt_logps(model, inputs)
        return reply | ({"prompt_token_ids": prompt} if self.gives_tokens and body.get("return_token_ids") else {})

    def inputs(self, body: dict) -> Any:
        """As vLLM: the template's text, with <s> in front of it only where it is asked for."""
        messages, pictures = [], []
        for message in body["messages"]:
            parts = []
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "image_url":
                    data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
                    pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
                parts.append({"type": "image"} if part["type"] == "image_url" else part)
            messages.append({"role": message["role"], "content": parts})
        text = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=body.get("add_generation_prompt", True),
            continue_final_message=body.get("continue_final_message", False),
        )
        return self.processor(
            text=text,
            images=pictures or None,
            return_tensors="pt",
            add_special_tokens=bool(body.get("add_special_tokens")),
        )

    @torch.no_grad()
    def answers(self, model: Any, inputs: Any, body: dict) -> list[tuple[list[int], list[float]]]:
        """Token ids and log-probs, which vLLM takes before temperature and bias."""
        ends = {self.base.config.text_config.eos_token_id, *body.get("stop_token_ids", [])}
        found = []
        for n in range(body["n"]):
            generator = torch.Generator().manual_seed(body.get("seed", 0) + n)
            ids, logps, given = [], [], dict(inputs)
            while len(ids) < body["max_tokens"] and not ends.intersection(ids):
                logits = model(**given).logits[0, -1]
                biased = logits.clone()
                if allowed := body.get("allowed_token_ids"):
                    biased = torch.full_like(logits, -torch.inf).scatter(0, torch.tensor(allowed), 0.0)
                for token, bias in body.get("logit_bias", {}).items():
                    biased[int(token)] += bias
                token = int(biased.argmax())
                if body["temperature"]:
                    token = int(torch.multinomial((biased / body["temperature"]).softmax(-1), 1, generator=generator))
                ids.append(token)
                logps.append(float(logits.log_softmax(-1)[token]))
                longer = torch.tensor([[*inputs["input_ids"][0].tolist(), *ids]])
                given |= {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
            found.append((ids, logps))
        return found

    @torch.no_grad()
    def prompt_logps(self, model: Any, inputs: Any) -> list[dict | None]:
        """Of every token but the first."""
        ids = inputs["input_ids"][0]
        logps = model(**inputs).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0].tolist()
        return [None] + [
            {str(id): {"logprob": logp, "rank": 1, "decoded_token": ""}}
            for id, logp in zip(ids[1:].tolist(), logps, strict=True)
        ]

    def choice(self, n: int, ids: list[int], logps: list[float], body: dict) -> dict:
        ended = len(ids) < body["max_tokens"] or ids[-1] == self.base.config.text_config.eos_token_id
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        found: dict[str, Any] = {
            "index": n,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop" if ended else "length",
            "logprobs": None,
        }
        if self.gives_tokens and body.get("logprobs"):
            content = [{"token": f"token_id:{id}", "logprob": x} for id, x in zip(ids, logps, strict=True)]
            found |= {"logprobs": {"content": content}, "token_ids": ids}
        return found


def error(status: int, message: str, kind: str) -> tuple[int, dict]:
    """vLLM's."""
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}
