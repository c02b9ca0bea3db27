"""Rows of a comparison: what is measured, medians, ratios, tables, and the dated files they are kept in. No processes, no models."""

import json
import re
from pathlib import Path
from statistics import median

SCHEMA = "apr.record/1"
RECORD = Path(__file__).parent / "record"
SETTINGS = [(repack, fa) for repack in (True, False) for fa in (0, 1)]
"""What llama.cpp is tried with: weights repacked at load or not, flash attention or not."""


def parse_workload(name):
    """Kind, tokens, sequences and depth of a test, by the name `apr bench` gives it."""
    if name == "load":
        return {"name": name, "kind": "load", "n": 1, "batch": 1, "depth": 0}
    found = re.fullmatch(r"(pp|tg)([1-9]\d*)(?:b([1-9]\d*))?(?:@d([1-9]\d*))?", name)
    if found is None or (found[1] == "pp" and found[3]):
        raise ValueError(f"no workload is called '{name}'; they are called pp512, tg64, tg64b8, tg64@d4096, load")
    return {"name": name, "kind": found[1], "n": int(found[2]), "batch": int(found[3] or 1), "depth": int(found[4] or 0)}


def setting_name(setting):
    return f"{'repack' if setting[0] else 'no repack'}, fa {setting[1]}"


def figure(kind):
    """The name of what is compared, and whether more of it is better."""
    return ("seconds", False) if kind == "load" else ("tok_per_s", True)


def best_setting(tried, kind):
    """The best of `{setting: result}`, where a result is None for a setting that failed."""
    name, more_is_better = figure(kind)
    worked = {setting: result[name] for setting, result in tried.items() if result is not None}
    if not worked:
        raise ValueError("llama.cpp failed with every setting")
    return (max if more_is_better else min)(worked, key=worked.get)


def medians(runs):
    """The median of every figure of some runs, next to the runs' own values; what is no number is that of the first run."""
    out = {}
    for name, value in runs[0].items():
        is_number = all(type(run.get(name)) in (int, float) for run in runs)
        out[name] = median(run[name] for run in runs) if is_number else value
    return out


def make_row(workload, report, ours, theirs, setting, tried):
    """A row of a record: `report` is an `apr bench --json`, `ours` its results and `theirs` the peer's, of every round."""
    name, more_is_better = figure(workload["kind"])
    apr, peer = medians(ours), medians(theirs)
    apr.update(version=report["version"], device=report["device"], runs=[run[name] for run in ours])
    peer.update(setting=setting_name(setting), runs=[run[name] for run in theirs])
    peer["settings"] = {setting_name(s): None if r is None else r[name] for s, r in tried.items()}
    row = {"workload": workload["name"], "model": report["model"], "file_bytes": report["file_bytes"]}
    row.update(threads=report["threads"], isa=report["isa"], kv=report["kv"], date=report["date"], apr=apr, peer=peer)
    row["times_as_fast"] = apr[name] / peer[name] if more_is_better else peer[name] / apr[name]
    return row


def merge(record, machine, rows):
    """Rows put into a record of the same machine, in place of older ones of the same workload, model, threads and instructions."""
    record = record or {"schema": SCHEMA, "machine": machine, "rows": []}
    if record["machine"]["cpu"] != machine["cpu"]:
        raise ValueError(f"the record is of {record['machine']['cpu']}, this is {machine['cpu']}")
    key = lambda row: (row["model"], row["threads"], row["isa"], row["workload"])
    new = {key(row): row for row in rows}
    kept = [new.pop(key(row), row) for row in record["rows"]]
    return {**record, "rows": kept + list(new.values())}


def record_path(date, cpu, folder=RECORD):
    """`YYYY-MM-DD-cpu.json`, of a date and time and a CPU's own name."""
    return folder / f"{date[:10]}-{re.sub('[^a-z0-9]+', '-', cpu.lower()).strip('-')}.json"


def newest_first(folder=RECORD):
    paths = sorted(folder.glob("*.json"), reverse=True)
    if not paths:
        raise ValueError(f"no record in {folder}: bench/compare --record writes one")
    return paths


def read(path):
    try:
        record = json.loads(Path(path).read_text())
    except ValueError as e:
        raise ValueError(f"{path} is no record: {e}") from e
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {record.get('schema')!r}, expected {SCHEMA!r}")
    return record


def dumps(record):
    """A record as text, a row a line, so that a change of one is a change of one line."""
    head = {k: v for k, v in record.items() if k != "rows"}
    rows = ",\n".join("  " + json.dumps(row) for row in record["rows"])
    return json.dumps(head)[:-1] + ', "rows": [\n' + rows + "\n]}\n"


def cells(row):
    """A row as people read it: lines of workload, ours, theirs, how many times as fast or small, share of the limit."""
    apr, peer = row["apr"], row["peer"]
    times = lambda x: f"{x:.2f}"
    if row["workload"] == "load":
        lines = [["load", f"{apr['seconds']:.3f} s", f"{peer['seconds']:.3f} s", times(row["times_as_fast"]), ""]]
        if apr.get("peak_rss_bytes") and peer.get("peak_rss_bytes"):
            gb = [run["peak_rss_bytes"] / 1e9 for run in (apr, peer)]
            lines.append(["its peak memory", f"{gb[0]:.2f} GB", f"{gb[1]:.2f} GB", times(gb[1] / gb[0]), ""])
    else:
        shares = {"bandwidth": ("share_of_read", "read bandwidth"), "compute": ("share_of_int8", "int8 rate")}
        share, of = shares.get(apr["bound_by"], (None, None))
        limit = f"{100 * apr[share]:.0f} % of {of}" if share else ""
        rates = [f"{run['tok_per_s']:.1f} tok/s" for run in (apr, peer)]
        lines = [[row["workload"], *rates, times(row["times_as_fast"]), limit]]
    return [[*line[:3], peer["setting"], *line[3:]] for line in lines]


TITLES = ["test", "apr", "llama.cpp", "at its best with", "times", "share of the limit"]


def text_table(rows):
    lines = [TITLES] + [line for row in rows for line in cells(row)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(TITLES))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def markdown_table(rows):
    lines = [TITLES, ["---"] * len(TITLES)] + [line for row in rows for line in cells(row)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
