"""A picture of a run directory: dev scores, training curves, and the two schedules behind them. Or of a benchmark.

    python figure.py runs/all        # writes runs/all/figure.svg, as bam.py does at the end of a run
    python figure.py speed.jsonl     # writes speed.svg from bench_bam.py's --json

Standard library alone, and from the files alone: any run can be drawn, on any machine, also one that still goes on.
"""

import json
import math
import sys
from collections import namedtuple
from html import escape
from pathlib import Path
from statistics import mean, median

# Names and order as in glue_data.TASKS and bam.ROWS; a test holds them together.
TASKS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "mnli": "MNLI",
         "qnli": "QNLI", "rte": "RTE", "wnli": "WNLI"}  # fmt: skip
REGIMES = {"single-teacher": "Single, teacher", "multi-teacher": "Multi, teacher", "single": "Single", "multi": "Multi",
           "single-single": "Single→Single", "multi-multi": "Multi→Multi", "single-multi": "Single→Multi"}  # fmt: skip
# Okabe and Ito's colours for colour-blind readers, and a grey; they stand out from white and from near-black.
STYLE = """
svg { font: 12px -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; color: #1f2328; }
text { fill: currentColor; }  .page { fill: #ffffff; }
@media (prefers-color-scheme: dark) { svg { color: #e6edf3; }  .page { fill: #0d1117; } }
.h1 { font-size: 22px; font-weight: 600; }  .h2 { font-size: 16px; font-weight: 600; }  .strong { font-weight: 700; }
.muted { fill-opacity: 0.7; font-weight: 400; }  .middle { text-anchor: middle; }  .end { text-anchor: end; }
.rule { stroke: currentColor; stroke-opacity: 0.16; }  circle { fill: currentColor; fill-opacity: 0.75; }
path { fill: none; stroke: currentColor; stroke-width: 1.5; stroke-linecap: round; stroke-linejoin: round; }
.single-teacher { color: #e69f00; }  .multi-teacher { color: #56b4e9; }
.single { color: #7d8590; }  .multi { color: #0072b2; }
.single-single { color: #009e73; }
.multi-multi { color: #cc79a7; }  .single-multi { color: #d55e00; }
rect { fill: currentColor; }  .hf_default { color: #7d8590; }  .hf_best { color: #0072b2; }  .ours { color: #d55e00; }
"""
WIDTH, EDGE, LEFT, PLOT, PITCH, COLUMNS = 900, 24, 164, 184, 243, 3  # px; the regimes' names are left of LEFT
ROW, TALL = 18, 90  # px; a regime's row of dots, and the height of a plot of curves
PARTS = 40  # parts of training; a curve of losses has at most one point in each


class FigureError(ValueError):
    """A folder that cannot be drawn."""


# ------------------------------------------------------------------------------------------------------------- reading

Stage = namedtuple("Stage", "trial regime task log scores")  # task: "" for a model of all; scores: {} while unfinished


def read(folder):
    """config.json, or {}, and every Stage that has logged or scored something, regimes in the table's order."""
    stages = []
    for regime in REGIMES:
        for trial in sorted(folder.glob(f"trial-*/{regime}"), key=lambda path: (len(str(path)), path)):
            for path in (trial, *sorted(trial.glob("*/"))):
                log = path / "metrics.jsonl"
                lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []  # the last may be half written
                entries = [parse(line, f"{log}, line {number}", entry_of) for number, line in enumerate(lines, 1)]
                if any(a["step"] >= b["step"] for a, b in zip(entries, entries[1:], strict=False)):
                    raise FigureError(f"{log}: its steps are not in order")
                task, scores = "" if path == trial else path.name, read_json(path / "scores.json", known_scores)
                stages.append(Stage(trial.parent.name, regime, task, entries, scores))
    return read_json(folder / "config.json", known_config), [stage for stage in stages if stage.log or stage.scores]


def read_json(path, check):
    return parse(path.read_bytes(), path, check) if path.exists() else {}


def parse(content, place, check):
    """JSON, passed through `check`, which raises where it is not what bam.py writes."""
    try:
        if len(content) > 2**20:
            raise ValueError("longer than a megabyte")
        return check(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        raise FigureError(f"{place}: cannot be drawn ({error!r}); expected what bam.py writes") from None


def number(value, low, high):
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{value!r} is not from {low} to {high}")
    return value


def entry_of(line):
    return {name: number(line[name], 0, 1e38) for name in ("step", "loss", "learning_rate", "gold_weight")}


def known_scores(scores):
    """Each task's first dev metric, the paper's, is percent; null where undefined, as a correlation with a constant."""
    for splits in scores.values():
        metric, value = next(iter(splits["dev"].items()))
        number(0 if value is None else value, -101, 101)
    return scores


def known_config(config):
    for recipe in (config.get("single", {}), config.get("multi", {})):
        for name in ("learning_rate", "warmup"):
            number(recipe.get(name, 0), 0, 1e9)
    if not all(isinstance(task, str) for task in config.get("tasks", [])):
        raise ValueError(f"tasks {config['tasks']!r}")
    return config


def scores_of(stages, tasks):
    """{task: {regime: [percent of each trial]}}, the paper's metric; under "" the average, taken within each trial."""
    trials = {}
    for stage in stages:
        for task, splits in stage.scores.items():
            value = next(iter(splits["dev"].values()))
            if value is not None:  # null: undefined, as a correlation with a constant
                trials.setdefault((stage.regime, stage.trial), {})[task] = value
    scores = {task: {} for task in ("", *tasks)}
    for (regime, _), values in trials.items():
        if len(tasks) > 1 and all(task in values for task in tasks):
            values[""] = mean(values[task] for task in tasks)
        for task in scores:
            if task in values:
                scores[task].setdefault(regime, []).append(values[task])
    return scores


def curve(stage, config, name, unit=1):
    """[(part of training done, value)] of a logged quantity. The log of an unfinished stage does not say how long it
    will be, but its learning rate does: it rises from 0 over the warm-up, then falls, to reach 0 at the end."""
    recipe, last, done = config.get("single" if stage.task else "multi", {}), stage.log[-1], 0
    if recipe.get("learning_rate") and not stage.scores:
        rate = last["learning_rate"] / recipe["learning_rate"]
        rising = last["learning_rate"] > stage.log[-2:][0]["learning_rate"]
        done = min(1, rate * recipe["warmup"] if rising else 1 - rate)
    num_steps = last["step"] / done if last["step"] and done > 0 else last["step"] + 1
    return [(entry["step"] / num_steps, entry[name] * unit) for entry in stage.log]


def smooth(points):
    """A point for each of PARTS: the mean over it and both neighbours, 3 / PARTS of training."""
    parts = [[] for _ in range(PARTS)]
    for x, y in points:
        parts[min(int(x * PARTS), PARTS - 1)].append((x, y))
    smoothed = []
    for place, part in enumerate(parts):
        near = sum(parts[max(0, place - 1) : place + 2], [])
        if part:
            smoothed.append((mean(x for x, _ in part), mean(y for _, y in near)))
    return smoothed


# ------------------------------------------------------------------------------------------------------------- drawing


def safe(content):
    """Text for XML, which cannot hold the control characters and lone surrogates that a folder's name can."""
    return escape("".join(letter if letter.isprintable() else "�" for letter in str(content)))


def text(x, y, content, style="", unit=""):
    unit = f'<tspan class="muted" dx="5">{safe(unit)}</tspan>' if unit else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{safe(content)}{unit}</text>\n'


def rule(x1, y1, x2, y2):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="rule"/>\n'


def path(points):
    """A line through points; the last is named twice, so that a line of one point is a dot."""
    return '<path d="M' + "L".join(f"{x:.1f},{y:.1f}" for x, y in [*points, points[-1]]) + '"/>\n'


def group(content, x=0.0, y=0.0, style=""):
    return f'<g class="{style}" transform="translate({x:.1f},{y:.1f})">\n{content}</g>\n'


DOT, DASH = '<circle r="3.5"/>\n', path([(-4, 0), (6, 0)])  # what stands before a regime's name


def ticks(low, high, at_most):
    """The round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / at_most))
    for step in (power, 2 * power, 5 * power, 10 * power):
        numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
        if len(numbers) <= at_most:
            return [number * step for number in numbers]


def dots(rows, regimes):
    """A row for each regime, {regime: [percent of each trial]}, and its median in figures."""
    known = sum(rows.values(), []) or [0]  # nothing: all undefined
    half = max(1, 0.55 * (max(known) - min(known)))  # at least 2 percent: a small difference should look small
    low, height = (max(known) + min(known)) / 2 - half, ROW * len(regimes)
    medians = {regime: f"{median(values):.1f}" for regime, values in rows.items()}
    best = max(medians.values(), key=float) if len(medians) > 1 else None
    drawing = ""
    for tick in ticks(low, low + 2 * half, 4):
        x = PLOT * (tick - low) / (2 * half)
        drawing += rule(x, 0, x, height) + text(x, height + 15, f"{tick:g}", "muted middle")
    for place, regime in enumerate(regimes):
        y, xs = ROW * (place + 0.5), [PLOT * (value - low) / (2 * half) for value in rows.get(regime, [])]
        printed = medians.get(regime, "–")
        drawing += rule(0, y, PLOT, y) + text(PLOT + 36, y + 4, printed, "end strong" if printed == best else "end")
        drawing += group(spread(xs), 0, y, regime)
    return drawing


def spread(xs):
    """A dot for each trial, and for several a line from the lowest to the highest and a tick at the median."""
    drawing = "".join(group(DOT, x) for x in xs)
    if len(xs) > 1:
        drawing += path([(min(xs), 0), (max(xs), 0)]) + path([(median(xs), -7), (median(xs), 7)])
    return drawing


def curves(lines):
    """Lines [(regime, [(part of training done, value)])] over an axis from 0 to their highest point."""
    top = 1.05 * max(y for _, points in lines for _, y in points) or 1
    drawing = rule(0, 0, 0, TALL) + rule(PLOT, 0, PLOT, TALL)
    drawing += text(0, TALL + 15, "0 %", "muted middle") + text(PLOT, TALL + 15, "100 % of training", "muted end")
    for tick in ticks(0, top, 5):
        y = TALL * (1 - tick / top)
        drawing += rule(0, y, PLOT, y) + text(-8, y + 4, f"{tick:g}", "muted end")
    for regime, points in lines:
        drawing += group(path([(PLOT * x, TALL * (1 - y / top)) for x, y in points]), style=regime)
    return drawing


# ------------------------------------------------------------------------------------------------------------ sections


def section(title, note, regimes, panels, height, mark):
    """A heading, under it panels [(title, unit, drawing)], left of them the regimes' names: (drawing, its height)."""
    drawing, pitch = text(EDGE, 16, title, "h2") + text(EDGE, 37, note, "muted"), height + 62
    for place, (name, unit, content) in enumerate(panels):
        x, y = LEFT + PITCH * (place % COLUMNS), 80 + pitch * (place // COLUMNS)
        drawing += group(text(0, -12, name, "strong", unit) + content, x, y)
        if place == 0 or (place % COLUMNS == 0 and mark == DOT):
            for line, regime in enumerate(regimes):
                drawing += group(mark, EDGE + 4, y + ROW * (line + 0.5), regime)
                drawing += text(EDGE + 18, y + ROW * (line + 0.5) + 4, REGIMES[regime])
    return drawing, 62 + pitch * math.ceil(len(panels) / COLUMNS)


def score_section(stages, tasks):
    """Dots: a panel for the average and one for each task, the same rows in each."""
    scores = scores_of(stages, tasks)
    metrics = {task: next(iter(splits["dev"])) for stage in stages for task, splits in stage.scores.items()}
    regimes = list(dict.fromkeys(stage.regime for stage in stages))
    panels = []
    for task, rows in scores.items():
        if rows or task in metrics:
            unit = metrics.get(task, f"of {len(tasks)} tasks")
            panels.append((TASKS.get(task, task) or "Average", unit, dots(rows, regimes)))
    note = "Percent, the best in bold." if len(regimes) > 1 else "Percent."
    if len({stage.trial for stage in stages}) > 1:
        note += " A dot is a trial; the tick and the figure are the median."
    return section("Scores on the dev sets", note, regimes, panels, ROW * len(regimes), DOT)


def loss_section(stages, tasks, config):
    """Curves: a panel for the models of all tasks and one for the models of each task."""
    panels = []
    for task in ("", *tasks):
        lines = [(stage.regime, smooth(curve(stage, config, "loss"))) for stage in stages if stage.task == task]
        if lines:
            panels.append((TASKS.get(task, task) or "All tasks", "" if task else "in one model", curves(lines)))
    regimes = list(dict.fromkeys(stage.regime for stage in stages))
    note = "Cross-entropy in nats" + ", for STS-B the squared error of score / 5" * ("stsb" in tasks)
    note += f". A line is a trial, each point of it the mean over {300 / PARTS:g} % of training."
    return section("Loss per training example", note, regimes, panels, TALL, DASH)


def schedule_section(stages, config):
    """λ and the learning rate, of the first regime's model, whom nobody teaches, and of the last's, the student."""
    first = {stage.regime: stage for stage in reversed(stages)}  # first trial, first task
    ends = {regime: first[regime] for regime in (stages[0].regime, stages[-1].regime)}
    peak = max(entry["learning_rate"] for stage in ends.values() for entry in stage.log)
    power = math.floor(math.log10(peak or 1))
    exponent = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    weights = [(regime, thin(curve(stage, config, "gold_weight"))) for regime, stage in ends.items()]
    rates = [(regime, thin(curve(stage, config, "learning_rate", 10.0**-power))) for regime, stage in ends.items()]
    words = "Annealed, λ rises from 0 to 1: a", "student begins by imitating its", "teachers and ends on the labels."
    panels = [
        ("λ", "weight of the gold labels", curves(weights)),
        ("Learning rate", f"of the heads × 10{exponent}", curves(rates)),
        ("Target", "λ · gold + (1 − λ) · teacher", "".join(text(0, 13 + 18 * y, words[y], "muted") for y in range(3))),
    ]
    return section("Schedules", "One model of each regime shown.", [*ends], panels, TALL, DASH)


def thin(points):
    """Some 200 of the points, the last among them: a plot has no room for more."""
    return points[:: len(points) // 200 + 1] + points[-1:]


def draw(run_directory):
    """Write figure.svg into a run directory, from what its stages have left there so far, and return its path."""
    folder = Path(run_directory)
    config, stages = read(folder)
    if not stages:
        raise FigureError(f"{folder}: no trial-*/REGIME/metrics.jsonl or scores.json; expected bam.py's run directory")
    tasks = config.get("tasks") or sorted({task for stage in stages for task in (stage.task, *stage.scores) if task})
    scored, logged = ([stage for stage in stages if getattr(stage, name)] for name in ("scores", "log"))
    unknown = {task for stage in stages for task in stage.scores} - set(tasks)
    if unknown:
        raise FigureError(f"{folder}: scores of {', '.join(sorted(unknown))}, of which config.json knows nothing")
    sections = [score_section(scored, tasks)] if scored else []
    sections += [loss_section(logged, tasks, config), schedule_section(logged, config)] if logged else []
    drawing, y = heading(folder, config, tasks, stages), 96
    for part, height in sections:
        drawing, y = drawing + group(part, 0, y), y + height + 16
    return write(folder / "figure.svg", drawing, y - 24)


def write(path, drawing, height):
    size = f'width="{WIDTH}" height="{height}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {size} role="img">\n'
    page = f'<style>{STYLE}</style>\n<rect class="page" {size} rx="6"/>\n'
    path.write_text(opening + page + drawing + "</svg>\n", "utf-8", newline="\n")
    return path


def heading(folder, config, tasks, stages):
    name, counts = folder.resolve().name, {"task": len(tasks), "trial": len({stage.trial for stage in stages})}
    facts = [f"{count} {noun}{'s' * (count != 1)}" for noun, count in counts.items()]
    facts += [f"{noun} {config[noun]}" for noun in ("seed", "limit", "precision") if config.get(noun) is not None]
    title = f"<title>{safe(name)}: scores, losses and schedules</title>\n"
    return title + text(EDGE, 46, name, "h1") + text(EDGE, 68, " · ".join(facts), "muted")


# ----------------------------------------------------------------------------------------------------------- a benchmark

VARIANTS = {"ours": "bam.py", "hf_best": "Hugging Face at its best", "hf_default": "run_glue's default"}
MEASURES = ("share_of_peak", "examples_per_s", "ratio")
FULL, BAR = 480, 16  # px: a bar of the whole matrix rate; a bar's height


def draw_speed(path):
    """Draw what bench_bam.py's --json wrote: each measurement's shares of the machine's matrix rate."""
    if path.suffix == ".svg":
        raise FigureError(f"{path}: is a picture; expected what bench_bam.py --json writes")
    content = path.read_bytes().split(b"\n")
    lines = [parse(line, f"{path}, line {place}", speed_of) for place, line in enumerate(content, 1) if line]
    shares = {}
    for line in lines:
        measured = all(line[name] is not None for name in MEASURES) and line["at"] is None
        if measured and line["variant"] in VARIANTS and line["name"] != "ablation":
            shares.setdefault(line["name"], {})[line["variant"]] = line
    if not shares:
        raise FigureError(f"{path}: no share of a matrix rate in it; expected what bench_bam.py --json writes")
    facts = (
        f"{lines[0]['device']} · {lines[0]['threads']} threads · {lines[0]['precision']} · torch {lines[0]['torch']}"
    )
    drawing = "<title>Speed, as shares of the matrix rate</title>\n" + text(EDGE, 46, "Speed against the limit", "h1")
    drawing += text(EDGE, 68, facts, "muted")
    drawing += text(LEFT + FULL, 96, "100 % of the rate of its matrix products alone", "muted middle")
    y = 112
    for name, variants in shares.items():
        drawing += text(EDGE, y + 13, str(name).replace("_", " "), "strong")
        for variant in [variant for variant in VARIANTS if variant in variants]:
            drawing, y = drawing + group(bar(variants[variant]), LEFT, y), y + BAR + 2
        y += 14
    return write(path.with_suffix(".svg"), drawing + rule(LEFT + FULL, 102, LEFT + FULL, y - 10), y)


def speed_of(line):
    """A line of the JSON, as far as it is drawn."""
    for name in MEASURES:
        number(0 if line[name] is None else line[name], 0, 1e12)
    for name in ("name", "variant", "device", "threads", "precision", "torch", "at"):
        if not isinstance(line[name], (str, int, type(None))):
            raise ValueError(f"{name} {line[name]!r}")
    return line


def bar(line):
    width, variant = FULL * min(line["share_of_peak"], 1.3), line["variant"]
    behind = f"{line['examples_per_s']:.0f}/s" + ("" if variant == "ours" else f", ours {line['ratio']:.1f} times that")
    share = text(width + 6, BAR - 3, f"{100 * line['share_of_peak']:.0f} %", unit=f"{VARIANTS[variant]}, {behind}")
    return f'<rect class="{variant}" width="{width:.1f}" height="{BAR}"/>\n' + share


def command(arguments):
    """Draw one run directory or benchmark; errors are one line on stderr. Returns the exit status."""
    try:
        if len(arguments) != 1:
            raise FigureError("expected one argument, a run directory or bench_bam.py's JSON")
        path = Path(arguments[0])
        print(draw_speed(path) if path.is_file() else draw(path))
        return 0
    except (FigureError, OSError) as error:
        print(f"figure.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
