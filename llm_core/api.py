"""The few names for using this package from Python: `load`, then `generate` or `logits`; and `train`.

    from llm_core import api

    model = api.load("configs/llama2/predict_llama2_7b.yaml", load_checkpoint="path/to/weights")
    print(model.generate(["Once upon a time"], max_new_tokens=50)[0])

Importing this module imports no MindSpore; `load` and `train` do. A wrong argument, file or value raises UserError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_core.runtime import prepare_environment

if TYPE_CHECKING:
    import numpy as np

    from llm_core.config import LoadedConfig
    from llm_core.infer.complete import Completer
    from llm_core.infer.sampling import SamplingParams

__all__ = ["LoadedModel", "load", "train"]


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights and tokenizer; made by `load`."""

    completer: Completer
    params: SamplingParams  # the YAML's generation keys
    loaded: LoadedConfig

    def generate(self, prompts: Sequence[str] | str, *, seed: int = 0, **sampling: Any) -> list[str]:
        """The answers (without the prompts), num_return_sequences for each prompt, in the prompts' order.

        `sampling` replaces what the YAML says, by the names of SamplingParams: do_sample, temperature, top_k, top_p,
        max_new_tokens, num_return_sequences, stop_strings, num_beams, penalty_alpha, force_words, and all the others;
        prefix_allowed_tokens_fn and assistant (a Generator) can be given here only.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        params = replace(self.params, **sampling)
        answers = self.completer.complete(prompts, params, seed=seed)
        return [completion.text for completions in answers for completion in completions]

    def logits(self, text: str) -> np.ndarray:
        """fp32 [tokens, vocab]: row i scores what follows the first i+1 tokens of `text` (bos included)."""
        import mindspore
        import numpy as np

        ids = np.array([self.completer.tokenizer.encode_prompt(text)], np.int32)
        return self.completer.generator.net(mindspore.Tensor(ids)).asnumpy()[0]


def load(config: str | Path, **overrides: Any) -> LoadedModel:
    """Load the weights and tokenizer of a run file (a path, or a name of `run_llm.py list-cfg`).

    Overrides are keys of the run file: load_checkpoint="...", or, dotted, **{"model.model_config.seq_length": 512}.
    """
    prepare_environment()
    from llm_core.config import load_config
    from llm_core.infer.load import load_completer
    from llm_core.infer.sampling import sampling_params

    loaded = load_config(config, list(overrides.items()))
    return LoadedModel(load_completer(loaded), sampling_params(loaded), loaded)


def train(config: str | Path, **overrides: Any) -> int:
    """Run a training as `run_llm.py --config` does, and return its exit code (0: done). Overrides as for `load`."""
    prepare_environment()
    from llm_core.config import load_config
    from llm_core.train.run import train as run

    loaded = load_config(config, list({"run_mode": "train", **overrides}.items()))
    loaded.require_runnable()
    return run(loaded)
