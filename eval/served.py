"""A model on an inference server (--url of eval.generate): answers, and losses of given answers where the server gives log-probs.

With the served checkpoint's processor its prompts are compared with what the server has read, by tokens or by their number; without one (a hosted
model) nothing is known of them.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from base.images import ImageSource, png
from base.processor import VLProcessor
from common.errors import InputError
from common.openai_client import Answer, Body, ChatReply, OpenAIClient, chat_body, data_url
from data.rows import IMAGE_MARK
from eval.benchmark_files import Row, with_image_marks


class ServedModel:
    """A model by its name on a server.

    Args:
        name: on the server; None is the first one that it lists.
        processor: of the checkpoint that is served.
        at_once: requests.
    """

    def __init__(self, url: str, name: str | None, processor: VLProcessor | None, at_once: int) -> None:
        self.client = OpenAIClient(url, at_once=at_once)
        self.model = name or self.client.served_model()
        self.processor = processor

    def _asked(
        self, text: str, images: Sequence[ImageSource]
    ) -> tuple[list[dict[str, Any]], list[int], dict[str, Any]]:
        """Messages as the server takes them, our token ids of the prompt ([] without a processor), and further fields."""
        messages = [{"role": "user", "content": with_image_marks(text, len(images))}]
        if self.processor is None:
            return plain_messages(messages[0]["content"], images), [], {}
        ((ids,), _) = self.processor.encode_conversations([messages], [images])
        return self.processor.api_messages(messages, images), ids, self.processor.api_fields(messages, ids)

    def _check(self, reply: ChatReply, ids: Sequence[int], row: Row) -> None:
        if self.processor is not None:
            self.processor.check_served_prompt(reply, ids, f"row '{row['id']}'", self.client.shown_url)

    # -- answers -------------------------------------------------------------------------------------------------------

    def answers(
        self, rows: Sequence[tuple[int, Row]], settings: dict[str, Any], done: Callable[[Row, list[str]], None]
    ) -> None:
        """Answer rows.

        Args:
            rows: with the number of each, which with the seed of `settings` decides its answers.
            settings: of `served_settings`.
            done: called with a row and its answers, as they come.
        """
        prompts: dict[int, list[int]] = {}

        def bodies() -> Iterator[Body]:
            for at, (n, row) in enumerate(rows):
                messages, prompts[at], fields = self._asked(row["prompt"], row["images"])
                yield chat_body(self.model, messages, **_fields(settings, n), **fields)

        def keep(at: int, reply: ChatReply) -> None:
            row = rows[at][1]
            self._check(reply, prompts.pop(at), row)
            done(row, [self._text(answer) for answer in reply.answers])

        self.client.chat_all(bodies(), keep, settings.get("num_samples", 1))

    def _text(self, answer: Answer) -> str:
        if self.processor is None or answer.token_ids is None:
            return answer.text.strip()
        return self.processor.decode_response(answer.token_ids)

    # -- losses of given answers ---------------------------------------------------------------------------------------

    def choice_losses(self, rows: Sequence[Row], done: Callable[[Row, list[float]], None]) -> None:
        """Mean loss over each choice's tokens, end token included, in nats: {"choices": letter -> text} of every row.

        Of the prompt with the choice in it vLLM gives the log-prob of every token (`prompt_logprobs`); the end token is all that it may sample.

        Raises:
            InputError: there is no processor, the answers of the checkpoint end in several tokens, or the server gives no such log-probs.
        """
        processor = self.processor
        if processor is None:
            raise InputError(
                "--likelihood with --url needs --model_name_or_path, the checkpoint that is served: its tokens are compared."
            )
        if len(end := processor.template.answer_end_ids) != 1:
            raise InputError(
                f"--likelihood with --url needs answers that end in one token, not in {len(end)}: leave --url out."
            )
        pairs = [(row, choice) for row in rows for choice in row["choices"].values()]
        prompts: dict[int, tuple[list[int], int]] = {}
        found: dict[int, float] = {}

        def bodies() -> Iterator[Body]:
            for at, (row, choice) in enumerate(pairs):
                messages, ids, fields = self._asked(row["bare_question"], row["images"])
                prompts[at] = [*ids, *processor.encode_response(choice)[:-1]], len(ids)
                messages.append({"role": "assistant", "content": choice})
                fields |= {"continue_final_message": True, "add_generation_prompt": False, "prompt_logprobs": 0}
                yield chat_body(self.model, messages, max_tokens=1, allowed_token_ids=end, **fields)

        def keep(at: int, reply: ChatReply) -> None:
            row = pairs[at][0]
            ids, start = prompts.pop(at)
            self._check(reply, ids, row)
            logps = _logps(reply, start, self.client.shown_url)
            found[at] = -sum(logps) / len(logps)
            first = next(n for n, (other, _) in enumerate(pairs) if other is row)
            places = range(first, first + len(row["choices"]))
            if all(place in found for place in places):
                done(row, [found[place] for place in places])

        self.client.chat_all(bodies(), keep)


def _logps(reply: ChatReply, start: int, url: str) -> list[float]:
    """Of the prompt's tokens from `start` on, and of the end token."""
    said, end = reply.prompt_logps, reply.answers[0].logps
    if said is None or not end:
        raise InputError(
            f"--likelihood: {url} gives no log-probs of prompts (prompt_logprobs, return_token_ids): take vLLM, or leave --url out."
        )
    if end[0] == 0:  # the only token that could be sampled, after the others were taken out
        raise InputError(
            f"--likelihood: {url} gives log-probs after sampling's changes: start vLLM without --logprobs-mode."
        )
    return [logp for logp in said[start:] if logp is not None] + end


def plain_messages(text: str, images: Sequence[ImageSource]) -> list[dict[str, Any]]:
    """A question as a model takes it of which no template is known: pictures at their marks, without marks in front."""
    if images and IMAGE_MARK not in text:
        text = IMAGE_MARK * len(images) + text
    pictures = iter(images)
    content: list[dict[str, Any]] = []
    for n, piece in enumerate(text.split(IMAGE_MARK)):
        if n:
            content.append({"type": "image_url", "image_url": {"url": data_url(png(next(pictures)))}})
        if piece:
            content.append({"type": "text", "text": piece})
    return [{"role": "user", "content": content}]


def served_settings(args: argparse.Namespace, served: ServedModel) -> dict[str, Any]:
    """How answers are generated, as it is recorded. Flags come first, then greedy search; --checkpoint_settings leaves the rest to the server.

    Raises:
        InputError: beams, or several greedy answers.
    """
    temperature = args.temperature or 0.0
    if (args.num_beams or 1) > 1:
        raise InputError("--num_beams is nothing that a server takes: leave it out, or leave --url out.")
    if args.top_p is not None and not temperature:
        raise InputError("--top_p belongs to sampling: add --temperature, above 0.")
    if args.num_samples < 1 or (args.num_samples > 1 and not temperature):
        raise InputError(f"--num_samples {args.num_samples} needs --temperature above 0: the answers would be equal.")
    settings = {
        "served_model": served.model,
        "max_new_tokens": args.max_new_tokens or 1024,
        "do_sample": temperature > 0,
        "checkpoint_settings": args.checkpoint_settings,
    }
    if temperature:
        settings |= {"temperature": temperature, "top_p": args.top_p or 1.0, "seed": args.seed}
    return settings | ({"num_samples": args.num_samples} if args.num_samples > 1 else {})


def choice_settings(served: ServedModel) -> dict[str, Any]:
    """As `served_settings`, of `choice_losses`."""
    return {"likelihood": True, "choice": "{text}", "served_model": served.model}


def _fields(settings: dict[str, Any], n: int) -> dict[str, Any]:
    """Of a request for row number n."""
    fields: dict[str, Any] = {"max_tokens": settings["max_new_tokens"], "num_answers": settings.get("num_samples", 1)}
    fields |= {"temperature": settings.get("temperature", 0.0), "top_p": settings.get("top_p", 1.0)}
    if "seed" in settings:
        fields["seed"] = settings["seed"] + n
    if not settings["checkpoint_settings"]:  # servers take them from generation_config.json
        fields |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    return fields
