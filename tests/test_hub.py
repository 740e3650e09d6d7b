"""--push_to_hub: what reaches the hub, by a stand-in for huggingface_hub's two calls."""

import copy
import importlib
from concurrent.futures import Future
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

import args
import train_sft
from base.hub import model_files
from common.errors import InputError


class Hub:
    """Takes uploads: what is `uploaded` are (message, path in the repository, {file: text or None})."""

    def __init__(self) -> None:
        self.made: list[dict] = []
        self.uploaded: list[tuple[str, str | None, dict[str, str | None]]] = []
        self.tokens: set[str | None] = set()
        self.fails: Exception | None = None

    def create_repo(self, api: object, repo_id: str, **how: object) -> object:
        if self.fails:
            raise self.fails
        self.made.append({"repo_id": repo_id} | how)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id.rpartition('/')[2]}")

    def upload_folder(self, api: object, *, folder_path: str, run_as_future: bool, **how: object) -> object:
        folder = Path(folder_path)
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        kept = filter_repo_objects(names, allow_patterns=how["allow_patterns"])
        texts = {name: (folder / name).read_text() if name.endswith((".md", ".json")) else None for name in kept}
        self.uploaded.append((str(how["commit_message"]), how["path_in_repo"], texts))
        self.tokens.add(how["token"])
        done: Future = Future()
        done.set_result(None)
        return done if run_as_future else None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    for name in ("create_repo", "upload_folder"):
        call = getattr(stand_in, name)
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda api, *a, call=call, **k: call(api, *a, **k))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    return stand_in


HEADS = {"sft": set(), "dpo": set(), "rm": {"reward_head.safetensors"}, "ppo": {"value_head.safetensors"}}


@pytest.mark.parametrize("script", HEADS)
def test_adapter_head_processor_and_card(command, rewards, tmp_path, hub: Hub, script: str, monkeypatch):
    flags = "--use_lora True --lora_r 4 --push_to_hub True --hub_token hf_secret --hub_model_id me/mine --hub_private_repo True"
    flags += f" --reward_fn {rewards} --response_length 4" if script == "ppo" else ""
    argv = command(script, f"{flags} --save_strategy steps --save_steps 1", out=tmp_path / "run")
    monkeypatch.setattr("sys.argv", [f"train_{script}.py", *argv])
    importlib.import_module(f"train_{script}").main(argv)
    assert hub.made == [{"repo_id": "me/mine", "token": "hf_secret", "private": True, "exist_ok": True}]
    assert hub.tokens == {"hf_secret"}
    messages = [message for message, *_ in hub.uploaded]
    assert messages == ["Training in progress, step 1", "Training in progress, step 2", "End of training"]
    for _, place, files in hub.uploaded:
        assert place is None and {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {*files}
        assert {name for name in files if "head" in name} == HEADS[script]
        assert not {*files} & {"run.json", "trainer_state.json", "training_args.bin", "optimizer.pt", "index.html"}
        assert "# run\n" in files["README.md"] and "A LoRA adapter for" in files["README.md"]
        assert not any("hf_secret" in text for text in files.values() if text)
    for file in (tmp_path / "run").rglob("*"):  # nor does a checkpoint hold the token that is handed on
        assert not file.is_file() or b"hf_secret" not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("strategy", "places"),
    [
        ("end", [None]),
        ("checkpoint", [None, "last-checkpoint", None]),
        pytest.param("all_checkpoints", [None, "checkpoint-2", None], marks=pytest.mark.slow),
    ],
)
def test_strategies(command, tmp_path, hub: Hub, strategy: str, places: list):
    flags = f"--use_lora True --lora_r 4 --push_to_hub True --hub_token t --hub_strategy {strategy} --save_strategy steps --save_steps 2"
    train_sft.main(command("sft", flags, out=tmp_path / "run"))
    assert [place for _, place, _ in hub.uploaded] == places and hub.made[0]["repo_id"] == "run"
    for _, place, files in hub.uploaded:
        assert ("optimizer.pt" in files) == (place is not None)


def test_what_fails_costs_no_model(command, tmp_path, hub: Hub, monkeypatch):
    flags = "--use_lora True --lora_r 4 --push_to_hub True --hub_token t --hub_strategy end"

    def fails(api: object, **how: object) -> None:
        raise OSError("the network\nis down")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fails)
    with pytest.raises(
        InputError, match=r"The model is saved in .*run, and its upload to me/run failed \(the network is down\)"
    ):
        train_sft.main(command("sft", flags, out=tmp_path / "run"))
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    hub.fails = OSError("401")
    with pytest.raises(InputError, match=r"the repository again can be neither found nor made \(401\)"):
        train_sft.main(command("sft", flags, out=tmp_path / "again"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--push_to_hub True", "needs a token that may write: run `hf auth login`"),
        ("--hub_model_id me/mine", "--hub_model_id me/mine needs --push_to_hub True"),
        ("--push_to_hub True --hub_token t --do_train False", "leave --push_to_hub out"),
    ],
)
def test_refused_before_a_model_is_loaded(tmp_path, hub: Hub, flags: str, message: str):
    with pytest.raises(InputError, match=message):
        args.parse(args.SFTConfig, argv=f"--output_dir {tmp_path} {flags}".split())


def test_offline_is_said(tmp_path, hub: Hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        args.parse(args.SFTConfig, argv=f"--output_dir {tmp_path} --push_to_hub True --hub_token t".split())


def test_the_token_is_not_pickled(tmp_path, hub: Hub):
    for kind in (args.SFTConfig, args.DPOConfig):
        (config,) = args.parse(kind, argv=f"--output_dir {tmp_path} --push_to_hub True --hub_token hf_secret".split())
        torch.save(config, tmp_path / "training_args.bin")
        assert config.hub_token == "hf_secret" and copy.copy(config).hub_token is None  # made as pickle makes it
        assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()


def test_model_files_lists_what_a_folder_holds(tmp_path):
    for name in ("a.json", "ref/b.safetensors", "training_args.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert model_files(tmp_path) == ["a.json", "ref/b.safetensors"]
