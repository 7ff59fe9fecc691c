"""The command line as a user sees it: exit codes, messages, verbs, and what is not imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm_core import cli
from llm_core.config import load_config

ROOT = Path(__file__).resolve().parent.parent
MODEL = "model:\n  arch: {type: LlamaForCausalLM}\n  model_config: {type: LlamaConfig, hidden_size: 64, num_heads: 4}\n"


@pytest.fixture
def run(capsys: pytest.CaptureFixture):
    """Call the command line; returns (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        try:
            code = cli.main(argv)
        except SystemExit as stop:  # --help
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(MODEL)
    return str(path)


def overrides(*argv: str) -> dict[str, object]:
    """The keys that a command line sets."""
    parser = cli._run_parser("run-llm")
    args, extras = parser.parse_known_args(argv)
    return {key: value for key, value, _ in [*args.overrides, *cli._dotted(extras)]}


# ---- the process ----


def test_entry_script_from_anywhere(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "run_llm.py"),
        "--config",
        "configs/llama2/pretrain_llama2_7b.yaml",
        "--model.model_config.hiden_size",
        "64",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "--model.model_config.hiden_size: unknown key; did you mean model.model_config.hidden_size?\n"
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["list-cfg"],
        ["show-cfg", "--config", "pretrain_llama2_7b"],
        ["--config", "pretrain_llama2_7b"],
        ["schema"],
        ["copy-cfg", "pretrain_llama2_7b", "OUT"],
    ],
)
def test_light_commands_import_nothing_heavy(argv: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from llm_core.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'mindspore', 'numpy', 'torch', 'transformers', 'sentencepiece', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    argv = [str(tmp_path) if each == "OUT" else each for each in argv]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_help_and_list_need_no_pydantic() -> None:
    code = (
        "import sys; from llm_core.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit(1 if 'pydantic' in sys.modules else 0)"
    )
    for argv in (["--help"], ["list-cfg", "-p", "llama2"]):
        assert (
            subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, timeout=60).returncode
            == 0
        )


# ---- flags ----


def test_help_names_every_flag_and_verb(run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for flag in cli.FLAGS:
        assert flag.name in out
    for verb in cli._VERBS:
        assert verb in out


@pytest.mark.parametrize("flag", [flag.name for flag in cli.FLAGS])
def test_every_flag_reaches_a_key(flag: str, file: str) -> None:
    values = {"--run_mode": "eval", "--device_target": "CPU", "--use_parallel": "false", "--task": "text_generation"}
    values |= {"--pet_method": "lora", "--deepspeed": "deepspeed_zero2"}
    numbers = {spec.name for spec in cli.FLAGS if spec.metavar == "N"}
    value = values.get(flag, "1" if flag in numbers or "BOOL" in str(spec_of(flag).metavar) else "some/path")
    given = overrides(flag, value)
    assert set(given) == {*spec_of(flag).keys, *spec_of(flag).unset}
    loaded = load_config(file, [(key, each, flag) for key, each in given.items()])
    assert all(loaded.origins[key] == flag or key in loaded.inert for key in given)


def spec_of(name: str) -> cli.Flag:
    return next(flag for flag in cli.FLAGS if flag.name == name)


def test_ways_of_writing_an_override() -> None:
    given = overrides(
        "--epochs",
        "3",
        "--model.model_config.pad_token_id",
        "-1",
        "--optimizer.learning_rate=-5e-5",
        "--a.b",
        "x=y",
        "--options",
        "seed=4",
        "runner_config.sink_size=-1",
        "--predict_data",
        "one",
        "two words",
        "--do_eval",
        "--output_dir=/tmp/a b",
        "--callbacks[CheckpointMonitor].prefix",
        "p",
        "--eval_step_interval",
        "-1",
    )
    assert given == {
        "runner_config.epochs": "3",
        "model.model_config.pad_token_id": "-1",
        "optimizer.learning_rate": "-5e-5",
        "a.b": "x=y",
        "seed": "4",
        "runner_config.sink_size": "-1",
        "predict_data": ["one", "two words"],
        "do_eval": "True",
        "output_dir": "/tmp/a b",
        "callbacks[CheckpointMonitor].prefix": "p",
        "eval_step_interval": "-1",
    }


@pytest.mark.parametrize("text", ["true", "True", "1", "TRUE"])
def test_options_take_truth_values(text: str, file: str) -> None:
    assert load_config(file, [("do_eval", text)]).config.do_eval is True
    assert load_config(file, [("do_eval", "false")]).config.do_eval is False


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "nothing to do"),
        (["--epochs", "3"], "give --config FILE"),
        (["lst-cfg"], "lst-cfg: unknown verb; did you mean list-cfg?"),
        (["--config", "FILE", "--epoch", "1"], "--epoch: unknown flag; did you mean --epochs?"),
        (["--config", "FILE", "--epochs"], "--epochs: expected one argument"),
        (["--config", "FILE", "--epochs", "1", "2"], "2: does not belong to any flag"),
        (["--config", "FILE", "--runner_config.epochs"], "--runner_config.epochs: needs a value"),
        (["--config", "FILE", "--options", "epochs"], "--options epochs: must be KEY=VALUE"),
        (
            ["--config", "FILE", "--options", "runner_config.epoch=3"],
            "--options runner_config.epoch: runner_config.epoch: unknown key; did you mean runner_config.epochs?",
        ),
        (
            ["--config", "FILE", "--run_mode", "trian"],
            "--run_mode: 'trian' is none of train, finetune, eval, predict; did you mean",
        ),
        (["--config", "FILE", "--do_eval", "maybe"], "--do_eval: 'maybe': should be a valid boolean"),
        (["--config", "pretrain_llama2_7"], "did you mean llama2/pretrain_llama2_7b?"),
        (["--config", "configs"], "is a folder"),
        (["--config", "FILE"], "run_mode: is not given"),
        (["list-cfg", "-p", "nothing_like_it"], "no packaged run matches"),
        (["list-cfg", "-p", "("], "no regular expression"),
        (["--config", "FILE", "--lr_scale", "True"], "--lr_scale: True is not supported"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(argv: list[str], said: str, run, file: str) -> None:
    code, _, err = run(*[file if each == "FILE" else each for each in argv])
    assert code == 2
    assert said in err and "Traceback" not in err


def test_what_a_run_lacks_is_said_before_it_starts(run, file: str) -> None:
    code, _, err = run("--config", file, "--run_mode", "train", "--use_parallel", "True", "--dp", "2",
                       "--do_eval", "True")
    assert code == 2
    lines = err.splitlines()
    assert any(line.startswith("--use_parallel: data_parallel x model_parallel x") for line in lines)
    for part in (
        "add --use_parallel False",
        "add --train_dataset_dir FILE",
        "add --eval_dataset_dir FILE",
        "optimizer: is required",
    ):
        assert part in err
    assert "no prompt; add --predict_data" in run("--config", file, "--run_mode", "predict")[2]
    assert "--eval_dataset_dir" in run("--config", file, "--run_mode", "eval")[2]


def test_other_ranks_than_the_layouts_are_refused(run, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("--config", file, "--run_mode", "predict", "--predict_data", "x", "--use_parallel", "True", "--dp", "2")
    assert "1 x 1 = 2 ranks, and 1 is started: start them with bash scripts/msrun_launcher.sh" in run(*argv)[2]
    monkeypatch.setenv("MS_WORKER_NUM", "4")
    said = run(*argv)[2]
    assert said.startswith("--dp: parallel_config: ") and "2 x 1 x 1 = 2 ranks, and 4 are started" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--pp", "2", "--micro_batch_num", "1"), "1 is below pipeline_stage 2"),
        (("--parallel_config.context_parallel", "2"), "a sequence is not shared between ranks"),
        (("--pp", "2"), "prediction does not run in a pipeline"),
        (("--deepspeed", "deepspeed_zero4"), "is none of 0, 1, 2, 3"),
    ],
)
def test_what_ranks_cannot_do_is_refused(flags: tuple[str, ...], said: str, run, file: str) -> None:
    argv = ("--config", file, "--run_mode", "predict", "--predict_data", "x", "--use_parallel", "True", *flags)
    assert said in run(*argv)[2]


def test_an_environment_fault_ends_with_code_1(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run("schema", str(tmp_path / "file" / "schema.json"))
    assert code == 1 and "schema.json" in err


# ---- verbs ----


def test_list_cfg(run) -> None:
    code, out, _ = run("list-cfg", "-p", "LLAMA2.*predict")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "llama2/predict_llama2_13b",
        "llama2/predict_llama2_70b",
        "llama2/predict_llama2_7b",
    ]
    assert out.splitlines()[0].endswith("  Prediction with Llama 2 13B on 8 devices")  # its header's line, no colon


def test_copy_cfg_copies_a_run_that_still_loads(run, tmp_path: Path) -> None:
    code, out, _ = run("copy-cfg", "pretrain_llama2_7b_bf16", str(tmp_path))
    copied = out.split()
    assert code == 0 and copied[0] == str(tmp_path / "llama2/pretrain_llama2_7b_bf16.yaml") and len(copied) > 5
    assert load_config(copied[0]).config == load_config("pretrain_llama2_7b_bf16").config
    assert run("copy-cfg", "pretrain_llama2_7b_bf16", str(tmp_path))[0] == 0  # again: nothing differs
    (tmp_path / "base/runtime.yaml").write_text("seed: 4\n")
    code, _, err = run("copy-cfg", "pretrain_llama2_7b_bf16", str(tmp_path))
    assert code == 2 and "runtime.yaml: exists and differs" in err


def test_show_cfg(run) -> None:
    code, out, _ = run("show-cfg", "--config", "pretrain_llama2_7b", "--epochs", "5", "--layer_decay", "0.5")
    assert code == 0
    assert "epochs: 5" in out and "# --epochs" in out and "base/optimizer.yaml:" in out
    assert "#   layer_decay: for vision models" in out
    assert "gradients_mean" in out and "pp_interleave" not in out
    assert "initializer_range: 0.02" in run("show-cfg", "--config", "pretrain_llama2_7b", "--all")[1]


def test_schema_is_valid_and_knows_the_keys(run, tmp_path: Path) -> None:
    path = tmp_path / "sub" / "schema.json"
    assert run("schema", str(path))[0] == 0
    schema = json.loads(path.read_text())
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema)
    sys.path.insert(0, str(Path(__file__).parent / "config"))
    try:
        from mindformers_files import INTERNLM_LORA, PRETRAIN_7B, PRETRAIN_70B
    finally:
        sys.path.pop(0)
    import yaml

    validator = jsonschema.Draft202012Validator(schema)
    for text in (PRETRAIN_7B, PRETRAIN_70B, INTERNLM_LORA):
        values = yaml.safe_load(text)
        errors = [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(values)]
        assert errors == []
    assert list(validator.iter_errors({"runner_config": {"epoch": 1}}))
    assert list(validator.iter_errors({"model": {"model_config": {"type": "LlamaConfig", "hiden_size": 1}}}))


def test_schema_lists_keys(run) -> None:
    code, out, _ = run("schema", "-p", "warmup_ratio")
    assert code == 0 and out.startswith("lr_schedule.warmup_ratio  [null]  Warm-up as a share")
    assert "callbacks[SampleMonitor].prompts  [required]" in run("schema", "-p", "SampleMonitor")[1]


def test_every_key_is_described(run) -> None:
    for line in run("schema", "-p", "")[1].splitlines():
        assert line.partition("]  ")[2], line


def test_register_path_is_the_only_door_for_code(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = tmp_path / "my_own_code_for_a_test.py"
    module.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    cli._import_from(str(module))
    assert (tmp_path / "ran").exists()
    with pytest.raises(cli.UserError, match="no Python file or package there"):
        cli._import_from(str(tmp_path / "nothing"))


# ---- the flags of run_internlm.py ----


def test_a_command_of_run_internlm(file: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["one", "two"]')
    argv = (
        "--task text_generation --run_mode predict --use_parallel false --load_checkpoint w.ckpt --resume false "
        f"--train_dataset a.mindrecord --eval_dataset b.mindrecord --input_dir {prompts} --predict_length 512 "
        "--seq_length 1024 --vocab_file t.model --dp 2 --mp 4 --pp 1 --micro_batch_num 8 "
        "--pet_method lora --optimizer_parallel true"
    ).split()
    parser = cli._run_parser("run-llm")
    args, extras = parser.parse_known_args(argv)
    loaded = load_config(file, [*args.overrides, *cli._dotted(extras)])
    config, layout = loaded.config, loaded.config.parallel_config
    assert (config.run_mode, config.use_parallel, config.resume_training) == ("predict", False, False)
    assert config.train_dataset.data_loader.dataset_dir == "a.mindrecord"
    assert config.eval_dataset.data_loader.dataset_dir == "b.mindrecord"
    assert config.predict_data == [str(prompts)] and config.processor.tokenizer.vocab_file == "t.model"
    assert (config.model.config.max_length, config.model.config.seq_length) == (512, 1024)
    demo = load_config("predict_falcon_demo", [*overrides("--predict_length", "9").items()]).config.model.config
    assert (demo.max_length, demo.max_new_tokens) == (9, None)
    assert config.model.config.pet_config.lora_rank == 8 and config.parallel.enable_parallel_optimizer
    assert (layout.data_parallel, layout.model_parallel, layout.pipeline_stage, layout.micro_batch_num) == (2, 4, 1, 8)


def test_only_one_task(run, file: str) -> None:
    code, _, err = run("--config", file, "--task", "image_classification")
    assert code == 2 and "--task: 'image_classification' is not supported" in err
