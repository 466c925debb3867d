"""What ten SIGKILLs cost: clipmill beside other tools that cut videos into clips.

    python benchmarks/kills.py [--venv NAME=FOLDER ...] [--make-venvs FOLDER] [--tools NAME ...]

Each tool turns the same 500 small videos, 20 of them damaged in ten ways, into clips of 16 frames at 64 x 64: once
undisturbed, and once with ten kills. Half of the kills end the driver with all its processes, half end one busy worker.
After each kill, the tool continues in its own documented way. Kills come at the same fractions of each tool's own
undisturbed run. Then every clip is decoded; marks in its frames show which clips are lost, doubled or wrong. The
benchmark makes videos and reference itself, without clipmill.

Each other tool runs in its own virtual environment: name existing ones (``--venv ray-data=/venvs/ray``), or let
``--make-venvs`` install them (``--first torch==2.13.0`` installs a package first, such as a CPU build of torch).
video2dataset, data-juicer and NeMo Curator need ``ffmpeg`` on the path.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from killing.attempts import Kill, Outcome, kill_schedule, run, run_killed
from killing.footage import Footage
from killing.judge import Verdict, judge
from killing.tools import TOOLS, Tool

HERE = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 1800
INSTALL_LIMIT_SECONDS = 2700


# ------------------------------------------------------------------------------------------------ virtual environments


def make_venv(folder: Path, first: list[str], requirements: tuple[str, ...]) -> str | None:
    """Makes a virtual environment; returns pip's error line where something does not install."""
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for wanted in (first, list(requirements)):
        if not wanted:
            continue
        try:
            done = subprocess.run(
                [str(folder / "bin" / "pip"), "install", "--quiet", *wanted],
                capture_output=True,
                text=True,
                timeout=INSTALL_LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"pip install {' '.join(wanted)} takes more than {INSTALL_LIMIT_SECONDS // 60} minutes"
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return (errors or done.stderr.splitlines() or ["pip failed without a word"])[-1]
    return None


def version(python: Path, distribution: str) -> str:
    code = f"from importlib.metadata import version; print(version({distribution!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or "?"


# ------------------------------------------------------------------------------------------------------------ measuring


class Drill:
    """One tool's runs over the footage.

    Args:
        tool: the tool.
        python: of its environment.
        work: a folder of its own; it is emptied.
    """

    def __init__(self, tool: Tool, python: Path, work: Path) -> None:
        self._tool, self._python, self._work = tool, python, work
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        # Sockets of Ray must have short names, so its folder is not below `work`.
        self._ray = Path(tempfile.mkdtemp(prefix="kills-"))
        self._environment = {
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # as where the environment is activated
            "PYTHONPATH": str(HERE),
            "RAY_TMPDIR": str(self._ray),
            "RAY_ADDRESS": "local",  # never a cluster that somebody else runs
            "RAY_AUTH_MODE": "disabled",  # a token in the home folder would be asked for, and not sent by every tool
            "RAY_USAGE_STATS_ENABLED": "0",
            # A busy machine is no fault of the tool: a node has these seconds to start, its agent and each worker too.
            "RAY_raylet_start_wait_time_s": "300",
            "RAY_agent_register_timeout_ms": "300000",
            "RAY_worker_register_timeout_seconds": "300",
        }

    def close(self) -> None:
        shutil.rmtree(self._ray, ignore_errors=True)

    def measure(self, footage: Footage, schedule: list[Kill]) -> dict[str, object]:
        few = self._run("few", footage.few)
        if few.status != 0:
            return {
                "refused": f"does not get through two intact videos: status {few.status}, see {self._log('few').name}"
            }
        videos, name, stoppers = footage.folder, "undisturbed", list[str]()
        undisturbed = self._run(name, videos)
        if undisturbed.status != 0:
            stoppers = self._find_stoppers(footage)
            videos, name = footage.without(stoppers, self._work / "spared"), "undisturbed-spared"
            undisturbed = self._run(name, videos)
        result: dict[str, object] = {
            "stopped_by": stoppers,
            "startup": asdict(few),
            "undisturbed": self._judged(name, undisturbed, footage),
        }
        if undisturbed.status != 0:
            return result
        killed = run_killed(
            self._command("killed", videos),
            self._log("killed"),
            self._environment,
            self._tool.workers,
            schedule,
            startup_seconds=few.seconds,
            work_seconds=max(undisturbed.seconds - few.seconds, 1.0),
        )
        result["killed"] = self._judged("killed", killed, footage)
        result["slowdown"] = round(killed.seconds / undisturbed.seconds, 2)
        return result

    def _find_stoppers(self, footage: Footage) -> list[str]:
        """Kinds of damage that stop the tool, each tried beside two intact videos."""
        stoppers = []
        for kind in dict.fromkeys(footage.damage_of.values()):
            others = [other for other in footage.damage_of.values() if other != kind]
            name = kind.replace(" ", "-")
            if self._run(name, footage.without(others, self._work / f"with-{name}", num_intact=2)).status != 0:
                stoppers.append(kind)
        return stoppers

    def _command(self, name: str, videos: Path) -> list[str]:
        return self._tool.command(self._python, videos, self._work / name)

    def _log(self, name: str) -> Path:
        return self._work / f"{name}.log"

    def _run(self, name: str, videos: Path) -> Outcome:
        return run(self._command(name, videos), self._log(name), self._environment, LIMIT_SECONDS)

    def _judged(self, name: str, outcome: Outcome, footage: Footage) -> dict[str, object]:
        verdict: Verdict = judge(self._tool.clips(self._work / name), footage)
        return {**asdict(outcome), **asdict(verdict)}


# ------------------------------------------------------------------------------------------------------------ reporting


def show(results: dict[str, dict]) -> None:
    """One table on stderr."""
    header = ("tool", "version", "s alone", "s killed", "ratio", "kills", "starts", "hangs")
    header += ("lost", "doubled", "wrong", "stopped by")
    rows = [header]
    for name, result in results.items():
        alone, killed = result.get("undisturbed"), result.get("killed")
        if alone is None or killed is None:
            rows.append(
                (name, result.get("version", ""), result.get("refused") or f"stopped by {result['stopped_by']}")
            )
            continue
        numbers = (killed[key] for key in ("landed", "starts", "hangs", "lost", "doubled", "wrong"))
        rows.append((
            name, result["version"], f"{alone['seconds']:.0f}", f"{killed['seconds']:.0f}", f"{result['slowdown']:.2f}",
            *map(str, numbers), ", ".join(result["stopped_by"]) or "none",
        ))  # fmt: skip
    for row in rows:
        print("  ".join(cell.ljust(14 if place == 0 else 9) for place, cell in enumerate(row)), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--venv", action="append", default=[], metavar="NAME=FOLDER", help="environment of a peer")
    parser.add_argument("--make-venvs", type=Path, metavar="FOLDER", help="make the missing environments below it")
    parser.add_argument("--first", nargs="*", default=[], metavar="REQUIREMENT", help="installed first in each")
    parser.add_argument(
        "--work",
        type=Path,
        metavar="FOLDER",
        help="keep videos, clips and logs here; videos of an earlier run are used again",
    )
    parser.add_argument("--videos", type=int, default=500)
    parser.add_argument("--damaged", type=int, default=20)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no process of a tool is left
    venvs = {name: Path(folder) for name, _, folder in (venv.partition("=") for venv in arguments.venv)}
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as temporary:
        work = arguments.work or Path(temporary)
        footage = Footage(work, arguments.videos, arguments.damaged, arguments.seed)
        schedule = kill_schedule(arguments.kills, arguments.seed)
        for name in arguments.tools:
            tool, python, refused = TOOLS[name], Path(sys.executable), None
            if name != "clipmill":
                if name not in venvs and arguments.make_venvs:
                    venvs[name] = arguments.make_venvs / name
                    refused = make_venv(venvs[name], arguments.first, tool.requirements)
                elif name not in venvs:
                    refused = "no environment; give --venv or --make-venvs"
                python = venvs.get(name, Path()) / "bin" / "python"
            if refused:
                results[name] = {"refused": refused}
                continue
            drill = Drill(tool, python, work / name)
            try:
                measured = drill.measure(footage, schedule)
            finally:
                drill.close()
            results[name] = {"version": version(python, tool.distribution), "recovery": tool.recovery, **measured}
            print(f"{name}: {json.dumps(results[name])}", file=sys.stderr)
    show(results)
    print(json.dumps({
        "benchmark": "kills", "videos": arguments.videos, "damaged": arguments.damaged, "seed": arguments.seed,
        "load": os.getloadavg()[0], "tools": results,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
