"""Segments of text and ids -> tokens with loss flags, against a plain loop."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llm_core.data.segments import cut_and_count, encode_samples, plain_sample
from llm_core.text import load_tokenizer

WORDS = ["Hello", " world", "", "\n", "中文", "😀", " </s>", "a b", " ", "USER:"]


def plainly(tokenizer, samples) -> list[tuple[list[int], list[bool]]]:
    """One sample, one run of texts after the other, by the tokenizer's offsets."""
    done = []
    for sample in samples:
        ids, flags, run = [], [], []

        def end_run(ids=ids, flags=flags, run=run):
            texts = [text for text, _ in run]
            found, counts = tokenizer._parts_by_offsets(texts)
            ids += found.tolist()
            for count, (_, flag) in zip(counts, run, strict=True):
                flags += [flag] * int(count)
            run.clear()

        for content, flag in sample:
            if isinstance(content, str):
                run.append((content, flag))
            else:
                if run:
                    end_run()
                ids += content
                flags += [flag] * len(content)
        if run:
            end_run()
        done.append((ids, flags))
    return done


@pytest.mark.parametrize("kind", ["identity", "nfkc"])
def test_ids_between_texts_are_what_a_plain_loop_makes(kind, marked_spm, spm_model):
    tokenizer = load_tokenizer(marked_spm if kind == "identity" else spm_model)
    draw = random.Random(1)
    samples = []
    for _ in range(150):
        sample = []
        for _ in range(draw.randrange(6)):
            content = [draw.randrange(300) for _ in range(draw.randrange(3))]
            if draw.random() < 0.7:
                content = "".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 5)))
            sample.append((content, draw.random() < 0.5))
        samples.append(sample)
    found = encode_samples(tokenizer, samples)
    expected = plainly(tokenizer, samples)
    assert found.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert found.ids.tolist() == [token for ids, _ in expected for token in ids]
    assert found.learnt.tolist() == [flag for _, flags in expected for flag in flags]
    assert (found.ids.dtype, found.learnt.dtype) == (np.int32, bool)


def test_a_list_of_ids_keeps_texts_apart(marked_spm):
    tokenizer = load_tokenizer(marked_spm)
    together = encode_samples(tokenizer, [[("one", False), ("two", True)]])
    apart = encode_samples(tokenizer, [[("one", False), ([], False), ("two", True)]])
    assert together.ids.tolist() == tokenizer.encode("onetwo")
    assert apart.ids.tolist() == tokenizer.encode("one") + tokenizer.encode("two")


def test_nothing(marked_spm):
    tokenizer = load_tokenizer(marked_spm)
    assert encode_samples(tokenizer, []).lengths.tolist() == []
    assert encode_samples(tokenizer, [[], [("", True)]]).lengths.tolist() == [0, 0]


def test_answers_keep_ids_that_look_like_marks(marked_spm):
    tokenizer = load_tokenizer(marked_spm)
    samples = encode_samples(tokenizer, [[([1], False), ([2, 0, 1], True), ([2], False)]])
    assert samples.learnt.tolist() == [False, True, True, True, False]


def test_long_samples_are_cut_or_dropped_and_counted(marked_spm):
    tokenizer = load_tokenizer(marked_spm)
    samples = encode_samples(
        tokenizer,
        [plain_sample(tokenizer, *texts) for texts in (("a", "b"), ("a", "b " * 40), ("a " * 40, "b"))],
    )
    width = 20
    cut, counts = cut_and_count(samples, width)
    assert cut.lengths.tolist() == [int(samples.lengths[0]), width]
    assert (counts["cut_samples"], counts["dropped_samples"], counts["dropped_long_samples"]) == (1, 1, 0)
    assert counts["cut_tokens"] == samples.lengths[1] - width
    dropped, counts = cut_and_count(samples, width, drop_long=True)
    assert dropped.lengths.tolist() == [int(samples.lengths[0])]
    assert (counts["cut_samples"], counts["dropped_samples"], counts["dropped_long_samples"]) == (0, 2, 2)
    assert counts["tokens"] == counts["supervised_tokens"] + counts["masked_tokens"] == samples.lengths[0]
