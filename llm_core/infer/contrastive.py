"""Contrastive search (arXiv 2202.06417): of the likeliest tokens, the one that is least like what stands there.

Each step reads top_k candidates of every text at once. A candidate's value is

    (1 - penalty_alpha) * its probability - penalty_alpha * its hidden state's highest cosine with those of the text

The rules are those of transformers 4.55, the last that has this search.
"""

from __future__ import annotations

import numpy as np

from llm_core.infer.beam import top
from llm_core.infer.request import Request
from llm_core.infer.scores import softmax


def contrastive_search(request: Request) -> None:
    """Fill the answers, one a prompt."""
    count = min(request.params.top_k, request.decoders.spec.vocab_size)
    alpha = np.float32(request.params.penalty_alpha)
    batch = request.batch(more=0)
    read = batch.read_prompts("hidden")
    batch.spread(count)
    texts = [request.text(number) for number in range(len(request.answers))]
    first = [batch.columns - text.prompt_length for text in texts]
    directions = np.zeros((len(texts), batch.needed, read.hidden.shape[-1]), np.float32)
    directions[:, : batch.columns] = _direction(read.hidden[: len(texts)])
    logits = read.logits
    alive = list(range(len(texts)))
    while True:
        candidates = np.full((len(logits), count), request.pad_id)
        scores = request.chain(logits[alive], [texts[row] for row in alive])
        candidates[alive] = [top(row, count) for row in scores]
        chances = np.take_along_axis(softmax(scores), candidates[alive], -1)
        column = batch.position
        read = batch.read(candidates.reshape(-1, 1), len(alive), "hidden")
        found = _direction(read.hidden).reshape(len(logits), count, -1)
        chosen = np.zeros(len(logits), np.int64)
        for row, chance in zip(alive, chances, strict=True):
            likeness = directions[row, first[row] : column] @ found[row].T  # [columns, count]
            chosen[row] = ((1 - alpha) * chance - alpha * likeness.max(0)).argmax()
            directions[row, column] = found[row, chosen[row]]
            token = int(candidates[row, chosen[row]])
            texts[row].tokens.append(token)
            request.accept(row, token)
        alive = request.unfinished(alive)
        if not alive:
            return
        taken = np.arange(len(logits)) * count + chosen
        batch.reorder_column(np.repeat(taken, count))
        logits = read.logits[taken]


def _direction(hidden: np.ndarray) -> np.ndarray:
    """Vectors of length 1."""
    return hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
