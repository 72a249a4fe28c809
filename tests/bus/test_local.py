"""The private socket: who may call, what is answered, and who else may serve."""

import asyncio
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bus.local import Health, Refused, Service, Unreachable, application, json_body, private_socket, serving_privately


async def echo(request: Request) -> Response:
    body = await json_body(request, "echo", limit=100)
    return JSONResponse({"text": body.text("text")})


async def fail(_: Request) -> Response:
    raise RuntimeError("broken")


async def hang(_: Request) -> Response:
    await asyncio.sleep(60)
    return Response()


APP = application([Route(f"/{work.__name__}", work, methods=["POST"]) for work in (echo, fail, hang)], Health())


async def test_calls_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "run" / "echo.sock"
    service = Service("echo", path)
    with pytest.raises(Unreachable, match="echo is not reachable at"):
        await service.call("POST", "/echo", {"text": "x"})
    async with serving_privately(APP, path):
        assert await service.call("POST", "/echo", {"text": "x"}) == {"text": "x"}
        with pytest.raises(Refused, match="text: missing"):
            await service.call("POST", "/echo", {})
        with pytest.raises(Refused, match="longer than 100 bytes"):
            await service.call("POST", "/echo", {"text": "x" * 200})
        with pytest.raises(Refused, match="unexpected error") as refused:
            await service.call("POST", "/fail")
        assert refused.value.status == 500
        with pytest.raises(Refused, match="404"):
            await service.call("GET", "/nothing")
        with pytest.raises(Unreachable, match=r"did not answer POST /hang within 0.1 s"):
            await service.call("POST", "/hang", timeout=0.1)
    await service.close()


def test_nobody_else_can_reach_the_socket_whatever_the_umask(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    before = os.umask(0)
    try:
        with private_socket(folder / "x.sock"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert stat.S_IMODE((folder / "x.sock").stat().st_mode) == 0o600
    finally:
        os.umask(before)


@pytest.mark.kernel
async def test_another_user_is_cut_off_even_where_the_file_lets_him_in(tmp_path: Path) -> None:
    path = tmp_path / "run" / "x.sock"
    call = (
        "import os, socket, sys\n"
        "os.setuid(int(sys.argv[1]))\n"
        "caller = socket.socket(socket.AF_UNIX)\n"
        "caller.settimeout(30)\n"
        "caller.connect(sys.argv[2])\n"
        "try:\n"
        "    caller.sendall(b'GET /livez HTTP/1.0\\r\\n\\r\\n')\n"
        "    print(caller.recv(100))\n"
        "except ConnectionError:\n"
        "    print('cut off')\n"
    )

    async def answer(user: int) -> str:
        command = [sys.executable, "-c", call, str(user), str(path)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    async with serving_privately(APP, path):
        for folder in path.parents[:4]:
            if folder.stat().st_uid == os.geteuid() and folder != folder.parent:
                folder.chmod(folder.stat().st_mode | 0o055)
        path.chmod(0o666)
        assert "200 OK" in await answer(0)
        assert "200 OK" not in await answer(65534)


async def test_a_second_process_does_not_take_the_socket_of_a_live_one(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    async with serving_privately(APP, path):
        with pytest.raises(OSError, match="another process serves here"):
            private_socket(path)
        service = Service("first", path)
        assert await service.call("POST", "/echo", {"text": "still there"}) == {"text": "still there"}
        await service.close()
    private_socket(path).close()  # what is left of one that is gone is replaced


def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="at most 107 bytes"):
        private_socket(tmp_path / ("x" * 107))
    with socket.socket(socket.AF_UNIX) as probe:
        probe.bind(str(tmp_path / "x")[:107])
