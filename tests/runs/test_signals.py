"""A signal ends what goes on, but breaks off no import that is used again afterwards."""

import os
import signal
import subprocess
import sys

import pytest

from pylorus.runs.signals import STOPPING, stopped_by_signals, undisturbed

SWEEP = """
import os, signal, sys
from pathlib import Path
import pylorus.launch
from pylorus.runs.signals import stopped_by_signals

class Interrupted:  # as pandas' C code is made, a Ctrl-C comes
    def find_spec(self, name, path=None, target=None):
        if name == "pandas._libs.parsers" and not self.done:
            self.done = True
            os.kill(os.getpid(), signal.SIGINT)
    done = False

sys.meta_path.insert(0, Interrupted())
pylorus.launch._run = lambda *_, **__: None
context = type("Context", (), {"runtime": type("R", (), {"output_dir": "."}), "mode": pylorus.launch.RunMode.MULTIRUN})
try:
    with stopped_by_signals():
        pylorus.launch.job(None, context)
except KeyboardInterrupt:
    import pandas
    print("interrupted; pandas reads", len(pandas.read_csv(sys.argv[1])), "rows")
"""


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_waits_for_what_must_not_be_broken_off(number):
    done = False
    with stopped_by_signals(), pytest.raises(KeyboardInterrupt, match=signal.Signals(number).name), undisturbed():
        os.kill(os.getpid(), number)
        done = True
    assert done


def test_ctrl_c_while_a_sweep_imports_what_sums_it_up_ends_it_and_it_is_summed_up(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    found = subprocess.run(
        [sys.executable, "-c", SWEEP, str(tmp_path / "table.csv")], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.stdout == "interrupted; pandas reads 1 rows\n", found.stderr
