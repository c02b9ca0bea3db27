"""What bench/serve-load computes: events of a stream, figures of scenarios, rows, and where they are kept. No processes, no network."""

import json
from pathlib import Path
from statistics import median

import rows

SCENARIOS = ["alone", "behind", "clients1", "clients4", "clients8", "shared", "together", "warm"]
RECORD = rows.RECORD / "serve"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- bench/serve-load writes from here -->", "<!-- bench/serve-load writes to here -->"
TITLES = ["load", "apr", "llama.cpp", "times"]
WHAT = {
    ("alone", "first_s"): "64 words alone: first token",
    ("behind", "first_s"): "64 words, 1 s behind 1,500 words: first token",
    ("clients1", "tok_per_s"): "1 client, 64 words and 24 new tokens: total",
    ("clients4", "tok_per_s"): "4 clients",
    ("clients8", "tok_per_s"): "8 clients",
    ("shared", "first_s"): "1,500 words: first token",
    ("shared", "rest_s"): "then seven that begin with them: first token, median",
    ("together", "first_s"): "eight that begin with the same 1,500 words at once: first to get a token",
    ("together", "rest_s"): "the other seven, median",
    ("warm", "first_s"): "the same eight again: first to get a token",
    ("warm", "rest_s"): "the other seven, median again",
}
"""Every figure of a scenario, as people read it."""


def event(line):
    """The JSON of a line of a stream; None for comments, other fields and the end."""
    data = line.decode().strip()
    if not data.startswith("data:") or data[5:].strip() == "[DONE]":
        return None
    return json.loads(data[5:])


def first_and_rest(answers):
    """Seconds to the first token: of the first answer, and the median of the others."""
    return {"first_s": answers[0]["first_s"], "rest_s": median(a["first_s"] for a in answers[1:])}


def make_rows(about, ours, theirs):
    """A row per figure, of `[{scenario: {figure: value}}]` of every round."""
    out = []
    for scenario, figures in ours[0].items():
        for name in figures:
            runs = [[run[scenario][name] for run in side] for side in (ours, theirs)]
            apr, peer = map(median, runs)
            times = apr / peer if name == "tok_per_s" else peer / apr
            row = {**about, "scenario": scenario, "figure": name, "apr": apr, "peer": peer, "times": times}
            out.append({**row, "apr_runs": runs[0], "peer_runs": runs[1]})
    return out


def merge(old, new):
    """Rows in the order of the scenarios, new ones in place of older ones of the same model, threads and figure."""
    key = lambda row: (row["model"], row["threads"], row["scenario"], row["figure"])
    kept = {key(row): row for row in [*old, *new]}
    order = list(WHAT)
    return sorted(kept.values(), key=lambda row: (row["model"], row["threads"], order.index(key(row)[2:])))


def markdown_table(made):
    def figure(row, side):
        return f"{row[side]:.1f} tok/s" if row["figure"] == "tok_per_s" else f"{row[side]:.2f} s"

    lines = [TITLES, ["---"] * len(TITLES)]
    for row in made:
        lines.append([WHAT[row["scenario"], row["figure"]], figure(row, "apr"), figure(row, "peer"), f"{row['times']:.1f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page_with(page, made):
    """The page's text with a table per model and number of threads between its two marks."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    out = []
    for of in dict.fromkeys((row["model"], row["threads"]) for row in made):
        table = markdown_table([row for row in made if (row["model"], row["threads"]) == of])
        out.append(f"`{of[0]}`, {of[1]} threads:\n\n{table}\n")
    return before + BEGIN + "\n\n" + "\n".join(out) + "\n" + END + after


def keep(made, folder=RECORD, page=PAGE):
    """Puts rows into the file of their day, and into the documentation."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{made[0]['date'][:10]}.json"
    old = json.loads(path.read_text()) if path.exists() else []
    made = merge(old, made)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in made) + "\n]\n")
    page.write_text(page_with(page.read_text(), made))
    return path
