"""What every model family inherits on the data side: text with images -> token ids, labels and image inputs.

The family's transformers processor expands image placeholders and prepares pixels. Everything that training adds stands
here and in base/template.py: the chat template is cut at the assistant's turns, the pieces are tokenised once each, and
labels are right by construction.
"""

import datetime
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from base.features import join_rows
from base.image_tokens import ImageTokenCounter
from base.images import ImageProcessor, ImageSource, load_image, png, refuse_images
from base.layout import complete_processor, model_config, native_processor, processor_path, stop_tokens
from base.resolution import set_resolution
from base.template import ChatTemplate, Messages
from base.videos import (
    Clip,
    Medium,
    Sampling,
    Video,
    blank_clip,
    count_media,
    load_clip,
    refuse_clips,
    set_sampling,
    stills_of,
)
from common.errors import InputError
from common.openai_client import ChatReply, data_url
from data.rows import IMAGE_MARK, VIDEO_MARK

IGNORE_INDEX = -100


def count_images(images: ImageSource | Sequence[ImageSource] | int | None) -> int:
    """How many images an argument of `format_multimodal_prompt` stands for: a number, a list, a single one or none."""
    if images is None or isinstance(images, int):
        return images or 0
    return len(images) if isinstance(images, list | tuple) else 1


def answer_start(labels: Sequence[int]) -> int:
    """Where the last trained answer of a conversation begins.

    Raises:
        InputError: no token is trained.
    """
    end = next((i for i in reversed(range(len(labels))) if labels[i] != IGNORE_INDEX), None)
    if end is None:
        raise InputError("A conversation has no trained token: process_batch_conv must label answers and their ends.")
    return next((i + 1 for i in reversed(range(end)) if labels[i] == IGNORE_INDEX), 0)


_RENDERING = {"enable_thinking", "date", "min_pixels", "max_pixels", "video_frames", "video_fps"}


def _with_rendering(init: Callable[..., None]) -> Callable[..., None]:
    """Let a family's `__init__` take the path alone: what it has no name for goes to that of the base class."""
    named = inspect.signature(init).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in named.values())

    @functools.wraps(init)
    def wrapped(self: "VLProcessor", *args: Any, **kwargs: Any) -> None:
        if not takes_all:
            left = _RENDERING & kwargs.keys() - named.keys()
            self._rendering = {**self._rendering, **{name: kwargs.pop(name) for name in left}}
        init(self, *args, **kwargs)

    return wrapped


_RESIZE = (
    "take the tokenizer that the checkpoint came with, or call resize_token_embeddings on the model once and save it."
)


class VLProcessor:
    """Tokeniser, chat template and image processor of one checkpoint.

    It is in training mode, which pads on the right, or in inference mode, which pads on the left.
    """

    # The template for checkpoints that ship none. Families set it.
    default_chat_template: ClassVar[str | None] = None
    # How films are sampled where the checkpoint says nothing (see base.videos.set_sampling). None: the family takes no videos.
    video_sampling: ClassVar[Sampling | None] = None
    # Outputs of the native processor with one entry per token, and what a response's tokens get
    # (None: the value of the token before).
    per_token_keys: ClassVar[dict[str, int | None]] = {"token_type_ids": 0, "mm_token_type_ids": 0}

    # What a family's `__init__` did not take of the scripts' arguments
    _rendering: Mapping[str, Any] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _with_rendering(cls.__init__)  # type: ignore[method-assign]

    def __init__(
        self,
        model_name_or_path: str,
        *,
        enable_thinking: bool = False,
        date: datetime.date | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_frames: int | None = None,
        video_fps: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Load the processor saved in `model_name_or_path`, or of an adapter folder without one that of its base.

        Args:
            enable_thinking, date: of the chat template, see base.template.ChatTemplate.
            min_pixels, max_pixels: of a picture, see base.resolution; by default as saved.
            video_frames, video_fps: how many frames of a video are seen, see base.videos; by default as saved.
            kwargs: go to AutoProcessor.from_pretrained.

        Raises:
            InputError: the checkpoint has no processor, or no chat template and the family has no default; an argument has no
                part in the family.
        """
        given: dict[str, Any] = {
            "enable_thinking": enable_thinking,
            "date": date,
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
        }
        given |= {"video_frames": video_frames, "video_fps": video_fps, **self._rendering}
        config, stops = model_config(model_name_or_path), stop_tokens(model_name_or_path)
        model_name_or_path = processor_path(model_name_or_path)
        self.processor: Any = native_processor(model_name_or_path, **kwargs)
        set_resolution(self.processor.image_processor, given["min_pixels"], given["max_pixels"])
        self._set_sampling(given["video_frames"], given["video_fps"])
        if config is not None:
            complete_processor(self.processor, config)
        if getattr(self.processor, "chat_template", None) is None:
            self.processor.chat_template = self.tokenizer.chat_template or self.default_chat_template
        if self._has_own("chat_template"):  # it is rendered, and saved
            self.processor.chat_template = self.chat_template
        if not self.processor.chat_template:
            raise InputError(f"{model_name_or_path} has no chat template: add chat_template.jinja to it.")
        if isinstance(self.processor.chat_template, dict) and "default" not in self.processor.chat_template:
            names = ", ".join(self.processor.chat_template)
            raise InputError(f"{model_name_or_path} has chat templates named {names}: call the one to use `default`.")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.unk_token or self.tokenizer.eos_token
        self._native_image_processor = self.processor.image_processor
        self.template = ChatTemplate(
            self.processor, self.tokenizer, enable_thinking=given["enable_thinking"], date=given["date"], stops=stops
        )
        self.image_token, self.image_placeholder = self.template.image_token, self.template.image_placeholder
        self.answer_end = self.template.answer_end
        self._beyond = self._tokens_beyond(config, model_name_or_path) if config is not None else frozenset()
        self._lengths_only = False
        self._image_tokens = ImageTokenCounter(self.template, self.tokenizer, self._expand, self._blank)
        self.train()

    def _set_sampling(self, frames: int | None, fps: float | None) -> None:
        """How videos are sampled, if the family takes any."""
        if self.video_sampling is not None:
            set_sampling(self.processor.video_processor, self.video_sampling, frames, fps)
        elif frames is not None or fps is not None:
            self._refuse_videos("--video_frames and --video_fps have no part")

    def _tokens_beyond(self, config: PreTrainedConfig, path: str) -> frozenset[int]:
        """Added tokens that the model has no embedding for; texts that hold them are refused.

        Raises:
            InputError: every prompt would hold one.
        """
        text = config.get_text_config()
        rows = text.vocab_size + getattr(text, "additional_vocab_size", 0)  # Molmo2's second part
        images = {getattr(config, name, None) for name in ("image_token_id", "image_token_index")}
        beyond = frozenset(id for id in self.tokenizer.added_tokens_decoder if id >= rows and id not in images)
        prompt = self.template.render(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}], True
        )
        always = [*self.tokenizer(prompt).input_ids, *self.template.answer_end_ids, self.tokenizer.pad_token_id]
        if found := beyond.intersection(always):
            raise InputError(f"{path}: {self._names(found)} not among the {rows} embeddings of the model: {_RESIZE}")
        return beyond

    @property
    def tokens_without_embedding(self) -> list[str]:
        """Added tokens of the tokenizer that the model does not have."""
        return [self.tokenizer.added_tokens_decoder[id].content for id in sorted(self._beyond or ())]

    def _names(self, ids: Iterable[int]) -> str:
        named = [f"{self.tokenizer.convert_ids_to_tokens(id)} ({id})" for id in sorted(ids)]
        return f"the token {named[0]} is" if len(named) == 1 else f"the tokens {' and '.join(named)} are"

    def _refuse_beyond(self, ids: Iterable[int]) -> None:
        if self._beyond and (found := self._beyond.intersection(ids)):
            raise InputError(f"In the data {self._names(found)} not among the embeddings of the model: {_RESIZE}")

    def __getattr__(self, name: str) -> Any:
        # Called for what is not there only
        reason = (
            "" if "_image_tokens" in vars(self) else ": its __init__ must call super().__init__(model_name_or_path)"
        )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{reason}.")

    # -- the contract -------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.processor.tokenizer

    @property
    def chat_template(self) -> str:
        """The Jinja chat template that prompts are rendered with."""
        native = self.processor.chat_template
        return native["default"] if isinstance(native, dict) else native

    @property
    def image_processor(self) -> Any:
        """The image processor: `image_processor(images=[...], return_tensors="pt")`; without images it gives None as pixel_values."""
        return ImageProcessor(self._native_image_processor)

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

    def format_multimodal_prompt(
        self, prompt: str, images: ImageSource | Sequence[ImageSource] | int | None = 1
    ) -> str:
        """Put one image placeholder per image (a list of images or their number) in front of a raw prompt."""
        return self.image_placeholder * count_images(images) + prompt

    def remove_image_placeholder(self, prompt: str) -> str:
        """The prompt without image placeholders: the inverse of `format_multimodal_prompt`."""
        for mark in (self.image_placeholder, self.image_token, IMAGE_MARK):
            prompt = prompt.replace(mark, "")
        return prompt

    def is_multimodal_prompt_valid(self, prompt: str | None) -> bool:
        """Whether the prompt contains an image placeholder: the template's, the bare token in it, or `<image>`."""
        text = prompt or ""
        return any(mark in text for mark in (self.image_placeholder, self.image_token, IMAGE_MARK))

    def process_batch_conv(
        self, convs: Sequence[Messages], images: Sequence[Sequence[Medium]] | None = None, train_on: str = "all"
    ) -> dict[str, Any]:
        """Tokenise whole conversations.

        Args:
            convs: messages with `role` and `content`; contents hold `<image>` marks (or parts) where images stand.
            images: the images of each conversation, in order.
            train_on: the labels cover "all" assistant turns or the "last" one.

        Returns:
            input_ids and labels: lists of token-id lists, labels -100 everywhere but on the assistant's text and its
            end token; img_input_dict: the model's image inputs for the batch, per-token entries still as lists.
        """
        images = images if images is not None else [[] for _ in convs]
        if not convs:
            return {"input_ids": [], "labels": [], "img_input_dict": {}}
        input_ids, labels, img_inputs = self._encode_conversations(convs, images, train_on=train_on)
        return {"input_ids": input_ids, "labels": labels, "img_input_dict": img_inputs}

    def _encode_conversations(
        self,
        convs: Sequence[Messages],
        images: Sequence[Sequence[Medium]],
        add_generation_prompt: bool = False,
        train_on: str = "all",
    ) -> tuple[list[list[int]], list[list[int]], dict[str, Any]]:
        """Token ids, labels and image inputs of conversations."""
        parts = [self._parts(conv, *count_media(row)) for conv, row in zip(convs, images, strict=True)]
        skeletons, answers = zip(*(self.template.split(conv, add_generation_prompt) for conv in parts), strict=True)
        marker, marker_id = self.template.unused_token(skeletons)
        prompts, img_inputs = self.encode_prompts([marker.join(pieces) for pieces in skeletons], images)
        filled = [self._fill_in(p, marker_id, a, train_on) for p, a in zip(prompts, answers, strict=True)]
        input_ids, labels, sources = map(list, zip(*filled, strict=True))
        self._refuse_beyond(token for row in input_ids for token in row)
        return input_ids, labels, self.follow_tokens(img_inputs, sources)

    def _fill_in(
        self, skeleton: list[int], marker_id: int, answers: Sequence[str], train_on: str
    ) -> tuple[list[int], list[int], list[int]]:
        """Put the answers in the place of the markers.

        Returns:
            Token ids, labels, and which token of the skeleton each token is (-1 in answers), for `follow_tokens`.
        """
        ids: list[int] = []
        labels: list[int] = []
        sources: list[int] = []
        remaining = list(answers)
        for t, token in enumerate(skeleton):
            if token != marker_id:
                ids.append(token)
                labels.append(IGNORE_INDEX)
                sources.append(t)
                continue
            answer = self.template.encode_answer(remaining.pop(0))
            trained = train_on == "all" or not remaining
            ids += answer
            labels += answer if trained else [IGNORE_INDEX] * len(answer)
            sources += [-1] * len(answer)
        return ids, labels, sources

    def __call__(
        self,
        texts: Sequence[str] | None = None,
        convs: Sequence[Messages] | None = None,
        images: Sequence[list[Medium] | tuple[Medium, ...] | Medium] | None = None,
        train_on: str = "all",
    ) -> dict[str, torch.Tensor]:
        """Tensors for `model(**inputs)` or, in inference mode, `model.generate(**inputs)`.

        Args:
            texts: rendered prompts; a prompt that has images but no placeholder gets its placeholders in front.
            convs: conversations instead of texts. In training mode the result has labels; in inference mode a
                conversation that ends with a user turn is followed by the generation prompt.
            images: per text or conversation a list of paths, bytes or PIL images (or a single one).

        Returns:
            input_ids, attention_mask (B, L), labels (B, L) in training mode on conversations, and the family's image
            inputs.

        Raises:
            InputError: image placeholders and images differ in number.
        """
        if (texts is None) == (convs is None) or isinstance(texts, str):
            raise InputError("A processor takes a list: either of texts or of convs.")
        rows = [list(i) if isinstance(i, list | tuple) else [i] for i in images or [[]] * len(texts or convs or [])]
        labels = None
        if convs is not None and self.mode == "train":
            encoded = self._talks(convs, rows, train_on)
            input_ids, labels, img_inputs = encoded["input_ids"], encoded["labels"], encoded["img_input_dict"]
        elif convs is not None:
            input_ids, img_inputs = self._encode_questions(convs, rows)
        elif texts is not None:
            prompts = [
                text
                if not row or self.is_multimodal_prompt_valid(text)
                else self.format_multimodal_prompt(text, stills_of(row))
                for text, row in zip(texts, rows, strict=True)
            ]
            if IMAGE_MARK not in self.image_placeholder:
                prompts = [text.replace(IMAGE_MARK, self.image_placeholder) for text in prompts]
            input_ids, img_inputs = self.encode_prompts(prompts, rows)
        batch = {
            "input_ids": self.pad(input_ids, self.tokenizer.pad_token_id),
            "attention_mask": self.pad([[1] * len(i) for i in input_ids], 0),
        }
        if labels is not None:
            batch["labels"] = self.pad(labels, IGNORE_INDEX)
        return {**batch, **self.pad_img_inputs(img_inputs)}

    # -- text ----------------------------------------------------------------------------------------------------------

    def render(
        self, messages: Messages, add_generation_prompt: bool = False, images: int | None = None, videos: int = 0
    ) -> str:
        """The chat template's text for `messages`, placeholders of images and videos not yet expanded.

        Raises:
            InputError: `images` is given and differs from the number of marks, or `videos` does.
        """
        return self.template.render(self._parts(messages, images, videos), add_generation_prompt)

    def _parts(self, messages: Messages, images: int | None, videos: int = 0) -> Messages:
        """`as_parts`, in which `format_multimodal_prompt` puts the placeholders where no turn has one."""
        if videos:
            if self.video_sampling is None:
                self._refuse_videos("A conversation has a video, which has no part")
            return self.template.as_parts(messages, images, videos)
        if not (self._has_own("format_multimodal_prompt") or self._has_own("is_multimodal_prompt_valid")):
            return self.as_parts(messages, images)  # which does the same
        messages = self._without_default_marks(messages, images)
        asked = [m["content"] for m in messages if m["role"] != "assistant"]
        plain = all(isinstance(text, str) for text in asked)
        # A mark of the data counts, whatever a family's own check looks for
        if images and plain and not any(IMAGE_MARK in text or self.is_multimodal_prompt_valid(text) for text in asked):
            first = next(n for n, m in enumerate(messages) if m["role"] == "user")
            text = self.format_multimodal_prompt(messages[first]["content"], images)
            if not self.is_multimodal_prompt_valid(text):
                raise InputError(
                    f"format_multimodal_prompt of {type(self).__name__} puts nothing that its is_multimodal_prompt_valid "
                    f"takes for an image: let it put {self.image_placeholder!r} or {IMAGE_MARK}."
                )
            messages = [*messages[:first], messages[first] | {"content": text}, *messages[first + 1 :]]
        return self.as_parts(messages, images)

    @staticmethod
    def _without_default_marks(messages: Messages, images: int | None) -> Messages:
        """Rows as their file has them: those without marks got theirs right in front of the first question (data/rows.py)."""
        first = next((n for n, m in enumerate(messages) if m["role"] == "user"), None)
        marks = IMAGE_MARK * (images or 0)
        if not marks or first is None or not isinstance(text := messages[first]["content"], str):
            return messages
        rest = text.removeprefix(marks)
        if rest == text or rest[:1].isspace() or IMAGE_MARK in rest:  # written by hand
            return messages
        return [*messages[:first], messages[first] | {"content": rest}, *messages[first + 1 :]]

    def api_messages(self, messages: Messages, images: Sequence[ImageSource]) -> list[dict[str, Any]]:
        """A prompt as OpenAI-compatible servers take it: the parts that `render` prints, pictures as data URLs.

        Pictures are PNG of what `load_image` decodes, so that the server reads the same pixels.

        Raises:
            InputError: see `render` and `load_image`.
        """
        if self.video_sampling is not None and any(VIDEO_MARK in str(m["content"]) for m in messages):
            raise InputError("A prompt has a video, which is not sent to a server: leave such rows out.")
        pictures = iter(images)
        return [
            {
                "role": message["role"],
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url(png(next(pictures)))}}
                    if part["type"] == "image"
                    else part
                    for part in message["content"]
                ],
            }
            for message in self._parts(messages, len(images))
        ]

    def api_fields(self, messages: Messages, ids: Sequence[int]) -> dict[str, Any]:
        """What a request adds, so that a server with this checkpoint's template reads the tokens `ids` in `api_messages`.

        vLLM puts no <s> in front of what the template prints (LLaVA-1.5's prints none).
        """
        fields: dict[str, Any] = {}
        bos = self.tokenizer.bos_token
        if bos is not None and ids[0] == self.tokenizer.bos_token_id:
            fields["add_special_tokens"] = not self.render(messages, True).startswith(bos)
        if "enable_thinking" in self.template.facts:
            fields["chat_template_kwargs"] = {"enable_thinking": self.template.facts["enable_thinking"]}
        return fields

    def check_served_prompt(self, reply: ChatReply, ids: Sequence[int], where: str, server: str) -> None:
        """Raise InputError if a server read another prompt than `ids`: by its tokens, or where it gives none by their number."""
        said = None
        if reply.prompt_tokens is not None and reply.prompt_tokens != len(ids):
            said = f"{reply.prompt_tokens} tokens, {len(ids)} here"
        elif reply.prompt_ids is not None and len(reply.prompt_ids) == len(ids) and reply.prompt_ids != [*ids]:
            n = next(n for n, (theirs, ours) in enumerate(zip(reply.prompt_ids, ids, strict=True)) if theirs != ours)
            names = self.tokenizer.convert_ids_to_tokens([reply.prompt_ids[n], ids[n]])
            said = f"{names[0]!r} as token {n}, {names[1]!r} here"
        if said is not None:
            raise InputError(
                f"{where}: the prompt has {said}, as {server} says: serve the checkpoint that is trained, with its chat template and image "
                "processor (docs/serving.md)."
            )

    def as_parts(self, messages: Messages, images: int | None) -> Messages:
        """Hook: messages with contents as parts, image marks as image parts. See `ChatTemplate.as_parts`."""
        return self.template.as_parts(messages, images)

    def encode_response(self, text: str, ended: bool = True) -> list[int]:
        """Token ids of an assistant's answer as they follow the generation prompt, with its end token if it ended."""
        ids = self.template.encode_response(text, ended)
        self._refuse_beyond(ids)
        return ids

    def encode_responses(
        self,
        prompt: Messages,
        responses: Sequence[str],
        images: Sequence[Medium],
        ended: Sequence[bool] | None = None,
    ) -> list[list[int]]:
        """Token ids of answers to a prompt: `encode_response`, or where a family has one its own `process_batch_conv`.

        Args:
            ended: whether each answer has its end token; all do by default.
        """
        ends = ended or [True] * len(responses)
        if not self._has_own("process_batch_conv"):
            return [self.encode_response(response, end) for response, end in zip(responses, ends, strict=True)]
        convs = [[*prompt, {"role": "assistant", "content": response}] for response in responses]
        with self.lengths_only():  # the images do not matter here
            encoded = self._talks(convs, [images] * len(convs), "last")
        answers = [
            ids[answer_start(labels) :] for ids, labels in zip(encoded["input_ids"], encoded["labels"], strict=True)
        ]
        end = len(self.encode_response("")) - len(self.encode_response("", False))
        return [ids if end_stays else ids[:-end] for ids, end_stays in zip(answers, ends, strict=True)]

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of a generated answer: without special tokens, without its end and without white space around it."""
        return self.template.decode_response(ids)

    def encode_conversations(
        self, convs: Sequence[Messages], images: Sequence[Sequence[Medium]]
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Prompts of conversations as `encode_prompts` returns them. They pass through `__call__`, which a family may override."""
        training = self.mode == "train"
        self.infer()
        try:
            returned = self(convs=convs, images=[list(row) for row in images])
            encoded = self._whole("__call__", returned, "input_ids", "attention_mask")
        finally:
            if training:
                self.train()
        return self._unpadded(encoded)

    def encode_talks(
        self, convs: Sequence[Messages], images: Sequence[Sequence[Medium]], train_on: str = "all"
    ) -> tuple[list[list[int]], list[list[int]], dict[str, Any]]:
        """Whole conversations through `__call__` as well: token ids, labels, image inputs, all as `process_batch_conv` makes them."""
        which = {} if train_on == "all" else {"train_on": train_on}
        returned = self(convs=convs, images=[list(row) for row in images], **which)
        encoded = self._whole("__call__", returned, "input_ids", "attention_mask", "labels")
        labels, mask = encoded.pop("labels"), encoded["attention_mask"].bool()
        ids, img_inputs = self._unpadded(encoded)
        return ids, [row[real].tolist() for row, real in zip(labels, mask, strict=True)], img_inputs

    def _encode_questions(
        self, convs: Sequence[Messages], images: Sequence[Sequence[Medium]]
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """As `encode_prompts`; where the family tokenises conversations itself, a prompt is what stands before an empty answer."""
        if not self._has_own("process_batch_conv"):
            ids, _, img_inputs = self._encode_conversations(convs, images, add_generation_prompt=True)
            return ids, img_inputs
        open_ends = [conv[-1]["role"] != "assistant" for conv in convs]
        empty = {"role": "assistant", "content": ""}
        asked = [[*conv, empty] if end else conv for conv, end in zip(convs, open_ends, strict=True)]
        encoded = self._talks(asked, images, "last")
        ids = [
            ids[: answer_start(labels)] if end else ids
            for ids, labels, end in zip(encoded["input_ids"], encoded["labels"], open_ends, strict=True)
        ]
        img_inputs = {
            k: [row[: len(i)] for row, i in zip(v, ids, strict=True)] if k in self.per_token_keys else v
            for k, v in encoded["img_input_dict"].items()
        }
        return ids, img_inputs

    def _has_own(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(VLProcessor, method)

    def _talks(self, convs: Sequence[Messages], images: Sequence[Sequence[Medium]], train_on: str) -> dict[str, Any]:
        """What `process_batch_conv` returns, which a family may override."""
        return self._whole(
            "process_batch_conv",
            self.process_batch_conv(convs, images, train_on),
            "input_ids",
            "labels",
            "img_input_dict",
        )

    def _whole(self, method: str, returned: Any, *names: str) -> dict[str, Any]:
        """What a family's method returned, if all that others read of it is there."""
        if missing := [name for name in names if name not in returned]:
            raise InputError(
                f"{method} of {type(self).__name__} returns no {' and no '.join(missing)}: docs/CustomizedModel.md says what it "
                "returns."
            )
        return dict(returned)

    def encode_prompts(
        self, texts: Sequence[str], images: Sequence[Sequence[Medium]]
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Token ids of rendered prompts with image placeholders expanded, and the model's image inputs of the batch.

        Returns:
            B token-id lists without padding; the image inputs, in which per-token entries are B lists.

        Raises:
            InputError: an image cannot be read, or the number of placeholders differs from the number of images.
        """
        for text, row in zip(texts, images, strict=True):
            stills, videos = count_media(row)
            if (found := self.count_placeholders(text)) != stills:
                raise InputError(f"A prompt has {found} image placeholder(s) for {stills} image(s): {text[:200]!r}.")
            if videos and (found := text.count(str(self.template.video_token))) != videos:
                raise InputError(
                    f"A prompt has {found} video placeholder(s) for {videos} video(s): {text[:200]!r}. If the conversation has its "
                    f"marks, the chat template knows no videos: take that of a newer checkpoint of the family."
                )
        if self._lengths_only and all(images):
            return [self._image_tokens.prompt_ids(text, row) for text, row in zip(texts, images, strict=True)], {}
        return self._encode(texts, images, [[self._decoded(medium) for medium in row] for row in images])

    def _refuse_videos(self, what: str) -> NoReturn:
        raise InputError(
            f"{what} in {type(self).__name__}, which reads pictures alone: leave it out, or take a family that docs/models.md "
            "names for videos."
        )

    def _decoded(self, medium: Medium) -> Image.Image | Clip:
        return load_clip(medium, self.processor.video_processor) if isinstance(medium, Video) else load_image(medium)

    def _blank(self, video: Video) -> Clip:
        return blank_clip(video, self.processor.video_processor)

    def _encode(
        self, texts: Sequence[str], images: Sequence[Sequence[Medium]], pictures: list[list[Image.Image | Clip]]
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """`encode_prompts` with images and videos decoded; `images` name them in messages."""
        clips = [medium for row in pictures for medium in row if isinstance(medium, Clip)]
        if clips and len(texts) > 1:
            # Native processors want equally many frames in all videos of a batch, or let them change each other's prompts.
            rows = [self._encode([text], [i], [p]) for text, i, p in zip(texts, images, pictures, strict=True)]
            ids = [own for (own,), _ in rows]
            return ids, join_rows(
                [inputs for _, inputs in rows], {name: [*map(len, ids)] for name in self.per_token_keys}
            )
        named, stills = [*map(stills_of, images)], [*map(stills_of, pictures)]
        own = self.image_processor
        try:
            if self._has_own("image_processor"):
                # A function knows nothing of what native processors ask theirs
                whole = hasattr(own, "fetch_images")
                self.processor.image_processor = own if whole else ImageProcessor(self._native_image_processor, own)
            # Families that take no videos have no such argument
            encoded = self.call_native(list(texts), stills, *([clips] if clips else []))
        except ValueError as error:
            refuse_images(own, named, stills)
            refuse_clips(clips, error)
            raise
        finally:
            self.processor.image_processor = self._native_image_processor
        encoded.pop("labels", None)  # PaliGemma's processor makes labels, too
        return self._unpadded(encoded)

    def _unpadded(self, encoded: dict[str, Any]) -> tuple[list[list[int]], dict[str, Any]]:
        """Padded rows of tokens as lists, beside the image inputs, whose per-token entries become lists as well."""
        mask = encoded.pop("attention_mask").bool()
        ids = encoded.pop("input_ids")
        img_inputs = {
            k: [v[b][mask[b]].tolist() for b in range(len(mask))] if k in self.per_token_keys else v
            for k, v in encoded.items()
        }
        self._refuse_beyond(ids[mask].tolist())
        return [ids[b][mask[b]].tolist() for b in range(len(mask))], img_inputs

    def _expand(self, text: str, images: Sequence[Medium], pictures: list[Image.Image | Clip]) -> list[int]:
        return self._encode([text], [images], [pictures])[0][0]

    @contextmanager
    def lengths_only(self) -> Iterator[None]:
        """Within it, encoded prompts have the right number of tokens and no image inputs, and no image is decoded."""
        before, self._lengths_only = self._lengths_only, True
        try:
            yield
        finally:
            self._lengths_only = before

    def call_native(
        self, texts: list[str], images: list[list[Image.Image]], clips: Sequence[Clip] = ()
    ) -> dict[str, Any]:
        """Hook: call the family's transformers processor on a right-padded batch; images are nested per row.

        Args:
            clips: of a batch with videos, which has one row.
        """
        bos = self.tokenizer.bos_token
        frames = {"video_metadata": [clip.metadata for clip in clips], "do_sample_frames": False}
        return dict(
            self.processor(
                text=texts,
                images=images if any(images) else None,
                **({"videos": [clip.frames for clip in clips], "videos_kwargs": frames} if clips else {}),
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

    # -- batches -------------------------------------------------------------------------------------------------------

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
        """Image inputs of one grey picture, for ranks whose rows have none.

        They run the vision tower all the same, because the other ranks wait for it.
        """
        question = [{"role": "user", "content": f"{IMAGE_MARK}\n."}]
        return self.pad_img_inputs(self.encode_conversations([question], [[Image.new("RGB", (64, 64), "grey")]])[1])

    def pad(self, rows: Sequence[Sequence[Any]], value: Any) -> torch.Tensor:
        """Pad B lists (of numbers, or of equal-shaped lists) to a (B, L, ...) tensor, on the side of the mode."""
        tensors = [torch.as_tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(
            tensors, batch_first=True, padding_value=value, padding_side=self.tokenizer.padding_side
        )
