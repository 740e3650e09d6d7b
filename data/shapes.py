"""Write the embedded data set (data/scenes.py) as the files that a user would bring, and a model to start from.

    python -m data.shapes --output_dir runs/demo/data --num_train 3000 --seed 0 --init_model runs/demo/init

writes (and with --init_model an untrained LLaVA that fits the pictures):

    images/*.png
    sft.json          vlquery_json: a caption of every scene, about 30 % of them with an object that is not there; and questions, answered correctly
    pairs.json        plain_dpo: the true caption against one with a known error
    prompts.json      prompts for PPO, with the true caption as reference
    eval_pairs.json   plain_dpo, held out
    eval.json         held-out scenes with their objects, true captions and questions (python -m eval.shapes)
"""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from common.compat import write_hub_names
from common.flags import FlagParser
from data.scenes import CAPTION_PROMPT, CELL, NUM_SCENES, SIZE, caption, questions, scenes, write

# The format of llava-hf/llava-1.5-7b-hf: images first, a space after every text, no end token.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def save_initial_model(directory: Path, seed: int) -> None:
    """Save a LLaVA with random weights (CLIP tower, projector, Llama; 1.1 M parameters) and its processor, ready for train_sft.py."""
    tokenizer = _tokenizer()
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        # The background becomes 0. With the usual mean of 0.5 its constant offset hides the shapes: colours alone take four
        # times as many steps.
        image_mean=[0.93] * 3,
        image_std=[0.25] * 3,
    )
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" leaves out
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)
    width = 128
    # With the usual 0.02 attention starts so flat at this width that for some hundred steps the model learns the language
    # of captions and stays blind.
    spread = 0.08
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=CELL,
            projection_dim=width,
            initializer_range=spread,
        ),
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=320,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=spread,
        ),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(SIZE // CELL) ** 2,
        vision_feature_layer=-1,  # LLaVA-1.5 takes the last layer but one; of two layers, both are needed
        initializer_range=spread,  # type: ignore[call-arg]  # a config keeps every keyword
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    # Places as loud as pixels: half as many steps until the model looks where it should.
    torch.nn.init.normal_(model.get_encoder(modality="image").embeddings.position_embedding.weight)
    write_hub_names(model)
    model.save_pretrained(directory)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every word that occurs here is one token."""
    rng = random.Random(0)
    texts = []
    for scene in itertools.islice(scenes(0, held_out=False), 2000):
        texts += [f" {text}" for question in questions(scene, 4, rng) for text in question]
        texts += [f" {caption(scene)}", f"USER: <image>\n{CAPTION_PROMPT} ASSISTANT:", "0 1 2 3 4 5 6 7 8 9"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
        extra_special_tokens={"image_token": "<image>"},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Write the files, the model, or both."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, help="folder of the pictures and files")
    parser.add_argument("--num_train", type=int, default=NUM_SCENES, help="training scenes")
    parser.add_argument("--num_eval", type=int, default=300, help="held-out scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init_model", type=Path, help="folder for an untrained LLaVA that fits these pictures")
    args = parser.parse_args(argv)
    if not args.output_dir and not args.init_model:
        parser.error("nothing to do: give --output_dir, --init_model or both")
    if min(args.num_train, args.num_eval) < 1:
        parser.error("--num_train and --num_eval count scenes: give at least 1")
    if args.output_dir:
        write(args.output_dir, args.num_train, args.num_eval, args.seed)
        print(f"{args.output_dir}: {args.num_train} training and {args.num_eval} held-out scenes")
    if args.init_model:
        save_initial_model(args.init_model, args.seed)
        print(f"{args.init_model}: an untrained LLaVA")


if __name__ == "__main__":
    main()
