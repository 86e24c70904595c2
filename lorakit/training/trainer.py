"""The Hugging Face Trainer with a budget instead of epochs, a curve, and checkpoints that resume bitwise."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils.notebook import NotebookProgressCallback

from lorakit.errors import CheckpointError, require
from lorakit.files import aside, clear_left
from lorakit.modules import set_until
from lorakit.progress import Progress
from lorakit.training import checkpoint
from lorakit.training.callback import RunCallback
from lorakit.training.costs import Budget, Schedule
from lorakit.training.gated import GatedTrainer
from lorakit.training.state import Curve
from lorakit.training.window import leaves_layers_out


class BudgetTrainer(GatedTrainer):
    """Trains until `budget` is spent, with the learning rate following the share of it already spent.

    Args:
        kind: "classify", "masked" or "causal"; what `example_statistics` needs to know.
        budget, schedule: when to stop and how to decay.
        gate, tokens, controllers: see `GatedTrainer`.
        eval_collator: collates evaluation batches; the training collator where None.
        identity: what makes this run this run; resuming a checkpoint of another identity is refused.
        evaluations: on the evaluation data, evenly over the budget.
        save_steps: steps between checkpoints, 0 for none.
        keep_best: keep a copy of the trained weights with the lowest validation loss.
        compute_metrics: of statistics per example (B, 4) instead of logits, see `example_statistics`; the loss is
            always there.
        everything else: goes to `GatedTrainer` and `transformers.Trainer`.

    Raises:
        Diverged: training or validation loss became NaN or infinite.
        CheckpointError: resuming from a checkpoint of another run.
    """

    def __init__(
        self,
        *,
        kind: str,
        budget: Budget,
        schedule: Schedule | None = None,
        eval_collator: Callable[[list[Any]], Any] | None = None,
        identity: Mapping[str, Any] | None = None,
        evaluations: int = 1,
        save_steps: int = 0,
        keep_best: bool = False,
        title: str = "train",
        **trainer_arguments: Any,
    ):
        super().__init__(kind=kind, **trainer_arguments)
        best = "is keep_best here, which keeps the weights in memory; curve.restore_best puts them back"
        require(not self.args.load_best_model_at_end, "load_best_model_at_end", True, best)
        measured = self.compute_metrics or (lambda _: {})
        self.compute_metrics = lambda prediction: mean_loss(prediction) | measured(prediction)
        self.watch.refuses = not leaves_layers_out(self.model)
        self.budget, self.schedule = budget, schedule or Schedule()
        self.eval_collator = eval_collator or self.data_collator
        self.save_steps = save_steps
        self._aside: Path | str = ""  # where a checkpoint is being written
        self.run.identity, self.run.curve = dict(identity or {}), Curve(keep_best=keep_best)
        self.curve = self.run.curve
        for shown_twice in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
            self.remove_callback(shown_twice)
        self.progress = Progress(title, budget.amount, budget.unit.replace("_", " ").replace("flops", "FLOPs"))
        self.progress.style = self.progress.style if self.is_world_process_zero() else "none"  # one speaks for all
        self.add_callback(RunCallback(self.run, budget, self.progress, evaluations, save_steps))

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> Any:
        """Train to the end of the budget; True resumes from the newest complete checkpoint in the output folder.

        Raises:
            CheckpointError: there is none, it is not complete, or it belongs to another run.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint, _ = checkpoint.intact(self.args.output_dir, self.checkpoint_files)
            if resume_from_checkpoint is None:
                raise CheckpointError(f"{self.args.output_dir}: no complete checkpoint to resume from")
        if self.save_steps or self.args.save_strategy != "no":
            checkpoint.require_room(self.args.output_dir)
        if resume_from_checkpoint:
            self.require_resumable(resume_from_checkpoint)
            self.args.eval_on_start = False  # it was
            checkpoint.load_run(self.run, resume_from_checkpoint)
            if self.budget.share(self.ledger) >= 1:  # stopped after its last step: the Trainer would take one more
                checkpoint.load_weights(self.model, resume_from_checkpoint)
                if self.is_world_process_zero():  # nothing more will be saved, which would do it
                    clear_left(self.args.output_dir, checkpoint.SAVING)
                return None
        if self.is_world_process_zero():
            checkpoint.begin(self.args.output_dir, resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **options)

    # schedule and data ---------------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """A learning rate that follows the share of the budget spent."""
        optimizer = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(optimizer, lambda _: self.schedule.factor(self.budget.share(self.ledger)))
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.set_epoch = functools.partial(_reseed, sampler, self.args.data_seed or self.args.seed)
            sampler.set_epoch(0)
        return sampler

    def _find_loss(self, inputs) -> None:
        kinds = not inputs["labels"].is_floating_point()
        require(kinds, "labels", inputs["labels"].dtype, "a budget's curve knows classes only: no regression, no sets")
        super()._find_loss(inputs)

    # evaluation ----------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset=None):
        with contextlib.ExitStack() as stack:
            set_until(stack, self, data_collator=self.eval_collator)
            return super().get_eval_dataloader(eval_dataset)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """As the Trainer's, without touching the random numbers training will draw."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices), self.progress.doing("evaluating"):
            return super().evaluate(*arguments, **options)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Statistics per example (B, 4) instead of logits: a vocabulary of 262k words would not fit."""
        inputs = dict(self._prepare_inputs(inputs))
        labels = inputs.pop("labels")
        with torch.no_grad():
            statistics, _ = self._statistics(model, inputs, labels)
        return None, statistics, statistics[:, 3]

    # checkpoints ---------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        output_dir = self.args.output_dir
        with contextlib.ExitStack() as saving:
            if self.args.should_save:
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                self._aside = saving.enter_context(aside(output_dir, checkpoint.SAVING))
            (self._aside,) = broadcast_object_list([self._aside])
            saving.callback(setattr, self, "_aside", "")
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each has a random state of its own to save
            if self.args.should_save:
                checkpoint.save_run(self.run, checkpoint.folder(self._aside, self.state.global_step), output_dir)

    @property
    def checkpoint_files(self) -> list[str]:
        return [checkpoint.RUN, *super().checkpoint_files, checkpoint.BEST]

    def _get_output_dir(self, trial) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint)
        checkpoint.load_run(self.run, resume_from_checkpoint)


def mean_loss(prediction: Any) -> dict[str, float]:
    """Of the statistics (B, 4) of `example_statistics`."""
    return {"loss": float(prediction.predictions[:, 0].sum() / prediction.predictions[:, 1].sum())}


def _reseed(sampler: LengthGroupedSampler, seed: int, epoch: int) -> None:
    """Draw length-grouped order from (seed, epoch), so that a resumed epoch has the order it had."""
    sampler.generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
