"""The command line ``mage-fast``: one verb a recipe, options from the recipe's dataclass.

Exit codes: 0 done, 1 training cannot go on or a benchmark met wrong results, 2 wrong input (one line on
standard error), 130 stopped by Ctrl-C or SIGTERM with the state saved.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from mage_fast.errors import TrainingError
from mage_fast.kernels.dispatch import Unsupported
from mage_fast.recipes import (
    bench,
    convert,
    demo,
    edit,
    env,
    evaluate,
    fewshot,
    finetune,
    generate,
    pretrain,
    probe,
    reconstruct,
    tokenize,
    train_tokenizer,
    transfer,
    web,
)

VERBS: dict[str, tuple[type, Callable[[Any], dict]]] = {
    "demo": (demo.DemoConfig, demo.run),
    "train-tokenizer": (train_tokenizer.TrainTokenizerConfig, train_tokenizer.run),
    "tokenize": (tokenize.TokenizeConfig, tokenize.run),
    "pretrain": (pretrain.PretrainConfig, pretrain.run),
    "generate": (generate.GenerateConfig, generate.run),
    "edit": (edit.EditConfig, edit.run),
    "reconstruct": (reconstruct.ReconstructConfig, reconstruct.run),
    "evaluate": (evaluate.EvaluateConfig, evaluate.run),
    "probe": (probe.ProbeConfig, probe.run),
    "fewshot": (fewshot.FewshotConfig, fewshot.run),
    "transfer": (transfer.TransferConfig, transfer.run),
    "finetune": (finetune.FinetuneConfig, finetune.run),
    "web": (web.WebConfig, web.run),
    "convert": (convert.ConvertConfig, convert.run),
    "bench": (bench.BenchConfig, bench.run),
    "env": (env.EnvConfig, env.run),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code. The result goes to standard output as JSON."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    config = parse(arguments)
    run = next(run for kind, run in VERBS.values() if type(config) is kind)
    try:
        result = run(config)
    except TrainingError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("mage-fast: stopped; the same command goes on where it was saved", file=sys.stderr)
        return 130
    except (ValueError, OSError, Unsupported) as error:
        if sys.flags.dev_mode:  # python -X dev -m mage_fast.cli: for whoever debugs
            raise
        return _fail(error, 2)
    tells = result.keys() - {"stopped_by"}  # the first of several processes tells for all
    if tells and not isinstance(config, (env.EnvConfig, bench.BenchConfig)):  # these print tables
        print(json.dumps(result, indent=2))
    if result.get("stopped_by"):
        return 130
    return 1 if result.get("incorrect") else 0


def parse(arguments: Sequence[str] | None) -> Any:
    """The verb's configuration from command-line arguments; a wrong option exits with 2."""
    choices = [
        Annotated[kind, tyro.conf.subcommand(name, description=kind.__doc__)]
        for name, (kind, _) in VERBS.items()
    ]
    union: Any = choices[0]
    for choice in choices[1:]:
        union = union | choice
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(union, prog="mage-fast", args=arguments, description="MAGE with fused kernels.")
    except SystemExit:
        print(_refused(said.getvalue()), file=sys.stderr)
        raise


def _refused(text: str) -> str:
    """One line for a refused value, out of a box of wrapped lines; other messages as they are."""
    flat = " ".join(text.replace("│", " ").replace("|", " ").split())
    found = re.search(r"Error parsing (\S+): (.*?) [─-]{5}", flat)
    if found is None:
        choice = re.search(r"(invalid choice .*?) [─-]{5}", flat)
        return f"mage-fast: error: {choice[1]}" if choice else text
    option = f"{found[1]}: " if found[1].startswith("--") else ""  # else the place in a dataclass
    return f"mage-fast: error: {option}{found[2]}"


def _fail(error: Exception, code: int) -> int:
    print(f"mage-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
