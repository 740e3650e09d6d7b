"""Talk to a checkpoint about a picture, or to several at once.

    python -m eval.chat --model_name_or_path runs/dpo --image 0.png
    python -m eval.chat --model_name_or_path runs/sft runs/dpo --image 0.png --question "Which bar is the tallest?"
    python -m eval.chat --model_name_or_path runs/sft runs/dpo --web True --reward_model runs/rm      (a page in the browser)

Without --question it reads questions line by line and remembers the conversation. `/image other.png` takes another picture and
begins anew, `/new` begins anew, an empty line ends. Takes checkpoints, hub ids and LoRA adapter folders.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from args import run
from common.errors import InputError
from common.flags import FlagParser
from eval.chat_page import Page, Reply, Reward, build, reply, row_of
from eval.flags import add_switch, add_thinking_flag
from eval.generate import Answerer, EncodedBatches, generation_settings
from eval.score import scalar_reward
from eval.sweep import run_names


class Chat:
    """A checkpoint and what was said so far."""

    def __init__(self, answerer: Answerer, settings: dict, seed: int) -> None:
        self.answerer, self.settings, self.seed = answerer, settings, seed
        self.messages: list[dict] = []

    def answer(self, question: str, images: list[str]) -> str:
        """The next answer, which is remembered."""
        self.messages.append({"role": "user", "content": question})
        encoded = EncodedBatches([], self.answerer.prompt_collator).encode_messages(self.messages, images)
        (text,) = self.answerer.answer([encoded], self.settings, self.seed)
        self.messages.append({"role": "assistant", "content": text})
        return text


def talk(chats: dict[str, Chat], images: list[str], lines: Iterable[str]) -> Iterator[str]:
    """What is printed for each line that the user types."""
    width = max(map(len, chats))
    for line in lines:
        text = line.strip()
        if not text:
            return
        if text == "/new" or text.startswith("/image"):
            if text != "/new":
                images = check_images([text.removeprefix("/image").strip()])
            for chat in chats.values():
                chat.messages.clear()
            continue
        for name, chat in chats.items():
            said = chat.answer(text, images)
            yield f"{name:<{width}}  {said}" if len(chats) > 1 else said


def check_images(images: list[str]) -> list[str]:
    """The paths, all of which exist.

    Raises:
        InputError: one does not.
    """
    for image in images:
        if not Path(image).is_file():
            raise InputError(f"the image {image or '(no name given)'} does not exist")
    return images


def page_of(chats: dict[str, Chat], reward: Reward | None, pairs: Path) -> Page:
    """The web page, on which every question begins anew."""

    def answer(question: str, images: list[str]) -> dict[str, Reply]:
        replies = {}
        for name, chat in chats.items():
            chat.messages.clear()
            replies[name] = reply(chat.answerer, row_of(question, images, chat.answer(question, images)), reward)
        return replies

    return build(answer, list(chats), pairs)


def main(argv: list[str] | None = None) -> None:
    """Run the command line (`argv` in its place)."""
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--model_name_or_path", nargs="+", required=True, help="checkpoints, hub ids or adapter folders"
    )
    parser.add_argument("--image", nargs="*", default=[], help="pictures that the conversation is about")
    parser.add_argument("--question", help="ask this and end")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    add_switch(parser, "--bf16", help="weights and activations in bfloat16 (default float32)")
    add_thinking_flag(parser)
    web = parser.add_argument_group("page in the browser (pip install -r requirements-web.txt)")
    add_switch(web, "--web", help="serve a page: answers side by side, with the probability of every token")
    web.add_argument("--port", type=int, default=7860, help="of the page, on this machine alone")
    web.add_argument("--reward_model", help="output folder of train_rm.py: the page shows its reward of every answer")
    web.add_argument(
        "--pairs", type=Path, default=Path("preferences.jsonl"), help="file that preferences are appended to"
    )
    parser.set_defaults(adapter=None, num_beams=None, top_p=None, checkpoint_settings=False, num_samples=1)
    args = parser.parse_args(argv)
    images = check_images(args.image)
    if args.reward_model and not args.web:
        raise InputError("--reward_model is shown on the page: add --web True, or score a file with eval.reward.")
    if args.web and (images or args.question):
        raise InputError("--web takes pictures and questions on its page: leave --image and --question out.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chats = {}
    for name, path in zip(run_names(args.model_name_or_path), args.model_name_or_path, strict=True):
        answerer = Answerer(path, None, device, args.bf16, enable_thinking=args.enable_thinking)
        chats[name] = Chat(answerer, generation_settings(args, answerer)[0], args.seed)
    if args.web:
        reward = None
        if args.reward_model:
            reward, _ = scalar_reward(
                argparse.Namespace(model_name_or_path=args.reward_model, adapter=None, bf16=args.bf16), device
            )
        page_of(chats, reward, args.pairs).launch(server_name="127.0.0.1", server_port=args.port, share=False)
        return
    for said in talk(chats, images, [args.question] if args.question else sys.stdin):
        print(said, flush=True)


if __name__ == "__main__":
    run(main)
