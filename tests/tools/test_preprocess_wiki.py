"""llama_preprocess.py --dataset_type wiki: what the records hold, that nothing but the input decides it, bad input."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from llm_core.data import chunks as chunks_module
from llm_core.data import plain, wiki
from llm_core.data.preprocess import preprocess
from llm_core.data.records import RecordFile
from llm_core.data.wiki import WikiText, paragraphs_of
from llm_core.data.wikitext import clean_wikitext
from llm_core.errors import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "dataset_preprocess" / "llama_preprocess.py"
SEQ_LENGTH = 32


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Many chunks of a small text (only in this process: workers get the finished plan)."""
    monkeypatch.setattr(plain, "_CHUNK_BYTES", 2000)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, corpus) -> Path:
    """25 kB in WikiText's form with titles, some characters outside ASCII, and lines that end in a space."""
    paragraphs = [p.replace("\n", " ").strip() for p in corpus[:25_000].split("\n\n")]
    lines = [" ", " = A title = ", " "]
    for number, paragraph in enumerate(p for p in paragraphs if p):
        lines += [f" {paragraph} 中文 {number} 😀 ", " "]
        if number % 10 == 0:
            lines += [" = = Section = = ", " "]
    path = tmp_path_factory.mktemp("text") / "wiki.tokens"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def expected_run(path: Path, model: Path) -> list[int]:
    """The ids in the plainest way."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    run = []
    for paragraph in paragraphs_of(path.read_bytes())[0]:
        run += [1, *tokenizer.encode(paragraph), 2]
    return run


def read_all(path: Path) -> dict[str, np.ndarray]:
    records = RecordFile(path)
    return records.read(np.arange(records.num_records))


def flags(text_file: Path, model: Path, output: Path) -> list[object]:
    return ["--dataset_type", "wiki", "--input_glob", text_file, "--model_file", model, "--seq_length", SEQ_LENGTH,
            "--output_file", output]


@pytest.mark.parametrize(
    ("artefacts", "plain"),
    [
        ("a well @-@ known 1 @,@ 000 @.@ 5 thing , he 's ( it ) .", "a well-known 1,000.5 thing, he's (it)."),
        ('the " quoted words , " and " more "', 'the "quoted words," and "more"'),
        ('a lone " mark \n in " two lines " \n and " one', 'a lone " mark\nin "two lines"\nand " one'),
        ("the dogs ' tails and a ' word ' here", "the dogs' tails and a 'word' here"),
        ("didn 't we 'll ; what ? \n next ", "didn't we'll; what?\nnext"),
        (" \n = Title = \n \n 20 ° C , [ 1 ] \n", "\n= Title =\n\n20°C, [1]\n"),
        ("", ""), ("@", "@"), ("'", "'"), ('"', '"'), ("a @", "a @"), ("end '", "end '"), ("°", "°"), (" , ", ","),
        ("mail @-@", "mail @-@"), ("a @ b @x@ c@-@d", "a @ b @x@ c@-@d"), ("15 % , 3 :4", "15 %, 3 :4"),
        ("plain 'twas text, (already) fine.", "plain 'twas text, (already) fine."),
        ("天空 , 是 @-@ 蓝色", "天空, 是-蓝色"),
    ],
)
def test_cleaning(artefacts, plain):
    assert clean_wikitext(artefacts.encode()).decode() == plain


def test_paragraphs_are_what_blank_lines_separate():
    text = b" \n = Title = \n \n first \n line \n \n\t\n = = Sub = = \n\n second \n"
    assert paragraphs_of(text) == (["first\nline", "second"], 2)


def test_records_are_the_run_of_ids_cut(run_script, text_file, spm_model, tmp_path):
    output = tmp_path / "out" / "wiki.mindrecord"
    code, out, err = run_script("llama_preprocess", *flags(text_file, spm_model, output), "--num_workers", 1)
    assert code == 0
    run = expected_run(text_file, spm_model)
    records = read_all(output)["input_ids"]
    assert len(wiki.WikiText([text_file], SEQ_LENGTH).chunks()) > 5
    assert records.shape == (len(run) // 33, 33)
    assert records.reshape(-1).tolist() == run[: len(run) // 33 * 33]
    assert f"Transformed {len(records)} records." in out
    manifest = json.loads((tmp_path / "out" / "wiki.mindrecord.manifest.json").read_text())
    assert manifest["kind"] == "wiki"
    assert manifest["records"] == len(records)
    assert manifest["arguments"] == {"seq_length": 32, "repeat": 1}
    assert manifest["tokenizer"]["vocab_size"] == 512
    counts = manifest["counts"]
    assert counts["tokens"] == records.size
    assert counts["supervised_tokens"] == len(records) * 32
    assert counts["dropped_tail_tokens"] == len(run) % 33 > 0
    assert counts["paragraphs"] == run.count(1)
    assert counts["dropped_titles"] > 2
    assert "dropped tail tokens" in err
    assert RecordFile(output).verify() == 2
    assert not list(output.parent.glob(".*"))  # no work folder is left


def output_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_any_number_of_workers_writes_the_same_bytes(text_file, spm_model, tmp_path):
    written = []
    for workers in (1, 2, 3):
        output = tmp_path / str(workers) / "wiki.mindrecord"
        preprocess(WikiText([text_file], SEQ_LENGTH), output, spm_model, num_workers=workers)
        written.append(output_bytes(output.parent))
    assert set(written[0]) == {"wiki.mindrecord", "wiki.mindrecord.db", "wiki.mindrecord.manifest.json"}
    assert written[0] == written[1] == written[2]


def test_chunks_do_not_show(text_file, spm_model, tmp_path, monkeypatch):
    preprocess(WikiText([text_file], SEQ_LENGTH), tmp_path / "a.mindrecord", spm_model, num_workers=1)
    monkeypatch.setattr(plain, "_CHUNK_BYTES", 1 << 20)
    preprocess(WikiText([text_file], SEQ_LENGTH), tmp_path / "b.mindrecord", spm_model, num_workers=1)
    assert np.array_equal(read_all(tmp_path / "a.mindrecord")["input_ids"],
                          read_all(tmp_path / "b.mindrecord")["input_ids"])


def test_repeat_and_shards_and_several_files(run_script, text_file, spm_model, tmp_path):
    (tmp_path / "x.tokens").write_bytes(text_file.read_bytes())
    (tmp_path / "y.tokens").write_text("\n\nlast words\n\n")
    code, _, err = run_script("llama_preprocess", "--dataset_type", "wiki", "--input_glob", tmp_path / "*.tokens",
                              "--tokenizer_type", spm_model, "--seq_length", SEQ_LENGTH, "--repeat", 3,
                              "--file_partition", 2, "--samples_num", 10, "--num_workers", 1,
                              "--output_file", tmp_path / "two.mindrecord")
    assert code == 0
    assert "--samples_num has no effect" in err
    run = (expected_run(tmp_path / "x.tokens", spm_model) + expected_run(tmp_path / "y.tokens", spm_model)) * 3
    expected = np.array(run[: len(run) // 33 * 33]).reshape(-1, 33)
    assert {path.name for path in tmp_path.glob("two.mindrecord?")} == {"two.mindrecord0", "two.mindrecord1"}
    records = read_all(tmp_path / "two.mindrecord")["input_ids"]
    assert sorted(records.tolist()) == sorted(expected.tolist())  # shards interleave the order


def test_line_ends_and_byte_order_mark_do_not_show(text_file, spm_model, tmp_path):
    windows = tmp_path / "windows.tokens"
    windows.write_bytes(b"\xef\xbb\xbf" + text_file.read_bytes().replace(b"\n", b"\r\n"))
    for name, path in (("a", text_file), ("b", windows)):
        preprocess(WikiText([path], SEQ_LENGTH), tmp_path / f"{name}.mindrecord", spm_model, num_workers=1)
    assert np.array_equal(read_all(tmp_path / "a.mindrecord")["input_ids"],
                          read_all(tmp_path / "b.mindrecord")["input_ids"])


def test_a_stopped_run_goes_on_from_its_chunks(text_file, spm_model, tmp_path, monkeypatch):
    encoded = []
    encode = wiki.EncodeWiki.__call__

    def count_and_stop(self, tokenizer, payload):
        if len(encoded) == 4:
            raise KeyboardInterrupt
        encoded.append(payload)
        return encode(self, tokenizer, payload)

    output = tmp_path / "cut" / "wiki.mindrecord"
    monkeypatch.setattr(wiki.EncodeWiki, "__call__", count_and_stop)
    with pytest.raises(KeyboardInterrupt):
        preprocess(WikiText([text_file], SEQ_LENGTH), output, spm_model, num_workers=1)
    assert [path.name for path in output.parent.iterdir()] == [".wiki.mindrecord.partial"]

    encoded_again = []
    monkeypatch.setattr(wiki.EncodeWiki, "__call__",
                        lambda self, t, p: encoded_again.append(p) or encode(self, t, p))
    preprocess(WikiText([text_file], SEQ_LENGTH), output, spm_model, num_workers=1)
    assert not set(encoded) & set(encoded_again)
    whole = tmp_path / "whole" / "wiki.mindrecord"
    preprocess(WikiText([text_file], SEQ_LENGTH), whole, spm_model, num_workers=1)
    assert output_bytes(output.parent) == output_bytes(whole.parent)


def test_chunks_of_another_job_are_not_used(text_file, spm_model, tmp_path):
    output = tmp_path / "wiki.mindrecord"
    job = {"inputs": "others"}
    with chunks_module.WorkFolder(output, job) as folder:
        folder.file(0).write_bytes(b"garbage that would be taken for a chunk")
    preprocess(WikiText([text_file], SEQ_LENGTH), output, spm_model, num_workers=1)
    run = expected_run(text_file, spm_model)
    assert read_all(output)["input_ids"].reshape(-1).tolist() == run[: len(run) // 33 * 33]


def test_two_runs_on_one_output(text_file, spm_model, tmp_path):
    output = tmp_path / "wiki.mindrecord"
    with chunks_module.WorkFolder(output, {}):
        with pytest.raises(UserError, match="another process is writing this output"):
            preprocess(WikiText([text_file], SEQ_LENGTH), output, spm_model, num_workers=1)


@pytest.fixture(scope="module")
def big_text(tmp_path_factory, text_file) -> Path:
    """Several chunks of half a MiB."""
    path = tmp_path_factory.mktemp("big") / "big.tokens"
    path.write_bytes(text_file.read_bytes() * 100)
    return path


def start_and_wait_for_a_chunk(big_text: Path, model: Path, output: Path) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, *flags(big_text, model, output), "--num_workers", 2, "--seq_length", 1023]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    partial = output.parent / f".{output.name}.partial"
    while not list(partial.glob("chunk_*.npz")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    return process


def test_killed_and_started_again(tmp_path, big_text, spm_model):
    """SIGKILL while workers encode: no output, no orphans; the same command then writes what one run writes."""
    output = tmp_path / "out" / "wiki.mindrecord"
    partial = output.parent / ".wiki.mindrecord.partial"
    process = start_and_wait_for_a_chunk(big_text, spm_model, output)
    workers = children_of(process.pid)
    assert workers
    process.kill()
    process.wait()
    assert list(partial.glob("chunk_*.npz"))
    assert not output.exists()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their killed parent"
        time.sleep(0.05)
    done = subprocess.run(process.args, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = np.array(expected_run(big_text, spm_model))
    assert np.array_equal(read_all(output)["input_ids"].reshape(-1), run[: len(run) // 1024 * 1024])
    assert not partial.exists()


def test_a_killed_worker(tmp_path, big_text, spm_model):
    """As the kernel does it when memory runs out."""
    output = tmp_path / "out" / "wiki.mindrecord"
    process = start_and_wait_for_a_chunk(big_text, spm_model, output)
    for worker in children_of(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a tokenizing process was killed (out of memory?)" in err
    assert "Traceback" not in err
    assert [path.name for path in output.parent.iterdir()] == [".wiki.mindrecord.partial"]


def test_ctrl_c(tmp_path, big_text, spm_model):
    """While MindSpore is being imported, which is when the first chunks are done."""
    output = tmp_path / "out" / "wiki.mindrecord"
    process = start_and_wait_for_a_chunk(big_text, spm_model, output)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "error: stopped; the same command goes on from the finished parts"
    assert "Traceback" not in err
    assert [path.name for path in output.parent.iterdir()] == [".wiki.mindrecord.partial"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_takes_no_more(tmp_path, big_text, spm_model, workers):
    """Files may not grow beyond 100 kB, which to a program looks like a full disk."""
    output = tmp_path / "out" / "wiki.mindrecord"
    limited = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2); " \
              f"sys.argv.pop(0); sys.path.insert(0, {str(SCRIPT.parents[2])!r}); runpy.run_path({str(SCRIPT)!r}, " \
              f"run_name='__main__')"
    command = [sys.executable, "-c", limited, SCRIPT, *flags(big_text, spm_model, output), "--num_workers", workers]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "out" in done.stderr and "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()


def children_of(pid: int) -> list[int]:
    """The pool's processes (not multiprocessing's resource tracker)."""
    children = [c for task in Path(f"/proc/{pid}/task").glob("*/children") for c in task.read_text().split()]
    return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


@pytest.mark.parametrize("workers", [1, 2])
def test_text_that_is_not_utf8(run_script, text_file, spm_model, tmp_path, workers):
    good = text_file.read_bytes()
    bad = tmp_path / "latin1.tokens"
    bad.write_bytes(good + b" caf\xe9 \n\n" + good)
    output = tmp_path / "out.mindrecord"
    code, _, err = run_script("llama_preprocess", *flags(bad, spm_model, output), "--num_workers", workers)
    line = good.count(b"\n") + 1
    assert code == 2
    assert f"{bad}:{line}: not UTF-8 text (byte 0xe9 at offset {len(good) + 4})" in err
    assert [path.name for path in tmp_path.iterdir()] == ["latin1.tokens"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file is empty"), (b" \n \n", "not one record"), (b"few words", "not one record"),
     (b" = only = \n\n = titles = \n", "not one record")],
)
def test_input_without_enough_text(run_script, spm_model, tmp_path, content, message):
    (tmp_path / "in.tokens").write_bytes(content)
    output = tmp_path / "out" / "out.mindrecord"
    code, out, err = run_script("llama_preprocess", *flags(tmp_path / "in.tokens", spm_model, output))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not output.exists()


def test_a_glob_that_matches_nothing(run_script, spm_model, tmp_path):
    code, _, err = run_script("llama_preprocess", *flags(tmp_path / "*.none", spm_model, tmp_path / "o.mindrecord"))
    assert code == 2
    assert f"{tmp_path / '*.none'}: no file matches" in err
    code, _, err = run_script("llama_preprocess", *flags(tmp_path, spm_model, tmp_path / "o.mindrecord"))
    assert code == 2
    assert "is a folder" in err


def test_wrong_arguments(run_script, text_file, spm_model, tmp_path):
    output = tmp_path / "o.mindrecord"
    for extra, message in (
        (["--seq_length", 0], "--seq_length 0"),
        (["--repeat", 0], "--repeat 0"),
        (["--file_partition", -1], "--file_partition -1"),
        (["--num_workers", 0], "--num_workers 0"),
        (["--model_file", tmp_path / "no.model"], "no.model: no such tokenizer file"),
        (["--model_file", text_file], "not a SentencePiece model"),
        (["--seq_len", 5], "unrecognized arguments"),
        (["--dataset_type", "wikipedia"], "invalid choice"),
    ):
        code, _, err = run_script("llama_preprocess", *flags(text_file, spm_model, output), *extra)
        assert code == 2, extra
        assert message in err
    code, _, err = run_script("llama_preprocess", "--input_glob", text_file, "--output_file", output)
    assert code == 2
    assert "--model_file" in err


def test_output_that_cannot_be_written(run_script, text_file, spm_model, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for output in (tmp_path / "file" / "o.mindrecord", Path("/proc/o.mindrecord")):
        code, _, err = run_script("llama_preprocess", *flags(text_file, spm_model, output), "--num_workers", 1)
        assert code == 1
        assert str(output.parent) in err
        assert "Traceback" not in err


def test_output_that_is_a_folder(run_script, text_file, spm_model, tmp_path):
    for output in (tmp_path, ""):
        code, _, err = run_script("llama_preprocess", *flags(text_file, spm_model, output))
        assert code == 2
        assert "is a folder; give a file name" in err


def test_runs_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert "--input_glob" in done.stdout
