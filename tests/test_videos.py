"""Videos: frames, prompts and log-probs are those of the family's own processor and model; rows, scripts, pages, refusals.

The films are made here: frame i of them is red to i / n, with a white bar that moves to the right.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

import data
import train_dpo
import train_ppo
import train_rm
import train_sft
from args import DataArguments
from base.loading import load_model
from base.processor import VLProcessor
from base.reference_cache import row_key
from base.row_checks import ProcessorCheck
from base.videos import Video, blank_clip, count_media, load_clip, media_of, sampled, shown_pictures
from base.views import corrupted_view, without_images
from common.errors import InputError
from data import check, checked_rows
from data.rows import BadRow
from data.videos import read_header, videos_of
from eval import generate
from models import core_mapper_for
from tests import zoo
from tests.processes import ROOT

FAMILIES: list = ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "smolvlm"]
FAMILIES += [
    pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2_vl", "qwen3_vl_moe", "llava_next_video")
]
PAIR = {"prompt": "What moves?", "chosen": "A bar.", "rejected": "A ball, to the left."}


def frames_of_film(n: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """(n, height, width, 3)."""
    frames = np.zeros((n, *size, 3), np.uint8)
    for i in range(n):
        frames[i, :, :, 0] = i * 255 // n
        frames[i, :, 2 * i % size[1] : 2 * i % size[1] + 4] = 255
    return frames


def write_film(path: Path, frames: np.ndarray, fps: int = 8, codec: str = "mpeg4", rotation: int = 0) -> str:
    """The ending says the container."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.bit_rate = 2_000_000
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with films of two seconds and the pictures of three frames."""
    folder = tmp_path_factory.mktemp("films")
    write_film(folder / "bar.mp4", frames_of_film(16))
    write_film(folder / "bar.gif", frames_of_film(12), codec="gif")
    write_film(folder / "bar.mkv", frames_of_film(16))
    for i, frame in enumerate(frames_of_film(3)):
        Image.fromarray(frame).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


def processor_of(family: str, **flags: float) -> VLProcessor:
    path = zoo.checkpoint(family)
    return core_mapper_for(path).processor(path, **flags)


def row_of(videos: list[list[str]] | None, question: str, images: tuple[str, ...] = ()) -> dict:
    return {
        "images": [*images],
        "videos": videos,
        "prompt": [{"role": "user", "content": question}],
        "responses": ["A red ball.", "A blue box falls."],
        "ranks": [0.0, 1.0],
    }


def mixed_rows(family: str, films: Path) -> list[dict]:
    """Films of different length, a film beside a picture, frames, a text; SmolVLM's processor keeps one kind of medium per row."""
    rows = [
        row_of([[f"{films}/bar.mp4"]], "<video>What moves?"),
        row_of([[f"{films}/bar.gif"]], "Look at this: <video>\nAnd say."),
        row_of([[f"{films}/{i}.png" for i in range(3)]], "<video>Which?"),
        row_of(None, "Hello there"),
    ]
    if family != "smolvlm":
        rows[2] |= {"images": [f"{films}/0.png"], "prompt": [{"role": "user", "content": "<image>Then <video>Which?"}]}
    return rows


def batch_logps(family: str, rows: list[dict], encoded: bool = True, **flags: float) -> list[torch.Tensor]:
    """Log-probs of every response from one packed batch, from features (`encoded`) or pixels."""
    adapter = core_mapper_for(zoo.checkpoint(family))
    model = load_model(zoo.checkpoint(family), dtype=torch.float32).eval()
    batch = adapter.dpo_collator(processor_of(family, **flags), share_prefix=model.packs)(rows)
    mask = batch["completion_mask"]
    with torch.no_grad():
        images = model.encode_images(batch["img_input_dict"]) if encoded else batch["img_input_dict"]
        logps = model(
            **model.packed_inputs(batch["input_ids"], batch["segment_ids"], images, batch["packed"], batch["layout"]),
            completion_index=batch["completion_index"][mask],
            completion_ids=batch["completion_ids"][mask],
        ).logps
    return [*logps.split(mask.sum(1).tolist())]


def all_frames(video: Video) -> tuple[np.ndarray, VideoMetadata]:
    """Every frame of a film, decoded without this project's code, for the family's own `sample_frames`."""
    with av.open(str(video.files[0])) as container:
        rate = container.streams.video[0].average_rate
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    n = len(frames)
    return frames, VideoMetadata(total_num_frames=n, fps=float(rate), duration=n / rate, height=32, width=32)


def own_logps(family: str, row: dict, num_frames: int, fps: float | None) -> list[torch.Tensor]:
    """Log-probs of every response by the family's transformers processor, which samples the film itself, and its plain model."""
    path, ours = zoo.checkpoint(family), processor_of(family)
    native = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    parts = ours.template.as_parts(row["prompt"], *count_media(media_of(row)))
    text = native.apply_chat_template(
        parts, chat_template=ours.chat_template, add_generation_prompt=True, tokenize=False
    )
    kwargs: dict = {}
    for video in (medium for medium in media_of(row) if isinstance(medium, Video)):
        if len(video.files) == 1:
            frames, metadata = all_frames(video)
            settings: dict = {"do_sample_frames": True, "num_frames": num_frames, "fps": fps}
        else:  # frames that are given are all taken; with --video_frames they count as one a second
            frames, n = np.stack([np.asarray(Image.open(file)) for file in video.files]), len(video.files)
            rate = float(fps or 1)
            metadata = VideoMetadata(total_num_frames=n, fps=rate, duration=n / rate, frames_indices=[*range(n)])
            settings = {"do_sample_frames": False}
        kwargs = {"videos": [frames], "videos_kwargs": {"video_metadata": [metadata], **settings}}
    images = [Image.open(image).convert("RGB") for image in row["images"]]
    bos = native.tokenizer.bos_token
    prompt = native(
        text=[text],
        images=[images] if images else None,
        add_special_tokens=not (bos and text.startswith(bos)),
        return_tensors="pt",
        **kwargs,
    )
    found = []
    for response in row["responses"]:
        answer = ours.encode_response(response)
        inputs = {**prompt, "input_ids": torch.cat([prompt["input_ids"], torch.tensor([answer])], 1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            kinds = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, len(answer))], 1)
        with torch.no_grad():
            logps = model(**inputs).logits[0].log_softmax(-1)[-len(answer) - 1 : -1]
        found.append(logps.gather(1, torch.tensor(answer)[:, None])[:, 0])
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What a model sees
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logps_are_those_of_the_familys_own_processor_and_model(family: str, films: Path):
    rows = mixed_rows(family, films)
    fps = 1 if family == "smolvlm" else None
    own = [logps for row in rows for logps in own_logps(family, row, 4, fps)]
    flags = {"video_frames": 4}
    for encoded in (True, False):
        found = batch_logps(family, rows, encoded, **flags)
        for ours, theirs in zip(found, own, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    processor = processor_of(family, **flags)
    collator = core_mapper_for(zoo.checkpoint(family)).dpo_collator(processor)
    whole = collator.encode_prompts(rows)[0]
    with processor.lengths_only():
        assert [*map(len, collator.encode_prompts(rows)[0])] == [*map(len, whole)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_frame_changes_the_logps(family: str, films: Path, tmp_path: Path):
    frames = frames_of_film(16)
    frames[8] = 255 - frames[8]
    changed = write_film(tmp_path / "changed.mp4", frames)
    question = "<video>What moves?"
    flags = {"video_frames": 16, "video_fps": 8} if family == "smolvlm" else {"video_frames": 16}
    rows = [row_of([[f"{films}/bar.mp4"]], question), row_of([[changed]], question)]
    first, *_, last = batch_logps(family, rows, **flags)
    second = batch_logps(family, rows, **flags)[2]
    assert (first - second).abs().max() > 1e-3 and len(last)


@pytest.mark.parametrize(
    ("family", "flags", "frames"),
    [
        ("llava_onevision", {"video_frames": 4}, [0, 4, 8, 12]),
        ("llava_onevision", {}, [*range(16)]),  # 32 by default: a shorter film gives all
        ("llava_onevision", {"video_fps": 1}, [0, 8]),  # of two seconds
        ("internvl", {"video_frames": 4}, [2, 6, 10, 14]),  # the middle of each part
        ("internvl", {}, [1, 3, 5, 7, 9, 11, 13, 15]),  # 8 by default
        ("qwen2_5_vl", {}, [0, 4, 8, 12]),  # two a second
        ("qwen2_5_vl", {"video_frames": 6}, [0, 2, 5, 8, 10, 13]),
        ("qwen2_5_vl", {"video_fps": 4}, [0, 2, 4, 6, 8, 10, 12, 14]),
        ("qwen3_vl", {}, [0, 5, 10, 15]),
        ("qwen3_vl", {"video_frames": 5}, [0, 4, 8, 11, 15]),
        ("smolvlm", {}, [0, 15]),  # one a second
        ("smolvlm", {"video_frames": 1}, [0]),
    ],
)
def test_frames_by_hand(family: str, flags: dict, frames: list[int], films: Path):
    processor = processor_of(family, **flags).processor.video_processor
    film = Video((f"{films}/bar.mp4",))
    assert sampled(film, processor)[1] == frames
    clip = load_clip(film, processor)
    drawn = frames_of_film(16).astype(int)
    nearest = [np.abs(drawn - frame).mean((1, 2, 3)).argmin() for frame in clip.frames]
    assert nearest == frames
    assert clip.metadata.frames_indices == frames and clip.metadata.fps == 8
    assert blank_clip(film, processor).frames.shape == clip.frames.shape


DEFAULTS = [line.split("|")[1:3] for line in (ROOT / "docs" / "models.md").read_text().splitlines()]
DEFAULTS = {name: frames for folders, frames, *_ in filter(None, DEFAULTS) for name in re.findall(r"`(\w+)`", folders)}


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_where_a_checkpoint_says_nothing(family: str):
    """The numbers of docs/models.md, and those of transformers' class where it has any; else it would take every frame."""
    native = type(processor_of(family).processor.video_processor)
    ours = dict(core_mapper_for(zoo.checkpoint(family)).processor.video_sampling)
    theirs = {name: value for name in ("num_frames", "fps") if (value := getattr(native, name, None)) is not None}
    assert theirs == ours if theirs else not native.do_sample_frames
    limits = [number for name in ("min_frames", "max_frames") if (number := getattr(native, name, None))]
    numbers = [ours[name] for name in ("fps", "num_frames") if name in ours] + limits
    assert [int(n) for n in re.findall(r"\d+", DEFAULTS[family])] == numbers

    def frames(seconds: int) -> int:
        film = VideoMetadata(total_num_frames=24 * seconds, fps=24, width=32, height=32, duration=seconds)
        return len(native().sample_frames(film, **{"num_frames": None, "fps": None} | ours))

    least, most = limits or (1, ours.get("num_frames"))
    rate = ours.get("fps", 1e9)
    for seconds in (2, 10, 3600):
        assert frames(seconds) == min(max(seconds * rate, least), most), seconds


def test_frames_that_are_pictures_are_all_seen_but_for_a_flag(films: Path):
    pictures = Video(tuple(f"{films}/{i}.png" for i in range(3)))
    assert sampled(pictures, processor_of("qwen2_5_vl").processor.video_processor)[1] == [0, 1, 2]
    assert sampled(pictures, processor_of("llava_onevision", video_frames=2).processor.video_processor)[1] == [0, 1]


def test_films_of_other_kinds_and_films_that_lie_on_their_side(films: Path, tmp_path: Path):
    assert read_header(f"{films}/bar.gif").frames == 12
    assert read_header(f"{films}/bar.mkv")[:2] == (16, 8)  # whose header counts no frames
    tall = write_film(tmp_path / "tall.mp4", frames_of_film(4, (32, 48)), rotation=90)
    assert read_header(tall)[2:] == (32, 48)
    upright = load_clip(Video((tall,)), processor_of("llava_onevision").processor.video_processor).frames
    assert upright.shape == (4, 48, 32, 3)
    with av.open(tall) as container:
        assert next(container.decode(video=0)).rotation % 360 in (90, 270)


def test_sampling_is_saved_with_the_processor(tmp_path: Path):
    processor_of("qwen2_5_vl", video_frames=6).save_pretrained(tmp_path)
    again = core_mapper_for(zoo.checkpoint("qwen2_5_vl")).processor(str(tmp_path))
    assert (again.processor.video_processor.num_frames, again.processor.video_processor.fps) == (6, None)


@pytest.mark.parametrize(
    ("family", "flags", "sentence"),
    [
        ("llava", {"video_frames": 4}, "have no part in LlavaProcessor, which reads pictures alone"),
        ("qwen2_vl", {"video_frames": 4, "video_fps": 1}, "both say which frames"),
        ("qwen2_vl", {"video_fps": -1}, "are numbers above 0"),
    ],
)
def test_flags_that_do_not_fit(family: str, flags: dict, sentence: str):
    with pytest.raises(InputError, match=sentence):
        processor_of(family, **flags)


@pytest.mark.parametrize("family", ["llava_onevision", "llava_next_video"])
def test_videos_of_any_length_pass_the_tower_once(family: str, films: Path):
    model = load_model(zoo.checkpoint(family), dtype=torch.float32).eval()
    processor, passes = processor_of(family, video_frames=4), []
    model.get_vision_tower().register_forward_hook(lambda *_: passes.append(1))
    rows = [row_of([[f"{films}/bar.mp4"]], "Q"), row_of([[f"{films}/{i}.png" for i in range(3)]], "Q")]
    batch = core_mapper_for(zoo.checkpoint(family)).dpo_collator(processor)(rows)
    assert [len(clip) for clip in batch["img_input_dict"]["pixel_values_videos"]] == [4, 3]
    model.encode_images(batch["img_input_dict"])
    assert passes == [1]


# ----------------------------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------------------------

PART = {"type": "video", "video": "bar.mp4"}
FRAMES = ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    ("row", "videos", "question"),
    [
        ({"video": "bar.mp4"}, [["bar.mp4"]], "<video>What moves?"),
        ({"videos": ["bar.mp4", "bar.gif"], "prompt": "<video> or <video>?"}, [["bar.mp4"], ["bar.gif"]], "<video> or <video>?"),
        ({"video": FRAMES}, [FRAMES], "<video>What moves?"),
        ({"videos": [FRAMES, "bar.mkv"]}, [FRAMES, ["bar.mkv"]], "<video><video>What moves?"),
        ({"videos": [{"path": "bar.mp4", "bytes": None}]}, [["bar.mp4"]], "<video>What moves?"),
        ({"video": "bar.mp4", "image": "0.png"}, [["bar.mp4"]], "<image><video>What moves?"),
        # LLaVA-Video's sets write <image> for a video
        ({"video": "bar.mp4", "prompt": "<image>\nQ?"}, [["bar.mp4"]], "<video>\nQ?"),
        ({"prompt": [{"role": "user", "content": [PART, {"type": "text", "text": "Q?"}]}]}, [["bar.mp4"]], "<video>Q?"),
        ({"video": "", "videos": None}, [], "What moves?"),
    ],
)  # fmt: skip
def test_layouts_of_rows(row: dict, videos: list[list[str]], question: str, films: Path, tmp_path: Path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([PAIR | row]))
    args = DataArguments(dataset_name="plain_dpo", data_path=str(file), image_root=str(films))
    (found,) = data.load_train_eval(args, "preference", 0).train
    assert [[Path(name).name for name in files] for files in found.get("videos") or []] == videos
    assert found["prompt"][0]["content"] == question


def test_rows_of_other_projects(films: Path, tmp_path: Path):
    """ms-swift's and LLaMA-Factory's `videos`, MM-RLHF's `video`, and TRL's conversations with parts."""
    talk = {
        "messages": [{"role": "user", "content": "<video>Q?"}, {"role": "assistant", "content": "Yes."}],
        "videos": ["bar.mp4"],
    }
    trl = {"messages": [{"role": "user", "content": [PART, {"type": "text", "text": "Q?"}]}, talk["messages"][1]]}
    (tmp_path / "swift.jsonl").write_text(json.dumps(talk) + "\n" + json.dumps(trl) + "\n")
    args = DataArguments(dataset_name=str(tmp_path / "swift.jsonl"), image_root=str(films))
    for row in data.load_train_eval(args, "conversation", 0).train:
        assert row["videos"] == [[f"{films}/bar.mp4"]] and row["messages"][0]["content"] == "<video>Q?"
    ranked = {"video": "bar.mp4", "prompt": "Q?", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}
    (tmp_path / "mm.jsonl").write_text(json.dumps(PAIR | {"video": "bar.mp4"}) + "\n" + json.dumps(ranked) + "\n")
    args = DataArguments(dataset_name="mmrlhf", data_path=str(tmp_path / "mm.jsonl"), image_root=str(films))
    splits = data.load_train_eval(args, "preference", 0)
    assert splits.train["videos"][:] == [[[f"{films}/bar.mp4"]]] * 2 and splits.info["sets"][0]["without_image"] == 0


def test_a_video_and_its_copy_are_one_for_the_evaluation_split(films: Path, tmp_path: Path):
    for name in ("a.mp4", "copy.mp4"):
        (tmp_path / name).write_bytes((films / "bar.mp4").read_bytes())
    write_film(tmp_path / "other.mp4", frames_of_film(8))
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([PAIR | {"video": name} for name in ("a.mp4", "copy.mp4", "other.mp4")]))
    _, verdicts, _ = checked_rows(DataArguments(dataset_name="plain_dpo", data_path=str(file)), "preference")
    assert verdicts.group[0] == verdicts.group[1] != verdicts.group[2]


def test_every_bad_video_is_refused_with_its_reason(films: Path, tmp_path: Path):
    whole = (films / "bar.mp4").read_bytes()
    with av.open(str(tmp_path / "fast.mp4"), "w", options={"movflags": "faststart"}) as out:  # its header comes first
        stream = out.add_stream("mpeg4", rate=8)
        stream.height = stream.width = 32
        for frame in frames_of_film(16):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    fast = (tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(fast[:-20])
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_bytes(b"not a film" * 500)
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1\n{films}/bar.mp4\n#EXT-X-ENDLIST\n")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for i, size in enumerate((16, 24)):
        Image.new("RGB", (size, 16)).save(tmp_path / f"{i}.png")
    cases: list[tuple[dict, str]] = [
        ({"video": "cut.mp4"}, "has the video .*cut.mp4, which is cut off: 15 of its 16 frames are there"),
        ({"video": "half.mp4"}, "half.mp4, which is broken or cut off"),
        ({"video": "text.mp4"}, r"text.mp4, which is broken or cut off \(Invalid data"),
        (
            {"video": "list.mp4"},
            r"list.mp4, which is broken or cut off \(Invalid data",
        ),  # its parts would be read unasked
        ({"video": "empty.mp4"}, "names the video .*empty.mp4, which has 0 bytes"),
        ({"video": "gone.mp4"}, "names the video .*gone.mp4, which does not exist"),
        ({"video": "0.png"}, "names the video 0.png in `video`: a video is one mp4"),
        ({"video": "clip.docx"}, "names the video clip.docx in `video`: a video is one mp4"),
        ({"videos": [[]]}, "has a video without frames in `videos`"),
        ({"videos": [["0.png", "1.png"]]}, "has frames of different sizes in one video"),
        ({"video": "https://x/y.mp4"}, "names the video https://x/y.mp4 by URL"),
        ({"video": "../y.mp4"}, "names the video ../y.mp4, which lies outside of --image_root"),
        ({"video": "fast.mp4", "prompt": "<video><video>?"}, "has 2 <video> marks and 1 video"),
        ({"prompt": "<video>?"}, "names <video> in the text of message 0"),
        ({"video": "fast.mp4", "videos": ["fast.mp4"]}, "has both `video` and `videos`"),
        ({"video": "fast.mp4", "chosen": "<video>"}, "stands for a picture|has <video> in"),
        ({"prompt": [{"role": "user", "content": [{**PART, "fps": 2}]}]}, "sets fps for one video"),
    ]
    (tmp_path / "rows.json").write_text(json.dumps([PAIR | row for row, _ in cases]))
    args = DataArguments(dataset_name="plain_dpo", data_path=str(tmp_path / "rows.json"))
    check_tokens = ProcessorCheck(processor_of("llava_onevision"))
    _, verdicts, _ = checked_rows(args, "preference", check_tokens)
    for (row, reason), found in zip(cases, verdicts.problem, strict=True):
        assert found is not None, row
        assert re.search(reason, found), (row, found)


def test_films_as_bytes_are_refused():
    with pytest.raises(BadRow, match="holds a video as bytes in `videos`"):
        videos_of([{"bytes": b"0", "path": "a.mp4"}])


def test_a_missing_package_is_one_sentence(monkeypatch, films: Path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install -r requirements\.txt"):
        read_header(f"{films}/bar.mp4")


def test_a_film_that_breaks_after_the_check_is_named(films: Path, tmp_path: Path):
    processor = processor_of("llava_onevision").processor.video_processor
    (tmp_path / "x.mp4").write_bytes((films / "bar.mp4").read_bytes()[:500])
    with pytest.raises(InputError, match=r"Cannot read .*x\.mp4 as a video"):
        load_clip(Video((f"{tmp_path}/x.mp4",)), processor)


# ----------------------------------------------------------------------------------------------------------------------
# What takes no videos
# ----------------------------------------------------------------------------------------------------------------------


def test_a_family_without_videos_refuses_the_row_by_name(films: Path, tmp_path: Path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([PAIR | {"image": "0.png"}, PAIR | {"video": "bar.mp4"}]))
    args = DataArguments(dataset_name="plain_dpo", data_path=str(file), image_root=str(films))
    with pytest.raises(InputError, match=r"row 1 .*has a video.*LlavaProcessor, which reads pictures alone"):
        data.load_train_eval(args, "preference", 0, check=ProcessorCheck(processor_of("llava")))


def test_smolvlm_refuses_pictures_beside_a_video(films: Path):
    check_row = ProcessorCheck(processor_of("smolvlm"))
    assert "either pictures or videos" in str(check_row.refused_shape([("user", 1, 1)], "preference"))
    assert check_row.refused_shape([("user", 0, 1)], "preference") is None


def test_views_of_rows_with_videos(films: Path):
    row = row_of([[f"{films}/bar.mp4"]], "<video>What moves?") | {"where": "rows.json, row 3"}
    assert media_of(bare := without_images(row, lambda text: text)) == []
    assert bare["prompt"][0]["content"] == "What moves?"
    with pytest.raises(InputError, match=r"rows\.json, row 3 has a video"):
        corrupted_view([row], [[0]], "diffusion", [0])


def test_the_reference_cache_sees_another_film(films: Path, tmp_path: Path):
    processor = processor_of("qwen2_5_vl")
    keys = [
        row_key(row_of([[name]], "<video>Q?"), [], processor)
        for name in (f"{films}/bar.mp4", f"{films}/bar.mp4", write_film(tmp_path / "x.mp4", frames_of_film(8)))
    ]
    assert keys[0] == keys[1] != keys[2]


# ----------------------------------------------------------------------------------------------------------------------
# Scripts, pages, evaluation
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def flags(films: Path, tmp_path: Path):
    """Flags of a script on four rows: films, frames, a picture, a text."""

    def build(script: str, family: str, extra: str = "") -> list[str]:
        rows = [
            PAIR | own for own in ({"video": "bar.mp4"}, {"video": FRAMES}, {"image": "0.png"}, {"videos": ["bar.gif"]})
        ]
        rows[3]["prompt"] = "Say what <video> shows."
        if script == "sft":
            rows = [
                {k: v for k, v in row.items() if k in ("video", "videos", "image")}
                | {
                    "messages": [
                        {"role": "user", "content": row["prompt"]},
                        {"role": "assistant", "content": row["chosen"]},
                    ]
                }
                for row in rows
            ]
        file = tmp_path / f"{script}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return shlex.split(
            f"--model_name_or_path {zoo.checkpoint(family)} --dataset_name {file} --image_root {films} --output_dir {tmp_path}/{script} "
            "--max_steps 2 --per_device_train_batch_size 4 --learning_rate 1e-2 --save_strategy no --disable_tqdm True --seed 0 "
            f"--use_lora True --lora_r 4 --logging_steps 1 --video_frames 4 {extra}"
        )

    return build


@pytest.mark.parametrize(
    ("script", "family"),
    [
        ("sft", "internvl"),
        ("dpo", "llava_onevision"),
        ("rm", "qwen2_5_vl"),
        pytest.param("sft", "qwen2_5_vl", marks=pytest.mark.slow),
    ],
)
def test_scripts_train_on_videos(script: str, family: str, flags, tmp_path: Path):
    main = {"sft": train_sft, "dpo": train_dpo, "rm": train_rm}[script].main
    main(flags(script, family, "--max_length 400"))
    log = json.loads((tmp_path / script / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    run = json.loads((tmp_path / script / "run.json").read_text())
    assert run["plan"]["video_frames"] == 4 and run["data"]["sets"][0]["without_image"] == 0


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("llava_onevision", marks=pytest.mark.slow)])
def test_ppo_answers_questions_about_videos(family: str, flags, tmp_path: Path):
    (tmp_path / "rewards.py").write_text(
        "seen = []\ndef length(responses, videos):\n    seen.extend(videos)\n    return [float(len(r)) for r in responses]\n"
    )
    extra = (
        f"--reward_fn {tmp_path}/rewards.py:length --response_length 4 --num_ppo_epochs 1 --num_sample_generations 2"
    )
    train_ppo.main(flags("ppo", family, extra + " --rollouts_per_prompt 2"))
    log = json.loads((tmp_path / "ppo" / "trainer_state.json").read_text())["log_history"]
    assert log
    page = next((tmp_path / "ppo" / "samples").glob("*.html")).read_text()
    assert (
        page.count("<img") == page.count('class="card sample"') > 1
    )  # one picture stands for each row, of films the first


def test_the_page_of_data_check_counts_videos_and_shows_a_frame(films: Path, tmp_path: Path, capsys):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([PAIR | {"video": "bar.mp4"}, PAIR | {"videos": [FRAMES]}, PAIR]))
    fixed = tmp_path / "fixed.jsonl"
    argv = f"--dataset_name plain_dpo --data_path {file} --image_root {films} --output_dir {tmp_path}/out --fix {fixed}"
    model = f" --model_name_or_path {zoo.checkpoint('qwen2_5_vl')} --video_frames 4"
    assert check.main(shlex.split(argv + model)) == 0
    table = capsys.readouterr().out
    for line in (r"videos per row +0: 1, 1: 2", r"frames of a video +3 to 16", r"seconds of a video +2 to 2"):
        assert re.search(line, table), table
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<img") == 2 and "first frame of bar.mp4" in page and "of them for videos" in page
    rows = [json.loads(line) for line in fixed.read_text().splitlines()]
    assert rows[0]["videos"] == [["bar.mp4"]] and rows[1]["videos"] == [FRAMES] and "videos" not in rows[2]
    args = DataArguments(dataset_name=str(fixed), image_root=str(films))
    assert len(data.load_train_eval(args, "preference", 0).train) == 3


def test_evaluation_answers_questions_about_videos(films: Path, tmp_path: Path):
    file = tmp_path / "questions.jsonl"
    rows = [
        {"video": "bar.mp4", "question": "What moves?"},
        {"video": FRAMES, "question": "And here?"},
        {"question": "Hi?"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "answers.jsonl"
    argv = f"--task plain --data_path {file} --image_root {films} --model_name_or_path {zoo.checkpoint('llava_onevision')} --output {out}"
    generate.main(shlex.split(argv + " --max_new_tokens 3 --batch_size 4"))
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [Path(row["videos"][0][0]).name for row in answers if "videos" in row] == ["bar.mp4", "0.png"]
    file.write_text(json.dumps({"video": "gone.mp4", "question": "What?"}) + "\n")
    with pytest.raises(InputError, match=r"the video .*gone\.mp4 does not exist"):
        generate.main(shlex.split(argv + "2 --max_new_tokens 3"))


def test_pages_show_the_first_frame(films: Path):
    (picture,) = shown_pictures(row_of([[f"{films}/bar.mp4"]], "Q"))
    assert picture.size == (32, 32) and np.asarray(picture)[:, 8:, 0].mean() < 8
