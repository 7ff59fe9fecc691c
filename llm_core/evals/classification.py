"""Accuracy and F1 of a classifier on a data set; of question answering, how often it finds the answer's place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from llm_core.data.batch import IGNORED, shift
from llm_core.data.loader import Loader
from llm_core.errors import UserError
from llm_core.models.heads import ANSWER_ENDS, ANSWER_STARTS, TokenClassifier
from llm_core.report.console import console
from llm_core.runtime import Compiled

if TYPE_CHECKING:
    from llm_core.parallel.comm import Comm


@dataclass(frozen=True)
class ClassificationResult:
    """accuracy: share of right classes. f1: of class 1 where there are two, as for MRPC; else the classes' mean.

    loss: nats a labelled place. Of question answering a place is a row, right means both ends are, and f1 is None.
    """

    accuracy: float
    f1: float | None
    loss: float
    total: int

    def line(self) -> str:
        """The line for the log."""
        return f"ClassificationMetric = {{'ClassificationMetric': {self.figures()}}}"

    def figures(self) -> dict[str, float]:
        """All that was measured, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class _Logits(nn.Cell):
    """tokens int32 [B, S] -> the classifier's logits at every place, fp32 [B*S, num_labels]."""

    def __init__(self, net: TokenClassifier) -> None:
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, tokens: Tensor) -> Tensor:
        return self.net.head(self.net.model(tokens))


class Classification:
    """Measures `net`, whose weights are shared, not copied: make it once and call `measure` as training goes on."""

    def __init__(self, net: TokenClassifier, comm: Comm | None = None) -> None:
        """comm: with the ranks that have the other rows of every batch."""
        self._head, self._classes, self._comm = net.spec.head, net.spec.num_labels, comm
        self._logits = Compiled(_Logits(net).set_train(False), spec=net.spec, **net.graph_key)

    def measure(self, loader: Loader, desc: str = "evaluate") -> ClassificationResult:
        """One pass over `loader`, in its order of epoch 0. UserError where nothing is labelled."""
        parts = []
        read = _answers if self._head == "question" else _classes
        with console.progress(loader.steps_per_epoch, desc=desc, unit="batch") as bar:
            for batch in loader.epoch(0):
                tokens, labels = shift(batch, pad_token_id=-1)
                logits = self._logits(ms.Tensor(tokens)).asnumpy().reshape(*labels.shape, -1)
                parts.append(read(logits, labels))
                bar.update(1)
        losses, predicted, wanted = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if self._comm is not None:
            every = self._comm.of_replicas([losses.tolist(), predicted.tolist(), wanted.tolist()])
            losses, predicted, wanted = (np.concatenate(arrays) for arrays in zip(*every, strict=True))
        if not len(wanted):
            raise UserError(
                f"{loader.records.path}: not one record has a label; a classifier's records are written by "
                "tools/dataset_preprocess/mrpc_process.py, and read with input_columns [input_ids, labels]"
            )
        return summarize(losses, predicted, wanted, None if self._head == "question" else self._classes)

    def evaluator(self, loader: Loader) -> Callable[[], dict[str, float]]:
        """For the training loop: measures, says, and returns figures for the metrics file."""

        def evaluate() -> dict[str, float]:
            result = self.measure(loader)
            console.log(result.line())
            figures = {"eval_loss": result.loss, "accuracy": result.accuracy}
            return figures if result.f1 is None else {**figures, "f1": result.f1}

        return evaluate


def _classes(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(losses, predicted, wanted) of the labelled places, each [n]."""
    marked = labels != IGNORED
    logits, wanted = logits[marked].astype(np.float64), labels[marked]
    nll = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return nll - np.take_along_axis(logits, wanted[:, None], -1)[:, 0], logits.argmax(-1), wanted


def _answers(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(losses, whether both ends are right, ones) of the rows that have an answer: see `heads.QuestionLoss`."""
    marked = (labels == ANSWER_STARTS).any(-1) & (labels == ANSWER_ENDS).any(-1)
    logits, labels = logits[marked].astype(np.float64), labels[marked]
    starts = (labels == ANSWER_STARTS).argmax(-1) + 1
    ends = (labels == ANSWER_ENDS).argmax(-1)
    highest = logits.max(1, keepdims=True)
    nll = np.log(np.exp(logits - highest).sum(1)) + highest[:, 0] - logits.transpose(1, 0, 2)  # [S, rows, 2]
    rows = np.arange(len(labels))
    loss = (nll[starts, rows, 0] + nll[ends, rows, 1]) / 2
    right = (logits[..., 0].argmax(-1) == starts) & (logits[..., 1].argmax(-1) == ends)
    return loss, right.astype(np.int32), np.ones(len(rows), np.int32)


def summarize(
    losses: np.ndarray, predicted: np.ndarray, wanted: np.ndarray, classes: int | None
) -> ClassificationResult:
    """The result of n places with these losses and classes, each [n]; classes None: there are no classes, and no F1."""
    scores = [_f1(predicted == number, wanted == number) for number in range(classes or 0)]
    f1 = None if classes is None else scores[1] if classes == 2 else float(np.mean(scores))
    return ClassificationResult(float((predicted == wanted).mean()), f1, float(losses.mean()), len(wanted))


def _f1(found: np.ndarray, there: np.ndarray) -> float:
    """2 x both / (found + there); 0 where nothing is either."""
    both, either = int((found & there).sum()), int(found.sum()) + int(there.sum())
    return 2 * both / either if either else 0.0
