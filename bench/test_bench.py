"""Tests of what bench/compare and bench/roofline compute: no network, no model, no timing.

    python3 -m unittest discover -s bench
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree as ET
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import rows


def script(name):
    """A script without an ending, as a module."""
    loader = SourceFileLoader(name, str(HERE / name))
    module = module_from_spec(spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


LIMITS = {"read_gb_per_s": 25.0, "int8_gmac_per_s": 250.0, "int8_mac_per_cycle_per_core": 40.0, "clock_ghz": 3.2}
MACHINE = {"cpu": "ACME 9000 (TM)", "arch": "x86_64", "os": "linux", "cpus": 2, "memory_bytes": 8}


def report(isa="avx2"):
    return {
        "version": "0.1.0", "date": "2026-01-31T10:00:00Z", "device": f"cpu ({isa}, 2 threads)", "model": "m",
        "file_bytes": 10**9, "threads": 2, "isa": isa, "kv": "f16", "machine": MACHINE,
    }


def result(test, rate, mac, size, bound):
    gmac, gb = rate * mac / 1e9, rate * size / 1e9
    return {
        "test": test, "tok_per_s": rate, "mac_per_token": mac, "read_bytes_per_token": size, "gmac_per_s": gmac,
        "gb_per_s": gb, "share_of_read": gb / 25, "share_of_int8": gmac / 250, "bound_by": bound, "limits": LIMITS,
    }


def row(name, rates, peer_rates, mac=5e8, size=5e8, bound="bandwidth", isa="avx2"):
    w = rows.parse_workload(name)
    tried = {s: {"tok_per_s": 10.0 + i, "version": "x 1"} for i, s in enumerate(rows.SETTINGS)}
    tried[rows.SETTINGS[3]] = None
    theirs = [{"tok_per_s": rate, "version": "x 1", "peak_rss_bytes": 5} for rate in peer_rates]
    best = rows.best_setting(tried, w["kind"])
    return rows.make_row(w, report(isa), [result(name, rate, mac, size, bound) for rate in rates], theirs, best, tried)


def load_row():
    tried = {s: {"seconds": 2.0 - i} for i, s in enumerate(rows.SETTINGS[:2])}
    ours = [{"test": "load", "seconds": s, "peak_rss_bytes": 10**9} for s in (0.3, 0.1, 0.2)]
    theirs = [{"seconds": 1.0, "peak_rss_bytes": 4 * 10**9, "version": "x 1"}]
    best = rows.best_setting(tried, "load")
    return rows.make_row(rows.parse_workload("load"), report(), ours, theirs, best, tried)


class Rows(unittest.TestCase):
    def test_workloads_have_the_names_of_apr_bench(self):
        part = lambda name: tuple(rows.parse_workload(name)[k] for k in ("kind", "n", "batch", "depth"))
        self.assertEqual(part("pp2048"), ("pp", 2048, 1, 0))
        self.assertEqual(part("tg64"), ("tg", 64, 1, 0))
        self.assertEqual(part("tg64b8@d4096"), ("tg", 64, 8, 4096))
        self.assertEqual(part("load"), ("load", 1, 1, 0))
        for name in ("", "pp", "pp0", "tg64d4096", "tg64@4096", "pp512b8", "tg64b0", "loads", "tg-1"):
            with self.assertRaisesRegex(ValueError, "no workload"):
                rows.parse_workload(name)

    def test_a_row_is_the_median_of_its_rounds(self):
        made = row("tg64", [10.0, 50.0, 40.0], [20.0, 10.0])
        self.assertEqual(made["apr"]["tok_per_s"], 40.0)
        self.assertEqual(made["apr"]["runs"], [10.0, 50.0, 40.0])
        self.assertEqual(made["peer"]["tok_per_s"], 15.0)
        self.assertAlmostEqual(made["times_as_fast"], 40 / 15)
        self.assertEqual((made["peer"]["setting"], made["peer"]["settings"]["no repack, fa 1"]), ("no repack, fa 0", None))

    def test_of_load_less_is_better(self):
        made = load_row()
        self.assertEqual((made["apr"]["seconds"], made["peer"]["setting"]), (0.2, "repack, fa 1"))
        self.assertAlmostEqual(made["times_as_fast"], 5.0)
        self.assertEqual([line[0] for line in rows.cells(made)], ["load", "its peak memory"])
        self.assertEqual(rows.cells(made)[1][4], "4.00")

    def test_a_peer_that_always_fails_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "every setting"):
            rows.best_setting({s: None for s in rows.SETTINGS}, "tg")

    def test_tables_say_which_limit(self):
        made = [row("pp512", [200.0], [100.0], size=5e6, bound="compute"), row("tg64", [40.0], [30.0])]
        for table in (rows.text_table(made), rows.markdown_table(made)):
            self.assertIn("40 % of int8 rate", table)
            self.assertIn("80 % of read bandwidth", table)
            self.assertIn("2.00", table)
        self.assertEqual(len({len(line.split("|")) for line in rows.markdown_table(made).splitlines()}), 1)

    def test_a_record_keeps_a_row_per_workload(self):
        first = rows.merge(None, MACHINE, [row("tg64", [1.0], [1.0]), row("pp512", [1.0], [1.0])])
        second = rows.merge(first, MACHINE, [row("tg64", [2.0], [1.0]), load_row()])
        self.assertEqual([r["workload"] for r in second["rows"]], ["tg64", "pp512", "load"])
        self.assertEqual(second["rows"][0]["apr"]["tok_per_s"], 2.0)
        self.assertEqual(json.loads(rows.dumps(second)), second)
        other = rows.merge(second, MACHINE, [row("tg64", [3.0], [1.0], isa="avx512-vnni")])
        self.assertEqual([r["apr"]["tok_per_s"] for r in other["rows"] if r["workload"] == "tg64"], [2.0, 3.0])
        self.assertEqual([some[0]["isa"] for some in script("roofline").groups(other)], ["avx512-vnni", "avx2"])
        with self.assertRaisesRegex(ValueError, "ACME"):
            rows.merge(first, {**MACHINE, "cpu": "other"}, [])

    def test_a_record_is_named_by_date_and_cpu(self):
        path = rows.record_path("2026-01-31T10:00:00Z", MACHINE["cpu"], Path("r"))
        self.assertEqual(path, Path("r/2026-01-31-acme-9000-tm.json"))
        with tempfile.TemporaryDirectory() as folder:
            for name in ("2026-01-31-a.json", "2025-12-31-z.json"):
                (Path(folder) / name).write_text('{"schema": "other"}')
            paths = rows.newest_first(Path(folder))
            self.assertEqual([path.name for path in paths], ["2026-01-31-a.json", "2025-12-31-z.json"])
            with self.assertRaisesRegex(ValueError, "apr.record/1"):
                rows.read(paths[0])


class Roofline(unittest.TestCase):
    def test_a_picture_shows_every_row_below_the_roof(self):
        roofline = script("roofline")
        made = [row("pp512", [200.0], [100.0], size=5e6, bound="compute"), row("tg64", [40.0], [30.0]), load_row()]
        picture = roofline.draw({"machine": MACHINE}, made)
        svg = ET.fromstring(picture)
        name = "{http://www.w3.org/2000/svg}"
        dots = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter(name + "circle")]
        self.assertEqual(len(dots), 2)
        corner = [tuple(map(float, p.split(","))) for p in svg.find(name + "polyline").get("points").split()]
        # The roof rises to its edge and is flat from there; a dot lies below it, which is a larger y.
        self.assertTrue(corner[0][1] > corner[1][1] == corner[2][1])
        for x, y in dots:
            on_roof = corner[1][1] + max(0, corner[1][0] - x) * (corner[0][1] - corner[1][1]) / (corner[1][0] - corner[0][0])
            self.assertTrue(y > on_roof and roofline.LEFT <= x <= roofline.WIDTH and y <= roofline.HEIGHT)
        self.assertIn("prefers-color-scheme: dark", picture)
        with self.assertRaisesRegex(ValueError, "nothing to draw"):
            roofline.draw({"machine": MACHINE}, [load_row()])

    def test_the_documentation_shows_the_records(self):
        done = subprocess.run([sys.executable, HERE / "roofline", "--check"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)


class Compare(unittest.TestCase):
    def test_what_apr_is_asked_for(self):
        compare = script("compare")
        asked = []
        compare.run = lambda command: asked.append([str(c) for c in command]) or {"results": [{"test": "tg64b8@d4096"}]}

        class Args:
            under, apr, model, reps, threads, isa = "nice -n 5", "apr", "m.gguf", 3, 2, "avx2"

        compare.run_apr(Args, rows.parse_workload("tg64b8@d4096"))
        wanted = "nice -n 5 apr bench m.gguf -p 0 -n 64 -d 4096 -b 8 -r 3 --threads 2 --kv f16 --json --isa avx2 --no-load"
        self.assertEqual(asked, [wanted.split()])
        with self.assertRaisesRegex(compare.Failed, "expected pp512"):
            compare.run_apr(Args, rows.parse_workload("pp512"))

    def test_what_is_no_record_is_said_before_measuring(self):
        with tempfile.TemporaryDirectory() as folder:
            wrong = Path(folder) / "m.gguf"
            wrong.write_bytes(b"GGUF\xff")
            for file, word in ((wrong, "m.gguf is no record"), (Path(folder) / "none.json", "none.json")):
                args = ["m.gguf", "--record-into", file]
                done = subprocess.run([sys.executable, HERE / "compare", *args], capture_output=True, text=True)
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertIn(word, done.stderr)
                self.assertNotIn("Traceback", done.stderr)
                self.assertNotIn("apr-cli", done.stderr)
            self.assertEqual(wrong.read_bytes(), b"GGUF\xff")

    def test_neighbours_keep_to_a_core_each_while_they_are_wanted(self):
        children = lambda: Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        last = max(os.sched_getaffinity(0))
        with script("compare").neighbours(1):
            (pid,) = children()
            until = time.monotonic() + 10
            while os.sched_getaffinity(int(pid)) != {last} and time.monotonic() < until:
                time.sleep(0.01)
            self.assertEqual(os.sched_getaffinity(int(pid)), {last})
        self.assertEqual(children(), [])

    def test_wrong_arguments_are_usage(self):
        for args, word in (
            (["--workloads", "x"], "no workload"),
            (["--rounds", "0"], "at least 1"),
            (["--reps", "0"], "--reps"),
            (["--neighbours", "100000"], "--neighbours is 100000"),
            (["--neighbours", "1", "--record"], "a record is of a machine without"),
        ):
            done = subprocess.run([sys.executable, HERE / "compare", "m.gguf", *args], capture_output=True, text=True)
            self.assertEqual(done.returncode, 2)
            self.assertIn(word, done.stderr)


if __name__ == "__main__":
    unittest.main()
