"""The command line: MindFormers' flags, any key of the run file as `--a.b.c value`, and a few verbs.

Nothing heavy is imported before it is needed: --help, list-cfg and a config error answer in less than 0.3 s. A user's
mistake ends in one message and exit code 2, a fault of the machine in exit code 1.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_core.errors import EnvironmentFault, UserError

if TYPE_CHECKING:
    from llm_core.config import LoadedConfig


class Flag(NamedTuple):
    """A flag, the keys of the run file that it sets, its help, and the keys that it sets to null, as they would win."""

    name: str
    keys: tuple[str, ...]
    help: str
    metavar: str = "VALUE"
    unset: tuple[str, ...] = ()

    @property
    def is_bool(self) -> bool:
        return self.metavar == "BOOL"


FLAGS = (
    Flag("--run_mode", ("run_mode",), "what to do", "{train,finetune,eval,predict}"),
    Flag("--load_checkpoint", ("load_checkpoint",), "weights: file, folder, or Hugging Face folder", "PATH"),
    Flag("--train_dataset_dir", ("train_dataset.data_loader.dataset_dir",), "training records", "PATH"),
    Flag("--eval_dataset_dir", ("eval_dataset.data_loader.dataset_dir",), "evaluation records", "PATH"),
    Flag("--output_dir", ("output_dir",), "where everything is written", "DIR"),
    Flag("--epochs", ("runner_config.epochs",), "passes over the training data", "N"),
    Flag("--batch_size", ("runner_config.batch_size",), "records a step", "N"),
    Flag(
        "--gradient_accumulation_steps", ("runner_config.gradient_accumulation_steps",),
        "batches whose gradients make one update", "N",
    ),
    Flag("--sink_mode", ("runner_config.sink_mode",), "report every sink_size steps only", "BOOL"),
    Flag(
        "--num_samples", ("train_dataset.data_loader.num_samples", "eval_dataset.data_loader.num_samples"),
        "use the first N records only", "N",
    ),
    Flag("--seed", ("seed",), "seed of weights, shuffling, dropout and sampling", "N"),
    Flag("--do_eval", ("do_eval",), "evaluate during training", "BOOL"),
    Flag("--resume_training", ("resume_training",), "go on from the newest checkpoint, or a named one", "BOOL|FILE"),
    Flag("--profile", ("profile",), "write a timeline of some steps", "BOOL"),
    Flag("--predict_batch_size", ("predict_batch_size",), "prompts answered together", "N"),
    Flag("--do_sample", ("model.model_config.do_sample",), "sample instead of taking the likeliest token", "BOOL"),
    Flag("--use_parallel", ("use_parallel",), "several ranks (scripts/msrun_launcher.sh)", "BOOL"),
    Flag("--device_target", ("context.device_target",), "device", "{Ascend,GPU,CPU}"),
    Flag("--device_id", ("context.device_id",), "number of the device", "N"),
    Flag("--mode", ("context.mode",), "0 = graph", "N"),
    Flag("--src_strategy_path_or_dir", ("src_strategy_path_or_dir",), "its layout (several ranks)", "PATH"),
    Flag("--auto_trans_ckpt", ("auto_trans_ckpt",), "convert load_checkpoint to this layout (several ranks)", "BOOL"),
    Flag("--transform_process_num", ("transform_process_num",), "ranks that convert (several ranks)", "N"),
    Flag("--only_save_strategy", ("only_save_strategy",), "write the layout and end (several ranks)", "BOOL"),
    Flag("--strategy_load_checkpoint", ("parallel.strategy_ckpt_load_file",), "layout file (several ranks)", "PATH"),
    Flag("--adapter_id", ("adapter_id",), "adapter to start from: a path, or a name beside load_checkpoint", "PATH"),
    Flag("--remote_save_url", ("remote_save_url",), "accepted; nothing is uploaded", "URL"),
    Flag("--trust_remote_code", ("trust_remote_code",), "accepted; code comes from --register_path only", "BOOL"),
    # the flags of run_internlm.py
    Flag("--train_dataset", ("train_dataset.data_loader.dataset_dir",), "as --train_dataset_dir", "PATH"),
    Flag("--eval_dataset", ("eval_dataset.data_loader.dataset_dir",), "as --eval_dataset_dir", "PATH"),
    Flag("--resume", ("resume_training",), "as --resume_training", "BOOL|FILE"),
    Flag("--input_dir", ("predict_data",), "a .json, .jsonl or text file of prompts; as --predict_data", "FILE"),
    Flag("--vocab_file", ("processor.tokenizer.vocab_file",), "the tokenizer's file or folder", "PATH"),
    Flag("--seq_length", ("model.model_config.seq_length",), "tokens of a record; the longest context", "N"),
    Flag(
        "--predict_length", ("model.model_config.max_length",), "longest text, prompt included", "N",
        unset=("model.model_config.max_new_tokens",),
    ),
    Flag("--dp", ("parallel_config.data_parallel",), "copies of the model (several ranks)", "N"),
    Flag("--mp", ("parallel_config.model_parallel",), "ranks that share every layer (several ranks)", "N"),
    Flag("--pp", ("parallel_config.pipeline_stage",), "pipeline stages (several ranks)", "N"),
    Flag("--micro_batch_num", ("parallel_config.micro_batch_num",), "parts of a batch (several ranks)", "N"),
    Flag("--deepspeed", ("parallel.zero_stage",), "what data-parallel ranks share out", "deepspeed_zero{1,2,3}"),
    Flag("--optimizer_parallel", ("parallel.enable_parallel_optimizer",), "shard the optimizer (ranks)", "BOOL"),
    Flag("--pet_method", ("model.model_config.pet_config.pet_type",), "tune an adapter", "{lora,prefixtuning,...}"),
    Flag("--task", ("task",), "accepted", "text_generation"),
)  # fmt: skip

_OTHER_FLAGS = ("--config", "--predict_data", "--options", "--register_path", "--help")

_EPILOG = """\
any other key of the run file is set as --a.b.c VALUE or --a.b.c=VALUE; the item of a list by its type or number:
  --callbacks[CheckpointMonitor].save_checkpoint_steps 500      --callbacks.1.save_checkpoint_steps 500

verbs:
  list-cfg [-p PATTERN]        names of the packaged runs
  copy-cfg NAME DIR            copy a packaged run, with its layers, to edit it
  show-cfg --config C [--all]  the merged run, and where each value was written
  plan --config C [--devices N] [--device NAME]   parameters, memory, traffic and time: an estimate
  check --config C             check config, data, tokenizer, checkpoint and disk before a long run
  chat --config C              an interactive prompt
  show-data FILE               records, decoded, with what carries loss marked
  schema [FILE] [-p PATTERN]   JSON Schema of the run file, for editors; with -p the keys and their meaning
  doctor                       versions, threads, memory, disk, compiler; and a short self-test
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for plugins takes 40 ms
    gc.disable()  # until the run begins: what is made before lives as long as the process
    try:
        return _dispatch(argv)
    except (UserError, EnvironmentFault) as error:
        print(error, file=sys.stderr)
        if "llm_core.report.console" in sys.modules:  # a run has begun, and may have its log files
            sys.modules["llm_core.report.console"].console.record_error(str(error))
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # `list-cfg | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    finally:
        gc.enable()


def load_run(argv: Sequence[str]) -> LoadedConfig:
    """The run that a command line without a verb describes, loaded and checked as far as a file can be; UserError."""
    return _load(_run_parser("run-llm"), list(argv))


def _dispatch(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        verb = _VERBS.get(argv[0])
        if verb is None:
            import difflib

            near = difflib.get_close_matches(argv[0], _VERBS, 1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists the verbs"
            raise UserError(f"{argv[0]}: unknown verb{hint}")
        return verb(argv[1:])
    parser = _run_parser("run-llm")
    if not argv:
        parser.print_usage()
        raise UserError("nothing to do: give --config FILE, or a verb; --help shows both")
    loaded = _load(parser, argv)
    loaded.require_runnable()
    return _run(loaded)


def _run(loaded: LoadedConfig) -> int:
    _begin(loaded)
    mode = loaded.config.run_mode
    if mode == "predict":
        from llm_core.infer.run import predict as start
    elif mode == "eval":
        from llm_core.evals.run import evaluate as start
    else:
        from llm_core.train.run import train as start
    return start(loaded)


def _begin(loaded: LoadedConfig) -> None:
    """What precedes every run: the lines about mapped and meaningless keys, and the user's own code."""
    from llm_core.report.console import console

    _get_ready()
    for note in loaded.notes:
        console.info(note)
    if loaded.register_path is not None:
        _import_from(loaded.register_path)


def _get_ready() -> None:
    """What precedes all that may import MindSpore: the environment that it reads at its import."""
    from llm_core.runtime import prepare_environment

    gc.enable()
    prepare_environment()


def _import_from(name: str) -> None:
    """Import the user's Python file, package, or every file of a folder: the one door through which code comes in."""
    import importlib
    from pathlib import Path

    path = Path(name).resolve()
    if path.is_dir() and not (path / "__init__.py").is_file():
        folder, modules = path, sorted(file.stem for file in path.glob("*.py"))
    elif path.is_dir() or path.suffix == ".py" and path.is_file():
        folder, modules = path.parent, [path.stem]
    else:
        folder, modules = path, []
    if not modules:
        raise UserError(f"--register_path {name}: no Python file or package there")
    sys.path.insert(0, str(folder))
    for module in modules:
        importlib.import_module(module)


# ---- verbs ----


def _list_cfg(argv: list[str]) -> int:
    parser = _Parser(prog="run-llm list-cfg", description="Names of the packaged runs.")
    parser.add_argument("-p", "--pattern", default="", help="a part of the name, or a regular expression")
    from llm_core.config import catalog

    pattern = parser.parse_args(argv).pattern
    found = catalog.names(pattern)
    if not found:
        raise UserError(f"-p {pattern}: no packaged run matches; without -p all are listed")
    width = max(map(len, found))
    for name in found:
        print(f"{name:<{width}}  {catalog.title(name)}".rstrip())
    return 0


def _copy_cfg(argv: list[str]) -> int:
    parser = _Parser(prog="run-llm copy-cfg", description="Copy a packaged run with the layers it stands on.")
    parser.add_argument("name")
    parser.add_argument("dir")
    args = parser.parse_args(argv)
    from pathlib import Path

    from llm_core.config import catalog

    for path in catalog.copy(args.name, Path(args.dir)):
        print(path)
    return 0


def _show_cfg(argv: list[str]) -> int:
    parser = _run_parser("run-llm show-cfg")
    parser.add_argument("--all", action="store_true", help="the keys that nobody set as well, with their defaults")
    show_all = "--all" in argv
    loaded = _load(parser, argv)
    print(loaded.as_yaml(origins=True, defaults=show_all), end="")
    for note in loaded.notes:
        if not note.startswith("no meaning here"):
            print(f"# {note}")
    if loaded.inert:
        print("# keys without a meaning here:")
        for key, reason in loaded.inert.items():
            print(f"#   {key}: {reason}")
    return 0


def _schema(argv: list[str]) -> int:
    parser = _Parser(prog="run-llm schema", description="JSON Schema of the run file, for editors; or its keys.")
    parser.add_argument("file", nargs="?", help="write to this file instead of the terminal")
    parser.add_argument("-p", "--pattern", help="print keys that match, with type, default and meaning")
    args = parser.parse_args(argv)
    from llm_core.config import reference

    text = reference.key_list(args.pattern) if args.pattern is not None else reference.json_schema()
    if args.file is None:
        print(text, end="")
        return 0
    reference.write(args.file, text)
    return 0


def _plan(argv: list[str]) -> int:
    parser = _run_parser("run-llm plan")
    parser.add_argument("--devices", type=int, metavar="N", help="look for layouts of N devices")
    parser.add_argument("--device", metavar="NAME", help="910A, 910B, A100, H100, H200, cpu; default: the run file's")
    loaded, args = _load_with(parser, argv)
    from llm_core.plan import plan

    print(plan(loaded, args.devices, args.device), end="")
    return 0


def _check(argv: list[str]) -> int:
    loaded = _load(_run_parser("run-llm check"), argv)
    from llm_core.train.check import check

    _begin(loaded)
    return check(loaded)


def _chat(argv: list[str]) -> int:
    loaded = _load(_run_parser("run-llm chat"), argv)
    loaded.require_runnable(prompts=False)
    from llm_core.infer.chat import chat

    _begin(loaded)
    return chat(loaded)


def _show_data(argv: list[str]) -> int:
    _get_ready()
    from llm_core.data.show import main as show

    return show(argv)


def _doctor(argv: list[str]) -> int:
    _get_ready()
    from llm_core.report.doctor import main as doctor

    return doctor(argv)


_VERBS: dict[str, Callable[[list[str]], int]] = {
    "list-cfg": _list_cfg,
    "copy-cfg": _copy_cfg,
    "show-cfg": _show_cfg,
    "plan": _plan,
    "check": _check,
    "chat": _chat,
    "show-data": _show_data,
    "schema": _schema,
    "doctor": _doctor,
}


# ---- flags ----


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviation (`--epoch` is not `--epochs`) and raises UserError instead of leaving."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> Any:
        raise UserError(f"{self.prog}: {message}")


def _run_parser(prog: str) -> _Parser:
    parser = _Parser(
        prog=prog,
        usage=f"{prog} --config FILE [flags] [--a.b.c VALUE ...]",
        description="Train, fine-tune, evaluate and prompt Llama-like models from one YAML file.",
        epilog=_EPILOG,
    )
    parser.add_argument("--config", metavar="FILE", help="run file, or the name of a packaged run (list-cfg)")
    for flag in FLAGS:
        arity = {"nargs": "?", "const": "True"} if flag.is_bool else {}
        parser.add_argument(flag.name, metavar=flag.metavar, help=flag.help, action=_Collect, **arity)
    parser.add_argument(
        "--predict_data", nargs="+", metavar="TEXT", help="prompts, or a file with one prompt a line", action=_Collect
    )
    parser.add_argument("--options", nargs="+", metavar="a.b=VALUE", help="keys of the run file", action=_Options)
    parser.add_argument("--register_path", metavar="DIR", help="load this Python package or file first")
    parser.add_argument("-q", dest="quiet", action="store_true", help="warnings and results only")
    parser.add_argument("-v", dest="verbose", action="store_true", help="more detail")
    parser.set_defaults(overrides=[])
    return parser


class _Collect(argparse.Action):
    """Adds a flag's keys to the list of overrides."""

    _keys = {flag.name: flag.keys for flag in FLAGS} | {"--predict_data": ("predict_data",)}
    _unset = {flag.name: flag.unset for flag in FLAGS}

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        added = [(key, values, option_string) for key in self._keys[option_string]]
        added += [(key, "null", option_string) for key in self._unset.get(option_string, ())]
        namespace.overrides = [*namespace.overrides, *added]


class _Options(argparse.Action):
    """`--options a.b=v c.d=w`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for item in values:
            key, equals, value = item.partition("=")
            if not equals:
                raise UserError(f"--options {item}: must be KEY=VALUE, such as runner_config.epochs=2")
            namespace.overrides = [*namespace.overrides, (key, value, f"--options {key}")]


def _dotted(extras: list[str]) -> list[tuple[str, str, str]]:
    """What argparse did not know: `--a.b.c v` and `--a.b=c`."""
    overrides = []
    rest = iter(range(len(extras)))
    for index in rest:
        flag, equals, value = extras[index].partition("=")
        if not flag.startswith("--") or flag == "--":
            raise UserError(f"{extras[index]}: does not belong to any flag; a value with spaces needs quotes")
        if not equals:
            following = extras[index + 1] if index + 1 < len(extras) else None
            if following is None or following.startswith("--"):
                value = ""
                if "." in flag:
                    raise UserError(f"{flag}: needs a value")
            else:
                value = following
                next(rest)
        overrides.append((flag[2:], value, flag))
    return overrides


def _load(parser: _Parser, argv: list[str]) -> LoadedConfig:
    return _load_with(parser, argv)[0]


def _load_with(parser: _Parser, argv: list[str]) -> tuple[LoadedConfig, argparse.Namespace]:
    """The run, and what the parser's own flags say."""
    args, extras = parser.parse_known_args(argv)
    overrides = [*args.overrides, *_dotted(extras)]
    if args.config is None:
        raise UserError(f"{parser.prog}: give --config FILE, or the name of a packaged run (`list-cfg` shows them)")
    from llm_core.config import load_config

    flags = [flag.name for flag in FLAGS] + list(_OTHER_FLAGS)
    loaded = load_config(args.config, overrides, flags=flags, register_path=args.register_path)
    if args.quiet or args.verbose:
        from llm_core.report.console import console

        console.configure(verbosity=-1 if args.quiet else 1)
    return loaded, args


if __name__ == "__main__":
    sys.exit(main())
