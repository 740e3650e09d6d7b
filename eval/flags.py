"""Flags of the evaluation commands, with the names that the training scripts use."""

import argparse
from typing import Any

from transformers.hf_argparser import string_to_bool


def add_flag(parser: Any, name: str, *older: str, required: bool = False, **options: Any) -> None:
    """Add a flag to a parser (or a group of one). Its `older` names go on working and are not shown in --help."""
    group = parser.add_mutually_exclusive_group(required=required)
    action = group.add_argument(name, **options)
    for old in older:
        hidden = {k: v for k, v in options.items() if k in ("type", "nargs", "const")}
        group.add_argument(old, dest=action.dest, help=argparse.SUPPRESS, default=argparse.SUPPRESS, **hidden)


def add_switch(parser: Any, name: str, **options: Any) -> None:
    """Add a flag that is on or off, as in the training scripts: `--bf16 True`, or `--bf16` alone."""
    parser.add_argument(name, type=string_to_bool, nargs="?", const=True, default=False, **options)


def add_model_flags(parser: Any, required: bool = True) -> None:
    """--model_name_or_path and --adapter."""
    model = "checkpoint, hub id or LoRA adapter folder"
    add_flag(parser, "--model_name_or_path", "--model", required=required, help=model)
    parser.add_argument("--adapter", help="LoRA adapter folder on top of --model_name_or_path")


def add_thinking_flag(parser: Any) -> None:
    """--enable_thinking, as in the training scripts."""
    add_switch(
        parser, "--enable_thinking", help="let a model think before it answers, where its chat template has that switch"
    )


def add_data_flags(parser: Any, images: str = "where image names are looked up; default: beside --data_path") -> None:
    """--data_path and --image_root."""
    add_flag(parser, "--data_path", "--data", required=True, help="the benchmark's file, as published")
    add_flag(parser, "--image_root", "--image_dir", help=images)
