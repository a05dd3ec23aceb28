"""The script of GPU benchmarks: its parts exist, end in time, and take the options that it gives them."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def parts(device):
    listed = subprocess.run(
        [ROOT / "benchmarks" / "on_gpu.sh", "--list"],
        env=os.environ | {"DEVICE": device},
        capture_output=True,
        text=True,
        check=True,
    )
    return [
        (name, int(limit), command) for name, limit, command in (p.split(" ", 2) for p in listed.stdout.splitlines())
    ]


def test_all_parts_together_end_within_six_minutes():
    assert sum(limit for _, limit, _ in parts("cuda")) <= 360


def test_the_smoke_mode_has_the_same_parts():
    assert [name for name, *_ in parts("cpu")] == [name for name, *_ in parts("cuda")]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_parts_name_scripts_that_exist_and_options_that_they_have(device):
    shared = (ROOT / "benchmarks" / "side_by_side.py").read_text(encoding="utf-8")
    for name, _, command in parts(device):
        script = re.search(r"\S+\.py", command)[0]
        assert (ROOT / script).is_file(), name
        if name != "tests":
            source = (ROOT / script).read_text(encoding="utf-8") + shared
            for option in re.findall(r"--[\w-]+", command):
                assert f'"{option}"' in source, (name, option)
