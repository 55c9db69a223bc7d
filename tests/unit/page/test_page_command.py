"""`shoal page`: what it refuses before it serves, and what it does not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from made_runs import MadeRun
from shoal.cli.main import main
from shoal.page import web
from tiny import shoal
from web_servers import web_server


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as end:
        main(["page", *map(str, words)])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_mistakes_end_it_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = MadeRun(tmp_path / "runs" / "one").path
    assert "no such folder; give a run" in refused(capsys, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds no run" in refused(capsys, tmp_path / "empty")
    assert "there is no --key" in refused(capsys, run, "--host", "0.0.0.0", "--port", 0)
    assert "cannot be read" in refused(capsys, run, "--key", tmp_path / "none")
    with web.listen("127.0.0.1", 0, key=None) as taken:
        said = refused(capsys, run, "--port", taken.getsockname()[1])
        assert "choose another --port" in said and "Traceback" not in said


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("shoal.page")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("shoal.page", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'shoal[page]'" in refused(capsys, tmp_path)


def test_it_needs_no_torch() -> None:
    code = "import sys, shoal.page.server; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_run_and_what_its_pictures_and_orders_answer(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "one")
    (run.path / "confusion.png").write_bytes(b"picture")
    (run.path / "loss.png").write_bytes(b"not shown")
    same = {"Sec-Fetch-Site": "same-origin", "X-Shoal": "1"}
    with web_server(*shoal("page", run.path, "--port", "0")) as server:

        def get(path: str) -> int:
            return server.ask(path, **server.cookie).status

        def order(body: bytes) -> tuple[int, str]:
            answer = server.ask("/order", method="POST", body=body, **server.cookie, **same)
            return answer.status, answer.body

        assert get("/picture?run=one&name=confusion.png") == 200
        for query in (
            "",
            "?run=one",
            "?run=one&name=loss.png",
            "?run=..&name=confusion.png",
            "?run=one&name=../one/confusion.png",
            "?run=one&name=config.yaml",
        ):
            assert get(f"/picture{query}") == 404
        assert order(b'{"run": "one", "order": "SAVE"}')[0] == 409
        run.lock()
        assert order(b'{"run": "one", "order": "SAVE"}') == (200, '{"left":"SAVE"}')
        assert (run.path / "SAVE").exists()
        status, said = order(b'{"run": "one", "order": "config.yaml"}')
        assert status == 409 and "expected SAVE or STOP" in said
        assert order(b'{"run": "none", "order": "STOP"}')[0] == 404
        for body in (b"", b"[]", b"{", b'{"run": "one"}', b"[" * 5000):
            assert order(body)[0] == 400
        assert not (run.path / "STOP").exists()
