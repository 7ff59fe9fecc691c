"""From a loaded config to a model with its weights and its tokenizer."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

from llm_core.checkpoint.reshard import Share
from llm_core.config import LoadedConfig, load_config
from llm_core.config.hf_folder import is_hf_folder
from llm_core.errors import UserError
from llm_core.infer.complete import Completer
from llm_core.infer.prompts import wrapping
from llm_core.parallel.cuts import cut_parameters
from llm_core.report.console import console
from llm_core.signals import signals_blocked
from llm_core.text import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from mindspore import nn

    from llm_core.infer.generate import Generator
    from llm_core.models.decoder import CausalLM
    from llm_core.models.spec import DecoderSpec
    from llm_core.parallel.comm import Comm
    from llm_core.peft.adapters import Adapter


def load_for_inference(
    loaded: LoadedConfig, *, need_tokenizer: bool = True, start: bool = True, comm: Comm | None = None
) -> tuple[CausalLM, DecoderSpec, Tokenizer | None]:
    """Start MindSpore, build the model of `model`, load load_checkpoint and the adapter into it, and the tokenizer.

    Raises UserError if there is no checkpoint, and if it, the adapter or the tokenizer is not there or does not fit.
    The tokenizer is looked at first: that takes a moment, the weights may take minutes. need_tokenizer=False: None
    where processor.tokenizer.vocab_file is not set. start=False: MindSpore is set up, for another model, and stays so.
    comm: with the other ranks; the network is then this rank's part of the model, whose sizes the spec has.
    """
    (net,), spec, tokenizer = load_pieces(loaded, need_tokenizer=need_tokenizer, start=start, comm=comm)
    return net, spec, tokenizer


def load_pieces(
    loaded: LoadedConfig, *, need_tokenizer: bool, start: bool = True, comm: Comm | None
) -> tuple[list[nn.Cell], DecoderSpec, Tokenizer | None]:
    """As `load_for_inference`, of a stage of a pipeline too, which may have several pieces of the model."""
    from llm_core import runtime
    from llm_core.models.spec import spec_from_config

    config = loaded.config
    spec = spec_from_config(config.model)
    if not config.load_checkpoint:
        raise UserError(
            f"{loaded.path}: load_checkpoint is not set, and random weights write noise: name the weights with "
            "--load_checkpoint (a .safetensors or .ckpt file, a folder of them, an output_dir of a training, or a "
            "Hugging Face model's folder)"
        )
    tokenizer = None
    if need_tokenizer or config.processor.tokenizer.vocab_file:
        tokenizer = load_fitting_tokenizer(loaded, spec)
    adapter = adapter_for_inference(loaded, spec)
    if start:
        with signals_blocked(signal.SIGINT, signal.SIGTERM):  # for the threads that MindSpore starts
            runtime.start(config)

    from llm_core.models.decoder import describe_operators
    from llm_core.peft.apply import adapter_shapes, describe_parameters
    from llm_core.peft.inference import is_merged, net_with_adapter

    pet = None if adapter is None else adapter.pet
    share, pieces = None, [{}]
    if comm is not None:
        from llm_core.parallel.share import own_pieces

        cuts = cut_parameters(spec, comm.layout, adapter_shapes(spec, pet))
        share, pieces = Share(comm.layout, comm.rank, cuts), own_pieces(spec, comm, cuts)
        console.info(f"rank {comm.rank} of {comm.layout.world}: {comm.layout.describe()}")
    console.info(describe_operators(spec))
    nets = []
    for piece in pieces:
        net, report = net_with_adapter(
            spec, config.load_checkpoint, adapter, share, config.source_strategy, **piece
        )
        nets.append(net.set_train(False))
        console.info(f"{config.load_checkpoint}: {report.line()}")
    if adapter is not None:
        console.info(adapter.line() + (", merged into the weights" if is_merged(spec, pet) else ""))
    console.info(f"model: {describe_parameters(spec, pet)}")
    if comm is not None:
        comm.gate()  # to load weights takes ranks unequal times
    return nets, spec, tokenizer


def adapter_for_inference(loaded: LoadedConfig, spec: DecoderSpec) -> Adapter | None:
    """The adapter to predict or evaluate with; UserError where pet_config asks for one and none is named."""
    from llm_core.peft.adapters import open_adapter

    adapter = open_adapter(loaded.config, spec)
    if adapter is None and loaded.config.model.config.pet_config is not None:
        raise UserError(
            f"{loaded.path}: model.model_config.pet_config is set, and there is no adapter: name it with --adapter_id "
            "(the output_dir of its training, a file, or a PEFT folder), or remove pet_config to run the base alone"
        )
    return adapter


def load_completer(loaded: LoadedConfig, comm: Comm | None = None) -> Completer:
    """As `load_for_inference`, wrapped for generating text; InternLMProcessor writes prompts as a chat."""
    arch = loaded.config.model.arch.type
    if not arch.endswith("ForCausalLM"):
        raise UserError(f"{loaded.path}: {arch}: a classifier writes no text; --run_mode eval measures it")
    net, spec, tokenizer = load_for_inference(loaded, comm=comm)
    from llm_core.infer.generate import Generator

    config = loaded.config.model.config
    generator = Generator(net, spec, eos_ids=end_ids(config), pad_id=config.pad_token_id)
    chat = wrapping(loaded.config.processor, tokenizer)
    return Completer(generator, tokenizer, chat, load_assistant(loaded, comm), comm)


def load_assistant(loaded: LoadedConfig, comm: Comm | None = None) -> Generator | None:
    """The small model of model.model_config.assistant, None where that is not set.

    It is a run file with its own load_checkpoint, or a Hugging Face folder. The ranks share it as they do the model.
    Raises UserError as for the model itself.
    """
    name = loaded.config.model.config.assistant
    if not name:
        return None
    try:
        if is_hf_folder(name):
            own = {"load_checkpoint": name, "adapter_id": None, "model.model_config.pet_config": None}
            small = load_config(loaded.path, list(own.items()))
        else:
            small = load_config(name)
        net, spec, _ = load_for_inference(small, need_tokenizer=False, start=False, comm=comm)
    except UserError as error:
        raise UserError(f"model.model_config.assistant {name}: {error}") from None
    from llm_core.infer.generate import Generator

    config = loaded.config.model.config
    return Generator(net, spec, eos_ids=end_ids(config), pad_id=config.pad_token_id)


def end_ids(model_config) -> list[int]:
    """eos_token_id as a list (a YAML may hold one id or several)."""
    ids = model_config.eos_token_id
    return list(ids) if isinstance(ids, list) else [ids]


def open_tokenizer(loaded: LoadedConfig) -> Tokenizer:
    """The tokenizer of processor.tokenizer; UserError if none is named or it cannot be read."""
    section = loaded.config.processor.tokenizer
    if not section.vocab_file:
        raise UserError(
            f"{loaded.path}: processor.tokenizer.vocab_file is not set: name the model's tokenizer.model or "
            "tokenizer.json with --processor.tokenizer.vocab_file"
        )
    return load_tokenizer(section.vocab_file, add_bos=section.add_bos_token, add_eos=section.add_eos_token)


def load_fitting_tokenizer(loaded: LoadedConfig, spec: DecoderSpec) -> Tokenizer:
    """The tokenizer of processor.tokenizer; UserError if there is none or the model lacks some of its ids.

    Which ids begin and end a text is said twice, by the tokenizer and by model_config; where they disagree one line
    warns (bos is the tokenizer's, the end is model_config's).
    """
    model_config = loaded.config.model.config
    tokenizer = open_tokenizer(loaded)
    if tokenizer.vocab_size > spec.vocab_size:
        raise UserError(
            f"{tokenizer.path}: the tokenizer has {tokenizer.vocab_size} tokens and the model only {spec.vocab_size} "
            "(model.model_config.vocab_size): take the tokenizer that the checkpoint was trained with"
        )
    ends = end_ids(model_config)
    if max(ends) >= spec.vocab_size:
        raise UserError(
            f"{loaded.path}: model.model_config.eos_token_id {max(ends)} is beyond the model's {spec.vocab_size} tokens"
        )
    if tokenizer.eos_id >= 0 and tokenizer.eos_id not in ends:
        console.warn(
            f"{tokenizer.path} ends a text with id {tokenizer.eos_id}, but model.model_config.eos_token_id is "
            f"{json.dumps(model_config.eos_token_id)}; answers end at the latter"
        )
    if tokenizer.add_bos and tokenizer.bos_id >= 0 and tokenizer.bos_id != model_config.bos_token_id:
        console.warn(
            f"{tokenizer.path} begins a text with id {tokenizer.bos_id}, but model.model_config.bos_token_id is "
            f"{model_config.bos_token_id}; prompts begin with the former"
        )
    return tokenizer
