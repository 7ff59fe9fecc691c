"""`run-llm chat`: a conversation in the terminal, or with lines from a pipe."""

from __future__ import annotations

import difflib
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest

from llm_core.config import LoadedConfig
from llm_core.errors import UserError
from llm_core.infer.history import History
from llm_core.infer.load import load_completer, open_tokenizer
from llm_core.infer.sampling import SamplingParams, sampling_params
from llm_core.report.console import console, is_terminal, paint
from llm_core.signals import StopSignals
from llm_core.text.chat import chat_format

HELP = """/reset              forget the conversation
/set                show the generation settings
/set NAME VALUE     change one, e.g. /set temperature 0.7, or several: /set do_sample False num_beams 4
/template NAME      write the conversation in another chat format; none = plain continuation of your text
/help, /quit        this text; leave (Ctrl-D leaves as well, Ctrl-C stops an answer)"""

SETTABLE = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "max_new_tokens",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "length_penalty",
    "early_stopping",
    "penalty_alpha",
    "num_assistant_tokens",
)


def chat(loaded: LoadedConfig) -> int:
    """Talk with the model of `loaded` until /quit or the end of the input; returns the exit code.

    The conversation is written in the format processor.chat_template. Answers go to stdout, all else to stderr.
    """
    config = loaded.config
    params = sampling_params(loaded)
    if params.num_return_sequences > 1:
        count = params.num_return_sequences
        raise UserError(f"num_return_sequences {count}: a chat has one answer to a message; set it to 1")
    history = History(chat_format(config.processor.conversation_format, open_tokenizer(loaded)))
    completer = load_completer(loaded)
    Chat(completer, params, history, config.seed).run()
    return 0


class Chat:
    """The state of a conversation, and the loop over what the user types."""

    def __init__(self, completer, params: SamplingParams, history: History, seed: int) -> None:
        self.completer = completer
        self.params = params
        self.history = history
        self.seed = seed

    def run(self) -> None:
        """Read lines until there are no more."""
        read = line_reader()
        console.info(f"chat format {self.history.format.name}; /help lists the commands")
        while (line := read()) is not None:
            line = line.strip()
            try:
                if line.startswith("/"):
                    if line in ("/quit", "/exit"):
                        return
                    self.command(line)
                elif line:
                    self.answer(line)
            except UserError as error:
                console.error(str(error))

    def command(self, line: str) -> None:
        """Obey a line that begins with a slash (/quit excepted)."""
        word, _, rest = line.partition(" ")
        if word == "/help":
            console.info(HELP)
        elif word == "/reset":
            self.history.rounds.clear()
            console.info("the conversation begins anew")
        elif word == "/template":
            self.history = History(chat_format(rest.strip(), self.completer.tokenizer), self.history.rounds)
            console.info(f"chat format {self.history.format.name}")
        elif word == "/set":
            self.params = changed_params(self.params, rest)
            console.info(", ".join(f"{name} {getattr(self.params, name)}" for name in SETTABLE))
        else:
            raise UserError(f"{word}: no such command; /help lists them")

    def answer(self, message: str) -> None:
        """Stream the answer to `message` to stdout and remember both."""
        spec = self.completer.generator.spec
        wanted = self.params.max_new_tokens or 256
        ids, dropped = self.history.fit(message, spec.max_position, min(wanted, spec.max_position // 2))
        if dropped:
            console.info(
                f"(the context, {spec.max_position} tokens, is full: the {dropped} oldest rounds are forgotten)"
            )
        params = replace(
            self.params,
            max_length=None,
            max_new_tokens=self.params.max_new_tokens and min(self.params.max_new_tokens, spec.max_position - len(ids)),
        )
        with StopSignals(signal.SIGINT) as interrupted:
            [[completion]] = self.completer.complete_ids(
                [message],
                [ids],
                params,
                seed=self.seed,
                on_text=_writer(),
                interrupted=interrupted,
                chat_format=self.history.format,
            )
        sys.stdout.write("\n")
        sys.stdout.flush()
        if interrupted():
            console.info("(stopped)")
        self.history.add(message, completion.text)
        self.seed += 1


def changed_params(params: SamplingParams, text: str) -> SamplingParams:
    """`params` with the changes that "NAME VALUE" asks for, once or several times; unchanged for "".

    UserError for a wrong name or value, and for settings that do not go together once all are changed.
    """
    words = text.split()
    changes = {}
    for name, value in zip_longest(words[::2], words[1::2], fillvalue=""):
        if name not in SETTABLE:
            near = difflib.get_close_matches(name, SETTABLE, 1)
            raise UserError(f"/set {name}: {f'did you mean {near[0]}?' if near else 'one of ' + ', '.join(SETTABLE)}")
        changes[name] = _parsed(name, value, type(getattr(SamplingParams, name)))
    return replace(params, **changes)


def _parsed(name: str, value: str, kind: type) -> bool | int | float | str:
    words = {"true": True, "false": False} if kind is bool else {}
    if name == "early_stopping":
        words["never"] = "never"
    try:
        if words:
            return words[value.lower()]
        return float(value) if kind is float else int(value)
    except (KeyError, ValueError):
        wanted = " or ".join(map(str, words.values())) if words else "a number"
        raise UserError(f"/set {name} {value}: not {wanted}") from None


def line_reader() -> Callable[[], str | None]:
    """A function that returns the next line that the user types, or None at the end."""
    if not is_terminal(sys.stdin):
        sys.stdin.reconfigure(errors="replace")
        return lambda: sys.stdin.readline() or None
    import readline  # noqa: F401  (gives input() line editing and history)

    def ask() -> str | None:
        while True:
            # MindSpore ends a graph's work in a thread of its own, and may have put its handler back meanwhile
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                return input(paint("> ", "bold"))
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D leaves)")

    return ask


def _writer() -> Callable[[str], None]:
    """Writes an answer to stdout as it comes, without the space that separates it from the prompt."""
    begun = False

    def write(text: str) -> None:
        nonlocal begun
        text = text if begun else text.lstrip()
        begun = begun or bool(text)
        sys.stdout.write(text)
        sys.stdout.flush()

    return write
