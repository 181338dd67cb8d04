"""The files and tables that figures end in."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import environment as environment_module
from benchmarks.environment import ROOT, environment, last_level_cache, write_json, write_sections
from benchmarks.report import MODEL, model_table, print_case, readme_table, table_in, update_readme

FIGURES = ROOT / "benchmarks" / "results" / "cpu.json"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
MADE_WITH = {
    **{"commit": "0123456789abcdef", "dirty": False, "torch": "2.99.0"},
    **{"processor": "A processor", "isa": "AVX9", "threads": 2},
}


def make_row(mode, ours=2.0, dtype="float32", headline=True):
    def figures(milliseconds, peak):
        row = {"median_ms": milliseconds, "q20_ms": milliseconds, "q80_ms": milliseconds, "runs": 5}
        return row | {"bytes_per_s": 4e9, "flop_per_s": None, "peak_bytes": peak}

    ratio = {"q20": 6.9, "median": 7.04, "q80": 7.2, "runs": 5}
    return {
        **{"case": "300 proposals", "dtype": dtype, "device": "cpu", "mode": mode, "headline": headline},
        **{"passed": True, "gate": {"native": {"passed": True}}, "ungated": {"torchvision": "rounds"}},
        "implementations": {"native": figures(ours, 25 * 2**20), "reference": figures(14.08, 100 * 2**20)},
        "ratios": {"torchvision": ratio | {"median": 8.26}, "reference": ratio},
    }


def make_report(**changes):
    rows = [make_row("forward"), make_row("backward"), make_row("both"), make_row("forward", headline=False)]
    rows[-1]["case"] = "3 proposals"
    return {"environment": MADE_WITH | changes, "operators": {"pool": {"ceilings": {}, "cases": rows}}}


def test_table_of_the_readme():
    *table, empty, machine, made_by = readme_table(make_report()).splitlines()
    speed = "8.3x torchvision, 7.0x reference"
    assert table[2:] == [f"| `pool` | 300 proposals | float32 | {speed} | {speed} | 25% of eager's |"]
    assert empty == ""
    assert "A processor (AVX9), 2 threads, torch 2.99.0, commit 0123456;" in machine
    assert "python -m benchmarks --json benchmarks/results/cpu.json --readme" in made_by
    assert "0123456 with changes" in readme_table(make_report(dirty=True))
    assert "commit unknown" in readme_table(make_report(commit=None))
    assert "A processor" not in readme_table(make_report(gpu="A GPU"))


def test_types_have_rows_of_their_own_and_missing_modes_a_dash():
    report = make_report()
    report["operators"]["pool"]["cases"] = [make_row("forward"), make_row("forward", dtype="bfloat16")]
    lines = readme_table(report).splitlines()
    assert [line.split(" | ")[2] for line in lines[2:4]] == ["float32", "bfloat16"]
    assert all(" | – | " in line for line in lines[2:4])


def test_readme_is_changed_between_the_markers_only(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    update_readme(path, readme_table(make_report()))
    assert path.read_text() == f"# Title\n\n{BEGIN}\n{readme_table(make_report())}\n{END}\n\nafter\n"
    update_readme(path, readme_table(make_report()))
    assert table_in(path) == readme_table(make_report())


@pytest.mark.parametrize("text", ["# Title\n", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_readme_without_a_place_for_the_table(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="each once and on lines of their own"):
        update_readme(path, readme_table(make_report()))
    assert path.read_text() == text


def test_the_table_of_the_readme_is_that_of_the_committed_figures():
    expected = readme_table(json.loads(FIGURES.read_text()))
    assert table_in(ROOT / "README.md") == expected, "run `python -m benchmarks --readme`"


def test_the_tables_of_the_readme_are_apart(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"{BEGIN}\nold\n{END}\n<!-- model:begin -->\nolder\n<!-- model:end -->\n")
    update_readme(path, "new", MODEL)
    assert (table_in(path), table_in(path, MODEL)) == ("old", "new")


def make_model_report():
    parts = {part: {"median": 1.0} for part in ("whole", "backbone+FPN", "head")}
    times = {"parts": parts, "start_up_s": 3.21, "peak_rss_gib": 1.234}
    rows = {
        "reference": times | {"ratios": {}},
        "optimized": times | {"ratios": {"whole": 1.996, "backbone+FPN": 1.5, "head": 3.0}},
        "peer": times | {"ratios": {"whole": 0.7}},
    }
    return {"preset": "r50_300", "size": [800, 1333], "environment": MADE_WITH, "implementations": rows}


def test_table_of_the_model():
    *table, empty, machine, made_by = model_table(make_model_report()).splitlines()
    assert table[2:] == [
        "| reference | 1 | 1 | 1 | 3.2 s | 1.23 GiB |",
        "| optimized | 2.00x | 1.50x | 3.00x | 3.2 s | 1.23 GiB |",
        "| peer | 0.70x | – | – | 3.2 s | 1.23 GiB |",
    ]
    assert (
        empty == "" and machine.startswith("Preset `r50_300`, one image of 800x1333,") and "commit 0123456" in machine
    )
    assert made_by == "`python -m benchmarks.model --compile --json benchmarks/results/cpu.json --readme`."


def test_the_models_table_of_the_readme_is_that_of_the_committed_figures():
    report = json.loads(FIGURES.read_text())["model"]
    assert report["passed"] and all(row["passed"] for row in report["gate"].values())
    expected = model_table(report)
    assert table_in(ROOT / "README.md", MODEL) == expected, "run `python -m benchmarks.model --readme`"


def test_committed_figures_passed_their_gate():
    report = json.loads(FIGURES.read_text())
    assert report["failed"] == []
    rows = [row for result in report["operators"].values() for row in result["cases"]]
    assert rows and all(row["passed"] and row["device"] == "cpu" for row in rows)


def test_table_on_the_terminal(capsys):
    print_case("pool", make_row("forward"), {"copy_bytes_per_s": 8e9, "gemm_flop_per_s": 1e12})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "pool: 300 proposals, float32, cpu, forward"
    assert lines[2].split()[:2] == ["native", "2.000"]
    assert "4.0 GB/s  50.0%" in lines[2] and "25.0 MiB" in lines[2]
    assert "7.04x" in lines[3]
    assert lines[4] == "  torchvision is not compared: rounds"


def test_environment_names_the_versions_and_the_machine():
    record = environment(torch.device("cpu"))
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["isa"] == torch.backends.cpu.get_cpu_capability()
    assert record["processor"] and record["python"] and record["date"]
    assert "gpu" not in record
    json.dumps(record)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one commit, with figures in it."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "cpu.json").write_text("{}")
    (tmp_path / "code.py").write_text("1\n")
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(environment_module, "ROOT", tmp_path)
    return tmp_path


def test_sections_leave_the_others_of_their_file(tmp_path):
    write_sections(tmp_path / "cpu.json", environment=MADE_WITH, operators={"pool": 1})
    write_sections(tmp_path / "cpu.json", model={"passed": True})
    write_sections(tmp_path / "cpu.json", operators={"pool": 2})
    expected = {"environment": MADE_WITH, "operators": {"pool": 2}, "model": {"passed": True}}
    assert json.loads((tmp_path / "cpu.json").read_text()) == expected


def test_a_tree_is_dirty_when_more_than_figures_changed(repository):
    record = environment()
    assert len(record["commit"]) == 40 and record["dirty"] is False
    (repository / "benchmarks" / "results" / "cpu.json").write_text("[]")
    assert environment()["dirty"] is False
    (repository / "new.py").write_text("2\n")
    assert environment()["dirty"] is True


def test_a_tree_without_its_repository_is_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(environment_module, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc")
    assert (environment()["commit"], environment()["dirty"]) == ("abc", None)
    monkeypatch.delenv("BENCHMARK_COMMIT")
    assert environment()["commit"] is None


def test_last_level_cache_is_the_outermost(tmp_path, monkeypatch):
    for index, size in enumerate(["32K", "1024K", "24M"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    monkeypatch.setattr(environment_module, "Path", lambda path: tmp_path)
    assert last_level_cache(torch.device("cpu")) == 24 * 2**20
    monkeypatch.setattr(environment_module, "Path", lambda path: tmp_path / "none")
    assert last_level_cache(torch.device("cpu")) == environment_module.FALLBACK_CACHE


def test_all_operators_end_in_one_file(tmp_path, monkeypatch):
    """Each in a process of its own; one that breaks leaves the others their figures."""
    commands = []

    def run(arguments, **options):
        commands.append(arguments)
        operator = arguments[2].removeprefix("benchmarks.")
        if operator == "broken":
            return SimpleNamespace(returncode=-11)
        rows = {"ceilings": {}, "cases": [make_row("forward") | {"passed": operator != "red"}]}
        write_json(arguments[-1], {"environment": MADE_WITH, "operators": {operator: rows}})
        return SimpleNamespace(returncode=int(operator == "red"))

    monkeypatch.setattr(command.subprocess, "run", run)
    path = tmp_path / "all.json"
    assert command.run_all(["pool", "broken", "red", "add"], ["--quick"], path) == ["broken", "red"]
    report = json.loads(path.read_text())
    assert list(report["operators"]) == ["pool", "red", "add"]
    assert report["failed"] == ["broken", "red"]
    assert report["environment"] == MADE_WITH
    assert all(arguments[3] == "--quick" for arguments in commands)


def test_flags_reach_every_operator(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "run_all", lambda names, flags, target: seen.append((names, flags, target)) or [])
    assert command.main(["--dtype", "float16", "--quick", "--compile", "--case", "300"]) == 0
    assert seen == [
        (
            command.names(),
            ["--device", "cpu", "--dtype", "float16", "--case", "300", "--quick", "--compile"],
            None,
        )
    ]


def test_readme_alone_measures_nothing(tmp_path, monkeypatch):
    updated = []
    monkeypatch.setattr(command, "run_all", lambda *arguments: pytest.fail("measured"))
    monkeypatch.setattr(command, "FIGURES", tmp_path / "cpu.json")
    monkeypatch.setattr(command, "update_readme", lambda path, table: updated.append((path, table)))
    write_json(tmp_path / "cpu.json", make_report())
    assert command.main(["--readme"]) == 0
    assert updated == [(ROOT / "README.md", readme_table(make_report()))]


def test_red_figures_do_not_reach_the_readme(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "run_all", lambda *arguments: ["pool"])
    monkeypatch.setattr(command, "update_readme", lambda *arguments: pytest.fail("written"))
    assert command.main(["--readme", "--json", str(tmp_path / "x.json")]) == 1
