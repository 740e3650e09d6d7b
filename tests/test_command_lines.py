"""Flags as they are spelt: mistyped ones are refused by every command, and --help names ours in groups."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

import args
import data.check
import merge_lora
from args import training as training_flags
from args.dpo import with_loss_flags
from args.training import PROJECT_VARIABLES, USUAL_OF_TRANSFORMERS
from common.dataclass_flags import DataclassParser
from common.errors import InputError
from common.flags import FlagParser
from tests.test_layers import MODULES

CONFIGS = {"sft": args.SFTConfig, "dpo": args.DPOConfig, "rm": args.RMConfig, "ppo": args.PPOConfig}
OTHERS = (args.ModelArguments, args.DataArguments, args.LoraArguments)
TRAIN = "--model_name_or_path m --dataset_name d --output_dir {} --reward_fn f.py:g"


def parse(folder: Path, flags: str = "", kind: str = "dpo") -> tuple:
    line = TRAIN.format(folder) if kind == "ppo" else TRAIN.format(folder).split(" --reward_fn")[0]
    return args.parse(*OTHERS, CONFIGS[kind], argv=f"{line} {flags}".split())


# -- mistyped flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--learning_rat 3", "--learning_rate"),
        ("--learning-rat=3", "--learning-rate"),
        ("--use_lor True", "--use_lora"),
    ],
)
def test_a_mistyped_flag_is_refused_with_the_nearest(tmp_path, kind: str, given: str, meant: str):
    flag = re.split("[ =]", given)[0]
    with pytest.raises(InputError, match=f"^There is no flag {flag}: did you mean {meant}\\?$"):
        parse(tmp_path, given, kind)


def test_flags_of_losses_are_not_shortened(tmp_path):
    with pytest.raises(InputError, match="There is no flag --bet: did you mean --beta"):
        parse(tmp_path, "--bet 9")


def test_a_mistyped_key_of_the_config_file(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rat: 3\n")
    with pytest.raises(InputError, match="has the key learning_rat, which is no flag: did you mean learning_rate"):
        parse(tmp_path, f"--config {tmp_path / 'run.yaml'}")
    (tmp_path / "run.yaml").write_text("learning_rate: 3\n")
    assert parse(tmp_path, f"--config {tmp_path / 'run.yaml'}")[-1].learning_rate == 3


def test_a_word_that_belongs_to_no_flag(tmp_path):
    with pytest.raises(InputError, match=r"^b: the flag before it takes one value"):
        parse(tmp_path, "--image_root a b")


def test_a_mistyped_flag_goes_before_the_one_that_is_missing(tmp_path, capsys):
    with pytest.raises(InputError, match="--model_name_or_pat: did you mean --model_name_or_path"):
        args.parse(*OTHERS, args.SFTConfig, argv=["--model_name_or_pat", "m"])
    parser = FlagParser(description="")
    parser.add_argument("--data_path", required=True)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--data_pat", "x"])
    assert end.value.code == 2
    assert "There is no flag --data_pat: did you mean --data_path?" in capsys.readouterr().err


def test_values_that_look_like_flags_are_values():
    parser = FlagParser(description="")
    parser.add_argument("--text")
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--text=--x", "--", "--y"]).words == ["--y"]
    assert parser.parse_args(["--text", "-1"]).text == "-1"


@pytest.mark.parametrize("main", [data.check.main, merge_lora.main])
def test_commands_refuse_too(main, capsys):
    with pytest.raises((SystemExit, InputError)) as end:
        main(["--hel_all", "x"])
    assert "There is no flag --hel_all" in capsys.readouterr().err + str(end.value)


def test_no_command_has_a_parser_of_its_own():
    """argparse's own parser takes `--da` for `--data_path`."""
    for name, file in MODULES.items():
        if name == "common.flags":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("argparse.ArgumentParser", "ArgumentParser", "HfArgumentParser", "TrlParser"), (
                    name
                )


# -- help --------------------------------------------------------------------------------------------------------------------


def parser_of(kind: str) -> DataclassParser:
    config = with_loss_flags(args.DPOConfig) if kind == "dpo" else CONFIGS[kind]
    return DataclassParser([*OTHERS, config], USUAL_OF_TRANSFORMERS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_help_has_our_flags_in_groups_and_help_all_the_rest(kind: str, capsys):
    parser = parser_of(kind)
    groups = dict(parser.groups())
    rollouts = ["Rollouts and rewards"] if issubclass(CONFIGS[kind], args.RolloutFlags) else []
    titles = ["Model", "Data", "LoRA", CONFIGS[kind].title, *rollouts, "Training", "Other flags of transformers"]
    assert list(groups) == titles
    dests = [action.dest for actions in groups.values() for action in actions]
    assert len(dests) == len(set(dests))
    fields = {f.name for kind in parser.dataclass_types for f in dataclasses.fields(kind) if f.init}
    assert set(dests) == fields
    short = parser.format_help()
    parser.print_all_help()
    full = capsys.readouterr().out
    for title, actions in groups.items():
        for action in actions:
            line = re.compile(rf"^  --{action.dest}\b", re.MULTILINE)
            assert bool(line.search(short)) == (title != titles[-1]), action.dest
            assert line.search(full), action.dest
    assert "adam_beta1" not in short and "--help_all" in short and "--no_freeze" not in short


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_choice_has_a_word_in_the_help(kind: str):
    parser = parser_of(kind)
    helps = {action.dest: action.help for action in reversed(parser._actions)}
    for cls in parser.dataclass_types:
        for name, hint in get_type_hints(cls).items():
            literal = next((h for h in (hint, *get_args(hint)) if get_origin(h) is Literal), None)
            if literal is None:
                continue
            for choice in get_args(literal):
                assert re.search(rf"\b{choice}\b", helps[name]), f"--{name}: {choice}"


def test_the_twin_of_a_switch_has_its_own_help():
    twins = {a.option_strings[0]: a.help for a in parser_of("sft")._actions if a.option_strings[0].startswith("--no_")}
    assert twins["--no_freeze_vision_tower"] == "The same as --freeze_vision_tower False."


def test_no_line_stands_before_the_users_own():
    """Not even those with which packages greet."""
    done = subprocess.run(
        [sys.executable, "train_dpo.py", "--bet", "1"], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "train_dpo.py: There is no flag --bet: did you mean --beta?\n"


# -- services ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    names = ["tensorboard", "wandb", "trackio"]
    monkeypatch.setattr(training_flags, "get_available_reporting_integrations", lambda: names)
    for variable in PROJECT_VARIABLES:
        monkeypatch.setenv(variable, "before")  # put back afterwards
    return names


@pytest.mark.parametrize(
    "spelt", ["tensorboard wandb", "tensorboard,wandb", "[tensorboard,wandb]", "[tensorboard, wandb]"]
)
def test_services_in_every_spelling(tmp_path, installed, spelt: str):
    assert parse(tmp_path, f"--report_to {spelt}")[-1].report_to == ["tensorboard", "wandb"]
    (tmp_path / "run.yaml").write_text(f"report_to: {spelt}\n")
    assert parse(tmp_path, f"--config {tmp_path / 'run.yaml'}")[-1].report_to == ["tensorboard", "wandb"]


def test_none_is_the_default(tmp_path):
    assert parse(tmp_path)[-1].report_to == [] == parse(tmp_path, "--report_to none")[-1].report_to


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--report_to clearml", "--report_to clearml needs a package that is not installed: pip install clearml"),
        ("--report_to tensorbord", "tensorbord is unknown: did you mean tensorboard?"),
        ("--report_to none wandb", "none stands alone"),
        ("--project_name p", "add --report_to wandb"),
    ],
)
def test_services_that_cannot_be(tmp_path, installed, flags: str, sentence: str):
    with pytest.raises(InputError, match=re.escape(sentence)):
        parse(tmp_path, flags)


def test_names_of_project_and_run_reach_every_service(tmp_path, installed):
    config = parse(tmp_path, "--report_to trackio --project_name p --run_name r")[-1]
    import os

    assert (config.project, config.run_name) == ("p", "r")
    assert {os.environ[variable] for variable in PROJECT_VARIABLES} == {"p"}


def test_a_run_without_a_folder_is_refused():
    with pytest.raises(InputError, match="--output_dir is missing: name the folder"):
        args.parse(*OTHERS, args.SFTConfig, argv="--model_name_or_path m --dataset_name d".split())
