"""``python -m deepspeed_acco``: scripts that do not import the package, as every launcher starts them."""

import json
import re
import subprocess
import sys

import pytest

from deepspeed_acco.__main__ import main
from tests.support import training
from tests.support.launcher import rank_environment

SCRIPT = """
import argparse, os, sys
import deepspeed, torch
from helper import start  # lies beside the script
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
parser.add_argument("--words", nargs="*")
deepspeed.add_config_arguments(parser)
arguments = parser.parse_args()
assert __name__ == "__main__" and "deepspeed_acco" in sys.modules
deepspeed.init_distributed()
engine = start(arguments)
for step in range(8):
    engine.backward(engine(torch.ones(2, 4)).square().mean())
    engine.step()
told = ["rank", torch.distributed.get_rank(), type(engine.optimizer).__name__, engine.global_steps, arguments.words]
os.write(1, (os.linesep + " ".join(map(str, told)) + os.linesep).encode())  # at once, since both ranks write here
"""
HELPER = """
import deepspeed, torch
def start(arguments):
    module = torch.nn.Linear(4, 4)
    return deepspeed.initialize(arguments, module, model_parameters=module.parameters())[0]
"""
WAYS = {
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--module", "deepspeed_acco"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "deepspeed_acco"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--cpu"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "deepspeed_acco"),
    ],
}


@pytest.fixture
def script(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "config.json").write_text(json.dumps(training.ds_config(2)))
    return tmp_path / "train.py"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("way", "as_module"),
    [
        pytest.param("deepspeed", False, marks=pytest.mark.full),
        pytest.param("deepspeed", True, marks=pytest.mark.full),
        pytest.param("torchrun", False, marks=pytest.mark.full),
        pytest.param("torchrun", True, marks=pytest.mark.full),
        pytest.param("accelerate", False, marks=pytest.mark.full),
    ],
)
def test_a_script_that_does_not_import_the_package(script, way, as_module):
    target = ["-m", "train"] if as_module else [str(script)]
    arguments = ["--deepspeed", "--deepspeed_config", str(script.parent / "config.json"), "--words", "a b", "-m"[1:]]
    done = subprocess.run(
        [sys.executable, *WAYS[way], *target, *arguments],
        cwd=script.parent,  # python -m finds the modules of the working folder
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"rank (\d) (\w+) (\d+) (\[.*\])", done.stdout)
    assert sorted(told) == [(str(rank), "AccoZeroOptimizer", "4", "['a b', 'm']") for rank in range(2)]


CALLS = """
import sys
import deepspeed, torch
import deepspeed_acco.optimizer as plugin
def train(config):
    module = torch.nn.Linear(4, 4)
    return deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
config = {"train_batch_size": 2, "zero_optimization": {"stage": STAGE}, "optimizer": {"type": "ACCO"}}
WHAT
"""


def _end_of(path):
    """Returns the exit code, or the error that comes through, and what was printed."""
    import contextlib
    import io

    kept, sys.argv = sys.argv, ["deepspeed_acco", path]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            main()
    except SystemExit as end:
        return end.code, printed.getvalue()
    except Exception as error:
        return repr(error), printed.getvalue()
    finally:
        sys.argv = kept
    return 0, printed.getvalue()


REFUSED = "ACCO: zero_optimization.stage = 2 is not allowed; allowed: 1."


def test_what_initialize_refuses_is_told_without_a_traceback(ranks, tmp_path):
    path = tmp_path / "train.py"
    path.write_text(CALLS.replace("STAGE", "2").replace("WHAT", "train(config)"))
    ((code, printed),) = ranks(1).run(_end_of, path=str(path))
    assert code == 1
    error, call, hint = printed.splitlines()
    assert error.startswith(f"python -m deepspeed_acco: error: {REFUSED}") and "ds_acco check" in hint
    assert call == f"  deepspeed.initialize was called from {path}, line 7, in train"


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ('raise ValueError("ACCO: mine")', "ValueError('ACCO: mine')"),
        ("plugin.ACCO([], lr=-1)", "ValueError('ACCO: optimizer.params.lr = -1"),
        ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    train(config)", f"ValueError('{REFUSED}"),
        (
            "try:\n    train(config)\nexcept ValueError as error:\n    raise RuntimeError('mine') from error",
            "RuntimeError('mine')",
        ),
        ("try:\n    train(config)\nexcept ValueError:\n    sys.exit(3)", 3),
    ],
)
def test_errors_of_the_script_come_with_their_traceback(ranks, tmp_path, what, error):
    path = tmp_path / "train.py"
    path.write_text(CALLS.replace("STAGE", "2").replace("WHAT", what))
    ((came, printed),) = ranks(1).run(_end_of, path=str(path))
    assert came == error or str(came).startswith(str(error)), came
    assert not printed


@pytest.mark.parametrize("words", [[], ["-m"], ["missing.py"], ["--local_rank=0"]])
def test_what_cannot_be_run_is_told(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["deepspeed_acco", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: python -m deepspeed_acco [-m MODULE | SCRIPT] [ARGUMENTS]\n")
    assert ("'missing.py' is no file" if "missing.py" in words else "no script or module was given") in said
