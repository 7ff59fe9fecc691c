"""What MindFormers' run_mindformer.py does with a YAML (its wheel has no such script): CONFIG REGISTER_PATH."""

import os
import sys

from llm_core.runtime import prepare_environment

prepare_environment()  # threads, before MindSpore is imported
os.environ["REGISTER_PATH"] = sys.argv[2]

from mindformers.core.context import build_context  # noqa: E402
from mindformers.tools.register import MindFormerConfig  # noqa: E402
from mindformers.tools.register.template import ConfigTemplate  # noqa: E402
from mindformers.trainer import Trainer  # noqa: E402
from mindformers.utils.file_utils import set_output_path  # noqa: E402

config = MindFormerConfig(sys.argv[1])
ConfigTemplate.apply_template(config)
config = MindFormerConfig(**config)
set_output_path(config.output_dir)
build_context(config)
Trainer(config).train()
