"""Answers of the policy sampled by an inference server (--rollout_url): vLLM, or what speaks its protocol.

The server holds the base; every update saves the adapter and tells the server to load it, under a new name, from the same disk:

    POST /v1/load_lora_adapter    {"lora_name": "policy-3f2a91c0-12", "lora_path": ".../rollout_adapter/policy-3f2a91c0-12"}
    POST /v1/chat/completions     {"model": "policy-3f2a91c0-12", "messages": [...], "n": K, ...}
    POST /v1/unload_lora_adapter  {"lora_name": "policy-3f2a91c0-11"}

1. Log-probs are those of our own pass. What the server says of its tokens weighs them (`losses.truncated_importance_weights`) and is compared
   (`first/ratio_deviation`): its kernels, or an adapter that it did not load, make another policy.
2. The server renders and tokenises prompts itself: if it counts other tokens than ours, the run ends.
3. An answer depends on --seed, the update and the prompt's place as with our own sampler, and on the server's own batches.
4. On several devices each asks for its own prompts; the first one alone pushes the adapter, for which the others wait.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from args import PPOConfig
from base.adapters import Role
from base.collator import VLPPODataCollator
from base.rollout import AnswerLogps, Answers, Prompts
from base.sampling import cut_after_end
from common.errors import InputError
from common.openai_client import Answer, Body, ChatReply, OpenAIClient, Refused, chat_body
from common.seeds import stable_seed

FOLDER = "rollout_adapter"
TIMEOUTS = 2  # requests that take all of --rollout_timeout, before the server is given up
_HINTS = {
    404: "start the server with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and let --rollout_url end in /v1",
    500: "docs/serving.md says which adapters vLLM loads; --max-lora-rank of vLLM must be --lora_r at least",
}
# vLLM answers 500 to an adapter that it cannot load, with what is wrong with it.
_FINAL = re.compile("lora|adapter|modules_to_save", re.IGNORECASE)


def adapter_parameters(model: PeftModel) -> list[nn.Parameter]:
    """Of the policy's adapter."""
    return [p for name, p in model.named_parameters() if f".{Role.POLICY.adapter}." in name]


def refuse_unserved(config: LoraConfig, in_vision: bool) -> None:
    """Raise InputError for an adapter that vLLM 0.32 does not load (`vllm/lora/peft_helper.py`), or loads in part.

    Args:
        in_vision: whether the adapter has weights in the vision tower or the projector.
    """
    init = config.init_lora_weights
    kinds = {
        "is a DoRA": config.use_dora,
        f"has modules of its own ({', '.join(config.modules_to_save or ())})": config.modules_to_save,
        "has biases": config.bias != "none" or config.lora_bias,
        f"starts from a changed base ({init})": isinstance(init, str) and init not in ("gaussian", "orthogonal"),
        "has weights in the vision tower or the projector": in_vision,
    }
    said = next((kind for kind, has in kinds.items() if has), None)
    if said is not None:
        raise InputError(
            f"The adapter {said}, which vLLM does not serve: train another one, or leave --rollout_url out (docs/serving.md)."
        )


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """With the whole of what ZeRO-3 has shared out."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # slow to import, and needed only here

    with deepspeed.zero.GatheredParameters(parameters):
        yield


class ServerRollouts:
    """Samples --rollouts_per_prompt answers to each prompt on a server.

    Args:
        run: part of the adapters' names, the same on all devices and of no other run.
        end_ids: tokens that end an answer.
        never: tokens that are not sampled, the image placeholders.
        vocabulary: number of tokens that the model knows.
    """

    def __init__(
        self,
        args: PPOConfig,
        collator: VLPPODataCollator,
        run: str,
        end_ids: Sequence[int],
        never: Sequence[int],
        vocabulary: int,
    ) -> None:
        self.args, self.collator, self.run = args, collator, run
        self.end_ids, self.never, self.vocabulary = [*end_ids], [*never], vocabulary
        self.folder = Path(args.output_dir).absolute() / FOLDER
        self.step: int | None = None  # of the adapter that the server has
        self.client = OpenAIClient(
            args.rollout_url or "",
            flag="--rollout_url",
            what="the rollout server",
            timeout=args.rollout_timeout,
            timeouts=TIMEOUTS,
            hints=_HINTS,
            final=_FINAL,
        )

    # -- the adapter ---------------------------------------------------------------------------------------------------

    def name(self, step: int | None) -> str:
        """Of the policy before an update."""
        return f"policy-{self.run}-{step}"

    def push(self, model: PeftModel, step: int, main: bool) -> None:
        """Give the server the policy of this step, if it has another; called on all devices, weights gathered.

        Args:
            main: whether this is the process that saves and pushes; the others wait until it has.

        Raises:
            InputError: the adapter cannot be saved, or the server does not take it; the same on all devices.
        """
        if step == self.step:
            return
        before, self.step = self.step, step
        failure: Exception | None = None
        if main:
            try:
                model.save_pretrained(str(self.folder / self.name(step)), selected_adapters=[Role.POLICY.adapter])
                self.load()
                if before is not None:
                    self._unload(before)
            except (InputError, OSError, SafetensorError) as error:
                failure = error
        (said,) = broadcast_object_list([None if failure is None else str(failure)])
        if said is not None:
            raise InputError(said) from failure

    def load(self) -> None:
        """Let the server load the adapter of `step`, which lies on disk; nothing to do if it has it."""
        name = self.name(self.step)
        body: Body = {"lora_name": name, "lora_path": str(self.folder / name)}
        try:
            self.client.post("load_lora_adapter", body, lambda response: None)
        except Refused as error:
            if "No adapter found" in error.said:
                where = f"{self.client.shown_url} sees no {self.folder / name}"
                raise InputError(
                    f"{where}: the server and the training must see the same disk under the same path."
                ) from error
            if "already" not in error.said:
                raise

    def _unload(self, step: int) -> None:
        name = self.name(step)
        try:
            self.client.post("unload_lora_adapter", {"lora_name": name}, lambda response: None)
        except Refused as error:
            if error.status != 404:  # the server was started anew and never had it
                raise
        shutil.rmtree(self.folder / name, ignore_errors=True)

    # -- answers -------------------------------------------------------------------------------------------------------

    def sample(
        self, prompts: Sequence[Prompts], seed: int, done: Callable[[int, Answers, AnswerLogps | None], None]
    ) -> None:
        """Sample answers to micro batches, all prompts at a time.

        Args:
            seed: with a prompt's place it is the seed of its answers.
            done: called with (number of the micro batch, its answers, their log-probs) as soon as all of one are there: what it
                has got is not lost when a later request fails. Log-probs are None without importance weights.

        Raises:
            InputError: the server does not answer, reads other tokens than ours, or gives no log-probs.
        """
        waiting = [(m, b) for m, batch in enumerate(prompts) for b in range(len(batch.tokens))]
        found: dict[tuple[int, int], ChatReply] = {}

        def keep(m: int, b: int, reply: ChatReply) -> None:
            where = prompts[m].rows[b].get("where") or "A row"
            self.collator.processor.check_served_prompt(reply, prompts[m].tokens[b], where, self.client.shown_url)
            found[m, b] = reply
            replies = [found[m, i] for i in range(len(prompts[m].tokens)) if (m, i) in found]
            if len(replies) == len(prompts[m].tokens):
                done(m, *self._answers(replies))

        def ask() -> None:
            left = [place for place in waiting if place not in found]
            bodies = (self._body(prompts[m], b, seed) for m, b in left)
            self.client.chat_all(bodies, lambda n, reply: keep(*left[n], reply), self.args.rollouts_per_prompt or 1)

        try:
            ask()
        except Refused as error:
            if error.status != 404:
                raise
            self.load()  # the server was started anew
            ask()

    def _body(self, prompts: Prompts, b: int, seed: int) -> Body:
        args, processor, row = self.args, self.collator.processor, prompts.rows[b]
        return chat_body(
            self.name(self.step),
            processor.api_messages(row["prompt"], row["images"]),
            num_answers=args.rollouts_per_prompt or 1,
            max_tokens=args.response_length,
            temperature=args.temperature or 1.0,
            top_p=args.top_p,
            seed=stable_seed(seed, prompts.places[b]) % 2**31,
            # Not what the checkpoint's generation_config.json says, which log-probs do not contain
            top_k=-1,
            min_p=0.0,
            repetition_penalty=1.0,
            stop_token_ids=self.end_ids,
            logit_bias={str(token): -100 for token in self.never},
            **processor.api_fields(row["prompt"], prompts.tokens[b]),
        )

    def _answers(self, replies: Sequence[ChatReply]) -> tuple[Answers, AnswerLogps | None]:
        """Token ids and log-probs of the answers to each prompt."""
        answers = [[self._ids(answer) for answer in reply.answers] for reply in replies]
        if not self.args.rollout_importance_cap:
            return answers, None
        return answers, [
            [self._logps(answer, len(ids)) for answer, ids in zip(reply.answers, of_prompt, strict=True)]
            for reply, of_prompt in zip(replies, answers, strict=True)
        ]

    def _ids(self, answer: Answer) -> list[int]:
        """Up to and with the end token. A text without token ids is tokenised again, which may split it differently.

        Raises:
            InputError: a token that an answer cannot have.
        """
        ids = answer.token_ids or self.collator.processor.encode_response(answer.text, answer.ended is not False)
        ids = cut_after_end(ids, self.end_ids)[: self.args.response_length]
        strange = next((id for id in ids if id in self.never or not 0 <= id < self.vocabulary), None)
        if strange is not None:
            why = "an image's place (it takes no logit_bias)" if strange in self.never else "none of the checkpoint's"
            raise InputError(
                f"{self.client.shown_url} answers with token {strange}, {why}: serve the checkpoint that is trained."
            )
        return ids

    def _logps(self, answer: Answer, tokens: int) -> list[float]:
        logps = (answer.logps or [])[:tokens]
        if len(logps) < tokens:
            raise InputError(
                f"{self.client.shown_url} gives no token ids with log-probs, from which importance weights are made: take a server that does, or "
                "--rollout_importance_cap 0."
            )
        return logps
