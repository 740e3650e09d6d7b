"""What every model family inherits on the data side: text with images -> token ids, labels and the model's image inputs.

The family's own transformers processor expands image placeholders and prepares pixels. Everything that training adds stands here: the chat template
is cut at the assistant's turns, the pieces are tokenised once each, and labels are right by construction.
"""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerBase

from base.images import ImageSource, image_file, load_image, upright_size
from common.errors import InputError
from data.rows import IMAGE_MARK

Messages = list[dict[str, Any]]

IGNORE_INDEX = -100
# Stand for a user's and an assistant's text while a template is rendered
_QUESTION, _ANSWER = "\N{WORD JOINER}QUESTION\N{WORD JOINER}", "\N{WORD JOINER}ANSWER\N{WORD JOINER}"


def _inserted(text: str, longer: str, token: str) -> str | None:
    """What makes `longer` out of `text` by insertion in one place, if it holds the whole `token`."""
    n = len(longer) - len(text)
    for start in reversed(range(len(text) + 1)):  # the image first, the line break that belongs to it last
        piece = longer[start : start + n]
        if token in piece and longer[:start] == text[:start] and longer[start + n :] == text[start:]:
            return piece
    return None


class VLProcessor:
    """Tokeniser, chat template and image processor of one checkpoint, in training (right-padded) or inference (left-padded) mode."""

    # The template for checkpoints that ship none. Families set it.
    default_chat_template: ClassVar[str | None] = None
    # Outputs of the native processor with one entry per token, and what a response's tokens get (None: the token before's).
    per_token_keys: ClassVar[dict[str, int | None]] = {"token_type_ids": 0, "mm_token_type_ids": 0}

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None:
        """Load the processor saved in `model_name_or_path`; `kwargs` go to AutoProcessor.from_pretrained.

        Raises:
            InputError: the checkpoint has no processor, or no chat template and the family has no default.
        """
        self.processor = AutoProcessor.from_pretrained(model_name_or_path, **kwargs)
        if isinstance(self.processor, PreTrainedTokenizerBase):
            raise InputError(
                f"{model_name_or_path} holds a tokenizer but no image processor: save the whole processor there."
            )
        if getattr(self.processor, "chat_template", None) is None:
            self.processor.chat_template = self.tokenizer.chat_template or self.default_chat_template
        if self.processor.chat_template is None:
            raise InputError(f"{model_name_or_path} has no chat template: add chat_template.jinja to it.")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.unk_token or self.tokenizer.eos_token
        self._read_template()
        self._lengths_only = False
        self._image_tokens: dict[tuple[tuple[int, int], ...], int] = {}  # sizes of a prompt's images -> their tokens
        self.train()

    # -- the contract -------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.processor.tokenizer

    @property
    def chat_template(self) -> str:
        """The Jinja chat template that prompts are rendered with."""
        return self.processor.chat_template

    @property
    def image_processor(self) -> Any:
        """The image processor: `image_processor(images=[...], return_tensors="pt")`."""
        return self.processor.image_processor

    @property
    def model_input_names(self) -> list[str]:
        """What Trainer asks a processor for."""
        return self.processor.model_input_names

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save what AutoProcessor.from_pretrained needs, chat template included."""
        self.processor.save_pretrained(save_directory, **kwargs)

    def train(self) -> None:
        """Training mode: pad on the right, `__call__` on conversations returns labels."""
        self.mode, self.tokenizer.padding_side = "train", "right"

    def infer(self) -> None:
        """Inference mode: pad on the left, `__call__` on conversations ends in the generation prompt."""
        self.mode, self.tokenizer.padding_side = "infer", "left"

    def format_multimodal_prompt(self, prompt: str, images: ImageSource | Sequence[ImageSource] | int = 1) -> str:
        """Put one image placeholder per image (a list of images or their number) in front of a raw prompt."""
        if not isinstance(images, int):
            images = len(images) if isinstance(images, list | tuple) else 1
        return self.image_placeholder * images + prompt

    def remove_image_placeholder(self, prompt: str) -> str:
        """The prompt without image placeholders: the inverse of `format_multimodal_prompt`."""
        return prompt.replace(self.image_placeholder, "").replace(IMAGE_MARK, "")

    def is_multimodal_prompt_valid(self, prompt: str) -> bool:
        """Whether the prompt contains the image placeholder."""
        return self.image_placeholder in prompt or IMAGE_MARK in prompt

    def process_batch_conv(
        self, convs: Sequence[Messages], images: Sequence[Sequence[ImageSource]] | None = None, train_on: str = "all"
    ) -> dict[str, Any]:
        """Tokenise whole conversations.

        Args:
            convs: messages with `role` and `content`; contents hold `<image>` marks (or parts) where images stand.
            images: the images of each conversation, in order.
            train_on: the labels cover "all" assistant turns or the "last" one.

        Returns:
            input_ids and labels: lists of token-id lists, labels -100 everywhere but on the assistant's text and its end token;
            img_input_dict: the model's image inputs for the batch, per-token entries still as lists.
        """
        images = images if images is not None else [[] for _ in convs]
        skeletons, answers = zip(
            *(self._split(self._as_parts(c, len(i))) for c, i in zip(convs, images, strict=True)), strict=True
        )
        marker = self._unused_token(skeletons)
        prompts, img_inputs = self.encode_prompts([marker.join(s) for s in skeletons], images)
        marker_id = self.tokenizer.convert_tokens_to_ids(marker)
        input_ids, labels, sources = [], [], []
        for prompt, turns in zip(prompts, answers, strict=True):
            ids, row_labels, source = (
                [],
                [],
                [],
            )  # source: which token of the skeleton each token stands for, -1 in answers
            turn = 0
            for t, token in enumerate(prompt):
                if token != marker_id:
                    ids.append(token)
                    row_labels.append(IGNORE_INDEX)
                    source.append(t)
                    continue
                answer = self._encode_answer(turns[turn])
                turn += 1
                ids += answer
                trained = train_on == "all" or turn == len(turns)
                row_labels += answer if trained else [IGNORE_INDEX] * len(answer)
                source += [-1] * len(answer)
            input_ids.append(ids)
            labels.append(row_labels)
            sources.append(source)
        return {"input_ids": input_ids, "labels": labels, "img_input_dict": self.follow_tokens(img_inputs, sources)}

    def __call__(
        self,
        texts: Sequence[str] | None = None,
        convs: Sequence[Messages] | None = None,
        images: Sequence[Sequence[ImageSource] | ImageSource] | None = None,
        train_on: str = "all",
    ) -> dict[str, torch.Tensor]:
        """Tensors for `model(**inputs)` or, in inference mode, `model.generate(**inputs)`.

        Args:
            texts: rendered prompts; a prompt that has images but no placeholder gets its placeholders in front.
            convs: conversations instead of texts. In training mode the result has labels; in inference mode a conversation that ends with a
                user turn is followed by the generation prompt.
            images: per text or conversation a list of paths, bytes or PIL images (or a single one).

        Returns:
            input_ids, attention_mask (B, L), labels (B, L) in training mode on conversations, and the family's image inputs.

        Raises:
            InputError: image placeholders and images differ in number.
        """
        if (texts is None) == (convs is None):
            raise ValueError("Give either texts or convs.")
        count = len(texts if texts is not None else convs)
        rows = (
            [i if isinstance(i, list | tuple) else [i] for i in images]
            if images is not None
            else [[] for _ in range(count)]
        )
        labels = None
        if convs is not None and self.mode == "train":
            encoded = self.process_batch_conv(convs, rows, train_on)
            input_ids, labels, img_inputs = encoded["input_ids"], encoded["labels"], encoded["img_input_dict"]
        else:
            if convs is not None:
                texts = [
                    self.render(c, add_generation_prompt=c[-1]["role"] != "assistant", images=len(i))
                    for c, i in zip(convs, rows, strict=True)
                ]
            else:
                texts = [
                    t if not i or self.is_multimodal_prompt_valid(t) else self.format_multimodal_prompt(t, i)
                    for t, i in zip(texts, rows, strict=True)
                ]
            input_ids, img_inputs = self.encode_prompts(texts, rows)
        batch = {
            "input_ids": self.pad(input_ids, self.tokenizer.pad_token_id),
            "attention_mask": self.pad([[1] * len(i) for i in input_ids], 0),
        }
        if labels is not None:
            batch["labels"] = self.pad(labels, IGNORE_INDEX)
        return {**batch, **self.pad_img_inputs(img_inputs)}

    # -- text -----------------------------------------------------------------------------------------------------------

    def render(self, messages: Messages, add_generation_prompt: bool = False, images: int | None = None) -> str:
        """The chat template's text for `messages`, image placeholders not yet expanded.

        Raises:
            InputError: `images` is given and differs from the number of marks.
        """
        return self._template(self._as_parts(messages, images), add_generation_prompt)

    def encode_response(self, text: str) -> list[int]:
        """Token ids of an assistant's answer as they follow the generation prompt, end token included."""
        return self._encode_answer(self._answer_lead + text)

    def _encode_answer(self, text: str) -> list[int]:
        ids = self.tokenizer(self._anchor + text, add_special_tokens=False).input_ids
        if ids[: len(self._anchor_ids)] == self._anchor_ids:
            return ids[len(self._anchor_ids) :] + self._answer_end_ids
        # The answer's first characters merge with the anchor; in generation they cannot.
        return self.tokenizer(text, add_special_tokens=False).input_ids + self._answer_end_ids

    def encode_prompts(
        self, texts: Sequence[str], images: Sequence[Sequence[ImageSource]]
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Token ids of rendered prompts with image placeholders expanded, and the model's image inputs of the batch.

        Returns:
            B token-id lists without padding; the image inputs, in which per-token entries are B lists.

        Raises:
            InputError: an image cannot be read, or the number of placeholders differs from the number of images.
        """
        for text, row in zip(texts, images, strict=True):
            if (found := self.count_placeholders(text)) != len(row):
                raise InputError(f"A prompt has {found} image placeholder(s) for {len(row)} image(s): {text[:200]!r}.")
        if self._lengths_only and all(images):
            return [self._as_long_ids(text, row) for text, row in zip(texts, images, strict=True)], {}
        pictures = [[load_image(i) for i in row] for row in images]
        try:
            encoded = self.call_native(list(texts), pictures)
        except ValueError:
            self._refuse_pictures(images, pictures)
            raise
        mask = encoded.pop("attention_mask").bool()
        ids = encoded.pop("input_ids")
        encoded.pop("labels", None)  # PaliGemma's processor makes labels of its own
        img_inputs = {
            k: [v[b][mask[b]].tolist() for b in range(len(mask))] if k in self.per_token_keys else v
            for k, v in encoded.items()
        }
        return [ids[b][mask[b]].tolist() for b in range(len(mask))], img_inputs

    @contextmanager
    def lengths_only(self) -> Iterator[None]:
        """Within it, encoded prompts have the right number of tokens and no image inputs, and no image is decoded.

        How many tokens images take depends on their sizes alone: each combination of sizes is expanded once, on blank images.
        """
        self._lengths_only = True
        try:
            yield
        finally:
            self._lengths_only = False

    def _as_long_ids(self, text: str, images: Sequence[ImageSource]) -> list[int]:
        """The tokens of a prompt, with those of its images where the first of them stands, all alike."""
        sizes = tuple(map(upright_size, images))
        tokens = functools.partial(self.tokenizer, add_special_tokens=False)
        if sizes not in self._image_tokens:
            question = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": "a"}]
            short = self._template([{"role": "user", "content": question}], add_generation_prompt=True)
            pictures, self._lengths_only = [Image.new("RGB", size) for size in sizes], False
            try:
                ((ids,), _) = self.encode_prompts([short], [pictures])
            except InputError:
                self._refuse_pictures([images], [pictures])
                raise
            finally:
                self._lengths_only = True
            self._image_tokens[sizes] = len(ids) - len(tokens(short).input_ids)
        before, image, _ = text.partition(self.image_token)
        filler = [-1] * self._image_tokens[sizes]
        ids = tokens(text).input_ids
        start = len(tokens(before).input_ids) if image else 0
        return ids[:start] + filler + ids[start:]

    def _refuse_pictures(self, images: Sequence[Sequence[ImageSource]], pictures: list[list[Image.Image]]) -> None:
        """Raise an InputError for the first picture that the image processor does not take (too narrow, for some families)."""
        for image, picture in zip(chain(*images), chain(*pictures), strict=True):
            try:
                self.image_processor(images=[picture], return_tensors="pt")
            except ValueError as error:
                file = image_file(image)
                name = f"Image {file}" if isinstance(file, str) else "An image"
                raise InputError(
                    f"{name} of {picture.width} x {picture.height} pixels is refused by the image processor ({error}): "
                    "crop it or drop the row."
                ) from error

    def call_native(self, texts: list[str], images: list[list[Image.Image]]) -> dict[str, Any]:
        """Hook: the family's own processor on a right-padded batch; images are nested per row."""
        bos = self.tokenizer.bos_token
        return dict(
            self.processor(
                text=texts,
                images=images if any(images) else None,
                # A template that writes the BOS token itself must not get a second one.
                add_special_tokens=not (bos and texts[0].startswith(bos)),
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
        )

    def count_placeholders(self, text: str) -> int:
        """Number of images that a rendered prompt stands for."""
        return text.count(self.image_token)

    # -- batches --------------------------------------------------------------------------------------------------------

    def follow_tokens(self, img_inputs: dict[str, Any], sources: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Make per-token image inputs follow a new token order.

        Args:
            img_inputs: as returned by `encode_prompts`.
            sources: for each new row, which token of the encoded prompt each token is; -1 for a response token.
        """
        followed = dict(img_inputs)
        for key, of_response in self.per_token_keys.items():
            if key in img_inputs:
                followed[key] = []
                for row, source in zip(img_inputs[key], sources, strict=True):
                    values: list[Any] = []
                    for s in source:
                        values.append(row[s] if s >= 0 else values[-1] if of_response is None else of_response)
                    followed[key].append(values)
        return followed

    def pad_img_inputs(self, img_inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Image inputs with their per-token entries padded to tensors."""
        return {k: self.pad(v, 0) if k in self.per_token_keys else v for k, v in img_inputs.items()}

    def dummy_images(self) -> dict[str, torch.Tensor]:
        """Image inputs of one grey picture, for ranks whose rows have none: they run the vision tower all the same, or the others wait."""
        text = self.render([{"role": "user", "content": "<image>\n."}], add_generation_prompt=True, images=1)
        return self.pad_img_inputs(self.encode_prompts([text], [[Image.new("RGB", (64, 64), "grey")]])[1])

    def pad(self, rows: Sequence[Sequence[Any]], value: Any) -> torch.Tensor:
        """Pad B lists (of numbers, or of equal-shaped lists) to one (B, L, ...) tensor on the tokenizer's padding side."""
        tensors = [torch.as_tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(
            tensors, batch_first=True, padding_value=value, padding_side=self.tokenizer.padding_side
        )

    # -- reading the template -------------------------------------------------------------------------------------------

    def _template(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        try:
            return self.processor.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except TemplateError as error:  # what a template says of roles or images that its model does not take
            raise InputError(f"The chat template refuses a conversation: {error}.") from error

    def _read_template(self) -> None:
        """Find out, by rendering, what the template writes for an image, before an answer and after it."""
        self.image_token = str(
            getattr(self.processor, "image_token", None) or IMAGE_MARK
        )  # InstructBLIP has an AddedToken
        user = [{"role": "user", "content": [{"type": "text", "text": _QUESTION}]}]
        answer = [*user, {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}]
        plain, prompt, full = (
            self._template(user),
            self._template(user, add_generation_prompt=True),
            self._template(answer),
        )
        one = self._template([{"role": "user", "content": [{"type": "image"}, *user[0]["content"]]}])
        placeholder = _inserted(plain, one, self.image_token)
        if placeholder is None:  # templates that write more than the placeholder for an image, or less without one
            two = self._template([{"role": "user", "content": [{"type": "image"}] * 2 + user[0]["content"]}])
            placeholder = _inserted(one, two, self.image_token)
        self.image_placeholder = placeholder or IMAGE_MARK
        before, after = full.split(_ANSWER)
        self._answer_lead = before[len(prompt) :] if before.startswith(prompt) else ""
        # What stands between a user turn and an answer, in a rendered conversation and in a generation prompt: some templates differ.
        self._headers = (before.removeprefix(plain), prompt.removeprefix(plain))
        specials = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        special = "|".join(map(re.escape, specials))
        end = re.match(rf"\s*((?:{special})+)", after)  # Cohere's turns end in two
        # A template without an end token (LLaVA-1.5) gets the EOS token, which replaces the white space that it writes there.
        self._template_has_end = end is not None
        self._answer_tail = "" if end else after  # LLaVA-NeXT's template misprints its end token
        self.answer_end = end.group(1) if end else self.tokenizer.eos_token
        self._answer_end_ids = self.tokenizer.convert_tokens_to_ids(re.findall(special, self.answer_end))
        # Tokenizers with a dummy prefix (SentencePiece) read the start of a text as the start of a word: tokenise answers behind the end of
        # the generation prompt, as the model sees them. Others split the same way without it.
        dummy_prefix = self.tokenizer.tokenize("a")[:1] in (["▁a"], ["▁"])
        self._anchor = prompt.rstrip()[-1:] if dummy_prefix and prompt.rstrip()[-1:] not in (">", "") else ""
        self._anchor_ids = self.tokenizer(self._anchor, add_special_tokens=False).input_ids if self._anchor else []

    def _as_parts(self, messages: Messages, images: int | None) -> Messages:
        """Messages with contents as parts; `<image>` marks (or the family's placeholder) become image parts.

        When no mark stands anywhere, the images go in front of the first user turn.
        """
        marks = re.compile(rf"\n*(?:{re.escape(self.image_placeholder)}|{re.escape(IMAGE_MARK)})\n*")
        converted = []
        for message in messages:
            content = message["content"]
            if isinstance(content, str):
                if message["role"] == "assistant":
                    pieces = [content]
                else:
                    pieces = marks.split(content)
                parts: list[dict[str, Any]] = []
                for n, piece in enumerate(pieces):
                    parts += [{"type": "image"}] * (n > 0) + [{"type": "text", "text": piece}] * bool(piece)
                content = parts
            converted.append({"role": message["role"], "content": [self._clean_part(p) for p in content]})
        found = sum(p["type"] == "image" for m in converted for p in m["content"])
        if images and found == 0:
            first = next(m for m in converted if m["role"] == "user")
            first["content"] = [{"type": "image"}] * images + first["content"]
        elif images is not None and found != images:
            raise InputError(
                f"A conversation has {found} image mark(s) for {images} image(s): make their numbers equal."
            )
        return converted

    @staticmethod
    def _clean_part(part: dict[str, Any]) -> dict[str, Any]:
        # datasets fills missing keys with None, and some templates test for the key alone.
        return {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]}

    def _split(self, messages: Messages) -> tuple[list[str], list[str]]:
        """Cut a conversation's text at its answers: n + 1 pieces of template around n answers (without end)."""
        answers: list[str] = []
        masked = []
        for message in messages:
            if message["role"] == "assistant":
                answers.append("".join(p.get("text", "") for p in message["content"]))
                message = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
            masked.append(message)
        pieces = self._template(masked).split(_ANSWER)
        for n in range(len(answers)):
            # Earlier answers have another header in some templates: without the block of thoughts, for example. It stays.
            if pieces[n].endswith(self._headers[0]):
                pieces[n] = pieces[n].removesuffix(self._headers[0]) + self._headers[1]
                answers[n] = self._answer_lead + answers[n]
            after = pieces[n + 1].removeprefix(self._answer_tail).lstrip()
            pieces[n + 1] = after.removeprefix(self.answer_end) if self._template_has_end else after
        return [*pieces[:-1], ""] if not pieces[-1].strip() else pieces, answers

    def _unused_token(self, skeletons: Sequence[Sequence[str]]) -> str:
        """A special token that stands in none of the texts: it marks where the answers go while the native processor runs."""
        for token_id, token in self.tokenizer.added_tokens_decoder.items():
            if token.special and not (token.lstrip or token.rstrip) and token_id != self.tokenizer.bos_token_id:
                if token.content not in (self.image_token, IMAGE_MARK) and not any(
                    token.content in piece for s in skeletons for piece in s
                ):
                    return token.content
        raise InputError("A conversation holds every special token of the tokenizer as text: remove them from the row.")
