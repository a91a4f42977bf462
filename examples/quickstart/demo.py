"""The main job from end to end, on a small real model: all GPUs there are, else two CPU ranks.

Every step is a command that is printed before it runs, so that each can be run by hand; this file only runs them,
reads what they wrote and prints a table. Everything it writes lies in one folder (demo/). Standard library only.
"""

import argparse
import json
import os
import selectors
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent.relative_to(ROOT)
# Not resolved: in a virtual environment the interpreter is a link, and the commands lie beside the link.
BIN = Path(sys.executable).parent
RUN_FILE = HERE / "run.yaml"
STOPPED_WITH_CHECKPOINT = 75
SILENCE_S = 10  # after so long without output say that the command still runs


@dataclass(frozen=True)
class Plan:
    """What one demo does. `overrides` are added to the run file in every command that takes it."""

    folder: Path
    model: str | None
    train: str | None
    heldout: str | None
    prompt: str
    stop_at_step: int
    overrides: tuple[str, ...]

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def export_dir(self) -> Path:
        return self.folder / "export"

    @property
    def has_own_data(self) -> bool:
        return self.train is not None or self.heldout is not None

    def scores(self, when: str) -> Path:
        return self.folder / "scores" / f"{when}.jsonl"


class Demo:
    """Runs commands one after the other, with live output and a log."""

    def __init__(self, log: Path, *, num_steps: int) -> None:
        self.start = time.monotonic()
        self.log = log.open("wb")
        self.num_steps = num_steps
        self.step = 0

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self.log.write(f"{text}\n".encode())
        self.log.flush()

    def title(self, text: str) -> None:
        self.step += 1
        self.say(f"\n=== {self.step}/{self.num_steps}  {text}  [{clock(time.monotonic() - self.start)}]")

    def run(self, command: Sequence[str], *, expect: Sequence[int] = (0,)) -> tuple[int, str]:
        """Run a command with its output shown as it comes; (exit code, standard output). Ends the demo on others."""
        start = time.monotonic()
        self.say(f"$ {shlex.join(command)}")
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            output = self._follow(process, start)
            code = process.wait()
        except KeyboardInterrupt:
            # The terminal sent the signal to the child too, which may be writing a checkpoint: let it finish.
            process.wait()
            raise
        self.say(f"    took {time.monotonic() - start:.0f} s" + (f", exit code {code}" if code else ""))
        if code not in expect:
            wanted = " or ".join(map(str, expect))
            self.say(f"demo: the command above ended with exit code {code}, expected {wanted}. Log: {self.log.name}")
            raise SystemExit(code if 0 < code < 256 else 1)
        return code, output

    def _follow(self, process: subprocess.Popen[bytes], start: float) -> str:
        assert process.stdout is not None and process.stderr is not None
        kept = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ, kept)
            selector.register(process.stderr, selectors.EVENT_READ)
            while selector.get_map():
                events = selector.select(timeout=SILENCE_S)
                if not events:
                    self.say(f"    ... {time.monotonic() - start:.0f} s")
                for key, _ in events:
                    self._pass_on(key, selector)
        return kept.decode("utf-8", errors="replace")

    def _pass_on(self, key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
        stream: IO[bytes] = key.fileobj  # type: ignore[assignment]
        chunk = os.read(stream.fileno(), 65536)
        if not chunk:
            selector.unregister(stream)
            return
        if key.data is not None:
            key.data.extend(chunk)
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
        self.log.write(chunk)
        self.log.flush()


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def command(name: str) -> str:
    path = BIN / name
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def python_script(name: str) -> list[str]:
    return [command("python"), str(HERE / name)]


def count_gpus() -> int:
    """GPUs that PyTorch sees; asked in another process, which gives their memory back."""
    code = "import torch; print(torch.cuda.device_count())"
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(result.stdout)


def set_environment(plan: Plan) -> None:
    # The commands find each other, ninja and the kernels they compiled, as they do under `make`.
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(BIN.parent / "torch_extensions"))
    os.environ["PYTHONUNBUFFERED"] = "1"
    if plan.model is None and not plan.has_own_data:
        os.environ["HF_HUB_OFFLINE"] = "1"  # all is here: a machine without network should not wait for one


def make_plan(args: argparse.Namespace) -> Plan:
    folder = Path("demo/short" if args.short else "demo")
    overrides = []
    if args.short:
        overrides += ["schedule.max_steps=4", "evaluate.every=2", "batch.global_packs=2", f"run_dir={folder / 'run'}"]
        overrides += ["data.heldout=demo/data/heldout_short.jsonl"] if args.heldout is None else []
    overrides += [
        f"{key}={value}"
        for key, value in (("model.path", args.model), ("data.train", args.train), ("data.heldout", args.heldout))
        if value is not None
    ]
    return Plan(
        folder=folder,
        model=args.model,
        train=args.train,
        heldout=args.heldout,
        prompt=args.prompt,
        stop_at_step=2 if args.short else 6,
        overrides=tuple(overrides),
    )


def get_inputs(demo: Demo, plan: Plan) -> str:
    """Make what the user did not bring; returns the model's folder or Hub id."""
    demo.title("the model: SmolLM2-135M-Instruct" if plan.model is None else f"the model: {plan.model}")
    if plan.model is None:
        demo.run([*python_script("get_model.py"), "--output", "demo/model"])
    demo.title("the conversations")
    if plan.train is None or plan.heldout is None:
        demo.run([*python_script("get_conversations.py"), "--output", "demo/data"])
    return plan.model or "demo/model"


def score(demo: Demo, plan: Plan, *, nproc: int, model: str, when: str) -> None:
    line = [command("sft-launch"), "run", str(RUN_FILE), *plan.overrides, "--verb", "score", "--via", "local"]
    demo.run([*line, "--nproc", str(nproc), "--", "--model", model, "--output", str(plan.scores(when))])


def generate(demo: Demo, plan: Plan, model: str) -> str:
    line = [command("sft-dist"), "generate", "--model", model, "--prompt", plan.prompt, "--max-new-tokens", "40"]
    return demo.run(line)[1].strip()


def train(demo: Demo, plan: Plan, nproc: int) -> None:
    line = [command("sft-launch"), "run", str(RUN_FILE), *plan.overrides]
    ranks = ["--via", "deepspeed", "--nproc", str(nproc)]
    demo.title(f"train with ZeRO-3 on {nproc} ranks, and stop after step {plan.stop_at_step}")
    # Data of the user's own may end before that step.
    expect = (STOPPED_WITH_CHECKPOINT, 0) if plan.has_own_data else (STOPPED_WITH_CHECKPOINT,)
    code, _ = demo.run([*line, f"checkpoint.stop_at_step={plan.stop_at_step}", *ranks], expect=expect)
    if code == STOPPED_WITH_CHECKPOINT:
        demo.say(f"    stopped as asked ({code}: checkpoint written, please start me again)")
    demo.title("resume from the sharded checkpoint, and train to the end")
    demo.run([*line, *ranks])


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def read_turns(path: Path) -> dict[tuple[str, int], tuple[float, int]]:
    """(conversation, turn) -> (log-probability in nats, tokens), as `score` wrote them."""
    turns = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for turn in row["turns"]:
            turns[f"{row['index']}:{row['id']}", turn["turn"]] = (turn["logprob"], turn["num_tokens"])
    return turns


def nll_per_token(turns: Sequence[tuple[float, int]]) -> float:
    return -sum(logprob for logprob, _ in turns) / max(1, sum(tokens for _, tokens in turns))


def score_table(before_file: Path, after_file: Path) -> Iterator[str]:
    before, after = read_turns(before_file), read_turns(after_file)
    if before.keys() != after.keys():
        raise SystemExit(f"{before_file} and {after_file} do not hold the same turns")
    groups = [("all turns", list(before))]
    groups += [(f"turn {n}", [key for key in before if key[1] == n]) for n in (1, 2)]
    groups += [("turn 3 and later", [key for key in before if key[1] > 2])]
    yield f"  {'held-out, nats per token':<26}{'turns':>7}{'tokens':>8}{'before':>9}{'after':>9}"
    for name, keys in groups:
        if keys:
            tokens = sum(before[key][1] for key in keys)
            old, new = (nll_per_token([side[key] for key in keys]) for side in (before, after))
            yield f"  {name:<26}{len(keys):>7,}{tokens:>8,}{old:>9.3f}{new:>9.3f}"
    better = sum(after[key][0] > before[key][0] for key in before)
    yield f"  more probable after than before: {better:,} of {len(before):,} turns"


def number(value: Any, form: str = ",.0f") -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def summary_table(summary: dict[str, Any]) -> Iterator[str]:
    def item(key: str, form: str = ",.0f") -> str:
        return number(summary.get(key), form)

    yield f"  {item('conversations')} conversations, {item('tokens')} tokens, {item('target_tokens')} of them targets"
    yield f"  {item('packs')} packs, {item('fill', '.1%')} full; {item('steps')} steps, {item('tokens_per_s')} tokens/s"
    yield f"  training loss   first step {item('first_loss', '.3f')}, last step {item('last_loss', '.3f')}"
    yield (
        f"  held-out NLL    before {item('heldout_nll_before', '.3f')}, after {item('heldout_nll_after', '.3f')}"
        "   (as training itself measured it)"
    )


def report(demo: Demo, plan: Plan, *, nproc: int, num_gpus: int, answers: tuple[str, str]) -> None:
    demo.title("what happened")
    elapsed = clock(time.monotonic() - demo.start)
    demo.say(f"  {nproc} {'GPU' if num_gpus else 'CPU'} rank(s), {elapsed} minutes:seconds in all")
    for line in summary_table(read_json(plan.run_dir / "summary.json")):
        demo.say(line)
    demo.say()
    for line in score_table(plan.scores("before"), plan.scores("after")):
        demo.say(line)
    demo.say(f"\n  asked     {plan.prompt}")
    for when, answer in zip(("before", "after"), answers, strict=True):
        demo.say(f"  {when:<10}" + answer.replace("\n", "\n" + " " * 12))
    demo.say("\n  where everything lies")
    places = {
        "prepared data sets": Path("demo/prepared"),
        "the run": plan.run_dir,
        "  checkpoints": plan.run_dir / "checkpoints",
        "  metrics": plan.run_dir / "metrics.jsonl",
        "  TensorBoard": plan.run_dir / "tensorboard",
        "tuned model": plan.export_dir,
        "scores per turn": plan.scores("before").parent,
        "log of this demo": plan.folder / "log.txt",
    }
    for name, place in places.items():
        demo.say(f"  {name:<20}{place}")
    if not plan.has_own_data and plan.model is None:
        demo.say("\n  So small a run shows that the parts work together, not that the answers are good:")
        demo.say(f"  see {HERE / 'README.md'}.")


def remove_previous(plan: Plan) -> None:
    for path in (plan.run_dir, plan.export_dir, plan.folder / "scores"):
        if path.exists():
            print(f"removing {path} of the previous demo")
            shutil.rmtree(path)


def shorten_heldout(plan: Plan) -> None:
    """Eight held-out conversations of one turn and four of several: enough for a check that scoring works."""
    lines = Path("demo/data/heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    several = [line for line in lines if len(json.loads(line)["messages"]) > 2]
    one = [line for line in lines if line not in several]
    Path("demo/data/heldout_short.jsonl").write_text("".join(one[:8] + several[-4:]), encoding="utf-8")


def run_demo(demo: Demo, plan: Plan, *, is_short: bool, nproc: int, num_gpus: int) -> None:
    model = get_inputs(demo, plan)
    if is_short and plan.heldout is None:
        shorten_heldout(plan)
    demo.title("prepare: conversations -> tokens and verified spans, stored once")
    demo.run([command("sft-dist"), "prepare", str(RUN_FILE), *plan.overrides])
    demo.title("inspect: what is trained and what is not")
    demo.run([command("sft-dist"), "inspect", str(RUN_FILE), *plan.overrides, "--num", "2"])
    demo.title("score the held-out conversations before, per turn")
    score(demo, plan, nproc=nproc, model=model, when="before")
    demo.title("the model's answer before")
    before = generate(demo, plan, model)
    train(demo, plan, nproc)
    demo.title("export the best checkpoint as a model folder")
    line = [command("sft-dist"), "export", str(plan.run_dir), "--output", str(plan.export_dir)]
    demo.run([*line, "--checkpoint", "best"])
    demo.title("score the held-out conversations after, per turn")
    score(demo, plan, nproc=nproc, model=str(plan.export_dir), when="after")
    demo.title("the model's answer after")
    after = generate(demo, plan, str(plan.export_dir))
    report(demo, plan, nproc=nproc, num_gpus=num_gpus, answers=(before, after))


def path_or_id(value: str) -> str:
    """A path is made absolute, since the demo runs in the repository's root; what is no path is a Hub id."""
    return str(Path(value).resolve()) if Path(value).exists() else value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few steps on two packs, for CI")
    parser.add_argument("--model", type=path_or_id, help="folder or Hub id in place of SmolLM2-135M-Instruct")
    parser.add_argument("--train", type=path_or_id, help="your training conversations (file or Hub id)")
    parser.add_argument("--heldout", type=path_or_id, help="your held-out conversations (file or Hub id)")
    parser.add_argument("--prompt", default="What is the loudest animal on Earth?", help="what to ask before and after")
    parser.add_argument("--nproc", type=int, help="ranks (default: all GPUs there are, else 2)")
    args = parser.parse_args()
    if (args.train is None) != (args.heldout is None):
        parser.error("--train and --heldout go together: the demo's held-out conversations say nothing about others")
    return args


def main() -> int:
    args = parse_args()
    os.chdir(ROOT)
    plan = make_plan(args)
    set_environment(plan)
    plan.folder.mkdir(parents=True, exist_ok=True)
    remove_previous(plan)
    plan.scores("before").parent.mkdir()
    num_gpus = count_gpus()
    nproc = args.nproc or num_gpus or 2
    demo = Demo(plan.folder / "log.txt", num_steps=12)
    demo.say(f"{num_gpus} GPU(s) seen, so {nproc} ranks" if num_gpus else f"no GPU seen: {nproc} ranks on the CPU")
    try:
        run_demo(demo, plan, is_short=args.short, nproc=nproc, num_gpus=num_gpus)
    except KeyboardInterrupt:
        demo.say("\ndemo: interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
