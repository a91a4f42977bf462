"""The command line: one verb a subcommand, errors in one line, exit codes that mean something.

Imports of verbs happen after the arguments are read: `--help` and mistakes answer at once.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sft_dist.errors import ExitCode, Interrupted, UserError, exit_code_of, say
from sft_dist.redaction import RedactedStream, find_secrets
from sft_dist.signals import ignore_signals, unwind_on_signals

if TYPE_CHECKING:
    from sft_dist.config import RunConfig

_OVERRIDE = re.compile(r"\w+(\.\w+)*=")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and leave with its exit code."""
    options = _parse(arguments)
    secrets = find_secrets(os.environ)
    # Whoever prints after this, a library or a traceback, prints no secret.
    sys.stdout, sys.stderr = RedactedStream(sys.stdout, secrets), RedactedStream(sys.stderr, secrets)
    unwind_on_signals()
    try:
        try:
            code = _dispatch(options)
        finally:
            ignore_signals()  # within the outer try: until this has been called a signal still raises
    except (Exception, Interrupted, KeyboardInterrupt) as error:
        _tell(error)
        _leave(141 if isinstance(error, BrokenPipeError) else exit_code_of(error))
    _leave(code)


def _tell(error: BaseException) -> None:
    match error:
        case UserError() | Interrupted():
            rank = os.environ.get("RANK", "0")
            prefix = "" if rank == "0" else f"[rank {rank}] "
            say(f"{prefix}{type(error).__name__}: {error}")
        case KeyboardInterrupt():
            say("interrupted")
        case BrokenPipeError():
            pass
        case _:
            import traceback

            traceback.print_exception(error)


def _leave(code: int) -> NoReturn:
    """Leave without the interpreter's shutdown.

    After an error, process groups would wait there for other ranks; after a success, their threads have been seen to
    abort a rank whose peer had already gone.
    """
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(int(code))


def _dispatch(options: argparse.Namespace) -> ExitCode:
    match options.verb:
        case "prepare":
            from sft_dist import preparation

            return preparation.run(_config(options), os.environ)
        case "inspect":
            from sft_dist import inspection

            return inspection.run(_language_model(options), conversation_id=options.id, num=options.num)
        case "train":
            config = _config(options)
            from sft_dist import training

            return training.run(config, os.environ, with_profile=options.profile)
        case "estimate":
            config = _language_model(options)
            from sft_dist import estimate

            return estimate.run(
                config, num_gpus=options.gpus, gpu_memory_gib=options.gpu_memory, device_name=options.device
            )
        case "verify":
            config = _language_model(options)
            from sft_dist import verify

            return verify.run(config, os.environ, num=options.num)
        case "check":
            config = _config(options)
            from sft_dist import checking

            return checking.run(config, os.environ)
        case "score":
            config = _language_model(options)
            from sft_dist.score import verb as score

            return score.run(
                config,
                os.environ,
                names=options.model,
                checkpoint=options.checkpoint,
                sources=options.data,
                output=Path(options.output),
                roles=options.roles,
                with_tokens=options.tokens,
                block_items=options.block_items or score.BLOCK_ITEMS,
            )
        case "evaluate":
            config = _language_model(options)
            from sft_dist import evaluation

            return evaluation.run(
                config,
                os.environ,
                coefficients=options.interpolate,
                which=options.checkpoint,
                output=Path(options.output) if options.output else None,
            )
        case "export":
            from sft_dist import export

            return export.run(
                Path(options.run_dir),
                Path(options.output),
                which=options.checkpoint,
                dtype=options.dtype,
                coefficient=options.interpolate,
                merge=options.merge,
            )
        case "predict":
            from sft_dist import prediction

            return prediction.run(
                Path(options.run),
                Path(options.file),
                Path(options.output),
                os.environ,
                which=options.checkpoint,
            )
        case "generate":
            from sft_dist import generation

            return generation.run(
                options.model,
                prompt=options.prompt,
                system=options.system,
                checkpoint=options.checkpoint,
                max_new_tokens=options.max_new_tokens,
            )
        case "config":
            return _print_config(options)
        case other:
            raise AssertionError(other)


def _config(options: argparse.Namespace) -> "RunConfig":
    from sft_dist.config import load_config

    return load_config(options.run_file, options.overrides)


def _language_model(options: argparse.Namespace) -> "RunConfig":
    """A run file for verbs that know nothing of prediction heads; some pass over one beside the language model's."""
    config = _config(options)
    beside = ("inspect", "score", "evaluate")
    if config.head.kind != "none" and not (config.head.is_beside and options.verb in beside):
        from sft_dist.errors import UsageError

        verbs = ("prepare", "check", "train", "predict", *(beside if config.head.is_beside else ()))
        raise UsageError(
            f"{options.verb}: not known for a prediction head (head.kind: {config.head.kind}); the verbs for heads "
            f"like this one are {', '.join(verbs)} and export"
        )
    return config


def _print_config(options: argparse.Namespace) -> ExitCode:
    from sft_dist import config as configs

    if options.explain:
        for key, default, meaning in configs.explain():
            fixed = "" if configs.may_change(key.partition("[]")[0]) else "; fixed when resuming"
            print(f"{key} (default {default}{fixed})\n    {meaning}")
        return ExitCode.DONE
    if options.run_file is None:
        from sft_dist.errors import UsageError

        raise UsageError("config: name a run file, or ask for --explain")
    config = _config(options)
    if options.json:
        print(configs.to_json(config))
    else:
        print(configs.to_yaml(config), end="")
    return ExitCode.DONE


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with overrides from anywhere on the line: argparse takes those before the first option only."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [text for text in rest if _OVERRIDE.match(text)] if "overrides" in options else []
    if unknown := [text for text in rest if text not in overrides]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if overrides:
        options.overrides += overrides
    return options


def verb_names() -> list[str]:
    """All verbs, in the order of the help."""
    (verbs,) = (action for action in _parser()._actions if action.dest == "verb")
    return list(verbs.choices or ())


def _parser() -> argparse.ArgumentParser:
    from sft_dist import __version__

    parser = argparse.ArgumentParser(
        prog="sft-dist", description="Distributed supervised fine-tuning of large language models."
    )
    parser.add_argument("--version", action="version", version=__version__)
    # The deepspeed command puts it before the verb; the rank comes from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    _run_file_verb(verbs, "prepare", "render, verify and store the data; print what was refused and why")
    inspect = _run_file_verb(verbs, "inspect", "show conversations with trained tokens marked, and statistics")
    inspect.add_argument("--id", help="show the conversation with this id")
    inspect.add_argument("--num", type=_positive, default=2, help="how many conversations to show (default 2)")
    train = _run_file_verb(verbs, "train", "train; resumes by itself when the run folder has a checkpoint")
    train.add_argument("--profile", action="store_true", help="write a trace of a few steps to RUN_DIR/profile")
    estimate = _run_file_verb(verbs, "estimate", "memory, steps, time and disk of a run, without GPU or weights")
    estimate.add_argument("--gpus", type=_positive, metavar="N", help="GPUs, or CPU ranks (default: those here, or 1)")
    estimate.add_argument("--gpu-memory", type=_positive, metavar="GIB", help="of one GPU (default: by its name)")
    estimate.add_argument("--device", metavar="NAME", help="H200, A100, CPU ... (default: what this machine has)")
    verify = _run_file_verb(verbs, "verify", "check rendering, packing, turns and layout on this model and data")
    verify.add_argument("--num", type=_positive, default=8, help="how many conversations to take (default 8)")
    _run_file_verb(verbs, "check", "look whether every host is ready for the run (sft-launch check starts it on all)")
    score = _run_file_verb(verbs, "score", "log-probability of every answer, as JSON Lines in input order; resumable")
    score.add_argument(
        "--model",
        action="append",
        default=[],
        help="model folder, Hub id or run folder (default: model.path); several times to compare several models",
    )
    score.add_argument(
        "--data",
        nargs="+",
        default=[],
        help="files or Hub ids (default: data.heldout): conversations, or prompts with candidates",
    )
    score.add_argument("--output", required=True, help="JSON Lines file to write; appears when all is scored")
    score.add_argument("--tokens", action="store_true", help="also ids, texts and log-probabilities of single tokens")
    score.add_argument(
        "--roles",
        type=lambda text: text.split(","),
        default=[],
        metavar="ROLE,...",
        help="whose messages to score: system, developer, user, assistant, tool, text (default: assistant,text)",
    )
    score.add_argument("--block-items", type=_positive, help=argparse.SUPPRESS)
    _checkpoint_option(score)
    evaluate = _run_file_verb(verbs, "evaluate", "held-out and retention NLL of a checkpoint, or of points before it")
    evaluate.add_argument(
        "--interpolate",
        type=lambda text: [_coefficient(part) for part in text.split(",")],
        default=[1.0],
        metavar="A,...",
        help="coefficients of the tuned weights: 0 is the pre-trained model, 1 the tuned one (default 1)",
    )
    evaluate.add_argument("--output", help="JSON file to write (default: evaluation.json in the run folder)")
    _checkpoint_option(evaluate)
    export = verbs.add_parser("export", help="write a checkpoint as safetensors that plain transformers loads")
    export.add_argument("run_dir", metavar="RUN_DIR")
    export.add_argument("--output", required=True, help="folder to write")
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: the precision of training"
    )
    export.add_argument(
        "--interpolate",
        type=_coefficient,
        default=1.0,
        metavar="A",
        help="pre-trained weights + A (tuned - pre-trained): 0 is the pre-trained model, 1 the tuned one (default 1)",
    )
    export.add_argument("--merge", action="store_true", help="of adapters: write the whole model, them merged in")
    _checkpoint_option(export)
    predict = verbs.add_parser("predict", help="labels and probabilities of a file's records, as JSON Lines in order")
    predict.add_argument("run", metavar="RUN", help="run folder or run file of a training with a head")
    predict.add_argument("file", metavar="FILE", help="records with text, text and text_pair, or messages")
    predict.add_argument("-o", "--output", required=True, help="JSON Lines file to write; appears when all is done")
    _checkpoint_option(predict)
    generate = verbs.add_parser("generate", help="answer a prompt")
    generate.add_argument("--model", required=True, help="model folder, Hub id or run folder")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--system", help="system message")
    generate.add_argument("--max-new-tokens", type=_positive, default=128)
    _checkpoint_option(generate)
    config = verbs.add_parser("config", help="print the resolved run file, or explain every key")
    config.add_argument("run_file", nargs="?", metavar="RUN_YAML")
    config.add_argument("overrides", nargs="*", metavar="key=value")
    config.add_argument("--json", action="store_true")
    config.add_argument("--explain", action="store_true")
    return parser


def _run_file_verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text)
    verb.add_argument("run_file", metavar="RUN_YAML")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the run file")
    return verb


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {value}")
    return value


def _coefficient(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(
            f"expected a share from 0 (the pre-trained weights) to 1 (the tuned ones), got {text}; what lies beyond "
            "them is no average of the two"
        )
    return value


def _checkpoint_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--checkpoint", default="best-or-last", help="of a run folder: best, last or a step (default: best, else last)"
    )
