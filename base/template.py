"""A checkpoint's chat template: what it writes for an image, before an answer and after it, found out by rendering it.

Conversations are cut at the assistant's turns, so that the template's text and the answers are tokenised once each and
labels cover the answers exactly.
"""

import datetime
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from common.errors import InputError
from data.rows import IMAGE_MARK, VIDEO_MARK

Messages = list[dict[str, Any]]

# Stand for a user's and an assistant's text while a template is rendered. No string literal holds them as they are.
_QUESTION, _ANSWER = (f'\N{WORD JOINER}{word}"\N{WORD JOINER}' for word in ("QUESTION", "ANSWER"))
# Names under which templates read whether to think, and the date
_THINKING, _DATE = "enable_thinking", "strftime_now"
# What templates do to the white space around an answer
_STRIPS: tuple[Callable[[str], str], ...] = (
    str,
    str.strip,
    str.lstrip,
    str.rstrip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
)


class ChatTemplate:
    """The chat template of one checkpoint.

    Attributes:
        image_token: what the native processor replaces by an image's tokens, once per image in a rendered text.
        image_placeholder: all that the template writes for one image, `<|vision_start|><|image_pad|><|vision_end|>`
            for example.
        video_token: the same for a video; None where the native processor has none.
        answer_end, answer_end_ids: the token, or tokens, behind an answer.
    """

    def __init__(
        self,
        native: ProcessorMixin,
        tokenizer: PreTrainedTokenizerBase,
        *,
        enable_thinking: bool = False,
        date: datetime.date | None = None,
        stops: Collection[int] = (),
    ) -> None:
        """
        Args:
            native: the checkpoint's transformers processor, which renders the template.
            enable_thinking: for templates with that switch, whether prompts let the model think before it answers.
            date: for templates that print the day's date; today by default.
            stops: ids of the tokens at which the checkpoint stops generating.

        Raises:
            InputError: the template has no such switch, prints no question, or changes answers.
        """
        self._native, self._tokenizer = native, tokenizer
        template: Any = native.chat_template
        source = str(template["default"] if isinstance(template, dict) else template)
        self.source = source
        if enable_thinking and _THINKING not in source:
            raise InputError(f"--{_THINKING} does nothing here: the chat template has no such switch. Leave it out.")
        day = datetime.datetime.combine(date or datetime.datetime.now().date(), datetime.time())
        self._variables = {_THINKING: enable_thinking} if _THINKING in source else {}
        self._rendered_source = _date_macro(day) + source if _DATE in source else source
        # What of a run, beside its data, decides what prompts say
        self.facts: dict[str, Any] = {_THINKING: enable_thinking} if _THINKING in source else {}
        self.facts |= {"date": day.date().isoformat()} if _DATE in source else {}
        self._as_strings: set[str] = set()
        for role in ("user", "system", "assistant"):  # one after the other: a template may want strings everywhere
            self._as_strings |= {role} if self._wants_string(role) else set()

        self.image_token = str(getattr(native, "image_token", None) or IMAGE_MARK)  # InstructBLIP has an AddedToken
        self.video_token: str | None = getattr(native, "video_token", None)
        plain, prompt = self._apply([_USER]), self._apply([_USER], add_generation_prompt=True)
        answered = self._apply([_USER, _assistant(_ANSWER)]).split(_ANSWER)
        if len(answered) != 2 or _QUESTION not in prompt:
            raise InputError("The chat template does not print a question and its answer once each: correct it.")
        before, after = answered
        self.image_placeholder = self._read_image_placeholder(plain)
        # What a generation prompt leaves to the model to write first: a space, or the end of an empty block of thoughts.
        self._answer_lead = _lead(before, prompt)
        # What stands between a user turn and an answer in a conversation, if it is the generation prompt and the lead.
        self._answer_header = before.removeprefix(plain) if self._answer_lead else None
        self._strip = self._read_strip(before, after)
        self._thinks = enable_thinking
        self._thoughts = self._read_thoughts()

        end = self._read_end(after) or self._read_next_turn(stops)
        # A template without an end token (LLaVA-1.5) gets the EOS token in place of the white space at the end.
        self._writes_end = bool(end)
        self._answer_tail = "" if end else after  # LLaVA-NeXT's template once misprinted its end token
        end = end or [tokenizer.eos_token]
        self.answer_end = "".join(end)
        self.answer_end_ids: list[int] = tokenizer.convert_tokens_to_ids(end)  # type: ignore[assignment]

        # Tokenizers with a dummy prefix (SentencePiece) read the start of a text as the start of a word: tokenise
        # answers behind the end of the generation prompt, as the model sees them. Others split the same way without it.
        dummy_prefix = tokenizer.tokenize("a")[:1] in (["▁a"], ["▁"])
        self._anchor = prompt.rstrip()[-1:] if dummy_prefix and prompt.rstrip()[-1:] not in (">", "") else ""
        self._anchor_ids = tokenizer(self._anchor, add_special_tokens=False).input_ids if self._anchor else []

    # -- what the template does, read from what it renders -------------------------------------------------------------

    def _wants_string(self, role: str) -> bool:
        """Whether the template prints the text of a message only where its content is a string.

        Given parts, such a template prints them as Python source or JSON, in which the probe's characters are escaped.
        """
        probe = _text(_QUESTION)
        messages = {
            "user": [{"role": "user", "content": [probe]}],
            "system": [{"role": "system", "content": [probe]}, {"role": "user", "content": [_text("a")]}],
            "assistant": [{"role": "user", "content": [_text("a")]}, _assistant(_QUESTION)],
        }[role]

        def prints(as_strings: set[str]) -> bool:
            self._as_strings, before = as_strings, self._as_strings
            try:
                return _QUESTION in self._apply(messages)
            except (
                InputError,
                TypeError,
                ValueError,
                LookupError,
                AttributeError,
            ):  # whatever Jinja makes of a wrong type
                return False
            finally:
                self._as_strings = before

        return not prints(self._as_strings) and prints(self._as_strings | {role})

    def _read_strip(self, before: str, after: str) -> Callable[[str], str]:
        """What the template does to white space around an answer."""
        padded = f"\n {_ANSWER} \n"
        rendered = self._apply([_USER, _assistant(padded)])
        for strip in _STRIPS:
            if rendered == before + strip(padded) + after:
                return strip
        raise InputError(
            "The chat template changes the text of answers: correct it, so that they are printed as they are."
        )

    def _read_thoughts(self) -> tuple[str, str] | None:
        """The marks around thoughts, `<think>` and `</think>`, of a template whose prompts open a block of them."""
        if _THINKING not in self._variables:
            return None
        prompt = self._apply([_USER], add_generation_prompt=True, **{_THINKING: True})
        answer = self._apply([_USER, _assistant(_ANSWER)], **{_THINKING: True})
        close = _lead(answer.split(_ANSWER)[0], prompt).strip()
        return (prompt.split()[-1], close) if close else None

    def _read_image_placeholder(self, plain: str) -> str:
        """What the template writes for an image, given a rendered question without one."""

        def question(images: int) -> str:
            return self._apply([{"role": "user", "content": [{"type": "image"}] * images + [_text(_QUESTION)]}])

        # Some templates write more than the placeholder for the first image, or less without one.
        try:
            one = question(1)
        except InputError as error:
            raise InputError(
                "The chat template takes no images, as those of text models: put the template of the model's family into "
                "chat_template.jinja."
            ) from error
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

    def _read_next_turn(self, stops: Collection[int]) -> list[str]:
        """The token that the next turn begins with, if the checkpoint stops there: `<|user|>` of GLM-4.1V.

        Molmo2's template writes the end of an answer with the next question.
        """
        try:
            behind = self._apply([_USER, _assistant(_ANSWER), _USER]).split(_ANSWER)[-1]
        except InputError:  # PaliGemma's conversations have one turn
            return []
        first = self._read_end(behind)[:1]
        stops = {*stops, self._tokenizer.eos_token_id}
        return [token for token in first if self._tokenizer.convert_tokens_to_ids(token) in stops]

    # -- rendering -----------------------------------------------------------------------------------------------------

    def _apply(self, messages: Messages, add_generation_prompt: bool = False, **variables: Any) -> str:
        """What the template itself prints for messages whose contents are parts."""
        given = [
            {"role": m["role"], "content": "".join(part["text"] for part in m["content"])}
            if m["role"] in self._as_strings and all(part["type"] == "text" for part in m["content"])
            else m
            for m in messages
        ]
        try:
            return self._native.apply_chat_template(
                given,
                chat_template=self._rendered_source,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._variables | variables,
            )
        except (
            TemplateError,
            TypeError,
        ) as error:  # of roles or images that its model does not take, or of a wrong type
            raise InputError(f"The chat template refuses a conversation: {error}.") from error

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The text of messages whose contents are parts: what the model reads, answers and their end tokens included.

        Up to an answer it is what the template prints to ask for it, with the end token behind earlier answers where the
        template has none.

        Raises:
            InputError: the template refuses the conversation, or leaves out the text of a message.
        """
        pieces, answers = self.split(messages, add_generation_prompt)
        return pieces[0] + "".join(a + self.answer_end + piece for a, piece in zip(answers, pieces[1:], strict=True))

    def as_parts(self, messages: Messages, images: int | None, videos: int = 0) -> Messages:
        """Messages with contents as parts; `<image>` marks (or the family's placeholder) become image parts.

        When no mark stands anywhere, the images go in front of the first user turn. `<video>` marks are such only where
        there are videos, which go behind the images.

        Raises:
            InputError: `images` is given and differs from the number of marks; or `videos` does.
        """
        spellings = "|".join(map(re.escape, (self.image_placeholder, self.image_token, IMAGE_MARK)))
        marks = re.compile(rf"\n*({spellings}{f'|{re.escape(VIDEO_MARK)}' if videos else ''})\n*")
        converted = []
        for message in messages:
            content = message["content"]
            if isinstance(content, str):
                pieces = [content] if message["role"] == "assistant" else marks.split(content)
                content = []
                for n, piece in enumerate(pieces):  # text, mark, text, mark, ...
                    if n % 2:
                        content.append({"type": "video" if videos and piece == VIDEO_MARK else "image"})
                    elif piece:
                        content.append(_text(piece))
            converted.append({"role": message["role"], "content": [_clean_part(part) for part in content]})
        for medium, number in (("video", videos), ("image", images)):
            found = sum(part["type"] == medium for message in converted for part in message["content"])
            if number and found == 0:
                first = next(m for m in converted if m["role"] == "user")
                first["content"] = [{"type": medium}] * number + first["content"]
            elif number is not None and found != number:
                raise InputError(
                    f"A conversation has {found} {medium} mark(s) for {number} {medium}(s): make their numbers equal."
                )
        return converted

    def split(self, messages: Messages, add_generation_prompt: bool = False) -> tuple[list[str], list[str]]:
        """Cut a conversation's text at its answers: n + 1 pieces of template around n answers (without end).

        The last answer of a conversation that ends in one follows the generation prompt. So a conversation starts with its
        prompt, also where the template would print a last answer differently (Pixtral's system message, an empty block of
        thoughts).

        Raises:
            InputError: see `render`.
        """
        answers = ["".join(p.get("text", "") for p in m["content"]) for m in messages if m["role"] == "assistant"]
        ends = bool(messages) and messages[-1]["role"] == "assistant"
        asked = [_assistant(_ANSWER) if m["role"] == "assistant" else m for m in messages[: -1 if ends else None]]
        text = self._apply(asked, ends or add_generation_prompt)
        self._check_all_printed(asked, text)
        pieces = text.split(_ANSWER)
        for n in range(len(pieces) - 1):
            answers[n], header = self._earlier_answer(answers[n]), self._answer_header
            if header and pieces[n].endswith(header):
                pieces[n] = pieces[n].removesuffix(self._answer_lead)
                answers[n] = self._answer_lead + answers[n]
            after = pieces[n + 1].removeprefix(self._answer_tail).lstrip()
            pieces[n + 1] = after.removeprefix(self.answer_end) if self._writes_end else after
        if ends:
            answers[-1] = self._behind_prompt(answers[-1])
        return (pieces + [""] if ends else pieces), answers

    def _check_all_printed(self, messages: Messages, text: str) -> None:
        for message in messages:
            for part in message["content"]:
                if part["type"] == "text" and part["text"].strip() not in text:
                    raise InputError(
                        f"The chat template leaves out the text of a {message['role']} message, {part['text'][:80]!r}: "
                        "leave such messages out, or correct the template."
                    )

    def _behind_prompt(self, text: str) -> str:
        """An answer as the model writes it behind a generation prompt: with what the prompt leaves to it."""
        text = self._strip(text)
        if self._thoughts is None or self._thoughts[1] not in text:
            return self._answer_lead + text
        if not self._thinks:
            raise InputError(f"An answer holds thoughts ({self._thoughts[1]}): add --{_THINKING} True, or remove them.")
        return text.removeprefix(self._thoughts[0]).lstrip("\n")  # the prompt opens them

    def _earlier_answer(self, text: str) -> str:
        """An answer as later prompts show it: without thoughts."""
        text = self._strip(text)
        return text.rpartition(self._thoughts[1])[2].lstrip("\n") if self._thoughts else text

    def unused_token(self, skeletons: Sequence[Sequence[str]]) -> tuple[str, int]:
        """A special token, and its id, that stands in none of the pieces of `split`.

        It marks where the answers go while the native processor runs.

        Raises:
            InputError: the texts hold every special token.
        """
        taken = {self.image_token, self.video_token, IMAGE_MARK}
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
        ids = self.encode_answer(self._behind_prompt(text))
        return ids if ended else ids[: len(ids) - len(self.answer_end_ids)] or ids

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of a generated answer: without special tokens, without its end and without white space around it."""
        kept = [token for token in ids if token not in self.answer_end_ids]  # some are not special
        return str(self._tokenizer.decode(kept, skip_special_tokens=True)).strip()

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer as `split` returns it, end token included."""
        ids = self._tokenizer(self._anchor + text, add_special_tokens=False).input_ids
        if ids[: len(self._anchor_ids)] == self._anchor_ids:
            return ids[len(self._anchor_ids) :] + self.answer_end_ids
        # The answer's first characters merge with the anchor; in generation they cannot.
        return self._tokenizer(text, add_special_tokens=False).input_ids + self.answer_end_ids


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [_text(text)]}


_USER = {"role": "user", "content": [_text(_QUESTION)]}


def _date_macro(day: datetime.datetime) -> str:
    """Jinja for a `strftime_now` of that day; transformers' asks the clock, and takes no function in its place."""
    codes = ["-d", "-m", *"aAbBcdfGHIjmMpSuUVwWxXyY"]
    chain = "".join(f" | replace('%{code}', {day.strftime('%' + code)!r})" for code in codes)
    return f"{{% macro {_DATE}(format) %}}{{{{ format{chain} }}}}{{% endmacro %}}{{{{ '' }}}}"


def _lead(before: str, prompt: str) -> str:
    """What a conversation has between a generation prompt and the answer."""
    return before[len(prompt) :] if before.startswith(prompt) else ""


def _clean_part(part: dict[str, Any]) -> dict[str, Any]:
    # datasets fills missing keys with None, and some templates test for the key alone.
    return {"type": part["type"]} if part["type"] in ("image", "video") else _text(part["text"])


def _inserted(text: str, longer: str, token: str) -> str | None:
    """What makes `longer` out of `text` by insertion in one place, if it holds the whole `token`."""
    n = len(longer) - len(text)
    for start in reversed(range(len(text) + 1)):  # the image first, the line break that belongs to it last
        piece = longer[start : start + n]
        if token in piece and longer[:start] == text[:start] and longer[start + n :] == text[start:]:
            return piece
    return None
