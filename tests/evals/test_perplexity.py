"""Perplexity: every token weighs alike, and the per-batch figure is MindFormers'."""

import math

import numpy as np
import pytest

from llm_core.data.loader import Loader
from llm_core.data.records import RecordFile, RecordWriter
from llm_core.errors import UserError
from llm_core.evals.perplexity import Perplexity, PerplexityResult, summarize
from llm_core.models.decoder import CausalLM
from llm_core.models.spec import DecoderSpec

VOCAB, LENGTH, PAD = 37, 12, 0
SPEC = DecoderSpec(vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_size=24,
                   max_position=32, initializer_range=0.5)


@pytest.fixture(scope="module")
def net():
    return CausalLM(SPEC, seed=3)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """7 records of 12 tokens; number 5 is mostly padding; labels leave out the first half of the odd ones."""
    ids = np.random.default_rng(5).integers(1, VOCAB, (7, LENGTH)).astype(np.int32)
    ids[5, 3:] = PAD
    labels = ids.copy()
    labels[1::2, : LENGTH // 2] = -100
    path = tmp_path_factory.mktemp("records") / "eval.mindrecord"
    with RecordWriter(path, columns={"input_ids": LENGTH, "labels": LENGTH}, manifest={}) as writer:
        writer.write_rows({"input_ids": ids, "labels": labels})
    return path, ids, labels


def loader(path, batch_size, columns=("input_ids",)):
    return Loader(RecordFile(path), batch_size=batch_size, seq_length=LENGTH, columns=columns, shuffle=False, seed=0,
                  drop_remainder=False, vocab_size=VOCAB, kind="eval")


def expected(net, ids, labels, batch_size):
    """The same by numpy, from the logits: (token-weighted loss, mean of the batches' means, tokens)."""
    import mindspore as ms

    logits = net(ms.Tensor(ids[:, :-1])).asnumpy().astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_probability, ids[:, 1:, None], -1)[..., 0]
    mask = (ids[:, :-1] != PAD) & (labels[:, 1:] != -100)
    starts = range(0, len(ids), batch_size)
    means = [(nll * mask)[i : i + batch_size].sum() / mask[i : i + batch_size].sum() for i in starts]
    return (nll * mask).sum() / mask.sum(), np.mean(means), mask.sum()


@pytest.mark.parametrize("batch_size", [2, 3, 7])
@pytest.mark.parametrize("columns", [("input_ids",), ("input_ids", "labels")])
def test_equals_numpy_with_a_padded_last_batch(net, records, batch_size, columns):
    path, ids, labels = records
    labels = labels if "labels" in columns else ids
    result = Perplexity(net, pad_token_id=PAD).measure(loader(path, batch_size, columns))
    loss, per_batch, tokens = expected(net, ids, labels, batch_size)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.ppl == pytest.approx(math.exp(loss), rel=1e-5)
    assert result.per_batch_loss == pytest.approx(per_batch, rel=1e-5)
    assert result.tokens == tokens and result.batches == math.ceil(7 / batch_size)


def test_the_two_means_differ_where_batches_do(net, records):
    path, *_ = records
    result = Perplexity(net, pad_token_id=PAD).measure(loader(path, 2))
    assert abs(result.loss - result.per_batch_loss) > 1e-3


def test_follows_the_weights_and_compiles_once(net, records, monkeypatch):
    """As training goes on: the same object measures the changed weights without another compile."""
    import mindspore as ms

    from llm_core import runtime

    path, ids, _ = records
    measured = Perplexity(net, pad_token_id=PAD)
    first = measured.measure(loader(path, 3))
    monkeypatch.setattr(runtime, "compile_cache", lambda **_: pytest.fail("compiled again"))
    weight = net.model.norm_out.weight
    before = weight.asnumpy().copy()
    try:
        weight.set_data(ms.Tensor(before * 0.5))
        second = measured.measure(loader(path, 3))
        assert second.loss == pytest.approx(expected(net, ids, ids, 3)[0], rel=1e-5)
        assert abs(second.loss - first.loss) > 1e-3
    finally:
        weight.set_data(ms.Tensor(before))


def test_summary_by_hand():
    result = summarize([(8.0, 4.0), (3.0, 1.0), (0.0, 0.0)])
    assert result == PerplexityResult(
        loss=2.2, ppl=math.exp(2.2), tokens=5, batches=2, per_batch_loss=2.5, per_batch_ppl=math.exp(2.5)
    )
    metric = {"PerplexityMetric": {"loss": 2.2, "PPL": math.exp(2.2)}}
    assert result.mindformers_line() == f"PerplexityMetric = {metric}"
    assert "loss 2.500000, PPL 12.1825" in result.per_batch_line()


def test_a_hopeless_loss_is_infinite_and_none_is_an_error():
    assert summarize([(1e6, 1.0)]).ppl == math.inf
    with pytest.raises(UserError, match="not one token.*supervised"):
        summarize([(0.0, 0.0)])
