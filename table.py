"""The paper's table: the dev scores of finished models, as medians over trials, with their spread and the paper's
significance test. It trains nothing.

    run directories to scores    collect
    scores to statistics         summarize, mann_whitney_p
    statistics to text           to_text
    a run's end, and --table     report, compare
"""

from statistics import NormalDist

import numpy as np

import figure
from figure import LABELS
from glue_data import InputError, find_task, ranks, read_json
from runtime import differences, show, to_json, write_whole

BASELINES = ("single", "multi")  # those that the paper's significance tests compare with


def collect(folders, tasks):
    """{regime: [{task: {split: {metric: percent}}} of each trial that is finished]} of one or several run directories.
    With --teacher-checkpoint the teachers are regimes of their own."""
    results = {}
    for name in LABELS:
        for folder in folders:
            trials = [int(path.name[6:]) for path in folder.glob("trial-[1-9]*") if path.name[6:].isdecimal()]
            for trial in sorted(trials):
                top = folder / f"trial-{trial}" / name
                scores = {}
                for path in (top / "scores.json", *(top / task.name / "scores.json" for task in tasks)):
                    if path.exists():  # a model of all tasks, or of one
                        scores |= read_json(path)
                if len(scores) == len(tasks):
                    results.setdefault(name, []).append(scores)
    return results


def summarize(results, tasks):
    """{regime: {"trials": their number, column: {median, least, greatest, p against Single, p against Multi}}}; the
    columns are the average of the tasks, taken within each trial, and each task's own metric of the paper."""
    columns = {}  # {regime: {column: one value a trial}}
    for name, trials in results.items():
        of_task = {t.name: np.array([s[t.name][t.dev[0][0]][t.metrics[0]] for s in trials], float) for t in tasks}
        columns[name] = {"Avg": np.mean(list(of_task.values()), axis=0), **of_task}
    summary = {}
    for name, row in columns.items():
        summary[name] = {"trials": len(results[name])}
        for column, values in row.items():
            cell = {"median": np.median(values), "least": values.min(), "greatest": values.max()}
            for baseline in BASELINES:
                if baseline in columns and baseline != name and len(values) > 1:
                    cell[f"p_{baseline}"] = mann_whitney_p(values, columns[baseline][column])
            summary[name][column] = cell
    return summary


def to_text(summary, tasks):
    """The paper's table with this run's rows; over several trials also the spread, and p against Single and Multi."""
    columns = ["Avg", *(task.name for task in tasks)]
    folders = [task.folder for task in tasks]
    headings = [task.folder if folders.count(task.folder) == 1 else task.name for task in tasks]
    rows = [["Model", "Avg", *headings]]
    for name, row in summary.items():
        formats = {LABELS[name]: "{median:.1f}"}  # {label: a cell's format}
        if row["trials"] > 1:
            formats[f"  {row['trials']} trials"] = "{least:.1f}–{greatest:.1f}"
        for baseline in BASELINES:
            if f"p_{baseline}" in row["Avg"]:
                formats[f"  p against {LABELS[baseline]}"] = f"{{p_{baseline}:.2g}}"
        rows += [[label, *(cell.format(**row[column]) for column in columns)] for label, cell in formats.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    metrics = ", ".join(f"{heading} {task.metrics[0]}" for heading, task in zip(headings, tasks, strict=True))
    return "\n".join([*lines, "", f"GLUE dev, percent: {metrics}."]) + "\n"


def report(run, tasks):
    """Write results.json, table.txt and figure.svg, and print the table."""
    results = collect([run.folder], tasks)
    summary = summarize(results, tasks)
    text = to_text(summary, tasks)
    write_whole(run.folder / "results.json", to_json({**results, "summary": summary}))
    write_whole(run.folder / "table.txt", text)
    run.say("\n" + text)
    try:
        figure.draw(run.folder)
    except ValueError as error:  # a damaged metrics.jsonl does not undo a finished run
        run.say(f"no figure.svg: {error}")


def compare(folders):
    """Print one table over run directories, and in what else than the seed their configurations differ."""
    configs = [read_json(folder / "config.json") for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if not config.get("tasks") or config["tasks"] != configs[0]["tasks"]:
            problem = f"has the tasks {config.get('tasks')}, and {folders[0]} {configs[0].get('tasks')}"
            raise InputError(f"--table: {folder} {problem}; expected runs of bam.py with the same tasks")
        for name, value, first in differences(config, configs[0]):
            if name != "seed":
                show(f"warning: {folder} is pooled, but its {name} is {value!r}, and {first!r} in {folders[0]}")
    if len({to_json(config) for config in configs}) < len(configs):
        raise InputError("--table: two of the runs are the same, and their seed too; expected another seed")
    tasks = [find_task(name) for name in configs[0]["tasks"]]
    results = collect(folders, tasks)
    if not results:
        raise InputError("--table: no regime is finished in these folders")
    for folder in folders:
        if unfinished := results.keys() - collect([folder], tasks).keys():
            show(f"warning: {folder} has no finished {', '.join(sorted(unfinished))}")
    show(to_text(summarize(results, tasks), tasks), end="")


def mann_whitney_p(a, b):
    """Two-sided p of the paper's test, Mann-Whitney U. Exact for small samples without ties, else the normal
    approximation with tie and continuity corrections: the same choice as scipy.stats.mannwhitneyu."""
    n, m = len(a), len(b)
    values = np.concatenate([a, b])
    if np.isnan(values).any():
        return float("nan")
    u = ranks(values)[:n].sum() - n * (n + 1) / 2
    u = max(u, n * m - u)
    _, ties = np.unique(values, return_counts=True)
    if min(n, m) <= 8 and ties.max() == 1:
        counts = np.zeros((n + 1, n * m + 1))  # counts[i, s]: ways in which i values of a have s values of b below them
        counts[0, 0] = 1
        for below in range(1, m + 1):  # how many values of b lie below one value of a; U sums these numbers
            for i in range(1, n + 1):
                counts[i, below:] += counts[i - 1, :-below]
        counts = counts.sum(0)  # the other n - i values of a are below all of b
        return float(min(1.0, 2 * counts[int(u) :].sum() / counts.sum()))
    variance = n * m / 12 * (n + m + 1 - (ties**3 - ties).sum() / ((n + m) * (n + m - 1)))
    return 1.0 if variance == 0 else min(1.0, 2 * NormalDist().cdf(-(u - n * m / 2 - 0.5) / variance**0.5))
