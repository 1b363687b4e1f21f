"""`mechcausal detect`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mechcausal.cli.parsing import RefusedError, parse
from mechcausal.cli.tables import make_table, print_locations
from mechcausal.recipes import WandbMode
from mechcausal.support.messages import printable

if TYPE_CHECKING:
    from mechcausal.studies.detection import Detection


@dataclass
class Detect:
    """Which heads are induction heads, and what they do: scores, controls and interventions."""

    target: tyro.conf.Positional[str] = ""
    """A run folder; a folder of `save_model`; a folder with a Hugging Face model (safetensors); or
    the name of one, such as gpt2."""
    step: int | None = None
    """Checkpoint of a run folder; its final weights when absent."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hugging Face Hub, such as step1000; main when
    absent."""
    threshold: float = 0.4
    """Lowest score at which a head gets a verdict."""
    sequences: int = 32
    """Repeated sequences to score, plus as many control sequences without repetition."""
    repeat_lengths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="R [R ...]")] = ()
    """Lengths of the repeated block; about five that fit the context when absent."""
    ablate: bool = False
    """Mean-ablate each induction and previous-token head; report the rise of the second copy's
    loss."""
    compose: bool = False
    """Report which earlier heads the keys of the induction heads read (K-composition)."""
    circuit: bool = False
    """Patch paths from previous-token heads to the keys, queries and values of the induction heads:
    which ones the predictions rest on; also direct logit attribution and resample ablation."""
    stimulus: Annotated[
        tuple[Literal["random", "frequent", "text"], ...], tyro.conf.arg(metavar="KIND [KIND ...]")
    ] = ("random",)
    """What is repeated: random ids, the most frequent tokens of a text, or segments of the text.
    Several are scored beside each other; all else is measured on the first."""
    text: str | None = None
    """The text for --stimulus frequent and text: a file in UTF-8, topics (Python's help topics; the
    default) or stdlib."""
    function_vectors: bool = False
    """Which heads carry a few-shot task in their mean output (function vectors): tasks in words, or
    random mappings for a model without a tokenizer. Two passes for each head and task."""
    circuit_all: bool = False
    """As --circuit, from every earlier head: one more pass for each path."""
    all: bool = False
    """Show every head, not only the highest and those with a verdict."""
    json: bool = False
    """Print one JSON object."""
    csv: bool = False
    """Print comma-separated values."""
    heatmap: Path | None = None
    """Draw scores by layer and head to this PNG file."""
    wandb: bool = False
    """Log the results to W&B."""
    wandb_mode: WandbMode | None = None
    """W&B mode, with --wandb."""
    seed: int = 0
    """Seed of the random tokens."""
    device: str = "cpu"
    """Where to compute: cpu, cuda or cuda:N."""


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0, or 2 by way of `RefusedError`."""
    options = parse(Detect, arguments, command="detect")
    if not options.target:
        raise RefusedError("detect needs a target: a run, a model's folder, or a name such as gpt2")
    if options.json and options.csv:
        raise RefusedError("--json and --csv: only one of them can be printed")
    if options.wandb_mode is not None and not options.wandb:
        raise RefusedError("--wandb-mode goes with --wandb")
    if not options.stimulus:
        raise RefusedError("--stimulus needs at least one of random, frequent, text")
    if options.text is not None and set(options.stimulus) == {"random"}:
        raise RefusedError("--text goes with --stimulus frequent or text")
    if not 0 <= options.seed < 2**32:
        raise RefusedError(f"--seed is {options.seed}: it must be from 0 to {2**32 - 1}")
    if options.heatmap is not None:
        if options.heatmap.suffix != ".png":
            raise RefusedError(
                f"--heatmap is {options.heatmap}: a file that ends in .png is needed"
            )
        if not options.heatmap.parent.is_dir():
            raise RefusedError(f"--heatmap: {options.heatmap.parent} is no folder")
    from mechcausal.recipes import RecipeError
    from mechcausal.recipes.devices import device_named
    from mechcausal.records.wandb_runs import TrackingError, resolve_mode
    from mechcausal.studies.detection import detect, draw_heatmap, log_to_wandb
    from mechcausal.studies.targets import TargetError, load_target, running
    from mechcausal.support.corpora import TextError
    from probes import ProbeError

    try:
        mode = resolve_mode(options.wandb_mode) if options.wandb else "disabled"
        device = device_named(options.device)
        target = load_target(
            options.target, step=options.step, revision=options.revision, device=str(device)
        )
        with running(options.target):
            detection = detect(
                target,
                n_sequences=options.sequences,
                repeat_lengths=options.repeat_lengths or None,
                threshold=options.threshold,
                seed=options.seed,
                ablate=options.ablate,
                compose=options.compose,
                circuit=_circuit(options),
                stimuli=options.stimulus,
                text=options.text,
                few_shot=options.function_vectors,
            )
        if options.heatmap is not None:
            draw_heatmap(detection, options.heatmap)
    except (TargetError, RecipeError, TrackingError, TextError) as error:
        raise RefusedError(str(error)) from None
    except (ProbeError, ValueError) as error:
        raise RefusedError(f"{options.target}: {error}") from None
    except OSError as error:
        raise RefusedError(f"--heatmap: {options.heatmap}: {error.strerror or error}") from None
    warnings: list[str] = []
    wandb_location = log_to_wandb(detection, mode, warnings) if mode != "disabled" else None
    for warning in warnings:
        print(f"mechcausal: warning: {warning}", file=sys.stderr)
    if options.json:
        print(json.dumps(detection.to_dict(), indent=2, allow_nan=False))
    elif options.csv:
        print(detection.to_frame().to_csv(index=False), end="")
    else:
        _print_tables(detection, everything=options.all)
        print_locations({"heatmap": options.heatmap, "W&B": wandb_location})
    return 0


def _circuit(options: Detect) -> Literal["previous", "all"] | None:
    if options.circuit_all:
        return "all"
    return "previous" if options.circuit else None


def _print_tables(detection: "Detection", *, everything: bool) -> None:
    from rich.console import Console

    scores = detection.scores
    console = Console()
    rows = detection.to_dict()["heads"]
    listed = rows if everything else [r for i, r in enumerate(rows) if i < 5 or r["verdict"]]
    scored = ("prefix", "control", "previous", "dupl.", "control", "positional", "copying")
    table = make_table(
        ("head", *scored, "verdict"),
        title=f"{printable(detection.target.name)}: {len(rows)} heads, {scores.sequences} "
        f"sequences, threshold {scores.threshold:g}",
    )
    table.padding = (0, 0, 0, 0)  # so that the table fits into 80 characters
    for column in table.columns[:-1]:
        column.no_wrap = True
    table.columns[-1].justify, table.columns[-1].min_width = "left", 10
    for row in listed:
        table.add_row(
            f"{row['layer']}.{row['head']}",
            f"{_number(row['prefix_matching'])} ±{_number(row['prefix_matching_stderr'])}",
            _number(row["positional_control"]),
            _number(row["previous_token"]),
            _number(row["duplicate_token"]),
            _number(row["duplicate_control"]),
            _at_offset(row["positional"], row["positional_offset"]),
            _number(row["copying"]),
            ", ".join(row["verdict"]).replace("_", " "),
        )
    console.print(table)
    uniform = _number(rows[0]["uniform_baseline"])
    console.print(f"uniform attention scores {uniform} as prefix matching")
    if len(listed) < len(rows):
        console.print(f"{len(rows) - len(listed)} more heads without a verdict: --all shows them")
    if detection.in_context is not None:
        gain, stderr = (
            detection.in_context.in_context_gain,
            detection.in_context.in_context_gain_stderr,
        )
        console.print(f"in-context gain of the second copy: {gain:.3f} ± {stderr:.3f} nats a token")
    if detection.ablations is not None:
        _print_ablations(console, detection)
    if detection.composition is not None:
        _print_composition(console, detection)
    if detection.circuit is not None:
        _print_circuit(console, detection)
    if detection.others:
        _print_stimuli(console, detection)
    if detection.function_vectors is not None:
        _print_function_vectors(console, detection)


def _print_ablations(console: Any, detection: "Detection") -> None:
    effects: Sequence[Any] = detection.ablations or ()
    if not effects:
        console.print("ablation: no induction or previous-token head to ablate")
        return
    console.print(f"loss of the second copy with all heads: {effects[0].loss:.3f} nats a token")
    table = make_table(("without", "verdict", "rise (nats)", ""), n_left=4)
    for effect in effects:
        verdict = detection.scores.verdicts[effect.layer, effect.head]
        table.add_row(
            f"{effect.layer}.{effect.head}",
            ", ".join(verdict).replace("_", " "),
            f"{effect.rise:+.3f} ± {_number(effect.stderr)}",
            "removable without loss" if effect.removable else "",
        )
    console.print(table)


def _print_composition(console: Any, detection: "Detection") -> None:
    composition = detection.composition
    assert composition is not None
    if not composition.later:
        console.print("composition: no induction head whose keys could read an earlier one")
    for later in composition.later:
        partners = composition.partners(later, 3)
        circuit = ", ".join(
            f"{layer}.{head} ({score:+.3f}"
            + (", previous token)" if detection.is_previous_token((layer, head)) else ")")
            for (layer, head), score in partners
        )
        console.print(f"keys of induction head {later[0]}.{later[1]} read: {circuit or 'nothing'}")


def _print_circuit(console: Any, detection: "Detection") -> None:
    circuit = detection.circuit
    assert circuit is not None
    if not circuit.heads:
        console.print("circuit: no previous-token or induction head")
        return
    table = make_table(("head", "verdict", "direct logit", "resampled (nats)"), n_left=2)
    for effect in circuit.heads:
        if detection.scores.verdicts[effect.layer, effect.head]:
            verdict = detection.scores.verdicts[effect.layer, effect.head]
            table.add_row(
                f"{effect.layer}.{effect.head}",
                ", ".join(verdict).replace("_", " "),
                f"{effect.logit:+.3f} ± {_number(effect.logit_stderr)}",
                f"{effect.rise:+.3f} ± {_number(effect.rise_stderr)}",
            )
    console.print(table)
    console.print(
        f"paths: rise of the second copy's loss ({circuit.loss:.3f} nats a token), drop of prefix "
        "matching"
    )
    inputs = {"k": "keys", "q": "queries", "v": "values"}
    for path in circuit.named:
        (layer, head), (later, receiver) = path.sender, path.receiver
        kind = "previous token " if detection.is_previous_token(path.sender) else ""
        console.print(
            f"{kind}{layer}.{head} → {inputs[path.input]} of induction {later}.{receiver}: "
            f"{path.rise:+.3f} ± {_number(path.rise_stderr)} nats, "
            f"{path.attention_drop:+.3f} ± {_number(path.attention_drop_stderr)}"
        )
    others = [path for path in circuit.paths if not path.named]
    rule = f"{circuit.standard_errors:g} standard errors and {circuit.negligible:g} nats"
    largest = max((path.rise for path in others), default=None)
    console.print(
        f"{len(others)} of {len(circuit.paths)} paths do not exceed {rule}"
        + ("" if largest is None else f"; the largest of them: {largest:+.3f}")
    )


def _print_stimuli(console: Any, detection: "Detection") -> None:
    by_name = {detection.stimulus: detection.scores, **detection.others}
    table = make_table(("head", *by_name), title="prefix matching by stimulus, * induction")
    best = [head for scores in by_name.values() for head in scores.top("prefix_matching", 3)]
    named = [head for scores in by_name.values() for head in scores.heads("induction")]
    for layer, head in dict.fromkeys([*named, *best]):
        cells = []
        for scores in by_name.values():
            index = scores.layers.index(layer), head
            value, stderr = scores.prefix_matching[index], scores.prefix_matching_stderr[index]
            mark = "*" if "induction" in scores.verdicts[layer, head] else " "
            cells.append(f"{_number(value.item())} ±{_number(stderr.item())} {mark}")
        table.add_row(f"{layer}.{head}", *cells)
    console.print(table)


def _print_function_vectors(console: Any, detection: "Detection") -> None:
    vectors = detection.function_vectors
    assert vectors is not None
    table = make_table(
        ("head", "effect", "own task", "other task", ""),
        title=f"mean outputs on {len(vectors.tasks)} few-shot tasks, rise of p(answer)",
    )
    for head in dict.fromkeys([*vectors.heads(), *vectors.top(3)]):
        row = vectors.row(head)
        table.add_row(
            f"{head[0]}.{head[1]}",
            f"{row['effect']:+.3f} ± {_number(row['stderr'])}",
            f"{row['own']:+.3f}",
            f"{row['other']:+.3f}",
            "function vector" if row["named"] else "",
        )
    console.print(table)
    console.print(f"tasks: {', '.join(vectors.tasks)}")
    for name, reason in detection.left_out.items():
        console.print(f"task {name} is left out: {reason}")
    console.print(
        f"p(answer) after {vectors.n_shots} demonstrations: {vectors.right:.3f}, with their "
        f"answers shuffled: {vectors.shuffled:.3f}"
    )
    if not vectors.does_tasks:
        console.print("the model does not do these tasks: the effects say nothing about it")


def _at_offset(score: float | None, offset: int) -> str:
    return _number(score) if score is None else f"{_number(score)} at {offset}"


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"
