"""A checkpoint's chat template: what it writes for an image, before an answer and after it, found out by rendering it.

Conversations are cut at the assistant's turns, so that the template's text and the answers are tokenised once each and
labels cover the answers exactly.
"""

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from common.errors import InputError
from data.rows import IMAGE_MARK

Messages = list[dict[str, Any]]

# Stand for a user's and an assistant's text while a template is rendered
_QUESTION, _ANSWER = "\N{WORD JOINER}QUESTION\N{WORD JOINER}", "\N{WORD JOINER}ANSWER\N{WORD JOINER}"


class ChatTemplate:
    """The chat template of one checkpoint.

    Attributes:
        image_token: what the native processor replaces by an image's tokens, once per image in a rendered text.
        image_placeholder: all that the template writes for one image, `<|vision_start|><|image_pad|><|vision_end|>`
            for example.
        answer_end: the token, or tokens, behind an answer.
    """

    def __init__(self, native: ProcessorMixin, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Args:
            native: the checkpoint's transformers processor, which renders the template.
        """
        self._native, self._tokenizer = native, tokenizer
        self.image_token = str(getattr(native, "image_token", None) or IMAGE_MARK)  # InstructBLIP has an AddedToken
        user = {"role": "user", "content": [_text(_QUESTION)]}
        answer = {"role": "assistant", "content": [_text(_ANSWER)]}
        plain, prompt = self.render([user]), self.render([user], add_generation_prompt=True)
        before, after = self.render([user, answer]).split(_ANSWER)
        self.image_placeholder = self._read_image_placeholder(plain)
        # What a generation prompt leaves to the model to write first: an empty block of thoughts, for example.
        self._answer_lead = before[len(prompt) :] if before.startswith(prompt) else ""
        # What stands between a user turn and an answer, in a rendered conversation and in a generation prompt: in some
        # templates it is not the same.
        self._headers = (before.removeprefix(plain), prompt.removeprefix(plain))

        end = self._read_end(after)
        # A template without an end token (LLaVA-1.5) gets the EOS token in place of the white space at the end.
        self._writes_end = bool(end)
        self._answer_tail = "" if end else after  # LLaVA-NeXT's template misprints its end token
        end = end or [tokenizer.eos_token]
        self.answer_end = "".join(end)
        self._answer_end_ids: list[int] = tokenizer.convert_tokens_to_ids(end)  # type: ignore[assignment]

        # Tokenizers with a dummy prefix (SentencePiece) read the start of a text as the start of a word: tokenise
        # answers behind the end of the generation prompt, as the model sees them. Others split the same way without it.
        dummy_prefix = tokenizer.tokenize("a")[:1] in (["▁a"], ["▁"])
        self._anchor = prompt.rstrip()[-1:] if dummy_prefix and prompt.rstrip()[-1:] not in (">", "") else ""
        self._anchor_ids = tokenizer(self._anchor, add_special_tokens=False).input_ids if self._anchor else []

    def _read_image_placeholder(self, plain: str) -> str:
        """What the template writes for an image, given a rendered question without one."""

        def question(images: int) -> str:
            return self.render([{"role": "user", "content": [{"type": "image"}] * images + [_text(_QUESTION)]}])

        # Some templates write more than the placeholder for the first image, or less without one.
        one = question(1)
        return _inserted(plain, one, self.image_token) or _inserted(one, question(2), self.image_token) or IMAGE_MARK

    def _read_end(self, after: str) -> list[str]:
        """The tokens that end an answer: the added tokens behind it, up to the last special one.

        Gemma's line breaks are added tokens as well, and belong to the template; Cohere's answers end in two tokens, of
        which only the second need be special.
        """
        added = sorted(self._tokenizer.get_added_vocab(), key=len, reverse=True)
        special = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        special.update(self._tokenizer.all_special_tokens)
        one = "|".join(map(re.escape, added))
        behind = re.match(rf"\s*((?:{one})+)", after)
        tokens = re.findall(one, behind.group(1)) if behind else []
        while tokens and tokens[-1] not in special:
            tokens.pop()
        return tokens

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The template's text for messages whose contents are parts.

        Raises:
            InputError: the template refuses the conversation.
        """
        try:
            return self._native.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except TemplateError as error:  # what a template says of roles or images that its model does not take
            raise InputError(f"The chat template refuses a conversation: {error}.") from error

    def as_parts(self, messages: Messages, images: int | None) -> Messages:
        """Messages with contents as parts; `<image>` marks (or the family's placeholder) become image parts.

        When no mark stands anywhere, the images go in front of the first user turn.

        Raises:
            InputError: `images` is given and differs from the number of marks.
        """
        marks = re.compile(rf"\n*(?:{re.escape(self.image_placeholder)}|{re.escape(IMAGE_MARK)})\n*")
        converted = []
        for message in messages:
            content = message["content"]
            if isinstance(content, str):
                pieces = [content] if message["role"] == "assistant" else marks.split(content)
                content = []
                for n, piece in enumerate(pieces):
                    content += [{"type": "image"}] * (n > 0) + [_text(piece)] * bool(piece)
            converted.append({"role": message["role"], "content": [_clean_part(part) for part in content]})
        found = sum(part["type"] == "image" for message in converted for part in message["content"])
        if images and found == 0:
            first = next(m for m in converted if m["role"] == "user")
            first["content"] = [{"type": "image"}] * images + first["content"]
        elif images is not None and found != images:
            raise InputError(
                f"A conversation has {found} image mark(s) for {images} image(s): make their numbers equal."
            )
        return converted

    def split(self, messages: Messages) -> tuple[list[str], list[str]]:
        """Cut a conversation's text at its answers: n + 1 pieces of template around n answers (without end)."""
        answers: list[str] = []
        masked = []
        for message in messages:
            if message["role"] == "assistant":
                answers.append("".join(part.get("text", "") for part in message["content"]))
                message = {"role": "assistant", "content": [_text(_ANSWER)]}
            masked.append(message)
        pieces = self.render(masked).split(_ANSWER)
        for n in range(len(answers)):
            # Earlier answers have another header in some templates (without the block of thoughts): it stays.
            if pieces[n].endswith(self._headers[0]):
                pieces[n] = pieces[n].removesuffix(self._headers[0]) + self._headers[1]
                answers[n] = self._answer_lead + answers[n]
            after = pieces[n + 1].removeprefix(self._answer_tail).lstrip()
            pieces[n + 1] = after.removeprefix(self.answer_end) if self._writes_end else after
        return [*pieces[:-1], ""] if not pieces[-1].strip() else pieces, answers

    def unused_token(self, skeletons: Sequence[Sequence[str]]) -> tuple[str, int]:
        """A special token, and its id, that stands in none of the pieces of `split`.

        It marks where the answers go while the native processor runs.

        Raises:
            InputError: the texts hold every special token.
        """
        taken = {self.image_token, IMAGE_MARK}
        for token_id, token in self._tokenizer.added_tokens_decoder.items():
            usable = token.special and not (token.lstrip or token.rstrip) and token.content not in taken
            usable = usable and token_id != self._tokenizer.bos_token_id
            if usable and not any(token.content in piece for pieces in skeletons for piece in pieces):
                return token.content, token_id
        raise InputError("A conversation holds every special token of the tokenizer as text: remove them from the row.")

    def encode_response(self, text: str, ended: bool = True) -> list[int]:
        """Token ids of an answer behind a generation prompt, end token included.

        The text follows what the template lets the model write first, such as an empty block of thoughts.

        Args:
            ended: False for an answer that was cut off: without the end, unless nothing else would be left.
        """
        ids = self.encode_answer(self._answer_lead + text)
        return ids if ended else ids[: len(ids) - len(self._answer_end_ids)] or ids

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of a generated answer: without special tokens, without its end and without white space around it."""
        kept = [token for token in ids if token not in self._answer_end_ids]  # some are not special
        return str(self._tokenizer.decode(kept, skip_special_tokens=True)).strip()

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer as `split` returns it, end token included."""
        ids = self._tokenizer(self._anchor + text, add_special_tokens=False).input_ids
        if ids[: len(self._anchor_ids)] == self._anchor_ids:
            return ids[len(self._anchor_ids) :] + self._answer_end_ids
        # The answer's first characters merge with the anchor; in generation they cannot.
        return self._tokenizer(text, add_special_tokens=False).input_ids + self._answer_end_ids


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _clean_part(part: dict[str, Any]) -> dict[str, Any]:
    # datasets fills missing keys with None, and some templates test for the key alone.
    return {"type": "image"} if part["type"] == "image" else _text(part["text"])


def _inserted(text: str, longer: str, token: str) -> str | None:
    """What makes `longer` out of `text` by insertion in one place, if it holds the whole `token`."""
    n = len(longer) - len(text)
    for start in reversed(range(len(text) + 1)):  # the image first, the line break that belongs to it last
        piece = longer[start : start + n]
        if token in piece and longer[:start] == text[:start] and longer[start + n :] == text[start:]:
            return piece
    return None
