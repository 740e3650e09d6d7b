"""Lengths of prompts without decoding an image: how many tokens images take depends on their sizes alone."""

from collections.abc import Callable, Sequence

from PIL import Image
from transformers import PreTrainedTokenizerBase

from base.images import ImageSource, upright_size
from base.template import ChatTemplate
from base.videos import Clip, Medium, Video, stills_of

Expand = Callable[[str, Sequence[Medium], list[Image.Image | Clip]], list[int]]


class ImageTokenCounter:
    """Prompts of the right length; each combination of image sizes is expanded once, on blank images.

    Every prompt with a video is expanded, on blank frames: some families write words between frames, whose tokens depend on
    what stands around them.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: PreTrainedTokenizerBase,
        expand: Expand,
        blank: Callable[[Video], Clip],
    ) -> None:
        """
        Args:
            expand: rendered prompt, its images as the row names them, the same decoded -> token ids with image tokens.
            blank: of a video, as large and as long as the model sees it.
        """
        self._template, self._tokenizer, self._expand, self._blank = template, tokenizer, expand, blank
        self._counts: dict[tuple[tuple[int, int], ...], int] = {}  # sizes of a prompt's images -> their tokens

    def prompt_ids(self, text: str, images: Sequence[Medium]) -> list[int]:
        """Token ids of a rendered prompt; without videos its images' tokens are -1 and stand where the first image stands."""
        stills = stills_of(images)
        if len(stills) < len(images):
            blank = [self._blank(m) if isinstance(m, Video) else Image.new("RGB", upright_size(m)) for m in images]
            return self._expand(text, images, blank)
        before, image, _ = text.partition(self._template.image_token)
        ids = self._tokenize(text)
        start = len(self._tokenize(before)) if image else 0
        return ids[:start] + [-1] * self.count(stills) + ids[start:]

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
