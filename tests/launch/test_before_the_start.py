"""Checks that need no process: layout, devices, addresses, ports, folders; and the words about a failure."""

from __future__ import annotations

import errno
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from llm_core.cli import load_run
from llm_core.errors import EnvironmentFault, UserError
from llm_core.launch import checks, failure
from llm_core.launch.arguments import Job, run_arguments
from llm_core.launch.processes import StopSignals
from llm_core.launch.saves import Saves

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MS_WORKER_NUM", "")  # which the checks set
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({
        "run_mode": "train",
        "use_parallel": True,
        "context": {"device_target": "CPU"},
        "parallel_config": {"data_parallel": 2, "model_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 2},
        "optimizer": {"type": "AdamW", "learning_rate": 0.001},
        "train_dataset": {"data_loader": {"type": "MindDataset", "dataset_dir": "some.mindrecord"}},
        "model": {"arch": {"type": "LlamaForCausalLM"}, "model_config": {"type": "LlamaConfig"}},
    }))  # fmt: skip
    return path


def run(config: Path, ranks: int, *flags: str, local: int | None = None) -> Job:
    words = (str(ROOT / "run_llm.py"), "--config", str(config), *flags)
    return Job(words, ranks, local or ranks)


def test_a_layout_that_fits(config):
    checks.require_runnable(run(config, 8), {})
    checks.require_runnable(run(config, 4, "--pp", "1"), {})
    checks.require_runnable(Job(("other.py",), 3, 3), {})


def test_a_layout_that_does_not_fit_names_three_numbers_and_their_lines(config):
    with pytest.raises(UserError) as caught:
        checks.require_runnable(run(config, 8, "--mp", "1"), {})
    text = str(caught.value)
    line = 1 + config.read_text().splitlines().index("  data_parallel: 2")
    assert f"data_parallel 2 ({config}:{line})" in text and "model_parallel 1 (--mp)" in text
    assert "= 4 ranks, but N is 8" in text


@pytest.mark.parametrize("flags", [["--dp", "4"], ["--mp", "1"], ["--pp", "1"]])
def test_each_of_the_three_counts(config, flags):
    with pytest.raises(UserError, match="but N is 8"):
        checks.require_runnable(run(config, 8, *flags), {})


def test_faults_of_the_configuration_come_before_any_process(config):
    with pytest.raises(UserError, match="did you mean"):
        checks.require_runnable(run(config, 8, "--runner_config.batch_siz", "2"), {})
    with pytest.raises(UserError, match="train_dataset.*no training data"):
        checks.require_runnable(run(config, 8, "--train_dataset_dir", ""), {})
    with pytest.raises(UserError, match="use_parallel is False"):
        checks.require_runnable(run(config, 8, "--use_parallel", "False"), {})


def test_a_restart_resumes_whatever_the_command_says(config):
    job = run(config, 8, "--resume_training", "False", "--load_checkpoint", "weights.ckpt").resumed()
    loaded = load_run(run_arguments(job.words))
    assert loaded.config.resume_training is True and loaded.config.load_checkpoint == "weights.ckpt"


def test_a_checked_run_tells_what_a_save_of_it_changes(config, tmp_path):
    def record(*flags: str) -> Path | None:
        return checks.require_runnable(run(config, 8, *flags), {})

    assert record("--output_dir", "out") == Path("out/checkpoint/rank_0/meta.json")
    values = yaml.safe_load(config.read_text())
    values["callbacks"] = [{"type": "CheckpointMonitor", "directory": str(tmp_path / "there")}]
    config.write_text(yaml.safe_dump(values))
    assert record("--output_dir", "out") == tmp_path / "there/checkpoint/rank_0/meta.json"
    assert checks.require_runnable(Job(("other.py",), 3, 3), {}) is None


def test_flags_of_python_do_not_hide_a_run_from_the_checks(config):
    job = run(config, 8, "--mp", "1")
    with pytest.raises(UserError, match="but N is 8"):
        checks.require_runnable(Job(("-u", *job.words), 8, 8), {})


def test_saves_since_the_launch(tmp_path):
    record = tmp_path / "meta.json"
    saves = Saves(record)
    assert not saves.any() and not Saves(None).any()
    record.write_text("{}")
    assert saves.any() and not Saves(record).any()
    saves = Saves(record)
    (tmp_path / "new").write_text("{}")
    (tmp_path / "new").replace(record)  # the same step once more
    assert saves.any()


def test_more_processes_than_listed_devices():
    listed = {"CUDA_VISIBLE_DEVICES": "0,1"}
    with pytest.raises(UserError, match=r"4 processes.*2 devices are listed \(0, 1\)"):
        checks.require_runnable(Job(("other.py",), 4, 4), listed)
    checks.require_runnable(Job(("other.py",), 4, 2), listed)


def test_a_run_on_the_cpu_asks_for_no_device(config):
    checks.require_runnable(run(config, 8), {"CUDA_VISIBLE_DEVICES": "0"})


def test_addresses():
    assert checks.resolve(Job(("x",), 2, 2)) == "127.0.0.1"
    assert checks.resolve(Job(("x",), 2, 1, address="127.0.0.1")) == "127.0.0.1"
    with pytest.raises(EnvironmentFault, match="ADDR no-such-host.invalid"):
        checks.resolve(Job(("x",), 2, 2, address="no-such-host.invalid"))
    with pytest.raises(EnvironmentFault, match="localhost is .* no other machine can reach.*MASTER_ADDR"):
        checks.resolve(Job(("x",), 2, 1, address="localhost"))


def test_ranks_meet_at_an_address_of_ipv4(monkeypatch):
    def known(*addresses: str) -> None:
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        found = [(family, 1, 6, "", (text, 8118)) for family, text in zip(families, addresses, strict=True)]
        monkeypatch.setattr(checks.socket, "getaddrinfo", lambda *_, **__: found)

    known("fd00::7", "10.0.0.7", "10.0.0.8")
    assert checks.resolve(Job(("x",), 2, 1, address="node07")) == "10.0.0.7"
    known("fe80::7%eth0")
    with pytest.raises(EnvironmentFault, match="ADDR node07 is fe80::7%eth0.*IPv4 address"):
        checks.resolve(Job(("x",), 2, 1, address="node07"))


def test_ports(tmp_path):
    with ExitStack() as keep, socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(EnvironmentFault, match=f"port {taken} of 127.0.0.1: Address already in use"):
            checks.reserve(Job(("x",), 2, 2, port=taken, port_given=True, log_dir=tmp_path / "a"), keep)
        job = checks.reserve(Job(("x",), 2, 2, port=taken, log_dir=tmp_path / "b"), keep)
        assert job.port > taken and f"port {taken}: " in job.notes[0]
        # its scheduler does not listen yet, but the port is spoken for
        again = checks.reserve(Job(("x",), 2, 2, port=job.port, log_dir=tmp_path / "c"), keep)
        assert again.port > job.port


def test_two_launchers_in_one_log_folder(tmp_path):
    job = Job(("x",), 2, 2, log_dir=tmp_path / "logs")
    with ExitStack() as keep:
        checks.reserve(job, keep)
        with pytest.raises(EnvironmentFault, match="in use by a launcher"):
            checks.reserve(job, keep)
    with ExitStack() as keep:
        checks.reserve(job, keep)


def test_a_log_folder_without_locks_is_used_and_told_of(tmp_path, monkeypatch):
    def flock(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(checks.fcntl, "flock", flock)
    with ExitStack() as keep:
        job = checks.reserve(Job(("x",), 2, 1, node=1, log_dir=tmp_path / "logs"), keep)
    assert len(job.notes) == 1 and f"{tmp_path}/logs cannot be locked (No locks available)" in job.notes[0]


def test_a_log_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with ExitStack() as keep, pytest.raises(EnvironmentFault, match="LOG_DIR .*file/logs"):
        checks.reserve(Job(("x",), 2, 2, log_dir=tmp_path / "file/logs"), keep)


def test_codes_and_causes(tmp_path):
    log = tmp_path / "worker_1.log"
    log.write_text("step 1\nTraceback (most recent call last):\n  File x\nmine.ShapeError: 3 is not 4\nbye\n\n")
    assert failure.exit_code(-signal.SIGKILL) == 137 and failure.exit_code(3) == 3
    assert failure.cause(3, log) == "ended with code 3: mine.ShapeError: 3 is not 4"
    assert "SIGKILL" in failure.cause(-signal.SIGKILL, log) and "SIGSEGV" in failure.cause(-signal.SIGSEGV, log)
    assert failure.cause(2, tmp_path / "none") == "ended with code 2"
    log.write_text("RuntimeError: \n-----\n- Kernel error:\n-----\nLaunch kernel failed: AllReduce-op0\n-----\n")
    assert failure.cause(1, log) == "ended with code 1: RuntimeError: Launch kernel failed: AllReduce-op0"
    log.write_text("step 1\nout/x.safetensors: disk full\n[INFO] DISTRIBUTED(9,7f,python):2026 [tcp.cc:3] Start] ok\n")
    assert failure.cause(1, log) == "ended with code 1: out/x.safetensors: disk full"


def test_the_end_of_a_log(tmp_path):
    log = tmp_path / "worker_1.log"
    log.write_bytes(b"x" * 100_000 + b"\n10%\r20%\r\n" + "ä\n".encode() * 30 + b"\xff last")
    lines = failure.last_lines(log, 33)
    assert lines[-1].endswith("last") and lines[-2] == "ä" and lines[:2] == ["10%", "20%"]
    assert len(failure.quote(log)) == 21
    assert failure.quote(tmp_path / "none") == [f"  {tmp_path / 'none'} is empty"]


def test_who_was_waited_for(tmp_path):
    """Lines of MindSpore's own logs."""
    log = tmp_path / "scheduler.log"
    log.write_text("RuntimeError: The total number of timed out node is 1. Timed out node list is: [const vector]{1}\n")
    assert failure.waited(log)
    log.write_text("[ERROR] DISTRIBUTED(11): ReduceBroadcastAllReduce] Reduce wait receiving [pair] failed.\n")
    assert failure.waited(log)
    log.write_text("ValueError: no data\n")
    assert not failure.waited(log) and failure.not_joined(log, 2) == []


def test_who_did_not_join(tmp_path):
    log = tmp_path / "scheduler.log"
    came = "[WARNING] The new node: 1(role: MS_WORKER), rank id: {}, device id: 1 is registered successfully."
    text = came.format(0) + "\n" + "[WARNING] Topology build timed out., retry(1/30).\n" * 5000 + came.format(2) + "\n"
    log.write_text(text)
    assert failure.not_joined(log, 4) == []  # they may still come
    log.write_text(text + "[ERROR] ... InitializeCluster] Failed to initialize cluster.\n")
    assert failure.not_joined(log, 4) == [1, 3]


def test_output_that_nobody_reads_ends_nothing():
    code = (
        "import sys, time; from llm_core.launch.processes import write\n"
        "print('first', flush=True); sys.stdin.read(1)\n"
        "print([write(sys.stdout, b'more\\n'), write(sys.stdout, b'more\\n')], file=sys.stderr)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as reader:
        assert reader.stdout.readline() == b"first\n"
        reader.stdout.close()
        _, errors = reader.communicate(b"x", timeout=60)
    assert reader.returncode == 0 and errors == b"[False, True]\n"


WRITE = (
    "import sys; from llm_core.launch.processes import write\n"
    "sys.stdin.read(1); sys.exit(write(sys.stdout, b'x\\n'))"
)


def test_a_lost_terminal_ends_nothing():
    master, terminal = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", WRITE], cwd=ROOT, stdin=subprocess.PIPE, stdout=terminal) as writer:
        os.close(terminal)
        os.close(master)
        writer.communicate(b"x", timeout=60)
    assert writer.returncode == 0  # False: not written


def test_a_full_disk_behind_the_output_ends_nothing():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", WRITE], cwd=ROOT, input=b"x", stdout=full, timeout=60)
        assert done.returncode == 0
        launcher = [sys.executable, "-m", "llm_core.launch", "no_such.py", "2"]
        assert subprocess.run(launcher, cwd=ROOT, stdout=full, stderr=full, timeout=60).returncode == 2
    closed = ["bash", "-c", '"$@" >&-', "-", sys.executable, "-c", WRITE]
    assert subprocess.run(closed, cwd=ROOT, input=b"x", timeout=60).returncode == 0


def test_a_terminal_that_reports_its_end_twice_is_no_second_signal():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)  # a service manager's
        assert (stop.first, stop.again) == (signal.SIGTERM, False)
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.again
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.first, stop.again) == (signal.SIGTERM, True)


def test_lists_of_ranks():
    assert failure.rank_list([3]) == "rank 3"
    assert failure.rank_list([7, 0, 1, 2]) == "ranks 0-2 and 7"
    assert failure.rank_list([0, 2, 4]) == "ranks 0, 2 and 4"
