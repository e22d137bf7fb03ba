"""`bench.py gpu`: rehearsed on the CPU in small sizes, stopped, and kept to what it may need."""

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from launch.benchmarks import gpu
from launch.gpu import running
from launch.gpu.page import page
from launch.gpu.parts import ROOT, Part, gpu_tests, parts
from launch.gpu.running import Running, Stop, read_checks


def start(out, *words):
    command = [sys.executable, "launch/bench.py", "gpu", "--out", str(out), "--device", "cpu", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_part_is_rehearsed_and_its_figures_are_in_both_files(tmp_path):
    process = start(tmp_path / "gpu", "--only", "stage1")
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    result = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert json.loads(printed)["parts"] == result["parts"] and result["rehearsal"]
    (part,) = result["parts"]
    assert (part["name"], part["outcome"]) == ("stage1", "done") and len(part["result"]["cases"]) == 2
    text = (tmp_path / "gpu" / "gpu.md").read_text()
    assert "rehearsal" in text and str(part["result"]["cases"][0]["samples_per_s"]) in text
    assert {path.name for path in (tmp_path / "gpu").iterdir()} == {"gpu.json", "gpu.md", "gpu.log"}


def test_a_run_that_is_stopped_keeps_what_it_has_and_leaves_no_process(tmp_path):
    process = start(tmp_path, "--only", "rerank", "stage1")
    while not (tmp_path / "stage1.part.txt").exists():  # The first part is done.
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    first, second = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert (first["outcome"], second["outcome"]) == ("done", "stopped from outside")
    assert first["result"]["rerank"]["seconds"] > 0 and second["result"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "gpu.log"}


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run_part(folder, code, limit_s=60.0, **settings):
    with (folder / "log").open("w") as log:
        running = Running(Part("some", 60, ["-c", code], **settings), folder, limit_s, log)
        running.run(Stop())
        report = running.report()
        running.clear()
    return report, (folder / "log").read_text()


def test_a_part_at_its_limit_is_stopped_with_its_children_and_its_rows_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "GRACE_S", 0.2)
    code = (
        "import json, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "pathlib.Path(sys.argv[2]).write_text(json.dumps({'rows': [child.pid]}))\n"
        "time.sleep(600)"
    )
    report, _ = run_part(tmp_path, code, limit_s=10.0, writes=True)
    assert report["outcome"] == "stopped at its limit of 10 s"
    (child,) = report["result"]["rows"]
    deadline = time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_part_that_fails_says_so_and_what_it_printed_is_in_the_log(tmp_path):
    report, log = run_part(tmp_path, "print('no result'); raise SystemExit(3)")
    assert (report["outcome"], report["result"]) == ("failed with exit code 3", None)
    assert "no result" in log


def test_failed_and_skipped_checks_are_named(tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('no card')\n"
    )
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", str(tmp_path)]
    subprocess.run(command, capture_output=True, cwd=tmp_path)
    assert read_checks(junit) == {
        "passed": 1,
        "failed": ["test_three::test_b"],
        "skipped": {"test_three::test_c": "no card"},
    }
    assert read_checks(tmp_path / "none.xml") is None


def test_a_page_is_made_of_whatever_there_is():
    facts = {"device": "card", "date": "2026-01-01", "torch": "2", "python": "3", "commit": "c", "seconds": 1}
    row = {"model": "vit", "image_size": [256, 128], "batch": 64, "mode": "graphs", "error": "RuntimeError: none"}
    steps = {"precision": "bf16", "matmul_peak_tflops": 700.0, "rows": [row]}
    reports = [
        {"name": "stage2", "outcome": "stopped at its limit of 9 s", "seconds": 9, "result": steps},
        {"name": "feed", "outcome": "left out: no time left", "seconds": 0, "result": None},
    ]
    text = page({**facts, "rehearsal": False, "parts": reports})
    assert "stopped at its limit of 9 s" in text and "RuntimeError: none" in text and "rehearsal" not in text


def test_the_page_says_how_far_the_aims_are_reached_and_when_compiling_pays():
    facts = {"device": "card", "date": "2026-01-01", "torch": "2", "python": "3", "commit": "c", "seconds": 1}

    def row(mode, batch, images_per_s, share, first_s=0.5):
        case = {"model": "vit", "image_size": [256, 128], "batch": batch, "mode": mode, "peak_memory_bytes": 1e9}
        speed = {"images_per_s": images_per_s, "share_of_peak": share, "times_plain": images_per_s / 1000}
        return case | speed | {"first_steps_s": first_s}

    def part(name, *rows):
        result = {"precision": "bf16", "matmul_peak_tflops": 700.0, "rows": list(rows)}
        return {"name": name, "outcome": "done", "seconds": 9, "result": result}

    eager = [row("plain", 64, 1000, 0.1), row("eager", 64, 2000, 0.2), row("eager", 256, 2500, 0.25)]
    compiled = [row("compiled", 64, 4000, 0.4, first_s=32.0), row("compiled", 256, 2000, 0.2)]
    text = page({**facts, "rehearsal": False, "parts": [part("stage2", *eager), part("compiled", *compiled)]})
    assert "batch 64, aim 3 times the plain loop: 4.0 (vit, compiled)" in text
    assert "batch 256, aim 0.5 of the peak: 0.25 (vit, eager)" in text
    assert "compiling vit, batch 64: pays after 2,000 steps" in text
    assert "compiling vit, batch 256: never pays" in text


def test_all_parts_fit_into_the_time_but_for_the_last_which_takes_what_is_left(tmp_path):
    *before, last = parts(False, tmp_path)
    assert sum(part.limit_s for part in before) <= 8 * 60 - 20 and last.name == "compiled"
    assert [part.name for part in parts(False, tmp_path)] == [part.name for part in parts(True, tmp_path)]


def test_the_checks_are_all_tests_marked_gpu():
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"@on_gpu|, DEVICES\)|mark\.gpu", path.read_text()) and path.name != "test_gpu_run.py"
    }
    assert marked == set(gpu_tests()) and len(marked) >= 6


def test_the_list_of_packages_has_the_versions_of_the_lock_file_and_neither_ray_nor_deepspeed():
    listed = re.findall(r"^([\w-]+==\S+)$", (ROOT / gpu.PACKAGES).read_text(), re.MULTILINE)
    locked = set(re.findall(r"^([\w-]+==\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    assert len(listed) > 20 and not set(listed) - locked
    assert not {"ray", "deepspeed", "torch"} & {line.split("==")[0] for line in listed}


def test_a_package_that_is_not_there_is_named_with_the_list(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "missing_packages", lambda: ["simplejpeg", "webdataset"])
    with pytest.raises(SystemExit) as stop:
        gpu.run(["--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "lacks simplejpeg, webdataset" in error and gpu.PACKAGES in error
    assert gpu._installed("torch") and not gpu._installed("no-such-package")
