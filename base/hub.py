"""`--push_to_hub`: what a run uploads, and when.

The repository gets the files of the model: weights or adapter, heads, processor, and README.md, our model card. Samples, logs,
rows that were refused and run.json stay on the disk: they show the data and the command line.

| `--hub_strategy` | uploaded |
|---|---|
| end | the model, after training |
| every_save | and after each checkpoint, in the background |
| checkpoint | and the newest checkpoint, from which a run can go on, as `last-checkpoint` |
| all_checkpoints | and every checkpoint under its name |
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from common.errors import InputError

logger = logging.getLogger(__name__)

# Of what a model's folder holds; pickled, and it names folders of this machine
NOT_UPLOADED = ("training_args.bin",)


def model_files(folder: Path) -> list[str]:
    """The files that a fresh folder of a saved model holds, by their names in it."""
    found = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in found if name not in NOT_UPLOADED)


class HubUploads(Trainer):
    """Trainer's uploads, of the files in `_model_files` alone."""

    _model_files: Sequence[str] = ()  # of the model that was saved last

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's: find or make the repository.

        Raises:
            InputError: the hub cannot be reached, or does not let us write.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except (HfHubHTTPError, OSError, ValueError) as error:  # ValueError: a name that the hub does not take
            raise InputError(
                f"--push_to_hub: the repository {self.args.hub_model_id or Path(self.args.output_dir).name} can be neither found nor made "
                f"({' '.join(str(error).split())[:300]}): look at --hub_model_id, the token's rights and the network."
            ) from error

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model and upload it; for the arguments see `upload_model`."""
        self.save_model(_internal_call=True)
        return self.upload_model(*args, **kwargs) if self.is_world_process_zero() else None

    def upload_model(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        """Upload the model that lies in --output_dir.

        Raises:
            InputError: the upload failed. The model is on the disk.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        try:
            self._finish_current_push()
            self._say_what_failed()
            return self._upload(
                Path(self.args.output_dir), commit_message, not blocking, token=token, revision=revision
            )
        except (HfHubHTTPError, OSError) as error:
            raise InputError(
                f"The model is saved in {self.args.output_dir}, and its upload to {self.hub_model_id} failed "
                f"({' '.join(str(error).split())[:300]}): upload it with `hf upload`."
            ) from error

    def _upload(
        self,
        folder: Path,
        message: str | None,
        in_background: bool,
        files: Sequence[str] | None = None,
        to: str | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        return HfApi().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=str(folder),
            path_in_repo=to,
            commit_message=message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            run_as_future=in_background,
            allow_patterns=list(self._model_files if files is None else files),
        )

    def _say_what_failed(self) -> None:
        """A warning for each upload in the background that has ended with an error; training went on."""
        jobs = self.push_in_progress.jobs if self.push_in_progress is not None else []
        for error in [error for job in jobs if job.done() and (error := job.exception())]:
            logger.warning(
                "An upload of a checkpoint to %s failed: %s", self.hub_model_id, " ".join(str(error).split())[:300]
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: the checkpoint still is where it is written, and will be renamed. `push_checkpoint` uploads it."""

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Upload a whole checkpoint's model, and with two of the strategies the checkpoint itself, in the background."""
        strategy = self.args.hub_strategy
        if not self.args.push_to_hub or not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            logger.warning("%s is not uploaded: the upload of the one before has not ended.", checkpoint)
            return
        self._say_what_failed()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(checkpoint, message, in_background=True)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            jobs.append(self._upload(checkpoint, f"{message}, checkpoint", in_background=True, files=("*",), to=name))
        if busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)
