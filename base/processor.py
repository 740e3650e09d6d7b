"""What every model family inherits on the data side: text with images -> token ids, labels and image inputs.

The family's transformers processor expands image placeholders and prepares pixels. Everything that training adds stands
here and in base/template.py: the chat template is cut at the assistant's turns, the pieces are tokenised once each, and
labels are right by construction.
"""

import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from base.image_tokens import ImageTokenCounter
from base.images import ImageSource, load_image, refuse_images
from base.layout import complete_processor, damaged_file, model_config, processor_path
from base.template import ChatTemplate, Messages
from common.errors import InputError
from data.rows import IMAGE_MARK

IGNORE_INDEX = -100


class VLProcessor:
    """Tokeniser, chat template and image processor of one checkpoint.

    It is in training mode, which pads on the right, or in inference mode, which pads on the left.
    """

    # The template for checkpoints that ship none. Families set it.
    default_chat_template: ClassVar[str | None] = None
    # Outputs of the native processor with one entry per token, and what a response's tokens get
    # (None: the value of the token before).
    per_token_keys: ClassVar[dict[str, int | None]] = {"token_type_ids": 0, "mm_token_type_ids": 0}

    def __init__(
        self,
        model_name_or_path: str,
        *,
        enable_thinking: bool = False,
        date: datetime.date | None = None,
        **kwargs: Any,
    ) -> None:
        """Load the processor saved in `model_name_or_path`, or of an adapter folder without one that of its base.

        Args:
            enable_thinking, date: of the chat template, see base.template.ChatTemplate.
            kwargs: go to AutoProcessor.from_pretrained.

        Raises:
            InputError: the checkpoint has no processor, or no chat template and the family has no default.
        """
        config = model_config(model_name_or_path)
        model_name_or_path = processor_path(model_name_or_path)
        try:
            self.processor = AutoProcessor.from_pretrained(model_name_or_path, **kwargs)
        except Exception as error:  # of the many kinds that a damaged file makes tokenizers and image processors raise
            if damaged := damaged_file(model_name_or_path):
                raise InputError(f"{damaged}: copy or download the file again.") from error
            if not isinstance(error, OSError | ValueError):
                raise
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{model_name_or_path} has no whole processor ({reason}): copy or download it again."
            ) from error
        if isinstance(self.processor, PreTrainedTokenizerBase):
            raise InputError(
                f"{model_name_or_path} holds a tokenizer but no image processor: save the whole processor there."
            )
        if config is not None:
            complete_processor(self.processor, config)
        if getattr(self.processor, "chat_template", None) is None:
            self.processor.chat_template = self.tokenizer.chat_template or self.default_chat_template
        if not self.processor.chat_template:
            raise InputError(f"{model_name_or_path} has no chat template: add chat_template.jinja to it.")
        if isinstance(self.processor.chat_template, dict) and "default" not in self.processor.chat_template:
            names = ", ".join(self.processor.chat_template)
            raise InputError(f"{model_name_or_path} has chat templates named {names}: call the one to use `default`.")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.unk_token or self.tokenizer.eos_token
        self.template = ChatTemplate(self.processor, self.tokenizer, enable_thinking=enable_thinking, date=date)
        self.image_token, self.image_placeholder = self.template.image_token, self.template.image_placeholder
        self.answer_end = self.template.answer_end
        self._beyond = self._tokens_beyond(config, model_name_or_path) if config is not None else frozenset()
        self._lengths_only = False
        self._image_tokens = ImageTokenCounter(self.template, self.tokenizer, self._expand)
        self.train()

    def _tokens_beyond(self, config: PreTrainedConfig, path: str) -> frozenset[int]:
        """Added tokens that the model has no embedding for; texts that hold them are refused.

        Raises:
            InputError: every prompt would hold one.
        """
        rows = config.get_text_config().vocab_size
        images = {getattr(config, name, None) for name in ("image_token_id", "image_token_index")}
        beyond = frozenset(id for id in self.tokenizer.added_tokens_decoder if id >= rows and id not in images)
        prompt = self.template.render(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}], True
        )
        always = [*self.tokenizer(prompt).input_ids, *self.template.answer_end_ids, self.tokenizer.pad_token_id]
        if found := beyond.intersection(always):
            raise InputError(
                f"{path}: {self._names(found)} not among the {rows} embeddings of the model: take the tokenizer that the "
                "checkpoint came with, or call resize_token_embeddings on the model once and save it."
            )
        return beyond

    def _names(self, ids: Iterable[int]) -> str:
        return " and ".join(f"the token {self.tokenizer.convert_ids_to_tokens(id)} ({id}) is" for id in sorted(ids))

    def _refuse_beyond(self, ids: Iterable[int]) -> None:
        if self._beyond and (found := self._beyond.intersection(ids)):
            raise InputError(
                f"A text has tokens that the model does not know: {self._names(found)} beyond its embeddings."
            )

    # -- the contract -------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.processor.tokenizer

    @property
    def chat_template(self) -> str:
        """The Jinja chat template that prompts are rendered with."""
        return self.template.source

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
            input_ids and labels: lists of token-id lists, labels -100 everywhere but on the assistant's text and its
            end token; img_input_dict: the model's image inputs for the batch, per-token entries still as lists.
        """
        images = images if images is not None else [[] for _ in convs]
        input_ids, labels, img_inputs = self._encode_conversations(convs, images, train_on=train_on)
        return {"input_ids": input_ids, "labels": labels, "img_input_dict": img_inputs}

    def encode_conversations(
        self, convs: Sequence[Messages], images: Sequence[Sequence[ImageSource]]
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Token ids of prompts: conversations that end with a user turn, and the generation prompt behind them.

        Earlier answers are encoded as `process_batch_conv` encodes them. For the results see `encode_prompts`.
        """
        input_ids, _, img_inputs = self._encode_conversations(convs, images, add_generation_prompt=True)
        return input_ids, img_inputs

    def _encode_conversations(
        self,
        convs: Sequence[Messages],
        images: Sequence[Sequence[ImageSource]],
        add_generation_prompt: bool = False,
        train_on: str = "all",
    ) -> tuple[list[list[int]], list[list[int]], dict[str, Any]]:
        """Token ids, labels and image inputs of conversations."""
        parts = [self.as_parts(conv, len(row)) for conv, row in zip(convs, images, strict=True)]
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
        images: Sequence[list[ImageSource] | tuple[ImageSource, ...] | ImageSource] | None = None,
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
        if (texts is None) == (convs is None):
            raise ValueError("Give either texts or convs.")
        rows = [list(i) if isinstance(i, list | tuple) else [i] for i in images or [[]] * len(texts or convs or [])]
        labels = None
        if convs is not None and self.mode == "train":
            encoded = self.process_batch_conv(convs, rows, train_on)
            input_ids, labels, img_inputs = encoded["input_ids"], encoded["labels"], encoded["img_input_dict"]
        elif convs is not None:
            input_ids, img_inputs = self.encode_conversations(convs, rows)
        elif texts is not None:
            prompts = [
                text if not row or self.is_multimodal_prompt_valid(text) else self.format_multimodal_prompt(text, row)
                for text, row in zip(texts, rows, strict=True)
            ]
            input_ids, img_inputs = self.encode_prompts(prompts, rows)
        batch = {
            "input_ids": self.pad(input_ids, self.tokenizer.pad_token_id),
            "attention_mask": self.pad([[1] * len(i) for i in input_ids], 0),
        }
        if labels is not None:
            batch["labels"] = self.pad(labels, IGNORE_INDEX)
        return {**batch, **self.pad_img_inputs(img_inputs)}

    # -- text ----------------------------------------------------------------------------------------------------------

    def render(self, messages: Messages, add_generation_prompt: bool = False, images: int | None = None) -> str:
        """The chat template's text for `messages`, image placeholders not yet expanded.

        Raises:
            InputError: `images` is given and differs from the number of marks.
        """
        return self.template.render(self.as_parts(messages, images), add_generation_prompt)

    def as_parts(self, messages: Messages, images: int | None) -> Messages:
        """Hook: messages with contents as parts, image marks as image parts. See `ChatTemplate.as_parts`."""
        return self.template.as_parts(messages, images)

    def encode_response(self, text: str, ended: bool = True) -> list[int]:
        """Token ids of an assistant's answer as they follow the generation prompt, with its end token if it ended."""
        ids = self.template.encode_response(text, ended)
        self._refuse_beyond(ids)
        return ids

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of a generated answer: without special tokens, without its end and without white space around it."""
        return self.template.decode_response(ids)

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
            return [self._image_tokens.prompt_ids(text, row) for text, row in zip(texts, images, strict=True)], {}
        return self._encode(texts, images, [[load_image(image) for image in row] for row in images])

    def _encode(
        self, texts: Sequence[str], images: Sequence[Sequence[ImageSource]], pictures: list[list[Image.Image]]
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """`encode_prompts` with the images decoded; `images` name them in messages."""
        try:
            encoded = self.call_native(list(texts), pictures)
        except ValueError:
            refuse_images(self.image_processor, images, pictures)
            raise
        mask = encoded.pop("attention_mask").bool()
        ids = encoded.pop("input_ids")
        encoded.pop("labels", None)  # PaliGemma's processor makes labels, too
        img_inputs = {
            k: [v[b][mask[b]].tolist() for b in range(len(mask))] if k in self.per_token_keys else v
            for k, v in encoded.items()
        }
        self._refuse_beyond(ids[mask].tolist())
        return [ids[b][mask[b]].tolist() for b in range(len(mask))], img_inputs

    def _expand(self, text: str, images: Sequence[ImageSource], pictures: list[Image.Image]) -> list[int]:
        return self._encode([text], [images], [pictures])[0][0]

    @contextmanager
    def lengths_only(self) -> Iterator[None]:
        """Within it, encoded prompts have the right number of tokens and no image inputs, and no image is decoded."""
        self._lengths_only = True
        try:
            yield
        finally:
            self._lengths_only = False

    def call_native(self, texts: list[str], images: list[list[Image.Image]]) -> dict[str, Any]:
        """Hook: call the family's transformers processor on a right-padded batch; images are nested per row."""
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
        text = self.render([{"role": "user", "content": f"{IMAGE_MARK}\n."}], add_generation_prompt=True, images=1)
        return self.pad_img_inputs(self.encode_prompts([text], [[Image.new("RGB", (64, 64), "grey")]])[1])

    def pad(self, rows: Sequence[Sequence[Any]], value: Any) -> torch.Tensor:
        """Pad B lists (of numbers, or of equal-shaped lists) to a (B, L, ...) tensor, on the side of the mode."""
        tensors = [torch.as_tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(
            tensors, batch_first=True, padding_value=value, padding_side=self.tokenizer.padding_side
        )
