"""The command line: the same words as in Python.

Everything is checked before a model is loaded or a file written. Bad input is one line on stderr
and exit code 2.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

from .errors import TvInterpError


def heads(
    model: str = "reference",
    task: str = "country-capital",
    n_demos: int = 8,
    n_prompts: int = 64,
    seed: int = 0,
    corruptions: list[str] | None = None,
    template: str | None = None,
    metric: str = "logit_diff",
    fdr: float = 0.05,
    min_recovered: float = 0.02,
    backend: Literal["auto", "hooked", "bridge"] = "auto",
    out: str | None = None,
    json: bool = False,
) -> None:
    r"""Find the heads that write at the answers and the heads that read them at "is".

    Args:
        model: "reference", a local directory in Hugging Face format, or a hub name.
        task: Name of a task, see `tv-interp tasks`, or a CSV file with the columns x and y.
        n_demos: Demonstrations in each prompt.
        n_prompts: Prompts in each of the two splits: one chooses heads, the other reports them.
        seed: Decides prompts, splits and resamples.
        corruptions: At least two of task, random_answers, labels, answers, inputs, query; by
            default those of the task's family.
        template: Text with {x} and {y}; by default the model's own, else "{x} is {y}\n".
        metric: logit_diff, prob, log_prob, kl, accuracy, choice, label_rate or rank.
        fdr: False discovery rate.
        min_recovered: Least share of the total that counts.
        backend: TransformerLens class.
        out: Directory for heads.json, scores.nc and report.html.
        json: Print JSON instead of a table.
    """
    from .analysis.find import find_heads
    from .prompts.corruptions import default_corruptions
    from .scores import get_metric

    chosen = _checked_task(task, template, n_demos, n_prompts, seed)
    get_metric(metric)
    _check_corruptions(chosen, corruptions or default_corruptions(chosen))
    if not 0 < fdr < 1:
        raise TvInterpError(f"expected fdr between 0 and 1, got {fdr}")
    loaded, directory = _load(model, backend, out)
    found = find_heads(
        loaded,
        chosen,
        n_demos=n_demos,
        n_prompts=n_prompts,
        seed=seed,
        corruptions=corruptions,
        template=template,
        metric=metric,
        fdr=fdr,
        min_recovered=min_recovered,
        progress=sys.stderr.isatty(),
    )
    print(_dumps(found.to_dict()) if json else found)
    if directory is not None:
        from .show.report import write_report

        found.save(directory)
        write_report(directory / "report.html", found, command=_command())
        _say_written(directory, ("heads.json", "scores.nc", "report.html"), json)


def vectors(
    model: str = "reference",
    task: str = "country-capital",
    n_demos: int = 8,
    n_prompts: int = 200,
    seed: int = 0,
    template: str | None = None,
    backend: Literal["auto", "hooked", "bridge"] = "auto",
    out: str | None = None,
    json: bool = False,
) -> None:
    r"""Compare local vectors at the answers with global ones at "is", layer by layer.

    Args:
        model: "reference", a local directory in Hugging Face format, or a hub name.
        task: Name of a task, see `tv-interp tasks`, or a CSV file with the columns x and y.
        n_demos: Demonstrations in each prompt.
        n_prompts: Prompts in each of the two halves: one chooses layers, the other reports them.
        seed: Decides prompts, halves, donors and noise.
        template: Text with {x} and {y}; by default the model's own, else "{x} is {y}\n".
        backend: TransformerLens class.
        out: Directory for vectors.json, scores.nc and report.html.
        json: Print JSON instead of a table.
    """
    from .analysis.comparison import compare_vectors

    chosen = _checked_task(task, template, n_demos, n_prompts, seed)
    loaded, directory = _load(model, backend, out)
    report = compare_vectors(
        loaded,
        chosen,
        n_demos=n_demos,
        n_prompts=n_prompts,
        seed=seed,
        template=template,
        progress=sys.stderr.isatty(),
    )
    print(_dumps(report.to_dict()) if json else report)
    if directory is not None:
        from .show.report import write_vector_page

        report.save(directory)
        write_vector_page(directory / "report.html", report, command=_command())
        _say_written(directory, ("vectors.json", "scores.nc", "report.html"), json)


def circuit(
    model: str = "reference",
    task: str = "country-capital",
    n_demos: int = 8,
    n_prompts: int = 64,
    seed: int = 0,
    corruption: str | None = None,
    template: str | None = None,
    method: Literal["exact", "eap", "eap-ig", "eap-ig-activations", "acdc", "nodes"] = "eap-ig",
    n_edges: int | None = None,
    threshold: float | None = None,
    direction: Literal["denoise", "noise"] = "noise",
    metric: str = "logit_diff",
    ablation: Literal["corrupted", "mean", "zero"] = "corrupted",
    cache: str | None = None,
    backend: Literal["auto", "hooked", "bridge"] = "auto",
    out: str | None = None,
    json: bool = False,
) -> None:
    r"""Find the edges between heads, MLPs and roles that carry a task, and test them by ablation.

    Args:
        model: "reference", a local directory in Hugging Face format, or a hub name.
        task: Name of a task, see `tv-interp tasks`, or a CSV file with the columns x and y.
        n_demos: Demonstrations in each prompt.
        n_prompts: Prompts in each of the two halves: one chooses edges, the other reports them.
        seed: Decides prompts, halves, random circuits and resamples.
        corruption: task, random_answers, labels, answers, inputs or query; by default the first
            that fits the task's family.
        template: Text with {x} and {y}; by default the model's own, else "{x} is {y}\n".
        method: How edges are scored: patched one by one (exact), attributed (eap), or taken away
            one after the other (acdc; nodes takes away whole nodes), which needs a threshold.
        n_edges: Number of edges; by default the smallest of a few sizes that is faithful on the
            first half.
        threshold: Least absolute score instead, in the unit of the metric.
        direction: Whether scores say what suffices (denoise) or what is needed (noise).
        metric: logit_diff, prob, log_prob or kl; with method exact also accuracy, choice,
            label_rate or rank.
        ablation: What edges outside of the circuit carry.
        cache: Directory for finished pieces of method exact, so that a killed run goes on.
        backend: TransformerLens class.
        out: Directory for circuit.json, report.json and report.html.
        json: Print JSON instead of a table.
    """
    from .analysis.circuits import check_pruning
    from .analysis.discovery import find_circuit
    from .analysis.pruning import PRUNINGS
    from .prompts.corruptions import default_corruptions
    from .scores import get_metric

    chosen = _checked_task(task, template, n_demos, n_prompts, seed)
    get_metric(metric)
    _check_corruptions(chosen, [corruption or default_corruptions(chosen)[0]])
    if n_edges is not None and n_edges < 1:
        raise TvInterpError(f"expected n_edges of 1 or more, got {n_edges}")
    if method in PRUNINGS:
        check_pruning(method, n_edges, threshold, direction)
    loaded, directory = _load(model, backend, out)
    report = find_circuit(
        loaded,
        chosen,
        n_demos=n_demos,
        n_prompts=n_prompts,
        seed=seed,
        corruption=corruption,
        template=template,
        method=method,
        n_edges=n_edges,
        threshold=threshold,
        direction=direction,
        metric=metric,
        ablation=ablation,
        cache=cache,
        progress=sys.stderr.isatty(),
    )
    print(_dumps(report.to_dict()) if json else report)
    if directory is not None:
        from .show.report import write_report

        report.save(directory)
        write_report(directory / "report.html", report, command=_command())
        _say_written(directory, ("circuit.json", "report.json", "report.html"), json)


def saliency(
    model: str = "reference",
    task: str = "country-capital",
    n_demos: int = 8,
    n_prompts: int = 64,
    seed: int = 0,
    template: str | None = None,
    metric: str = "logit_diff",
    backend: Literal["auto", "hooked", "bridge"] = "auto",
    out: str | None = None,
    json: bool = False,
) -> None:
    r"""Show attention times gradient between roles, layer by layer, beside knock-outs.

    Args:
        model: "reference", a local directory in Hugging Face format, or a hub name.
        task: Name of a task, see `tv-interp tasks`, or a CSV file with the columns x and y.
        n_demos: Demonstrations in each prompt.
        n_prompts: Clean prompts.
        seed: Decides them.
        template: Text with {x} and {y}; by default the model's own, else "{x} is {y}\n".
        metric: logit_diff, prob or log_prob.
        backend: TransformerLens class.
        out: Directory for saliency.nc, flow by head and pair of roles.
        json: Print JSON instead of a table.
    """
    from .analysis.saliency import saliency_flow, summarize_flow
    from .prompts import make_prompts
    from .scores import get_metric

    chosen = _checked_task(task, template, n_demos, n_prompts, seed)
    get_metric(metric)
    loaded, directory = _load(model, backend, out)
    prompts = make_prompts(
        loaded, chosen, n_demos=n_demos, n_prompts=n_prompts, seed=seed, template=template
    )
    flow = saliency_flow(loaded, prompts, metric=metric)
    table = summarize_flow(loaded, prompts, flow)
    if json:
        print(_dumps(table.reset_index().to_dict("records")))
    else:
        print(f"Saliency A * dm/dA ({flow.unit}) beside what is lost when heads cannot look")
        print(table.round(3).to_string())
    if directory is not None:
        flow.save(directory / "saliency.nc")
        _say_written(directory, ("saliency.nc",), json)


def linear(
    preset: Literal["quick", "full"] = "full",
    seed: int = 0,
    out: str | None = None,
    json: bool = False,
) -> None:
    """Measure what the theory of linear transformers predicts; exit 1 if a threshold is missed.

    Args:
        preset: full has every threshold and takes minutes; quick is smaller, under a minute.
        seed: Decides initial weights, prompts, tasks and dropped tokens.
        out: Directory for linear.json and linear.html.
        json: Print JSON instead of a table.
    """
    import torch

    from .files import make_directory
    from .theory.experiments import run_linear

    directory = make_directory(out) if out is not None else None
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    report = run_linear(preset, seed=seed, progress="bar" if sys.stderr.isatty() else "none")
    print(_dumps(report.to_dict()) if json else report)
    if directory is not None:
        from .show.linear import write_linear_page

        written = report.save(directory), directory / "linear.html"
        write_linear_page(written[1], report, command=_command())
        names = ", ".join(map(str, written))
        print(f"\nWrote {names}", file=sys.stderr if json else sys.stdout)
    if not report.passed:
        raise SystemExit(1)


def sweep(
    config: str,
    out: str,
    engine: Literal["inline", "pool", "ray", "slurm"] = "inline",
    workers: int | None = None,
    retries: int = 2,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Run a grid of models, tasks and seeds; goes on where it was; exit 1 if a cell failed.

    Args:
        config: YAML file with measure, grid and settings; see `tv_interp.sweep.plan.Plan`.
        out: Directory of the results: one file a cell, and one dataset a measure.
        engine: Where cells run; ray and slurm need pip install 'tv-interp[cluster]'.
        workers: How many at a time; by default the engine's choice.
        retries: How often a cell that failed is tried again.
        dry_run: Say what the cells would cost, from two short runs of each model; write nothing.
        json: Print JSON instead of text.
    """
    import torch

    from .scores.scores import save_dataset
    from .sweep.plan import Plan
    from .sweep.run import load_sweep, run_sweep

    plan = Plan.load(config)
    if engine == "inline":
        torch.set_num_threads(1)
    if dry_run:
        from .sweep.estimate import estimate_sweep

        table = estimate_sweep(plan)
        total, most = float(table.seconds.sum()), float(table.bytes.max())
        told = {"cells": len(table), "seconds": round(total, 1), "bytes": round(most)}
        text = f"{len(table)} cells, {total:.0f} s of one process, {most / 2**20:.0f} MiB at most"
        print(_dumps(told) if json else f"{text}, beside the model")
        return
    swept = run_sweep(
        plan, out, engine=engine, workers=workers, retries=retries, progress=sys.stderr.isatty()
    )
    written = []
    for kind in dict.fromkeys((cell.measure, cell.metric) for cell in swept.done):
        same = [cell for cell in swept.done if (cell.measure, cell.metric) == kind]
        written.append(swept.out / f"{'-'.join(kind)}.nc")
        save_dataset(load_sweep(swept.out, same), written[-1])
    print(_dumps(swept.to_dict()) if json else swept)
    if written:
        names = ", ".join(map(str, written))
        print(f"\nWrote {names}", file=sys.stderr if json else sys.stdout)
    if swept.failed:
        raise SystemExit(1)


def predictions(
    model: str = "reference",
    n_demos: int = 6,
    n_prompts: int = 64,
    seed: int = 0,
    backend: Literal["auto", "hooked", "bridge"] = "auto",
    out: str | None = None,
    json: bool = False,
) -> None:
    """Ask the predictions of the theory of linear transformers of a language model; takes minutes.

    Args:
        model: "reference", a local directory in Hugging Face format, or a hub name.
        n_demos: Demonstrations in each prompt.
        n_prompts: Prompts in each of the two halves: one chooses layers, the other reports them.
        seed: Decides prompts, halves, donors and queries.
        backend: TransformerLens class.
        out: Directory for predictions.json and scores.nc.
        json: Print JSON instead of a table.
    """
    from .analysis.predictions import check_predictions

    _check_numbers(n_demos, n_prompts, least_demos=2)
    loaded, directory = _load(model, backend, out)
    progress = "bar" if sys.stderr.isatty() else "none"
    found = check_predictions(
        loaded, n_demos=n_demos, n_prompts=n_prompts, seed=seed, progress=progress
    )
    print(_dumps(found.to_dict()) if json else found)
    if directory is not None:
        names = ", ".join(map(str, found.save(directory)))
        print(f"\nWrote {names}", file=sys.stderr if json else sys.stdout)


def tasks(family: str | None = None, json: bool = False) -> None:
    """List the tasks that ship with the package.

    Args:
        family: Only this family: knowledge, categorization, bijection or lookup.
        json: Print JSON instead of a table.
    """
    import numpy as np

    from .prompts import get_task, list_tasks

    rows = []
    for name in list_tasks(family):
        task = get_task(name)
        sample = task.sample(np.random.default_rng(0), 2)
        example = "; ".join(f"{x} is {y}" for x, y in sample.demos)
        rows.append({"name": name, "family": task.family, "example": example})
    if json:
        print(_dumps(rows))
        return
    print(f"{'task':<33}{'family':<16}example")
    for row in rows:
        print(f"{row['name']:<33}{row['family']:<16}{row['example']}"[:80].rstrip())


def models(json: bool = False) -> None:
    """List the models that ship with the package.

    Args:
        json: Print JSON instead of a table.
    """
    from .models.load import WEIGHTS

    rows = []
    for path in sorted(WEIGHTS.glob("*/config.json")):
        config = _loads(path.read_text("utf-8"))
        size = sum(p.stat().st_size for p in path.parent.iterdir()) / 1e6
        rows.append(
            {
                "name": path.parent.name,
                "layers": config["num_hidden_layers"],
                "heads": config["num_attention_heads"],
                "d_model": config["hidden_size"],
                "megabytes": round(size, 1),
                "card": str(path.parent / "README.md"),
            }
        )
    if json:
        print(_dumps(rows))
        return
    print(f"{'model':<24}{'layers':>7}{'heads':>7}{'d_model':>9}{'MB':>7}")
    for r in rows:
        print(f"{r['name']:<24}{r['layers']:>7}{r['heads']:>7}{r['d_model']:>9}{r['megabytes']:>7}")
    print("\nAny local directory in Hugging Face format and any hub name work too.")


SMALL = 256
"""Models up to this width run on one thread: on a busy machine more only wait for each other."""
ABOUT = "Which attention heads carry a task through a prompt: who writes, who reads."
COMMANDS: dict[str, Callable[..., None]] = {
    "heads": heads,
    "vectors": vectors,
    "circuit": circuit,
    "saliency": saliency,
    "linear": linear,
    "predictions": predictions,
    "sweep": sweep,
    "tasks": tasks,
    "models": models,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; bad input exits with code 2 and one line on stderr."""
    parser = _parser(prog="tv-interp", description=ABOUT)
    commands = parser.add_subcommands(required=True, dest="command")
    for name, function in COMMANDS.items():
        sub = _parser(description=inspect.getdoc(function).split("\n\n")[0])  # type: ignore[union-attr]
        _add_options(sub, function)
        commands.add_subcommand(name, sub, help=sub.description)
    given = parser.parse_args(arguments)
    try:
        COMMANDS[given.command](**vars(given[given.command]))
    except TvInterpError as error:
        print(f"tv-interp: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("tv-interp: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _parser(**settings: Any) -> Any:
    """Make a parser whose errors are one line."""
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            line = " ".join(str(message).split())
            print(f"tv-interp: error: {line}; see tv-interp --help", file=sys.stderr)
            raise SystemExit(2) from ex

    return Parser(default_env=False, **settings)


def _add_options(parser: Any, function: Callable[..., None]) -> None:
    """Give a command one option for each parameter, with the help of its docstring."""
    help_of = dict(
        re.findall(r"^ {4}(\w+): (.+(?:\n {8,}.+)*)", inspect.getdoc(function) or "", re.M)
    )
    hints = get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        option = "--" + name.replace("_", "-")
        text = " ".join(help_of[name].split())
        if parameter.default is parameter.empty and name == "config":
            parser.add_argument(name, type=str, help=text)
            continue
        if hints[name] is bool:
            parser.add_argument(option, action="store_true", help=text)
        elif hints[name] == list[str] | None:
            parser.add_argument(option, nargs="+", type=str, default=None, help=text)
        else:
            required = parameter.default is parameter.empty
            default = {} if required else {"default": parameter.default}
            parser.add_argument(option, type=hints[name], required=required, help=text, **default)


def _checked_task(task: str, template: str | None, n_demos: int, n_prompts: int, seed: int) -> Any:
    """Get a task, and refuse prompts that cannot be made of it."""
    import numpy as np

    from .prompts import Task, get_task
    from .prompts.roles import Template

    chosen = Task.from_csv(task) if task.lower().endswith(".csv") else get_task(task)
    if template is not None:
        Template.parse(template)
    _check_numbers(n_demos, n_prompts)
    chosen.sample(np.random.default_rng(seed), n_demos)  # refuses more than the task has
    return chosen


def _check_numbers(n_demos: int, n_prompts: int, *, least_demos: int = 1) -> None:
    if n_demos < least_demos:
        raise TvInterpError(f"expected n_demos of {least_demos} or more, got {n_demos}")
    if n_prompts < 4:
        raise TvInterpError(f"expected n_prompts of 4 or more, got {n_prompts}")


def _check_corruptions(task: Any, kinds: Sequence[str]) -> None:
    """Refuse corruptions that the task does not allow."""
    from .prompts import get_task
    from .prompts.corruptions import check_corruption

    partner = get_task(task.partner) if task.partner else None
    for kind in kinds:
        check_corruption(kind, task, partner)


def _load(model: str, backend: Any, out: str | None) -> tuple[Any, Path | None]:
    """Make the directory for results, where one is named, and load the model."""
    import torch

    from .files import make_directory
    from .models.load import load_model

    directory = make_directory(out) if out is not None else None
    loaded = load_model(model, backend=backend)
    if loaded.cfg.d_model <= SMALL:
        torch.set_num_threads(1)
    return loaded, directory


def _say_written(directory: Path, names: Sequence[str], json: bool) -> None:
    """Say which files were written."""
    listed = ", ".join(str(directory / name) for name in names)
    print(f"\nWrote {listed}", file=sys.stderr if json else sys.stdout)


def _dumps(value: Any) -> str:
    return json.dumps(value, indent=2)


def _loads(text: str) -> Any:
    return json.loads(text)


def _command() -> str:
    return shlex.join(["tv-interp", *sys.argv[1:]])


if __name__ == "__main__":
    main()
