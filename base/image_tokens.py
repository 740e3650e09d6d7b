"""Lengths of prompts without decoding an image: how many tokens images take depends on their sizes alone."""

from collections.abc import Callable, Sequence

from PIL import Image
from transformers import PreTrainedTokenizerBase

from base.images import ImageSource, upright_size
from base.template import ChatTemplate

Expand = Callable[[str, Sequence[ImageSource], list[Image.Image]], list[int]]


class ImageTokenCounter:
    """Prompts of the right length; each combination of image sizes is expanded once, on blank images."""

    def __init__(self, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, expand: Expand) -> None:
        """
        Args:
            expand: rendered prompt, its images as the row names them, the same decoded -> token ids with image tokens.
        """
        self._template, self._tokenizer, self._expand = template, tokenizer, expand
        self._counts: dict[tuple[tuple[int, int], ...], int] = {}  # sizes of a prompt's images -> their tokens

    def prompt_ids(self, text: str, images: Sequence[ImageSource]) -> list[int]:
        """Token ids of a rendered prompt; its images' tokens are -1 and stand together where the first image stands."""
        before, image, _ = text.partition(self._template.image_token)
        ids = self._tokenize(text)
        start = len(self._tokenize(before)) if image else 0
        return ids[:start] + [-1] * self.count(images) + ids[start:]

    def count(self, images: Sequence[ImageSource]) -> int:
        """Tokens that the images of one prompt add to its text."""
        sizes = tuple(map(upright_size, images))
        if sizes not in self._counts:
            content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": "a"}]
            text = self._template.render([{"role": "user", "content": content}], add_generation_prompt=True)
            ids = self._expand(text, images, [Image.new("RGB", size) for size in sizes])
            self._counts[sizes] = len(ids) - len(self._tokenize(text))
        return self._counts[sizes]

    def _tokenize(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids
