"""lmms-eval's model interface on our models; registered and started by eval.lmms."""

from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from common.errors import InputError
from eval.generate import Answerer, EncodedBatches, chunks, family_settings

GENERATION = ("max_new_tokens", "num_beams", "temperature", "top_p", "do_sample")


class LmmsModel(lmms):
    """Batched, left-padded generation; the vision tower runs once per image within a batch."""

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        bf16: bool = False,
        enable_thinking: bool = False,
        batch_size: int | str = 8,
        device: str | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.batch_size = int(batch_size)
        thinking = str(enable_thinking) == "True"  # lmms-eval passes text
        self.answerer = Answerer(pretrained, adapter, self.device, str(bf16) == "True", enable_thinking=thinking)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to every request, in order, cut at the task's stop strings."""
        answers: list[str] = []
        with tqdm(total=len(requests), unit="row", disable=self._rank != 0) as bar:
            for batch in chunks(list(range(len(requests))), self.batch_size):
                # requests of one task share their settings; a batch ends where they change
                for same in self._by_settings([requests[i] for i in batch]):
                    answers += self._answer(same)
                    bar.update(len(same))
        return answers

    @staticmethod
    def _by_settings(requests: list[Instance]) -> list[list[Instance]]:
        groups: list[list[Instance]] = []
        for request in requests:
            if groups and groups[-1][0].args[1] == request.args[1]:
                groups[-1].append(request)
            else:
                groups.append([request])
        return groups

    def _row(self, context: str, visuals: list) -> dict:
        if any(isinstance(v, str) for v in visuals):
            raise InputError("this lmms-eval task shows videos, which no family here reads")
        return {"id": "", "prompt": context, "images": visuals}

    def _answer(self, requests: list[Instance]) -> list[str]:
        rows = []
        for context, _, doc_to_visual, doc_id, task, split in (r.args for r in requests):
            rows.append(self._row(context, list(doc_to_visual(self.task_dict[task][split][doc_id]) or [])))
        asked = dict(requests[0].args[1])
        until = asked.get("until") or []
        settings = family_settings(self.answerer.core)
        settings |= {k: asked[k] for k in GENERATION if asked.get(k) is not None}
        if not settings.get("temperature") or settings.get("do_sample") is False:
            settings |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            settings["do_sample"] = True
        texts: list[str | None] = [None] * len(rows)
        # rows without an image never stand beside rows with one
        for wanted in (True, False):
            chosen = [i for i, row in enumerate(rows) if bool(row["images"]) is wanted]
            if not chosen:
                continue
            encoded = EncodedBatches([[rows[i] for i in chosen]], self.answerer.prompt_collator)[0][1]
            self.answerer.forget_images()
            for i, text in zip(chosen, self.answerer.answer(encoded, settings, seed=0), strict=True):
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0] if stop else text
                texts[i] = text
        return [t or "" for t in texts]

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(mean token loss, whether greedy search would say the same): what lmms-eval's own wrappers return."""
        collator = self.answerer.response_collator
        out = []
        for context, target, doc_to_visual, doc_id, task, split in tqdm(
            [r.args for r in requests], disable=self._rank != 0
        ):
            doc = self.task_dict[task][split][doc_id]
            row = self._row(context, list(doc_to_visual(doc) or []))
            prompt = [{"role": "user", "content": context.replace("<image>", "")}]
            response = target if isinstance(target, str) else target(doc)
            self.answerer.processor.train()
            batch = collator.responses_only([{"images": row["images"], "prompt": prompt, "responses": [response]}])
            self.answerer.processor.infer()
            logps, mask = self.answerer.response_logps(batch)
            greedy = self.answerer.greedy_tokens(batch)
            out.append(((-logps.sum() / mask.sum()).item(), bool((greedy == batch["completion_ids"][0].cpu()).all())))
        return out

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Tasks of several rounds are refused."""
        raise InputError("tasks of several rounds are not supported by this wrapper")
