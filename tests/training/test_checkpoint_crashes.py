"""Checkpoints when things go wrong: damage, full disks, kills at any moment; and which ones stay."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mage_fast.errors import CheckpointError, InputError
from mage_fast.training.checkpoints import Checkpoints, read_part, read_state
from mage_fast.training.precision import LossScale


def test_damaged_checkpoints_are_refused_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = {"model": nn.Linear(20, 30)}
    checkpoints = Checkpoints(tmp_path / "c", keep_last=3)
    paths = [checkpoints.save(number, {}, parts) for number in (1, 2, 3)]
    file = paths[2] / "state.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(
            CheckpointError, match=rf"{file.name} is {length} bytes, wanted {len(whole)} bytes"
        ):
            checkpoints.load(paths[2], parts)
    file.write_bytes(b"\x80\x04pickle".ljust(len(whole)))
    with pytest.raises(CheckpointError, match="step-000000003 is damaged: "):
        read_part(paths[2])
    file.unlink()
    with pytest.raises(CheckpointError, match=r"state.safetensors is no file, wanted"):
        read_part(paths[2])
    (paths[1] / "state.json").write_text('{"format"')
    assert checkpoints.latest() == paths[0]
    assert "step-000000003 is damaged: state.safetensors is no file" in caplog.text
    assert "step-000000002 is damaged: state.json is not JSON" in caplog.text
    checkpoints.prune()
    assert checkpoints.paths() == paths, "what cannot be read does not count"
    (paths[0] / "state.json").write_text(json.dumps({"format": "x", "version": 9}))
    with pytest.raises(CheckpointError, match=r"has no checkpoint that is whole: .*is \('x', 9\), wanted"):
        checkpoints.latest()
    (paths[0] / "state.json").write_text('{"format": "mage_fast.checkpoint", "version": 1, "step": 1}')
    with pytest.raises(CheckpointError, match=r"damaged: state.json has no extra, files, optimizers, parts"):
        read_state(paths[0])
    (paths[0] / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"is no checkpoint: cannot read .*state.json: No such file"):
        read_state(paths[0])
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*missing"):
        read_state(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"is no checkpoint: .*Not a directory"):
        read_state(file.parent / "state.json")
    assert Checkpoints(tmp_path / "missing").latest() is None


@pytest.mark.parametrize("limit", [100, 1000])
def test_a_disk_that_fills_up_leaves_the_previous_ones(tmp_path: Path, limit: int) -> None:
    """The file size limit makes writes fail midway, as a full disk does: of tensors, or of JSON."""
    small = {"loss_scale": LossScale()}
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, {}, small)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        for number in (1, 2):
            with pytest.raises(
                CheckpointError, match=rf"cannot write .*step-00000000{number}: .*[Ff]ile too large"
            ):
                checkpoints.save(number, {"long": "x" * 2000}, small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [path] == [checkpoints.latest()]
    assert checkpoints.load(path, small).settings == {}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=7, unique=True).map(sorted),
    keep_last=st.integers(1, 3),
    keep_every=st.none() | st.integers(1, 12),
    damaged=st.sets(st.integers(0, 6)),
)
def test_retention(
    tmp_path: Path, steps: list[int], keep_last: int, keep_every: int | None, damaged: set[int]
) -> None:
    """After every save the newest whole ones are left, what is newer, and the multiples."""
    shutil.rmtree(tmp_path)
    checkpoints = Checkpoints(tmp_path, keep_last=keep_last, keep_every=keep_every)
    whole: set[int] = set()
    wanted: set[int] = set()
    for number, now in enumerate(steps):
        path = checkpoints.save(now, {}, {"loss_scale": LossScale()})
        whole.add(now)
        newest = sorted(whole)[-keep_last:]
        for_ever = {s for s in wanted if keep_every is not None and s % keep_every == 0}
        oldest = newest[0] if len(newest) == keep_last else -1
        wanted = {s for s in wanted | {now} if s >= oldest} | for_ever
        whole &= wanted
        assert [int(path.name.removeprefix("step-")) for path in checkpoints.paths()] == sorted(wanted)
        if number in damaged:
            (path / "state.safetensors").unlink()
            whole.discard(now)
    assert len(list(tmp_path.iterdir())) == len(wanted), "nothing else is left"
    for limits in ({"keep_last": 0}, {"keep_every": 0}):
        with pytest.raises(InputError, match=r"Checkpoints: keep_.* 0.*wanted 1 or more"):
            Checkpoints(tmp_path, **limits)


#: Kills copies of itself at every file operation of a save, then at random moments.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from mage_fast.training.checkpoints import Checkpoints, read_state
torch.set_num_threads(1)
folder = Path(sys.argv[1])
checkpoints = Checkpoints(folder, keep_last=1)
module = torch.nn.Linear(40, 40)

def save(step, writer):
    torch.nn.init.constant_(module.weight, step)
    torch.nn.init.constant_(module.bias, writer)
    checkpoints.save(step, {}, {"model": module}, {"writer": writer})

def child(work):
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process

def killed_at(event):
    left = [event]
    def hook(name, arguments):
        ours = name in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if ours and str(folder) in str(arguments):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    return hook

def check(allowed):
    checkpoints.remove_leftovers()
    path = checkpoints.latest()
    state = checkpoints.load(path, {"model": module})
    found = (state.step, state.extra["writer"])
    assert (module.weight == found[0]).all() and (module.bias == found[1]).all()
    assert allowed(found), found
    assert not list(folder.glob(".*"))
    return found

save(1, 0)
before, events, seen = (1, 0), 0, set()
for replaces in (True, False):
    event, code = 0, signal.SIGKILL
    while code == signal.SIGKILL:
        event += 1
        new = (before[0] + (not replaces), event)
        def work():
            sys.addaudithook(killed_at(event))
            save(*new)
        _, code = os.waitpid(child(work), 0)
        after = check(lambda found: found in (before, new))
        seen.add((replaces, after == new))
        before = after
    events += event
assert after == new and len(seen) == 4, seen

def again_and_again():
    for step in range(before[0] + 1, 100000):
        save(step, 0)

for _ in range(20):
    process = child(again_and_again)
    time.sleep(random.uniform(0, 0.1))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    before = check(lambda found: found[0] >= before[0])
print("events", events, "steps", before[0])
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "c")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert int(words[1]) > 30, "file operations of two saves"
