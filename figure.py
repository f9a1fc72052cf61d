"""A picture of run directories: dev scores, teacher annealing, losses and schedules.
It needs the standard library alone and draws what the files hold so far, so a run can be drawn while it trains.

    python figure.py runs/all                     # writes runs/all/figure.svg, as bam.py does at the end of a run
    python figure.py runs/seed-0 runs/seed-1000   # pools the trials of one experiment, in runs/seed-0/figure.svg
"""

import argparse
import json
import math
from collections import defaultdict, namedtuple
from html import escape
from pathlib import Path
from statistics import fmean, median

# Names and order as in glue_data.TASKS, which a test compares, and in bam.REGIMES, which bam.py asserts.
TASKS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "mnli": "MNLI",
         "qnli": "QNLI", "rte": "RTE", "wnli": "WNLI"}  # fmt: skip
REGIMES = {"single": "Single", "multi": "Multi", "single-single": "Single→Single", "multi-multi": "Multi→Multi",
           "single-multi": "Single→Multi", "single-multi-single": "Single→Multi→Single",
           "single-multi-single-multi": "Single→Multi→Single→Multi"}  # fmt: skip
# With --teacher-checkpoint the teachers are other models, in folders of their own.
LABELS = {f"{name}-teacher": f"{label}, teacher" for name, label in REGIMES.items()} | REGIMES
# A grey and the colours that Okabe and Ito chose for colour-blind readers; all are visible on white and on near-black.
COLOURS = "#7d8590", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#e69f00", "#56b4e9"
STYLE = """
svg { font: 12px -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; color: #1f2328; }
text { fill: currentColor; }  .page { fill: #ffffff; rx: 6px; }  [class*="-teacher"] { opacity: 0.55; }
@media (prefers-color-scheme: dark) { svg { color: #e6edf3; }  .page { fill: #0d1117; } }
.h1 { font-size: 22px; font-weight: 600; }  .h2 { font-size: 16px; font-weight: 600; }  .strong { font-weight: 700; }
.muted { fill-opacity: 0.7; font-weight: 400; }  .middle { text-anchor: middle; }  .end { text-anchor: end; }
.rule { stroke: currentColor; stroke-opacity: 0.16; }  circle { fill: currentColor; fill-opacity: 0.75; }
path { fill: none; stroke: currentColor; stroke-width: 1.5; stroke-linecap: round; stroke-linejoin: round; }
.level { stroke-dasharray: 4 4; }  .area { fill: currentColor; fill-opacity: 0.12; stroke: none; }
""" + "".join(f".{regime}, .{regime}-teacher {{ color: {colour}; }}\n" for regime, colour in zip(REGIMES, COLOURS))
# Sizes in px.
WIDTH = 908
EDGE = 24
LEFT = 226  # of the panels; the regimes' names are left of it
PLOT = 168  # a panel's width
PITCH = 226  # from panel to panel
LINE = 18  # the height of a line of dots
TALL = 90  # the height of a plot of curves

COLUMNS = 3  # panels side by side
# The marks of a legend: of a regime's dots, of its curve, and of the level that it reached.
DOT = '<circle r="3.5"/>\n'
CURVE = '<path d="M-4,0L8,0"/>\n'
LEVEL = '<path d="M-8,0L12,0" class="level"/>\n'

# task: "" for a model of all tasks. training: [{"step", "loss", ...}]. dev: {finished steps: {task: percent}}.
# scores: {task: (metric, percent)}, the final dev scores in the paper's metric; {} while training goes on.
Stage = namedtuple("Stage", "trial regime task training dev scores num_steps")


def read_run(folder):
    """(config.json or {}, a Stage for each folder of the run that holds a log or scores)."""
    stages = []
    for path in sorted([*folder.glob("trial-[1-9]*/*/"), *folder.glob("trial-[1-9]*/*/*/")]):
        trial, regime, *task = path.relative_to(folder).parts
        log = path / "metrics.jsonl"
        lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []  # the last line may be half written
        entries = [parse(line, f"{log}, line {number}") for number, line in enumerate(lines, 1)]
        training = [entry for entry in entries if "loss" in entry]
        dev = {entry["step"]: entry["dev"] for entry in entries if "dev" in entry}
        splits = {name: next(iter(splits.values())) for name, splits in read_json(path / "scores.json").items()}
        scores = {name: next(iter(metrics.items())) for name, metrics in splits.items()}  # the paper's split and metric
        num_steps = max([training[-1]["step"] + 1, *dev]) if training else 1
        if dev and scores:
            dev[num_steps] = {name: percent for name, (_, percent) in scores.items()}
        is_model = trial[6:].isdecimal() and set(task) <= set(scores or task)  # and nothing that was moved aside
        if is_model and regime in LABELS and (training or scores):
            stages.append(Stage((folder, trial), regime, "".join(task), training, dev, scores, num_steps))
    if not stages:
        raise ValueError(f"{folder}: no trial-*/REGIME/metrics.jsonl or scores.json; expected bam.py's run directory")
    return read_json(folder / "config.json"), stages


def read_json(path):
    return parse(path.read_bytes(), path) if path.exists() else {}


def parse(content, source):
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}; expected a JSON object, as bam.py writes it") from None


def scores_of(stages, tasks):
    """{task: {regime: [percent of each trial]}}; under "" the average over the tasks, taken within each trial."""
    trials = defaultdict(dict)
    for stage in stages:
        known = {task: percent for task, (_, percent) in stage.scores.items() if task in tasks and percent is not None}
        trials[stage.regime, stage.trial].update(known)
    scores = {task: defaultdict(list) for task in ("", *tasks)}
    for (regime, _), percents in trials.items():
        if len(percents) == len(tasks) > 1:
            percents[""] = fmean(percents.values())
        for task in scores.keys() & percents.keys():
            scores[task][regime].append(percents[task])
    return scores


def curve(stage, name):
    """[(fraction of training done, value)] of a logged quantity: at most 50 points, the means of neighbouring ones."""
    points = [(entry["step"] / stage.num_steps, entry[name]) for entry in stage.training]
    size = len(points) // 50 + 1
    neighbours = [points[start : start + size] for start in range(0, len(points), size)]
    return [tuple(map(fmean, zip(*near, strict=True))) for near in neighbours]


def dev_curve(stages, task):
    """[(fraction of training done, percent)]: dev scores of one regime while it trained, medians over its trials."""
    trials = defaultdict(list)
    for stage in stages:
        for step, percents in stage.dev.items():
            if percents.get(task) is not None:
                trials[step / stage.num_steps].append(percents[task])
    return [(x, median(percents)) for x, percents in sorted(trials.items())]


# ------------------------------------------------------------------------------------------------------------- drawing


def text(x, y, content, style="", unit=""):
    unit = f'<tspan class="muted" dx="5">{escape(unit)}</tspan>' if unit else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(content)}{unit}</text>\n'


def path(points, style=""):
    """A line through points; the last is named twice, so that a line of one point is a dot."""
    line = "L".join(f"{x:.1f},{y:.1f}" for x, y in [*points, *points[-1:]])
    return f'<path d="M{line}" class="{style}"/>\n' if line else ""


def group(content, x=0.0, y=0.0, style=""):
    return f'<g class="{style}" transform="translate({x:.1f},{y:.1f})">\n{content}</g>\n'


def axis(values, from_zero):
    """(low, high, at most five round numbers between them). high is at least 2 percent above low, or low is 0."""
    low = min(values, default=0)
    high = max(values, default=0)
    margin = max(0.05 * (high - low), 1 - (high - low) / 2)  # a small difference should look small
    low, high = (0, 1.05 * high or 1) if from_zero else (low - margin, high + margin)
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(times * power for times in (1, 2, 5, 10) if high - low <= 4 * times * power)
    return low, high, [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def dots(percents, regimes):
    """A line for each regime, {regime: [percent of each trial]}: its trials as dots, their median also in figures."""
    low, high, ticks = axis(sum(percents.values(), []), from_zero=False)
    medians = {regime: f"{median(values):.1f}" for regime, values in percents.items()}
    best = max(medians.values(), key=float) if len(medians) > 1 else None
    drawing = ""
    for tick in ticks:
        x = PLOT * (tick - low) / (high - low)
        drawing += path([(x, 0), (x, LINE * len(regimes))], "rule")
        drawing += text(x, LINE * len(regimes) + 15, f"{tick:g}", "muted middle")
    for index, regime in enumerate(regimes):
        xs = [PLOT * (value - low) / (high - low) for value in percents.get(regime, [])]
        trials = "".join(group(DOT, x) for x in xs)
        if len(xs) > 1:
            trials += path([(min(xs), 0), (max(xs), 0)]) + path([(median(xs), -7), (median(xs), 7)])
        printed = medians.get(regime, "–")
        printed = text(PLOT + 36, 4, printed, "end strong" if printed == best else "end")
        line = path([(0, 0), (PLOT, 0)], "rule") + group(trials, style=regime)
        drawing += group(line + printed, 0, LINE * (index + 0.5))
    return drawing


def curves(lines, from_zero=True):
    """Lines [(style, [(fraction of training done, value)])]."""
    low, high, ticks = axis([y for _, points in lines for _, y in points], from_zero)
    drawing = path([(0, 0), (0, TALL)], "rule") + path([(PLOT, 0), (PLOT, TALL)], "rule")
    drawing += text(0, TALL + 15, "step 0", "muted") + text(PLOT, TALL + 15, "last step", "muted end")
    for tick in ticks:
        y = TALL * (high - tick) / (high - low)
        drawing += path([(0, y), (PLOT, y)], "rule") + text(-8, y + 4, f"{tick:g}".replace("e-0", "e-"), "muted end")
    for style, points in lines:
        drawing += path([(PLOT * x, TALL * (high - y) / (high - low)) for x, y in points], style)
    return drawing


def score_section(stages, tasks):
    """Dots: a panel for the average and one for each task, with the same regimes in each."""
    legend = {stage.regime: DOT for stage in stages if stage.scores}
    units = {task: metric for stage in stages for task, (metric, _) in stage.scores.items()}
    panels = []
    for task, percents in scores_of(stages, tasks).items():
        if percents or task in units:
            unit = units.get(task, f"of {len(tasks)} tasks")
            panels.append((TASKS.get(task, task) or "Average", unit, dots(percents, legend)))
    note = "Percent; the best is bold. A dot is a trial; the tick and the figure are the median."
    return "Scores on the dev sets", note, legend, panels, LINE * len(legend)


def annealing_section(stages, tasks, student):
    """Curves: a student's dev scores while it trained, against the final scores of its teachers."""
    scores = scores_of(stages, tasks)
    name = student.removesuffix("-teacher").rpartition("-")[0]
    teacher = f"{name}-teacher" if any(stage.regime == f"{name}-teacher" for stage in stages) else name
    taught = [stage for stage in stages if stage.regime == student and stage.dev]
    weights = [(PLOT * x, TALL * (1 - y)) for x, y in curve(taught[0], "gold_weight")]
    area = path([(0, TALL), *weights, (weights[-1][0], TALL)], "area") + text(PLOT - 14, TALL - 6, "λ", "muted")
    panels = []
    for task in tasks:
        level = [(x, median(scores[task][teacher])) for x in (0, 1) if scores[task][teacher]]
        lines = [(f"{teacher} level", level), (student, dev_curve(taught, task))]
        panels.append((TASKS.get(task, task), "", area + curves(lines, from_zero=False)))
    note = "Percent, medians of the trials. Dashed: the teachers' final score. The area is λ, from 0 to 1."
    return f"{LABELS[student]} while it trained", note, {student: CURVE, teacher: LEVEL}, panels, TALL


def training_section(stages, tasks):
    """Curves: a panel of losses for the models of all tasks and one for those of each task, then both schedules."""
    logged = [stage for stage in stages if stage.training]
    plots = [("All tasks", "in one model", "loss", [stage for stage in logged if not stage.task])]
    plots += [(TASKS.get(task, task), "", "loss", [stage for stage in logged if stage.task == task]) for task in tasks]
    one = {stage.regime: stage for stage in logged}
    plots += [("λ", "weight of the gold labels", "gold_weight", one.values())]
    plots += [("Learning rate", "of the heads", "learning_rate", one.values())]
    panels = []
    for title, unit, name, shown in plots:
        if shown:
            panels.append((title, unit, curves([(stage.regime, curve(stage, name)) for stage in shown])))
    note = "Cross-entropy in nats; squared error for scores. A line is a trial; schedules are of one of them."
    return "Loss per training example, and schedules", note, dict.fromkeys(one, CURVE), panels, TALL


def lay_out(title, note, legend, panels, height):
    """(The drawing of a section, its height). The legend, {regime: mark}, stands left of each line of panels."""
    drawing = text(EDGE, 16, title, "h2") + text(EDGE, 37, note, "muted")
    names = ""
    for index, (regime, mark) in enumerate(legend.items()):
        names += group(group(mark, style=regime) + text(16, 4, LABELS[regime]), EDGE + 4, LINE * (index + 0.5))
    pitch = max(height, LINE * len(legend)) + 62
    for index, (name, unit, content) in enumerate(panels):
        x = PITCH * (index % COLUMNS)
        y = 80 + pitch * (index // COLUMNS)
        drawing += group(names, 0, y) if x == 0 else ""
        drawing += group(text(0, -12, name, "strong", unit) + content, LEFT + x, y)
    return drawing, 62 + pitch * math.ceil(len(panels) / COLUMNS)


def draw(*folders):
    """Draw run directories, several of them pooled, and return the path of the picture, figure.svg in the first."""
    folders = [Path(folder) for folder in folders]
    configs, stages = zip(*map(read_run, folders), strict=True)
    stages = sorted(sum(stages, []), key=lambda stage: list(LABELS).index(stage.regime))
    tasks = configs[0].get("tasks") or sorted({task for stage in stages for task in (stage.task, *stage.scores)} - {""})
    # All models of a task train for equally many steps, but the log of an unfinished one does not tell how many.
    longest = {stage.task: stage.num_steps for stage in sorted(stages, key=lambda stage: stage.num_steps)}
    stages = [stage._replace(num_steps=longest[stage.task]) for stage in stages]
    students = dict.fromkeys(stage.regime for stage in stages if stage.dev and stage.training[0]["gold_weight"] < 1)
    annealing = [annealing_section(stages, tasks, student) for student in students]
    sections = [score_section(stages, tasks), *annealing, training_section(stages, tasks)]
    drawing = ""
    y = 96
    for content, height in (lay_out(*section) for section in sections if section[3]):
        drawing += group(content, 0, y)
        y += height + 16
    seeds = ", ".join(str(config.get("seed", "?")) for config in configs)
    facts = f"tasks {len(tasks)} · trials {len({stage.trial for stage in stages})} · seed {seeds}"
    title = folders[0].resolve().name
    size = f'width="{WIDTH}" height="{y - 24}"'
    top = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - 24}" {size}>\n'
    top += f'<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<rect class="page" {size}/>\n'
    head = text(EDGE, 46, title, "h1") + text(EDGE, 68, facts, "muted")
    picture = folders[0] / "figure.svg"
    picture.write_text(top + head + drawing + "</svg>\n", "utf-8", errors="replace", newline="\n")
    return picture


def main(arguments=None):
    """Draw what the command line names, and print the path of the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run directories; several are pooled")
    folders = parser.parse_args(arguments).folders
    try:
        print(draw(*folders))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
