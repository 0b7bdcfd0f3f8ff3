"""Records and console lines of the steps and evaluations of a run."""

import jax
import numpy as np
from jaxtyping import Float

from flaxmnist.config import Config
from flaxmnist.console import Progress, logger
from flaxmnist.core.state import Metrics, Totals
from flaxmnist.devices.evaluation import Evaluation
from flaxmnist.errors import Diverged
from flaxmnist.loop.conditions import is_logged, may_skip
from flaxmnist.store.records import Records


class TrainingLog:
    """The records, console lines and progress bar of a run that trains ``config`` from ``step`` on."""

    def __init__(self, config: Config, epoch_length: int, records: Records, step: int):
        self.train, self.epoch_length, self.records = config.train, epoch_length, records
        self.progress = Progress(config.train.length, step, config.train.batch_size)

    def close(self) -> None:
        self.progress.close()

    def chunk(self, start: int, count: int, metrics: Metrics) -> None:
        """Wait for the metrics of ``count`` steps from ``start`` on; record and print them. Raise Diverged."""
        metrics = jax.device_get(metrics)
        losses, accuracies = means(metrics.batch)
        epoch_losses, epoch_accuracies = means(metrics.epoch)
        nonfinite, report = metrics.nonfinite(start, count), self.train.report
        for i, step in enumerate(range(start, start + count)):
            epoch, batch = divmod(step, self.epoch_length)
            loss, accuracy, norm = losses[i], accuracies[i], metrics.gradient_norm[i]
            if step in nonfinite:
                self.skip(step, nonfinite[step])
            elif is_logged(self.train, step, self.epoch_length):
                extra = {name: values[i] for name, values in metrics.extra.items()}
                self.records.add(step, epoch, "train", loss=loss, accuracy=accuracy, gradient_norm=norm, **extra)
                if report == "loss":
                    logger.info("step %d, loss %.4f, accuracy %.4f", step, loss, accuracy)
                elif report == "batch_loss":
                    logger.info("epoch %d, batch %d, loss %.6f", epoch, batch, loss)
            if batch == self.epoch_length - 1 and np.isfinite(epoch_losses[i]):
                self.records.add(step + 1, epoch + 1, "epoch", loss=epoch_losses[i], accuracy=epoch_accuracies[i])
                if report == "epoch_cost":
                    logger.info("Epoch: %04d, Cost: %.9f", epoch + 1, epoch_losses[i])
        self.progress.show(start + count, losses[count - 1], accuracies[count - 1])

    def skip(self, step: int, reason: str) -> None:
        """Record that ``step`` made no update, because of ``reason``. Raise Diverged if too many in a row did not."""
        skipped = [record["step"] for record in self.records.rare if record["split"] == "skipped"]
        if not may_skip(self.train, step, skipped):
            allowed = self.train.skip_nonfinite
            raise Diverged(reason + (f", after {allowed} steps in a row were skipped" if allowed else ""))
        self.records.add(step, step // self.epoch_length, "skipped", count=len(skipped) + 1)
        logger.warning("%s: this step is skipped", reason)

    def batch_accuracy(self, step: int, evaluation: Evaluation) -> None:
        """Record and print the scores on the batch of ``step``, before training on it."""
        self.records.add(step, step // self.epoch_length, "batch", loss=evaluation.loss, accuracy=evaluation.accuracy)
        logger.info("step %d, training accuracy %g", step, evaluation.accuracy)

    def batch_probabilities(self, step: int, probabilities: Float[np.ndarray, "b classes"]) -> None:
        """Record and print the probabilities on the batch of ``step``, before training on it."""
        probabilities = probabilities.round(6)
        self.records.add(step, step // self.epoch_length, "batch", probabilities=probabilities)
        table = np.array2string(probabilities, precision=4, suppress_small=True, threshold=60, max_line_width=120)
        logger.info("step %d, probabilities\n%s", step, table)

    def evaluation(self, step: int, split: str, evaluation: Evaluation) -> None:
        """Record and print the scores on ``split`` after ``step`` steps. Raise Diverged if the loss is not finite."""
        if not np.isfinite(evaluation.loss):
            raise Diverged(f"the {split} loss after step {step} is {evaluation.loss}")
        epoch = step // self.epoch_length
        self.records.add(step, epoch, split, **evaluation.scores)
        logger.info("step %d, %s loss %.4f, accuracy %.4f", step, split, evaluation.loss, evaluation.accuracy)


def means(totals: Totals) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return mean loss and accuracy of each step; NaN for steps that were not done."""
    with np.errstate(invalid="ignore"):
        images = np.asarray(totals.images)
        return np.asarray(totals.loss) / images, np.asarray(totals.correct) / images
