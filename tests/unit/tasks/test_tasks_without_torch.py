import subprocess
import sys


def test_preparing_data_needs_no_torch() -> None:
    program = (
        "import sys, shoal.tasks.kinds as k; k.create('causal-lm'); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
