"""The command line, before anything heavy is imported."""

import subprocess
import sys

import pytest

from aot_fast.__main__ import main
from tests.conftest import ROOT, launch


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["report", "--help"], ["bootstrap", "--help"], ["doctor", "--help"]])
def test_help_is_there_for_every_command(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0 and "usage: aot-fast" in capsys.readouterr().out


def test_settings_errors_come_before_torch_is_imported():
    script = (
        "import sys; from aot_fast.__main__ import main; code = main(['run', 'tiny', '--defender.grop_size', '3']); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert "did you mean 'defender.group_size'" in done.stderr


def test_wrong_setting_exits_2():
    assert launch(1, "-m", "aot_fast", "run", "tiny", "--attacker.window", "99").returncode == 2


def test_dry_run_prints_settings_that_load_again(capsys, tmp_path):
    assert main(["run", "tiny", "--dry-run", "--run.seed", "5"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    from aot_fast.settings import load

    assert load(str(tmp_path / "again.yaml")).run.seed == 5


def test_report_of_a_folder_that_is_no_run_exits_2(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err
