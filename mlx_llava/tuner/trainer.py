"""The loop: batches -> gradients -> new weights, with checkpoints that any run can go on from.

Weights that are trained are kept in float32 and cast to the model's precision for each step
(mixed precision; Micikevicius et al. 2018, arXiv:1710.03740). With several processes
(`mlx.launch`) each computes its rows of a batch, and the result is that of one process.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_llava.checkpoint.safetensors import write_arrays
from mlx_llava.folders import new_folder, remove_folder
from mlx_llava.json_files import field, read_json, write_json
from mlx_llava.model.blas import set_blas_threads
from mlx_llava.model.device import compiles
from mlx_llava.model.linux.threads import threads
from mlx_llava.model.llava import Llava
from mlx_llava.tuner.data import Batch, Examples, order
from mlx_llava.tuner.recipe import TrainingOptions, answer_loss, make_optimizer
from mlx_llava.tuner.samples import summary

Tree = dict[str, Any]
Report = dict[str, float]
KEPT_CHECKPOINTS = 2


class Trainer:
    """One run.

    Attributes:
        step: how many steps are done.
        steps: how many there will be.
        trained: the weights that are trained, float32.
    """

    def __init__(
        self,
        model: Llava,
        train: Examples,
        valid: Examples | None,
        options: TrainingOptions,
        folder: Path,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepares a run.

        Args:
            model (Llava): Its trainable parameters are trained; see `recipe.prepare`.
            train (Examples): What to learn.
            valid (Examples, optional): What to measure.
            options (TrainingOptions): How to train.
            folder (Path): Checkpoints are written below it.
            origin (mapping, optional): By option, what else a run cannot be gone on without: which
                model it is, and its adapter.
        """
        set_blas_threads(threads())
        self.model, self.train, self.valid = model, train, valid
        self.options, self.folder = options, folder
        self.origin = origin or {}
        self.group = mx.distributed.init()
        self.batches_per_epoch = len(self._order(0))
        self.steps = options.steps or options.epochs * self.batches_per_epoch
        self.step, self.tokens = 0, 0
        parameters = model.trainable_parameters()
        self.dtypes = tree_map(lambda array: array.dtype, parameters)
        self.trained = _ordered(tree_map(lambda array: array.astype(mx.float32), parameters))
        self.optimizer = make_optimizer(options, self.steps)
        self.optimizer.init(self.trained)
        self.optimizer_state: Tree = self.optimizer.state
        self.loss, self.count = mx.array(0.0), mx.array(0)  # since the last report
        model.language_model.gradient_checkpointing = options.gradient_checkpointing
        # Sizes of images decide what an anyres model computes, not only on how much.
        is_traced = compiles() and not model.config.is_anyres
        compiled = mx.compile if is_traced else lambda function, **_: function
        random = [mx.random.state]
        self._gradients = compiled(self._compute_gradients, inputs=random, outputs=random)
        self._loss = compiled(self._compute_loss)
        self._update = compiled(self._apply_gradients)

    @property
    def _state(self) -> Tree:
        """All arrays that a run goes on from."""
        return {
            "trained": self.trained,
            "optimizer": self.optimizer_state,
            "loss": self.loss,
            "count": self.count,
        }

    def _order(self, epoch: int) -> list[list[int]]:
        return order(self.train.samples, self.options.batch_size, self.options.seed + epoch)

    def _batches(self) -> Iterator[list[Batch]]:
        """This process's parts of every step's batch, from where the run stands."""
        epoch, first = divmod(self.step, self.batches_per_epoch)
        while True:
            for indices in self._order(epoch)[first:]:
                yield self._parts(self.train, indices)
            epoch, first = epoch + 1, 0

    def _parts(self, examples: Examples, indices: list[int]) -> list[Batch]:
        rows = indices[self.group.rank() :: self.group.size()]
        size = -(-len(rows) // self.options.accumulation) or 1
        parts = (examples.batch(rows[i : i + size]) for i in range(0, len(rows), size))
        return [part for part in parts if part is not None]

    def _set_weights(self, trained: Tree) -> None:
        self.model.update(tree_map(lambda array, dtype: array.astype(dtype), trained, self.dtypes))

    def _compute_loss(self, trained: Tree, **arrays: Any) -> tuple[mx.array, mx.array]:
        self._set_weights(trained)
        return answer_loss(self.model, Batch(**arrays))

    def _compute_gradients(
        self, trained: Tree, **arrays: Any
    ) -> tuple[tuple[mx.array, mx.array], Tree]:
        gradients: Any = mx.value_and_grad(self._compute_loss)
        return gradients(trained, **arrays)

    def _apply_gradients(
        self, trained: Tree, state: Tree, gradients: Tree, count: mx.array
    ) -> tuple[Tree, Tree, mx.array]:
        """New weights from the sum of all tokens' gradients, and the mean gradient's norm."""
        mean = tree_map(lambda g: g / mx.maximum(count, 1), gradients)
        clipped, norm = optim.clip_grad_norm(mean, self.options.max_grad_norm or math.inf)
        self.optimizer.state = state
        trained = self.optimizer.apply_gradients(clipped, trained)
        return _ordered(trained), self.optimizer.state, norm

    def run(
        self, report: Callable[[Report], None], is_stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Trains until the last step, from wherever the run stands.

        Args:
            report (callable): Gets what is measured.
            is_stopped (callable): Is asked after every step; a run that is stopped is saved.

        Raises:
            ValueError: There is nothing to learn in the samples, or the loss or the gradients are
                no numbers any more; what is saved stays as it was.
        """
        self.model.train()
        try:
            self._run(report, is_stopped)
        finally:
            self._give_back()
            self._seed()

    def _give_back(self) -> None:
        """Puts what was trained where compiling has left its placeholders."""
        self._set_weights(self.trained)
        self.optimizer.state = self.optimizer_state
        self.model.eval()

    def _run(self, report: Callable[[Report], None], is_stopped: Callable[[], bool]) -> None:
        batches = self._batches()
        parts, started = next(batches), time.perf_counter()
        while self.step < self.steps:
            norm = self._learn(parts)
            self.step += 1
            parts = next(batches)  # while the device computes
            mx.eval(self._state, norm)
            if self._is_due(self.options.report_every):
                self._check_finite(norm)
                measured = self._measured(norm, time.perf_counter() - started)
                if not self.tokens:
                    reasons = summary(self.train.problems) or "there is no answer"
                    raise ValueError(f"Nothing was learned in {self.step} steps: {reasons}.")
                report(measured)
                started = time.perf_counter()
            if self.valid and self._is_due(self.options.validate_every):
                report({"step": self.step, "valid_loss": self.validate()})
                started = time.perf_counter()
            stops = is_stopped()
            if stops or self._is_due(self.options.save_every):
                self._check_finite(norm)
                self._check_weights()
                self.save()
            if stops:
                return

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.steps

    def _check_finite(self, norm: mx.array) -> None:
        """Raises ValueError if the loss since the last report, or the gradients, are no numbers."""
        self._check_number("the loss", self.loss)
        self._check_number("the gradients' norm", norm)

    def _check_weights(self) -> None:
        weights: dict[str, mx.array] = dict(tree_flatten(self.trained))
        largest = mx.stack([mx.abs(array).max() for array in weights.values()]).max()
        self._check_number("the largest weight", largest)

    def _check_number(self, what: str, value: mx.array) -> None:
        if not math.isfinite(float(value)):
            raise ValueError(
                f"At step {self.step} {what} is {float(value)}, so that nothing more can be "
                "learned; start again in another --output with a lower --learning-rate."
            )

    def _learn(self, parts: list[Batch]) -> mx.array:
        """Queues one step; returns the norm of its gradients."""
        self._seed()
        loss, count = mx.array(0.0), mx.array(0)
        gradients: Tree | None = None
        for part in parts:
            (part_loss, part_count), more = self._gradients(self.trained, **vars(part))
            gradients = more if gradients is None else tree_map(mx.add, gradients, more)
            loss, count = loss + part_loss, count + part_count
            if len(parts) > 1:
                mx.eval(gradients, loss, count)
        gradients = gradients or tree_map(mx.zeros_like, self.trained)
        loss, count, gradients = self._sum(loss, count, gradients)
        self.trained, self.optimizer_state, norm = self._update(
            self.trained, self.optimizer_state, gradients, count
        )
        self.loss, self.count = self.loss + loss, self.count + count
        mx.async_eval(self._state, norm)
        return norm

    def _seed(self) -> None:
        """Makes chance the same after an interruption, and another in every process."""
        mx.random.seed(self.options.seed + self.step * self.group.size() + self.group.rank())

    def _sum(
        self, loss: mx.array, count: mx.array, gradients: Tree
    ) -> tuple[mx.array, mx.array, Tree]:
        """The sums over all processes."""
        if self.group.size() == 1:
            return loss, count, gradients
        mx.eval(loss, count, gradients)  # which takes what it takes; then all wait for each other
        with self.model.ranks.working():
            # One after the other: processes must meet in the same order.
            sums = mx.stack([loss, count.astype(mx.float32)])
            totals = mx.distributed.all_sum(sums, stream=mx.cpu)
            mx.eval(totals)
            mean = average_gradients(gradients)
            mx.eval(mean)
        return totals[0], totals[1], tree_map(lambda g: g * self.group.size(), mean)

    def _measured(self, norm: mx.array, seconds: float) -> Report:
        """What happened since the last report, in that time."""
        tokens, loss = int(self.count), self.loss.item()
        self.tokens += tokens
        self.loss, self.count = mx.array(0.0), mx.array(0)
        return {
            "step": self.step,
            "loss": loss / max(tokens, 1),
            "gradient_norm": norm.item(),
            "learning_rate": self.optimizer_state["states"][-1]["learning_rate"].item(),
            "tokens": self.tokens,
            "tokens_per_second": tokens / seconds,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }

    def validate(self) -> float:
        """The mean loss per token of the validation data."""
        assert self.valid is not None
        was_training = self.model.training
        self.model.train()
        self.model.language_model.eval()
        loss, count = mx.array(0.0), mx.array(0)
        try:
            for indices in order(self.valid.samples, self.options.batch_size, 0):
                for part in self._parts(self.valid, indices):
                    part_loss, part_count = self._loss(self.trained, **vars(part))
                    loss, count = loss + part_loss, count + part_count
                    mx.eval(loss, count)
        finally:
            self._give_back()
            self.model.train(was_training)
        loss, count, _ = self._sum(loss, count, {})
        return float(loss) / max(int(count), 1)

    def save(self) -> None:
        """Writes a checkpoint, which appears complete or not at all; keeps the last two."""
        if self.group.rank() > 0:
            return
        state = {"step": self.step, "tokens": self.tokens, "options": self._identity()}
        name = f"step-{self.step:07d}"
        with new_folder(self.folder / "checkpoints" / name, "checkpoint", force=True) as beside:
            write_arrays(beside / "state.safetensors", dict(tree_flatten(self._state)))
            write_json(beside / "state.json", state)
        for old in self.checkpoints()[:-KEPT_CHECKPOINTS]:
            with suppress(FileExistsError):  # somebody keeps notes in it
                remove_folder(old, "checkpoint")

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints of this run's folder, the oldest first."""
        found = (self.folder / "checkpoints").glob("step-*")
        return sorted(path for path in found if re.fullmatch(r"step-\d{7,}", path.name))

    def _identity(self) -> dict[str, Any]:
        """What must not change between a run and its continuation."""
        free = ("report_every", "validate_every", "save_every", "gradient_checkpointing")
        options = {key: value for key, value in asdict(self.options).items() if key not in free}
        parameters = sum(array.size for array in dict(tree_flatten(self.trained)).values())
        return {
            **options,
            **self.origin,
            "steps": self.steps,
            "samples": len(self.train.samples),
            "parameters": parameters,
            **self.train.settings,
        }

    def resume(self) -> None:
        """Goes on from the last checkpoint of this run's folder, if there is one.

        Raises:
            ValueError: It is broken, or belongs to a run with other options or data.
        """
        if not (checkpoints := self.checkpoints()):
            return
        last = checkpoints[-1]
        path = last / "state.json"
        state = read_json(path)
        options = field(state, "options", dict, path)
        step, tokens = (field(state, key, int, path) for key in ("step", "tokens"))
        differences = [
            f"{key} was {options[key]}, is {value}"
            for key, value in self._identity().items()
            if key in options and options[key] != value  # earlier versions wrote fewer
        ]
        if differences:
            raise ValueError(
                f"{last} belongs to another run: {'; '.join(differences)}. "
                "Give the same options, or another --output."
            )
        try:
            tensors = cast("Tree", mx.load(str(last / "state.safetensors")))
        except RuntimeError as error:
            raise ValueError(f"{last} is broken; remove it: {error}") from error
        trained: dict[str, mx.array] = dict(tree_flatten(self.trained))
        expected = {f"trained.{n}": array.shape for n, array in trained.items()}
        found = {n: a.shape for n, a in tensors.items() if n.startswith("trained.")}
        if found != expected:
            raise ValueError(
                f"{last} belongs to another run, which trained other weights; give the same "
                "options, or another --output."
            )
        arrays: Tree = tree_unflatten(list(tensors.items()))
        self.trained, self.optimizer_state = _ordered(arrays["trained"]), arrays["optimizer"]
        self.loss, self.count = arrays["loss"], arrays["count"]
        self.step, self.tokens = step, tokens


def _ordered(tree: Tree) -> Tree:
    """A tree with its names in order, on which sums over it and processes depend.

    (MultiOptimizer leaves them in another order in every process.)
    """
    ordered: Tree = tree_unflatten(sorted(dict(tree_flatten(tree)).items()))
    return ordered
